"""The arithmetic baseline against plain loops; kept once; nats beyond it; two ranks as one."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_prep.genes.vocabulary import Vocabulary
from data_prep.shards.reader import ShardSet
from pretrain.counting.arithmetic import (
    MIXED_SHARE,
    Arithmetic,
    MaskedRows,
    arithmetic_tables,
)
from pretrain.counting.baselines import (
    BASELINE_NAMES,
    Baselines,
    RankBaselines,
    rank_bins,
)
from pretrain.counting.counted_tables import FOLDER_NAME
from pretrain.measure.heldout_sums import (
    MOST_DATASETS,
    OTHER_DATASETS,
    CellDatasets,
    HeldoutSums,
)
from tests.ranks import run_ranks
from tests.runs import tiny_config
from tests.synthetic import make_cells, make_shards

ALL_CELLS = 1000


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """50 training cells or a few more, in two data sets."""
    return two_datasets(tmp_path_factory.mktemp("arithmetic"))


def two_datasets(folder: Path) -> Path:
    from data_prep.prepare.options import PrepareOptions
    from data_prep.prepare.run import prepare
    from data_prep.sources.source_spec import SourceOptions, source_at

    sources = []
    for seed, name in enumerate(("shallow", "deep")):
        cells = make_cells(num_cells=50, num_genes=120, seed=seed, detected=0.3 + 0.5 * seed)
        cells.write_h5ad(folder / f"{name}.h5ad")
        sources.append(source_at(folder / f"{name}.h5ad", SourceOptions()))
    options = PrepareOptions(heldout_share=0.4, block_cells=16, vocabulary_min_cells=1)
    prepare(sources, folder / "shards", None, options)
    return folder / "shards"


@pytest.fixture(scope="module")
def tables(shards) -> dict[str, np.ndarray]:
    return arithmetic_tables(ShardSet(shards), ALL_CELLS)


class Plain:
    """The method once more: loops over cells, genes and neighbours, dictionaries for tables."""

    step, wanted, most_rounds, classes, pull = 0.0005, 400_000, 8, 5, 1.0
    widths = (256, 32, 8, 2, 1)

    def __init__(self, shards: ShardSet) -> None:
        self.vocabulary = shards.vocabulary
        self.cells = list(plain_cells(shards, "train"))
        genes = range(shards.vocabulary.first_gene_token, shards.vocabulary.num_tokens)
        counts = {gene: 0.5 for gene in genes}
        for _, tokens in self.cells:
            for token in tokens:
                counts[token] += 1
        self.frequency = {gene: n / sum(counts.values()) for gene, n in counts.items()}
        u = {gene: -math.log(shards.vocabulary.median_of_token[gene]) for gene in genes}
        low, high = np.quantile(list(u.values()), [0.001, 0.999])
        self.place = {g: int((min(max(x, low), high) - low) / self.step) for g, x in u.items()}
        self.differences: dict[tuple, int] = {}
        self.neighbours: dict[tuple, int] = {}

    def count(self) -> None:
        """Count every hidden gene beside each of its neighbours."""
        hidden = int(sum(len(tokens) for _, tokens in self.cells) * 0.15)
        self.rounds = min(self.most_rounds, self.wanted // hidden)
        for epoch in range(self.rounds):
            for cell, tokens in self.cells:
                hidden_ranks = plain_hidden(self.vocabulary, "train", epoch, cell, tokens)
                for rank in hidden_ranks:
                    context = rank * self.classes // len(tokens)
                    for slot, neighbour in self.slots(tokens, hidden_ranks, rank).items():
                        apart = self.place[tokens[rank]] - self.place[neighbour]
                        key = context, slot, apart
                        self.differences[key] = self.differences.get(key, 0) + 1
                        key = context, slot, self.place[neighbour]
                        self.neighbours[key] = self.neighbours.get(key, 0) + 1

    @staticmethod
    def slots(tokens: list[int], hidden: list[int], rank: int) -> dict[int, int]:
        """Return the visible neighbour in each slot that has one."""
        left = [t for r, t in enumerate(tokens) if r < rank and r not in hidden][-4:]
        right = [t for r, t in enumerate(tokens) if r > rank and r not in hidden][:4]
        found = {3 - i: gene for i, gene in enumerate(reversed(left))}
        return found | {4 + i: gene for i, gene in enumerate(right)}

    def log_ratio(self, context: int, slot: int, size: int) -> np.ndarray:
        """Return float64 [2 size - 1], of the difference 1 - size and up."""
        counts, expected = np.zeros(2 * size - 1), np.zeros(2 * size - 1)
        for (c, s, apart), n in self.differences.items():
            if (c, s) == (context, slot):
                counts[apart + size - 1] += n
        for (c, s, place), n in self.neighbours.items():
            if (c, s) == (context, slot):
                for gene, share in self.frequency.items():
                    expected[self.place[gene] - place + size - 1] += n * share
        ratio = np.ones(2 * size - 1)
        for width in self.widths:
            start = -(width // 2)
            for first in range(start, 2 * size - 1, width):
                part = slice(max(first, 0), max(first + width, 0))
                seen, foreseen = counts[part].sum(), (expected[part] * ratio[part]).sum()
                ratio[part] *= (seen + self.pull) / (foreseen + self.pull)
        return np.log(ratio)


def plain_cells(shards: ShardSet, split: str):
    """Yield (number, tokens) of all cells of a split."""
    for extent in shards.extents(split):
        for number in shards.block_numbers(split, extent.length):
            block = shards.read_block(int(number))
            for row, cell in enumerate(range(len(block.offsets) - 1)):
                tokens = block.tokens[block.offsets[row] : block.offsets[row + 1]]
                yield int(shards.index["first_cell"][number]) + cell, tokens.tolist()


def plain_hidden(
    vocabulary: Vocabulary, split: str, epoch: int, cell: int, tokens: list[int]
) -> list[int]:
    """Return the ranks of the genes that are hidden: the lowest hashes, 15 % of them."""
    from data_prep.hashing import mix64, stream_key

    key = np.uint64(stream_key(0, "mask", split, epoch))
    hashes = mix64(mix64(np.uint64(cell << 16) + np.arange(len(tokens), dtype=np.uint64)) ^ key)
    return sorted(np.argsort(hashes)[: max(1, math.floor(len(tokens) * 0.15 + 0.5))].tolist())


@pytest.fixture(scope="module")
def plain(shards) -> Plain:
    found = Plain(ShardSet(shards))
    found.count()
    return found


def heldout_rows(shards: ShardSet, num_cells: int = 1000) -> tuple[MaskedRows, np.ndarray, list]:
    """Return held-out cells, padded and hidden; relative ranks; (tokens, hidden ranks) of each."""
    vocabulary = shards.vocabulary
    cells = list(plain_cells(shards, "heldout"))[:num_cells]
    inputs = np.zeros((len(cells), max(len(t) for _, t in cells) + 3), np.int32)
    labels, ranks, listed = [], [], []
    for row, (cell, tokens) in enumerate(cells):
        hidden = plain_hidden(vocabulary, "heldout", 0, cell, tokens)
        inputs[row, : len(tokens)] = tokens
        inputs[row, hidden] = vocabulary.mask_token
        labels += [tokens[rank] for rank in hidden]
        ranks += [rank / len(tokens) for rank in hidden]
        listed.append((tokens, hidden))
    lengths = np.array([len(t) for _, t in cells])
    return MaskedRows(inputs, lengths, np.array(labels)), np.array(ranks, np.float32), listed


def test_tables_are_those_of_plain_loops(tables, plain):
    assert len(plain.cells) >= 50
    assert tables["counted"][0] == len(plain.cells)
    assert tables["counted"][1] == plain.rounds * sum(
        max(1, math.floor(len(t) * 0.15 + 0.5)) for _, t in plain.cells
    )
    for gene, share in plain.frequency.items():
        assert tables["frequency"][gene] == pytest.approx(share, rel=1e-12)
    contexts, slots, width = tables["log_ratios"].shape
    assert (contexts, slots) == (5, 8)
    for context, slot in ((0, 0), (0, 3), (2, 4), (4, 7), (4, 3)):
        expected = plain.log_ratio(context, slot, (width + 1) // 2)
        np.testing.assert_allclose(tables["log_ratios"][context, slot], expected, atol=2e-5)


def test_losses_and_places_are_those_of_plain_loops(shards, tables, plain):
    opened = ShardSet(shards)
    rows, _, listed = heldout_rows(opened, 8)
    losses, places = Arithmetic(tables, opened.vocabulary).scores(rows)
    size, number = (tables["log_ratios"].shape[2] + 1) // 2, 0
    for tokens, hidden in listed:
        visible = {t for r, t in enumerate(tokens) if r not in hidden}
        for rank in hidden:
            context = rank * 5 // len(tokens)
            weights = {}
            for gene in plain.frequency.keys() - visible:
                log = math.log(plain.frequency[gene])
                for slot, neighbour in plain.slots(tokens, hidden, rank).items():
                    apart = plain.place[gene] - plain.place[neighbour] + size - 1
                    log += tables["exponents"][slot] * tables["log_ratios"][context, slot, apart]
                weights[gene] = math.exp(log)
            own = weights[tokens[rank]]
            share = own / sum(weights.values())
            share = (1 - MIXED_SHARE) * share + MIXED_SHARE * plain.frequency[tokens[rank]]
            assert losses[number] == pytest.approx(-math.log(share), rel=1e-4)
            # Weights in float32: those that differ less may stand in either order.
            fewest = sum(w > own * (1 + 1e-5) for w in weights.values())
            most = sum(w > own * (1 - 1e-5) for w in weights.values()) - 1
            assert fewest <= places[number] <= max(most, fewest)
            number += 1
    assert number == len(losses) > 40


def test_exponents_are_the_best_on_cells_that_were_not_counted(tables):
    """Each neighbour counts for something, the nearest for most, none for more than its word."""
    exponents = tables["exponents"]
    assert (exponents >= 0).all() and (exponents <= 1).all()
    assert exponents[3:5].sum() > exponents[[0, 7]].sum()


def test_it_is_far_below_what_is_blind_to_the_cell(shards, tables):
    opened = ShardSet(shards)
    rows, ranks, _ = heldout_rows(opened)
    found = baselines(opened, tables).scores(rows, ranks)
    means = {name: losses.mean() for name, (losses, _) in found.items()}
    assert tuple(means) == BASELINE_NAMES
    assert means["no_repeat"] < means["unigram_by_rank"]
    assert means["arithmetic"] < means["no_repeat"] - 0.3
    assert all(np.isfinite(losses).all() for losses, _ in found.values())


def baselines(opened: ShardSet, tables: dict[str, np.ndarray]) -> Baselines:
    return Baselines(RankBaselines(opened, ALL_CELLS), Arithmetic(tables, opened.vocabulary))


def test_no_repeat_is_the_table_by_rank_without_visible_genes(shards, tables):
    opened = ShardSet(shards)
    by_rank = RankBaselines(opened, ALL_CELLS)
    table = np.exp(by_rank.log_probabilities["unigram_by_rank"])
    frequency = np.exp(by_rank.log_probabilities["unigram"][0])
    rows, ranks, listed = heldout_rows(opened, 12)
    losses, places = by_rank.without_repeats(rows, ranks)
    number = 0
    for tokens, hidden in listed:
        visible = [t for r, t in enumerate(tokens) if r not in hidden]
        for rank in hidden:
            left = table[rank_bins(ranks[[number]])[0]].copy()
            left[visible] = 0
            own = left[tokens[rank]] / left.sum()
            own = (1 - MIXED_SHARE) * own + MIXED_SHARE * frequency[tokens[rank]]
            assert losses[number] == pytest.approx(-math.log(own), rel=1e-9)
            assert places[number] == (left > left[tokens[rank]]).sum()
            number += 1
    assert number == len(losses)


def test_a_gene_that_stands_in_a_cell_twice_costs_no_infinite_loss(shards, tables):
    """A corpus of tokens may hold one. Its loss is that of the mixed-in frequency."""
    opened = ShardSet(shards)
    first = opened.vocabulary.first_gene_token
    inputs = np.array([[first, opened.vocabulary.mask_token, first + 1]], np.int32)
    rows = MaskedRows(inputs, np.array([3]), np.array([first]))
    for name, (losses, _) in baselines(opened, tables).scores(rows, np.array([0.3])).items():
        assert np.isfinite(losses).all(), name
    expected = -math.log(MIXED_SHARE * tables["frequency"][first])
    assert Arithmetic(tables, opened.vocabulary).scores(rows)[0][0] == pytest.approx(expected)


def test_no_baseline_is_infinite_anywhere(tmp_path):
    """Genes with one place each: far from it the normal density is zero in float64."""
    opened = ShardSet(make_shards(tmp_path, num_cells=40, num_genes=60))
    for name, table in RankBaselines(opened, ALL_CELLS).log_probabilities.items():
        assert np.isfinite(table[:, opened.vocabulary.first_gene_token :]).all(), name
        assert table[:, opened.vocabulary.first_gene_token :].min() > -15, name


def test_counted_once_and_anew_for_other_shards_or_cells(shards, tables, tmp_path, monkeypatch):
    from pretrain.counting import arithmetic

    shards = Path(shutil.copytree(shards, tmp_path / "copy"))
    shutil.rmtree(shards / FOLDER_NAME)
    arithmetic_tables(ShardSet(shards), ALL_CELLS)
    (kept,) = (shards / FOLDER_NAME).glob("arithmetic-*")
    monkeypatch.setattr(arithmetic, "_count", pytest.fail)
    again = arithmetic_tables(ShardSet(shards), ALL_CELLS)
    for name, table in tables.items():
        np.testing.assert_array_equal(again[name], table)
    monkeypatch.undo()
    # The same cells counted anew: the same bytes.
    content = kept.read_bytes()
    kept.unlink()
    arithmetic_tables(ShardSet(shards), ALL_CELLS)
    assert kept.read_bytes() == content
    fewer = arithmetic_tables(ShardSet(shards), 20)
    assert fewer["counted"][0] < tables["counted"][0]
    assert len(list((shards / FOLDER_NAME).iterdir())) == 2
    other = make_shards(tmp_path, num_cells=60, num_genes=80)
    assert len(arithmetic_tables(ShardSet(other), ALL_CELLS)["frequency"]) == 82


def test_without_medians_it_is_refused_by_name(shards):
    opened = ShardSet(shards)
    ones = np.ones(len(opened.vocabulary.genes))
    opened.vocabulary = Vocabulary(
        opened.vocabulary.genes, ones, opened.vocabulary.special_tokens, 2048
    )
    with pytest.raises(ValueError, match=r"shards: the vocabulary has no medians \(all are the"):
        arithmetic_tables(opened, ALL_CELLS)


def evaluated(shards: Path, out: Path, has_medians: bool = True) -> dict[str, Any]:
    """Evaluate a new model on this rank."""
    from pretrain.measure.heldout import HeldoutEvaluation, heldout_line, heldout_record
    from pretrain.model.masked_gene_model import build_model
    from pretrain.ranks import dist

    config = tiny_config(shards, out, evaluation__max_cells=1000)
    ranks = dist.start(60, 1)
    opened = ShardSet(shards)
    said: list[str] = []
    if not has_medians:
        genes, special = opened.vocabulary.genes, opened.vocabulary.special_tokens
        opened.vocabulary = Vocabulary(genes, np.ones(len(genes)), special, 2048)
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("pretrain.measure.heldout").addHandler(handler)
    evaluation = HeldoutEvaluation(opened, config, ranks)
    result = evaluation.run(build_model(config.model, opened.vocabulary, seed=0))
    dist.leave()
    record = heldout_record(result, evaluation)
    return {"record": record, "line": heldout_line(7, 9, result, evaluation), "said": said}


@pytest.fixture(scope="module")
def one_rank(shards, tmp_path_factory) -> dict[str, Any]:
    return run_ranks(1, evaluated, shards, tmp_path_factory.mktemp("one"))[0]


def test_nats_beyond_arithmetic_add_up(one_rank, shards, tables):
    """Of data sets, buckets and deciles; and the line is that of the baseline called by hand."""
    record = one_rank["record"]
    beyond = record["beyond_arithmetic"]
    assert beyond == pytest.approx(record["baseline_arithmetic"] - record["loss"])
    for what, names in (("dataset", {"shallow", "deep"}), ("bucket", None)):
        genes, parts = record[f"genes_by_{what}"], record[f"beyond_arithmetic_by_{what}"]
        assert genes.keys() == parts.keys() == (names or parts.keys())
        assert sum(genes.values()) == record["genes"]
        assert sum(parts[k] * genes[k] for k in parts) / record["genes"] == pytest.approx(beyond)
    assert len(record["beyond_arithmetic_by_rank_decile"]) == 10
    opened = ShardSet(shards)
    losses, places = Arithmetic(tables, opened.vocabulary).scores(heldout_rows(opened)[0])
    assert record["baseline_arithmetic"] == pytest.approx(losses.mean(), rel=1e-6)
    assert record["baseline_arithmetic_top10"] == np.mean(places < 10)
    assert f"beyond arithmetic {beyond:+.4f}  " in one_rank["line"]
    assert f"arithmetic {record['baseline_arithmetic']:.4f} / " in one_rank["line"]


def test_each_data_set_has_its_own_cells(one_rank, shards, tables):
    opened = ShardSet(shards)
    rows, _, listed = heldout_rows(opened)
    names = [n for e in opened.extents("heldout")
             for b in opened.block_numbers("heldout", e.length)
             for n in opened.read_block(int(b)).batch.column("dataset").to_pylist()]  # fmt: skip
    owner = np.repeat(names, [len(hidden) for _, hidden in listed])
    losses, _ = Arithmetic(tables, opened.vocabulary).scores(rows)
    for name, loss in one_rank["record"]["baseline_arithmetic_loss_by_dataset"].items():
        assert loss == pytest.approx(losses[owner == name].mean(), rel=1e-6)


def test_two_ranks_give_the_record_of_one_and_count_once(one_rank, tmp_path):
    """On shards where nothing has been counted yet."""
    fresh = two_datasets(tmp_path)
    for found in run_ranks(2, evaluated, fresh, tmp_path / "out"):
        for key, value in one_rank["record"].items():
            if isinstance(value, float):
                assert found["record"][key] == pytest.approx(value, rel=1e-6), key
    assert len(list((fresh / FOLDER_NAME).iterdir())) == 1


def test_without_medians_the_row_is_absent_and_said_so(shards, tmp_path):
    (found,) = run_ranks(1, evaluated, shards, tmp_path, False)
    record = found["record"]
    assert "no medians" in record["without_arithmetic"]
    assert not [key for key in record if "arithmetic" in key and key != "without_arithmetic"]
    assert "baseline_no_repeat" in record
    assert "beyond" not in found["line"]
    (said,) = (text for text in found["said"] if "medians" in text)
    assert said.startswith("shards: the vocabulary has no medians")


def test_many_data_sets_are_told_apart_up_to_a_limit():
    names = [f"set{i}" for i in range(MOST_DATASETS + 10)]
    manifest = {"datasets": [{"name": n} for n in names]}
    shards = SimpleNamespace(manifest=manifest, index={"first_cell": np.array([0])})
    listed = CellDatasets(shards).names  # type: ignore[arg-type]
    assert listed == [*names, OTHER_DATASETS]
    sums = HeldoutSums(1, len(listed), np.arange(0))
    sums.datasets[:, 0] = np.arange(len(listed))  # the last: of none that the manifest names
    rows = sums.by_dataset(listed)
    assert list(rows) == [*names[10:], OTHER_DATASETS]
    assert sum(row[0] for row in rows.values()) == sums.datasets[:, 0].sum()
