"""The cell objective against its definition: values, gradients, whole trainings on any ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import RunConfig, load_config
from tests.ranks import run_ranks
from tests.runs import final_state, metrics, require_same_state, tiny_config

STEPS, CUT = 6, 3
# A norm that is always exceeded. Weights that are no powers of 2: a wrong factor shows.
_SETTINGS = {
    "run__max_steps": STEPS, "checkpoint__every_steps": CUT, "optim__max_grad_norm": 0.05,
    "masking__probability": 0.3,
}  # fmt: skip
_BOTH = {"gene_weight": 0.7, "cell_weight": 1.3}
_CELLS_ALONE = {"gene_weight": 0.0, "cell_weight": 1.0}
MODELS = {
    "bert": {"num_layers": 2},
    "modernbert": {"architecture": "modernbert", "num_layers": 3, "local_window": 8},
}


def config_of(shards: Path, out: Path, objective: dict, **changes) -> RunConfig:
    weights = {f"objective__{name}": value for name, value in objective.items()}
    return tiny_config(shards, out, **(_SETTINGS | weights | changes))


def by_definition(network, micro, objective: dict, first_gene: int):
    """Return (sum of gene losses, hidden genes, [losses of cells]) of a micro-batch, cell by cell.

    With Hugging Face's network as it is: its states, its head.
    """
    import torch

    found = network(micro.input_ids, micro.attention_mask, output_hidden_states=True)
    # Of a ModernBERT the last of these has passed the final norm, as what `base_model` returns.
    states = found.hidden_states[-1]
    is_bert = network.config.model_type == "bert"
    head = network.cls if is_bert else (lambda x: network.decoder(network.head(x)))
    genes, num_genes, cells = torch.zeros(()), 0, []
    length = micro.input_ids.shape[1]
    rows, hidden = (x.tolist() for x in (micro.targets.rows_H, micro.targets.genes_H))
    places = (micro.targets.visible_BL).tolist()
    for row in range(len(micro.input_ids)):
        mine = [gene for r, gene in zip(rows, hidden, strict=True) if r == row and gene >= 0]
        shown = [p for p in range(length) if places[row][p]]
        assert all(int(micro.input_ids[row, p]) >= first_gene for p in shown)
        if mine and shown:
            log_p = head(states[row, shown].mean(dim=0)[None])[0].log_softmax(dim=-1)
            cells.append(-sum(log_p[gene] for gene in mine) / len(mine))
    logits = found.logits.flatten(0, 1).log_softmax(dim=-1)
    for place, gene in zip(micro.masked_places.tolist(), micro.labels.tolist(), strict=True):
        if gene >= 0:
            genes, num_genes = genes - logits[place, gene], num_genes + 1
    return genes, num_genes, cells


def plain_pytorch(config: RunConfig) -> dict:
    """Return losses and weights of a run, and its held-out loss of cells, with torch alone."""
    import torch

    from data_prep.shards.reader import ShardSet
    from pretrain.batches.step_dataset import StepDataset
    from pretrain.config import ObjectiveConfig
    from pretrain.counting.baselines import RankBaselines
    from pretrain.model.masked_gene_model import build_model
    from pretrain.objective.masking import EVALUATION_MASKING

    torch.set_num_threads(1)
    shards, optim, objective = ShardSet(config.data.shards), config.optim, config.objective
    vocab, weights = shards.vocabulary, objective.model_dump()
    model = build_model(config.model, vocab, config.run.seed)
    named = dict(model.named_parameters())
    plain = [n for n in named if n.endswith("bias") or "LayerNorm" in n]
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[n] for n in named if n not in plain]},
            {"params": [named[n] for n in plain], "weight_decay": 0.0},
        ],
        weight_decay=optim.weight_decay, betas=(optim.beta1, optim.beta2), eps=optim.eps,
    )  # fmt: skip
    # One micro-batch a step.
    data = StepDataset(
        shards, "train", 0, 1024, 1024, config.masking, 0, 1, objective=objective
    )  # fmt: skip
    found: dict = {"losses": [], "cell_losses": []}
    for step in range(STEPS):
        warm, left = (step + 1) / (optim.warmup_steps + 1), 1 - (step - optim.warmup_steps) / 3
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate * min(warm, left)
        (micro,) = data[step].micro_batches
        genes, number, cells = by_definition(model.bert, micro, weights, vocab.first_gene_token)
        assert number == data[step].masked
        of_cells = sum(cells) / len(cells)
        of_genes = genes / max(number, 1)
        (weights["gene_weight"] * of_genes + weights["cell_weight"] * of_cells).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(float(of_genes))
        found["cell_losses"].append(float(of_cells))
    # Every held-out cell, as evaluation hides its genes.
    data = StepDataset(
        shards, "heldout", 0, 16_384, 1024, EVALUATION_MASKING, 0, 1,
        objective=ObjectiveConfig(cell_weight=1),
    )  # fmt: skip
    table, guesses, losses = RankBaselines(shards, 50_000).log_probabilities["unigram"][0], [], []
    with torch.no_grad():
        for step in range(data.plan.steps_per_epoch):
            for micro in data[step].micro_batches:
                assert micro.targets
                losses += by_definition(model.bert, micro, weights, 0)[2]
                for row in range(len(micro.input_ids)):
                    mine = micro.targets.genes_H[micro.targets.rows_H == row].numpy()
                    guesses.append(-table[mine[mine >= 0]].mean())
    found["heldout"] = float(sum(losses) / len(losses)), float(np.mean(guesses))
    return found | {"weights": {n: p.detach().numpy().ravel() for n, p in named.items()}}


def train_all(configs: list[RunConfig], resumed: RunConfig | None = None) -> list:
    """Train one run after the other; `resumed` goes on from a copy of the first's half."""
    from pretrain.ranks import dist
    from pretrain.train import train

    found = [train(config) for config in configs]
    if resumed:
        shutil.copytree(configs[0].run.out, resumed.run.out)
        shutil.rmtree(resumed.run.out / "checkpoints" / f"step-{STEPS:08d}")
        found.append(train(resumed, resume=True))
    dist.leave()
    return found


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """name -> (configuration, summary) of trainings, and what plain PyTorch makes of both kinds."""
    folder = tmp_path_factory.mktemp("cells")

    def config(name, objective=_BOTH, **changes):
        settings = {"evaluation__max_cells": 1000} | changes
        return config_of(shards, folder / name, objective, **settings)

    alone = [
        config("zero0", run__deepspeed="zero0"),
        config("cells alone", _CELLS_ALONE, batch__tokens_per_micro_batch=512),
        config("bf16", run__precision="bf16"),
    ]
    again = config("again", run__deepspeed="zero0")
    shared = [
        config("zero1", batch__tokens_per_micro_batch=128),
        config("zero2", run__deepspeed="zero2", model__activation_checkpointing=True),
        config("zero3", run__deepspeed="zero3", batch__tokens_per_micro_batch=512),
    ]
    configs = [*alone, again, *shared]
    one = run_ranks(1, train_all, alone, again)[0]
    two = run_ranks(2, train_all, shared)[0]
    plain = {
        kind: run_ranks(1, plain_pytorch, config("plain", objective))[0]
        for kind, objective in (("both", _BOTH), ("cells alone", _CELLS_ALONE))
    }
    found = zip(configs, one + two, strict=True)
    return {c.run.out.name: (c, summary) for c, summary in found}, plain


@pytest.mark.parametrize("name", ["zero0", "cells alone", "zero1", "zero2", "zero3"])
def test_trainings_are_plain_pytorch(name, runs):
    config, summary = runs[0][name]
    expected = runs[1][name if name == "cells alone" else "both"]
    np.testing.assert_allclose(summary.losses, expected["losses"], rtol=1e-5)
    np.testing.assert_allclose(summary.cell_losses, expected["cell_losses"], rtol=1e-5)
    assert len(set(summary.cell_losses)) == STEPS
    weights = final_state(config.run.out)["weight"]
    for key, values in expected["weights"].items():
        np.testing.assert_allclose(weights[key], values, atol=2e-5, err_msg=key)
    (heldout,) = metrics(config.run.out, "heldout")
    found = heldout["cell_loss"], heldout["baseline_unigram_cell_loss"]
    np.testing.assert_allclose(found, expected["heldout"], rtol=1e-5)
    records = metrics(config.run.out, "train")
    assert [m["cell_loss"] for m in records] == summary.cell_losses
    no_loss = [None] * STEPS if name == "cells alone" else summary.losses
    assert [m["loss"] for m in records] == no_loss


def test_resumed_to_the_last_bit(runs):
    (whole, summary), (again, later) = runs[0]["zero0"], runs[0]["again"]
    assert later.losses == summary.losses[CUT:]
    assert later.cell_losses == summary.cell_losses[CUT:]
    require_same_state(again.run.out, whole.run.out)


def test_bf16_is_near(runs):
    (_, summary), (_, exact) = runs[0]["bf16"], runs[0]["zero0"]
    np.testing.assert_allclose(summary.cell_losses, exact.cell_losses, rtol=0.01)


def micro_batch():
    """Return a made micro-batch of five cells, and (row, place) of what is hidden.

    Full; padded; with a kept and a random gene at hidden places; all genes hidden; none hidden.
    """
    import torch

    from pretrain.batches.step_batch import MicroBatch
    from pretrain.objective.cell_objective import cell_targets

    generator = torch.Generator().manual_seed(1)
    length, sizes = 40, [40, 17, 30, 6, 22]
    real = torch.arange(length) < torch.tensor(sizes)[:, None]
    ids = torch.stack([4 + torch.randperm(60, generator=generator)[:length] for _ in sizes])
    ids[~real] = 0
    for row, size in enumerate(sizes):
        ids[row, 0], ids[row, size - 1] = 2, 3
    hidden = [
        (0, 5),
        (0, 6),
        (0, 38),
        (1, 1),
        (2, 3),
        (2, 4),
        (2, 28),
        *((3, p) for p in (1, 2, 3, 4)),
    ]
    places = torch.tensor([row * length + place for row, place in hidden])
    labels = ids.flatten()[places]
    shown = ids.clone()
    shown.view(-1)[places] = 1
    shown[2, 3], shown[2, 4] = ids[2, 3], 50
    places, labels = (
        torch.cat([x, torch.full((3,), rest)]) for x, rest in ((places, 0), (labels, -100))
    )
    shown = shown.int()
    targets = cell_targets(shown, places, labels, 4)
    return MicroBatch(shown, real, places, labels, labels.float(), np.arange(5), targets), hidden


def test_visible_are_genes_that_are_not_hidden():
    micro, hidden = micro_batch()
    assert micro.targets
    expected = (micro.input_ids >= 4).numpy()
    for row, place in hidden:
        expected[row, place] = False
    visible = micro.targets.visible_BL.numpy()
    np.testing.assert_array_equal(visible, expected)
    assert visible.sum(axis=1).tolist() == [35, 14, 25, 0, 20]
    assert micro.targets.scored_rows.tolist() == [0, 1, 2]
    asked = micro.targets.genes_H >= 0
    np.testing.assert_array_equal(micro.targets.genes_H[asked], micro.labels[:7])


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_hugging_faces_network(name):
    import torch

    from pretrain.batches.forward_arguments import to_device
    from pretrain.model.masked_gene_model import build_model
    from tests.test_pretrain_modernbert import model_settings, vocabulary

    settings = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 48, **MODELS[name]}
    if name == "bert":
        from pretrain.settings.model_settings import ModelConfig

        config = ModelConfig(**settings, hidden_dropout=0.0, attention_dropout=0.0)
    else:
        config = model_settings(**settings)
    model = build_model(config, vocabulary(has_cls=True), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    micro, _ = micro_batch()
    genes, _, cells = by_definition(model.bert, micro, _BOTH, 4)
    named = dict(model.named_parameters())
    expected = torch.autograd.grad(genes + sum(cells), list(named.values()))
    losses, _, of_cells = model(*to_device(micro, torch.device("cpu")))
    torch.testing.assert_close(of_cells[:3], torch.stack(cells), atol=1e-5, rtol=1e-5)
    assert of_cells[3:].tolist() == [0, 0]
    found = torch.autograd.grad(losses.sum() + of_cells.sum(), list(named.values()))
    for key, slope, theirs in zip(named, found, expected, strict=True):
        torch.testing.assert_close(slope, theirs, atol=1e-4, rtol=1e-3, msg=key)


def test_the_gradient_reaches_each_visible_state_and_no_other():
    import torch

    from pretrain.objective.cell_objective import cell_losses, mean_of_visible

    micro, _ = micro_batch()
    assert micro.targets
    visible, rows, genes = micro.targets
    states = torch.randn(5, 40, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    table = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    losses = cell_losses(mean_of_visible(states, visible) @ table.T, rows, genes)
    (slopes,) = torch.autograd.grad(losses.sum(), states)
    scored = visible & (torch.arange(5) < 3)[:, None]
    assert slopes[scored].abs().min() > 0
    assert slopes[~scored].abs().max() == 0


def test_filler_rows_have_gradients_of_exact_zeros(runs):
    import torch

    from data_prep.shards.reader import ShardSet
    from pretrain.batches.forward_arguments import to_device
    from pretrain.batches.step_dataset import StepDataset
    from pretrain.model.masked_gene_model import build_model

    config, _ = runs[0]["zero0"]
    shards = ShardSet(config.data.shards)
    data = StepDataset(
        shards, "train", 0, 1024, 256, config.masking, 0, 1, objective=config.objective
    )
    model = build_model(config.model, shards.vocabulary, 0)
    losses, _, of_cells = model(*to_device(data.heaviest_micro_batch(), torch.device("cpu")))
    (losses.sum() + of_cells.sum()).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert not of_cells.any()


def test_a_resume_with_another_objective_names_both(shards, tmp_path):
    from pretrain.checkpoints.checkpoint import require_same

    def record(objective):
        recipe = config_of(shards, tmp_path, objective).recipe()
        return {"vocabulary_sha256": "v", "shards_fingerprint": "s", "recipe": recipe}

    older, cells = record({}), record(_CELLS_ALONE)
    assert not [k for k in older["recipe"] if k.startswith("objective")]
    require_same(older, record({"gene_weight": 1, "cell_weight": 0}), False)
    require_same(cells, record(_CELLS_ALONE), False)
    with pytest.raises(ValueError, match=r"objective.cell_weight: 1.3 -> 1.0; give the old"):
        require_same(record(_BOTH), record(_BOTH | {"cell_weight": 1}), False)
    prior = record({})
    prior["recipe"]["objective.prior"] = "arithmetic"
    for allow_changes in (False, True):
        for before, after, words in (
            (older, cells, "trained on hidden genes, these settings ask for cells; give the old"),
            (record(_BOTH), older, "trained on hidden genes and cells, these settings ask for hid"),
            (older, prior, "ask for hidden genes with the prior 'arithmetic'; give the old"),
        ):
            with pytest.raises(ValueError, match=words):
                require_same(before, after, allow_changes)


def test_what_cannot_be_is_refused():
    given = ["data.shards=.", "run.out=out"]
    with pytest.raises(ValueError, match="both 0: nothing would be learned; give one"):
        load_config("tiny", [*given, "objective.gene_weight=0"])
    with pytest.raises(ValueError, match="objective.cell_weight.*greater than or equal to 0"):
        load_config("tiny", [*given, "objective.cell_weight=-1"])
