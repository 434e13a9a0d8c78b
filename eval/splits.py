"""Training and test cells: by donor when donors are known, else stratified by class."""

from __future__ import annotations

import numpy as np
from sklearn.model_selection import train_test_split

_TEST_SHARE = 0.3
_TRIALS = 200


def split_cells(
    labels: np.ndarray, donors: np.ndarray | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return int positions of training and test cells.

    With donors, no donor is on both sides (a random split then measures leakage: 0.96 instead of
    0.735 in one disease set), and every class must be on both; without, classes are stratified.

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
            np.arange(len(labels)), test_size=_TEST_SHARE, stratify=labels, random_state=seed
        )
        return np.sort(train), np.sort(test)
    rng = np.random.default_rng(seed)
    names = np.unique(donors)
    num_test = max(1, round(_TEST_SHARE * len(names)))
    classes = set(labels.tolist())
    for _ in range(_TRIALS):
        held_out = rng.choice(names, num_test, replace=False)
        is_test = np.isin(donors, held_out)
        if set(labels[is_test].tolist()) == classes == set(labels[~is_test].tolist()):
            return np.flatnonzero(~is_test), np.flatnonzero(is_test)
    raise ValueError(
        f"--donor: no choice of {num_test} of {len(names)} donors has all {len(classes)} classes "
        "in training and in test cells; merge classes, or leave --donor out and say so"
    )


def limit_per_class(
    cells: np.ndarray, labels: np.ndarray, most: int | None, seed: int
) -> np.ndarray:
    """Return at most `most` of `cells` per class, drawn without replacement."""
    if most is None:
        return cells
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(cells[labels[cells] == c])[:most] for c in np.unique(labels[cells])]
    return np.sort(np.concatenate(chosen))
