"""Finds copies of a cell and puts them into one split, so that no held-out cell is trained on.

Two cells are the same if their ranked tokens are: equal counts give equal tokens, also in another
file, with another order of genes, or in a tokenised corpus. Where cells are held out one by one,
`settle_same_cells` puts all copies of a cell into the split of the first one (by source, then row).
Where whole groups or given splits are held out, no cell is moved; cells that stand in both splits
are counted, and the groups or sources that hold them are named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numba
import numpy as np

from data_prep.encoding.chunk_files import Chunk, Column, open_chunk
from data_prep.encoding.filters import MOVED, is_kept
from data_prep.sources.source_spec import SourceSpec

_SORT_BYTES = 48  # memory per cell while copies are searched for
# Each part reads all chunks, so with less memory than this there would be far too many parts.
_LEAST_BYTES = 2048
_NAMED = 100
_LANES = 4


@dataclass
class SameCells:
    """Numbers of copies among the kept cells.

    Attributes
    ----------
    cells
        Number of kept cells that equal an earlier cell.
    moved
        Number of cells that were moved to the other split so that all copies stand in one.
    divided
        Number of copies that stand in another split than the first cell, after moving.
    pairs
        For each pair (group of the first cell, group of the copy): (number of copies, number of
        divided copies). The groups are those of --heldout-by; with ``cell`` they are the sources.
    """

    cells: int = 0
    moved: int = 0
    divided: int = 0
    pairs: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    def to_json(self) -> dict:
        """Return the numbers for the manifest, with the pairs that have the most cells."""
        ordered = sorted(self.pairs.items(), key=lambda item: (-item[1][0], item[0]))
        return {
            "cells": self.cells,
            "moved": self.moved,
            "divided": self.divided,
            "num_pairs": len(ordered),
            "pairs": [
                {"first": first, "copy": copy, "cells": cells, "divided": divided}
                for (first, copy), (cells, divided) in ordered[:_NAMED]
            ],
        }


def settle_same_cells(
    work: Path,
    chunks: list[Chunk],
    codes: np.ndarray,
    sources: Sequence[SourceSpec],
    heldout_by: str,
    memory_gib: float,
) -> SameCells:
    """Mark cells that move to the other split in `codes`, and return the numbers of copies.

    Parameters
    ----------
    codes
        uint8 [cells of all chunks], reason codes; set to `filters.MOVED` for cells that move.
    sources
        Sources of the chunks, in the order of their numbers.
    heldout_by
        Cells move only if this is ``cell``, and only cells of sources without a given split.
    """
    found = SameCells()
    pairs: Counter[tuple[str, str]] = Counter()
    divided: Counter[tuple[str, str]] = Counter()
    may_move = np.array([s.split is None and heldout_by == "cell" for s in sources], dtype=bool)
    # The hashes are divided into parts that fit into memory.
    parts = 1 + int(len(codes) * _SORT_BYTES / max(memory_gib * 2**30, _LEAST_BYTES))
    for part in range(parts):
        copies = _copies(work, chunks, codes, part, parts)
        if not len(copies.place):
            continue
        fixed = ~may_move[copies.source]
        first = copies.first
        # All copies go to the split of the first copy that cannot be moved, else of the first one.
        leader = first.copy()
        fixed_at = np.flatnonzero(fixed)[::-1]
        leader[first[fixed_at]] = fixed_at
        side = copies.split[leader[first]]
        moved = ~fixed & (copies.split != side)
        codes[copies.place[moved]] = MOVED
        split = np.where(moved, side, copies.split)
        is_copy = np.arange(len(first)) != first
        apart = is_copy & (split != split[first])
        found.cells += int(is_copy.sum())
        found.moved += int(moved.sum())
        found.divided += int(apart.sum())
        labels = _labels(work, chunks, copies, sources, heldout_by)
        for one, other, is_apart in zip(
            labels[first[is_copy]].tolist(), labels[is_copy].tolist(), apart[is_copy].tolist(),
            strict=True,
        ):  # fmt: skip
            pairs[one, other] += 1
            divided[one, other] += is_apart
    found.pairs = {pair: (number, divided[pair]) for pair, number in pairs.items()}
    return found


@dataclass(frozen=True)
class _Copies:
    """Cells that have copies; equal cells form a run, sorted by source and row.

    All arrays are int64 or uint8 [cells]. `place` is the position of a cell in the codes, `first`
    the position of the first cell of its run in these arrays.
    """

    place: np.ndarray
    chunk: np.ndarray
    source: np.ndarray
    split: np.ndarray
    first: np.ndarray


def _copies(work: Path, chunks: list[Chunk], codes: np.ndarray, part: int, parts: int) -> _Copies:
    hashes, places = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for chunk in chunks:
        same = np.asarray(open_chunk(work / chunk.name).column(Column.SAME))
        kept = is_kept(codes[chunk.first : chunk.first + chunk.cells])
        here = np.flatnonzero(kept & (same % np.uint64(parts) == part) if parts > 1 else kept)
        hashes.append(same[here])
        places.append(chunk.first + here)
    same, place = np.concatenate(hashes), np.concatenate(places)
    order = np.argsort(same, kind="stable")
    same, place = same[order], place[order]
    equal = same[1:] == same[:-1]
    # The cut is needed where a part of the hashes holds no cell.
    repeated = (np.r_[equal, False] | np.r_[False, equal])[: len(same)]
    same, place = same[repeated], place[repeated]
    first_of_chunk = np.array([c.first for c in chunks], dtype=np.int64)
    number = np.searchsorted(first_of_chunk, place, side="right") - 1
    rows, split = np.zeros(len(place), np.int64), np.zeros(len(place), np.uint8)
    for at in np.unique(number).tolist():
        here = np.flatnonzero(number == at)
        batch = open_chunk(work / chunks[at].name)
        inside = place[here] - chunks[at].first
        rows[here] = np.asarray(batch.column(Column.ROW))[inside]
        split[here] = np.asarray(batch.column(Column.SPLIT))[inside]
    source = np.array([c.source for c in chunks], dtype=np.int64)[number]
    order = np.lexsort((rows, source, same))
    new_run = np.r_[True, same[order][1:] != same[order][:-1]][: len(order)]
    first = np.flatnonzero(new_run)[np.cumsum(new_run) - 1]
    return _Copies(place[order], number[order], source[order], split[order], first)


def _labels(
    work: Path, chunks: list[Chunk], copies: _Copies, sources: Sequence[SourceSpec], heldout_by: str
) -> np.ndarray:
    """Return object [cells], the name of each cell's group, or of its source without groups."""
    labels = np.empty(len(copies.place), dtype=object)
    if heldout_by == "cell":
        names = np.array([s.name for s in sources], dtype=object)
        return names[copies.source]
    for at in np.unique(copies.chunk).tolist():
        here = np.flatnonzero(copies.chunk == at)
        column = open_chunk(work / chunks[at].name).column(heldout_by)
        inside = (copies.place[here] - chunks[at].first).tolist()
        labels[here] = [column[i].as_py() for i in inside]
    return labels


@numba.njit(cache=True, nogil=True)
def hash_sequences(tokens, offsets):
    """Return uint64 [cells], a hash of each sequence of tokens.

    Four independent chains are used, because a processor can work on them at the same time.
    """
    factor = np.uint64(0x100000001B3)
    hashes = np.zeros(len(offsets) - 1, np.uint64)
    state = np.empty(_LANES, np.uint64)
    for cell in range(len(hashes)):
        first, stop = np.uintp(offsets[cell]), np.uintp(offsets[cell + 1])
        state[:] = np.uint64(stop - first)
        a, b, c, d = state[0], state[1], state[2], state[3]
        k = first
        while k + np.uintp(3) < stop:
            a = (a ^ np.uint64(tokens[k])) * factor
            b = (b ^ np.uint64(tokens[k + np.uintp(1)])) * factor
            c = (c ^ np.uint64(tokens[k + np.uintp(2)])) * factor
            d = (d ^ np.uint64(tokens[k + np.uintp(3)])) * factor
            a ^= a >> np.uint64(29)
            b ^= b >> np.uint64(29)
            c ^= c >> np.uint64(29)
            d ^= d >> np.uint64(29)
            k += np.uintp(4)
        while k < stop:
            a = (a ^ np.uint64(tokens[k])) * factor
            a ^= a >> np.uint64(29)
            k += np.uintp(1)
        for lane in (b, c, d):
            a = (a ^ lane) * factor
            a ^= a >> np.uint64(32)
        hashes[cell] = a
    return hashes
