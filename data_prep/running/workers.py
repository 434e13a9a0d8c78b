"""Divides work over processes or MPI ranks; each task goes to a process that is free.

`open_workers` starts the helpers. In `Workers.each` the calling process distributes tasks, and
works on tasks itself while the helpers are busy; without helpers it does all tasks. `Workers.run`
returns the results in the order of the tasks, so that they do not depend on the speed of helpers.
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

from data_prep.running.queue_variables import mpi_ranks, srun_tasks

# A function that is called with the name of the step, the amount of work done, and the total.
Progress = Callable[[str, int, int], None]
# Number of tasks that each helper gets in advance: one runs, one waits.
_AHEAD = 2


@dataclass(frozen=True)
class Workers:
    """Processes that help the calling process; `executor` is None if there are no helpers."""

    executor: Executor | None
    helpers: int

    def each(
        self, function: Callable[[Any], Any], tasks: Sequence[Any]
    ) -> Generator[tuple[int, Any], None, None]:
        """Yield (task number, result) as tasks end, in any order; the first error ends all tasks.

        Parameters
        ----------
        function, tasks
            The function and its arguments. Both must be picklable, and the function must not depend
            on state of the calling process.

        Raises
        ------
        OSError
            A helper was killed, perhaps because memory ran out.
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
        """Return ``[function(t) for t in tasks]``, computed by `each`.

        `on_done` is called in this process with the number of each task when it has ended.
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
    """Return a function that takes the number of a finished task and updates the progress.

    `sizes` is the amount of work in each task, `done` the amount that was done before.
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
    """Return the number of MPI ranks that this process was started with; 1 without MPI.

    Raises
    ------
    ValueError
        srun started several tasks that MPI does not connect, so each would do all the work.
    """
    size, tasks = mpi_ranks(os.environ), srun_tasks(os.environ)
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
    """Yield the workers of this run: the MPI ranks under ``mpirun``, else `processes` in all.

    Under MPI every rank must enter. Rank 0 gets the workers; the other ranks work for it and get
    None at the end.

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
    """End this process as soon as its parent process has ended in any way."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
