"""Make perturbed copies of a cell by index arithmetic: which original gene is at which position.

A cell is its genes by rank; a place is a gene's rank counted from 0. `copies_of` yields the copies
of a cell. This module does not use the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import typer

Kind = Literal["delete", "overexpress", "inhibit", "activate"]
KINDS: tuple[Kind, ...] = ("delete", "overexpress", "inhibit", "activate")
ABSENT = -1  # place of a gene that the original lacks; filler of a shorter set
_QUARTILES = 4


@dataclass(frozen=True)
class Edit:
    """The perturbation of genes.

    Attributes
    ----------
    kind
        ``delete``: genes are removed. ``overexpress``: genes are moved in front of all others, and
        inserted if absent. ``inhibit``, ``activate``: genes are moved down or up.
    rank_shift
        For inhibit and activate: a gene moves to the middle of the quartile that is so many
        quartiles (1 to 3) below or above its own, limited to the last or first quartile. A gene
        that is already in the last (first) quartile stays.
    to_quantile
        For inhibit and activate, instead of `rank_shift`: a gene moves to this share of the way
        from the first rank (0) to the last (1). A gene that is already beyond it stays.
    """

    kind: Annotated[Kind, typer.Option(help="delete, overexpress, inhibit or activate")] = "delete"
    rank_shift: Annotated[int, typer.Option(help="quartiles, of inhibit and activate")] = 1
    to_quantile: Annotated[float | None, typer.Option(help="instead: 0 first rank ... 1 last")] = (
        None
    )

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"--kind {self.kind}: must be one of {', '.join(KINDS)}")
        if self.rank_shift not in (1, 2, 3):
            raise ValueError(f"--rank-shift {self.rank_shift}: must be 1, 2 or 3 quartiles")
        if self.to_quantile is not None and not 0 <= self.to_quantile <= 1:
            raise ValueError(f"--to-quantile {self.to_quantile}: must lie between 0 and 1")
        if self.to_quantile is not None and self.kind not in ("inhibit", "activate"):
            raise ValueError(f"--to-quantile: is of inhibit and activate, not of {self.kind}")


@dataclass(frozen=True)
class GeneSets:
    """Sets of genes; the genes of a set are perturbed together.

    Attributes
    ----------
    members
        int32 [sets, size] gene tokens in the given order, `ABSENT` behind those of a shorter set.
    required
        bool [sets, size]: the set applies only in cells that have these genes.
    """

    members: np.ndarray
    required: np.ndarray

    def __len__(self) -> int:
        return len(self.members)

    @property
    def sizes(self) -> np.ndarray:
        return (self.members != ABSENT).sum(axis=1)


@dataclass(frozen=True)
class Copies:
    """Perturbed copies of one cell that have the same length, and how to compare them.

    Attributes
    ----------
    sets
        int64 [C]: number of the perturbed set.
    genes
        int64 [C, G] tokens, without special tokens.
    origin
        int64 [C, G]: place of each gene in the original, `ABSENT` for an inserted one.
    compared
        bool [C, G]: genes that are in both and were not perturbed.
    num_kept
        Number of genes of the original that take part: all, unless insertions made a copy too long.
        Then the original is cut by as many genes as the copies.
    """

    sets: np.ndarray
    genes: np.ndarray
    origin: np.ndarray
    compared: np.ndarray
    num_kept: int

    @property
    def changed(self) -> np.ndarray:
        """Return bool [C]: True where a copy differs from the original, found without any model."""
        if self.genes.shape[1] != self.num_kept:
            return np.ones(len(self.sets), dtype=bool)
        return (self.origin != np.arange(self.num_kept)).any(axis=1)

    def take(self, rows: np.ndarray) -> Copies:
        return Copies(
            self.sets[rows],
            self.genes[rows],
            self.origin[rows],
            self.compared[rows],
            self.num_kept,
        )


def places_in(genes: np.ndarray, members: np.ndarray, num_tokens: int) -> np.ndarray:
    """Return int64, shaped as `members`: place of each token in a cell, `ABSENT` if not there."""
    place_of = np.full(num_tokens + 1, ABSENT, dtype=np.int64)
    place_of[genes] = np.arange(len(genes))
    return place_of[members]  # the token ABSENT selects the last entry


def applicable(
    sets: GeneSets, places: np.ndarray, kind: Kind, num_genes: int, max_genes: int
) -> np.ndarray:
    """Return bool [sets]: True if a set can be perturbed in a cell and leaves a gene to compare."""
    found = places != ABSENT
    possible = (found | ~sets.required).all(axis=1)
    left = num_genes - found.sum(axis=1)
    if kind == "overexpress":
        left -= (sets.sizes + left - max_genes).clip(min=0)
    else:
        possible &= found.any(axis=1)
    return possible & (left > 0)


def copies_of(
    genes: np.ndarray,
    sets: GeneSets,
    edit: Edit,
    max_genes: int,
    num_tokens: int,
    token_budget: int,
) -> Iterator[Copies]:
    """Yield the copies of one cell, one for each applicable set, in batches of the same length.

    Parameters
    ----------
    genes
        int [n] tokens by rank, each once, without special tokens.
    max_genes
        Largest length of a copy; insertions push the last genes out.
    token_budget
        Genes of one batch, at least one copy.
    """
    places = places_in(genes, sets.members, num_tokens)
    found = places != ABSENT
    chosen = np.flatnonzero(applicable(sets, places, edit.kind, len(genes), max_genes))
    # Sets with equally many genes, of which equally many are in the cell, give copies of equal
    # length.
    kinds = np.stack([sets.sizes, found.sum(axis=1)], axis=1)[chosen]
    for size, num_found in np.unique(kinds, axis=0):
        group = chosen[(kinds == (size, num_found)).all(axis=1)]
        step = max(1, token_budget // len(genes))
        for start in range(0, len(group), step):
            batch = group[start : start + step]
            members, at = sets.members[batch, :size], places[batch, :size]
            yield _copies(genes, batch, members, at, edit, max_genes)


def _copies(
    genes: np.ndarray,
    numbers: np.ndarray,
    members: np.ndarray,
    places: np.ndarray,
    edit: Edit,
    max_genes: int,
) -> Copies:
    """Return copies in which the genes `members` [C, size] at `places` are perturbed.

    All rows have the same number of absent genes.
    """
    num_genes, size = len(genes), members.shape[1]
    moved = places[places != ABSENT].reshape(len(numbers), -1)
    rest = _others(num_genes, moved)
    overflow = 0
    if edit.kind == "delete":
        origin = rest
    elif edit.kind == "overexpress":
        overflow = max(0, size + rest.shape[1] - max_genes)
        origin = np.concatenate([places, rest], axis=1)[:, :max_genes]
    else:
        origin = _placed(moved, targets(moved, num_genes, edit), rest)
    tokens = genes.astype(np.int64)[origin]
    if edit.kind == "overexpress":
        tokens[:, :size] = members[:, : tokens.shape[1]]
    is_moved = np.zeros((len(numbers), num_genes + 1), dtype=bool)
    np.put_along_axis(is_moved, moved, True, axis=1)
    is_moved[:, ABSENT] = True
    num_kept = num_genes - overflow
    compared = ~np.take_along_axis(is_moved, origin, axis=1) & (origin < num_kept)
    return Copies(numbers, tokens, origin, compared, num_kept)


def targets(places: np.ndarray, num_genes: int, edit: Edit) -> np.ndarray:
    """Return int64, shaped as `places`: the new places of genes at these places."""
    down = edit.kind == "inhibit"
    if edit.to_quantile is not None:
        goal = np.full_like(places, round(edit.to_quantile * (num_genes - 1)))
    else:
        quartile = _QUARTILES * places // num_genes
        step = edit.rank_shift if down else -edit.rank_shift
        beyond = (quartile + step).clip(0, _QUARTILES - 1)
        goal = (2 * beyond + 1) * num_genes // (2 * _QUARTILES)
        goal = np.where(beyond == quartile, places, goal)
    return np.maximum(places, goal) if down else np.minimum(places, goal)


def _others(num_genes: int, moved: np.ndarray) -> np.ndarray:
    """Return int64 [C, G - found]: the places that are not moved, in their order."""
    stays = np.ones((len(moved), num_genes), dtype=bool)
    np.put_along_axis(stays, moved, False, axis=1)
    return np.nonzero(stays)[1].reshape(len(moved), -1)


def _placed(moved: np.ndarray, goals: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Return int64 [C, G]: moved genes at their goals, the others around them in their order.

    If several genes have the same goal, the one with the higher rank comes first.
    """
    num_moved, num_genes = moved.shape[1], moved.shape[1] + rest.shape[1]
    order = np.lexsort((moved, goals), axis=1)
    moved, goals = (np.take_along_axis(a, order, axis=1) for a in (moved, goals))
    steps = np.arange(num_moved)
    slots = np.maximum.accumulate(goals - steps, axis=1) + steps
    slots = np.minimum(slots, num_genes - num_moved + steps)
    origin = np.empty((len(moved), num_genes), dtype=np.int64)
    free = np.ones(origin.shape, dtype=bool)
    np.put_along_axis(free, slots, False, axis=1)
    origin[free] = rest.ravel()
    np.put_along_axis(origin, slots, moved, axis=1)
    return origin
