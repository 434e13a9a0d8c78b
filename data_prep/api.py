"""For notebooks and programs: preparing cells as functions, with the settings of the commands.

Nothing here imports torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from data_prep.genes.vocabulary import Vocabulary, open_vocabulary
from data_prep.prepare.check import CheckResult, check_sources
from data_prep.prepare.medians import medians_of
from data_prep.prepare.options import BUILD, MediansOptions, PrepareOptions
from data_prep.prepare.run import prepare as prepare_specs
from data_prep.prepare.verify_and_repair import Problem
from data_prep.prepare.verify_and_repair import verify as verify_folder
from data_prep.running.workers import Progress, Workers, mpi_size, open_workers
from data_prep.shards.decode import decode
from data_prep.shards.reader import ShardSet
from data_prep.sources.corpus_list import expand_corpus
from data_prep.sources.source_spec import SourceOptions

__all__ = [
    "BUILD", "CheckResult", "MediansOptions", "PrepareOptions", "ShardSet", "SourceOptions",
    "Vocabulary", "check", "decode", "medians", "open_vocabulary", "prepare", "verify",
]  # fmt: skip

Sources = Path | str | Sequence[Path | str]


def _silent(what: str, done: int, total: int) -> None:
    pass


def _names(sources: Sources) -> list[str]:
    one = isinstance(sources, (str, Path))
    return [str(sources)] if one else [str(s) for s in sources]


def _opened(vocabulary: Vocabulary | Path | str, max_length: int | None) -> Vocabulary:
    if isinstance(vocabulary, Vocabulary):
        return vocabulary
    return open_vocabulary(Path(vocabulary), max_length=max_length)


def _working(workers: Workers | None) -> Workers:
    if workers is None or mpi_size() > 1:
        raise ValueError("under mpirun start the command, `mpirun -n N python -m data_prep ...`")
    return workers


def prepare(
    sources: Sources,
    out: Path | str,
    vocabulary: Vocabulary | Path | str = BUILD,
    options: PrepareOptions = PrepareOptions(),
    reading: SourceOptions = SourceOptions(),
    processes: int = 1,
    progress: Progress = _silent,
) -> ShardSet:
    """Write shards as ``geneloom prepare`` does, and return them.

    Parameters
    ----------
    sources
        What the command takes: files, folders, globs, ``hf:NAME``, ``census:VERSION``, lists.
    vocabulary
        One that is open, its file, or ``build``: made from the sources.
    processes
        That work beside this one; a program needs ``if __name__ == "__main__":`` then.
    progress
        Called with what is being done, how much of it is done, and how much there is.

    Raises
    ------
    ValueError, OSError
        As `data_prep.prepare.run.prepare`.

    Examples
    --------
    >>> shards = prepare("cells.h5ad", "shards", options=PrepareOptions(heldout_share=0.1))
    >>> shards.num_cells
    """
    with open_workers(processes) as workers:
        opened = None if vocabulary == BUILD else _opened(vocabulary, options.max_length)
        specs = expand_corpus(_names(sources), reading)
        prepare_specs(specs, Path(out), opened, options, _working(workers), progress)
    return ShardSet(out)


def check(
    sources: Sources,
    vocabulary: Vocabulary | Path | str,
    options: PrepareOptions = PrepareOptions(),
    reading: SourceOptions = SourceOptions(),
    processes: int = 1,
    progress: Progress = _silent,
) -> CheckResult:
    """Read the sources as `prepare` would and return what would happen: ``geneloom check``.

    What is wrong is in ``problems``. Parameters as of `prepare`.

    Examples
    --------
    >>> check(["a.h5ad", "b.h5ad"], "vocabulary.json").problems
    """
    with (
        open_workers(processes) as workers,
        tempfile.TemporaryDirectory(prefix="geneloom-") as work,
    ):
        opened = _opened(vocabulary, options.max_length)
        specs = expand_corpus(_names(sources), reading)
        return check_sources(specs, Path(work), opened, options, _working(workers), progress)


def medians(
    sources: Sources,
    out: Path | str,
    options: MediansOptions = MediansOptions(),
    reading: SourceOptions = SourceOptions(),
    processes: int = 1,
    progress: Progress = _silent,
) -> Vocabulary:
    """Write a vocabulary with the medians of the sources, and return it: ``geneloom medians``.

    `out` is ``NAME.json``; what comes beside it, and the errors: `data_prep.prepare.medians`.

    Examples
    --------
    >>> medians("cells.h5ad", "vocabulary.json", MediansOptions(min_cells=10)).genes[:3]
    """
    with open_workers(processes) as workers:
        names = _names(sources)
        return medians_of(names, Path(out), options, reading, _working(workers), progress)[1]


def verify(folder: Path | str, processes: int = 1, progress: Progress = _silent) -> list[Problem]:
    """Check every byte, count and bound of shards; return what is damaged: ``geneloom verify``.

    Examples
    --------
    >>> verify("shards")
    []
    """
    with open_workers(processes) as workers:
        return verify_folder(Path(folder), _working(workers), progress)
