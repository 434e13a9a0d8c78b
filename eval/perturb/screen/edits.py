"""Perturbed copies of a cell as index arithmetic: which gene of the original stands where.

A cell is its genes by rank; a place is a gene's rank counted from 0. Nothing here knows the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import typer

Kind = Literal["delete", "overexpress", "inhibit", "activate"]
KINDS: tuple[Kind, ...] = ("delete", "overexpress", "inhibit", "activate")
ABSENT = -1  # place of a gene that the original does not hold; member of a shorter set
_QUARTILES = 4


@dataclass(frozen=True)
class Edit:
    """What is done to genes.

    Attributes
    ----------
    kind
        ``delete``: taken out. ``overexpress``: moved in front of all, inserted if absent.
        ``inhibit``, ``activate``: moved down or up.
    rank_shift
        For inhibit and activate: a gene moves to the middle of the quartile that lies so many
        quartiles (1 to 3) below or above its own, at most to that of the last or first one; a gene
        that is in the last (first) quartile already stays.
    to_quantile
        For inhibit and activate, instead: to this share of the way from the first rank (0) to the
        last (1); a gene that is beyond it already stays.
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
    """Sets of genes to be perturbed, each as one.

    Attributes
    ----------
    members
        int32 [sets, size] gene tokens in the order given, `ABSENT` behind those of a shorter set.
    required
        bool [sets, size]: the set applies only in cells that hold these genes.
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
    """Perturbed copies of one cell that have one length, beside what they are compared with.

    Attributes
    ----------
    sets
        int64 [C]: number of the perturbed set.
    genes
        int64 [C, G] tokens, special ones not included.
    origin
        int64 [C, G]: place of each gene in the original, `ABSENT` for an inserted one.
    compared
        bool [C, G]: genes that both hold and that were not perturbed.
    num_kept
        Genes of the original that take part: all, unless insertions made a copy too long. Then the
        original is cut by as many genes as the copies are.
    """

    sets: np.ndarray
    genes: np.ndarray
    origin: np.ndarray
    compared: np.ndarray
    num_kept: int

    @property
    def changed(self) -> np.ndarray:
        """bool [C]: not what the original is, which is known without any model."""
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
    return place_of[members]  # the token ABSENT finds the last entry


def applicable(
    sets: GeneSets, places: np.ndarray, kind: Kind, num_genes: int, max_genes: int
) -> np.ndarray:
    """Return bool [sets]: can this be done to a cell, and is a gene left to compare it by?"""
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
    """Yield the copies of one cell, one for each set that applies, in batches of one length.

    Parameters
    ----------
    genes
        int [n] tokens by rank, each once, without special ones.
    max_genes
        The longest copy; insertions push the last genes out.
    token_budget
        Genes of one batch, at least one copy.
    """
    places = places_in(genes, sets.members, num_tokens)
    found = places != ABSENT
    chosen = np.flatnonzero(applicable(sets, places, edit.kind, len(genes), max_genes))
    # Sets with equally many genes, of which equally many are in the cell, give equal lengths.
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
    """Return copies with the genes `members` [C, size] perturbed, which stand at `places`.

    As many of them are absent in one row as in another.
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
    """Return int64, shaped as `places`: where genes at these places are moved to."""
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

    Of several genes with one goal the one of the higher rank comes first.
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
