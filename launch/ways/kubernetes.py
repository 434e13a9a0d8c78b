"""``geneloom launch kubernetes``: the manifest of a job for Kubeflow's operators. Applies nothing.

PyTorchJob (kubeflow.org/v1): a pod for each node, torchrun inside. MPIJob (kubeflow.org/v2beta1): a
launcher pod with ``geneloom launch mpi``, and a worker pod for each node.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import typer
import yaml

from launch.environment import ENV_HELP, named_variables
from launch.verbs import MODULES, check_and_find_folder, module_of, named_values, to_go_on

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_QUANTITY = re.compile(r"\d+(\.\d+)?(m|[kMGTPE]|[KMGTPE]i)?")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
# A pod's name is the job's and "-worker-" and a number; a label holds 63 characters.
_LONGEST_NAME = 50
_HOSTFILE = "/etc/mpi/hostfile"
_CONFIG_FOLDER = "/etc/geneloom"
# Of the grace period, for what is not the saving: the agent's own end.
_SPARE_S = 15
_SSHD = ["/usr/sbin/sshd", "-De"]
# Before a worker's sshd is told to end: the launcher has asked the ranks to save. The brackets keep
# the loop from finding itself.
_UNTIL_RANKS_ENDED = "while grep -qs 'launch[.]rank' /proc/[0-9]*/cmdline; do sleep 1; done"


@dataclass(frozen=True)
class Claim:
    """A PersistentVolumeClaim and where a pod sees it."""

    name: str
    path: str
    read_only: bool = False


@dataclass(frozen=True)
class KubernetesJob:
    """What a manifest asks for. `gpus_per_node` 0: CPU nodes; `shm`, `memory`, `cpus` of a pod."""

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
    node_selector: Annotated[
        list[str] | None, typer.Option(help="label=value of the nodes; may be repeated")
    ] = None,
    grace: Annotated[
        int, typer.Option(min=30, help="seconds between a pod's SIGTERM and its end, to save in")
    ] = 300,
    restart_policy: Annotated[str, typer.Option(help="OnFailure or Never")] = "OnFailure",
    restarts: Annotated[int, typer.Option(min=0, help="before the job has failed")] = 10,
    out: Annotated[Path | None, typer.Option("--manifest", help="write it here too")] = None,
) -> None:
    """Print a manifest: ``geneloom launch kubernetes --image IMAGE --claim runs:/runs --nodes 2
    --gpus-per-node 8 pretrain --config tiny run.out=/runs/a data.shards=/shards/b``.

    A pod that is evicted or fails comes back and resumes. `kubectl apply -f FILE` starts it.
    """
    job = KubernetesJob(
        kind=kind, name=name or f"geneloom-{verb}", image=image, nodes=nodes,
        ranks_per_node=ranks_per_node or gpus_per_node or 1, gpus_per_node=gpus_per_node,
        cpus=cpus, memory=memory, shm=shm, namespace=namespace,
        claims=[_claim(c) for c in claim or []], env=named_variables(env or []),
        node_selector=named_values("--node-selector", node_selector or []), grace_s=grace,
        restart_policy=restart_policy, restarts=restarts,
    )  # fmt: skip
    text = render(job, verb, context.args)
    if out is not None:
        if out.exists():
            raise ValueError(f"{out}: exists; give --manifest a new name")
        out.write_text(text)
    print(text, end="")


def _claim(text: str) -> Claim:
    parts = text.split(":")
    if len(parts) not in (2, 3) or not parts[1].startswith("/") or parts[2:] not in ([], ["ro"]):
        raise ValueError(f"--claim {text}: must be NAME:/path or NAME:/path:ro")
    return Claim(parts[0], parts[1], parts[2:] == ["ro"])


def render(job: KubernetesJob, verb: str, arguments: list[str]) -> str:
    """Return the manifest as YAML: the job, and a ConfigMap if the settings are in a local file.

    Raises
    ------
    ValueError
        Wrong settings or names; a run folder that is on no claim and would go with its pod.
    """
    folder = check_and_find_folder(verb, arguments)
    require_sound(job, folder)
    if verb == "prepare":
        if job.nodes > 1 or job.ranks_per_node > 1:
            raise ValueError("launch kubernetes prepare: runs in one pod, with --processes cores")
        words = ["python3", "-m", module_of(verb), *_literal(arguments)]
        return _dump([_pytorch_job(job, words, None)])
    config, arguments = _config_of(arguments)
    arguments = _literal(_every_start(verb, arguments))
    if job.kind == "pytorchjob":
        manifest = _pytorch_job(job, [*_torchrun(job), module_of(verb), *arguments], config)
    else:
        manifest = _mpi_job(job, [*_mpirun(job), verb, *arguments], config)
    return _dump([_config_map(job, config), manifest] if config else [manifest])


def _every_start(verb: str, arguments: list[str]) -> list[str]:
    """Return the arguments of every start of the pods: the first cannot be told from a later one.

    Raises
    ------
    ValueError
        ``--step``, to which every start would go back.
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
    names = {"--name": job.name, "--namespace": job.namespace or "x"}
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
    problems += [f"--env {n}: no name of a variable" for n in job.env if not _ENV_NAME.fullmatch(n)]
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


def _literal(arguments: list[str]) -> list[str]:
    """Return arguments as they reach the program: the kubelet replaces ``$(NAME)``, not ``$$(``."""
    return [a.replace("$(", "$$(") for a in arguments]


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


def _torchrun(job: KubernetesJob) -> list[str]:
    """Return the command in front of a module. RANK: the pod's number, set by the operator."""
    return [
        "python3", "-m", "torch.distributed.run", f"--nnodes={job.nodes}", "--node-rank=$(RANK)",
        f"--nproc-per-node={job.ranks_per_node}", "--master-addr=$(MASTER_ADDR)",
        "--master-port=$(MASTER_PORT)", "-m",
    ]  # fmt: skip


def _mpirun(job: KubernetesJob) -> list[str]:
    device = "gpu" if job.gpus_per_node else "cpu"
    return [
        "geneloom", "launch", "mpi", "--hostfile", _HOSTFILE, "--device", device,
        "--restarts", str(job.restarts),
    ]  # fmt: skip


def _pytorch_job(job: KubernetesJob, words: list[str], config: str | None) -> dict[str, Any]:
    # torchrun gives its ranks half a minute to save, unless told otherwise.
    extra = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(job.grace_s - _SPARE_S)}
    replica = {
        "restartPolicy": job.restart_policy,
        "template": _pod(job, "pytorch", words, config, extra),
    }
    roles = {"Master": 1} | ({"Worker": job.nodes - 1} if job.nodes > 1 else {})
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(job),
        "spec": {
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": job.restarts},
            "pytorchReplicaSpecs": {
                role: {"replicas": number, **replica} for role, number in roles.items()
            },
        },
    }


def _mpi_job(job: KubernetesJob, words: list[str], config: str | None) -> dict[str, Any]:
    worker = _pod(job, "worker", _SSHD, config, {})
    hook = {"preStop": {"exec": {"command": ["sh", "-c", _UNTIL_RANKS_ENDED]}}}
    worker["spec"]["containers"][0]["lifecycle"] = hook
    launcher = _pod(job, "launcher", words, config, {})
    # It computes nothing: any node will do.
    launcher["spec"]["containers"][0]["resources"] = {"requests": {"cpu": "1", "memory": "2Gi"}}
    for key in ("nodeSelector", "tolerations"):
        launcher["spec"].pop(key, None)
    return {
        "apiVersion": "kubeflow.org/v2beta1",
        "kind": "MPIJob",
        "metadata": _metadata(job),
        "spec": {
            "slotsPerWorker": job.ranks_per_node,
            "mpiImplementation": "OpenMPI",
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": job.restarts},
            "mpiReplicaSpecs": {
                "Launcher": {
                    "replicas": 1,
                    "restartPolicy": job.restart_policy,
                    "template": launcher,
                },
                # Workers only wait for ranks; one that is gone comes back.
                "Worker": {
                    "replicas": job.nodes,
                    "restartPolicy": "OnFailure",
                    "template": worker,
                },
            },
        },
    }


def _metadata(job: KubernetesJob) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": job.name}
    if job.namespace:
        metadata["namespace"] = job.namespace
    return metadata


def _pod(
    job: KubernetesJob, name: str, words: list[str], config: str | None, extra: dict[str, str]
) -> dict[str, Any]:
    """Return a pod's template with one container."""
    device = {} if job.gpus_per_node else {"DS_ACCELERATOR": "cpu"}
    limits = {
        "nvidia.com/gpu": str(job.gpus_per_node) if job.gpus_per_node else None,
        "cpu": job.cpus,
        "memory": job.memory,
    }
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": job.shm}}
    ]
    mounts: list[dict[str, Any]] = [{"name": "shm", "mountPath": "/dev/shm"}]
    for number, claim in enumerate(job.claims):
        source = {"claimName": claim.name, "readOnly": claim.read_only}
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": source})
        mounts.append(
            {"name": f"claim-{number}", "mountPath": claim.path, "readOnly": claim.read_only}
        )
    if config is not None:
        volumes.append({"name": "config", "configMap": {"name": f"{job.name}-config"}})
        mounts.append({"name": "config", "mountPath": _CONFIG_FOLDER, "readOnly": True})
    values = {"PYTHONSAFEPATH": "1", **device, **extra, **job.env}
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": job.grace_s,
        "containers": [
            {
                "name": name,
                "image": job.image,
                "command": words,
                "env": [{"name": n, "value": v} for n, v in values.items()],
                "resources": {"limits": {n: v for n, v in limits.items() if v is not None}},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    if job.gpus_per_node:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    if job.node_selector:
        spec["nodeSelector"] = dict(job.node_selector)
    return {"spec": spec}


def _config_map(job: KubernetesJob, config: str | None) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job) | {"name": f"{job.name}-config"},
        "data": {"config.yaml": config},
    }


class _Dumper(yaml.SafeDumper):
    """Writes every use of a value in full: a reader of a manifest follows no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _dump(manifests: list[dict[str, Any]]) -> str:
    return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, explicit_start=True, width=100)
