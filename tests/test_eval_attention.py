"""Attention summed over cells: equal to a plain loop, whatever the batches; and its task."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from data_prep.genes.vocabulary import Vocabulary
from eval.benchmark.outcome import TaskRun
from eval.benchmark.task_file import AttentionTask, Cells, GeneList, Size
from eval.cells.gene_lists import read_genes
from eval.cells.read_cells import encode_file
from pretrain.settings.model_settings import ModelConfig
from tests.contests import num_units
from tests.matched_worlds import bench_of, is_listed, passing_model, score_of, write_world
from tests.synthetic import write_cells
from tests.test_eval import vocabulary_of

if TYPE_CHECKING:
    from transformers import BertForMaskedLM

MODEL = ModelConfig(
    num_layers=2, hidden_size=16, num_heads=2, intermediate_size=32,
    hidden_dropout=0.1, attention_dropout=0.1,
)  # fmt: skip
TASK = AttentionTask(
    name="attended", title="Attended", kind="attention", donor="donor", sizes={},
    positive=GeneList(name="listed", file="genes.tsv", keep={"listed": ("yes",)}),
    cells=Cells(files=("cells.h5ad",), recipe="made by the tests"),
)  # fmt: skip


def plain_attention(cells, encoder, vocabulary: Vocabulary, genes, groups):
    """One cell at a time, all weights of all layers, pair by pair into dictionaries."""
    import torch

    received, pairs = defaultdict(list), defaultdict(list)
    encoder.set_attn_implementation("eager")
    first, wanted = vocabulary.first_gene_token, set(genes.tolist())
    with torch.no_grad():
        for cell, group in zip(cells, groups, strict=True):
            ids = torch.from_numpy(cell.astype(np.int64))[None]
            layers = encoder(input_ids=ids, output_attentions=True).attentions
            tokens = cell.tolist()
            for layer, weights in enumerate(layers):
                for head, matrix in enumerate(weights[0].double().numpy()):
                    for key, gene in enumerate(tokens):
                        if gene not in wanted:
                            continue
                        rows = [q for q, t in enumerate(tokens) if t >= first]
                        mean = np.mean([matrix[q, key] for q in rows]) * len(tokens)
                        received[group, layer, head, gene].append(mean)
                        for query in (q for q, t in enumerate(tokens) if t in wanted):
                            relative = matrix[query, key] * len(tokens)
                            pairs[layer, head, tokens[query], gene].append(relative)
    encoder.set_attn_implementation("sdpa")
    return received, pairs


def random_weights(vocabulary: Vocabulary) -> BertForMaskedLM:
    """Return a model whose attention is far from uniform."""
    import torch

    from pretrain.model.masked_gene_model import build_model

    network = build_model(MODEL, vocabulary, 0).bert.eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "query" in name or "key" in name:
                weight.mul_(20)
    return network


@pytest.mark.parametrize("has_cls", [False, True])
@pytest.mark.parametrize("token_budget", [1, 300, 10_000])
def test_sums_equal_a_plain_loop_in_any_batches(has_cls, token_budget, tmp_path):
    from eval.cells.attention import mean_attention

    path = write_cells(tmp_path / "cells.h5ad", num_cells=12, num_genes=40)
    vocabulary = vocabulary_of(path, has_cls)
    encoder = random_weights(vocabulary).bert
    cells = encode_file(path, vocabulary).tokens
    genes = vocabulary.first_gene_token + np.array([30, 2, 7, 11, 25])
    groups = np.arange(12) % 3
    found = mean_attention(
        cells, encoder, vocabulary, genes, groups, with_pairs=True, token_budget=token_budget
    )
    received, pairs = plain_attention(cells, encoder, vocabulary, genes, groups)
    assert found.received.shape == (3, 2, 2, 5)
    for (group, layer, head, gene), values in np.ndenumerate(found.received):
        expected = received.get((group, layer, head, genes[gene]), [])
        assert found.cells[group, gene] == len(expected)
        if expected:
            assert values == pytest.approx(np.mean(expected), rel=1e-4)
        else:
            assert np.isnan(values)
    assert found.pairs is not None and found.pair_cells is not None
    for (layer, head, query, key), value in np.ndenumerate(found.pairs):
        expected = pairs.get((layer, head, genes[query], genes[key]), [])
        assert found.pair_cells[query, key] == len(expected)
        if expected:
            assert value == pytest.approx(np.mean(expected), rel=1e-4)
    whole = mean_attention(cells, encoder, vocabulary, genes, token_budget=token_budget)
    np.testing.assert_allclose(found.over_groups(), whole.received[0], rtol=1e-9)


def test_uniform_attention_is_one_and_the_model_is_left_as_it_was(tmp_path):
    import torch

    from eval.cells.attention import mean_attention
    from pretrain.model.masked_gene_model import build_model

    path = write_cells(tmp_path / "cells.h5ad", num_cells=12, num_genes=40)
    vocabulary = vocabulary_of(path, True)
    encoder = build_model(MODEL, vocabulary, 0).bert.bert
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if "query" in name:
                weight.zero_()
    before = encoder.config._attn_implementation
    cells = encode_file(path, vocabulary).tokens
    genes = np.arange(vocabulary.first_gene_token, vocabulary.num_tokens)
    found = mean_attention(cells, encoder, vocabulary, genes)
    np.testing.assert_allclose(found.received[found.received == found.received], 1, rtol=1e-5)
    assert encoder.config._attn_implementation == before != "eager"
    assert not any(m._forward_hooks for m in encoder.modules())
    with pytest.raises(ValueError, match="none of the 1 genes is among the tokens"):
        mean_attention(cells[:1], encoder, vocabulary, np.setdiff1d(genes, cells[0])[:1])


def test_too_many_pairs_are_refused(tmp_path):
    from eval.cells.attention import mean_attention
    from pretrain.model.masked_gene_model import build_model

    path = write_cells(tmp_path / "cells.h5ad", num_cells=3, num_genes=40)
    vocabulary = vocabulary_of(path)
    encoder = build_model(MODEL, vocabulary, 0).bert.bert
    cells = encode_file(path, vocabulary).tokens
    many = np.resize(cells[0], 20_000)
    with pytest.raises(ValueError, match=r"20,000 genes: .* give 11,585 at most"):
        mean_attention(cells, encoder, vocabulary, many, with_pairs=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    path = write_cells(folder / "cells.h5ad", num_cells=12, num_genes=40)
    vocabulary = vocabulary_of(path)
    random_weights(vocabulary).save_pretrained(folder / "model")
    vocabulary.save(folder / "model" / "vocabulary.json")
    (folder / "few.txt").write_text(f"{vocabulary.genes[3]}  # one\n{vocabulary.genes[9]}\nENSG0\n")
    (folder / "unknown.txt").write_text("ENSG0\n")
    (folder / "empty.tsv").write_text("ensembl_id\tsymbol\n\tA\n")
    (folder / "wrong.csv").write_text("name,symbol\nENSG0,A\n")
    return {"folder": folder, "cells": path, "model": folder / "model"}


def test_tables_hold_what_was_summed(files, tmp_path):
    from transformers import BertForMaskedLM

    from eval.cells.attention import mean_attention
    from eval.cells.attention_tables import attention_file
    from eval.cells.settings import AttentionOptions

    sentence = attention_file(
        files["cells"], files["model"], tmp_path / "out",
        AttentionOptions(files["folder"] / "few.txt", "donor", pairs=True, token_budget=200),
    )  # fmt: skip
    assert "2 layers x 2 heads, 2 genes in 12 cells; 1 genes are not in the vocabulary" in sentence
    received = pd.read_parquet(tmp_path / "out" / "received.parquet")
    assert set(received["group"]) == {f"donor{i}" for i in range(4)}
    assert set(zip(received["layer"], received["head"], strict=True)) == {
        (1, 1), (1, 2), (2, 1), (2, 2)
    }  # fmt: skip
    vocabulary = vocabulary_of(files["cells"])
    cells = encode_file(files["cells"], vocabulary).tokens
    encoder = BertForMaskedLM.from_pretrained(files["model"]).bert.eval()
    tokens = vocabulary.tokens_of([vocabulary.genes[3], vocabulary.genes[9]])
    found = mean_attention(cells, encoder, vocabulary, tokens, with_pairs=True)
    rows = received[(received["layer"] == 2) & (received["head"] == 1)]
    mean = rows.groupby("gene")[["cells", "attention"]].apply(
        lambda r: (r["attention"] * r["cells"]).sum() / r["cells"].sum()
    )
    for place, gene in enumerate((vocabulary.genes[3], vocabulary.genes[9])):
        assert mean[gene] == pytest.approx(found.received[0, 1, 0, place], rel=1e-4)
    pairs = pd.read_parquet(tmp_path / "out" / "pairs.parquet")
    keys = ["layer", "head", "gene", "attended"]
    row = pairs.set_index(keys).loc[(1, 2, vocabulary.genes[9], vocabulary.genes[3])]
    assert found.pairs is not None
    assert row["attention"] == pytest.approx(found.pairs[0, 1, 1, 0], rel=1e-4)


def test_without_a_list_the_most_common_genes_are_taken(files, tmp_path):
    from eval.cells.attention_tables import attention_file

    attention_file(files["cells"], files["model"], tmp_path / "out")
    received = pd.read_parquet(tmp_path / "out" / "received.parquet")
    assert set(received["gene"]) == set(vocabulary_of(files["cells"]).genes)
    assert set(received["group"]) == {"all"}
    assert received["cells"][received["head"] == 1][: len(received) // 4].is_monotonic_decreasing
    assert not (tmp_path / "out" / "pairs.parquet").exists()


@pytest.mark.parametrize(
    ("genes", "message"),
    [
        ("unknown.txt", "none of 1 genes is in the vocabulary"),
        ("empty.tsv", "no gene; a list needs one"),
        ("wrong.csv", "needed are ensembl_id"),
        ("absent.txt", "cannot be read as a list of genes"),
    ],
)
def test_bad_lists_write_nothing(genes, message, files, tmp_path):
    from eval.cells.attention_tables import attention_file
    from eval.cells.settings import AttentionOptions

    with pytest.raises(ValueError, match=message):
        attention_file(
            files["cells"], files["model"], tmp_path / "out",
            AttentionOptions(files["folder"] / genes),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_lists_of_genes_are_read_by_column_and_value(tmp_path):
    table = tmp_path / "genes.tsv"
    table.write_text("set\tensembl_id\tsymbol\na\tE1\tA\nb\tE2\tB\na\tE1\tA\na\tE3\t\n")
    assert read_genes(table) == {"E1": "A", "E2": "B", "E3": ""}
    assert read_genes(table, {"set": ("a",)}) == {"E1": "A", "E3": ""}
    with pytest.raises(ValueError, match="no gene with"):
        read_genes(table, {"set": ("c",)})
    with pytest.raises(ValueError, match="and place"):
        read_genes(table, {"place": ("c",)})


def attending_model(vocabulary: Vocabulary) -> BertForMaskedLM:
    """Return a model whose first head attends to listed genes, and all others evenly."""
    import torch

    network = passing_model(vocabulary)
    words = np.random.default_rng(0).normal(size=(vocabulary.num_tokens, 16))
    words[vocabulary.first_gene_token :, 0] = np.where(is_listed(vocabulary), 4, -4)
    with torch.no_grad():
        network.bert.embeddings.word_embeddings.weight.copy_(torch.from_numpy(words))
        first = network.bert.get_submodule("encoder.layer.0.attention.self")
        first.get_parameter("key.weight")[0, 0] = 1.0
        first.get_parameter("query.bias")[0] = 2.0
    return network


@pytest.fixture(scope="module")
def task_run(tmp_path_factory) -> TaskRun:
    from eval.benchmark.kinds.attention_task import AttentionToGenes

    folder = tmp_path_factory.mktemp("world")
    vocabulary = write_world(folder)
    bench = bench_of(
        folder, vocabulary, attending=attending_model(vocabulary), zeros=passing_model(vocabulary)
    )
    found = AttentionToGenes(TASK, Size(seeds=3), bench).run()
    assert len(found.outcomes) == num_units(AttentionToGenes, TASK, Size(seeds=3), bench.models)
    return found


def test_planted_attention_is_found_and_even_attention_is_at_chance(task_run):
    for name in ("zero-shot", "zero-shot, early layers"):
        assert score_of(task_run, name, "model", "attending") > 0.99
        assert score_of(task_run, name, "model", "zeros") == 0.5
    assert score_of(task_run, "zero-shot", "model", "attending", "heads_more") == 0.25
    assert score_of(task_run, "zero-shot", "model", "attending", "heads_more_early") == 0.5
    assert score_of(task_run, "zero-shot", "model", "attending", "heads_less") == 0
    assert score_of(task_run, "zero-shot", "model", "zeros", "heads_more") == 0
    for name in ("mean rank", "mean expression", "detection rate"):
        assert abs(score_of(task_run, f"{name} alone", "baseline", None) - 0.5) < 0.1
    for model in ("attending", "zeros"):
        control = score_of(task_run, "shuffled labels, zero-shot", "control", model)
        assert abs(control - 0.5) < 0.05


def test_heads_are_kept_one_by_one(task_run):
    (outcome,) = (
        o for o in task_run.outcomes
        if (o.contender, o.role, o.model, o.fold) == ("zero-shot", "model", "attending", 0)
    )  # fmt: skip
    heads = np.array(outcome.details["heads"])
    assert heads.shape == (2, 2)
    assert heads[0, 0] > 0.1
    assert np.abs(heads[[0, 1, 1], [1, 0, 1]]).max() < 1e-5
    assert outcome.details["heads_q"][0][0] < 0.05
    assert outcome.details["donors_agree"][0][0] == 1.0


def test_pairs_are_expressed_alike(task_run):
    for name, (listed, partner) in task_run.details["matched"].items():
        assert abs(listed - partner) < 0.1 * max(listed, partner), name
    assert task_run.details["pairs"] >= 10


def test_the_page_shows_the_heads_and_a_second_run_repeats_nothing(tmp_path):
    from eval.benchmark.report.page import write_report
    from eval.benchmark.run import run_benchmark

    vocabulary = write_world(tmp_path)
    attending_model(vocabulary).save_pretrained(tmp_path / "model")
    vocabulary.save(tmp_path / "model" / "vocabulary.json")
    own = tmp_path / "own.yaml"
    own.write_text(
        "title: Attended genes\nkind: attention\n"
        "positive: {name: listed, file: genes.tsv, keep: {listed: ['yes']}}\n"
        "cells: {files: [cells.h5ad], recipe: made by this test}\n"
        "sizes: {quick: {max_cells: 40, seeds: 3}}\n"
    )
    out = tmp_path / "report"
    settings = {"data": tmp_path, "names": ["own"], "own": [own]}
    results = run_benchmark([tmp_path / "model"], "quick", out, **settings)
    page = write_report(results, out).read_text()
    assert "Attended genes" in page
    assert "Attention to a listed, minus that to its partner" in page
    assert list((out / "plots").glob("*heads.png"))
    done = {p: p.stat().st_mtime_ns for p in (out / "units").glob("*.json")}
    assert len(done) == 24
    again = run_benchmark([tmp_path / "model"], "quick", out, **settings)
    assert again["tasks"][0]["summary"] == results["tasks"][0]["summary"]
    assert {p: p.stat().st_mtime_ns for p in done} == done
