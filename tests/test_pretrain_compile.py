"""`run.compile`: compiled layers compute what the plain ones do, for shapes announced before."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from pretrain.config import load_config
from pretrain.ds_config import derive_ds_config
from pretrain.objective.masking import NO_LABEL
from tests.ranks import run_new_ranks
from tests.runs import cut_off, require_same_state, run_training, tiny_config
from tests.synthetic import make_shards
from tests.test_pretrain_masking import vocabulary

if TYPE_CHECKING:
    from pretrain.model.masked_gene_model import MaskedGeneModel

NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile on a CPU needs a C++ compiler",
)


def losses_and_slopes(model: MaskedGeneModel, rows: int, length: int, is_padded: bool):
    """Return the losses of a micro-batch and the gradients of all weights."""
    import torch

    torch.manual_seed(rows * length)
    ids = torch.randint(4, 40, (rows, length), dtype=torch.int32)
    places = torch.arange(0, rows * length, 5)
    labels = ids.flatten()[places].long()
    labels[-2:] = NO_LABEL
    mask = torch.arange(length).expand(rows, length) < length - 3 if is_padded else None
    model.zero_grad()
    losses, _ = model(ids, mask, places, labels)
    losses.sum().backward()
    return losses.detach(), {n: p.grad for n, p in model.named_parameters()}


def graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def one_compiler(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.mark.parametrize(
    "backend",
    # The same graphs, forward and backward; the other has them written in C++ too. In the default
    # tier: one graph for packed batches of any size (test_pretrain_packing.py).
    [
        pytest.param("aot_eager", marks=pytest.mark.long),
        pytest.param("inductor", marks=[pytest.mark.long, NEEDS_COMPILER]),
    ],
)
def test_compiled_layers_are_the_plain_ones(backend, tmp_path, monkeypatch):
    import torch
    from torch._dynamo.utils import counters

    from pretrain.model.masked_gene_model import build_model

    if backend != "inductor":
        in_torch = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda f, mode, **kwargs: in_torch(f, backend=backend, **kwargs)
        )
    settings = tiny_config(tmp_path, tmp_path / "run", model__num_layers=4).model
    plain, compiled = (build_model(settings, vocabulary(False), 0).train() for _ in range(2))
    torch._dynamo.reset()
    counters.clear()
    compiled.compile_layers("default", {(3, 20)})
    for is_padded in (True, False):
        expected, slopes = losses_and_slopes(plain, 3, 20, is_padded)
        before = graphs()
        losses, found = losses_and_slopes(compiled, 3, 20, is_padded)
        # One for the three layers before the last, one for the last.
        assert graphs() == before + 2
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
        for name, slope in slopes.items():
            torch.testing.assert_close(found[name], slope, rtol=1e-4, atol=1e-5, msg=name)
    # What came before is not compiled again; what nobody announced, and evaluation, are not at all.
    for rows, length in ((3, 20), (2, 30), (4, 20)):
        losses_and_slopes(compiled, rows, length, True)
    losses_and_slopes(compiled.eval(), 3, 20, True)
    assert graphs() == 4
    torch._dynamo.reset()


@pytest.mark.long
@NEEDS_COMPILER
def test_a_compiled_run_resumes_to_the_same_bits(tmp_path):
    whole = tiny_config(
        make_shards(tmp_path, num_cells=100, num_genes=12), tmp_path / "whole",
        run__compile="default", model__hidden_dropout=0.1, batch__tokens_per_step=64,
        batch__tokens_per_micro_batch=64,
    )  # fmt: skip
    # Inductor leaves an environment variable in the process that compiles.
    summary, count = run_new_ranks(1, _train_and_count, whole)[0]
    assert count > 0
    cut = cut_off(whole, tmp_path / "cut")
    resumed, _ = run_new_ranks(1, _train_and_count, cut, True)[0]
    assert resumed.first_step == 5
    assert resumed.losses == summary.losses[5:]
    require_same_state(cut.run.out, whole.run.out)


def _train_and_count(config, resume=False):
    return run_training(config, resume)[0], graphs()


def test_zero_3_is_refused(tmp_path):
    overrides = ["data.shards=x", "run.out=y", "run.compile=default", "run.deepspeed=zero3"]
    with pytest.raises(ValueError, match=r"run\.compile=default: not with ZeRO 3"):
        derive_ds_config(load_config("tiny", overrides))
