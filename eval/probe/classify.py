"""The classifier of every contender: logistic regression on standardised features."""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

# Inverse strength of the L2 penalty, scikit-learn's default, the same for every contender.
PENALTY_C = 1.0
_ITERATIONS = 1000


def predict_classes(
    features: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray
) -> np.ndarray:
    """Return the predicted labels [test cells], learnt from the training cells alone.

    Parameters
    ----------
    features
        float32 [cells, width].
    labels
        [cells], of any type.
    train, test
        int positions of cells.
    """
    scaler = StandardScaler()
    fitted = scaler.fit_transform(features[train].astype(np.float64))
    tested = scaler.transform(features[test].astype(np.float64))
    # One thread: the matrices are small, and threads that wait for each other cost seconds.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if fitted.shape[1] > len(train):
            # With a squared penalty the weights are sums of training cells: in a basis of those
            # the problem is the same, with fewer dimensions than genes.
            basis = np.linalg.qr(fitted.T)[0]
            fitted, tested = fitted @ basis, tested @ basis
        model = LogisticRegression(C=PENALTY_C, max_iter=_ITERATIONS)
        return model.fit(fitted, labels[train]).predict(tested)
