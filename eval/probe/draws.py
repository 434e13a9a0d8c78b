"""Which cells have labels: a few of each class, drawn again and again; the rest are predicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from eval.scores.splits import split_cells

# A class is scored on at least so many cells that were not drawn.
FEWEST_TEST_CELLS = 5


@dataclass(frozen=True)
class Draw:
    """Training and test cells (sorted int positions) of one draw."""

    cells_a_class: int
    seed: int
    train: np.ndarray
    test: np.ndarray


class Draws:
    """Draws of the same number of cells of every class, for several numbers.

    Without donors any cell can be drawn and all others are test cells; with donors the drawn cells
    are of training donors, the test cells are those of the other donors.

    Parameters
    ----------
    labels
        str [cells].
    donors
        str [cells], or None.
    sizes
        Cells a class.
    seeds
        Number of draws of each size: 0, 1, ...

    Attributes
    ----------
    classes
        Size -> names of the classes that have enough cells in every draw, sorted; at least two.
    left_out
        Size -> name of each other class and its number of cells.
    """

    def __init__(
        self, labels: np.ndarray, donors: np.ndarray | None, sizes: tuple[int, ...], seeds: int
    ) -> None:
        self._labels, self._seeds = labels, seeds
        names, codes = np.unique(labels, return_inverse=True)
        counts = dict(zip(names.tolist(), np.bincount(codes).tolist(), strict=True))
        # For each seed: of each class, the cells to draw from in their order, the cells to test.
        self._pools = [
            {name: _pool(codes == code, codes, donors, seed) for code, name in enumerate(counts)}
            for seed in range(seeds)
        ]
        self.classes: dict[int, list[str]] = {}
        self.left_out: dict[int, dict[str, int]] = {}
        for size in sizes:
            enough = [n for n in counts if all(_suffices(p[n], size) for p in self._pools)]
            if len(enough) >= 2:
                self.classes[size] = enough
            self.left_out[size] = {n: c for n, c in counts.items() if n not in enough}
        if not self.classes:
            found = ", ".join(f"{n} {c:,}" for n, c in counts.items())
            raise ValueError(
                f"fewer than two classes have {min(sizes)} cells to learn from and "
                f"{FEWEST_TEST_CELLS} to be tested on; found: {found}. Give fewer with "
                "--cells-a-class, or merge classes"
            )

    def __iter__(self) -> Iterator[Draw]:
        for size, classes in self.classes.items():
            for seed, pools in enumerate(self._pools):
                train = [pools[name][0][:size] for name in classes]
                test = [_tested(pools[name], size) for name in classes]
                yield Draw(
                    size, seed, np.sort(np.concatenate(train)), np.sort(np.concatenate(test))
                )


# Cells to draw from, in order; cells to test on, None: those that are not drawn.
_Pool = tuple[np.ndarray, np.ndarray | None]


def _pool(is_class: np.ndarray, codes: np.ndarray, donors: np.ndarray | None, seed: int) -> _Pool:
    rng = np.random.default_rng([seed, int(codes[is_class][0])])
    if donors is None:
        return rng.permutation(np.flatnonzero(is_class)), None
    train, test = split_cells(codes, donors, seed)
    return rng.permutation(train[is_class[train]]), test[is_class[test]]


def _tested(pool: _Pool, size: int) -> np.ndarray:
    return pool[0][size:] if pool[1] is None else pool[1]


def _suffices(pool: _Pool, size: int) -> bool:
    return len(pool[0]) >= size and len(_tested(pool, size)) >= FEWEST_TEST_CELLS
