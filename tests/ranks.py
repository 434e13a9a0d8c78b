"""Real ranks for tests: gloo processes, forked from a server that has imported the libraries."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
# A fork of this process would inherit torch's thread pools; a fresh server has none.
_CONTEXT.set_forkserver_preload(
    ["torch", "deepspeed", "transformers", "torch.utils.tensorboard.writer", "pretrain.train"]
)
_LIMIT_S = 120


def _enter(function: Callable, arguments: tuple, rank: int, world_size: int, port: int, results):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    import torch

    torch.set_num_threads(1)
    try:
        results.put((rank, function(*arguments), None))
    except BaseException:  # noqa: BLE001  the parent raises it again
        results.put((rank, None, traceback.format_exc()))


def run_ranks(world_size: int, function: Callable, *arguments: Any) -> list[Any]:
    """Return ``function(*arguments)`` of every rank; raise if one of them failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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


def start_rank(function: Callable, *arguments: Any) -> multiprocessing.process.BaseProcess:
    """Start one rank in the background, to be killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = _CONTEXT.Process(
        target=_enter, args=(function, arguments, 0, 1, port, _CONTEXT.Queue())
    )
    process.start()
    return process


def kill(process: multiprocessing.process.BaseProcess) -> None:
    """End a process as a power cut would."""
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
