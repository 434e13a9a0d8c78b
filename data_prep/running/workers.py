"""Work divided over processes or MPI ranks, by whoever is free.

One loop serves all: the calling process hands out tasks, and works itself while the others are
busy. Without others it does everything. Results come back in the order of the tasks, so that what
is made of them cannot depend on who was fast.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import Any

# Called with what is being done, how much of it is done, of how much.
Progress = Callable[[str, int, int], None]
# Tasks handed to each worker in advance: one runs, one waits.
_AHEAD = 2
_MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class Workers:
    """Processes that help the calling one; `executor` is None when there are none."""

    executor: Executor | None
    helpers: int

    def each(
        self, function: Callable[[Any], Any], tasks: Sequence[Any]
    ) -> Generator[tuple[int, Any], None, None]:
        """Yield (task number, result) as tasks end, in any order; the first error ends all.

        Parameters
        ----------
        function, tasks
            Picklable; the function must not depend on state of the calling process.

        Raises
        ------
        OSError
            A helper was killed (out of memory?).
        """
        waiting, running = deque(enumerate(tasks)), {}
        try:
            while waiting or running:
                while self.executor and waiting and len(running) < _AHEAD * self.helpers:
                    number, task = waiting.popleft()
                    running[self.executor.submit(function, task)] = number
                if waiting:
                    number, task = waiting.popleft()
                    yield number, function(task)
                else:
                    wait(running, return_when=FIRST_COMPLETED)
                for future in [f for f in running if f.done()]:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process was killed, perhaps for want of memory: start again with a "
                "smaller --memory or fewer --processes; finished work is kept"
            ) from error
        finally:
            for future in running:
                future.cancel()

    def run(
        self,
        function: Callable[[Any], Any],
        tasks: Sequence[Any],
        on_done: Callable[[int], None] = lambda number: None,
    ) -> list[Any]:
        """Return ``[function(t) for t in tasks]``; see `each`.

        `on_done` is called in this process with a task's number as soon as it has ended.
        """
        results: list[Any] = [None] * len(tasks)
        with contextlib.closing(self.each(function, tasks)) as ended:
            for number, result in ended:
                results[number] = result
                on_done(number)
        return results


def counter(
    progress: Progress, what: str, sizes: Sequence[int], done: int = 0
) -> Callable[[int], None]:
    """Return a function that, told that a task has ended, shows how much of all work is done.

    `sizes`: the work of each task; `done`: what was done before them.
    """
    total = done + sum(sizes)
    progress(what, done, total)

    def on_done(number: int) -> None:
        nonlocal done
        done += sizes[number]
        progress(what, done, total)

    return on_done


SERIAL = Workers(None, 0)


def mpi_size() -> int:
    """Return the number of MPI ranks this process was started with; 1 without MPI.

    Raises
    ------
    ValueError
        srun started several tasks that do not find each other: each would do all the work.
    """
    size = max([int(os.environ.get(v, 1)) for v in _MPI_SIZE_VARIABLES])
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if size > 1 or tasks == 1:
        return size
    from mpi4py import MPI

    if MPI.COMM_WORLD.Get_size() == 1:
        raise ValueError(
            f"srun started {tasks} tasks, but MPI sees one: start with mpirun inside the job, with "
            "srun --mpi=pmix, or as one task with --processes"
        )
    return MPI.COMM_WORLD.Get_size()


@contextlib.contextmanager
def open_workers(processes: int = 1) -> Iterator[Workers | None]:
    """Give the workers of this run: MPI ranks under ``mpirun``, else `processes` in all.

    Under MPI every rank enters; rank 0 gets the workers, the others serve it and get None at the
    end.

    Raises
    ------
    ValueError
        Both ``mpirun`` and `processes` are used, or `processes` is below 1.
    """
    if processes < 1:
        raise ValueError(f"--processes {processes}: must be at least 1")
    if mpi_size() > 1:
        if processes > 1:
            raise ValueError("--processes is for one machine without mpirun: leave one of them out")
        from mpi4py.futures import MPICommExecutor

        with MPICommExecutor() as executor:
            helpers = mpi_size() - 1
            yield Workers(executor, helpers) if isinstance(executor, Executor) else None
    elif processes == 1:
        yield SERIAL
    else:
        context = get_context("forkserver")
        context.set_forkserver_preload(["data_prep.encoding.encode_pass"])
        with ProcessPoolExecutor(processes - 1, context, _end_with_parent) as executor:
            yield Workers(executor, processes - 1)


def _end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, however it went."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
