"""Packed cells: the losses and slopes of padded ones, whatever computes the attention."""

from __future__ import annotations

import shutil
import time

import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.runs import final_state, metrics, tiny_config

LENGTHS = (37, 64, 1, 20, 5)  # one without a hidden gene
ARCHITECTURES = {
    "bert": {},
    "global last": {"architecture": "modernbert", "num_layers": 4, "local_window": 8},
    "local last": {"architecture": "modernbert", "num_layers": 3, "local_window": 8},
}


def build(name: str, prior=None, **changes):
    """Return a model whose attention matters: weights larger than those of a start."""
    import torch

    from pretrain.model.masked_gene_model import build_model
    from pretrain.settings.model_settings import ModelConfig
    from tests.test_pretrain_modernbert import vocabulary

    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    settings = sizes | {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    settings |= ARCHITECTURES[name] | changes
    model = build_model(ModelConfig.model_validate(settings), vocabulary(), 0, prior)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model.train()


def micro_batch(lengths=LENGTHS, asks_cells: bool = False, asks_genes: bool = True):
    """Return (padded arguments, packed ones) of a model's forward pass."""
    import torch

    from pretrain.model.packing import packed
    from pretrain.objective.cell_objective import cell_targets

    generator = np.random.default_rng(0)
    size, longest = len(lengths), max(lengths)
    ids = np.zeros((size, longest), np.int32)
    places, labels = [], []
    for row, length in enumerate(lengths):
        ids[row, :length] = 4 + generator.permutation(58)[np.arange(length) % 58]
        hidden = np.sort(generator.permutation(length)[: length * 3 // 10])
        places.append(row * longest + hidden)
        labels.append(ids[row, hidden].astype(np.int64))
        ids[row, hidden] = 1
    ids, places = torch.from_numpy(ids), torch.from_numpy(np.concatenate(places))
    labels = torch.from_numpy(np.concatenate(labels))
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    targets = cell_targets(ids, places, labels, 4) if asks_cells else (None, None, None)
    if not asks_genes:
        places, labels = places[:0], labels[:0]
    tokens, packing = packed(ids, real, places, longest * 3 // 10)
    folds = torch.arange(size) % 3
    padded = (ids, real, places, labels, *targets, folds)
    return padded, (tokens, None, places, labels, *targets, folds, tuple(packing))


def losses_and_slopes(model, arguments):
    import torch

    model.zero_grad()
    losses, places, *of_cells = model(*arguments)
    weights = torch.arange(1, len(losses) + 1) % 7
    (sum(part.sum() for part in of_cells) + (losses * weights).sum()).backward()
    slopes = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return [losses.detach(), *(part.detach() for part in of_cells)], places, slopes


def require_same(model, arguments, others):
    import torch

    (found, places, slopes), (expected, expected_places, expected_slopes) = (
        losses_and_slopes(model, a) for a in (others, arguments)
    )
    for part, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(part, wanted, atol=1e-5, rtol=1e-5)
    assert places.tolist() == expected_places.tolist()
    assert slopes.keys() == expected_slopes.keys()
    for name, slope in slopes.items():
        scale = float(expected_slopes[name].abs().max())
        torch.testing.assert_close(
            slope, expected_slopes[name], atol=1e-5 * max(scale, 1), rtol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("asks", ["genes", "genes and cells", "cells"])
def test_packed_is_padded(architecture, asks):
    arguments = micro_batch(asks_cells="cells" in asks, asks_genes="genes" in asks)
    require_same(build(architecture), *arguments)


def test_activation_checkpointing_and_a_window_of_all():
    arguments = micro_batch()
    require_same(build("bert", activation_checkpointing=True), *arguments)
    require_same(build("local last", activation_checkpointing=True, global_every=1), *arguments)


def test_dropped_weights_are_as_many_as_asked():
    """Not the same ones as in rows, where a weight stands elsewhere: the losses vary as much."""
    import torch

    model = build("bert", attention_dropout=0.3, num_layers=1)
    torch.manual_seed(0)
    spreads = [
        float(torch.stack([model(*arguments)[0].detach() for _ in range(100)]).std(0).mean())
        for arguments in micro_batch()
    ]
    assert spreads[0] > 1e-3
    assert spreads[1] == pytest.approx(spreads[0], rel=0.15)


def test_every_cell_asks():
    """A cell without a hidden gene asks too, and nobody looks at the answer."""
    packing = micro_batch()[1][-1]
    from pretrain.model.packing import Packing

    cells = Packing(*packing)
    assert cells.asked_starts_B.diff().tolist() == [11, 19, 1, 6, 1]
    assert cells.asked_A[cells.slots_M].tolist() == cells.places_M.tolist()
    assert set(cells.asked_A.tolist()) - set(cells.places_M.tolist()) == {101}
    assert cells.num_places == sum(LENGTHS)
    assert cells.rows(cells.padded_T)[1].tolist() == list(range(64, 128))


def without_numbers(value):
    """Return tensors of the same shapes on a device without numbers: to read one is an error."""
    import torch

    if isinstance(value, tuple):
        return tuple(without_numbers(x) for x in value)
    return value.to("meta") if isinstance(value, torch.Tensor) else value


class Operations:
    """Counts the operations that reach a device, and the largest mask among their results."""

    def __init__(self) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        outer = self
        self.counts: dict[str, int] = {}
        self.largest_bool = 0

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                import torch

                found = function(*args, **(kwargs or {}))
                name = str(function).rsplit(".", 1)[0]
                outer.counts[name] = outer.counts.get(name, 0) + 1
                if isinstance(found, torch.Tensor) and found.dtype == torch.bool:
                    outer.largest_bool = max(outer.largest_bool, found.numel())
                return found

        self.mode = Mode


@pytest.mark.parametrize(
    ("architecture", "dropout"),
    [("bert", 0.0), ("bert", 0.1), ("global last", 0.0), ("local last", 0.0)],
)
def test_a_gpu_gets_the_kernel_and_no_mask(architecture, dropout):
    """On tensors without numbers: which operations are asked for, forward and backward."""
    import torch

    packed = without_numbers(micro_batch(asks_cells=architecture != "bert")[1])
    model = build(architecture, attention_dropout=dropout).to("meta", torch.bfloat16)
    number, found = model.bert.config.num_hidden_layers, Operations()
    with found.mode():
        losses, _, *of_cells = model(*packed)
        sum((x.sum() for x in of_cells), losses.sum()).backward()
    assert losses.dtype == torch.float32
    assert losses.shape == packed[3].shape
    kernel = "aten._flash_attention_{}" if dropout else "torch_attn._varlen_attn{}"
    ways = ("forward", "backward") if dropout else ("", "_backward")
    for way in ways:
        assert found.counts[kernel.format(way)] == number
    assert not [k for k in found.counts if "scaled_dot_product" in k or "by_cell" in k]
    # Nothing is sorted, but the tokens of the embeddings by torch's own kernel.
    assert not [k for k in found.counts if "index_put" in k or "sort" in k], found.counts
    # No mask over pairs of places, nor any other that is larger than the logits.
    assert found.largest_bool <= max(len(LENGTHS) * max(LENGTHS), len(packed[3]) * 62)


@pytest.mark.parametrize(
    ("architecture", "graphs"),
    [("bert", 2), pytest.param("global last", 3, marks=pytest.mark.long)],
)
def test_one_graph_for_all_numbers_of_tokens(architecture, graphs, monkeypatch):
    """Compiled layers: as many graphs as kinds of layers, whatever the cells."""
    import torch
    from torch._dynamo.utils import compilation_time_metrics, counters

    from pretrain.device import compiled_so_far

    in_torch = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, mode, **kwargs: in_torch(f, backend="aot_eager", **kwargs)
    )
    torch._dynamo.reset()
    counters.clear()
    compilation_time_metrics.clear()
    started = time.perf_counter()
    plain, compiled = build(architecture), build(architecture)
    compiled.compile_layers("default", None)
    for lengths in (LENGTHS, (50, 9), (64, 30, 30, 30, 8, 7, 2), (31,)):
        arguments = micro_batch(lengths)[1]
        expected, _, slopes = losses_and_slopes(plain, arguments)
        losses, _, found = losses_and_slopes(compiled, arguments)
        torch.testing.assert_close(losses[0], expected[0], atol=1e-5, rtol=1e-5)
        for name, slope in slopes.items():
            torch.testing.assert_close(found[name], slope, rtol=1e-4, atol=1e-5, msg=name)
    assert counters["stats"]["unique_graphs"] == graphs <= 4
    assert compiled_so_far()[0] == graphs
    assert 0 < compiled_so_far()[1] < time.perf_counter() - started
    assert not counters["graph_break"]
    torch._dynamo.reset()


RUNS = {
    "bert": {"run__deepspeed": "zero1"},
    "cells and prior": {
        "run__deepspeed": "zero2", "objective__cell_weight": 0.5, "objective__prior": "arithmetic",
    },
    "modernbert": {
        "run__deepspeed": "zero3", "model__architecture": "modernbert", "model__local_window": 8,
        "model__num_layers": 3,
    },
}  # fmt: skip


def train_all(configs):
    from pretrain.ranks import dist
    from pretrain.train import train

    found = []
    for config in configs:
        summary = train(config)
        padding = metrics(config.run.out, "train")[-1]["padding"]
        found.append((summary.losses, summary.cells_digest, summary.heldout["loss"], padding))
    dist.leave()
    return found


@pytest.fixture(scope="module")
def trained_both_ways(shards, tmp_path_factory):
    """Runs on two ranks in several micro-batches, in rows and end to end, by name."""
    folder = tmp_path_factory.mktemp("packing")
    copied = shutil.copytree(shards, folder / "shards")  # counts are kept beside them
    configs = {
        (name, how): tiny_config(
            copied, folder / f"{name} {how}", run__max_steps=4, optim__warmup_steps=1,
            batch__tokens_per_micro_batch=256, checkpoint__every_steps=4, run__packing=how,
            run__log_every_steps=4, **settings,
        )
        for name, settings in RUNS.items()
        for how in ("never", "always")
    }  # fmt: skip
    found = run_ranks(2, train_all, list(configs.values()))[0]
    return folder, dict(zip(configs, found, strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_a_packed_run_is_the_padded_one(name, trained_both_ways):
    folder, found = trained_both_ways
    (losses, digest, heldout, padding), (packed, packed_digest, packed_heldout, none) = (
        found[name, how] for how in ("never", "always")
    )
    np.testing.assert_allclose(packed, losses, rtol=1e-5)
    assert packed_digest == digest
    assert packed_heldout == pytest.approx(heldout, rel=1e-5)
    # What is left are rows that fill up the last batch of a bucket.
    assert none < padding / 2
    states = [final_state(folder / f"{name} {how}")["weight"] for how in ("never", "always")]
    for key, values in states[0].items():
        np.testing.assert_allclose(states[1][key], values, atol=5e-5, err_msg=key)


def test_the_record_says_what_computed(trained_both_ways):
    from pretrain.checkpoints import checkpoint

    for how in ("never", "always"):
        last = checkpoint.newest(trained_both_ways[0] / f"bert {how}")
        assert last is not None
        assert last.record["computing"] == {
            "device": "cpu", "precision": "fp32", "tf32": False, "packed": how == "always",
            "compile": "off",
        }  # fmt: skip


def test_the_heaviest_micro_batch_is_full(shards):
    """Memory is tried with all places, though filler needs one place a row."""
    import torch

    from data_prep.shards.reader import ShardSet
    from pretrain.batches.forward_arguments import to_device
    from pretrain.batches.step_dataset import StepDataset
    from pretrain.config import MaskingConfig

    data = StepDataset(ShardSet(shards), "train", 0, 2048, 512, MaskingConfig(), 0, 1, packs=True)
    heaviest = data.heaviest_micro_batch()
    assert heaviest.num_places == heaviest.input_ids.numel()
    steps = [m for step in range(data.plan.steps_per_epoch) for m in data[step].micro_batches]
    assert heaviest.num_places >= max(m.num_places for m in steps)
    assert len(heaviest.labels) >= max(len(m.labels) for m in steps)
    assert (heaviest.labels < 0).all()
    model = build("bert")
    losses, _ = model(*to_device(heaviest, torch.device("cpu")))
    losses.sum().backward()
    assert float(losses.abs().sum()) == 0
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)
