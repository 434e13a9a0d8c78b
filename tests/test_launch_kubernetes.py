"""``geneloom launch kubernetes``: manifests against their schema, and their commands, run."""

import copy
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import psutil
import pytest
import yaml

from launch.ways.kubernetes import Claim, KubernetesJob, render
from tests.kubernetes_schema import SCHEMAS
from tests.runs import last_step, metrics, tiny_config

ROOT = Path(__file__).resolve().parent.parent
GENELOOM = [sys.executable, "-c", "from launch.cli import main; main()"]
CLAIMS = [Claim("runs", "/runs"), Claim("shards", "/shards", read_only=True)]
SETTINGS = ["--config", "tiny", "data.shards=/shards/a", "run.out=/runs/b"]


def job(**changes) -> KubernetesJob:
    given = {"kind": "pytorchjob", "name": "geneloom-pretrain", "image": "registry/geneloom:1",
             "nodes": 2, "ranks_per_node": 1, "claims": CLAIMS}  # fmt: skip
    return KubernetesJob(**given | changes)


def rendered(verb: str = "pretrain", arguments: list[str] = SETTINGS, **changes) -> list[dict]:
    """Return the manifests, each checked against its schema."""
    manifests = list(yaml.safe_load_all(render(job(**changes), verb, arguments)))
    for manifest in manifests:
        schema = SCHEMAS[manifest["apiVersion"], manifest["kind"]]
        jsonschema.Draft202012Validator(schema).validate(manifest)
    return manifests


def containers(manifest: dict) -> dict[str, dict]:
    """Return role -> its container."""
    replicas = next(v for k, v in manifest["spec"].items() if k.endswith("ReplicaSpecs"))
    return {role: r["template"]["spec"]["containers"][0] for role, r in replicas.items()}


@pytest.mark.parametrize("kind", ["pytorchjob", "mpijob"])
@pytest.mark.parametrize("gpus", [0, 8])
@pytest.mark.parametrize("nodes", [1, 4])
def test_manifests_match_their_schema(kind, gpus, nodes):
    (manifest,) = rendered(
        kind=kind, nodes=nodes, gpus_per_node=gpus, ranks_per_node=gpus or 2, memory="400Gi",
        cpus="96", namespace="team", env={"NCCL_DEBUG": "INFO"}, node_selector={"pool": "a"},
    )  # fmt: skip
    assert manifest["metadata"] == {"name": "geneloom-pretrain", "namespace": "team"}
    found = containers(manifest)
    for role, container in found.items():
        limits = container["resources"].get("limits", {})
        computes = role != "Launcher"
        assert limits.get("nvidia.com/gpu") == (str(gpus) if gpus and computes else None)
        assert {"name": "NCCL_DEBUG", "value": "INFO"} in container["env"]
        paths = {m["mountPath"]: m.get("readOnly") for m in container["volumeMounts"]}
        assert paths == {"/dev/shm": None, "/runs": False, "/shards": True}
    if kind == "pytorchjob":
        assert ("Worker" in found) == (nodes > 1)
        assert f"--nproc-per-node={gpus or 2}" in found["Master"]["command"]
    else:
        assert manifest["spec"]["slotsPerWorker"] == (gpus or 2)
        assert manifest["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"] == nodes
        assert found["Launcher"]["command"][:3] == ["geneloom", "launch", "mpi"]
        assert found["Launcher"]["command"][-1] == "--restart"


@pytest.mark.parametrize(
    "path",
    [
        ("spec", "pytorchReplicaSpecs", "Master", "restartPolicy"),
        ("spec", "pytorchReplicaSpecs", "Master", "template", "spec", "volumes", 0, "name"),
        ("spec", "pytorchReplicaSpecs", "Master", "template", "spec", "containers", 0, "image"),
        ("metadata", "name"),
        ("kind",),
    ],
)
def test_the_schema_finds_faults(path):
    (manifest,) = rendered()
    place = wrong = copy.deepcopy(manifest)
    for key in path[:-1]:
        place = place[key]
    for change in ("Not Right!", None):
        place[path[-1]] = change
        schema = SCHEMAS["kubeflow.org/v1", "PyTorchJob"]
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(schema).validate(wrong)
    place[path[-1] if isinstance(path[-1], int) else "unknown"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(wrong)


def test_local_settings_travel_in_a_config_map(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: {shards: /shards/a}\nrun: {out: /runs/b}\n")
    config_map, manifest = rendered(arguments=["--config", str(path), "run.seed=3"])
    assert config_map["data"] == {"config.yaml": path.read_text()}
    command = containers(manifest)["Worker"]["command"]
    assert command[-5:] == [
        "pretrain", "--config", "/etc/geneloom/config.yaml", "run.seed=3", "--restart",
    ]  # fmt: skip
    mounts = containers(manifest)["Worker"]["volumeMounts"]
    assert {"name": "config", "mountPath": "/etc/geneloom", "readOnly": True} in mounts


def test_prepare_is_one_pod():
    (manifest,) = rendered("prepare", ["/cells", "--out", "/runs/shards", "--x=$(y)"], nodes=1)
    found = containers(manifest)
    assert list(found) == ["Master"]
    expected = ["python3", "-m", "data_prep", "/cells", "--out", "/runs/shards", "--x=$$(y)"]
    assert found["Master"]["command"] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--claim", "runs"], "must be NAME:/path"),
        (["--claim", "shards:/shards"], "on no claim that can be written"),
        (["--claim", "runs:/runs:ro"], "on no claim that can be written"),
        (["--claim", "Runs:/runs"], "--claim Runs: small letters"),
        (["--claim", "a:/runs", "--claim", "b:/runs"], "/runs stands twice"),
        (["--claim", "runs:/runs", "--kind", "job"], "pytorchjob or mpijob"),
        (["--claim", "runs:/runs", "--memory", "lots"], "--memory lots: a quantity"),
        (["--claim", "runs:/runs", "--restart-policy", "Always"], "OnFailure or Never"),
        (["--claim", "runs:/runs", "--env", "A"], "this shell has no such variable"),
    ],
)
def test_wrong_jobs_are_refused(options, message, tmp_path):
    path = tmp_path / "job.yaml"
    done = subprocess.run(
        [*GENELOOM, "launch", "kubernetes", "--image", "i", "--manifest", str(path), *options,
         "pretrain", *SETTINGS],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert not path.exists()


def test_printed_and_stored(tmp_path):
    path = tmp_path / "job.yaml"
    done = subprocess.run(
        [*GENELOOM, "launch", "kubernetes", "--image", "i", "--manifest", str(path),
         "--claim", "runs:/runs", "--gpus-per-node", "8", "pretrain", *SETTINGS],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == path.read_text()
    assert yaml.safe_load(done.stdout)["kind"] == "PyTorchJob"


def start_pods(manifest: dict, port: int, log: Path) -> list[subprocess.Popen]:
    """Run what the containers would: their command, with what the operator sets."""
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    roles = [role for role in ("Master", "Worker") for _ in range(replicas[role]["replicas"])]
    pods = []
    for number, role in enumerate(roles):
        container = containers(manifest)[role]
        operator = {"RANK": str(number), "WORLD_SIZE": str(len(roles)),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        own = {e["name"]: e["value"] for e in container["env"]} | operator
        words = [_expanded(word, own) for word in container["command"]]
        assert words[0] == "python3"
        with log.open("a") as file:
            pods.append(
                subprocess.Popen(
                    [sys.executable, *words[1:]],
                    cwd=ROOT,
                    env={**os.environ, **own},
                    stdout=file,
                    stderr=file,
                )  # fmt: skip
            )
    return pods


def _expanded(word: str, variables: dict[str, str]) -> str:
    """Return a word as the kubelet hands it over: ``$(NAME)`` replaced."""
    return re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], word)


@pytest.mark.long
def test_pods_save_when_evicted_and_resume(shards, tmp_path):
    """The commands of a PyTorchJob of two pods: SIGTERM as at an eviction, then the pods again."""
    from pretrain.checkpoints import checkpoint

    config = tiny_config(
        shards, tmp_path / "run", run__max_steps=150, checkpoint__every_steps=1000,
        run__heartbeat_s=5,
    )  # fmt: skip
    path, log = tmp_path / "config.yaml", tmp_path / "log"
    path.write_text(config.to_yaml())
    claims = [Claim("runs", str(tmp_path))]
    text = render(job(claims=claims), "pretrain", ["--config", str(path)])
    _, manifest = yaml.safe_load_all(text.replace("/etc/geneloom/config.yaml", str(path)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pods = start_pods(manifest, port, log)
    try:
        until = time.monotonic() + 120
        while last_step(config.run.out) < 5:
            assert time.monotonic() < until, log.read_text()
            assert all(p.poll() is None for p in pods), log.read_text()
            time.sleep(0.05)
        # As the kubelet does: to the container's first process alone.
        pods[1].send_signal(signal.SIGTERM)
        assert all(p.wait(60) != 0 for p in pods)
        last = checkpoint.newest(config.run.out)
        assert last is not None, log.read_text()
        assert last.step == last_step(config.run.out)
        assert last.step < 150
        pods = start_pods(manifest, port, log)
        assert [p.wait(120) for p in pods] == [0, 0], log.read_text()
    finally:
        for pod in pods:
            if pod.poll() is None:
                for process in psutil.Process(pod.pid).children(recursive=True):
                    process.kill()
                pod.kill()
    rows = metrics(config.run.out, "train")
    assert [r["step"] for r in rows] == list(range(1, 151))


def test_a_chosen_step_is_refused_where_starts_cannot_be_told_apart():
    with pytest.raises(ValueError, match="--step: a pod that comes back"):
        render(job(), "pretrain", [*SETTINGS, "--resume", "--step=best"])
