"""``geneloom launch local``: several ranks on this machine, started by the DeepSpeed launcher."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from launch.attempts import supervise
from launch.environment import ENV_HELP, passed_on
from launch.hosts.ask_hosts import package_first
from launch.hosts.node import has_gpu, port_state, signal_processes
from launch.verbs import MODULES, module_of

HERE = "localhost"
RESTARTS_HELP = "start again so often without a new checkpoint in between"


def launch_local(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(help=f"what to run: {', '.join(MODULES)}")],
    ranks: Annotated[int, typer.Option(min=1, help="processes; on GPUs one per GPU")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or gpu")] = "auto",
    restarts: Annotated[int, typer.Option(min=0, help=RESTARTS_HELP)] = 0,
    env: Annotated[list[str] | None, typer.Option(help=ENV_HELP)] = None,
    show: Annotated[bool, typer.Option("--show", help="print the command and stop")] = False,
) -> None:
    """Run a verb on this machine: ``geneloom launch local --ranks 2 pretrain --config tiny ...``.

    SIGINT, SIGTERM and SIGUSR1 reach the ranks as a request to save and stop (exit code 75).
    """
    module_of(verb)
    require_device(device)
    way = Local(1 if verb == "prepare" else ranks)
    words = [*context.args, "--processes", str(ranks)] if verb == "prepare" else context.args
    job = supervise.Job(
        verb, words, device, restarts, base_environment(device), passed_on(env or [])
    )
    raise SystemExit(supervise.run(way, job, show))


class Local:
    """Ranks on this machine, below DeepSpeed's launcher."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def usable_hosts(self) -> dict[str, int]:
        return {HERE: self._ranks}

    def commands(
        self, hosts: dict[str, int], attempt: Path, words: list[str], environment: dict[str, str]
    ) -> dict[str, list[str]]:
        return {
            "": [
                sys.executable, "-m", "deepspeed.launcher.runner",
                "--num_gpus", str(hosts[HERE]), "--master_port", str(port_state(0)["port"]),
                "--no_local_rank", "--log_level", "error", "--module", *words,
            ]
        }  # fmt: skip

    def lost(self, hosts: dict[str, int]) -> list[str]:
        return []

    def signal(self, hosts: dict[str, int], launch: str, number: int, ranks_only: bool) -> None:
        signal_processes({launch}, number, ranks_only)


def require_device(device: str, here: bool = True) -> None:
    """Raise ValueError unless a device is one there can be; `here`: on this machine."""
    if device not in ("auto", "cpu", "gpu"):
        raise ValueError(f"--device {device}: must be auto, cpu or gpu")
    if here and device == "gpu" and not has_gpu():
        raise ValueError("--device gpu: this machine has no /dev/nvidia*")


def base_environment(device: str, here: bool = True) -> dict[str, str]:
    """Return what every process of a launch has in its environment; `here`: on this machine."""
    environment = package_first()
    # Each node of a cluster looks for itself (`launch.attempts.rank`): this may be one without
    # GPUs.
    if device == "cpu" or (here and not has_gpu()):
        environment["DS_ACCELERATOR"] = "cpu"
    return environment
