"""What DeepSpeed computes is what plain PyTorch computes: loss, norm, clipping, decay, schedule."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.shards.reader import ShardSet
from pretrain.config import RunConfig
from pretrain.ds_config import DEEPSPEED_CONFIG_FOLDER, derive_ds_config
from tests.ranks import run_ranks
from tests.runs import final_state, metrics, require_same_state, run_training, tiny_config
from tests.selection import selected

_ALL_FILES = sorted(p.stem for p in DEEPSPEED_CONFIG_FOLDER.glob("zero*.json"))
# A norm that is always exceeded, and a decay that shows after ten steps.
_SETTINGS = {
    "batch__tokens_per_micro_batch": 256,
    "optim__max_grad_norm": 0.05,
    "optim__weight_decay": 0.3,
    "run__max_steps": 8,
}


def plain_pytorch(config: RunConfig) -> dict:
    """Return losses, norms, rates and weights of a run, computed with torch alone in one process.

    Written from the definition: mean over hidden genes of the global batch, norm over all
    parameters, decay on everything that is no bias and no LayerNorm.
    """
    import torch

    from pretrain.batches.forward_arguments import to_device
    from pretrain.batches.step_dataset import StepDataset
    from pretrain.model.masked_gene_model import build_model

    torch.set_num_threads(1)
    shards = ShardSet(config.data.shards)
    model = build_model(config.model, shards.vocabulary, config.run.seed)
    named = dict(model.named_parameters())
    plain = [n for n in named if n.endswith("bias") or "LayerNorm" in n]
    optim, steps = config.optim, config.run.max_steps
    assert steps is not None
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[n] for n in named if n not in plain]},
            {"params": [named[n] for n in plain], "weight_decay": 0.0},
        ],
        weight_decay=optim.weight_decay, betas=(optim.beta1, optim.beta2), eps=optim.eps,
    )  # fmt: skip
    batch = config.batch
    data = StepDataset(
        shards, "train", config.run.seed, batch.tokens_per_step, batch.tokens_per_micro_batch,
        config.masking, 0, 1,
    )  # fmt: skip
    found: dict = {"losses": [], "norms": [], "rates": []}
    for step in range(steps):
        warm = (step + 1) / (optim.warmup_steps + 1)
        left = 1 - (step - optim.warmup_steps) / (steps - optim.warmup_steps)
        rate = optim.learning_rate * min(warm, left)
        for group in optimizer.param_groups:
            group["lr"] = rate
        micros = data[step].micro_batches
        hidden = sum(int((m.labels >= 0).sum()) for m in micros)
        total = 0.0
        for micro in micros:
            losses, _ = model(*to_device(micro, torch.device("cpu")))
            (losses.sum() / hidden).backward()
            total += float(losses.detach().sum())
        norm = torch.linalg.vector_norm(
            torch.stack([p.grad.norm() for p in named.values() if p.grad is not None])
        )
        for parameter in named.values():
            if parameter.grad is not None:
                parameter.grad *= min(1.0, optim.max_grad_norm / float(norm))
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(total / hidden)
        found["norms"].append(float(norm))
        found["rates"].append(rate)
    return found | {"weights": {n: p.detach().numpy().ravel() for n, p in named.items()}}


@pytest.fixture(scope="module")
def expected(shards, tmp_path_factory) -> dict:
    config = tiny_config(shards, tmp_path_factory.mktemp("plain") / "run", **_SETTINGS)
    return run_ranks(1, plain_pytorch, config)[0]


_PLAIN = [(1, f) for f in _ALL_FILES if "offload" not in f] + [(2, f) for f in _ALL_FILES]
_PLAIN_TEST = "test_equal_to_plain_pytorch"
_SHORT = [(1, "zero1"), *((2, f"zero{stage}") for stage in range(4))]


def train_all(configs: list[RunConfig]) -> list[tuple]:
    """Train one run after the other on these ranks: starting costs more than training."""
    from pretrain.ranks import dist
    from pretrain.train import train

    found = []
    for config in configs:
        summary = train(config)
        found.append((summary, final_state(config.run.out)["weight"]))
    dist.leave()
    return found


@pytest.fixture(scope="module")
def by_deepspeed(shards, tmp_path_factory, request) -> dict[tuple[int, str], tuple]:
    """(ranks, DeepSpeed file) -> run, summary and last weights of what DeepSpeed has trained."""
    folder, found = tmp_path_factory.mktemp("by_deepspeed"), {}
    asked = [(p["ranks"], p["deepspeed"]) for p in selected(request, _PLAIN_TEST)]
    for ranks in sorted({ranks for ranks, _ in asked}):
        cases = [case for case in asked if case[0] == ranks]
        configs = [
            tiny_config(shards, folder / f"{ranks}-{file}", run__deepspeed=file, **_SETTINGS)
            for _, file in cases
        ]
        results = run_ranks(ranks, train_all, configs)[0]
        found |= {
            case: (config, *result)
            for case, config, result in zip(cases, configs, results, strict=True)
        }
    return found


@pytest.mark.parametrize(
    ("ranks", "deepspeed"),
    [pytest.param(*c, marks=[] if c in _SHORT else pytest.mark.long) for c in _PLAIN],
)
def test_equal_to_plain_pytorch(ranks, deepspeed, expected, by_deepspeed):
    config, summary, weights = by_deepspeed[ranks, deepspeed]
    records = metrics(config.run.out, "train")
    np.testing.assert_allclose(summary.losses, expected["losses"], rtol=1e-5)
    np.testing.assert_allclose([m["grad_norm"] for m in records], expected["norms"], rtol=1e-4)
    np.testing.assert_allclose([m["learning_rate"] for m in records], expected["rates"], rtol=1e-12)
    assert min(expected["norms"]) > config.optim.max_grad_norm, "clipping was not tested"
    for name, weight in expected["weights"].items():
        np.testing.assert_allclose(weights[name], weight, atol=2e-5, err_msg=name)


def test_rate_and_norm_go_on_at_another_accumulation(expected, shards, tmp_path):
    settings = _SETTINGS | {"checkpoint__every_steps": 3, "checkpoint__keep": 3}
    config = tiny_config(shards, tmp_path / "run", **settings)
    run_ranks(1, run_training, config)
    for step in (6, 8):
        shutil.rmtree(config.run.out / "checkpoints" / f"step-{step:08d}")
    other = tiny_config(
        shards, config.run.out, **settings | {"batch__tokens_per_micro_batch": 1024}
    )
    summary, _ = run_ranks(2, run_training, other, True)[0]
    assert summary.first_step == 3
    records = metrics(config.run.out, "train")
    np.testing.assert_allclose([m["learning_rate"] for m in records], expected["rates"], rtol=1e-12)
    np.testing.assert_allclose([m["grad_norm"] for m in records], expected["norms"], rtol=1e-4)


@pytest.mark.parametrize("deepspeed", [pytest.param("zero1", marks=pytest.mark.long), "zero3"])
def test_activation_checkpointing_changes_nothing(deepspeed, expected, shards, tmp_path):
    changes = _SETTINGS | {"model__activation_checkpointing": True, "run__deepspeed": deepspeed}
    config = tiny_config(shards, tmp_path / "run", **changes)
    summary, weights = run_ranks(2, run_training, config)[0]
    np.testing.assert_allclose(summary.losses, expected["losses"], rtol=1e-5)
    for name, weight in expected["weights"].items():
        np.testing.assert_allclose(weights[name], weight, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "stage", [0, 1, *(pytest.param(s, marks=pytest.mark.long) for s in (2, 3))]
)
def test_bf16_has_master_weights_in_fp32(stage, shards, tmp_path):
    import torch

    from pretrain.checkpoints import checkpoint

    changes = {"run__precision": "bf16", "run__deepspeed": f"zero{stage}", "run__max_steps": 2,
               "optim__learning_rate": 1e-6, "optim__warmup_steps": 1,
               "checkpoint__every_steps": 1}  # fmt: skip
    config = tiny_config(shards, tmp_path / "run", **changes)
    run_ranks(1, run_training, config)
    last = final_state(config.run.out)["weight"]
    first = checkpoint.open_checkpoint(config.run.out / "checkpoints" / "step-00000001").reader()
    name = "bert.bert.embeddings.word_embeddings.weight"
    before = first.read("weight", name, 0, first.numel(name))
    after = torch.from_numpy(last[name])
    moved = (after - before)[after != before]
    # A step of 1e-6 is far below a bfloat16's last place (0.02 has 1e-4): only fp32 can hold it.
    assert moved.numel() > before.numel() / 2
    assert moved.abs().max() < 2e-6
    assert (after.bfloat16().float() != after).any()


def train_without_dry_pass(config: RunConfig):
    """Train as `run_training`, the first step without the pass before it."""
    from pretrain.engine import Engine

    own = Engine.dry_pass
    Engine.dry_pass = lambda self, heaviest: None  # type: ignore[method-assign]
    try:
        return run_training(config)
    finally:
        Engine.dry_pass = own  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (1, "fp32"),
        pytest.param(1, "bf16", marks=pytest.mark.long),
        pytest.param(0, "fp32", marks=pytest.mark.slow),
        pytest.param(2, "fp32", marks=pytest.mark.slow),
        pytest.param(3, "fp32", marks=pytest.mark.slow),
    ],
)
def test_the_dry_pass_changes_no_bit(stage, precision, shards, tmp_path):
    changes = {"run__deepspeed": f"zero{stage}", "run__precision": precision,
               "run__max_steps": 5, "model__hidden_dropout": 0.1}  # fmt: skip
    with_pass = tiny_config(shards, tmp_path / "with", **changes)
    without = tiny_config(shards, tmp_path / "without", **changes)
    one, weights = run_ranks(2, run_training, with_pass)[0]
    other, other_weights = run_ranks(2, train_without_dry_pass, without)[0]
    assert one.losses == other.losses
    for name, weight in weights.items():
        np.testing.assert_array_equal(other_weights[name], weight, err_msg=name)


@pytest.mark.parametrize("deepspeed", _ALL_FILES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_file_gives_a_dictionary(deepspeed, precision):
    config = tiny_config(Path("s"), Path("r"), run__deepspeed=deepspeed, run__precision=precision)
    derived = derive_ds_config(config)
    assert derived["managed_gradient_accumulation"] is False
    assert derived["zero_force_ds_cpu_optimizer"] is False
    stage = derived["zero_optimization"]["stage"]
    assert derived["gradient_clipping"] == (0 if stage == 0 else config.optim.max_grad_norm)
    assert ("bf16" in derived) == (precision == "bf16" and stage > 0)


@pytest.mark.slow
def test_weights_divided_inside_groups_too_are_zero_3(shards, tmp_path):
    """ZeRO++'s hpz, from a file of the user's own; groups of two stand for two nodes."""
    content = json.loads((DEEPSPEED_CONFIG_FOLDER / "zero3.json").read_text())
    content["zero_optimization"]["zero_hpz_partition_size"] = 2
    own = tmp_path / "hpz.json"
    own.write_text(json.dumps(content))
    runs = [tiny_config(shards, tmp_path / "zero3", run__deepspeed="zero3")]
    runs += [
        tiny_config(shards, tmp_path / name, run__deepspeed=str(own)) for name in ("hpz", "cut")
    ]
    for config in runs[:2]:
        run_ranks(4, run_training, config)
    require_same_state(runs[1].run.out, runs[0].run.out)
    shutil.copytree(runs[1].run.out, runs[2].run.out)
    shutil.rmtree(runs[2].run.out / "checkpoints" / "step-00000010")
    run_ranks(4, run_training, runs[2], True)
    require_same_state(runs[2].run.out, runs[0].run.out)
