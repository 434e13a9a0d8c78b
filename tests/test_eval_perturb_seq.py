"""Perturb-seq tasks: scores by hand, folds without a leak, planted truths, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from data_prep.genes.vocabulary import MASK, PAD, Vocabulary
from eval.benchmark.material.gene_pairs import read_edges
from eval.benchmark.outcome import Store, TaskRun
from eval.benchmark.task_file import Cells, Edges, PerturbSeqTask, Size
from pretrain.settings.model_settings import ModelConfig
from tests.contests import num_units

if TYPE_CHECKING:
    from eval.benchmark.material.models_and_cells import Bench, Model

NUM_GENES, NUM_PERTURBED = 60, 20
GENES = tuple(f"ENSG{i:011d}" for i in range(NUM_GENES))
CONFIG = ModelConfig(
    num_layers=1, hidden_size=16, num_heads=2, intermediate_size=16,
    hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
SIZE = Size.model_validate({"max_cells": 60, "seeds": 1, "max_cells_per_gene": 2})
CELLS = Cells(files=("cells.h5ad",), recipe="made by the tests")
# What a perturbation does follows from two hidden numbers of the perturbed gene.
HIDDEN = np.random.default_rng(3).normal(size=(NUM_PERTURBED, 2))
EFFECTS = np.random.default_rng(4).normal(size=(2, NUM_GENES))


def make_task(**changes: object) -> PerturbSeqTask:
    content = {
        "name": "planted", "title": "Planted", "kind": "perturb_seq", "cells": CELLS, "sizes": {},
        "perturbation": "guide", "control": "none", "replicate": "batch", "folds": 4,
        "gene_ids": {f"P{i}": GENES[i] for i in range(NUM_PERTURBED)},
    }  # fmt: skip
    return PerturbSeqTask.model_validate(content | changes)


def write_cells(folder: Path, doubles: tuple[tuple[int, int], ...] = ()) -> Path:
    """Write 40 controls and 24 cells of each perturbation, in two batches."""
    import anndata

    rng = np.random.default_rng(0)
    base = rng.uniform(1.0, 2.5, NUM_GENES)
    shifts = {"none": np.zeros(NUM_GENES)}
    shifts |= {f"P{i}": HIDDEN[i] @ EFFECTS * 0.5 for i in range(NUM_PERTURBED)}
    shifts |= {f"P{a}+P{b}": shifts[f"P{a}"] + shifts[f"P{b}"] for a, b in doubles}
    guides = [g for g in shifts for _ in range(40 if g == "none" else 24)]
    rates = np.exp(base + np.stack([shifts[g] for g in guides]))
    counts = rng.poisson(rates / rates.sum(axis=1, keepdims=True) * 2_000).astype(np.float32)
    obs = pd.DataFrame(
        {"guide": guides, "batch": [f"b{i % 2}" for i in range(len(guides))]},
        index=[f"cell{i}" for i in range(len(guides))],
    )
    data = anndata.AnnData(scipy.sparse.csr_matrix(counts), obs, pd.DataFrame(index=list(GENES)))
    data.write_h5ad(folder / "cells.h5ad")
    return folder


def make_models() -> list[Model]:
    """Return a model whose input embeddings hold the hidden numbers, and one of zeros."""
    import torch

    from eval.benchmark.material.models_and_cells import Model
    from pretrain.model.masked_gene_model import build_model

    vocabulary = Vocabulary(GENES, np.ones(NUM_GENES), {PAD: 0, MASK: 1}, 128)
    knowing, constant = (build_model(CONFIG, vocabulary, 0).bert for _ in range(2))
    with torch.no_grad():
        table = knowing.bert.embeddings.word_embeddings.weight
        first = vocabulary.first_gene_token
        table.zero_()
        table[first : first + NUM_PERTURBED, :2] = torch.from_numpy(HIDDEN).float()
        for parameter in constant.parameters():
            parameter.zero_()
    return [
        Model(name, Path(name), network, vocabulary, f"digest of {name}")
        for name, network in (("knowing", knowing), ("constant", constant))
    ]


def bench_in(folder: Path, models: list[Model], units: list[str] | None = None) -> Bench:
    from eval.benchmark.material.models_and_cells import Bench

    done = (lambda name, _: units.append(name)) if units is not None else None
    return Bench(models, folder, Store(folder / "units", {}, done), 0, "cpu", False)


def means(result: TaskRun, contender: str, score: str, model: str | None = None) -> np.ndarray:
    found = [
        o.scores[score]
        for o in result.outcomes
        if (o.contender, o.model) == (contender, model) and o.role != "twin"
    ]
    assert found, contender
    return np.array(found, dtype=float)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[TaskRun, list[str], list[Model]]:
    from eval.benchmark.kinds.perturb_seq import MeasuredShifts

    folder = write_cells(tmp_path_factory.mktemp("planted"))
    units: list[str] = []
    models = make_models()
    return MeasuredShifts(make_task(), SIZE, bench_in(folder, models, units)).run(), units, models


def test_scores_by_hand():
    from eval.benchmark.scoring.shift_scores import (
        affected_genes,
        pearson,
        score_ranking,
        score_shift,
    )

    measured = np.array([3.0, -2.0, 1.0, 0.0])
    assert pearson(measured, 2 * measured + 1) == pytest.approx(1)
    assert pearson(measured, np.full(4, 0.7)) == 0, "what does not vary explains nothing"
    predicted = np.array([2.0, -1.0, 1.0, 2.0])
    scores = score_shift(measured, predicted, np.zeros(4))
    assert scores["l2"] == pytest.approx(np.sqrt(1 + 1 + 0 + 4))
    # Means 0.5 and 1: products 2.5*1 + 2.5*2 + 0 - 0.5*1 = 7; squares 13 and 6.
    assert scores["pearson_delta"] == pytest.approx(7 / np.sqrt(13 * 6))
    assert scores["pearson_specific"] == pytest.approx(scores["pearson_delta"])
    assert not any(k.endswith("top20") for k in scores), "there are no twenty genes"
    typical = np.array([1.0, 0, 0, 0])
    assert score_shift(measured, typical, typical)["pearson_specific"] == 0
    wide = np.arange(30.0) - 10
    top = score_shift(wide, np.where(wide >= 0, wide, -100), np.zeros(30))
    # The largest 20: 19 to 0, without one of the two of equal size that come last: -10 first.
    largest = np.argsort(-np.abs(wide), kind="stable")[:20]
    expected = np.where(wide >= 0, wide, -100)[largest] - wide[largest]
    assert top["l2_top20"] == pytest.approx(np.linalg.norm(expected))
    assert affected_genes(wide).sum() == 2 and affected_genes(wide)[[28, 29]].all()
    assert affected_genes(np.array([0.0, 1, 1, 0])).tolist() == [False, True, True, False]
    ranked = score_ranking(np.array([True, False, True, False]), np.array([4.0, 3, 2, 1]))
    assert ranked["auroc"] == 0.75 and ranked["auprc"] == pytest.approx((1 + 2 / 3) / 2)
    assert np.isnan(score_ranking(np.ones(3, bool), np.arange(3.0))["auroc"])


def test_rank_of_the_truth():
    from eval.benchmark.scoring.shift_scores import rank_of_truth

    measured = np.array([[1.0, 2, 3, 4], [4.0, 3, 2, 1], [1.0, -1, 1, -1]])
    assert rank_of_truth(measured, measured).tolist() == [1, 1, 1]
    # Its own is the worst of three, and the first prediction fits the second best.
    assert rank_of_truth(measured, measured[[1, 0, 2]]).tolist() == [0, 0, 1]
    assert rank_of_truth(measured, np.zeros((3, 4))).tolist() == [0.5] * 3
    assert np.isnan(rank_of_truth(measured[:1], measured[:1])).all()


def test_pseudobulk_by_hand():
    from eval.benchmark.material.measured_shifts import pseudobulk

    counts = scipy.sparse.csr_matrix(np.array([[1.0, 0, 3], [2.0, 0, 4]]))
    np.testing.assert_allclose(pseudobulk(counts), np.log1p([3000, 0, 7000]))


def test_no_test_perturbation_was_trained_on():
    from eval.benchmark.material.measured_shifts import Shifts, perturbation_folds

    perturbed: list[tuple[str, ...]] = [(g,) for g in "abcdefgh"]
    perturbed += [("a", "b"), ("c", "h")]
    shifts = Shifts(["+".join(p) for p in perturbed], perturbed, ["x"], np.ones((10, 1)), None, {})
    tested = []
    for train, test in perturbation_folds(shifts, "genes", 4, 0):
        seen = {g for i in train for g in perturbed[i]}
        assert not set(train) & set(test)
        assert all(set(perturbed[i]) - seen for i in test), "each has a gene that is new"
        tested += test.tolist()
    assert set(tested) == set(range(10))
    for train, test in perturbation_folds(shifts, "combinations", 2, 0):
        assert set(range(8)) <= set(train.tolist()) and len(test) == 1
        assert not set(train) & set(test)
    with pytest.raises(ValueError, match="2 combinations of genes, fewer than 3"):
        perturbation_folds(shifts, "combinations", 3, 0)


def test_ridge_knows_nothing_of_what_it_is_not_told():
    from eval.benchmark.neighbours.shift_baselines import ridge

    values = np.random.default_rng(0).normal(size=(12, 5))
    constant = ridge(np.ones((12, 3)), values, np.ones((2, 3)))
    np.testing.assert_allclose(constant, np.tile(values.mean(axis=0), (2, 1)))
    features = np.random.default_rng(1).normal(size=(12, 2))
    unknown = ridge(features, values, np.full((1, 2), np.nan))
    np.testing.assert_allclose(unknown[0], values.mean(axis=0), atol=1e-9)


def test_planted_truth_wins(planted):
    from eval.benchmark.kinds.perturb_seq import MeasuredShifts

    result, units, models = planted
    assert (
        len(units) == num_units(MeasuredShifts, make_task(), SIZE, models) == len(result.outcomes)
    )
    assert result.headline == "pearson_delta_top20" and result.chance == 0
    name = "ridge on input embedding"
    knowing = means(result, name, "pearson_delta_top20", "knowing")
    baseline = means(result, "train mean", "pearson_delta_top20")
    assert knowing.mean() > 0.8 and (knowing > baseline).all()
    assert means(result, name, "rank_of_truth", "knowing").mean() > 0.9
    assert means(result, name, "auroc", "knowing").mean() > 0.8
    np.testing.assert_allclose(
        means(result, name, "l2", "constant"), means(result, "train mean", "l2")
    )
    deleted = [o for o in result.outcomes if o.contender == "in silico deletion"]
    assert {o.role for o in deleted} == {"model", "twin"}
    assert all(set(o.scores) == {"auroc", "auprc"} for o in deleted), "ranks are no shifts"
    nothing = means(result, "in silico deletion", "auroc", "constant")
    assert (nothing == 0.5).all(), "where nothing moves, all genes are alike"
    agreement = result.details["replicate_agreement"]
    assert 0.6 < agreement <= 1


def test_train_mean_is_that_of_the_training(planted, tmp_path):
    """Recomputed from the cells: sums of counts of each batch, logarithms, means, distances."""
    import anndata

    from eval.benchmark.material.measured_shifts import Shifts, perturbation_folds

    result, _, _ = planted
    cells = anndata.read_h5ad(write_cells(tmp_path) / "cells.h5ad")
    bulk = {
        key: np.log1p(1e4 * total / total.sum())
        for key, rows in cells.obs.groupby(["guide", "batch"]).groups.items()
        for total in [np.asarray(cells[rows].X.sum(axis=0)).ravel()]
    }
    names = sorted(set(cells.obs["guide"]) - {"none"})
    shift = {
        n: np.mean([bulk[n, b] - bulk["none", b] for b in ("b0", "b1")], axis=0) for n in names
    }
    perturbed: list[tuple[str, ...]] = [(GENES[int(n[1:])],) for n in names]
    folds = perturbation_folds(
        Shifts(names, perturbed, ["x"], np.ones((len(names), 1)), None, {}), "genes", 4, 0
    )
    expected = []
    for train, test in folds:
        mean = np.mean([shift[names[i]] for i in train], axis=0)
        others = [np.arange(NUM_GENES) != int(names[i][1:]) for i in test]
        distances = [
            np.linalg.norm((shift[names[i]] - mean)[o]) for i, o in zip(test, others, strict=True)
        ]
        expected.append(np.mean(distances))
    np.testing.assert_allclose(means(result, "train mean", "l2"), expected, rtol=1e-5)
    assert (means(result, "train mean", "pearson_specific") == 0).all()
    np.testing.assert_allclose(means(result, "train mean", "rank_of_truth"), 0.5)
    assert (means(result, "no change", "pearson_delta") == 0).all()


def test_shuffled_genes_are_at_chance(planted):
    result, _, _ = planted
    for model in ("knowing", "constant"):
        name = "shuffled genes, ridge on input embedding"
        assert abs(means(result, name, "pearson_delta_top20", model).mean()) < 0.1
        assert abs(means(result, name, "auroc", model).mean() - 0.5) < 0.1


def test_contenders_that_only_rank_end_no_suite(planted):
    """They have no correlation, which is the headline: a suite ended there with a KeyError."""
    from eval.benchmark.contest.verdicts import mean_of, summarise
    from eval.benchmark.run import _remarks

    result, _, _ = planted
    rows = summarise(result)
    ranking = [r["contender"] for r in rows if mean_of(r, result.headline) is None]
    assert "mean expression" in ranking and "train mean" not in ranking
    assert _remarks(rows, result.headline) == []


@pytest.mark.long
def test_same_numbers_again(planted, tmp_path):
    from eval.benchmark.kinds.perturb_seq import MeasuredShifts

    result, _, models = planted
    again = MeasuredShifts(make_task(), SIZE, bench_in(write_cells(tmp_path), models[:1])).run()
    expected = [o.scores for o in result.outcomes if o.model == "knowing"]
    assert [o.scores for o in again.outcomes if o.model == "knowing"] == expected


def test_additive_is_the_sum_of_singles(tmp_path):
    """Planted doubles are sums of log shifts; normalisation bends them only a little."""
    from eval.benchmark.kinds.perturb_seq import MeasuredShifts

    pairs = tuple((i, i + 1) for i in range(8))
    folder = write_cells(tmp_path, pairs)
    result = MeasuredShifts(
        make_task(split="combinations"), SIZE, bench_in(folder, make_models()[1:])
    ).run()
    assert means(result, "additive", "pearson_delta").mean() > 0.9
    assert (means(result, "additive", "l2") < means(result, "train mean", "l2")).all()


def test_signatures(tmp_path):
    """Memberships are ranked; genes that the cells do not detect are left out."""
    from eval.benchmark.kinds.perturb_seq import MeasuredShifts
    from eval.benchmark.material.measured_shifts import memberships

    write_cells(tmp_path)
    up = HIDDEN @ EFFECTS > 0.8
    rows = [
        (GENES[p] if p else "", GENES[g], str(bool(up[p, g])))
        for p in range(NUM_PERTURBED)
        for g in range(NUM_GENES)
    ]
    rows.append((GENES[1], "ENSG_never_seen", "True"))
    table = pd.DataFrame(rows, columns=["from", "to", "up"])
    table.to_parquet(tmp_path / "up.parquet")
    edges = Edges(file="up.parquet", source="from", target="to", keep={"up": ("True",)}, recipe="-")
    pairs = read_edges(edges, tmp_path)
    shifts = memberships(pairs)
    assert len(shifts.names) == NUM_PERTURBED - 1, "a row without an id is no perturbation"
    assert shifts.are_memberships and "ENSG_never_seen" in shifts.genes
    row = shifts.names.index(GENES[2])
    expected = {GENES[g] for g in np.flatnonzero(up[2]) if g != 2}
    assert {g for g, v in zip(shifts.genes, shifts.values[row], strict=True) if v} == expected
    task = make_task(perturbation="", control="", replicate=None, signatures=edges)
    result = MeasuredShifts(task, SIZE, bench_in(tmp_path, make_models())).run()
    assert result.headline == "auroc" and result.chance == 0.5
    assert result.excluded["genes: not detected in the cells that are looked at"] == 1
    knowing = means(result, "ridge on input embedding", "auroc", "knowing")
    assert knowing.mean() > 0.8 > means(result, "train mean", "auroc").mean()


def test_bad_input(tmp_path):
    from eval.benchmark.kinds.perturb_seq import MeasuredShifts

    write_cells(tmp_path)
    bench = bench_in(tmp_path, make_models())
    with pytest.raises(ValueError, match="no cell has 'untreated' in 'guide'.*correct `control`"):
        MeasuredShifts(make_task(control="untreated"), SIZE, bench).run()
    with pytest.raises(ValueError, match="perturbations with 30 cells or more"):
        MeasuredShifts(make_task(min_cells=30, replicate=None), SIZE, bench).run()
    with pytest.raises(ValueError, match="0 perturbations of genes that the vocabulary knows"):
        MeasuredShifts(make_task(gene_ids={}), SIZE, bench).run()
    edges = Edges(file="none.tsv", source="a", target="b", recipe="Ask for it.")
    with pytest.raises(ValueError, match="none.tsv: no such file. Ask for it."):
        read_edges(edges, tmp_path)
    (tmp_path / "none.tsv").write_text("a\tc\nx\ty\n")
    with pytest.raises(ValueError, match="no column b; it has a, c"):
        read_edges(edges, tmp_path)
    (tmp_path / "none.tsv").write_text("a\tb\nx\tx\n")
    with pytest.raises(ValueError, match="none.tsv: no row has"):
        read_edges(edges, tmp_path)
    with pytest.raises(ValueError, match="give perturbation, or signatures"):
        make_task(signatures=edges)
    with pytest.raises(ValueError, match="`control` has to name"):
        make_task(control="")
