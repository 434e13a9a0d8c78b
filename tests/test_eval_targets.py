"""Targets tasks: known targets of a deleted regulator, on a model whose attention is known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from data_prep.genes.vocabulary import MASK, PAD, Vocabulary
from eval.benchmark.material.gene_pairs import read_edges
from eval.benchmark.neighbours.gene_correlation import correlations
from eval.benchmark.outcome import Store, TaskRun
from eval.benchmark.task_file import Cells, Edges, Size, TargetsTask
from pretrain.settings.model_settings import ModelConfig
from tests.contests import num_units

if TYPE_CHECKING:
    import torch
    from transformers import BertForMaskedLM

    from eval.benchmark.material.models_and_cells import Model

NUM_GENES, NUM_REGULATORS, TARGETS_EACH = 90, 4, 8
GENES = tuple(f"ENSG{i:011d}" for i in range(NUM_GENES))
CONFIG = ModelConfig(
    num_layers=1, hidden_size=32, num_heads=1, intermediate_size=32, hidden_dropout=0.0,
    attention_dropout=0.0,
)  # fmt: skip
SIZE = Size.model_validate({"max_cells": 30, "seeds": 3, "max_cells_per_gene": 4})
EDGES = Edges(
    file="edges.tsv", source="tf", target="gene", keep={"bound": ("yes",)}, recipe="by the tests"
)  # fmt: skip


# Genes that the table lists beside the targets of each regulator.
LISTED = range(NUM_GENES - 45, NUM_GENES)


def targets_of(regulator: int) -> list[int]:
    first = 10 + regulator * TARGETS_EACH
    return list(range(first, first + TARGETS_EACH))


def make_task(**changes: object) -> TargetsTask:
    content = {
        "name": "planted", "title": "Planted", "kind": "targets", "edges": EDGES, "sizes": {},
        "cells": Cells(files=("cells.h5ad",), recipe="made by the tests"),
        "min_targets": 5, "max_targets": 20, "min_cells": 3,
    }  # fmt: skip
    return TargetsTask.model_validate(content | changes)


def write_data(folder: Path) -> Path:
    """Write 40 cells of one rate, and a table: targets, and as many genes that are only bound."""
    import anndata

    rng = np.random.default_rng(0)
    counts = rng.poisson(3.0, (40, NUM_GENES)).astype(np.float32)
    # Genes of equal medians have ties; a little noise in depth orders them anew in each cell.
    counts[:, 0] += 1
    data = anndata.AnnData(scipy.sparse.csr_matrix(counts), var=pd.DataFrame(index=list(GENES)))
    data.obs_names = [f"cell{i}" for i in range(40)]
    data.write_h5ad(folder / "cells.h5ad")
    rows = [(r, g, "yes") for r in range(NUM_REGULATORS) for g in targets_of(r)]
    rows += [(r, g, "no") for r in range(NUM_REGULATORS) for g in LISTED]
    rows += [(r, r, "yes") for r in range(NUM_REGULATORS)]
    named = [(GENES[tf], GENES[gene], bound) for tf, gene, bound in rows]
    named.append(("unknown", GENES[50], "yes"))
    table = pd.DataFrame(named, columns=["tf", "gene", "bound"])
    table.to_csv(folder / "edges.tsv", sep="\t", index=False)
    return folder


def attending_model(vocabulary: Vocabulary) -> BertForMaskedLM:
    """Return an encoder in which a target attends to its regulator, and other genes to all alike.

    Dimension r of a query is large in targets of regulator r, and of a key in r itself.
    """
    import torch

    from pretrain.model.masked_gene_model import build_model

    network = build_model(CONFIG, vocabulary, 0).bert
    first, width = vocabulary.first_gene_token, CONFIG.hidden_size
    with torch.no_grad():
        for name, parameter in network.bert.named_parameters():
            parameter.fill_(1.0 if name.endswith("LayerNorm.weight") else 0.0)
        table = network.bert.embeddings.word_embeddings.weight
        table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
        table[:, : 2 * NUM_REGULATORS] = 0
        for r in range(NUM_REGULATORS):
            table[first + r, r] = 6.0
            table[[first + g for g in targets_of(r)], NUM_REGULATORS + r] = 6.0
        attention: Any = network.bert.encoder.layer[0].attention
        for r in range(NUM_REGULATORS):
            attention.self.query.weight[r, NUM_REGULATORS + r] = 6.0
            attention.self.key.weight[r, r] = 6.0
        attention.self.value.weight.copy_(torch.eye(width))
        attention.output.dense.weight.copy_(torch.eye(width))
    return network


@pytest.fixture(scope="module")
def models() -> list[Model]:
    return make_models()


def make_models() -> list[Model]:
    """Return a model that attends to targets, and one of zeros."""
    import torch

    from eval.benchmark.material.models_and_cells import Model
    from pretrain.model.masked_gene_model import build_model

    vocabulary = Vocabulary(GENES, np.ones(NUM_GENES), {PAD: 0, MASK: 1}, 128)
    constant = build_model(CONFIG, vocabulary, 0).bert
    with torch.no_grad():
        for parameter in constant.parameters():
            parameter.zero_()
    networks = {"attending": attending_model(vocabulary), "constant": constant}
    return [Model(n, Path(n), b, vocabulary, f"digest of {n}") for n, b in networks.items()]


@pytest.fixture(scope="module")
def planted(models, tmp_path_factory) -> tuple[TaskRun, list[str]]:
    from eval.benchmark.kinds.targets import Targets
    from eval.benchmark.material.models_and_cells import Bench

    folder = write_data(tmp_path_factory.mktemp("targets"))
    units: list[str] = []
    store = Store(folder / "units", {}, lambda name, _: units.append(name))
    return Targets(make_task(), SIZE, Bench(models, folder, store, 0, "cpu", False)).run(), units


def means(result: TaskRun, contender: str, role: str, model: str | None = None) -> np.ndarray:
    found = [
        o.scores["auroc"]
        for o in result.outcomes
        if (o.contender, o.role, o.model) == (contender, role, model)
    ]
    assert found, contender
    return np.array(found, dtype=float)


def test_planted_targets_win(planted, models):
    from eval.benchmark.kinds.targets import Targets

    result, units = planted
    assert len(units) == len(result.outcomes) == num_units(Targets, make_task(), SIZE, models)
    assert set(result.details["regulators"]) == set(GENES[:NUM_REGULATORS])
    attending = means(result, "zero-shot", "model", "attending")
    assert attending.min() > 0.95
    assert (means(result, "zero-shot", "model", "constant") == 0.5).all(), "nothing ever moves"
    assert attending.mean() > means(result, "zero-shot", "twin", "attending").mean() + 0.2
    for name in ("correlation", "co-detection", "random forest importance", "mean rank alone"):
        assert abs(means(result, name, "baseline").mean() - 0.5) < 0.25, name


def test_shuffled_targets_are_at_chance(planted):
    result, _ = planted
    shuffled = means(result, "shuffled targets, zero-shot", "control", "attending")
    assert abs(shuffled.mean() - 0.5) < 0.06


def test_partners_may_be_listed(models, tmp_path):
    from eval.benchmark.kinds.targets import Targets
    from eval.benchmark.material.models_and_cells import Bench

    folder = write_data(tmp_path)
    pairs = read_edges(EDGES, folder)
    assert set(pairs.targets_of(GENES[1])) == {GENES[g] for g in targets_of(1)}
    assert pairs.others[GENES[1]] == [GENES[g] for g in LISTED]
    task = make_task(partners="listed", min_targets=2)
    bench = Bench(models[:1], folder, Store(folder / "units", {}), 0, "cpu", False)
    result = Targets(task, SIZE, bench).run()
    assert means(result, "zero-shot", "model", "attending").min() > 0.9
    assert max(result.details["regulators"].values()) <= TARGETS_EACH


def test_effects_are_those_of_the_encoder(models, tmp_path):
    """Deletions by hand: run the encoder with and without a gene, compare the others' states."""
    import torch

    from eval.benchmark.material.in_silico import engine_of, gene_effects
    from eval.benchmark.material.models_and_cells import Bench

    model = models[0]
    bench = Bench(models, tmp_path, Store(tmp_path / "units", {}), 0, "cpu", False)
    first = model.vocabulary.first_gene_token
    cells = [np.arange(first, first + 30), np.arange(first + 29, first - 1, -1)]
    tokens = np.array([first, first + 1])
    moved = gene_effects(engine_of(model, None, bench), cells, tokens, [np.array([0, 1])] * 2)
    encoder = model.network.bert.eval()

    def states(cell: np.ndarray) -> torch.Tensor:
        with torch.inference_mode():
            return encoder(input_ids=torch.from_numpy(cell)[None]).last_hidden_state[0]

    for row, token in enumerate(tokens):
        found = {t: [] for t in range(first, first + 30) if t != token}
        for cell in cells:
            left = cell[cell != token]
            before, after = states(cell), states(left)
            for place, other in enumerate(left):
                at = int(np.flatnonzero(cell == other)[0])
                cosine = torch.cosine_similarity(before[at], after[place], dim=0)
                found[int(other)].append(1 - float(cosine))
        for other, values in found.items():
            assert moved[row, other] == pytest.approx(np.mean(values), abs=1e-5)
    assert np.isnan(moved[0, first]), "the deleted gene has no state to compare"
    assert np.isnan(moved[0, first + 30]), "a gene that no cell holds"


def test_scores_and_helpers_by_hand():
    from eval.benchmark.matched.deletions import score_regulators
    from eval.benchmark.material.in_silico import chosen_holders

    truth = np.array([True, True, False, False])
    perfect, tied = np.array([4.0, 3, 2, 1]), np.zeros(4)
    assert score_regulators([truth, truth], [perfect, tied]) == {"auroc": 0.75, "auprc": 0.75}
    profiles = scipy.sparse.csr_matrix(np.array([[1.0, 2, 3], [3.0, 2, 1], [5.0, 5, 5]]))
    found = correlations(profiles, np.array([0, -1]), np.array([0, 1, 2]))
    np.testing.assert_allclose(found, [[1, -1, 0], [0, 0, 0]], atol=1e-12)
    cells = [np.array([1, 2]), np.array([2]), np.array([1, 3]), np.array([2, 1])]
    both = chosen_holders(cells, np.array([1, 2, 9]), None, 0)
    assert [c.tolist() for c in both] == [[0, 2, 3], [0, 1, 3], []]
    few = chosen_holders(cells, np.array([1, 2]), 1, 0)
    assert all(len(c) == 1 and set(c) <= set(b) for c, b in zip(few, both, strict=False))


def test_bad_input(models, tmp_path):
    from eval.benchmark.kinds.targets import Targets
    from eval.benchmark.material.models_and_cells import Bench

    folder = write_data(tmp_path)
    bench = Bench(models, folder, Store(folder / "units", {}), 0, "cpu", False)
    with pytest.raises(ValueError, match="0 regulators have 30 targets with partners"):
        Targets(make_task(min_targets=30), SIZE, bench).run()
    with pytest.raises(ValueError, match="no column confidence"):
        Targets(
            make_task(edges=EDGES.model_copy(update={"keep": {"confidence": ("A",)}})), SIZE, bench
        ).run()
    with pytest.raises(ValueError, match="no row has"):
        Targets(
            make_task(edges=EDGES.model_copy(update={"keep": {"bound": ("?",)}})), SIZE, bench
        ).run()
