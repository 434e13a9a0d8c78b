"""The folder of an evaluation, for one run at a time, on one rank or several."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from data_prep.running.owner import FolderInUse, Owner
from pretrain.ranks import dist
from pretrain.ranks.dist import Ranks

_P = ParamSpec("_P")
_R = TypeVar("_R")


@contextlib.contextmanager
def owned_by_ranks(folder: Path, kind: str, ranks: Ranks | None) -> Iterator[None]:
    """Have a folder for the ranks of this run alone; the first takes it. Called by all ranks.

    Raises
    ------
    FolderInUse
        On all ranks: another run works there.
    """
    with Owner(folder, kind) as owner:
        problem = ""
        if ranks is None:
            owner.take()
        elif ranks.is_first:
            try:
                owner.take()
            except ValueError as error:
                problem = str(error)
        if ranks is not None and (told := dist.first_rank_says(problem)):
            raise FolderInUse(told)
        yield


def owning(kind: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Let a function have the folder of its argument `out` for those of its argument `ranks`."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            given = signature.bind(*args, **kwargs).arguments
            with owned_by_ranks(Path(given["out"]), kind, given.get("ranks")):
                return function(*args, **kwargs)

        return call

    return decorate
