"""What counting tells, added to the head's logits: its numbers, on a GPU too, and exact runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.genes.vocabulary import Vocabulary
from data_prep.shards.reader import ShardSet
from pretrain.config import RunConfig, load_config
from pretrain.counting.arithmetic import (
    FOLDS,
    Arithmetic,
    MaskedRows,
    arithmetic_tables,
    of_all_cells,
)
from pretrain.counting.counted_tables import train_blocks
from tests.ranks import run_ranks
from tests.runs import (
    cut_off,
    elsewhere,
    final_state,
    metrics,
    require_same_state,
    run_training,
    tiny_config,
)

_CELLS = 50_000


@pytest.fixture(scope="module")
def opened(shards) -> ShardSet:
    return ShardSet(shards)


@pytest.fixture(scope="module")
def copied(shards, tmp_path_factory) -> Path:
    """Shards beside which tables may be kept."""
    return shutil.copytree(shards, tmp_path_factory.mktemp("prior") / "shards")


@pytest.fixture(scope="module")
def tables(copied) -> dict[str, np.ndarray]:
    return arithmetic_tables(ShardSet(copied), _CELLS, by_fold=True)


@pytest.fixture(scope="module")
def prior(tables, opened):
    from pretrain.counting.arithmetic_prior import ArithmeticPrior

    return ArithmeticPrior(tables, opened.vocabulary)


@pytest.fixture(scope="module")
def hidden_cells(opened) -> tuple:
    """Held-out cells with hidden genes: inputs, lengths, flat places and tokens of these."""
    random = np.random.default_rng(0)
    cells = []
    for extent in opened.extents("heldout"):
        for number in opened.block_numbers("heldout", extent.length):
            block = opened.read_block(int(number))
            cells += np.split(block.tokens, block.offsets[1:-1])
    inputs = np.zeros((len(cells), max(map(len, cells)) + 2), np.int32)
    for row, tokens in enumerate(cells):
        inputs[row, : len(tokens)] = tokens
    lengths = np.array([len(tokens) for tokens in cells])
    is_hidden = (random.random(inputs.shape) < 0.25) & (
        inputs >= opened.vocabulary.first_gene_token
    )
    places = np.flatnonzero(is_hidden)
    labels = inputs.ravel()[places].astype(np.int64)
    inputs[is_hidden] = opened.vocabulary.mask_token
    return inputs, lengths, places, labels


def as_given(hidden_cells, unlabelled: int = 0, folds: list[int] | None = None):
    """Return them as the model gets them, with some places behind that no gene is asked at."""
    import torch

    from pretrain.counting.arithmetic_prior import Hidden

    inputs, lengths, places, labels = hidden_cells
    mask = np.arange(inputs.shape[1]) < lengths[:, None]
    places = np.concatenate([places, np.zeros(unlabelled, np.int64)])
    labels = np.concatenate([labels, np.full(unlabelled, -100)])
    arrays = inputs, mask, places, labels, *([np.resize(folds, len(inputs))] if folds else [])
    return Hidden(*(torch.from_numpy(x) for x in arrays))


def test_with_logits_of_zero_the_loss_is_the_arithmetic_line(prior, copied, opened, hidden_cells):
    import torch

    inputs, lengths, _, labels = hidden_cells
    tables = arithmetic_tables(ShardSet(copied), _CELLS)
    expected, _ = Arithmetic(tables, opened.vocabulary).scores(MaskedRows(inputs, lengths, labels))
    zeros = torch.zeros(len(labels), opened.vocabulary.num_tokens)
    logits = prior.added_to(zeros, as_given(hidden_cells))
    losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="none")
    assert len(labels) > 100
    # The line mixes a ten thousandth of the frequency into its answer.
    np.testing.assert_allclose(losses.numpy(), expected, atol=5e-3)
    assert abs(losses.mean().item() - expected.mean()) < 1e-3


def test_packed_cells_have_the_same_prior(prior, opened, hidden_cells):
    """Losses and slopes of a model whose cells stand end to end."""
    import torch

    from pretrain.model.masked_gene_model import build_model
    from pretrain.model.packing import packed
    from tests.test_pretrain_model import CONFIG
    from tests.test_pretrain_packing import losses_and_slopes, require_same, without_numbers

    ids, real, places, labels, folds = as_given(hidden_cells, folds=[0, 1, 2])
    tokens, packing = packed(ids, real, places, ids.shape[1])
    rows = ids, real, places, labels, None, None, None, folds
    end_to_end = tokens, None, places, labels, None, None, None, folds, tuple(packing)
    model = build_model(CONFIG, opened.vocabulary, 0, prior)
    require_same(model, rows, end_to_end)
    plain = build_model(CONFIG, opened.vocabulary, 0)
    (found, *_), (without, *_) = (losses_and_slopes(m, end_to_end) for m in (model, plain))
    assert float((found[0] - without[0]).abs().mean()) > 0.1
    assert torch.isfinite(found[0]).all()
    # On a device without numbers: nothing is read on the way, which would wait for a GPU.
    for arguments in (rows, end_to_end):
        losses, _ = model.to("meta", torch.bfloat16)(*without_numbers(arguments))
        losses.sum().backward()
        assert losses.shape == labels.shape


def test_a_fold_has_tables_that_were_not_counted_on_it(copied, tables, monkeypatch):
    """Those of a corpus without its cells, with the frequencies and classes of the whole."""
    from pretrain.counting import arithmetic

    whole = arithmetic_tables(ShardSet(copied), _CELLS)
    assert len(tables["log_ratios"]) == FOLDS + 1
    for name in whole.keys() - {"log_ratios"}:
        np.testing.assert_array_equal(tables[name], whole[name])
    np.testing.assert_array_equal(tables["log_ratios"][-1], whole["log_ratios"])
    assert of_all_cells(tables).keys() == whole.keys()
    np.testing.assert_array_equal(of_all_cells(tables)["log_ratios"], whole["log_ratios"])

    frequency = arithmetic._frequency_and_lengths
    everything = frequency(train_blocks(ShardSet(copied), _CELLS), ShardSet(copied).vocabulary)
    number = arithmetic._MOST_ROUNDS

    def without_fold(shards, max_cells, left_out=None):
        for block in train_blocks(shards, max_cells, left_out):
            yield block.take(np.flatnonzero(block.cells % FOLDS != 2))

    monkeypatch.setattr(arithmetic, "train_blocks", without_fold)
    monkeypatch.setattr(arithmetic, "_frequency_and_lengths", lambda *_: everything)
    found = arithmetic._count(ShardSet(copied), _CELLS, 1)
    assert number == arithmetic._MOST_ROUNDS
    np.testing.assert_allclose(found["log_ratios"], tables["log_ratios"][2], atol=1e-6)
    assert np.abs(tables["log_ratios"][2] - tables["log_ratios"][-1]).max() > 0.1


def test_a_gpu_adds_the_same_numbers(prior, opened, hidden_cells):
    import torch

    rows = as_given(hidden_cells, 7, [2, FOLDS, 0])
    shape = len(rows.labels), opened.vocabulary.num_tokens
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    here, there = start.clone(), start.clone()
    prior.add_in_place(here, rows)
    prior.add_on_device(there, rows)
    torch.testing.assert_close(there, here, atol=1e-5, rtol=0)
    assert torch.equal(here[-7:], start[-7:])
    assert torch.equal(there[-7:], start[-7:])
    assert not torch.equal(here[:-7], start[:-7])
    alike = start.clone()
    prior.add_in_place(alike, as_given(hidden_cells, 7))
    is_whole = (rows.tables == FOLDS)[rows.masked_places // rows.input_ids.shape[1]][:-7]
    assert torch.equal((alike == here).all(dim=1)[:-7], is_whole)


@pytest.mark.parametrize("way", ["add_in_place", "add_on_device"])
def test_what_stands_at_a_hidden_place_does_not_matter(prior, opened, hidden_cells, way):
    import torch

    rows = as_given(hidden_cells)
    shown = rows.input_ids.clone()
    # As BERT's 80/10/10 leaves some as they are.
    shown.view(-1)[rows.masked_places[::2]] = rows.labels[::2].int()
    found = []
    for ids in (rows.input_ids, shown):
        logits = torch.zeros(len(rows.labels), opened.vocabulary.num_tokens)
        getattr(prior, way)(logits, rows._replace(input_ids=ids))
        found.append(logits)
    assert torch.equal(*found)


def test_the_gradient_is_that_of_the_logits(prior, opened, hidden_cells):
    import torch

    rows = as_given(hidden_cells)
    own = torch.zeros(len(rows.labels), opened.vocabulary.num_tokens, requires_grad=True)
    added = torch.zeros_like(own)
    prior.add_in_place(added, rows)
    torch.nn.functional.cross_entropy(own + added, rows.labels).backward()
    expected, own.grad = own.grad, None
    # In place, so not on a leaf.
    torch.nn.functional.cross_entropy(prior.added_to(own * 1, rows), rows.labels).backward()
    torch.testing.assert_close(own.grad, expected)


def test_kept_in_a_folder(prior, opened, tmp_path):
    from pretrain.counting.arithmetic_prior import FILE_NAME, ArithmeticPrior

    prior.save(tmp_path)
    assert ArithmeticPrior.load(tmp_path, opened.vocabulary).record == prior.record
    assert prior.record["kind"] == "arithmetic"
    content = bytearray((tmp_path / FILE_NAME).read_bytes())
    content[-9] ^= 1
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(ValueError, match="prior.safetensors: damaged"):
        ArithmeticPrior.load(tmp_path, opened.vocabulary)
    (tmp_path / FILE_NAME).unlink()
    with pytest.raises(ValueError, match="prior.safetensors: cannot be read"):
        ArithmeticPrior.load(tmp_path, opened.vocabulary)


def test_settings_that_do_not_go_together(tmp_path):
    given = [f"data.shards={tmp_path}", f"run.out={tmp_path}", "objective.prior=arithmetic"]
    assert load_config("tiny", given).recipe()["objective.prior"] == "arithmetic"
    with pytest.raises(ValueError, match="prior=arithmetic: belongs to the loss of single genes"):
        load_config("tiny", [*given, "objective.gene_weight=0", "objective.cell_weight=1"])
    with pytest.raises(ValueError, match=r"objective.prior=arithmetic: .*masking.subset"):
        load_config("tiny", [*given, "masking.subset=64"])
    assert "objective.prior" not in load_config("tiny", given[:2]).recipe()


def with_prior(shards: Path, out: Path, **changes) -> RunConfig:
    # By AdamW, for whose moments two ranks are compared to the last digits elsewhere.
    return tiny_config(
        shards, out, objective__prior="arithmetic", objective__cell_weight=0.5,
        model__init_genes="counted", **changes,
    )  # fmt: skip


def train_all(config: RunConfig, other: RunConfig | None, resumed: Path | None):
    """Train; train another; go on with the first from its half in a copy."""
    found = [run_training(config)]
    if other:
        found.append(run_training(other))
    if resumed:
        found.append(run_training(cut_off(config, resumed), resume=True))
    return found


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """One rank: a run, one in micro-batches of half the size, a resumed one; then two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    whole = with_prior(shards, folder / "one")
    small = with_prior(shards, folder / "small", batch__tokens_per_micro_batch=256)
    ((one, halves, again),) = run_ranks(1, train_all, whole, small, folder / "resumed")
    both = run_ranks(2, train_all, elsewhere(whole, folder / "two"), None, None)
    return folder, {"one": one, "small": halves, "resumed": again, "two": both[0][0]}


@pytest.mark.parametrize("other", ["small", "two"])
def test_ranks_and_micro_batches_change_nothing(runs, other):
    _, found = runs
    expected, weights = found["one"]
    summary, moved = found[other]
    np.testing.assert_allclose(summary.losses, expected.losses, rtol=2e-6)
    np.testing.assert_allclose(summary.cell_losses, expected.cell_losses, rtol=2e-6)
    for name, values in weights.items():
        np.testing.assert_allclose(moved[name], values, atol=2e-5, err_msg=name)


def test_a_resumed_run_ends_in_the_same_bits(runs):
    folder, _ = runs
    require_same_state(folder / "one", folder / "resumed")


def test_it_begins_at_the_arithmetic_line(runs):
    """Its head adds next to nothing at first: the frequency is in the prior, not in the bias."""
    from pretrain.measure.heldout import arithmetic_sentence

    folder, found = runs
    (heldout,) = metrics(folder / "one", "heldout")
    # Three quarters of these few cells were counted, in the line all of them.
    assert abs(found["one"][0].losses[0] - heldout["baseline_arithmetic"]) < 0.5
    assert found["one"][0].losses[0] < heldout["baseline_no_repeat"] - 1
    assert heldout["loss"] < heldout["baseline_no_repeat"]
    assert heldout["prior"] == "arithmetic"
    said = arithmetic_sentence(heldout | {"beyond_arithmetic": 0.25})
    assert "0.2500 nats below" in said
    assert "at its first step it stood there" in said
    assert "frequency" not in json.loads((folder / "one" / "init.json").read_text())["counted"]


def test_a_resumed_run_needs_the_tables_it_began_with(runs, tmp_path):
    from pretrain.counting.arithmetic_prior import FILE_NAME

    folder, _ = runs
    whole = with_prior(folder / "no shards are read", folder / "one")
    cut = cut_off(whole, tmp_path / "cut")
    (cut.run.out / FILE_NAME).write_bytes((folder / "one" / FILE_NAME).read_bytes()[:-100])
    whole = RunConfig.model_validate(
        cut.model_dump() | {"data": {"shards": str(_shards_of(folder / "one")), "num_workers": 0}}
    )
    with pytest.raises(Exception, match="prior.safetensors: cannot be read"):
        run_ranks(1, run_training, whole, True)


def _shards_of(run: Path) -> Path:
    import yaml

    return Path(yaml.safe_load((run / "config.yaml").read_text())["data"]["shards"])


def test_the_model_folder_has_it_and_another_prior_is_refused(runs, opened, tmp_path):
    import torch

    from pretrain.counting.arithmetic_prior import ArithmeticPrior
    from pretrain.export.model_folder import export, load_exported, model_digest
    from pretrain.model.masked_gene_model import MaskedGeneModel, build_model
    from pretrain.start.warm_start import start_weights

    folder, _ = runs
    out = tmp_path / "model"
    export(folder / "one", out)
    record = json.loads((out / "geneloom.json").read_text())
    assert record["prior"]["kind"] == "arithmetic"
    assert record["recipe"]["objective.prior"] == "arithmetic"
    assert "prior.safetensors" in (out / "README.md").read_text()
    loaded = ArithmeticPrior.load(out, opened.vocabulary)
    assert loaded.record == record["prior"]
    bert, _ = load_exported(out)
    weights = final_state(folder / "one")["weight"]
    bias = dict(bert.named_parameters())["cls.predictions.bias"]
    assert torch.equal(bias, torch.from_numpy(weights["bert.cls.predictions.bias"]))
    assert model_digest(out, opened.vocabulary) == _digest_without(out, opened, tmp_path)
    settings = with_prior(tmp_path, tmp_path / "x").model
    settings = settings.model_copy(update={"init_from": out, "init_genes": "random"})
    model = build_model(settings, opened.vocabulary, 0)
    with pytest.raises(ValueError, match="objective.prior=arithmetic, this run has none"):
        start_weights(model, opened.vocabulary, settings)
    start_weights(model, opened.vocabulary, settings, "arithmetic")
    assert isinstance(model, MaskedGeneModel)


def _digest_without(model: Path, opened: ShardSet, folder: Path) -> str:
    from pretrain.counting.arithmetic_prior import FILE_NAME
    from pretrain.export.model_folder import model_digest

    shutil.copytree(model, folder / "without")
    (folder / "without" / FILE_NAME).unlink()
    return model_digest(folder / "without", opened.vocabulary)


def without_medians(config: RunConfig) -> str:
    """Return what a run says whose vocabulary has none."""
    from pretrain.counting.arithmetic_prior import CannotUsePrior, objective_prior
    from pretrain.ranks import dist

    ranks = dist.start(60, 1)
    opened = ShardSet(config.data.shards)
    genes, special = opened.vocabulary.genes, opened.vocabulary.special_tokens
    opened.vocabulary = Vocabulary(genes, np.ones(len(genes)), special, 2048)
    try:
        objective_prior(config, opened, None, ranks)
    except CannotUsePrior as error:
        return str(error)
    finally:
        dist.leave()
    return "nothing"


def test_a_dry_run_says_the_same(runs, shards, tmp_path):
    from pretrain.cli import resolved
    from pretrain.export.model_folder import export

    folder, _ = runs
    out = tmp_path / "model"
    export(folder / "one", out)
    changes = {"model__init_from": out, "model__init_genes": "random"}
    with pytest.raises(ValueError, match="objective.prior=arithmetic, this run has none"):
        resolved(tiny_config(shards, tmp_path / "x", **changes))
    config = tiny_config(shards, tmp_path / "x", objective__prior="arithmetic", **changes)
    assert resolved(config)["weights"].startswith(f"start from {out}")


def test_a_vocabulary_without_medians_is_refused_on_all_ranks(shards, tmp_path):
    for said in run_ranks(2, without_medians, with_prior(shards, tmp_path / "run")):
        assert "the vocabulary has no medians" in said
