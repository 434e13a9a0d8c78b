"""Simulated cells: the truth is what it says, and the cells follow from it."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from scipy.sparse.csgraph import shortest_path

from data_prep.genes.vocabulary import Vocabulary
from eval.cells.read_cells import encode_file
from eval.simulate.cells import BLOCK_CELLS, Simulation
from eval.simulate.changes import (
    DELETE,
    OVEREXPRESS,
    Perturbation,
    draw_changed,
    log_change,
    reached_genes,
    true_shifts,
)
from eval.simulate.network import Network
from eval.simulate.settings import make_settings
from tests.test_cli import geneloom, log_counts

SMALL = {"cells": 300, "genes": 200, "tfs": 12, "types": 3, "perturb_cells": 30}


@pytest.fixture(scope="module")
def world() -> Simulation:
    """A simulation of two blocks of cells."""
    return Simulation(make_settings(**SMALL | {"cells": 2 * BLOCK_CELLS}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated folder, made by the command."""
    where = tmp_path_factory.mktemp("simulated")
    done = geneloom(
        "simulate", "--out", "sim", "--cells", 300, "--genes", 200, "--tfs", 12, "--types", 3,
        "--perturb-cells", 30, cwd=where,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "300 cells x 200 genes" in done.stdout
    return where / "sim"


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def perturbation(world: Simulation, kind: str, tf: int) -> Perturbation:
    return Perturbation(kind, (int(world.network.tfs[tf]),), "one")


def test_same_seed_same_bytes(folder, tmp_path):
    from eval.simulate.write import simulate

    record = simulate(make_settings(**SMALL), tmp_path / "again")
    found = hashes(tmp_path / "again")
    assert found == hashes(folder)
    found.pop("simulation.json")
    assert found == record["files"] == json.loads((folder / "simulation.json").read_text())["files"]
    simulate(make_settings(**SMALL, seed=1), tmp_path / "other")
    other = hashes(tmp_path / "other")
    assert all(other[name] != found[name] for name in found)


def test_blocks_come_in_any_order(world):
    again = Simulation(world.settings)
    second, first = again.block(1), again.block(0)
    assert np.array_equal(first.counts, world.block(0).counts)
    assert np.array_equal(second.counts, world.block(1).counts)
    assert not np.array_equal(first.counts, second.counts)


def test_steady_state_of_a_chain_by_hand():
    # gene 0 activates gene 1, which represses gene 2; gene 3 stands alone
    weights = scipy.sparse.csr_array(np.array([[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0]]))
    chain = Network(np.array([0, 1]), weights)
    drives = np.array([[np.log(2.0), 0.0]])
    first = 2.0**2 / (1 + 2.0**2)  # Hill function of expression, exponent 2
    level = 2.0 * (first - 0.5)
    second = np.exp(2 * level) / (1 + np.exp(2 * level))
    assert chain.activities(drives) == pytest.approx(np.array([[first, second]]))
    change = chain.activities(drives, silenced=np.array([True, False])) - [[first, second]]
    lower = np.exp(-2.0) / (1 + np.exp(-2.0))
    assert change == pytest.approx(np.array([[-first, lower - second]]))
    expected = [[0.0, -2.0 * first, second - lower, 0.0]]
    assert chain.log_effect(change) == pytest.approx(np.array(expected))
    assert chain.distances.tolist() == [[0, 1, 2, 0], [0, 0, 1, 0]]


def test_network_has_no_cycles_and_its_paths_are_found(world):
    network, genes = world.network, world.settings.genes
    assert not np.tril(network.among_tfs).any()
    edges = scipy.sparse.lil_array((genes, genes))
    edges[network.tfs] = (network.weights.toarray() != 0).astype(float)
    steps = shortest_path(edges.tocsr(), unweighted=True)[network.tfs]
    steps[np.isinf(steps)] = 0
    assert np.array_equal(network.distances, steps)
    assert (network.distances > 1).any()


def test_few_regulators_have_many_targets():
    targets = np.diff(Simulation(make_settings(cells=1)).network.weights.indptr)
    assert targets.max() > 5 * np.median(targets)
    assert targets.sum() / 1000 == pytest.approx(3, abs=0.5)


def test_total_weight_is_the_derivative_at_half_activity(world):
    network = world.network
    still = np.zeros((1, world.settings.tfs))
    small = 1e-5
    for tf in range(world.settings.tfs):
        boost = np.zeros(world.settings.tfs)
        boost[tf] = small
        change = network.activities(still, boosts=boost) - 0.5
        slope = network.log_effect(change)[0] / change[0, tf]
        assert slope == pytest.approx(network.total_weights[tf], abs=1e-3)


@pytest.mark.parametrize("kind", [DELETE, OVEREXPRESS])
def test_only_descendants_move_and_in_the_right_direction(world, kind):
    cells, network = world.block(0), world.network
    for tf in range(world.settings.tfs):
        one = perturbation(world, kind, tf)
        change = log_change(world, cells, one)
        own = network.tfs[tf]
        reached = set(np.flatnonzero(network.distances[tf])) | {own}
        assert set(np.flatnonzero((change != 0).any(axis=0))) == reached
        assert set(reached_genes(world, one)["gene"]) == reached
        own_change = -np.inf if kind == DELETE else np.log(world.settings.overexpression_fold)
        assert (change[:, own] == own_change).all()
        weight = network.weights.toarray()[tf]
        only = np.flatnonzero((weight != 0) & np.isclose(weight, network.total_weights[tf]))
        direction = -1 if kind == DELETE else 1
        assert (change[:, only] * direction * weight[only] > 0).all()
        counts = draw_changed(world, cells, one, change)
        others = np.setdiff1d(np.arange(world.settings.genes), list(reached))
        assert np.array_equal(counts[:, others], cells.counts[:, others])
        if kind == DELETE:
            assert not counts[:, own].any()
        elif weight.any():
            assert counts[:, own].sum() > cells.counts[:, own].sum()


def test_counts_are_gamma_poisson_at_their_expectation(world):
    cells = world.block(0)

    def z_scores(counts, expected, genes):
        counts, expected = counts[:, genes], expected[:, genes]
        variance = (expected + world.dispersion[genes] * expected**2).sum(axis=0)
        squares = ((counts - expected) ** 2).sum(axis=0)
        return (counts - expected).sum(axis=0) / np.sqrt(variance), squares / variance

    every = np.arange(world.settings.genes)
    for tf, kind in ((0, DELETE), (0, OVEREXPRESS), (1, DELETE), (2, OVEREXPRESS)):
        one = perturbation(world, kind, tf)
        change = log_change(world, cells, one)
        after = cells.expected * np.exp(change)
        moved = np.flatnonzero((after != cells.expected).any(axis=0) & (after > 0).all(axis=0))
        for counts, expected, genes in (
            (cells.counts, cells.expected, every),
            (draw_changed(world, cells, one, change), after, moved),
        ):
            shift, spread = z_scores(counts, expected, genes)
            assert np.abs(shift).max() < 5
            assert np.median(spread) == pytest.approx(1, abs=0.2)


def test_shifts_equal_a_plain_computation(world):
    cells = world.block(0)
    one = perturbation(world, DELETE, 0)
    change = log_change(world, cells, one)
    move, toward = true_shifts(world, cells, one, change)

    def state(log_expression, total):
        kept = np.delete(np.exp(log_expression) / total * 1e4, one.genes)
        return np.log1p(kept)

    def cosine(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    ends = [state(c, np.exp(c).sum()) for c in world.centroids()]
    for cell in range(0, BLOCK_CELLS, 50):
        total = np.exp(cells.state[cell]).sum()
        before = state(cells.state[cell], total)
        after = state(cells.state[cell] + change[cell], total)
        assert move[cell] == pytest.approx(1 - cosine(before, after), abs=1e-12)
        expected = [cosine(after, end) - cosine(before, end) for end in ends]
        assert toward[cell] == pytest.approx(expected, abs=1e-12)
    alone = next(g for g in range(world.settings.genes) if g not in world.network.tfs)
    nothing = Perturbation(DELETE, (alone,), "no TF")
    move, toward = true_shifts(world, cells, nothing, log_change(world, cells, nothing))
    assert not move.any() and not toward.any()


def test_cells_walk_from_type_to_type(world):
    cells = pd.concat([world.cells])
    states = np.concatenate([world.block(b).state for b in range(world.num_blocks)])
    ends = world.centroids()
    for branch in range(1, world.settings.types):
        axis = ends[branch] - ends[world.parents[branch]]
        here = (cells["branch"] == branch).to_numpy()
        place = (states[here] - ends[world.parents[branch]]) @ axis / (axis @ axis)
        assert np.corrcoef(place, cells["position"][here])[0, 1] > 0.7
    assert cells["pseudotime"].min() == 0


@pytest.mark.parametrize("column", ["donor", "batch"])
def test_donors_and_batches_leave_their_mark(column):
    settings = make_settings(cells=1500, genes=200, tfs=12, types=2, donors=3, batches=3)
    world = Simulation(settings)
    counts = np.concatenate([world.block(b).counts for b in range(world.num_blocks)])
    groups = world.cells[column].to_numpy()
    half = np.arange(len(counts)) % 2
    profiles = [
        np.log1p([counts[(groups == g) & (half == h)].sum(axis=0) for g in range(3)])
        for h in range(2)
    ]
    profiles = [p - p.mean(axis=1, keepdims=True) for p in profiles]
    first, second = (p - p.mean(axis=0) for p in profiles)
    assert (first @ second.T).argmax(axis=1).tolist() == [0, 1, 2]


def test_moments_resemble_blood(real_data, tmp_path):
    from eval.simulate.write import simulate

    settings = make_settings(cells=1500, donors=1, batches=1)
    pbmc = real_data / "pbmc3k" / "pbmc3k.h5ad"
    moments = simulate(settings, tmp_path / "sim", "none", compare=pbmc)["moments"]
    simulated, real = moments["simulated"], moments["real"]
    for name, factor in {
        "counts per cell, median": 1.25,
        "counts per cell, sd of ln": 1.2,
        "genes per cell, 5 %": 1.4,
        "genes per cell, median": 1.25,
        "genes per cell, 95 %": 1.25,
        "share of zeros": 1.2,
        "gene means, sd of ln": 1.3,
        "slope of ln variance on ln mean": 1.3,
        "dispersion, median": 2.5,
    }.items():
        assert 1 / factor < simulated[name] / real[name] < factor, name
    assert (tmp_path / "sim" / "comparison.png").stat().st_size > 10_000


def test_files_fit_each_other(folder):
    import anndata

    cells = anndata.read_h5ad(folder / "cells.h5ad")
    assert cells.shape == (300, 200) and scipy.sparse.isspmatrix_csr(cells.X)
    assert cells.X.dtype == np.int32 and cells.var_names[0] == "SIMG00001"
    assert (cells.obs["n_counts"] == np.asarray(cells.X.sum(axis=1)).ravel()).all()
    assert {"cell_type", "pseudotime", "donor", "batch"} <= set(cells.obs)
    changed = anndata.read_h5ad(folder / "perturbed.h5ad")
    controls = anndata.read_h5ad(folder / "controls.h5ad")
    tfs = set(cells.var_names[cells.var["is_tf"]])
    assert set(changed.obs["perturbation"]) == tfs and len(tfs) == 12
    assert changed.n_obs == 12 * 2 * 30 and changed.obs_names.is_unique
    assert (controls.X != cells[controls.obs_names].X).nnz == 0
    before = controls[changed.obs["origin"].astype(str).to_numpy()]
    assert (before.obs["donor"].to_numpy() == changed.obs["donor"].to_numpy()).all()
    after = before.layers["expected"] + changed.layers["expected_change"]
    assert after.min() > -1e-3
    for name, kind in (("delete", 0), ("overexpress", 1)):
        rows = (changed.obs["kind"] == name).to_numpy()
        own = cells.var_names.get_indexer(changed.obs["perturbation"][rows])
        values = np.asarray(changed.X[np.flatnonzero(rows), own]).ravel()
        assert bool(values.any()) == bool(kind)


def test_truth_tables_fit_each_other(folder):
    import anndata

    network = pd.read_parquet(folder / "network.parquet")
    effects = pd.read_parquet(folder / "effects.parquet")
    shifts = pd.read_parquet(folder / "shifts.parquet")
    assert set(network["sign"]) == {-1, 1}
    assert (network["weight"] != 0).equals(network["direct"])
    pairs = effects[effects["relation"] != "self"]
    for direct, relation in ((True, "direct"), (False, "indirect")):
        told = network[network["direct"] == direct]
        found = pairs[pairs["relation"] == relation]
        assert set(zip(told["tf"], told["target"], strict=True)) == set(
            zip(found["perturbation"], found["gene"], strict=True)
        )
    own = effects[(effects["relation"] == "self") & (effects["kind"] == "delete")]
    assert (own["log_fold_change"] == -np.inf).all() and not own["expected_after"].any()
    changed = anndata.read_h5ad(folder / "perturbed.h5ad")
    assert len(shifts) == changed.n_obs
    label = shifts["origin"] + ":" + shifts["kind"] + ":" + shifts["perturbation"]
    assert label.tolist() == changed.obs_names.tolist()
    assert {"toward_type0", "toward_type1", "toward_type2"} <= set(shifts)
    # What a perturbation leaves in the counts is what the table says, gene by gene.
    one = effects[effects["kind"] == "overexpress"].groupby(["perturbation", "gene"])
    told = one.apply(lambda t: np.average(t["expected_after"], weights=t["cells"]))
    rows = changed[(changed.obs["kind"] == "overexpress").to_numpy()]
    means = rows.to_df().groupby(rows.obs["perturbation"].to_numpy()).mean().stack()
    assert np.corrcoef(np.log1p(told), np.log1p(means[told.index]))[0, 1] > 0.95


def test_what_is_asked_for_changes_no_other_cell(folder, tmp_path):
    import anndata

    from eval.simulate.write import simulate

    all_of_them = anndata.read_h5ad(folder / "perturbed.h5ad")
    first, second = all_of_them.obs["perturbation"].cat.categories[[4, 7]]
    text = f"{second},{second}+{first},SIMG00001"
    simulate(make_settings(**SMALL), tmp_path / "few", text)
    few = anndata.read_h5ad(tmp_path / "few" / "perturbed.h5ad")
    assert set(few.obs["perturbation"]) == {second, f"{first}+{second}", "SIMG00001"}
    rows = few[few.obs["perturbation"] == second]
    assert (rows.X != all_of_them[rows.obs_names].X).nnz == 0
    effects = pd.read_parquet(tmp_path / "few" / "effects.parquet")
    both = effects[effects["perturbation"] == f"{first}+{second}"]
    assert set(both["gene"][both["relation"] == "self"]) == {first, second}
    assert hashes(tmp_path / "few")["cells.h5ad"] == hashes(folder)["cells.h5ad"]


def test_the_path_takes_simulated_cells(folder, tmp_path):
    done = geneloom("medians", folder / "cells.h5ad", "--out", "v.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = geneloom("check", folder / "cells.h5ad", "--vocab", "v.json", cwd=tmp_path)
    assert done.returncode == 0 and "no problem found" in done.stdout, done.stdout


def test_gene_ids_of_a_vocabulary(tmp_path):
    from eval.simulate.write import simulate

    genes = tuple(f"ENSG{i:011d}" for i in range(300))
    vocabulary = Vocabulary(genes, np.ones(300), {"<pad>": 0, "<mask>": 1}, 64)
    vocabulary.save(tmp_path / "vocabulary.json")
    simulate(make_settings(**SMALL), tmp_path / "sim", "none", tmp_path / "vocabulary.json")
    assert not (tmp_path / "sim" / "perturbed.h5ad").exists()
    encoded = encode_file(tmp_path / "sim" / "cells.h5ad", vocabulary)
    assert set(encoded.genes) < set(genes) and encoded.has_genes.all()


def test_memory_does_not_grow_with_the_cells(tmp_path):
    from eval.simulate.write import choose_ids, write_cells

    peaks = []
    for cells in (4 * BLOCK_CELLS, 16 * BLOCK_CELLS):
        world = Simulation(make_settings(cells=cells, genes=400, tfs=10))
        (tmp_path / str(cells)).mkdir()
        tracemalloc.start()
        write_cells(tmp_path / str(cells), world, choose_ids(world.settings, None))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # a fifth of what the smallest dense matrix of the added cells would take
    assert peaks[1] - peaks[0] < 12 * BLOCK_CELLS * 400 * 4 / 5, peaks


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tfs": 100, "genes": 50}, "there must be more genes than transcription factors"),
        ({"cells": 0}, "cells=0: Input should be greater than or equal to 1"),
        ({"depth": -1.0}, "depth=-1.0: Input should be greater than 0"),
        ({"cells": 0, "types": 0}, "cells=0.*types=0"),
        ({"donor_sdd": 1}, "known: cells, genes"),
        ({"donor_sd": float("nan")}, "donor_sd=nan"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        make_settings(**values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"perturb": "GATA1,all"}, "2 genes are not simulated"),
        ({"perturb": ""}, "1 genes are not simulated"),
        ({"perturb": "SIMG00001,SIMG00001"}, "stands twice"),
        ({"gene_ids": "few.txt"}, "3 gene ids for 200 genes"),
        ({"gene_ids": "twice.txt"}, "stands twice"),
        ({"gene_ids": "absent.txt"}, "not readable"),
        ({"compare": "absent.h5ad"}, "absent.h5ad"),
        ({"compare": "log.h5ad"}, "looks log-transformed"),
        ({"out": "full"}, "not an empty folder"),
    ],
)
def test_bad_input(arguments, message, tmp_path):
    from eval.simulate.write import simulate

    (tmp_path / "few.txt").write_text("a\nb\nc\n")
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    log_counts(tmp_path / "log.h5ad")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    paths = {k: v if k == "perturb" else tmp_path / v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        simulate(make_settings(**SMALL), **{"out": tmp_path / "sim"} | paths)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_bad_command(tmp_path):
    done = geneloom("simulate", "--out", "sim", "--cells", 0, "--set", "seed=x", cwd=tmp_path)
    assert done.returncode == 2
    assert "cells=0" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
