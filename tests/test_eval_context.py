"""Context specificity: planted in some genes it is found, the null is even, by-hand values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from data_prep.genes.vocabulary import Vocabulary
from eval.benchmark.outcome import TaskRun
from eval.benchmark.task_file import Cells, ContextTask, GeneList, Size, read_task
from eval.cells.read_cells import encode_file
from tests.contests import num_units
from tests.matched_worlds import (
    MODEL,
    bench_of,
    is_listed,
    passing_model,
    score_of,
    write_world,
)
from tests.synthetic import make_cells

if TYPE_CHECKING:
    from transformers import BertForMaskedLM

    from eval.benchmark.material.models_and_cells import Bench

SIZE = Size(seeds=3)
TASK = ContextTask(
    name="specific", title="Specific", kind="context", label="cell_type", donor="donor", sizes={},
    positive=GeneList(name="listed", file="genes.tsv", keep={"listed": ("yes",)}),
    negative=GeneList(name="others", file="genes.tsv", keep={"listed": ("no",)}),
    cells=Cells(files=("cells.h5ad",), recipe="made by the tests"),
)  # fmt: skip


def sensitive_model(vocabulary: Vocabulary) -> BertForMaskedLM:
    """Return a model in which only listed genes' states turn with their rank in the cell."""
    import torch

    network = passing_model(vocabulary)
    rng = np.random.default_rng(0)
    words = rng.normal(size=(vocabulary.num_tokens, 16)) * 20
    words[vocabulary.first_gene_token :][is_listed(vocabulary)] = 0
    angle = np.linspace(0, np.pi, vocabulary.max_length)
    positions = np.zeros((len(angle), 16))
    positions[:, 0], positions[:, 1] = np.cos(angle), np.sin(angle)
    with torch.no_grad():
        tables = network.bert.embeddings
        tables.word_embeddings.weight.copy_(torch.from_numpy(words))
        tables.position_embeddings.weight.copy_(torch.from_numpy(positions))
    return network


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Vocabulary]:
    folder = tmp_path_factory.mktemp("world")
    return folder, write_world(folder)


@pytest.fixture(scope="module")
def found(world) -> tuple[TaskRun, Bench]:
    from eval.benchmark.kinds.context import Context

    folder, vocabulary = world
    bench = bench_of(
        folder, vocabulary, sensitive=sensitive_model(vocabulary), zeros=passing_model(vocabulary)
    )
    return Context(TASK, SIZE, bench).run(), bench


def test_planted_specificity_is_found_and_a_constant_model_is_at_chance(found):
    from eval.benchmark.contest.verdicts import main_contender
    from eval.benchmark.kinds.context import Context

    result, bench = found
    # Some listed genes have the same rank in all types: they are spread, but not by type.
    assert score_of(result, "zero-shot", "model", "sensitive") > 0.7
    assert score_of(result, "spread over all cells", "model", "sensitive") > 0.95
    for contender in ("zero-shot", "spread over all cells"):
        assert score_of(result, contender, "model", "zeros") == 0.5
    assert score_of(result, "zero-shot", "model", "sensitive", "significant_listed") > 0.3
    assert score_of(result, "zero-shot", "model", "zeros", "significant_listed") == 0
    for name in ("mean rank", "mean expression", "detection rate"):
        assert abs(score_of(result, f"{name} alone", "baseline", None) - 0.5) < 0.1, name
    for name in ("expression", "rank"):
        spread = score_of(result, f"spread of {name} over types", "baseline", None)
        assert abs(spread - 0.5) < 0.3, "labels were drawn apart from the counts"
    assert main_contender(result) == "zero-shot"
    assert len(result.outcomes) == num_units(Context, TASK, SIZE, bench.models)


def test_controls_are_at_chance(found):
    from eval.benchmark.contest.verdicts import verdicts

    result, _ = found
    controls = [v for v in verdicts(result, ["sensitive", "zeros"]) if v["question"] == "control"]
    assert {v["contender"] for v in controls} == {"shuffled labels, zero-shot"}
    assert all(abs(v["difference"]) < 0.05 for v in controls)
    null = score_of(result, "zero-shot", "model", "sensitive", "auroc_shuffled_types")
    assert abs(null - 0.5) < 0.1
    assert score_of(result, "zero-shot", "model", "zeros", "auroc_shuffled_types") == 0.5


def test_what_is_known_of_each_gene_is_kept(found):
    result, _ = found
    genes = result.details["genes"]["zero-shot, sensitive"]
    assert result.details["pairs"] * 2 >= len(genes) > result.details["pairs"]
    specificity = {
        y: [g["specificity"] for g in genes.values() if g["listed"] == y] for y in (0, 1)
    }
    assert np.median(specificity[1]) > 10 * np.median(specificity[0])
    assert all(0 < g["p"] <= g["q"] <= 1 and g["cells"] >= 6 for g in genes.values())
    assert result.excluded["listed: not in the vocabulary"] == 1


def plain_difference(states, types, donors) -> float:
    """Mean distance of all pairs of cells of a donor, between types and within, by loops."""
    found = []
    for donor in np.unique(donors):
        cells = np.flatnonzero(donors == donor)
        kinds = [t for t in np.unique(types[cells]) if (types[cells] == t).sum() > 1]
        pairs = {(a, b): [] for a in kinds for b in kinds if a <= b}
        for number, i in enumerate(cells):
            for j in cells[number + 1 :]:
                key = tuple(sorted((types[i], types[j])))
                if key in pairs:
                    pairs[key].append(1 - states[i] @ states[j])
        if len(kinds) > 1:
            between = [np.mean(v) for (a, b), v in pairs.items() if a != b]
            within = [np.mean(v) for (a, b), v in pairs.items() if a == b]
            found.append(np.mean(between) - np.mean(within))
    return float(np.mean(found))


def test_specificity_equals_a_plain_loop():
    from eval.cells.specificity import between_minus_within, permuted_types, spread_of_states

    rng = np.random.default_rng(0)
    states = rng.normal(size=(40, 5))
    states /= np.linalg.norm(states, axis=1, keepdims=True)
    types, donors = rng.integers(0, 4, 40), rng.integers(0, 3, 40)
    labellings = permuted_types(types, donors, 5, rng)
    got = between_minus_within(states, labellings, donors)
    assert got.shape == (6,)
    for value, labelling in zip(got, labellings, strict=True):
        assert value == pytest.approx(plain_difference(states, labelling, donors))
        for donor in range(3):
            shuffled, own = labelling[donors == donor], types[donors == donor]
            assert sorted(shuffled) == sorted(own), "types stay within their donor"
    one_donor = np.zeros(40, dtype=np.int64)
    distances = [1 - states[i] @ states[j] for i in range(40) for j in range(i)]
    assert spread_of_states(states, one_donor) == pytest.approx(np.mean(distances))
    alone = between_minus_within(states, np.zeros((1, 40), dtype=np.int64), donors)
    assert np.isnan(alone).all(), "one type"


def test_the_difference_is_even_around_zero_where_types_do_not_matter():
    from eval.cells.specificity import between_minus_within

    rng = np.random.default_rng(1)
    found = []
    for _ in range(300):
        states = rng.normal(size=(7, 4)) + 1
        states /= np.linalg.norm(states, axis=1, keepdims=True)
        found.append(between_minus_within(states, np.array([[0, 0, 1, 1, 1, 1, 1]]), np.zeros(7)))
    assert abs(np.mean(found)) < 3 * np.std(found) / 300**0.5


@pytest.mark.parametrize("token_budget", [1, 500, 100_000])
def test_states_are_those_of_the_cell_alone(world, token_budget):
    import torch

    from eval.cells.specificity import gene_states
    from pretrain.model.masked_gene_model import build_model

    folder, vocabulary = world
    encoder = build_model(MODEL, vocabulary, 1).bert.bert.eval()
    cells = encode_file(folder / "cells.h5ad", vocabulary).tokens[:8]
    genes = np.array([12, 5, 40])
    found = gene_states(cells, encoder, vocabulary, genes, layer=0, token_budget=token_budget)
    for number, gene in enumerate(genes):
        inside, states = found.of(number)
        assert inside.tolist() == [i for i, c in enumerate(cells) if gene in c]
        for cell, state in zip(inside, states, strict=True):
            ids = torch.from_numpy(cells[cell].astype(np.int64))[None]
            with torch.no_grad():
                hidden = encoder(input_ids=ids).last_hidden_state[0].numpy()
            expected = hidden[cells[cell].tolist().index(gene)]
            np.testing.assert_allclose(state, expected / np.linalg.norm(expected), atol=1e-5)


def test_bad_input_is_named(world, tmp_path):
    from eval.benchmark.kinds.context import Context

    folder, vocabulary = world
    bench = bench_of(folder, vocabulary, zeros=passing_model(vocabulary))
    absent = TASK.model_copy(
        update={"positive": GeneList(name="few", file="genes.tsv", keep={"listed": ("maybe",)})}
    )
    with pytest.raises(ValueError, match="no gene with"):
        Context(absent, SIZE, bench).run()
    (folder / "two.txt").write_text("\n".join(vocabulary.genes[:2]))
    few = TASK.model_copy(update={"positive": GeneList(name="few", file="two.txt")})
    with pytest.raises(ValueError, match="pairs of 'few' and genes expressed alike; 10 are needed"):
        Context(few, SIZE, bench).run()
    cells = make_cells(60, 160)
    cells.obs["cell_type"] = "one"
    cells.write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "genes.tsv").write_text((folder / "genes.tsv").read_text())
    with pytest.raises(ValueError, match="fewer than two classes"):
        Context(TASK, SIZE, bench_of(tmp_path, vocabulary, zeros=passing_model(vocabulary))).run()


def test_a_list_beside_the_task_is_found(tmp_path):
    (tmp_path / "mine.txt").write_text("ENSG1\n")
    path = tmp_path / "own.yaml"
    path.write_text(
        "title: Own\nkind: context\nlabel: cell_type\npositive: {name: mine, file: mine.txt}\n"
        "cells: {files: [cells.h5ad], recipe: none is needed}\nsizes: {standard: {seeds: 3}}\n"
    )
    task = read_task(path)
    assert isinstance(task, ContextTask)
    assert task.positive.file == str(tmp_path / "mine.txt")
    assert task.files == ("cells.h5ad",)
