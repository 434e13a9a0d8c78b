"""The model's exactness, in one process."""

import numpy as np
import pytest
import torch

from pretrain.config import ModelConfig, OptimConfig
from pretrain.model import build_model
from pretrain.optim import build_optimizer, learning_rate_at
from tests.test_pretrain_masking import vocabulary

CONFIG = ModelConfig(
    num_layers=2, hidden_size=32, num_heads=2, intermediate_size=64,
    hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG, vocabulary(False), seed=0).eval()


def batch(seed=0, rows=3, length=40):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 502, (rows, length), generator=generator)
    places = torch.arange(0, rows * length, 7)
    return ids, places, ids.flatten()[places]


def test_head_on_masked_places_equals_the_full_head(model):
    ids, places, labels = batch()
    losses, hits = model(ids, None, places, labels)
    logits = model.bert(input_ids=ids).logits.flatten(0, 1)[places]
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    assert (hits == (logits.argmax(-1) == labels)).all()


def test_padding_and_neighbours_change_nothing(model):
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
    ids, _, _ = batch()
    empty = torch.zeros(0, dtype=torch.int64)
    losses, _ = model(ids, None, empty, empty)
    total = losses.sum()
    total.backward()
    assert float(total) == 0
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)
    model.zero_grad()


def test_seed_decides_the_weights():
    a, b, c = (build_model(CONFIG, vocabulary(False), seed) for seed in (1, 1, 2))
    assert torch.equal(next(a.parameters()), next(b.parameters()))
    assert not torch.equal(next(a.parameters()), next(c.parameters()))


def test_no_decay_on_biases_and_layer_norm(model):
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
