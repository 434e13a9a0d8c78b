"""``geneloom perturb``: kill and resume, several ranks, the Python API, wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from data_prep.prepare.medians import gene_medians
from data_prep.prepare.run import SERIAL
from data_prep.running.owner import owned
from data_prep.sources.source_spec import SourceOptions, source_at
from eval.cells.read_cells import encode_file
from eval.perturb.cli import perturb_command
from eval.perturb.screen.cells_and_genes import CellChoice, GeneChoice, States
from eval.perturb.screen.edits import Edit
from eval.perturb.screen.results import Results
from eval.perturb.screen.settings import EngineSettings, ModelChoice, Screen
from pretrain.settings.model_settings import ModelConfig
from tests.ranks import kill, run_ranks, start_rank
from tests.synthetic import make_cells

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, num_heads=2, intermediate_size=64,
    hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a model of random weights, and cells of ids and symbols beside it."""
    from pretrain.model.masked_gene_model import build_model

    folder = tmp_path_factory.mktemp("model")
    cells = make_cells(24, num_genes=60)
    cells.obs["state"] = np.where(np.arange(24) < 12, "sick", "well")
    cells.write_h5ad(folder / "cells.h5ad")
    specs = [source_at(folder / "cells.h5ad", SourceOptions())]
    found = gene_medians(specs, folder, SERIAL, lambda what, done, total: None)
    vocabulary = found.vocabulary(1, 64, with_cls=False)
    build_model(MODEL, vocabulary, 0).bert.save_pretrained(folder)
    vocabulary.save(folder / "vocabulary.json")
    return folder


def screen(**changes) -> Screen:
    edit = Edit(changes.pop("kind", "delete"))
    choice = CellChoice({}, changes.pop("states", None), "donor", ("cell_type",))
    genes = changes.pop("genes", GeneChoice())
    return Screen(edit, genes, choice, EngineSettings(), **changes)


TOWARD = States("state", "sick", "well")


def by_command(model: Path, *words: str) -> str:
    """Return what the command says; raise as it does."""
    app = typer.Typer()
    app.command()(perturb_command)
    arguments = [str(model / "cells.h5ad"), "--model", str(model), "--device", "cpu", *words]
    result = CliRunner().invoke(app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def in_small_parts(model: Path, out: Path, slowly: bool) -> None:
    """Compute a screen in parts of a few cells; runs in a process of its own."""
    from eval.perturb.screen import run
    from eval.perturb.screen.run import perturb_file
    from pretrain.ranks import dist

    run._PART_COPIES = 100
    compute = run._shifts_table
    if slowly:
        run._shifts_table = lambda *a: (time.sleep(0.3), compute(*a))[1]
    ranks = dist.start(60, threads=None)
    chosen = screen(states=TOWARD, gene_shifts=True)
    perturb_file(model / "cells.h5ad", out, chosen, ModelChoice(model), ranks=ranks)
    dist.leave()


def files_of(folder: Path) -> dict[str, bytes]:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["environment"]
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.parquet")}
    return found | {"manifest": json.dumps(manifest).encode()}


def test_kill_and_ranks_change_no_byte(model, tmp_path):
    from eval.perturb.screen.run import perturb_file

    run_ranks(1, in_small_parts, model, tmp_path / "whole", False)
    whole = files_of(tmp_path / "whole")
    assert sum(n.startswith("shifts") for n in whole) > 3
    assert sum(n.startswith("gene_shifts") for n in whole) > 3

    out = tmp_path / "killed"
    process = start_rank(in_small_parts, model, out, True)
    deadline = time.monotonic() + 60
    while not (out / "shifts" / "part-00001.parquet").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    kill(process)
    with pytest.raises(ValueError, match="is not finished"):
        Results.open(out)
    with pytest.raises(ValueError, match="another screen .kind: delete there, inhibit here"):
        perturb_file(model / "cells.h5ad", out, screen(kind="inhibit"), ModelChoice(model))
    before = (out / "shifts" / "part-00000.parquet").stat().st_mtime_ns
    run_ranks(1, in_small_parts, model, out, False)
    assert files_of(out) == whole
    assert (out / "shifts" / "part-00000.parquet").stat().st_mtime_ns == before, "kept"

    run_ranks(2, in_small_parts, model, tmp_path / "two", False)
    assert files_of(tmp_path / "two") == whole


def test_what_a_command_writes(model, tmp_path):
    import anndata

    from eval.cells.embed import embed_cells
    from eval.perturb.screen.compare_copies import centroid
    from pretrain.export.model_folder import load_exported

    said = by_command(
        model, "--out", str(tmp_path / "s"), "--donor", "donor", "--column", "cell_type",
        "--state-key", "state", "--start", "sick", "--goal", "well", "--genes", "G3,G7,G9",
        "--pairs", "--anchor", "G0", "--cells", "cell_type=type1",
    )  # fmt: skip
    assert "7 perturbations (delete) of 4 cells" in said
    results = Results.open(tmp_path / "s")
    _, vocabulary = load_exported(model)
    names = results.perturbations["name"].tolist()
    assert names == ["G0", "G3", "G7", "G9", "G0+G3+G7", "G0+G3+G9", "G0+G7+G9"]
    ids = anndata.read_h5ad(model / "cells.h5ad").var_names
    assert results.perturbations["genes"].iloc[5].tolist() == [ids[0], ids[3], ids[9]]
    cells = encode_file(
        model / "cells.h5ad", vocabulary, SourceOptions(columns=("cell_type", "state", "donor"))
    )
    about = cells.metadata
    rows = np.flatnonzero((about["cell_type"] == "type1") & (about["state"] == "sick"))
    assert results.cells["cell_id"].tolist() == about.index[rows].tolist()
    assert results.cells["tokens"].tolist() == cells.lengths[rows].tolist()
    assert results.cells["donor"].tolist() == about["donor"].iloc[rows].tolist()
    tokens = vocabulary.tokens_of([ids[i] for i in (0, 3, 9)])
    held = [set(tokens) <= set(cells.tokens[i]) for i in rows]
    assert results.perturbations["cells"].iloc[5] == sum(held)
    assert results.perturbations["detection"].iloc[5] == pytest.approx(np.mean(held))
    places = [np.flatnonzero(cells.tokens[i] == tokens[0]) for i in rows]
    mean_rank = np.concatenate(places).mean()
    assert results.perturbations["mean_rank"].iloc[0] == pytest.approx(mean_rank)
    every = pd.concat(results.shifts())
    assert (every.groupby("perturbation").size() == results.perturbations["cells"]).all()
    network, _ = load_exported(model)
    well = (about["state"] == "well") & (about["cell_type"] == "type1")
    goal = centroid(
        embed_cells([cells.tokens[i] for i in np.flatnonzero(well)], network.bert, vocabulary),
        about["donor"][well].to_numpy(),
    )
    states = pd.read_parquet(tmp_path / "s" / "states.parquet").set_index("state")
    np.testing.assert_allclose(states.loc["well", "centroid"], goal, atol=1e-6)
    assert "complete already" in by_command(
        model, "--out", str(tmp_path / "s"), "--donor", "donor", "--column", "cell_type",
        "--state-key", "state", "--start", "sick", "--goal", "well", "--genes", "G3,G7,G9",
        "--pairs", "--anchor", "G0", "--cells", "cell_type=type1",
    )  # fmt: skip


def test_group_takes_the_genes_that_a_cell_holds(model, tmp_path):
    import anndata

    by_command(model, "--out", str(tmp_path / "s"), "--genes", "G1,G2,G3,G4", "--group")
    results = Results.open(tmp_path / "s")
    assert results.perturbations["name"].tolist() == ["G1+G2+G3+G4"]
    held = (anndata.read_h5ad(model / "cells.h5ad").X[:, 1:5] > 0).toarray()
    assert results.perturbations["cells"].iloc[0] == held.any(axis=1).sum()
    assert results.perturbations["detection"].iloc[0] == pytest.approx(held.all(axis=1).mean())


def test_inserted_genes_and_all_detected_ones(model, tmp_path):
    from eval.perturb.screen.run import perturb_file

    listed = screen(kind="overexpress", genes=GeneChoice(("G1", "G2")))
    perturb_file(model / "cells.h5ad", tmp_path / "list", listed, ModelChoice(model))
    assert Results.open(tmp_path / "list").perturbations["cells"].tolist() == [24, 24]
    perturb_file(
        model / "cells.h5ad", tmp_path / "all", screen(kind="overexpress"), ModelChoice(model)
    )
    every = Results.open(tmp_path / "all").perturbations
    assert every["cells"].tolist() == (every["detection"] * 24).round().tolist()
    assert len(every) == 60


def test_screen_computes_the_top_of_an_estimate(model, tmp_path, caplog, monkeypatch):
    from eval.perturb.screen import run
    from eval.perturb.screen.run import perturb_file

    monkeypatch.setattr(run, "_PART_COPIES", 100)
    caplog.set_level("INFO", logger="eval")
    own = ModelChoice(model)
    perturb_file(model / "cells.h5ad", tmp_path / "top", screen(states=TOWARD, top=8), own)
    perturb_file(model / "cells.h5ad", tmp_path / "all", screen(states=TOWARD), own)
    top, every = Results.open(tmp_path / "top"), Results.open(tmp_path / "all")
    assert top.manifest["parts"] == 1 and every.manifest["parts"] > 1
    assert len(top.perturbations) == 8 and "Spearman" in caplog.text
    assert -1 <= top.manifest["screen_agreement"]["spearman"] <= 1
    estimates = pd.read_parquet(tmp_path / "top" / "screen.parquet")
    assert set(top.perturbations["name"]) == set(estimates["name"][:8])
    both = pd.concat(top.shifts()).merge(top.perturbations[["perturbation", "name"]])
    exact = pd.concat(every.shifts()).merge(every.perturbations[["perturbation", "name"]])
    merged = both.merge(exact, on=["cell", "name"], validate="one_to_one")
    assert len(merged) == len(both)
    np.testing.assert_allclose(merged["toward_well_x"], merged["toward_well_y"], atol=1e-6)


def test_a_head_gives_changes_of_probability(model, tmp_path):
    import anndata

    from eval import api
    from eval.finetune.classifier import FinetuneSettings, Head, Target, save_classifier
    from eval.finetune.training import finetune
    from eval.perturb.screen.run import perturb_file
    from pretrain.export.model_folder import load_exported

    network, vocabulary = load_exported(model)
    cells = encode_file(model / "cells.h5ad", vocabulary, SourceOptions(columns=("state",)))
    labels = (cells.metadata["state"] == "well").to_numpy().astype(int)
    target = Target(Head("state", "cells", ("sick", "well")), labels)
    settings = FinetuneSettings(epochs=2, learning_rate=5e-3)
    trained = finetune(network.bert, vocabulary, cells.tokens, [target], settings, 0)
    save_classifier(trained, tmp_path / "head", {})
    own = ModelChoice(head=tmp_path / "head")
    table = api.perturb(
        anndata.read_h5ad(model / "cells.h5ad"), own, Screen(genes=GeneChoice(("G1",)))
    )
    expected = trained.predict_cells(cells.tokens, "state")
    found = api.predict(model / "cells.h5ad", tmp_path / "head").obsm["geneloom_state"]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    token = vocabulary.token_of[anndata.read_h5ad(model / "cells.h5ad").var_names[1]]
    held = [i for i in range(24) if token in cells.tokens[i]]
    without = [cells.tokens[i][cells.tokens[i] != token] for i in held]
    change = trained.predict_cells(without, "state") - expected[held]
    assert table["cell_id"].tolist() == cells.metadata.index[held].tolist()
    np.testing.assert_allclose(table["class_well"], change[:, 1], atol=1e-5)
    perturb_file(model / "cells.h5ad", tmp_path / "s", screen(top=3), own)
    assert len(Results.open(tmp_path / "s").perturbations) == 3


def test_notebooks_get_tables(model):
    import anndata

    from eval import api

    cells = anndata.read_h5ad(model / "cells.h5ad")
    embedded = api.embed(cells, model)
    assert embedded.obsm["X_geneloom"].shape == (24, 32) and "X_geneloom" not in cells.obsm
    heads = api.attention(model / "cells.h5ad", model, api.AttentionOptions(group="donor"))
    assert set(heads["group"]) == set(cells.obs["donor"]) and set(heads["layer"]) == {1, 2}
    asked = Screen(
        Edit("activate", to_quantile=0.0), GeneChoice(("G5",)), CellChoice({}, TOWARD, "donor")
    )
    table = api.perturb(cells, model, asked)
    columns = ["cell_id", "donor", "name", "kind", "changed", "shift", "toward_sick", "toward_well"]
    assert list(table) == columns
    assert set(table["name"]) == {"G5"} and set(table["donor"]) <= set(cells.obs["donor"])


@pytest.mark.parametrize("words, message", [
    (["--genes", "NOPE,G1"], "not in the model's vocabulary: NOPE .1 of them"),
    (["--genes", "GONE"], "none of the 24 cells holds: GONE"),
    (["--kind", "shrink"], "--kind shrink"),
    (["--group"], "--group: is one set of the genes named"),
    (["--genes", "G1", "--pairs"], "there are only 1 genes"),
    (["--genes", "G1,G2", "--pairs", "--set-size", "3"], "give one of them"),
    (["--genes", "@missing.txt"], "cannot be read"),
    (["--genes", " , "], "names no gene"),
    (["--cells", "cell_type"], "must be KEY=VALUE"),
    (["--cells", "cell_type=type9"], "no such cell; 'cell_type' holds type0 .8 cells"),
    (["--cells", "colour=red"], r"obs has no column \['colour'\]"),
    (["--donor", "patient"], r"obs has no column \['patient'\]"),
    (["--start", "sick"], "--state-key COLUMN, --start A and --goal B go together"),
    (["--state-key", "state", "--start", "sick", "--goal", "cured"], "state=cured: has no cells"),
    (["--state-key", "state", "--start", "sick", "--goal", "sick"], "name one state twice"),
    (["--state-key", "phase", "--start", "a", "--goal", "b"], r"no column \['phase'\]"),
    (["--screen", "5"], "--screen: orders genes by a goal"),
    (["--screen", "5", "--kind", "inhibit"], "--screen: estimates deletions"),
    (["--screen", "5", "--state-key", "state", "--start", "sick", "--goal", "well",
      "--score", "geneformer"], "estimates --score mean_state, not geneformer"),
    (["--score", "cosine"], "--score cosine: must be one of mean_state, geneformer"),
    (["--layer", "-2"], "--layer -2"),
    (["--pooling", "cls"], "no <cls> token"),
    (["--head", "somewhere"], "one of them"),
])  # fmt: skip
def test_wrong_input_writes_nothing(model, tmp_path, words, message):
    import anndata

    cells = anndata.read_h5ad(model / "cells.h5ad")
    cells.var["symbol"] = [*cells.var["symbol"].to_list()[:-1], "GONE"]
    matrix = cells.X.tolil()
    matrix[:, -1] = 0
    cells.X = matrix.tocsr()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    copied = [str(tmp_path / "cells.h5ad"), "--model", str(model), "--out", str(tmp_path / "s")]
    app = typer.Typer()
    app.command()(perturb_command)
    error = CliRunner().invoke(app, [*copied, "--device", "cpu", *words]).exception
    assert isinstance(error, ValueError)
    with pytest.raises(ValueError, match=message):
        raise error
    assert not (tmp_path / "s").exists()


def test_a_group_that_leaves_no_gene(model, tmp_path):
    every = ",".join(f"G{i}" for i in range(60))
    toward = ("--state-key", "state", "--start", "sick", "--goal", "well")
    with pytest.raises(ValueError, match="no perturbation applies"):
        by_command(model, "--out", str(tmp_path / "s"), "--genes", every, "--group", *toward)
    assert not (tmp_path / "s").exists()


def test_the_score_is_recorded_and_no_screen_mixes_two(model, tmp_path):
    from eval.perturb.effects.analysis import AnalysisSettings, analyse

    words = ("--genes", "G1,G2", "--donor", "donor", "--kind", "delete")
    by_command(model, "--out", str(tmp_path / "g"), *words, "--score", "geneformer")
    by_command(model, "--out", str(tmp_path / "m"), *words)
    one, two = (Results.open(tmp_path / n) for n in ("g", "m"))
    assert [r.manifest["settings"]["score"] for r in (one, two)] == ["geneformer", "mean_state"]
    shifts = [next(r.shifts())["shift"].to_numpy() for r in (one, two)]
    assert (shifts[0] != shifts[1]).all() and np.isfinite(shifts).all()
    with pytest.raises(ValueError, match="score: geneformer there, mean_state here"):
        by_command(model, "--out", str(tmp_path / "g"), *words)
    with pytest.raises(ValueError, match=r"--also: .*--score mean_state, this screen geneformer"):
        analyse(one, AnalysisSettings(), two)


def test_two_jobs_on_one_folder(model, tmp_path):
    with (
        owned(tmp_path / "s", "perturb"),
        pytest.raises(ValueError, match="another run works in this folder"),
    ):
        by_command(model, "--out", str(tmp_path / "s"), "--genes", "G1")


@pytest.mark.slow
def test_two_ranks_by_the_launcher(model, tmp_path):
    """The launcher starts ranks that share one screen; starting them takes some 20 s."""
    words = [str(model / "cells.h5ad"), "--model", str(model), "--genes", "G1,G2", "--pairs"]
    done = subprocess.run(
        [sys.executable, "-c", "from launch.cli import main; main()", "launch", "local",
         "--ranks", "2", "--device", "cpu", "perturb", *words, "--out", str(tmp_path / "two")],
        cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("3 perturbations (delete) of 24 cells") == 1
    by_command(model, *words[3:], "--out", str(tmp_path / "one"))
    two, one = (pd.concat(Results.open(tmp_path / n).shifts()) for n in ("two", "one"))
    pd.testing.assert_frame_equal(two, one, atol=1e-6)
