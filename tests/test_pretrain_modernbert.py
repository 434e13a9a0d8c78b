"""ModernBERT: what trains is Hugging Face's own, on any ranks, and it stops and goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.saved_tensors import kept_for_backward

SETTINGS = {
    "architecture": "modernbert", "num_layers": 3, "hidden_size": 32, "num_heads": 2,
    "intermediate_size": 48, "local_window": 8,
}  # fmt: skip
STEPS = 4


def model_settings(**changes):
    from pretrain.settings.model_settings import ModelConfig

    return ModelConfig.model_validate(SETTINGS | changes)


def vocabulary(has_cls: bool = False):
    from data_prep.genes.vocabulary import Vocabulary

    special = {"<pad>": 0, "<mask>": 1} | ({"<cls>": 2, "<eos>": 3} if has_cls else {})
    genes = tuple(f"ENSG{i:011d}" for i in range(60))
    return Vocabulary(genes, np.linspace(0.5, 4.0, 60), special, 256)


def run_config(shards: Path, out: Path, **changes):
    from pretrain.config import RunConfig
    from tests.runs import tiny_config

    sections = {k: v for k, v in changes.items() if k.startswith("model__")}
    others = {k: v for k, v in changes.items() if k not in sections}
    steps = {"run__max_steps": STEPS, "checkpoint__every_steps": STEPS // 2}
    config = tiny_config(shards, out, **(steps | {"optim__warmup_steps": 1} | others))
    model = SETTINGS | {k.removeprefix("model__"): v for k, v in sections.items()}
    return RunConfig.model_validate(config.model_dump() | {"model": model})


def train_all(configs, resumed):
    """Train one run after the other; those of `resumed` go on from a copy of the first's half."""
    from pretrain.ranks import dist
    from pretrain.train import train

    losses = [train(config).losses for config in configs]
    for config in resumed:
        shutil.copytree(configs[0].run.out, config.run.out)
        shutil.rmtree(config.run.out / "checkpoints" / f"step-{STEPS:08d}")
        losses.append(train(config, resume=True).losses)
    dist.leave()
    return losses


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """Runs on one rank: whole, resumed, resumed at another stage; and on two at stages 1 to 3."""
    from tests.ranks import run_ranks

    folder = tmp_path_factory.mktemp("modernbert")

    def config(name, stage):
        return run_config(
            shards, folder / name, run__deepspeed=stage, model__init_genes="counted"
        )  # fmt: skip

    whole = config("whole", "zero0")
    again = [config("again", "zero0"), config("other stage", "zero3")]
    (one,) = run_ranks(1, train_all, [whole], again)
    shared = [config(stage, stage) for stage in ("zero1", "zero2", "zero3")]
    two = run_ranks(2, train_all, shared, [])[0]
    names = ["whole", "again", "other stage", "zero1", "zero2", "zero3"]
    return folder, dict(zip(names, one + two, strict=True))


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory) -> Path:
    from pretrain.export.model_folder import export

    out = tmp_path_factory.mktemp("exported") / "model"
    export(runs[0] / "whole", out)
    return out


@pytest.mark.parametrize(
    ("num_layers", "global_every", "has_cls"), [(3, 3, False), (4, 3, True), (2, 1, False)]
)
def test_hidden_genes_as_hugging_face_computes_them(num_layers, global_every, has_cls, tmp_path):
    """Last layer local, global; blocks of neighbours; padded rows. Losses and gradients."""
    import torch
    from transformers import AutoModelForMaskedLM

    from pretrain.model.masked_gene_model import build_model

    model = build_model(
        model_settings(num_layers=num_layers, global_every=global_every), vocabulary(has_cls), 0
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # random weights of the usual size hardly look at their neighbours
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    model.bert.save_pretrained(tmp_path)
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "ModernBertForMaskedLM"
    length = 100
    ids = torch.randint(4, 60, (3, length), generator=generator)
    real = torch.arange(length) < torch.tensor([length, 61, 5])[:, None]
    for mask in (None, real):
        places = torch.tensor([0, 7, 40, length + 3, length + 60, 2 * length, 2 * length + 4])
        labels = ids.flatten()[places]
        model.zero_grad(), theirs.zero_grad()
        losses, _ = model(ids, mask, places, labels)
        logits = theirs(input_ids=ids, attention_mask=mask if mask is None else mask.long()).logits
        expected = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1)[places], labels, reduction="none"
        )
        torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
        losses.sum().backward(), expected.sum().backward()
        slopes = dict(theirs.named_parameters())
        for name, weight in model.bert.named_parameters():
            torch.testing.assert_close(weight.grad, slopes[name].grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("length", "half"), [(300, 4), (256, 16), (50, 16)])
@pytest.mark.parametrize("is_padded", [False, True])
def test_window_is_a_mask_over_all_places(length, half, is_padded):
    import torch

    from pretrain.model.window_attention import window_attention

    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, length, 4, dtype=torch.float64) for _ in range(3))
    place = torch.arange(length)
    seen = ((place[:, None] - place).abs() <= half).expand(3, -1, -1)
    lengths = torch.tensor([length, length // 2, 3])
    real = place < lengths[:, None]
    if is_padded:
        seen = seen & real[:, None]
    scores = (query @ key.transpose(2, 3) / 2).masked_fill(~seen[:, None], -torch.inf)
    expected = scores.softmax(-1) @ value
    wanted = real[:, None, :, None].expand_as(expected) if is_padded else expected.isfinite()
    found = window_attention(query, key, value, half, real if is_padded else None)
    assert found.isfinite().all()
    torch.testing.assert_close(found[wanted], expected[wanted])
    asked = torch.stack([torch.randperm(int(n))[:3] for n in lengths])
    index = asked[:, None, :, None].expand(-1, 2, -1, 4)
    few = window_attention(
        query.gather(2, index), key, value, half, real if is_padded else None, asked
    )
    torch.testing.assert_close(few, expected.gather(2, index))


def test_same_losses_on_any_ranks_and_stages(runs):
    folder, losses = runs
    from tests.runs import final_state

    expected = final_state(folder / "whole")["weight"]
    for name in ("zero1", "zero2", "zero3"):
        np.testing.assert_allclose(losses[name], losses["whole"], rtol=1e-6)
        found = final_state(folder / name)["weight"]
        for key, values in expected.items():
            np.testing.assert_allclose(found[key], values, atol=2e-5, err_msg=f"{name}: {key}")


def test_resume_is_exact(runs):
    from tests.runs import require_same_state

    folder, losses = runs
    assert losses["again"] == losses["whole"][STEPS // 2 :]
    require_same_state(folder / "again", folder / "whole")
    np.testing.assert_allclose(losses["other stage"], losses["whole"][STEPS // 2 :], rtol=1e-5)


def test_export_is_hugging_faces(runs, exported):
    """The checkpoint's weights, the very ones, under the names of the model's own class."""
    import torch
    from transformers import AutoModelForMaskedLM

    from pretrain.checkpoints import checkpoint
    from pretrain.export.model_folder import load_exported, random_twin

    last = checkpoint.newest(runs[0] / "whole")
    assert last is not None
    reader = last.reader()
    loaded = AutoModelForMaskedLM.from_pretrained(exported)
    for name, weight in loaded.named_parameters():
        stored = reader.read("weight", f"bert.{name}", 0, weight.numel())
        assert torch.equal(stored, weight.flatten()), name
    own, vocab = load_exported(exported)
    assert loaded.config.pad_token_id == vocab.pad_token
    assert loaded.config.cls_token_id is None is loaded.config.sep_token_id
    assert loaded.config.max_position_embeddings == vocab.max_length
    assert type(random_twin(own, 0)) is type(own) is type(loaded)
    card = (exported / "README.md").read_text()
    assert "A ModernBertForMaskedLM: 3 layers of width 32" in card
    assert "genes start from what was counted: medians in 16 dimensions, 16 of 50 comp" in card
    init = json.loads((exported / "geneloom.json").read_text())["init"]
    assert init == json.loads((runs[0] / "whole" / "init.json").read_text())
    assert init["counted"].keys() == {"medians", "svd", "frequency"}


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_few_layers_are_what_they_were_trained_as(num_layers, tmp_path):
    """One or two layers are the same network for several distances between global layers."""
    from pretrain.model.masked_gene_model import build_model
    from pretrain.settings.architecture import is_same, read_architecture

    settings = model_settings(num_layers=num_layers, global_every=3)
    build_model(settings, vocabulary(), 0).bert.config.save_pretrained(tmp_path)
    theirs = read_architecture(tmp_path / "config.json")
    assert is_same("global_every", 3, theirs) and is_same("global_every", "3", theirs)
    assert is_same("global_every", 1, theirs) == (num_layers == 1)
    assert is_same("global_every", 2, theirs) == (num_layers <= 2)


def test_warm_start_keeps_the_weights(exported):
    import torch

    from pretrain.config import load_config
    from pretrain.export.model_folder import load_exported
    from pretrain.model.masked_gene_model import build_model
    from pretrain.start.warm_start import describe, start_weights

    theirs, vocab = load_exported(exported)
    settings = ["data.shards=.", "run.out=out", f"model.init_from={exported}"]
    config = load_config("continue", settings).model
    assert {k: getattr(config, k) for k in SETTINGS} == SETTINGS
    assert (config.global_every, config.rotary_base, config.layer_norm_eps) == (3, 160_000, 1e-5)
    model = build_model(config, vocab, 5)
    record = start_weights(model, vocab, config)
    expected = theirs.state_dict()
    for name, weight in model.bert.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert "positions" not in describe(record)


def test_other_architectures_and_folders_are_refused(runs, exported, shards, tmp_path):
    from pretrain.checkpoints.checkpoint import newest, require_same
    from pretrain.config import load_config
    from tests.runs import tiny_config

    given = ["data.shards=.", "run.out=out"]
    with pytest.raises(
        ValueError, match=r"holds a modernbert, model.architecture is bert: .*leave"
    ):
        load_config("continue", [*given, f"model.init_from={exported}", "model.architecture=bert"])
    with pytest.raises(ValueError, match="local_window 64 given, 8 there"):
        load_config("continue", [*given, f"model.init_from={exported}", "model.local_window=64"])
    last = newest(runs[0] / "whole")
    assert last is not None
    now = last.record | {"recipe": tiny_config(shards, tmp_path).recipe()}
    with pytest.raises(ValueError, match="holds a modernbert, model.architecture is bert; give"):
        require_same(last.record, now, allow_changes=True)
    narrower = last.record["recipe"] | {"model.local_window": 16}
    with pytest.raises(ValueError, match="another model: model.local_window: 8 -> 16"):
        require_same(last.record, last.record | {"recipe": narrower}, allow_changes=True)
    foreign = shutil.copytree(exported, tmp_path / "foreign")
    content = json.loads((foreign / "config.json").read_text())
    for key, value, message in (
        ("norm_bias", True, "another kind of ModernBERT: norm_bias True instead of False"),
        ("layer_types", ["full_attention"] * 2 + ["sliding_attention"], "not every n-th"),
        ("model_type", "t5", "type 't5', neither 'bert' nor 'modernbert'"),
    ):
        (foreign / "config.json").write_text(json.dumps(content | {key: value}))
        with pytest.raises(ValueError, match=message):
            load_config("continue", [*given, f"model.init_from={foreign}"])


def test_records_without_an_architecture_are_berts(shards, tmp_path):
    from pretrain.checkpoints.checkpoint import require_same
    from tests.runs import tiny_config

    recipe = tiny_config(shards, tmp_path).recipe()
    assert recipe.pop("model.architecture") == "bert"
    assert not [k for k in recipe if "counted" in k or "window" in k]
    old = {"vocabulary_sha256": "v", "shards_fingerprint": "s", "recipe": recipe}
    require_same(old, old | {"recipe": tiny_config(shards, tmp_path).recipe()}, False)
    now = old | {"recipe": run_config(shards, tmp_path).recipe()}
    with pytest.raises(ValueError, match="holds a bert, model.architecture is modernbert"):
        require_same(old, now, allow_changes=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"architecture": "bert"}, r"local_window 8: of architecture modernbert, but .* a bert"),
        ({"attention_dropout": 0.02}, "attention_dropout 0.02: of architecture bert"),
        ({"local_window": 7}, "multiple of 2"),
        ({"hidden_size": 12, "num_heads": 4}, "is odd"),
        ({"counted": ["svd"]}, r"counted \('svd',\): belongs to init_genes=counted"),
        ({"init_genes": "counted", "counted": ["svd", "svd"]}, "each part once"),
        ({"init_genes": "counted", "init_from": "x"}, "leave one of them out"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        model_settings(**wrong)


@pytest.mark.parametrize("changes", [{}, {"num_layers": 1}, {"intermediate_size": 100}])
def test_parameters_of_a_plan(changes):
    from pretrain.model.masked_gene_model import build_model
    from pretrain.plan.needs import num_parameters

    vocab, settings = vocabulary(), model_settings(**changes)
    model = build_model(settings, vocab, 0)
    expected = sum(p.numel() for p in model.parameters())
    assert num_parameters(settings, vocab.num_tokens, vocab.max_length) == expected


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_of_a_plan_are_what_autograd_keeps(dropout):
    from pretrain.model.masked_gene_model import build_model
    from pretrain.plan.corpus import read_config
    from pretrain.plan.needs import activation_bytes

    def planned(layers):
        given = [f"model.{k}={v}" for k, v in SETTINGS.items() if k != "num_layers"]
        given += [f"model.num_layers={layers}", f"model.hidden_dropout={dropout}"]
        return read_config("tiny", given)

    def kept(layers):
        model = build_model(planned(layers).model, vocabulary(), 0).train()
        return kept_for_backward(model, 60, 2, 256)

    per_token = [activation_bytes(planned(n), on_gpu=False) for n in (7, 4)]
    assert (per_token[0] - per_token[1]) * 512 == pytest.approx(kept(7) - kept(4), rel=0.1)


@pytest.mark.slow
def test_compiled_layers_are_the_plain_ones():
    import torch
    from torch._dynamo.utils import counters

    from pretrain.model.masked_gene_model import build_model

    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile on a CPU needs a C++ compiler")
    settings = model_settings(num_layers=5)
    plain, compiled = (build_model(settings, vocabulary(), 0).train() for _ in range(2))
    torch._dynamo.reset()
    counters.clear()
    compiled.compile_layers("default", {(2, 80)})
    ids, places = torch.randint(4, 60, (2, 80)), torch.arange(0, 160, 5)
    for mask in (None, torch.arange(80).expand(2, 80) < 70):
        slopes = []
        for model in (plain, compiled):
            model.zero_grad()
            losses, _ = model(ids, mask, places, ids.flatten()[places])
            losses.sum().backward()
            slopes.append((losses.detach(), {n: p.grad for n, p in model.named_parameters()}))
        torch.testing.assert_close(*slopes, atol=1e-4, rtol=1e-4)
    # First, local, global, last; each with and without a mask.
    assert counters["stats"]["unique_graphs"] == 8
