"""Integration tasks of the benchmark: scores of known embeddings, divisions, the planted batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

from eval.benchmark.outcome import Store
from eval.benchmark.task_file import Cells, IntegrationTask, Size
from pretrain.settings.model_settings import ModelConfig
from tests.contests import num_units
from tests.synthetic import make_cells
from tests.test_eval import vocabulary_of

MODEL = ModelConfig(
    num_layers=2, hidden_size=16, num_heads=2, intermediate_size=32,
    hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
TASK = IntegrationTask(
    name="mix", title="Mix", kind="integration", label="cell_type", batch="planted",
    planted_batch=True, sizes={},
    cells=Cells(files=("cells.h5ad",), recipe="made by the tests"),
)  # fmt: skip


@pytest.mark.long
def test_known_embeddings_score_as_they_must():
    """Types without batches near 1, noise low, batches without types lowest in mixing.

    Twenty seconds: scib-metrics compiles its scores for each new shape.
    """
    from eval.benchmark.scoring.integration_scores import score_embedding

    rng = np.random.default_rng(0)
    labels, batches = np.tile([0, 1, 2], 50), np.tile(np.repeat(["x", "y"], 3), 25)
    types, plates = np.eye(3)[labels] * 10, (batches == "x")[:, None] * 10.0
    noise = rng.normal(0, 0.5, (150, 3))
    # What there was before: types, and the batch in one direction.
    before = (types + plates + noise).astype(np.float32)
    perfect = score_embedding(types + noise, labels, batches, before)
    assert perfect["overall"] > 0.9 and perfect["ari"] == perfect["nmi"] == 1
    lost = score_embedding(rng.normal(size=(150, 3)), labels, batches, before)
    assert lost["bio"] < 0.4 and lost["avg_bio"] < 0.3 and lost["overall"] < 0.65
    assert lost["batch"] > 0.8, "noise mixes batches perfectly, which is why bio counts more"
    apart = score_embedding(plates + noise, labels, batches, before)
    assert apart["batch"] < 0.3 and apart["overall"] < lost["overall"] < perfect["overall"]
    for scores in (perfect, lost, apart):
        np.testing.assert_allclose(scores["overall"], 0.6 * scores["bio"] + 0.4 * scores["batch"])
        first = np.mean([scores[k] for k in ("ari", "nmi", "silhouette_label")])
        np.testing.assert_allclose(scores["avg_bio"], first)


def test_what_cannot_be_scored_is_refused():
    from eval.benchmark.scoring.integration_scores import score_embedding

    embedding = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    labels, batches = np.arange(20) % 2, np.array(["x", "y"] * 10)
    with pytest.raises(ValueError, match="not finite"):
        score_embedding(embedding * np.nan, labels, batches, embedding)
    with pytest.raises(ValueError, match="fewer than two labels"):
        score_embedding(embedding, labels * 0, batches, embedding)
    with pytest.raises(ValueError, match="fewer than two batches"):
        score_embedding(embedding, labels, np.array(["x"] * 20), embedding)
    with pytest.raises(ValueError, match="20 embeddings, 19 labels"):
        score_embedding(embedding, labels[1:], batches, embedding)


def test_kbet_looks_within_labels():
    from eval.benchmark.scoring.integration_scores import kbet_by_label

    rng = np.random.default_rng(0)
    labels, batches = np.repeat([0, 1], 100), np.tile([0, 1], 100)
    embedding = rng.normal(size=(200, 2)).astype(np.float32)
    assert kbet_by_label(embedding, labels, batches) > 0.8
    assert kbet_by_label(embedding + 10 * batches[:, None], labels, batches) < 0.05
    # Labels with one batch say nothing, so a batch that is a label is no failure to mix.
    assert np.isnan(kbet_by_label(embedding, batches, batches))


def test_batches_are_held_out_whole_where_there_are_enough():
    from eval.benchmark.material.labelled_cells import divide_batches

    size = Size(seeds=1)
    labels = np.tile([0, 1], 100)
    batches = np.repeat(["a", "b", "c", "d", "e"], 40)
    sets = set()
    for seed in range(6):
        train, (scored,) = divide_batches(labels, batches, size, seed)
        assert not set(batches[train]) & set(batches[scored])
        assert len(np.unique(batches[scored])) >= 2
        assert set(labels[train]) == set(labels[scored]) == {0, 1}
        sets.add(tuple(scored))
    assert len(sets) == 6, "seeds score other cells"
    two = np.array(["a", "b"]).repeat(100)
    train, (scored,) = divide_batches(labels, two, size, 0)
    assert not set(train) & set(scored)
    assert [(two[scored] == b).sum() for b in "ab"] == [40, 40]
    assert sum((labels[scored] == 0) & (two[scored] == "a")) == 20
    with pytest.raises(ValueError, match="integration needs two"):
        divide_batches(labels, np.array(["a"] * 200), size, 0)


def test_classes_that_are_rare_in_a_batch_are_divided_too():
    from eval.benchmark.material.labelled_cells import divide_batches

    labels = np.array([0] * 40 + [1] * 9 + [1])
    batches = np.array(["a", "b"] * 20 + ["a"] * 9 + ["b"])
    train, (scored,) = divide_batches(labels, batches, Size(seeds=1), 0)
    assert set(labels[train]) == set(labels[scored]) == {0, 1}


@pytest.mark.parametrize("num_batches", [2, 4])
def test_parts_are_disjoint_and_alike(num_batches):
    """Of one size, none of them among the training cells; a class and batch differ by few."""
    from eval.benchmark.material.labelled_cells import divide_batches

    rng = np.random.default_rng(0)
    labels, names = rng.integers(0, 3, 600), np.array(list("abcd"))
    batches = names[rng.integers(0, num_batches, 600)]
    train, parts = divide_batches(labels, batches, Size(seeds=1), 0, folds=3)
    every = np.concatenate(parts)
    assert len({len(p) for p in parts}) == 1 and len(np.unique(every)) == len(every)
    assert not set(every) & set(train)
    if num_batches == 4:
        assert not set(batches[every]) & set(batches[train]), "batches stay whole"
    for group in (labels, batches):
        counts = [[(group[p] == g).sum() for g in np.unique(group[every])] for p in parts]
        assert np.ptp(counts, axis=0).max() <= 3
    capped = divide_batches(labels, batches, Size(seeds=1, max_test_per_class=10), 0, folds=3)[1]
    assert all(abs((labels[p] == c).sum() - 10) <= 1 for p in capped for c in range(3))
    with pytest.raises(ValueError, match="has 2 scored cells for 3 folds"):
        divide_batches(
            np.tile([0, 1], 100), np.array(["a"] * 196 + ["b"] * 4), Size(seeds=1), 0, folds=3
        )


def test_planted_batch_is_the_effect_it_says():
    from eval.benchmark.material.planted_batches import BATCHES, add_planted_batch

    cells = make_cells(400, num_genes=300, detected=2.0)
    before = cells.X.copy()
    changed = add_planted_batch(cells, "planted", 0)
    assert (before != cells.X).nnz == 0 and "planted" not in cells.obs
    other = (changed.obs["planted"] == BATCHES[1]).to_numpy()
    assert other.sum() == 200
    assert (changed.X[~other] != before[~other].astype(np.int32)).nnz == 0
    # One factor a gene: the same in both halves of the changed cells, whatever their types.
    counts = [scipy.sparse.csr_matrix(x[other]).toarray() for x in (before, changed.X)]
    first, second = (counts[1][i::2].sum(0) / counts[0][i::2].sum(0) for i in range(2))
    assert np.corrcoef(np.log(first), np.log(second))[0, 1] > 0.9
    # E[factor] x capture = exp(0.5^2 / 2) x 0.6 = 0.68; spread of its logarithm 0.5.
    assert abs(first.mean() - 0.68) < 0.1 and abs(np.log(first).std() - 0.5) < 0.1
    again = add_planted_batch(cells, "planted", 0)
    assert (again.X != changed.X).nnz == 0
    assert (add_planted_batch(cells, "planted", 1).X != changed.X).nnz > 0
    with pytest.raises(ValueError, match="has a column 'donor' already"):
        add_planted_batch(cells, "donor", 0)


def test_planted_counts_are_what_is_encoded(tmp_path):
    """Tokens of changed cells are ranked by the changed counts."""
    import anndata

    from eval.benchmark.material.models_and_cells import Model, load_cells
    from eval.benchmark.material.planted_batches import BATCHES, add_planted_batch
    from pretrain.model.masked_gene_model import build_model

    path = tmp_path / "cells.h5ad"
    make_cells(60).write_h5ad(path)
    vocabulary = vocabulary_of(path)
    model = Model("m", tmp_path, build_model(MODEL, vocabulary, 0).bert, vocabulary, "m")

    def loaded(change):
        return load_cells(TASK.cells, ("cell_type",), [model], tmp_path, None, 0, change)

    plain = loaded(None)
    planted = loaded(lambda cells: add_planted_batch(cells, "planted", 0))
    moved = add_planted_batch(anndata.read_h5ad(path), "planted", 0).obs["planted"] == BATCHES[1]
    for i, changed in enumerate(moved):
        same = np.array_equal(plain.tokens["m"][i], planted.tokens["m"][i])
        assert same != changed
    assert plain.digest != planted.digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cells")
    make_cells(120, num_genes=80).write_h5ad(path / "cells.h5ad")
    return path


def contest_in(folder: Path, store: Store, size: Size):
    from eval.benchmark.kinds.integration import Integration
    from eval.benchmark.material.models_and_cells import Bench, Model
    from pretrain.model.masked_gene_model import build_model

    vocabulary = vocabulary_of(folder / "cells.h5ad")
    model = Model("m", folder, build_model(MODEL, vocabulary, 7).bert, vocabulary, "m")
    return Integration(TASK, size, Bench([model], folder, store, 0, "cpu", False)), model


def test_every_contender_embeds_the_cells_of_a_seed(folder, tmp_path):
    """Without the scores and pictures, whose compilation is what the whole run below waits for."""
    contest, _ = contest_in(folder, Store(tmp_path, {}), Size(seeds=1, epochs=1))
    folds = contest.folds(0)
    first, cells = folds[0], len(folds[0].pool)
    assert cells == sum(len(f.test) for f in folds)
    batches = contest.known.batches[first.pool]
    known = np.unique(batches)

    def apart(states: np.ndarray) -> float:
        """How far the batches' means are from each other, in spreads of the cells."""
        means = [states[batches == b].mean(axis=0) for b in known]
        return float(np.linalg.norm(means[0] - means[1]) / states.std())

    found = {}
    for row in contest.contenders():
        states, again = (
            p if isinstance(p, np.ndarray) else p.prediction for p in map(row.predict, folds[:2])
        )
        assert np.array_equal(states, again), "once for all parts"
        assert states.shape[0] == cells and np.isfinite(states).all(), row.name
        found[row.name, row.role] = states
    assert {"highly variable genes", "PCA", "ComBat"} <= {name for name, _ in found}
    # Batches have other shares of each type, so something is left: as measured, 0.41.
    assert apart(found["ComBat", "baseline"]) < 0.6 * apart(found["PCA", "baseline"])
    zero, tuned = (found[n, "model"] for n in ("zero-shot", "fine-tuned"))
    assert zero.shape == tuned.shape and not np.array_equal(zero, tuned)


# Slow: compiles scores for the shape of the folds, and UMAP: half a minute.
@pytest.mark.slow
def test_run_of_an_integration_task(folder, tmp_path):
    from eval.benchmark.contest.verdicts import verdicts
    from eval.benchmark.kinds.integration import Integration

    size = Size(seeds=1, epochs=2, learning_rate=5e-3)
    units: list[str] = []
    store = Store(tmp_path / "units", {}, lambda name, seconds: units.append(name))
    contest, model = contest_in(folder, store, size)
    result = contest.run()
    assert len(units) == num_units(Integration, TASK, size, [model])
    assert result.chance is None and result.headline == "overall"
    places = result.details["umap"]
    drawn = len(result.details["labels"])
    each = [f["test_cells"] for f in result.details["folds"]]
    assert len(each) == 3 and drawn == len(result.details["batches"]) == sum(each)
    assert result.details["test_share"] == pytest.approx(each[0] / 120)
    words = {v["word"] for v in verdicts(result, ["m"])}
    assert "not tested" not in words, "three folds are enough"
    trained = [o.details["training"] for o in result.outcomes if o.contender == "fine-tuned"]
    assert len(trained) == 6 and len({str(t) for t in trained}) == 2, "once for all parts"
    assert {"PCA", "ComBat", "zero-shot, m", "fine-tuned, m with random weights"} <= set(places)
    assert all(np.array(points).shape == (drawn, 2) for points in places.values())
    assert "umap" not in result.outcomes[0].details
    score = {
        (o.contender, o.role): o.scores for o in result.outcomes if o.fold == 0
    }  # fmt: skip
    assert score["PCA", "baseline"]["pcr_comparison"] == 0
    assert score["ComBat", "baseline"]["batch"] > score["PCA", "baseline"]["batch"]
    assert score["PCA", "baseline"]["ari"] > 0.5
    again = contest_in(folder, Store(tmp_path / "units", {}), size)[0].run()
    assert again == result, "all stored"
