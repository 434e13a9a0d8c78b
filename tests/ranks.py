"""Real ranks for tests: gloo processes that live as long as the test worker, or new ones.

`run_ranks` borrows processes of a pool. A process that has trained once trains again for a fifth of
the time: libraries are imported, kernels loaded. Each use forms a process group of its own, with a
new store, and leaves it. The pool proves that it is clean: what a use has left behind in its
processes makes the next use of them fail, with the name of the test that left it.

A test that kills ranks, changes process-wide state or needs a first start asks for new processes
(`run_new_ranks`, `start_rank`, `commands`). They are forked from a server that has imported the
libraries.
"""

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
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.leftovers import Baseline

# As the command does before it imports torch; the server's ranks inherit it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Importing inductor would start processes that compile; the server is forked from, and has none.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
_CONTEXT = multiprocessing.get_context("forkserver")
# A fork of this process would inherit torch's thread pools; a fresh server has none. The second
# line is what DeepSpeed and pyarrow import when they are first used: 1.6 s in every new rank.
_PRELOADED = [
    "torch", "deepspeed", "transformers", "setuptools", "torch.utils.tensorboard.writer",
    "deepspeed.ops.op_builder.all_ops", "deepspeed.module_inject.auto_ep_layer", "pandas",
    "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.zero.stage3",
    "torch._inductor.compile_fx", "pretrain.train", "pretrain.cli", "launch.cli",
    "tests.leftovers",
]  # fmt: skip
_server_pid: int | None = None
_LIMIT_S = 120
_ROOT = Path(__file__).resolve().parent.parent
# When one rank has failed, the others mostly fail of the same: so long they may take to say so.
_OTHERS_S = 3


def _set_environment(rank: int, world_size: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }


def _process(**arguments: Any) -> BaseProcess:
    """Return a process that is forked from the ranks' server when it is started.

    There is one server for a Python process, and its first user decides what it has imported. The
    workers of data preparation need little: their server is ended before it forks ranks.
    """
    global _server_pid
    server = forkserver._forkserver  # type: ignore[attr-defined]  where the module keeps it
    if _server_pid is None or server._forkserver_pid != _server_pid:
        server._stop()
        _CONTEXT.set_forkserver_preload(_PRELOADED)
        server.ensure_running()
        _server_pid = server._forkserver_pid
    return _CONTEXT.Process(**arguments)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class _Task:
    """What a rank is asked to do; `test`: for whom."""

    test: str
    function: Callable
    arguments: tuple
    rank: int
    world_size: int
    port: int


@dataclass(frozen=True)
class _Answer:
    """What came of a task. `is_usable`: whether the process may be asked again."""

    value: Any
    error: str | None
    is_usable: bool


def _serve(connection: Connection) -> None:
    """Do one task after the other, until the other end is closed or a task has failed badly."""
    import torch

    torch.set_num_threads(1)
    baseline, before = None, ""
    while True:
        try:
            task = connection.recv()
        except EOFError:
            break
        except BaseException:  # noqa: BLE001  a function that cannot be imported here
            connection.send(_Answer(None, traceback.format_exc(), True))
            continue
        _set_environment(task.rank, task.world_size, task.port)
        if baseline is None:
            baseline = Baseline()
        elif left := baseline.leftovers():
            text = f"{before} left behind in a rank's process: {'; '.join(left)}"
            connection.send(_Answer(None, text, False))
            break
        baseline.reset()
        try:
            answer = _Answer(task.function(*task.arguments), None, True)
        except BaseException:  # noqa: BLE001  the parent raises it again
            # Whoever fails may leave things behind, and always does in the midst of a group: then
            # the process is of no more use.
            answer = _Answer(None, traceback.format_exc(), not baseline.leftovers())
        before = task.test
        connection.send(answer)
        if not answer.is_usable:
            break


class _Pool:
    """Rank processes that are asked again and again."""

    def __init__(self) -> None:
        self._ranks: list[tuple[BaseProcess, Connection]] = []

    def _start(self) -> None:
        mine, theirs = _CONTEXT.Pipe()
        process = _process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._ranks.append((process, mine))

    def run(self, world_size: int, function: Callable, arguments: tuple) -> list[Any]:
        """Return ``function(*arguments)`` of every rank; raise if one of them failed."""
        while len(self._ranks) < world_size:
            self._start()
        used, rest = self._ranks[:world_size], self._ranks[world_size:]
        test, port = os.environ.get("PYTEST_CURRENT_TEST", "no test").split(" ")[0], free_port()
        for rank, (_, connection) in enumerate(used):
            connection.send(_Task(test, function, arguments, rank, world_size, port))
        answers = self._answers([connection for _, connection in used])
        # What becomes of a process is settled before anything is raised.
        kept = []
        for (process, connection), answer in zip(used, answers, strict=True):
            if answer is None or not answer.is_usable:
                _end(process, connection)
            else:
                kept.append((process, connection))
        self._ranks = kept + rest
        for rank, answer in enumerate(answers):
            if answer is not None and answer.error:
                raise AssertionError(f"rank {rank} failed:\n{answer.error}")
        assert None not in answers, f"a rank has not answered in {_LIMIT_S} s, or has died"
        return [answer.value for answer in answers if answer is not None]

    def _answers(self, connections: list[Connection]) -> list[_Answer | None]:
        answers: list[_Answer | None] = [None] * len(connections)
        open_ones = dict(zip(connections, range(len(connections)), strict=True))
        deadline = time.monotonic() + _LIMIT_S
        while open_ones and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(open_ones), left):
                rank = open_ones.pop(connection)  # type: ignore[arg-type]
                with contextlib.suppress(EOFError, ConnectionError):
                    answers[rank] = connection.recv()  # type: ignore[union-attr]
                if answers[rank] is None or answers[rank].error:  # type: ignore[union-attr]
                    deadline = min(deadline, time.monotonic() + _OTHERS_S)
        return answers

    def close(self) -> None:
        """End all processes; raise if the last use of one of them has left something behind."""
        while self._ranks:
            self.run(len(self._ranks), _nothing, ())
            for process, connection in self._ranks:
                _end(process, connection)
            self._ranks = []


def _nothing() -> None:
    """Asked of every rank at the end, so that the last use of it is checked too."""


def _end(process: BaseProcess, connection: Connection) -> None:
    connection.close()
    process.kill()
    process.join(10)


_pool = _Pool()


def run_ranks(world_size: int, function: Callable, *arguments: Any) -> list[Any]:
    """Return ``function(*arguments)`` of every rank; raise if one of them failed."""
    return _pool.run(world_size, function, arguments)


def run_new_ranks(world_size: int, function: Callable, *arguments: Any) -> list[Any]:
    """Do as `run_ranks` in processes that have done nothing before and end afterwards."""
    pool = _Pool()
    try:
        return pool.run(world_size, function, arguments)
    finally:
        for process, connection in pool._ranks:
            _end(process, connection)


def close_pool() -> None:
    """End the pool's processes; raise if the last test that used one left something behind."""
    _pool.close()


def start_rank(function: Callable, *arguments: Any) -> BaseProcess:
    """Start one rank in the background, to be killed."""
    process = _process(target=_enter, args=(function, arguments, free_port()))
    process.start()
    return process


def _enter(function: Callable, arguments: tuple, port: int) -> None:
    _set_environment(0, 1, port)
    import torch

    torch.set_num_threads(1)
    function(*arguments)


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


def start_commands(arguments: Sequence[Sequence[str]], logs: Path) -> list[Command]:
    """Start ``python -m pretrain ARGUMENTS`` for each rank, without a launcher.

    Forked from the server, a rank starts in a second.
    """
    return start_functions(run_command, [[list(words)] for words in arguments], logs)


def start_functions(
    function: Callable, arguments: Sequence[Sequence[Any]], logs: Path, port: int | None = None
) -> list[Command]:
    """Start a new process for each rank that runs ``function(*arguments[rank])`` and ends.

    `port`: at which they meet; None: a free one.
    """
    port, world_size = free_port() if port is None else port, len(arguments)
    logs.mkdir(parents=True, exist_ok=True)
    ranks = []
    for rank, own in enumerate(arguments):
        log = logs / f"{port}-rank-{rank}.log"
        process = _process(target=_enter_logged, args=(function, own, rank, world_size, port, log))
        process.start()
        ranks.append(Command(process, log))
    return ranks


def start_geneloom(words: Sequence[object], log: Path, folder: Path = _ROOT) -> Command:
    """Start ``geneloom WORDS`` in a folder, as `start_commands` does."""
    process = _process(target=_enter_geneloom, args=([str(word) for word in words], log, folder))
    process.start()
    return Command(process, log)


def _enter_geneloom(words: list[str], log: Path, folder: Path) -> None:
    os.chdir(folder)
    # Of its own, as a shell gives a command one: the processes that it starts can be ended with it.
    os.setsid()
    _become_command(log)
    os.environ["DS_ACCELERATOR"] = "cpu"
    sys.argv = ["geneloom", *words]
    from launch.cli import main

    main()


@contextlib.contextmanager
def commands(arguments: Sequence[Sequence[str]], logs: Path) -> Iterator[list[Command]]:
    """Do as `start_commands`, and kill what is left at the end."""
    ranks = start_commands(arguments, logs)
    try:
        yield ranks
    finally:
        end_commands(ranks)


def end_commands(ranks: Sequence[Command]) -> None:
    """Kill the ranks that are left."""
    for rank in ranks:
        if rank.process.is_alive():
            rank.process.kill()
        rank.process.join(10)


def _enter_logged(
    function: Callable, arguments: Sequence[Any], rank: int, world_size: int, port: int, log: Path
) -> None:
    _set_environment(rank, world_size, port)
    _become_command(log)
    function(*arguments)


def _become_command(log: Path) -> None:
    """Print into `log`, and take hang-ups as in a shell, also where pytest runs under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def run_command(words: list[str]) -> None:
    """Run ``python -m pretrain WORDS`` in this process, which does nothing else."""
    sys.argv = ["geneloom pretrain", *words]
    # As `python -m pretrain` does.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    from pretrain.cli import main

    main()
