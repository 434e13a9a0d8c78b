"""Simulated shifts and cooperativity: scores of planted predictions, runs with a random model."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from data_prep.genes.vocabulary import MASK, PAD, Vocabulary
from eval.benchmark.outcome import Store
from eval.benchmark.task_file import (
    CooperativityTask,
    SimulatedShiftsTask,
    Size,
    all_tasks,
)
from eval.simulate.settings import make_settings
from pretrain.settings.model_settings import ModelConfig
from tests.contests import num_units

if TYPE_CHECKING:
    from eval.benchmark.material.models_and_cells import Bench, Model

CONFIG = ModelConfig(
    num_layers=2, hidden_size=16, num_heads=2, intermediate_size=16, hidden_dropout=0.0,
    attention_dropout=0.0,
)  # fmt: skip
SIZE = Size.model_validate(
    {"max_cells": 100, "seeds": 3, "max_perturbed": 5, "max_cells_per_gene": 6}
)
EDITS = ("delete", "overexpress")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def write_data(folder: Path) -> Path:
    """Write a simulation: 120 genes, 10 of them TFs, two types."""
    from eval.simulate.write import simulate

    settings = make_settings(
        cells=150, genes=120, tfs=10, types=2, perturb_cells=20, regulators_per_gene=4
    )
    simulate(settings, folder / "simulated")
    return folder


@pytest.fixture(scope="module")
def model(data) -> Model:
    return make_model(data)


def make_model(data: Path) -> Model:
    """Return a model with random weights that knows the genes of a simulation."""
    import anndata

    from eval.benchmark.material.models_and_cells import Model
    from pretrain.model.masked_gene_model import build_model

    genes = tuple(anndata.read_h5ad(data / "simulated/controls.h5ad").var_names)
    vocabulary = Vocabulary(genes, np.ones(len(genes)), {PAD: 0, MASK: 1}, 128)
    return Model("random", Path("random"), build_model(CONFIG, vocabulary, 0).bert, vocabulary, "x")


def bench_in(folder: Path, data: Path, model: Model) -> tuple[Bench, list[str]]:
    from eval.benchmark.material.models_and_cells import Bench

    units: list[str] = []
    store = Store(folder / "units", {}, lambda name, _: units.append(name))
    return Bench([model], data, store, 0, "cpu", False), units


def cooperativity(**changes: object) -> CooperativityTask:
    task = all_tasks()["simulated_cooperativity"]
    assert isinstance(task, CooperativityTask)
    return task.model_copy(update={"min_targets": 3, "min_cells": 2} | changes)


def shifts(**changes: object) -> SimulatedShiftsTask:
    task = all_tasks()["simulated_shifts"]
    assert isinstance(task, SimulatedShiftsTask)
    return task.model_copy(update=changes)


def origins(data: Path) -> list[str]:
    import anndata

    return anndata.read_h5ad(data / "simulated/controls.h5ad").obs_names.tolist()


def test_truth_scores_one_and_what_is_shuffled_none(data):
    from eval.benchmark.material.simulated_truth import (
        Moves,
        read_truth,
        score_moves,
        shuffled,
    )

    cells = origins(data)[::-1]
    truth = read_truth(data / "simulated/shifts.parquet", EDITS, cells)
    table = pd.read_parquet(data / "simulated/shifts.parquet").set_index(
        ["kind", "perturbation", "origin"]
    )
    row = table.loc[("overexpress", truth.regulators[2], cells[4])]
    moves = truth.moves["overexpress"]
    assert moves.shift[4, 2] == row["shift"] and moves.toward is not None
    assert moves.toward[:, 4, 2].tolist() == [row[f"toward_{t}"] for t in truth.types]
    asked = np.random.default_rng(0).random(moves.shift.shape) < 0.7
    perfect = score_moves(moves, Moves(10 * moves.shift, moves.toward), asked)
    assert perfect == pytest.approx(dict.fromkeys(perfect, 1.0))
    assert len(perfect) == 4
    reverse = score_moves(moves, Moves(-moves.shift, None), asked)
    assert reverse["spearman"] == pytest.approx(-1) and np.isnan(reverse["spearman_toward"])
    constant = score_moves(
        moves, Moves(np.full(asked.shape, 0.3), np.zeros((2, *asked.shape))), asked
    )
    assert set(constant.values()) == {0.0}
    rng = np.random.default_rng(0)
    found = [score_moves(shuffled(moves, rng), moves, asked)["spearman"] for _ in range(400)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 20 + 0.01
    assert np.std(found) > 0


def test_scores_over_cells_and_over_regulators_differ(data):
    """A prediction of each regulator's mean knows nothing of cells."""
    from eval.benchmark.material.simulated_truth import Moves, read_truth, score_moves

    truth = read_truth(data / "simulated/shifts.parquet", ("delete",), origins(data))
    moves, asked = truth.moves["delete"], np.ones(truth.moves["delete"].shift.shape, dtype=bool)
    means = np.broadcast_to(moves.shift.mean(axis=0), asked.shape)
    scores = score_moves(moves, Moves(means, None), asked)
    assert scores["spearman_between"] == pytest.approx(1)
    assert scores["spearman_within"] == 0
    assert 0.3 < scores["spearman"] < 1


def test_run_of_shifts(data, model, tmp_path):
    from eval.benchmark.kinds.simulated_shifts import SimulatedShifts

    bench, units = bench_in(tmp_path, data, model)
    result = SimulatedShifts(shifts(), SIZE, bench).run()
    assert len(units) == len(result.outcomes) == num_units(SimulatedShifts, shifts(), SIZE, [model])
    assert len(result.details["regulators"]) == 5
    by_name = {o.contender: o.scores for o in result.outcomes if o.role == "baseline"}
    assert by_name["no change"]["spearman"] == 0 == by_name["no change"]["spearman_toward"]
    assert by_name["rank of the regulator"]["spearman_toward"] is None
    assert by_name["linear shift by correlation"]["spearman_toward"] is not None
    own = [o.scores for o in result.outcomes if o.role == "model"]
    assert all(set(s) == set(own[0]) and len(s) == 12 and None not in s.values() for s in own)
    for s in own:
        both = [s["spearman_delete"], s["spearman_overexpress"]]
        assert s["spearman"] == pytest.approx(np.mean(np.array(both, dtype=float)))
    control = [o.scores["spearman"] for o in result.outcomes if o.role == "control"]
    assert np.abs(np.mean(np.array(control, dtype=float))) < 0.15


def test_moves_of_a_model_are_those_of_its_encoder(data, model, tmp_path):
    import torch

    from eval.benchmark.kinds.simulated_shifts import SimulatedShifts

    bench, _ = bench_in(tmp_path, data, model)
    contest = SimulatedShifts(shifts(edits=("delete",)), SIZE, bench)
    world = contest.world
    tokens = model.tokens_of(world.truth.regulators)
    moves = contest.model_moves(model, None, world.asked)["delete"]
    assert (np.isfinite(moves.shift) == world.asked).all()
    cell, column = np.argwhere(world.asked)[0]
    genes = world.cells.tokens["random"][cell].astype(np.int64)
    left = genes[genes != tokens[column]]
    assert len(left) == len(genes) - 1
    encoder = model.network.bert.eval()
    with torch.inference_mode():  # the second-to-last of two layers is the first
        before, after = (
            encoder(input_ids=torch.from_numpy(g)[None], output_hidden_states=True).hidden_states[1]
            for g in (genes, left)
        )
    kept = torch.from_numpy(genes != tokens[column])
    cosine = torch.cosine_similarity(before[0, kept].mean(dim=0), after[0].mean(dim=0), dim=0)
    assert moves.shift[cell, column] == pytest.approx(1 - float(cosine), abs=1e-6)


@pytest.mark.long  # test_planted_cooperativity: the scores, by hand
def test_run_of_cooperativity(data, model, tmp_path):
    from eval.benchmark.kinds.cooperativity import Cooperativity

    bench, units = bench_in(tmp_path, data, model)
    result = Cooperativity(cooperativity(), SIZE, bench).run()
    assert (
        len(units)
        == len(result.outcomes)
        == num_units(Cooperativity, cooperativity(), SIZE, [model])
    )
    network = pd.read_parquet(data / "simulated/network.parquet").query("direct")
    targets = network.groupby("tf")["target"].agg(set)
    for pair, number in result.details["regulators"].items():
        first, second = pair.split("+")
        assert 3 <= number <= len(targets[first] & targets[second])
    names = {o.contender for o in result.outcomes if o.role == "twin"}
    assert names == {"zero-shot", "combined deletion", "sum of single deletions"}
    assert all(
        0 <= o.scores["auroc"] <= 1 for o in result.outcomes if o.scores["auroc"] is not None
    )
    pair = tuple(next(iter(result.details["regulators"])).split("+"))
    named = Cooperativity(cooperativity(pairs=(pair,)), SIZE, bench).run()
    assert list(named.details["regulators"]) == ["+".join(pair)]


def test_planted_cooperativity(data, model, tmp_path):
    """Values that are planted at shared targets get the AUROC that they deserve."""
    from eval.benchmark.kinds.cooperativity import Cooperativity
    from eval.benchmark.matched.regulators import Regulator

    genes = list(model.vocabulary.genes)

    class Planted(Cooperativity):
        readings = ("excess", "other")

        @cached_property
        def regulators(self) -> list[Regulator]:
            return [
                Regulator("a+b", genes[:20], np.zeros((20, 3))),
                Regulator("a+c", genes[20:30], np.zeros((10, 3))),
            ]

        def contenders(self):
            return self.rows_of(())

        def deleted(self, model, twin_seed, drawn):
            truths = [self.regulators[i].is_target.astype(float) for i in drawn]
            sign = 1 if twin_seed is None else 0
            return [[sign * t for t in truths], [-sign * t for t in truths]]

    bench, _ = bench_in(tmp_path, data, model)
    contest = Planted(cooperativity(), SIZE.model_copy(update={"seeds": 4}), bench)
    draws = [draw for n in range(4) for draw in contest.folds(n)]
    assert [len(g) for g in draws[0].genes] == [16, 8]
    assert all((g[:8] + 10 == g[8:]).all() for g in (d.genes[0] for d in draws))
    found = {}
    for outcome in contest.run().outcomes:
        found.setdefault((outcome.contender, outcome.role), []).append(outcome.scores["auroc"])
    assert found["excess", "model"] == [1] * 4 and found["other", "model"] == [0] * 4
    assert found["excess", "twin"] == [0.5] * 4
    assert abs(np.mean(found["shuffled targets, excess", "control"]) - 0.5) < 0.1


def test_two_genes_deleted_together(data, model, tmp_path):
    import torch

    from eval.benchmark.material.in_silico import chosen_holders, engine_of, gene_effects

    bench, _ = bench_in(tmp_path, data, model)
    cells = [np.arange(2, 30), np.arange(29, 3, -1)]
    pair = np.array([[3, 5]])
    assert [c.tolist() for c in chosen_holders(cells, pair, None, 0)] == [[0]]
    moved = gene_effects(engine_of(model, None, bench), cells, pair, [np.array([0])])
    encoder = model.network.bert.eval()
    left = cells[0][~np.isin(cells[0], [3, 5])]
    with torch.inference_mode():
        before, after = (
            encoder(input_ids=torch.from_numpy(g)[None], output_hidden_states=True).hidden_states[1]
            for g in (cells[0], left)
        )
    for place, token in enumerate(left):
        at = int(np.flatnonzero(cells[0] == token)[0])
        cosine = torch.cosine_similarity(before[0, at], after[0, place], dim=0)
        assert moved[0, token] == pytest.approx(1 - float(cosine), abs=1e-5)
    assert np.isnan(moved[0, [3, 5]]).all()


def test_bad_input(data, model, tmp_path):
    from eval.benchmark.kinds.cooperativity import Cooperativity
    from eval.benchmark.kinds.simulated_shifts import SimulatedShifts
    from eval.benchmark.material.simulated_truth import read_truth

    bench, _ = bench_in(tmp_path, data, model)
    path = data / "simulated/shifts.parquet"
    with pytest.raises(ValueError, match="no cell elsewhere"):
        read_truth(path, EDITS, ["elsewhere"])
    with pytest.raises(ValueError, match="no gene was changed by each of inhibit"):
        read_truth(path, ("inhibit",), origins(data))
    pd.read_parquet(path).drop(columns="shift").to_parquet(tmp_path / "less.parquet")
    with pytest.raises(ValueError, match="no column shift"):
        read_truth(tmp_path / "less.parquet", EDITS, origins(data))
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(ValueError, match="cannot be read as a table"):
        read_truth(tmp_path / "text.parquet", EDITS, origins(data))
    with pytest.raises(ValueError, match="0 regulators are in 1000 of the cells"):
        SimulatedShifts(shifts(min_cells=1000), SIZE, bench).run()
    with pytest.raises(ValueError, match="no cell has 'type0' in 'donor'"):
        SimulatedShifts(shifts(label="donor"), SIZE, bench).run()
    with pytest.raises(ValueError, match="no two regulators share 100 targets"):
        Cooperativity(cooperativity(min_targets=100), SIZE, bench).run()
    with pytest.raises(ValueError, match="nobody of `pairs` has no target"):
        Cooperativity(cooperativity(pairs=(("nobody", "nobody"),)), SIZE, bench).run()
