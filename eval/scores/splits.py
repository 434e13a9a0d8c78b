"""Split cells into training and test cells: groups (donors, batches, data sets) stay whole.

Without groups the split is stratified by class. `split_cells` makes a split, `validation_cells`
divides its training cells further, and `require_clean_split` checks that nothing leaks.
"""

from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import scipy.sparse
from sklearn.model_selection import train_test_split

TEST_SHARE = 0.3
_VALIDATION_SHARE = 0.15
# A validation loss of fewer cells of a class says when to stop no better than chance, and their
# training cells are missed. At 15 % that is a class of 134 training cells.
FEWEST_VALIDATION_CELLS = 20
_MOST_ENUMERATED = 5_000
_TRIALS = 200


def split_cells(
    labels: np.ndarray,
    donors: np.ndarray | None,
    seed: int,
    test_share: float = TEST_SHARE,
    fewest_test_donors: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the int indices of training and test cells.

    With donors, no donor is on both sides, and every class must be on both. (A random split would
    measure leakage: 0.96 instead of 0.735 in one disease set.) Without donors, classes are
    stratified. All possible sets of test donors are listed if they are few, and consecutive seeds
    take different ones. The number of test donors is the possible number nearest to `test_share`.

    Parameters
    ----------
    labels
        int [cells].
    donors
        str [cells], or None.

    Raises
    ------
    ValueError
        No division of the donors has every class on both sides.
    """
    if donors is None:
        train, test = train_test_split(
            np.arange(len(labels)), test_size=test_share, stratify=labels, random_state=seed
        )
        return np.sort(train), np.sort(test)
    classes = np.unique(labels)
    names = np.unique(donors)
    has_class = np.array([np.isin(classes, labels[donors == d]) for d in names])
    sizes = range(fewest_test_donors, len(names))
    for num_test in sorted(sizes, key=lambda size: abs(size - test_share * len(names))):
        held_out = _test_donors(has_class, num_test, seed)
        if held_out is not None:
            is_test = np.isin(donors, names[held_out])
            return np.flatnonzero(~is_test), np.flatnonzero(is_test)
    raise ValueError(
        f"--donor: no choice of {_counted(names)} has all {len(classes)} classes in training and "
        "in test cells; merge classes, or leave --donor out and say so"
    )


def _counted(names: np.ndarray) -> str:
    return f"{len(names)} donors (or groups: {', '.join(names[:4])}{', ...' * (len(names) > 4)})"


def _test_donors(has_class: np.ndarray, num_test: int, seed: int) -> np.ndarray | None:
    """Return indices of test donors that leave every class on both sides, or None if impossible.

    Parameters
    ----------
    has_class
        bool [donors, classes].
    """

    def both_sides(chosen: np.ndarray) -> bool:
        is_test = np.isin(np.arange(len(has_class)), chosen)
        return bool((has_class[is_test].any(axis=0) & has_class[~is_test].any(axis=0)).all())

    if math.comb(len(has_class), num_test) <= _MOST_ENUMERATED:
        every = (np.array(c) for c in itertools.combinations(range(len(has_class)), num_test))
        possible = [c for c in every if both_sides(c)]
        # The order is the same for all seeds, so that consecutive seeds give different sets.
        order = np.random.default_rng(len(possible)).permutation(len(possible))
        return possible[order[seed % len(possible)]] if possible else None
    rng = np.random.default_rng(seed)
    for _ in range(_TRIALS):
        chosen = rng.choice(len(has_class), num_test, replace=False)
        if both_sides(chosen):
            return chosen
    return None


def validation_cells(
    train: np.ndarray, labels: np.ndarray, donors: np.ndarray | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return `train` as (cells to fit, cells for early stopping), divided by donor if possible.

    Parameters
    ----------
    train
        int indices into `labels` and `donors`.

    Raises
    ------
    ValueError
        There are fewer than `FEWEST_VALIDATION_CELLS` of a class for early stopping: in one line.
    """
    fit, held = _divided(train, labels, donors, seed)
    if few := too_few_to_stop_by(labels[held]):
        raise ValueError(few)
    return fit, held


def too_few_to_stop_by(labels: np.ndarray) -> str:
    """Return why validation cells of these classes are too few for early stopping; '' if not.

    `labels` are int; negative ones are none.
    """
    _, sizes = np.unique(labels[labels >= 0], return_counts=True)
    fewest = int(sizes.min()) if len(sizes) else 0
    if fewest >= FEWEST_VALIDATION_CELLS:
        return ""
    return (
        f"{fewest} validation cells of the smallest class, at least {FEWEST_VALIDATION_CELLS} are "
        "needed"
    )


def _divided(
    train: np.ndarray, labels: np.ndarray, donors: np.ndarray | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    if donors is not None:
        try:
            fit, held = split_cells(labels[train], donors[train], seed, _VALIDATION_SHARE)
            return train[fit], train[held]
        except ValueError:
            pass  # A class has only one training donor, whose cells are needed on both sides.
    smallest = int(np.unique(labels[train], return_counts=True)[1].min())
    if smallest < 2:
        raise ValueError(f"{smallest} cell of the smallest class: too few to divide")
    fit, held = split_cells(labels[train], None, seed, _VALIDATION_SHARE)
    return train[fit], train[held]


def limit_per_class(
    cells: np.ndarray, labels: np.ndarray, most: int | None, seed: int
) -> np.ndarray:
    """Return at most `most` of `cells` per class, drawn without replacement."""
    if most is None:
        return cells
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(cells[labels[cells] == c])[:most] for c in np.unique(labels[cells])]
    return np.sort(np.concatenate(chosen))


def seen_in_training(
    train: np.ndarray, test: np.ndarray, counts: scipy.sparse.csr_matrix
) -> np.ndarray:
    """Return bool [test]: True for test cells with exactly the counts of some training cell."""
    known = {_row_hash(counts, cell) for cell in train}
    return np.array([_row_hash(counts, cell) in known for cell in test], dtype=bool)


def repeated_cells(counts: scipy.sparse.csr_matrix) -> np.ndarray:
    """Return bool [cells]: True for cells with exactly the counts of an earlier cell."""
    known: set[bytes] = set()
    repeated = np.zeros(counts.shape[0], dtype=bool)
    for cell in range(len(repeated)):
        digest = _row_hash(counts, cell)
        repeated[cell] = digest in known
        known.add(digest)
    return repeated


def _row_hash(counts: scipy.sparse.csr_matrix, cell: int) -> bytes:
    start, stop = counts.indptr[cell : cell + 2]
    genes, values = counts.indices[start:stop], counts.data[start:stop]
    order = np.argsort(genes, kind="stable")
    order = order[values[order] != 0]
    return hashlib.sha256(genes[order].tobytes() + values[order].tobytes()).digest()


def require_clean_split(
    train: np.ndarray,
    test: np.ndarray,
    groups: np.ndarray | None,
    counts: scipy.sparse.csr_matrix,
) -> None:
    """Raise ValueError if test cells are known from training, by their group or as equal cells.

    Parameters
    ----------
    train, test
        int indices of cells.
    groups
        str [cells], or None if there are no groups.
    counts
        CSR [cells, genes], raw; a cell contains no gene twice.
    """
    if not len(train) or not len(test):
        raise ValueError(f"split: {len(train)} training and {len(test)} test cells; both need some")
    twice = np.intersect1d(train, test)
    if len(twice):
        raise ValueError(f"split: {len(twice)} cells are in training and in test, e.g. {twice[0]}")
    if groups is not None:
        both = np.intersect1d(groups[train], groups[test])
        if len(both):
            raise ValueError(
                f"split: {len(both)} groups have cells in training and in test, e.g. '{both[0]}': "
                "scores would measure what the group has in common; keep groups whole"
            )
    copies = int(seen_in_training(train, test, counts).sum())
    if copies:
        raise ValueError(
            f"split: {copies} test cells have exactly the counts of a training cell; remove "
            "repeated cells from the test side (`seen_in_training` finds them)"
        )
