"""``geneloom probe``: scores are those of a plain computation, and bad input is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.runs import run_training, tiny_config
from tests.synthetic import make_cells, make_shards

SIZES = (5, 10)
# Of a run without its shards; an exported model has the cell state too.
NAMES = ["last layer", "last layer + input embeddings", "second-last layer"]


def _train(run: Path, shards: Path) -> None:
    run_training(tiny_config(shards, run))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of fake cells, a run of 10 steps with 2 checkpoints, its export, labelled cells."""
    from pretrain.export.model_folder import export

    folder = tmp_path_factory.mktemp("probe")
    shards = make_shards(folder)
    run_ranks(1, _train, folder / "run", shards)
    export(folder / "run", folder / "model")
    cells = make_cells(96, seed=1, detected=0.2)
    # The same genes are expressed by a type as in the training cells; noise makes it difficult.
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(str)
    cells.obs.loc[cells.obs_names[:7], "cell_type"] = "rare"
    cells.obs["one"] = "same"
    cells.obs["good"] = (np.arange(96) != 50).astype(int)
    (folder / "new").mkdir()
    cells.write_h5ad(folder / "new" / "cells.h5ad")
    return folder


def invoke(*arguments: Any):
    from typer.testing import CliRunner

    from launch.cli import build_app

    return CliRunner().invoke(build_app("probe"), ["probe", *map(str, arguments)])


def probe(folder: Path, model: str, *arguments: Any) -> dict[str, Any]:
    done = invoke(
        folder / model, folder / "new" / "cells.h5ad", "--label", "cell_type", "--seeds", "3",
        "--cells-a-class", "10,5", "--device", "cpu", "--json", *arguments,
    )  # fmt: skip
    assert done.exit_code == 0, done.exception
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    """The probe of the exported model."""
    return probe(folder, "model", "--cells", "good=1", "--out", folder / "out")


def scores(record: dict[str, Any], step: int | None = None) -> dict[tuple[str, int], list[float]]:
    """Return (contender, cells a class) -> macro-F1 of each draw."""
    return {
        (r["contender"], r["cells_a_class"]): r["draws"]
        for r in record["scores"]
        if step is None or r["step"] == step
    }


def test_a_notebook_gets_the_scores_of_the_command(folder: Path, record: dict[str, Any]):
    import anndata

    from eval.api import ProbeSettings, probe

    cells = anndata.read_h5ad(folder / "new" / "cells.h5ad")
    settings = ProbeSettings(keep={"good": "1"}, cells_a_class=(5, 10), seeds=3, device="cpu")
    found = probe(folder / "model", cells, "cell_type", settings)
    assert found.record["scores"] == record["scores"]
    assert len(found.verdicts) == len(record["verdicts"])


def test_every_score_is_that_of_a_plain_computation(folder: Path, record: dict[str, Any]):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from eval.cells.read_cells import encode_file
    from eval.probe.draws import Draws

    features, labels = plain_features(folder)
    found = scores(record)
    names = [*NAMES, "cell state"]
    assert {name for name, _ in found} == {
        *names, *(f"random weights, {n}" for n in names), "corpus SVD", "SVD of these cells",
        "corpus SVD, 80 components", "PCA of these cells", "genes",
    }  # fmt: skip
    assert len(encode_file(folder / "new" / "cells.h5ad", vocabulary_of(folder)).tokens) == 96
    for name, values in features.items():
        expected: dict[int, list[float]] = {size: [] for size in SIZES}
        for draw in Draws(labels, None, SIZES, 3):
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            model.fit(values[draw.train], labels[draw.train])
            guessed = model.predict(values[draw.test])
            score = f1_score(labels[draw.test], guessed, average="macro")
            expected[draw.cells_a_class].append(float(score))
        for size in SIZES:
            # A cell on the border may fall on either side: one of 80 is .013.
            np.testing.assert_allclose(found[name, size], expected[size], atol=0.02, err_msg=name)
    assert len({round(v, 3) for values in found.values() for v in values}) > 20, "all the same"


def vocabulary_of(folder: Path):
    from data_prep.genes.vocabulary import load_vocabulary

    return load_vocabulary(folder / "model" / "vocabulary.json")


def plain_features(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return features made with Hugging Face's and numpy's own functions, cell by cell."""
    import anndata
    import torch
    from safetensors.numpy import load_file
    from transformers import AutoModelForMaskedLM

    from eval.cells.read_cells import encode_file

    cells = anndata.read_h5ad(folder / "new" / "cells.h5ad")
    kept = np.flatnonzero(cells.obs["good"] == 1)
    found = encode_file(folder / "new" / "cells.h5ad", vocabulary_of(folder))
    model = AutoModelForMaskedLM.from_pretrained(folder / "model").eval()
    loadings = load_file(folder / "model" / "corpus_svd.safetensors")["components"]
    rows: dict[str, list[np.ndarray]] = {n: [] for n in [*NAMES, "corpus SVD", "weights"]}
    for cell in kept:
        tokens = found.tokens[cell].astype(np.int64)
        with torch.no_grad():
            states = model(torch.from_numpy(tokens)[None], output_hidden_states=True).hidden_states
        last, second = (states[i][0].mean(dim=0).numpy() for i in (-1, -2))
        inputs = model.get_input_embeddings().weight.detach().numpy()[tokens].mean(axis=0)
        weights = np.zeros(len(loadings))
        weights[tokens] = 1 - np.arange(len(tokens)) / len(tokens)
        values = (last, np.concatenate([last, inputs]), second, weights @ loadings, weights)
        for name, value in zip(rows, values, strict=True):
            rows[name].append(value)
    features = {name: np.stack(values) for name, values in rows.items()}
    weights = features.pop("weights")
    left, values, _ = np.linalg.svd(weights, full_matrices=False)
    features["SVD of these cells"] = left[:, :50] * values[:50]
    counts = cells.X[kept].toarray()  # pyright: ignore[reportOptionalSubscript]
    features["genes"] = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    centred = features["genes"] - features["genes"].mean(axis=0)
    features["PCA of these cells"] = centred @ np.linalg.svd(centred)[2][:50].T
    state = load_file(folder / "model" / "cell_state.safetensors")
    features["corpus SVD, 80 components"] = weights @ state["loadings"]
    learned = (features["last layer"] - state["centre"]) @ state["axes"]
    features["cell state"] = np.concatenate(
        [weights @ state["loadings"] / state["scales"][0], learned / state["scales"][1]], axis=1
    )
    return features, cells.obs["cell_type"].to_numpy(dtype=str)[kept]


def test_verdict_is_that_of_the_paired_draws(record: dict[str, Any]):
    from eval.probe.run import verdicts

    found = scores(record)
    for verdict in record["verdicts"]:
        size = verdict["cells_a_class"]
        pairs = np.array(found[verdict["contender"], size]) - found["corpus SVD", size]
        # Student's t of 2 degrees of freedom at 97.5 %.
        half = 4.302653 * pairs.std(ddof=1) / np.sqrt(3)
        assert verdict["difference"]["mean"] == pytest.approx(pairs.mean())
        assert verdict["difference"]["half_width"] == pytest.approx(half)
        excludes_zero = abs(pairs.mean()) > half
        side = "above" if pairs.mean() > 0 else "below"
        assert verdict["word"] == (side if excludes_zero else "not told apart from")
    rows = [
        {"contender": n, "role": r, "step": 3, "cells_a_class": 5, "draws": d}
        for n, r, d in (
            ("corpus SVD", "baseline", [0.5, 0.6, 0.7]), ("last layer", "model", [0.7, 0.8, 0.89]),
            ("x", "model", [0.4, 0.5, 0.61]), ("y", "model", [0.9, 0.2, 0.7]),
        )
    ]  # fmt: skip
    words = [v["word"] for v in verdicts(rows)]
    assert words == ["above", "below", "not told apart from"]


def test_what_was_left_out_is_named(record: dict[str, Any]):
    assert record["left_out"] == {"not good=1": 1}
    assert record["classes_left_out"] == {"5": {"rare": 7}, "10": {"rare": 7}}
    assert record["classes"]["5"] == ["type0", "type1", "type2"]
    assert record["cells"] == 95 and record["steps"] == [10]
    assert record["seen"] == ["cells"]  # a file of that name was pretrained on


def test_folder_holds_page_record_and_scores(folder: Path, record: dict[str, Any]):
    out = folder / "out"
    names = {p.name for p in out.iterdir()}
    assert names == {
        "probe.html", "probe.json", "probe.csv", "contenders.svg", "contenders.png"
    }  # fmt: skip
    assert json.loads((out / "probe.json").read_text()) == record
    page = (out / "probe.html").read_text()
    (main,) = [
        v for v in record["verdicts"]
        if (v["contender"], v["cells_a_class"]) == ("cell state", 5)
    ]  # fmt: skip
    assert f"Frozen cells are {main['word']} the corpus SVD with 5 labelled cells a class" in page
    assert "rare (7)" in page and "<svg" not in page and "data:image/svg+xml" in page


def test_checkpoints_of_a_run_are_a_curve_that_ends_at_the_export(
    folder: Path, record: dict[str, Any]
):
    out = folder / "curve.html"
    curve = probe(folder, "run", "--cells", "good=1", "--shards", folder / "shards", "--out", out)
    assert curve["steps"] == [5, 10]
    first, last = scores(curve, 5), scores(curve, 10)
    assert first.keys() == last.keys() == {(n, s) for n in [*NAMES, "cell state"] for s in SIZES}
    assert first != last
    for key, values in last.items():
        np.testing.assert_allclose(values, scores(record)[key], atol=0.02)
    assert "step 5" in out.read_text()


def test_without_a_corpus_svd_the_probe_says_how_to_get_one(folder: Path, tmp_path: Path):
    import shutil

    from data_prep.shards.reader import ShardSet
    from eval.probe.models import open_probed
    from eval.probe.run import find_svd

    shutil.copytree(folder / "model", folder / "old")
    (folder / "old" / "corpus_svd.safetensors").unlink()
    found = probe(folder, "old")
    assert found["corpus_svd"] is None and found["verdicts"] == []
    assert "--shards" in found["corpus_svd_missing"]
    old = open_probed(folder / "old", None)
    made, missing = find_svd(old, ShardSet(folder / "shards"))
    stored, _ = find_svd(open_probed(folder / "model", None), None)
    assert missing is None and made is not None and stored is not None
    np.testing.assert_array_equal(made.components, stored.components)
    other = make_shards(tmp_path, num_genes=90)
    done = invoke(
        folder / "old", folder / "new" / "cells.h5ad", "--label", "cell_type", "--shards", other,
        "--device", "cpu",
    )  # fmt: skip
    assert isinstance(done.exception, ValueError)
    assert vocabulary_of(folder).sha256[:12] in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--label", "missing"], "missing"),
        (["--label", "one"], "fewer than two classes"),
        (["--label", "cell_type", "--cells-a-class", "500"], "fewer than two classes have 500"),
        (["--label", "cell_type", "--cells-a-class", "ten"], "--cells-a-class ten"),
        (["--label", "cell_type", "--seeds", "1"], "--seeds 1"),
        (["--label", "cell_type", "--cells", "good"], "KEY=VALUE"),
        (["--label", "cell_type", "--cells", "good=7"], "no cell is left"),
        (["--label", "cell_type", "--random-models", "0"], "--random-models 0"),
    ],
)
def test_bad_input_is_told(folder: Path, arguments: list[str], said: str):
    done = invoke(folder / "model", folder / "new" / "cells.h5ad", *arguments, "--device", "cpu")
    assert isinstance(done.exception, ValueError) and said in str(done.exception)


def test_a_folder_without_a_model_or_a_file_that_exists_is_told(folder: Path, tmp_path: Path):
    cells = folder / "new" / "cells.h5ad"
    for model, out, said in (
        (tmp_path, tmp_path / "a.html", "config.json"),
        (folder / "model", cells.parent, "exists"),
    ):
        done = invoke(model, cells, "--label", "cell_type", "--out", out, "--device", "cpu")
        assert isinstance(done.exception, ValueError) and said in str(done.exception)


def test_draws_are_disjoint_and_donors_stay_whole():
    from eval.probe.draws import Draws

    labels = np.array(["a"] * 40 + ["b"] * 30 + ["c"] * 12)
    donors = np.array([f"d{i % 4}" for i in range(82)])
    for chosen in (None, donors):
        draws = Draws(labels, chosen, (3, 10), 4)
        assert draws.classes[3] == ["a", "b", "c"] or chosen is not None
        assert "c" not in draws.classes[10]
        seen = set()
        for draw in draws:
            assert not np.intersect1d(draw.train, draw.test).size
            counts = np.unique(labels[draw.train], return_counts=True)[1]
            assert (counts == draw.cells_a_class).all()
            seen.add(tuple(draw.train))
            if chosen is not None:
                assert not np.intersect1d(donors[draw.train], donors[draw.test]).size
            else:
                known = np.isin(labels, draws.classes[draw.cells_a_class])
                assert len(draw.train) + len(draw.test) == known.sum()
        assert len(seen) == 4 * len(draws.classes)


def test_wide_features_are_classified_as_scikit_learn_does():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    from eval.probe.classify import predict_classes

    rng = np.random.default_rng(0)
    labels = np.array(["a", "b", "c"])[np.arange(150) % 3]
    features = (rng.standard_normal((150, 300)) + 0.6 * (labels == "a")[:, None]).astype(np.float32)
    train, test = np.arange(30), np.arange(30, 150)
    scaler = StandardScaler().fit(features[train])
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(features[train]), labels[train])
    expected = model.predict(scaler.transform(features[test]))
    found = predict_classes(features, labels, train, test)
    assert (found == expected).mean() > 0.98
    assert 0.4 < (found == labels[test]).mean() < 1


@pytest.mark.parametrize(("number", "expected"), [(90, [15, 37, 38]), (500, [15, 60, 425])])
def test_drawing_cells_keeps_rare_classes_whole(number, expected):
    from eval.probe.run import _some_of_each

    labels = np.repeat(["rare", "some", "most"], [15, 60, 2000])
    rows = _some_of_each(np.arange(len(labels)) + 7, labels, number) - 7
    names, counts = np.unique(labels[rows], return_counts=True)
    found = dict(zip(names.tolist(), counts.tolist(), strict=True))
    assert found["rare"] == 15 and sum(found.values()) == number
    assert sorted(found.values()) == expected
    assert len(set(rows.tolist())) == number
