"""Real ranks for tests: gloo processes, forked from a server that has imported the libraries."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# As the command does before it imports torch; the server's ranks inherit it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
_CONTEXT = multiprocessing.get_context("forkserver")
# A fork of this process would inherit torch's thread pools; a fresh server has none.
_CONTEXT.set_forkserver_preload(
    ["torch", "deepspeed", "transformers", "torch.utils.tensorboard.writer", "pretrain.train"]
)
_LIMIT_S = 120


def _set_environment(rank: int, world_size: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _enter(function: Callable, arguments: tuple, rank: int, world_size: int, port: int, results):
    _set_environment(rank, world_size, port)
    import torch

    torch.set_num_threads(1)
    try:
        results.put((rank, function(*arguments), None))
    except BaseException:  # noqa: BLE001  the parent raises it again
        results.put((rank, None, traceback.format_exc()))


def run_ranks(world_size: int, function: Callable, *arguments: Any) -> list[Any]:
    """Return ``function(*arguments)`` of every rank; raise if one of them failed."""
    port = free_port()
    results = _CONTEXT.Queue()
    processes = [
        _CONTEXT.Process(target=_enter, args=(function, arguments, r, world_size, port, results))
        for r in range(world_size)
    ]
    for process in processes:
        process.start()
    values: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, value, error = results.get(timeout=_LIMIT_S)
            if error:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            values[rank] = value
    finally:
        deadline = time.monotonic() + 10
        for process in processes:
            process.join(max(0.1, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
    return [values[r] for r in range(world_size)]


_queues: dict[int | None, Any] = {}


def start_rank(function: Callable, *arguments: Any) -> BaseProcess:
    """Start one rank in the background, to be killed."""
    results = _CONTEXT.Queue()
    process = _CONTEXT.Process(
        target=_enter, args=(function, arguments, 0, 1, free_port(), results)
    )
    process.start()
    # The child opens the queue by its name when it gets there; until then somebody has to hold it.
    _queues[process.pid] = results
    return process


def kill(process: BaseProcess) -> None:
    """End a process as a power cut would."""
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)


@dataclass(frozen=True)
class Command:
    """A rank that runs ``python -m pretrain``, and what it says."""

    process: BaseProcess
    log: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def code(self, within_s: float = _LIMIT_S) -> int:
        """Return the exit code; fail if the process does not end in time."""
        self.process.join(within_s)
        code = self.process.exitcode
        assert code is not None, f"still running after {within_s} s:\n{self.said}"
        return code


@contextlib.contextmanager
def commands(arguments: Sequence[Sequence[str]], logs: Path) -> Iterator[list[Command]]:
    """Start ``python -m pretrain ARGUMENTS`` for each rank, without a launcher; kill what is left.

    Forked from the server, a rank starts in a second.
    """
    port, world_size = free_port(), len(arguments)
    logs.mkdir(parents=True, exist_ok=True)
    ranks = []
    for rank, words in enumerate(arguments):
        log = logs / f"{port}-rank-{rank}.log"
        process = _CONTEXT.Process(
            target=_enter_command, args=(list(words), rank, world_size, port, log)
        )
        process.start()
        ranks.append(Command(process, log))
    try:
        yield ranks
    finally:
        for rank in ranks:
            if rank.process.is_alive():
                rank.process.kill()
            rank.process.join(10)


def _enter_command(words: list[str], rank: int, world_size: int, port: int, log: Path) -> None:
    _set_environment(rank, world_size, port)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["geneloom pretrain", *words]
    # As `python -m pretrain` does.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    from pretrain.cli import main

    main()
