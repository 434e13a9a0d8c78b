"""``geneloom launch kubernetes``: print the manifest of a distributed job for a Kubeflow operator.

Nothing is sent to a cluster: check the manifest, then submit it with ``kubectl apply``.

PyTorchJob (kubeflow.org/v1): a pod for each node, torchrun inside. MPIJob (kubeflow.org/v2beta1): a
launcher pod with ``geneloom launch mpi``, and a worker pod for each node.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import typer

from data_prep.files import complete_file
from data_prep.running.redact import is_public
from launch.environment import ENV_HELP, named_variables
from launch.verbs import MODULES, check_and_find_folder, module_of, named_values, to_go_on
from launch.ways.render_template import MANIFEST, TEMPLATE_HELP, render_yaml

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_QUANTITY = re.compile(r"\d+(\.\d+)?(m|[kMGTPE]|[KMGTPE]i)?")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
# A pod's name is the job's and "-worker-" and a number; a label holds 63 characters.
_LONGEST_NAME = 50
_CONFIG_FOLDER = "/etc/geneloom"
# Of the grace period, for what is not the saving: the agent's own end.
_SPARE_S = 15


@dataclass(frozen=True)
class Claim:
    """A PersistentVolumeClaim and the path at which a pod mounts it."""

    name: str
    path: str
    read_only: bool = False


@dataclass(frozen=True)
class KubernetesJob:
    """Resources and settings of the job that a manifest requests.

    `gpus_per_node` is 0 for CPU nodes. `shm`, `memory` and `cpus` are per pod. Variables of
    `secret_names` come from the Secret with the name `secret`; the manifest makes it if there are
    `secret_values`.
    """

    kind: str
    name: str
    image: str
    nodes: int
    ranks_per_node: int
    gpus_per_node: int = 0
    cpus: str | None = None
    memory: str | None = None
    shm: str = "16Gi"
    namespace: str | None = None
    claims: list[Claim] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    secret: str | None = None
    secret_names: list[str] = field(default_factory=list)
    secret_values: dict[str, str] = field(default_factory=dict)
    node_selector: dict[str, str] = field(default_factory=dict)
    grace_s: int = 300
    restart_policy: str = "OnFailure"
    restarts: int = 10


def launch_kubernetes(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(help=f"what to run: {', '.join(MODULES)}")],
    image: Annotated[str, typer.Option(help="with geneloom in it; for mpijob with sshd too")],
    claim: Annotated[
        list[str] | None,
        typer.Option(help="PersistentVolumeClaim as NAME:/path or NAME:/path:ro; may be repeated"),
    ] = None,
    kind: Annotated[str, typer.Option(help="pytorchjob or mpijob")] = "pytorchjob",
    name: Annotated[str | None, typer.Option(help="default: geneloom-VERB")] = None,
    namespace: Annotated[str | None, typer.Option()] = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="0: CPU nodes")] = 0,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="default: one per GPU; 1 on CPU nodes")
    ] = None,
    cpus: Annotated[str | None, typer.Option(help="of a pod, e.g. 32")] = None,
    memory: Annotated[str | None, typer.Option(help="of a pod, e.g. 400Gi")] = None,
    shm: Annotated[str, typer.Option(help="of /dev/shm, which NCCL needs")] = "16Gi",
    env: Annotated[list[str] | None, typer.Option(help=ENV_HELP)] = None,
    secret: Annotated[
        str | None, typer.Option(help="Secret of the cluster with the values of each --env NAME")
    ] = None,
    node_selector: Annotated[
        list[str] | None, typer.Option(help="label=value of the nodes; may be repeated")
    ] = None,
    grace: Annotated[
        int, typer.Option(min=30, help="seconds between a pod's SIGTERM and its end, to save in")
    ] = 300,
    restart_policy: Annotated[str, typer.Option(help="OnFailure or Never")] = "OnFailure",
    restarts: Annotated[int, typer.Option(min=0, help="before the job has failed")] = 10,
    template: Annotated[Path, typer.Option(help=TEMPLATE_HELP, show_default=False)] = MANIFEST,
    out: Annotated[Path | None, typer.Option("--manifest", help="write it here too")] = None,
) -> None:
    """Print a manifest: ``geneloom launch kubernetes --image IMAGE --claim runs:/runs --nodes 2
    --gpus-per-node 8 pretrain --config tiny run.out=/runs/a data.shards=/shards/b``.

    A pod that is evicted or fails comes back and resumes. `kubectl apply -f FILE` starts it.
    """
    name = name or f"geneloom-{verb}"
    job = KubernetesJob(
        kind=kind, name=name, image=image, nodes=nodes,
        ranks_per_node=ranks_per_node or gpus_per_node or 1, gpus_per_node=gpus_per_node,
        cpus=cpus, memory=memory, shm=shm, namespace=namespace,
        claims=[_claim(c) for c in claim or []], **_variables_of_pods(env or [], secret, name),
        node_selector=named_values("--node-selector", node_selector or []), grace_s=grace,
        restart_policy=restart_policy, restarts=restarts,
    )  # fmt: skip
    text = render(job, verb, context.args, template)
    if out is not None:
        if out.exists():
            raise ValueError(f"{out}: exists; give --manifest a new name")
        with complete_file(out) as aside:
            if job.secret_values:
                aside.touch(mode=0o600)
            aside.write_text(text)
    print(text, end="")


def _variables_of_pods(given: list[str], secret: str | None, name: str) -> dict[str, Any]:
    """Return the fields of a job for ``--env``: values that may be secrets go into a Secret.

    With ``--secret`` they are in the cluster already, and neither the shell nor the manifest has
    them.

    Raises
    ------
    ValueError
        A value that may be a secret is given beside ``--secret``.
    """
    there = [n for n in given if secret is not None and "=" not in n]
    values = named_variables([n for n in given if n not in there])
    hidden = {n: v for n, v in values.items() if not is_public(n)}
    if secret is not None and hidden:
        raise ValueError(
            f"--secret {secret}: give `--env {next(iter(hidden))}` without its value, which is "
            "read from that Secret"
        )
    return {
        "env": {n: v for n, v in values.items() if is_public(n)},
        "secret": secret if there else f"{name}-env" if hidden else None,
        "secret_names": sorted([*there, *hidden]),
        "secret_values": hidden,
    }


def _claim(text: str) -> Claim:
    parts = text.split(":")
    if len(parts) not in (2, 3) or not parts[1].startswith("/") or parts[2:] not in ([], ["ro"]):
        raise ValueError(f"--claim {text}: must be NAME:/path or NAME:/path:ro")
    return Claim(parts[0], parts[1], parts[2:] == ["ro"])


def render(job: KubernetesJob, verb: str, arguments: list[str], template: Path = MANIFEST) -> str:
    """Return the manifest as YAML: the job, and a ConfigMap if the settings are in a local file.

    A Secret comes first if the job has values for one.

    Raises
    ------
    ValueError
        A setting or name is not valid, the run folder is not on a mounted PersistentVolumeClaim,
        so that the run would be lost with its pod, or the template cannot be right.
    """
    require_sound(job, check_and_find_folder(verb, arguments))
    if verb == "prepare" and (job.nodes > 1 or job.ranks_per_node > 1):
        raise ValueError("launch kubernetes prepare: runs in one pod, with --processes cores")
    return render_yaml(template, variables(job, verb, arguments))


def variables(job: KubernetesJob, verb: str, arguments: list[str]) -> dict[str, Any]:
    """Return what a template of a manifest gets, by name (docs/clusters.md lists them)."""
    config, kind = None, job.kind
    if verb == "prepare":
        kind = "pytorchjob"
    else:
        config, arguments = _config_of(arguments)
        arguments = _every_start(verb, arguments)
    env = {"PYTHONSAFEPATH": "1"}
    if not job.gpus_per_node:
        env["DS_ACCELERATOR"] = "cpu"
    if kind == "pytorchjob":
        # torchrun gives its ranks half a minute to save, unless told otherwise.
        env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(job.grace_s - _SPARE_S)
    limits = {
        "nvidia.com/gpu": str(job.gpus_per_node) if job.gpus_per_node else None,
        "cpu": job.cpus,
        "memory": job.memory,
    }
    return {
        **asdict(job),
        "kind": kind,
        "env": env | job.env,
        # What ranks of an MPIJob get, by name: its pods of workers hand on no environment.
        "env_names": [*job.env, *job.secret_names],
        "limits": {name: value for name, value in limits.items() if value is not None},
        "verb": verb,
        "module": module_of(verb),
        # The kubelet replaces $(NAME), not $$(.
        "arguments": [a.replace("$(", "$$(") for a in arguments],
        "config": config,
        "config_folder": _CONFIG_FOLDER,
    }


def _every_start(verb: str, arguments: list[str]) -> list[str]:
    """Return arguments that are valid for the first start of a pod and for every later one.

    A pod cannot know whether it is started for the first time, so the same arguments must begin a
    new run or resume it.

    Raises
    ------
    ValueError
        ``--step`` is given: every later start would go back to that step.
    """
    if any(a == "--step" or a.startswith("--step=") for a in arguments):
        raise ValueError(
            "launch kubernetes: --step: a pod that comes back would go back to that step again; "
            "resume once with `geneloom pretrain --resume --step`, then without it here"
        )
    return to_go_on(verb, arguments)


def require_sound(job: KubernetesJob, folder: Path) -> None:
    """Raise ValueError, with all problems, if Kubernetes would refuse the job or lose its run."""
    problems = []
    names = {"--name": job.name, "--namespace": job.namespace or "x", "--secret": job.secret or "x"}
    for option, value in [*names.items(), *(("--claim", c.name) for c in job.claims)]:
        if not _NAME.fullmatch(value) or len(value) > _LONGEST_NAME:
            problems.append(
                f"{option} {value}: small letters, digits and -, at most {_LONGEST_NAME}"
            )
    for option, value in (("--cpus", job.cpus), ("--memory", job.memory), ("--shm", job.shm)):
        if value is not None and not _QUANTITY.fullmatch(value):
            problems.append(f"{option} {value}: a quantity of Kubernetes, e.g. 8, 500m, 64Gi")
    if job.kind not in ("pytorchjob", "mpijob"):
        problems.append(f"--kind {job.kind}: must be pytorchjob or mpijob")
    if job.restart_policy not in ("OnFailure", "Never"):
        problems.append(f"--restart-policy {job.restart_policy}: must be OnFailure or Never")
    given = [*job.env, *job.secret_names]
    problems += [f"--env {n}: no name of a variable" for n in given if not _ENV_NAME.fullmatch(n)]
    if not job.image or any(c.isspace() for c in job.image):
        problems.append(f"--image {job.image!r}: no name of an image")
    written = [c for c in job.claims if _is_below(folder, c.path) and not c.read_only]
    if not written:
        problems.append(
            f"{folder}: on no claim that can be written, it would be lost with its pod; add "
            "--claim NAME:/path with a path above it"
        )
    paths = [c.path for c in job.claims]
    twice = sorted({p for p in paths if paths.count(p) > 1})
    problems += [f"--claim: {path} stands twice" for path in twice]
    if problems:
        raise ValueError("launch kubernetes: " + "; ".join(problems))


def _is_below(folder: Path, path: str) -> bool:
    return PurePosixPath(path) in (PurePosixPath(folder), *PurePosixPath(folder).parents)


def _config_of(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Return the text of a local settings file, and arguments that name it where pods see it."""
    for place, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name != "--config":
            continue
        path = Path(value) if equals else Path(arguments[place + 1])
        if path.is_file():
            inside = ["--config", f"{_CONFIG_FOLDER}/config.yaml"]
            rest = arguments[place + (1 if equals else 2) :]
            return path.read_text(), [*arguments[:place], *inside, *rest]
    return None, arguments
