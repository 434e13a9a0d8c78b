"""Cells, a list of genes drawn at random, and models that know the list, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.genes.vocabulary import Vocabulary
from eval.benchmark.outcome import Store, TaskRun
from pretrain.settings.model_settings import ModelConfig
from tests.synthetic import make_cells
from tests.test_eval import vocabulary_of

if TYPE_CHECKING:
    from transformers import BertForMaskedLM

    from eval.benchmark.material.models_and_cells import Bench

MODEL = ModelConfig(
    num_layers=2, hidden_size=16, num_heads=2, intermediate_size=16,
    hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


def write_world(folder: Path) -> Vocabulary:
    """Write 60 cells of three types and two lists of half the genes each; return the vocabulary."""
    cells = make_cells(60, 160)
    cells.write_h5ad(folder / "cells.h5ad")
    vocabulary = vocabulary_of(folder / "cells.h5ad")
    listed = is_listed(vocabulary)
    rows = [f"{g}\t{'yes' if y else 'no'}" for g, y in zip(vocabulary.genes, listed, strict=True)]
    (folder / "genes.tsv").write_text("gene\tlisted\n" + "\n".join(rows) + "\nENSG_X\tyes\n")
    return vocabulary


def is_listed(vocabulary: Vocabulary) -> np.ndarray:
    """Return bool [genes]: drawn apart from the counts."""
    return np.random.default_rng(3).permutation(len(vocabulary.genes)) % 2 == 0


def passing_model(vocabulary: Vocabulary) -> BertForMaskedLM:
    """Return a model of zeros whose layers pass on what they get: word plus position."""
    import torch

    from pretrain.model.masked_gene_model import build_model

    network = build_model(MODEL, vocabulary, 0).bert
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.fill_(1.0 if name.endswith("LayerNorm.weight") else 0.0)
    return network


def bench_of(folder: Path, vocabulary: Vocabulary, **networks: BertForMaskedLM) -> Bench:
    from eval.benchmark.material.models_and_cells import Bench, Model

    models = [Model(n, folder, network, vocabulary, n) for n, network in networks.items()]
    return Bench(models, folder, Store(folder / "units", {}), 0, "cpu", False)


def score_of(run: TaskRun, contender: str, role: str, model: str | None, score="auroc") -> float:
    found = [
        o.scores[score] for o in run.outcomes
        if (o.contender, o.role, o.model) == (contender, role, model)
    ]  # fmt: skip
    assert len(found) == 3, (contender, role, model)
    return float(np.mean(np.array(found, dtype=np.float64)))
