"""The model's exactness, in one process."""

import math

import numpy as np
import pytest

from pretrain.config import OptimConfig
from pretrain.settings.model_settings import ModelConfig
from tests.test_pretrain_masking import vocabulary

pytestmark = pytest.mark.quick

CONFIG = ModelConfig(
    num_layers=2, hidden_size=32, num_heads=2, intermediate_size=64,
    hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    from pretrain.model.masked_gene_model import build_model

    return build_model(CONFIG, vocabulary(False), seed=0).eval()


def batch(seed=0, rows=3, length=40):
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 502, (rows, length), generator=generator)
    places = torch.arange(0, rows * length, 7)
    return ids, places, ids.flatten()[places]


def test_head_on_masked_places_equals_the_full_head(model):
    import torch

    ids, places, labels = batch()
    losses, guesses = model(ids, None, places, labels)
    logits = model.bert(input_ids=ids).logits.flatten(0, 1)[places]
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    own = logits.gather(1, labels[:, None])
    assert guesses.dtype == torch.int64
    assert guesses.tolist() == (logits > own).sum(dim=-1).tolist()
    assert (guesses == 0).tolist() == (logits.argmax(-1) == labels).tolist()


def test_places_equal_a_sorted_list():
    """Distinct logits: the place in the order of guesses, each gene asked for once."""
    import torch

    from pretrain.model.head_scores import guess_places

    generator = np.random.default_rng(0)
    logits = np.stack([generator.permutation(500) for _ in range(500)]).astype(np.float32)
    labels = generator.permutation(500)
    expected = [np.argsort(-row).tolist().index(g) for row, g in zip(logits, labels, strict=True)]
    got = guess_places(torch.from_numpy(logits), torch.from_numpy(labels))
    assert got.tolist() == expected


def test_ties_are_shared_out():
    """Equal logits, as bfloat16 makes them, must not make every one of them the first guess."""
    import torch

    from pretrain.model.head_scores import guess_places

    labels = torch.arange(2, 502)
    knows_nothing = guess_places(torch.zeros(500, 502), labels)
    assert sorted(knows_nothing.tolist()) == list(range(2, 502)), "token modulo 502 tied genes"
    logits = torch.zeros(4, 20)
    logits[:, 3] = 5.0
    logits[:, [6, 7, 8]] = 4.0
    assert guess_places(logits, torch.tensor([3, 6, 7, 8])).tolist() == [0, 1, 2, 3]


def test_no_label_and_no_number_have_no_place():
    import torch

    from pretrain.model.head_scores import guess_places

    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    logits[2, 5] = math.nan
    logits[1] = -9.0
    assert guess_places(logits, torch.tensor([-100, -100, 5])).tolist() == [20, 20, 20]


def test_padding_and_neighbours_change_nothing(model):
    import torch

    ids, places, labels = batch(rows=1)
    alone, _ = model(ids, None, places, labels)
    padded = torch.zeros((3, 64), dtype=torch.int64)
    padded[1, :40] = ids
    padded[2, :5] = 9
    mask = torch.zeros((3, 64), dtype=torch.bool)
    mask[0, 0] = mask[1, :40] = mask[2, :5] = True
    together, _ = model(padded, mask, places + 64, labels)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_no_masked_place_gives_an_attached_zero(model):
    import torch

    ids, _, _ = batch()
    empty = torch.zeros(0, dtype=torch.int64)
    model.zero_grad()
    losses, _ = model(ids, None, empty, empty)
    total = losses.sum()
    total.backward()
    assert float(total) == 0
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)
    model.zero_grad()


def test_seed_decides_the_weights():
    import torch

    from pretrain.model.masked_gene_model import build_model

    a, b, c = (build_model(CONFIG, vocabulary(False), seed) for seed in (1, 1, 2))
    assert torch.equal(next(a.parameters()), next(b.parameters()))
    assert not torch.equal(next(a.parameters()), next(c.parameters()))


def test_no_decay_on_biases_and_layer_norm(model):
    from pretrain.optim import build_optimizer

    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.5))
    decay, plain = optimizer.param_groups
    assert decay["weight_decay"] == 0.5
    assert plain["weight_decay"] == 0
    assert all(p.ndim >= 2 for p in decay["params"])
    assert all(p.ndim == 1 for p in plain["params"])
    count = sum(len(g["params"]) for g in optimizer.param_groups)
    assert count == len(list(model.parameters()))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rate_is_a_function_of_the_step(schedule):
    from pretrain.optim import learning_rate_at

    config = OptimConfig(learning_rate=1.0, schedule=schedule, warmup_steps=10)
    rates = np.array([learning_rate_at(s, 110, config) for s in range(110)])
    assert 0 < rates[0] < 0.1
    assert (np.diff(rates[:11]) > 0).all()
    assert rates[10] == 1.0
    if schedule == "constant":
        assert (rates[10:] == 1).all()
    else:
        assert (np.diff(rates[10:]) < 0).all()
        assert rates[-1] < 0.011
        assert abs(rates[60] - 0.5) < 1e-9


def dropped_by_hand(query, key, value, heads, real, dropout, seed):
    """Attention with every weight written down; which ones are dropped, hash by hash."""
    import torch

    from pretrain.model import cpu_kernels

    kept = torch.ones(len(query), heads, query.shape[1], key.shape[1])
    threshold = int(dropout * 2**32)
    for cell, head, asking, asked in np.ndindex(*kept.shape):
        of_head = cpu_kernels.mix(np.uint32(seed), np.uint32(cell * heads + head))
        of_row = cpu_kernels.mix(np.uint32(of_head), np.uint32(asking))
        kept[cell, head, asking, asked] = (
            cpu_kernels.mix(np.uint32(of_row), np.uint32(asked)) >= threshold
        )
    query, key, value = (
        x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value)
    )
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~real[:, None, None, :], -torch.inf).softmax(-1)
    context = (weights * kept / (1 - dropout)) @ value
    return context.transpose(1, 2).flatten(2), 1 - kept.mean().item()


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 2e-6), ("bfloat16", 0.04)])
def test_attention_with_dropout_on_a_cpu(dtype, atol):
    """Padded cells, fewer places that ask than are asked: values and slopes."""
    import torch

    from pretrain.model.attention import attention

    dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, places, 32, generator=generator).to(dtype).requires_grad_()
        for places in (7, 45, 45)
    ]
    slope = torch.randn(2, 7, 32, generator=generator)
    real = torch.arange(45) < torch.tensor([[45], [30]])
    torch.manual_seed(3)
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(3)
    found = attention(*inputs, 4, real, 0.2)
    slopes = torch.autograd.grad(found, inputs, slope.to(dtype))
    expected, dropped = dropped_by_hand(*inputs, 4, real, 0.2, seed)
    assert dropped == pytest.approx(0.2, abs=0.02)
    torch.testing.assert_close(found.float(), expected, atol=atol, rtol=0.02)
    for slope_found, slope_expected in zip(
        slopes, torch.autograd.grad(expected, inputs, slope), strict=True
    ):
        torch.testing.assert_close(slope_found, slope_expected, atol=atol, rtol=0.02)


def test_attention_without_dropout_is_torchs():
    import torch

    from pretrain.model.attention import attention

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 20, 32, generator=generator) for _ in range(3))
    real = torch.arange(20) < torch.tensor([[20], [7]])
    heads = [x.unflatten(-1, (4, -1)).transpose(1, 2) for x in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *heads, attn_mask=real[:, None, None]
    )
    found = attention(query, key, value, 4, real, 0.0)
    torch.testing.assert_close(found, expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(query, key, value, 4, real, 1e-9), found)


def test_slopes_of_labels_are_torchs(model):
    """The loss of hidden genes and all slopes equal cross-entropy over written down logits."""
    import torch

    ids, places, labels = batch()
    labels = torch.where(torch.arange(len(labels)) < 15, labels, -100)
    model.zero_grad()
    losses, _ = model(ids, None, places, labels)
    (losses * torch.arange(len(labels))).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model.bert(input_ids=ids).logits.flatten(0, 1)[places]
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    (expected * torch.arange(len(labels))).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            found[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-6), ("bfloat16", 4e-3)])
@pytest.mark.parametrize("has_offset", [False, True])
def test_losses_of_a_gpu_some_rows_at_a_time(dtype, atol, has_offset, monkeypatch):
    """Against torch's cross-entropy of all logits at once; no float32 copy of them is made."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from pretrain.model import head_scores

    monkeypatch.setattr(head_scores, "CHUNK_BYTES", 7 * 4 * 500)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 500, generator=generator).to(getattr(torch, dtype)).requires_grad_()
    labels = torch.randint(500, (40,), generator=generator)
    labels[33:] = -100
    added = torch.randn(40, 500, generator=generator)
    weights = torch.rand(40, generator=generator)
    whole = logits.float() + (added if has_offset else 0)
    expected = torch.nn.functional.cross_entropy(whole, labels, reduction="none")
    (slopes,) = torch.autograd.grad((expected * weights).sum(), logits)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.dtype == torch.float32:
                largest = max(largest, found.numel())
            return found

    given = logits.detach().clone().requires_grad_()
    with Sizes():
        head = given * 1  # used up
        offset = (lambda rows: added[rows] * 1) if has_offset else None
        losses, places = head_scores._ChunkedScores.apply(head, labels, offset)
        (losses * weights).sum().backward()
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=1e-6)
    assert places.tolist() == head_scores.guess_places(whole.detach(), labels).tolist()
    assert given.grad is not None
    torch.testing.assert_close(given.grad, slopes, atol=atol, rtol=1e-2)
    assert (given.grad[33:] == 0).all()
    if dtype == "bfloat16":
        assert largest <= 7 * 500
    with torch.no_grad():
        again, _ = head_scores._ChunkedScores.apply(logits.detach().clone(), labels, offset)
    torch.testing.assert_close(again, losses)


def test_asked_places_hold_every_hidden_gene():
    """Rows with none, some and most hidden genes; filler behind them."""
    import torch

    from pretrain.model.masked_gene_model import asked_places

    places = torch.tensor([2, 5, 31, 33, 35, 39, 0, 0])
    labels = torch.tensor([7, 7, 7, 7, 7, 7, -100, -100])
    asked, slots = asked_places(places, labels, 4, 10)
    assert asked.shape == (4, 4)
    assert asked.flatten()[slots[:6]].tolist() == places[:6].tolist()
    assert asked[1].tolist() == [10] * 4
    assert (asked // 10 == torch.arange(4)[:, None]).all()
