"""``geneloom launch local``: several ranks on this machine, started by the DeepSpeed launcher."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import psutil
import typer

from pretrain.config import load_config
from pretrain.ds_config import derive_ds_config

# Verbs that run on several ranks, and the module that holds them.
MODULES = {"pretrain": "pretrain", "finetune": "eval.finetune", "perturb": "eval.perturb"}
_POLL_S = 0.2
_RESEND_S = 2.0
_ROOT = Path(__file__).resolve().parent.parent


def launch_local(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(help=f"what to run: {', '.join(MODULES)}")],
    ranks: Annotated[int, typer.Option(min=1, help="processes; on GPUs one per GPU")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or gpu")] = "auto",
) -> None:
    """Run a verb on this machine: ``geneloom launch local --ranks 2 pretrain --config tiny ...``.

    SIGINT, SIGTERM and SIGUSR1 reach the ranks as a request to save and stop (exit code 75).
    """
    command = local_command(verb, context.args, ranks)
    check_settings(context.args)
    environment = local_environment(ranks, device, command)
    print(shlex.join(command), flush=True)
    raise SystemExit(run_and_forward_signals(command, environment, MODULES[verb]))


def local_command(verb: str, arguments: list[str], ranks: int) -> list[str]:
    """Return the command line of the DeepSpeed launcher."""
    if verb not in MODULES:
        raise ValueError(f"launch: '{verb}' does not run on several ranks; {sorted(MODULES)} do")
    return [
        sys.executable, "-m", "deepspeed.launcher.runner",
        "--num_gpus", str(ranks), "--master_port", str(free_port()),
        "--no_local_rank", "--log_level", "error",
        "--module", MODULES[verb], *arguments,
    ]  # fmt: skip


def check_settings(arguments: list[str]) -> None:
    """Refuse wrong settings here, once, before every rank would."""
    if "--config" in arguments[:-1]:
        config = arguments[arguments.index("--config") + 1]
        overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
        derive_ds_config(load_config(config, overrides))


def local_environment(ranks: int, device: str, command: list[str]) -> dict[str, str]:
    """Return the environment of the ranks; on CPU the cores are divided among them."""
    if device not in ("auto", "cpu", "gpu"):
        raise ValueError(f"--device {device}: must be auto, cpu or gpu")
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    if device == "gpu" and not has_gpu:
        raise ValueError("--device gpu: this machine has no /dev/nvidia*")
    python_path = os.pathsep.join(p for p in (str(_ROOT), os.environ.get("PYTHONPATH")) if p)
    environment = os.environ | {
        "PYTHONPATH": python_path,
        "GENELOOM_LAUNCH_COMMAND": shlex.join(command),
    }
    if device == "cpu" or not has_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    return environment


def run_and_forward_signals(command: list[str], environment: dict[str, str], module: str) -> int:
    """Run a launcher, pass stop signals on to its ranks, and return its exit code.

    The launcher gets a session of its own: DeepSpeed's runner would kill the ranks on Ctrl-C, and
    they are to save first.
    """
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    asked = False
    last_sent = 0.0

    def remember(_number: int, _frame: object) -> None:
        nonlocal asked
        asked = True

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, remember)
    while True:
        try:
            return process.wait(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            if asked and time.monotonic() - last_sent > _RESEND_S:
                # Again and again: a rank that is still starting ignores it.
                last_sent = time.monotonic()
                for rank in rank_processes(process.pid, module):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        rank.send_signal(signal.SIGUSR1)


def rank_processes(launcher_pid: int, module: str) -> list[psutil.Process]:
    """Return the rank processes below a launcher: those whose command is ``python -m module``."""
    found = []
    for process in psutil.Process(launcher_pid).children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if ["-m", module] in _pairs(words):
            found.append(process)
    return found


def _pairs(words: list[str]) -> list[list[str]]:
    return [list(pair) for pair in zip(words, words[1:], strict=False)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
