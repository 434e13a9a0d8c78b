"""Perturbation tasks: states that genes hold apart, planted drivers, effects by hand, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from data_prep.genes.vocabulary import MASK, PAD, Vocabulary
from eval.benchmark.outcome import Store, TaskRun
from eval.benchmark.task_file import (
    SUITES,
    Cells,
    CellStates,
    GeneList,
    PerturbationTask,
    Size,
    all_tasks,
)
from eval.perturb.screen.edits import Edit
from pretrain.settings.model_settings import ModelConfig
from tests.contests import num_units

if TYPE_CHECKING:
    from eval.benchmark.material.models_and_cells import Bench, Model

NUM_GENES, NUM_DRIVERS, NUM_WELL, NUM_CELLS = 200, 20, 80, 80
GENES = tuple(f"ENSG{i:011d}" for i in range(NUM_GENES))
CONFIG = ModelConfig(
    num_layers=1, hidden_size=16, num_heads=2, intermediate_size=16, hidden_dropout=0.0,
    attention_dropout=0.0,
)  # fmt: skip
SIZE = Size.model_validate({"seeds": 3, "max_cells_per_gene": 5})
STATES = CellStates(key="state", start="sick", goal="well")


def make_task(**changes: object) -> PerturbationTask:
    content = {
        "name": "planted", "title": "Planted", "kind": "perturbation", "edit": "delete",
        "states": STATES, "positive": GeneList(name="driver", file="drivers.tsv"),
        "donor": "donor", "sizes": {}, "min_cells": 3,
        "cells": Cells(files=("cells.h5ad",), recipe="made by the tests"),
    }  # fmt: skip
    return PerturbationTask.model_validate(content | changes)


def write_data(folder: Path) -> Path:
    """Write cells of two states. Drivers are in sick cells only, and as common as others there.

    The last genes are in well cells only, so that these differ by more than what they lack.
    """
    import anndata

    rng = np.random.default_rng(0)
    # Rank, expression and detection go with one rate, so that genes have partners alike in all.
    rates = rng.permuted(
        np.tile(np.linspace(0.3, 4.0, 10), NUM_GENES // 10).reshape(-1, 10), axis=1
    )
    counts = rng.poisson(rates.ravel(), (NUM_CELLS, NUM_GENES)).astype(np.float32)
    sick = np.arange(NUM_CELLS) < NUM_CELLS // 2
    counts[~sick, :NUM_DRIVERS] = 0
    counts[sick, -NUM_WELL:] = 0
    obs = pd.DataFrame(
        {"state": np.where(sick, "sick", "well"), "donor": np.arange(NUM_CELLS) % 4},
        index=[f"cell{i}" for i in range(NUM_CELLS)],
    )
    data = anndata.AnnData(scipy.sparse.csr_matrix(counts), obs, pd.DataFrame(index=list(GENES)))
    data.write_h5ad(folder / "cells.h5ad")
    drivers = pd.DataFrame({"ensembl_id": GENES[:NUM_DRIVERS]})
    drivers.to_csv(folder / "drivers.tsv", sep="\t", index=False)
    return folder


@pytest.fixture(scope="module")
def models() -> list[Model]:
    return make_models()


def make_models() -> list[Model]:
    """Return a model in which all genes attend to all alike, and one of zeros.

    Embeddings of drivers have one direction in common, those of the last genes another.
    """
    import torch

    from eval.benchmark.material.models_and_cells import Model
    from pretrain.model.masked_gene_model import build_model

    vocabulary = Vocabulary(GENES, np.ones(NUM_GENES), {PAD: 0, MASK: 1}, 256)
    averaging, constant = (build_model(CONFIG, vocabulary, 0).bert for _ in range(2))
    first = vocabulary.first_gene_token
    with torch.no_grad():
        for network in (averaging, constant):
            for name, parameter in network.bert.named_parameters():
                scale = name.endswith("LayerNorm.weight") and network is averaging
                parameter.fill_(1.0 if scale else 0.0)
        table = averaging.bert.embeddings.word_embeddings.weight
        table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
        table[first : first + NUM_DRIVERS, 0] = 12.0
        table[first + NUM_GENES - NUM_WELL :, 1] = 12.0
        attention: Any = averaging.bert.encoder.layer[0].attention
        for weight in (attention.self.value.weight, attention.output.dense.weight):
            weight.copy_(torch.eye(CONFIG.hidden_size))
    return [
        Model(name, Path(name), network, vocabulary, f"digest of {name}")
        for name, network in (("averaging", averaging), ("constant", constant))
    ]


def bench_in(folder: Path, models: list[Model], units: list[str] | None = None) -> Bench:
    from eval.benchmark.material.models_and_cells import Bench

    done = (lambda name, _: units.append(name)) if units is not None else None
    return Bench(models, folder, Store(folder / "units", {}, done), 0, "cpu", False)


def scores(result: TaskRun, contender: str, role: str, model: str | None = None) -> np.ndarray:
    found = [
        o.scores["auroc"]
        for o in result.outcomes
        if (o.contender, o.role, o.model) == (contender, role, model)
    ]
    assert found, contender
    return np.array(found, dtype=float)


@pytest.fixture(scope="module")
def planted(models, tmp_path_factory) -> tuple[TaskRun, list[str]]:
    from eval.benchmark.kinds.perturbation import Perturbation

    folder = write_data(tmp_path_factory.mktemp("states"))
    units: list[str] = []
    return Perturbation(make_task(), SIZE, bench_in(folder, models, units)).run(), units


def test_planted_drivers_win(planted, models):
    from eval.benchmark.kinds.perturbation import Perturbation

    result, units = planted
    assert len(units) == len(result.outcomes) == num_units(Perturbation, make_task(), SIZE, models)
    assert result.headline == "auroc" and result.details["pairs"] >= 10
    assert scores(result, "zero-shot", "model", "averaging").min() > 0.9
    assert (scores(result, "zero-shot", "model", "constant") == 0.5).all(), "nothing ever moves"
    for name in ("differential expression", "correlation with the state", "logistic regression"):
        assert scores(result, name, "baseline").min() > 0.95, f"{name}: they differ by nothing else"
    for name in ("mean rank alone", "mean expression alone", "detection rate alone"):
        assert abs(scores(result, name, "baseline").mean() - 0.5) < 0.15, name
    shuffled = scores(result, "shuffled labels, zero-shot", "control", "averaging")
    assert abs(shuffled.mean() - 0.5) < 0.06


@pytest.mark.long
def test_the_other_way_round(models, tmp_path):
    """Overexpressed in well cells, drivers move them toward sick ones."""
    from eval.benchmark.kinds.perturbation import Perturbation

    folder = write_data(tmp_path)
    states = CellStates(key="state", start="well", goal="sick")
    task = make_task(edit="overexpress", states=states)
    result = Perturbation(task, SIZE, bench_in(folder, models[:1])).run()
    assert scores(result, "zero-shot", "model", "averaging").min() > 0.9
    assert scores(result, "differential expression", "baseline").min() > 0.9


def test_without_a_goal_genes_are_ordered_by_how_far_cells_move(models, tmp_path):
    from eval.benchmark.kinds.perturbation import Perturbation

    folder = write_data(tmp_path)
    task = make_task(states=None, cells=Cells(
        files=("cells.h5ad",), recipe="made by the tests", keep={"state": ("sick",)}
    ))  # fmt: skip
    result = Perturbation(task, SIZE, bench_in(folder, models[:1])).run()
    # What pulls a cell where the others pull it too moves it least when it is gone.
    assert scores(result, "zero-shot", "model", "averaging").max() < 0.2
    assert scores(result, "correlation with all genes", "baseline").shape == (3,)
    assert not any("state" in o.contender for o in result.outcomes)


def test_fewer_genes_may_be_drawn(models, tmp_path):
    from eval.benchmark.kinds.perturbation import Perturbation

    folder = write_data(tmp_path)
    size = Size.model_validate({"seeds": 1, "max_perturbed": 20, "max_cells_per_gene": 2})
    result = Perturbation(make_task(), size, bench_in(folder, models[:1])).run()
    assert result.details["pairs"] == 10 and result.excluded["pairs: not drawn"] >= 1


def test_effects_by_hand(models, tmp_path):
    """Every gene takes the mean of all; the same genes are compared, and donors count alike."""
    from eval.benchmark.material.in_silico import cell_effects, engine_of

    model = models[0]
    bench = bench_in(tmp_path, models)
    first = model.vocabulary.first_gene_token
    cells = [
        np.arange(first, first + 20),
        np.arange(first + 5, first + 30),
        np.arange(first, first + 9),
    ]
    donors = np.array(["a", "a", "b"])
    engine = engine_of(model, None, bench)
    goal = np.random.default_rng(0).normal(size=CONFIG.hidden_size)
    engine.set_centroids({"goal": goal})
    tokens = np.array([first + 6, first + 2])
    held = [np.array([0, 1, 2]), np.array([0, 2])]
    found = cell_effects(engine, cells, donors, tokens, held, Edit("delete"), "toward_goal")
    table = model.network.bert.embeddings.word_embeddings.weight.detach().double().numpy()

    def normed(rows: np.ndarray) -> np.ndarray:
        return (rows - rows.mean(axis=1, keepdims=True)) / rows.std(axis=1, keepdims=True)

    def states(cell: np.ndarray) -> np.ndarray:
        genes = normed(table[cell])
        return normed(genes + genes.mean(axis=0))

    def toward(cell: np.ndarray, token: int) -> float:
        stays = cell != token
        means = [states(cell)[stays].mean(axis=0), states(cell[stays]).mean(axis=0)]
        before, after = (m @ goal / np.linalg.norm(m) / np.linalg.norm(goal) for m in means)
        return after - before

    expected = [
        np.mean([np.mean([toward(cells[c], t) for c in of if donors[c] == d]) for d in "ab"])
        for t, of in zip(tokens, held, strict=True)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found).min() > 1e-4


def test_bad_input(models, tmp_path):
    from eval.benchmark.kinds.perturbation import Perturbation

    folder = write_data(tmp_path)
    bench = bench_in(folder, models)
    wrong = STATES.model_copy(update={"goal": "cured"})
    with pytest.raises(ValueError, match="no cell has 'cured' in 'state' .*sick, well.*`states`"):
        Perturbation(make_task(states=wrong), SIZE, bench).run()
    with pytest.raises(ValueError, match="pairs of 'driver'"):
        Perturbation(make_task(min_cells=41), SIZE, bench).run()
    with pytest.raises(ValueError, match="absent.tsv: no such file"):
        Perturbation(
            make_task(positive=GeneList(name="driver", file="absent.tsv")), SIZE, bench
        ).run()


def test_the_paper_s_perturbations_are_declared():
    from eval.benchmark.run import choose_tasks

    declared = {a for t in all_tasks().values() for a in t.applications}
    assert declared >= {
        "disease-driving genes", "treatment toward a goal state", "impact on cell state",
        "in silico reprogramming", "in silico differentiation",
        "TF direct against indirect targets", "TF targets", "Perturb-seq",
    }  # fmt: skip
    kinds = {"perturbation", "targets", "perturb_seq"}
    for suite in SUITES[1:]:
        assert {t.kind for t in choose_tasks(suite, [], [])} >= kinds, suite
