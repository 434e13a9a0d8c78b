"""Distribute whole matrices to ranks, however ZeRO has divided them.

ZeRO 1 to 3 store on a rank only the part of a matrix that falls into its part of one long vector,
often from the middle of one row to the middle of another. Muon needs the whole matrix. Therefore
each matrix has one owner, which receives the pieces of all ranks (`Exchange.gather`), computes, and
sends back the pieces of the result (`Exchange.scatter`). Numbers are moved, never added, so the
order in which ranks arrive changes no bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import chain

import torch

from pretrain.checkpoints.zero_state import Fragment
from pretrain.ranks import dist
from pretrain.ranks.dist import Ranks


@dataclass(frozen=True)
class Matrix:
    """A matrix made of whole rows of a parameter, from the parameter's element `start` on."""

    name: str
    start: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    @property
    def work(self) -> int:
        """Return the multiplications of a product with itself, the cost of a Newton-Schulz step."""
        return self.numel * min(self.rows, self.columns)


@dataclass(frozen=True)
class Piece:
    """Elements of a matrix, from `start`, that a rank stores in vector `flat` from `offset`."""

    matrix: int
    rank: int
    start: int
    numel: int
    flat: int
    offset: int


def deal(matrices: Sequence[Matrix], world_size: int) -> list[int]:
    """Return the owner of each matrix.

    The matrices are assigned from the largest to the smallest, each to the rank with the least
    work.
    """
    work = [0] * world_size
    owners = [0] * len(matrices)
    for number in sorted(range(len(matrices)), key=lambda n: -matrices[n].work):
        owners[number] = min(range(world_size), key=lambda rank: work[rank])
        work[owners[number]] += matrices[number].work
    return owners


def pieces_of(
    matrices: Sequence[Matrix], fragments: Iterable[tuple[str, int, int, int, int]], rank: int
) -> list[Piece]:
    """Return the pieces of all matrices that a rank stores.

    Parameters
    ----------
    fragments
        Of the rank: name of the parameter, first element, number of elements, number of the vector,
        offset.
    """
    by_name: dict[str, list[tuple[int, int, int, int]]] = {}
    for name, *rest in fragments:
        by_name.setdefault(name, []).append(tuple(rest))  # type: ignore[arg-type]
    pieces = []
    for number, matrix in enumerate(matrices):
        for start, numel, flat, offset in by_name.get(matrix.name, ()):
            low = max(start, matrix.start)
            high = min(start + numel, matrix.start + matrix.numel)
            if low < high:
                at = offset + low - start
                pieces.append(Piece(number, rank, low - matrix.start, high - low, flat, at))
    return pieces


class Exchange:
    """The exchange of matrices between ranks and owners, which is the same in every training step.

    All ranks construct it together.

    Parameters
    ----------
    matrices
        The same on all ranks; those that no rank stores in these vectors are left out.
    fragments
        The fragments of their parameters that this rank stores; may be empty.
    flats
        The vectors of this rank that contain the fragments; all ranks have the same number of them.
    is_replicated
        Every rank stores everything (stage 0), so nothing is sent to owners.

    Raises
    ------
    ValueError
        The ranks together do not store each element exactly once, so this is an unknown memory
        layout of DeepSpeed.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        fragments: Iterable[Fragment],
        flats: Sequence[torch.Tensor],
        ranks: Ranks,
        is_replicated: bool,
    ) -> None:
        self._is_replicated = is_replicated
        numbers = {id(flat): number for number, flat in enumerate(flats)}
        mine = [(f.name, f.start, f.numel, numbers[id(f.flat)], f.offset) for f in fragments]
        held = [json.loads(text) for text in dist.gather_text(json.dumps(mine), ranks)]
        names = {name for of_rank in held for name, *_ in of_rank}
        self.matrices = [m for m in matrices if m.name in names]
        pieces: list[Piece] = []
        for rank, of_rank in enumerate(held):
            pieces += pieces_of(self.matrices, of_rank, rank)
        _require_whole(self.matrices, pieces, ranks.world_size if is_replicated else 1)
        owners, everyone = deal(self.matrices, ranks.world_size), range(ranks.world_size)
        # By rank: this rank's pieces that the other rank owns, and the pieces of this rank's
        # matrices that are stored there.
        self._mine = [
            [p for p in pieces if p.rank == ranks.rank and owners[p.matrix] == o] for o in everyone
        ]
        self._owned = [
            [p for p in pieces if p.rank == r and owners[p.matrix] == ranks.rank] for r in everyone
        ]
        self._is_alone = ranks.world_size == 1
        self._nothing = torch.empty(0, device=ranks.device)
        self._rank = ranks.rank

    def gather(self, flats: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return the matrices that this rank owns, by number, float32 [rows, columns]."""
        held = self._mine[self._rank] if self._is_replicated else list(chain(*self._mine))
        values = [flats[p.flat].view(-1)[p.offset : p.offset + p.numel] for p in held]
        if not self._is_replicated:
            values = self._send(values, self._mine, self._owned)
        arrived = self._owned[self._rank] if self._is_replicated else list(chain(*self._owned))
        owned = dict.fromkeys(p.matrix for p in arrived)
        whole = {n: flats[0].new_empty(self.matrices[n].numel) for n in owned}
        for piece, part in zip(arrived, values, strict=True):
            whole[piece.matrix][piece.start : piece.start + piece.numel] = part
        shapes = {n: (self.matrices[n].rows, self.matrices[n].columns) for n in whole}
        return {number: flat.view(shapes[number]) for number, flat in whole.items()}

    def scatter(self, whole: dict[int, torch.Tensor], flats: Sequence[torch.Tensor]) -> None:
        """Write the matrices of all owners back into this rank's vectors."""
        out = [
            whole[p.matrix].reshape(-1)[p.start : p.start + p.numel] for p in chain(*self._owned)
        ]
        values = self._send(out, self._owned, self._mine)
        for piece, part in zip(chain(*self._mine), values, strict=True):
            flats[piece.flat].view(-1)[piece.offset : piece.offset + piece.numel] = part

    def _send(
        self, values: list[torch.Tensor], there: list[list[Piece]], here: list[list[Piece]]
    ) -> list[torch.Tensor]:
        """Send `values` to the other ranks and return what they send, in the order of pieces."""
        if self._is_alone:
            return values
        sizes = [[sum(p.numel for p in part) for part in parts] for parts in (there, here)]
        joined = torch.cat(values) if values else self._nothing
        received = dist.exchange(joined, *sizes)
        return list(received.split([p.numel for p in chain(*here)]))


def _require_whole(matrices: Sequence[Matrix], pieces: Iterable[Piece], copies: int) -> None:
    spans: dict[int, list[tuple[int, int]]] = {n: [] for n in range(len(matrices))}
    for piece in pieces:
        spans[piece.matrix].append((piece.start, piece.start + piece.numel))
    for number, found in spans.items():
        ends, found = [0] * copies, sorted(found)
        for low, high in found:
            if low not in ends:
                break
            ends[ends.index(low)] = high
        if ends != [matrices[number].numel] * copies:
            raise ValueError(
                f"optim.kind=muon: the ranks hold {found} of {astuple(matrices[number])} (name, "
                "first element, rows, columns), not each element once; this DeepSpeed file lays "
                "weights out in a way that is not known here: take zero1, or optim.kind=adamw"
            )
