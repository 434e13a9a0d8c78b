"""Start one training as a program of its own, alone or below a launcher, and wait for its end."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from data_prep.errors import EXIT_RESUMABLE

_ROOT = Path(__file__).resolve().parents[1]
_GENELOOM = "from launch.cli import main; main()"
_SAID_LINES = 4


class Stopped(Exception):
    """A training was asked to stop, and can be gone on with."""


def train_run(arguments: tuple[str, ...], launch: str, log: Path) -> None:
    """Train, or go on with a training, by ``geneloom pretrain --restart``.

    A signal to stop is passed on to the training.

    Parameters
    ----------
    launch
        Words of ``geneloom launch``; "": one process without a launcher.
    log
        File that gets what the training prints, after what it printed before.

    Raises
    ------
    Stopped
        The training stopped on a signal, after a checkpoint.
    OSError
        The training failed.
    """
    command = [sys.executable, "-m", "pretrain"]
    if launch:
        command = [sys.executable, "-c", _GENELOOM, "launch", *shlex.split(launch), "pretrain"]
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        process = subprocess.Popen(
            [*command, *arguments, "--restart"],
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,  # a Ctrl-C of the terminal arrives once, from here
        )  # fmt: skip
        with _passed_on(process):
            code = process.wait()
    if code == EXIT_RESUMABLE:
        raise Stopped
    if code:
        said = [line for line in log.read_text().splitlines() if line.strip()][-_SAID_LINES:]
        raise OSError(
            f"the training ended with exit code {code}, its log {log} with: {' | '.join(said)}; "
            "the same command goes on"
        )


@contextlib.contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass signals on to a process inside the block, and leave no process behind."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:
            process.terminate()
            process.wait()
