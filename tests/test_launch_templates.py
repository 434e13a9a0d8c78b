"""Templates of queues and clusters: what they give, what is said of wrong ones, what they get."""

import re
import subprocess
import sys
from pathlib import Path

import jinja2
import jinja2.meta
import pytest
import yaml

from launch.ways import kubernetes, slurm_script
from launch.ways.kubernetes import Claim, KubernetesJob
from launch.ways.render_template import BATCH_FILE, MANIFEST
from launch.ways.slurm_script import RankCommand, SlurmJob
from tests.pages import section

ROOT = Path(__file__).resolve().parent.parent
GENELOOM = [sys.executable, "-c", "from launch.cli import main; main()"]
GOLDEN = Path(__file__).parent / "golden" / "launch"
ODD = [
    "a b", "$(touch hacked)", "'", '"', "`id`", "*", "\\n", "ä 😀", "two\nlines", "{{ x }}",
    "{% if %}", "& <b>", "\u2028 \x85 \x7f", "", "yes", "1e3", "a: b # c", "- x", "null",
    "long " * 40,
]  # fmt: skip
SETTINGS = ["data.shards=/shards", "run.out=/runs/a"]
SLURM_JOB = SlurmJob("geneloom-pretrain", 2, 4, "60")
COMMAND = RankCommand("/opt/python", "pretrain", [*ODD], [*ODD, "--restart"])
KUBERNETES_JOB = KubernetesJob("pytorchjob", "x", "i", 1, 1, claims=[Claim("runs", "/runs")])


def batch_files() -> dict[str, str]:
    rich = SlurmJob(
        "geneloom-pretrain", 4, 8, "1-00:00:00", gpus_per_node=8, cpus_per_task=12, mem="0",
        partition="gpu", account="lab", qos="high", container="/images/a b.sif",
        mounts=["/data", "/my runs"], setup=["module load cuda", "export X='a b' && date"],
        sbatch=["--exclusive", '--chdir="/a \\"b\\" 100%"'],
    )  # fmt: skip
    pyxis = SlurmJob(
        "n", 1, 2, "90", container="r/i m:1", runtime="pyxis", mounts=["/d:/d", "/e f"]
    )
    command = RankCommand("/my python", "pretrain", ["--config", "a b"], ["--config", "'$x'"])
    out = Path("/runs/a 'run' of $HOME \"100%\"")
    plain = SlurmJob("geneloom-perturb", 1, 1, "60")
    return {
        f"{name}.sbatch": slurm_script.render(job, command, out, "geneloom\nx").replace(
            str(ROOT), "/checkout"
        )
        for name, job in (("gpus", rich), ("pyxis", pyxis), ("plain", plain))
    }


def manifests(folder: Path) -> dict[str, str]:
    config = folder / "mine.yaml"
    config.write_text("# ä\ndata: {shards: /shards/a}\n\nrun: {out: /runs/b}\n")
    claims = [Claim("runs", "/runs"), Claim("shards", "/shards", read_only=True)]
    gpus = {"nodes": 3, "ranks_per_node": 8, "gpus_per_node": 8, "memory": "400Gi", "cpus": "96"}
    more = {"namespace": "team", "node_selector": {"pool": "a", "on": "yes"}, "env": {"A": "b: c"}}
    own = ["--config", str(config), "run.seed=3", "--x=$(y)"]
    supplied = ["--config", "tiny", *SETTINGS]
    given = {
        "pytorchjob.yaml": ({"kind": "pytorchjob", **gpus, **more}, "pretrain", own),
        "mpijob.yaml": ({"kind": "mpijob", **gpus, **more}, "pretrain", supplied),
        "cpu.yaml": ({"kind": "pytorchjob", "nodes": 2, "ranks_per_node": 2}, "pretrain", supplied),
        "prepare.yaml": (
            {"kind": "mpijob", "nodes": 1, "ranks_per_node": 1}, "prepare", [*ODD, "--out=/runs/s"],
        ),
    }  # fmt: skip
    return {
        name: kubernetes.render(
            KubernetesJob(**job, name="geneloom-x", image="r/g:1", claims=claims), verb, arguments
        )
        for name, (job, verb, arguments) in given.items()
    }


def test_supplied_templates_give_what_they_gave(tmp_path):
    """Written by the code that templates took the place of."""
    found = batch_files() | manifests(tmp_path)
    assert found.keys() == {path.name for path in GOLDEN.iterdir()}
    for name, text in found.items():
        assert text == (GOLDEN / name).read_text(), name


def test_every_value_is_quoted_without_being_asked_to(tmp_path):
    """By bash and by YAML: what they read is what was given, whatever it holds."""
    script, manifest = tmp_path / "own.sbatch", tmp_path / "own.yaml"
    script.write_text("#!/bin/bash\nprintf '%s\\0' {{ first }} {{ made_by }} {{ log }}\n")
    for value in ODD:
        text = slurm_script.render(SLURM_JOB, COMMAND, Path("/runs/$x"), value, script)
        said = subprocess.run(["bash", "-uc", text], cwd=tmp_path, capture_output=True, check=True)
        expected = [*ODD, value, "/runs/$x/launch/job-%j.log"]
        assert said.stdout.decode().split("\0")[:-1] == expected
    manifest.write_text("kind: Pod\nall: {{ arguments }}\n{% for a in arguments %}\n"
                        "a{{ loop.index0 }}: {{ a }}\n{% endfor %}\n")  # fmt: skip
    text = kubernetes.render(KUBERNETES_JOB, "prepare", ["--out=/runs/a", *ODD], manifest)
    read = yaml.safe_load(text)
    assert read["all"][1:] == [word.replace("$(", "$$(") for word in ODD]
    assert [read[f"a{n}"] for n in range(len(read["all"]))] == read["all"]
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("own.sbatch", "own.yaml")] == []


def test_a_folder_that_sbatch_cannot_read_is_refused():
    with pytest.raises(ValueError, match=r"line \d+: .*sbatch reads no name with a line break"):
        slurm_script.render(SLURM_JOB, COMMAND, Path("/runs/a\necho hacked"), "geneloom")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("#!/bin/bash\n{{ nodse }}\n", "line 2: 'nodse' is undefined; there are account, again, "),
        ("#!/bin/bash\n\n{% if nodes %}\n", "line 3: Unexpected end of template"),
        ("#!/bin/bash\n{{ nodes | shout }}\n", "line 2: No filter named 'shout'"),
        ("#!/bin/bash\n{{ partition }}\n", "line 2: a value is written that was not given"),
        ("#!/bin/bash\n{{ nodes / 0 }}\n", "line 2: division by zero"),
        ("#!/bin/bash\n{{ name.__class__.__mro__ }}\n", "line 2: access to attribute '__class__'"),
        ("#!/bin/bash\n{% include '/etc/passwd' %}\n", "line 2: no loader"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "line 1: maximum recursion"),
        ("echo {{ nodes }}\n", "must give a file that begins with #!/bin/bash"),
        (b"\xff\xfe", "is no text in UTF-8"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_wrong_templates_are_named(template, message, tmp_path):
    path = tmp_path / "own.sbatch"
    if template is not None:
        path.write_bytes(template if isinstance(template, bytes) else template.encode())
    with pytest.raises(ValueError) as found:
        slurm_script.render(SLURM_JOB, COMMAND, Path("/runs/a"), "geneloom", path)
    assert str(found.value).startswith(f"template {path}: {message}")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("kind: [\n", "does not give YAML: "),
        ("kind: !!python/object/apply:os.getcwd []\n", "does not give YAML: "),
        ("a: 1\n", "must give objects of Kubernetes, with a kind"),
        ("- kind\n", "must give objects of Kubernetes, with a kind"),
        ("", "must give objects of Kubernetes, with a kind"),
        ("kind: Pod\nx: {{ namespace }}\n", "line 2: a value is written that was not given"),
    ],
)
def test_wrong_manifests_are_named(template, message, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(template)
    with pytest.raises(ValueError) as found:
        kubernetes.render(KUBERNETES_JOB, "prepare", ["--out=/runs/a"], path)
    assert str(found.value).startswith(f"template {path}: {message}")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("way", ["slurm", "kubernetes"])
def test_the_commands_take_a_template_and_write_nothing_with_a_wrong_one(way, tmp_path):
    out, manifest, template = tmp_path / "run", tmp_path / "job.yaml", tmp_path / "own"
    options = {
        "slurm": ["--time", "60", "--show"],
        "kubernetes": ["--image", "i", "--claim", f"a:{tmp_path}", "--manifest", str(manifest)],
    }[way]

    def launch(text: str) -> subprocess.CompletedProcess:
        template.write_text(text)
        return subprocess.run(
            [*GENELOOM, "launch", way, *options, "--template", str(template),
             "pretrain", "--config", "tiny", "data.shards=x", f"run.out={out}"],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    wrong = launch("{{ nodse }}")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert wrong.stderr.startswith(f"error: template {template}: line 1: 'nodse' is undefined")
    assert wrong.stderr.count("\n") == 1
    assert not out.exists() and not manifest.exists()
    right = launch("#!/bin/bash\nkind: {{ module }}\n")
    assert (right.returncode, right.stderr) == (0, "")
    shown = {"slurm": "#!/bin/bash\nkind: pretrain\n", "kubernetes": "---\nkind: pretrain\n"}
    assert right.stdout == shown[way]


@pytest.mark.parametrize(("way", "supplied"), [("slurm", BATCH_FILE), ("kubernetes", MANIFEST)])
def test_the_documented_variables_are_those_that_a_template_gets(way, supplied):
    if way == "slurm":
        real = slurm_script.variables(SLURM_JOB, COMMAND, Path("/runs/a"), "geneloom")
    else:
        real = kubernetes.variables(KUBERNETES_JOB, "prepare", [])
    page = section((ROOT / "docs" / "clusters.md").read_text(), f"variables-of-{way}")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    documented = [name for cell in rows for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(documented) == sorted(real)
    used = jinja2.meta.find_undeclared_variables(
        jinja2.Environment().parse(re.sub(r"\| (line|sbatch)\b", "", supplied.read_text()))
    )
    assert used <= real.keys()
