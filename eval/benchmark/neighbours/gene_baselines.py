"""Classifiers of genes from a row of numbers each: of counts, of ranks, or of an embedding."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import expit
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

LOGISTIC = "logistic regression"
# C times features. Standardised features have a variance of 1 each, so one C for all would punish
# an embedding of 256 dimensions less than five static features: on four gene tasks the best C was
# 0.001 to 0.01 for the former, and 0.1 to 1 for the latter.
_LOGISTIC_STRENGTH = 5.0
# Seed and number of features -> classifier. Classes weigh alike wherever a classifier can do that,
# as in fine-tuning: then 0.5 is a threshold.
_CLASSIFIERS: dict[str, Callable[[int, int], Any]] = {
    LOGISTIC: lambda seed, features: LogisticRegression(
        C=_LOGISTIC_STRENGTH / features, class_weight="balanced", max_iter=500, random_state=seed
    ),
    "random forest": lambda seed, features: RandomForestClassifier(
        100, min_samples_leaf=2, class_weight="balanced", random_state=seed
    ),
    "SVM": lambda seed, features: SVC(class_weight="balanced", random_state=seed),
    "MLP": lambda seed, features: MLPClassifier((32,), alpha=1.0, max_iter=100, random_state=seed),
}


def predict_classes(
    classifier: str,
    features: np.ndarray,
    labels: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Return float64 [test]: how probable class 1 is; features are standardised on training genes.

    Parameters
    ----------
    classifier
        ``logistic regression``, ``random forest``, ``SVM`` (its margin through a logistic curve,
        no calibrated probability) or ``MLP``.
    features
        float [genes, features], finite.
    labels
        int64 [genes], 0 or 1; those of test genes are not read.
    train, test
        int positions of genes.
    """
    model = make_pipeline(StandardScaler(), _CLASSIFIERS[classifier](seed, features.shape[1]))
    with warnings.catch_warnings():
        # The cap on iterations is meant.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features[train], labels[train])
    if classifier == "SVM":
        return expit(model.decision_function(features[test]))
    return model.predict_proba(features[test])[:, 1]
