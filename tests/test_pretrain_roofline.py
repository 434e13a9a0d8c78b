"""The prediction of speed on a GPU: its counts are the model's, and the page is what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.plan.flops import GPUS

ROOT = Path(__file__).resolve().parent.parent
# What changes shapes alone, or is made on the host, launches nothing.
_LAUNCH_NOTHING = {
    "view", "expand", "slice", "alias", "detach", "transpose", "unsqueeze", "squeeze", "select",
    "split", "t", "permute", "_unsafe_view", "as_strided", "unfold", "lift_fresh", "empty",
    "empty_like", "new_empty", "_reshape_alias", "is_same_size",
}  # fmt: skip


def launches(architecture: str, num_layers: int, **changes) -> int:
    """Return the operations of a pass forward and backward, on a device without numbers."""
    import torch

    from tests.test_pretrain_packing import Operations, build, micro_batch, without_numbers

    model = build(architecture, num_layers=num_layers, **changes).to("meta", torch.bfloat16)
    seen = Operations()
    with seen.mode():
        losses, _ = model(*without_numbers(micro_batch()[1]))
        losses.sum().backward()
    return sum(n for k, n in seen.counts.items() if k.partition(".")[2] not in _LAUNCH_NOTHING)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("bert", {"hidden_dropout": 0.02, "attention_dropout": 0.02}), ("global last", {})],
)
def test_launches_are_those_of_the_model(architecture, changes):
    from pretrain.plan import roofline

    kind = "bert" if architecture == "bert" else "modernbert"
    found = {n: launches(architecture, n, **changes) for n in (2, 5)}
    assert (found[5] - found[2]) / 3 == pytest.approx(roofline._LAYER[kind], rel=0.05)
    assert found[2] - 2 * roofline._LAYER[kind] == pytest.approx(roofline._BASE, rel=0.2)


def predicted(*settings, gpu="h200", passes=2, places=50_000, compiled=True):
    from pretrain.plan.corpus import read_config
    from pretrain.plan.roofline import roofline

    config = read_config("geneformer_v1_6l", list(settings))
    return roofline(config, GPUS[gpu], 25_426, 10_300_000, 1_200, passes, places, compiled)


def test_what_binds():
    large, small = predicted(), predicted(places=500)
    assert "memory" in large.limit or "arithmetic" in large.limit
    assert small.limit == "the host"
    assert small.tokens_per_s == pytest.approx(2 * 500 / small.host_s)
    assert large.tokens_per_s == pytest.approx(2 * 50_000 / large.device_s)
    assert predicted(gpu="a100").tokens_per_s < predicted(gpu="h100").tokens_per_s
    assert predicted(compiled=False).tokens_per_s < large.tokens_per_s
    # Never above what the device can do.
    assert 0 < large.mfu < 0.7


def test_operations_are_those_of_the_formula():
    from pretrain.plan.corpus import read_config
    from pretrain.plan.flops import flops_per_token

    found = predicted()
    by_formula = flops_per_token(read_config("geneformer_v1_6l", []), 25_426, 1_200) * 100_000
    attention = next(p.flops for p in found.parts if p.name == "attention")
    assert sum(p.flops for p in found.parts) - attention / 7 == pytest.approx(by_formula, rel=1e-6)
    assert found.mfu == pytest.approx(by_formula / found.device_s / 989e12)


def test_the_page_holds_the_predictions():
    from docs.generate import roofline_table

    assert roofline_table() in (ROOT / "docs" / "benchmarks.md").read_text()
