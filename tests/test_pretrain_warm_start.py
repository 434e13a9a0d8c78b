"""Going on from exported and published weights: exact where genes are the same, told where not."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from data_prep.genes.vocabulary import (
    Vocabulary,
    from_dictionaries,
    load_vocabulary,
    open_vocabulary,
)
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.sources.source_spec import SourceOptions, source_at
from pretrain.cli import print_resolved, resolved
from pretrain.config import RunConfig, load_config
from pretrain.settings.model_settings import ModelConfig
from tests.ranks import run_ranks
from tests.runs import run_training, tiny_config
from tests.synthetic import make_cells

if TYPE_CHECKING:
    import torch
    from transformers import BertForMaskedLM

EMBEDDING = "bert.embeddings.word_embeddings.weight"
POSITIONS = "bert.embeddings.position_embeddings.weight"
ARCHITECTURE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}


def make_shards(folder: Path, genes: slice, vocabulary: Vocabulary | None = None, **kwargs) -> Path:
    """Return shards of fake cells with some of 230 genes; their vocabulary unless one is given."""
    cells = make_cells(num_genes=230, **kwargs)[:, genes].copy()
    cells.write_h5ad(folder / "cells.h5ad")
    options = PrepareOptions(heldout_share=0.1, block_cells=16, vocabulary_min_cells=1)
    prepare(
        [source_at(folder / "cells.h5ad", SourceOptions())], folder / "shards", vocabulary, options
    )
    return folder / "shards"


def going_on(folder: Path, shards: Path, out: Path, *more: str) -> RunConfig:
    """Return what ``geneloom pretrain --config continue`` makes of a folder, in small."""
    settings = [
        f"model.init_from={folder}", f"data.shards={shards}", f"run.out={out}",
        "data.num_workers=0", "run.threads=1", "run.epochs=50", "run.max_steps=4",
        "run.log_every_steps=1", "batch.tokens_per_step=1024", "batch.tokens_per_micro_batch=256",
        "optim.learning_rate=1e-3", "optim.warmup_steps=1", "evaluation.max_cells=20",
        "checkpoint.every_steps=2",
    ]  # fmt: skip
    return load_config("continue", [*settings, *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, float]:
    """An exported model of 200 genes, its shards, and its held-out loss in the end."""
    from pretrain.export.model_folder import export

    base = tmp_path_factory.mktemp("trained")
    shards = make_shards(base, slice(0, 200))
    config = tiny_config(shards, base / "run")
    summary, _ = run_ranks(1, run_training, config)[0]
    export(config.run.out, base / "model")
    return base / "model", shards, summary.heldout["loss"]


@pytest.fixture(scope="module")
def other_shards(tmp_path_factory) -> Path:
    """Shards without the first 20 genes of the trained model, and with 30 more."""
    return make_shards(tmp_path_factory.mktemp("other"), slice(20, 230), seed=3)


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A model folder to damage."""
    return Path(shutil.copytree(trained[0], tmp_path / "model"))


def start(folder: Path, vocabulary: Vocabulary, seed: int = 5, **changes):
    """Return (started model, record)."""
    from pretrain.model.masked_gene_model import build_model
    from pretrain.start.warm_start import start_weights

    config = ModelConfig(**ARCHITECTURE, init_from=folder, **changes)
    model = build_model(config, vocabulary, seed)
    return model, start_weights(model, vocabulary, config)


def logits_of(bert: BertForMaskedLM, num_tokens: int) -> torch.Tensor:
    import torch

    ids = torch.randint(2, num_tokens, (2, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    with torch.no_grad():
        return bert.eval()(input_ids=ids, attention_mask=mask).logits


def test_same_vocabulary_gives_the_same_model(trained):
    import torch

    from pretrain.export.model_folder import load_exported
    from pretrain.start.warm_start import describe

    expected, vocabulary = load_exported(trained[0])
    model, record = start(trained[0], vocabulary)
    n = vocabulary.num_tokens
    assert torch.equal(logits_of(model.bert, n), logits_of(expected, n))
    assert record["genes"]["kept"]["count"] == 200
    assert describe(record).endswith(
        "200 of 200 genes have weights; 0 are new; 0 are dropped; positions: 2,048 copied"
    )


def test_run_starts_where_the_other_ended_on_one_rank_and_on_two(trained, tmp_path):
    folder, shards, loss = trained
    # A first step too small to change a digit: its held-out loss is that of the start.
    still = ["optim.learning_rate=1e-12", "run.max_steps=2", "evaluation.every_steps=1"]
    still += ["model.hidden_dropout=0", "model.attention_dropout=0"]
    losses = []
    for ranks, stage in ((1, 1), (2, 1), (2, 3)):
        out = tmp_path / f"{ranks}-{stage}"
        config = going_on(folder, shards, out, f"run.deepspeed=zero{stage}", *still)
        summary, _ = run_ranks(ranks, run_training, config)[0]
        assert summary.heldout["loss"] == pytest.approx(loss, rel=1e-6)
        losses.append(summary.losses)
    np.testing.assert_allclose(losses[1:], losses[:1] * 2, rtol=1e-5)


def test_genes_are_matched_by_id(trained, other_shards):
    import torch

    from pretrain.export.model_folder import load_exported, token_dictionary
    from pretrain.model.masked_gene_model import build_model

    source, theirs = load_exported(trained[0])
    vocabulary = load_vocabulary(other_shards / "vocabulary.json")
    config = ModelConfig(**ARCHITECTURE, init_from=trained[0])
    fresh = build_model(config, vocabulary, 5).bert.state_dict()
    model, record = start(trained[0], vocabulary)
    state, before = model.bert.state_dict(), source.state_dict()
    rows, old_rows = token_dictionary(vocabulary), token_dictionary(theirs)
    kept = [g for g in vocabulary.genes if g in old_rows]
    here, there = [rows[g] for g in kept], [old_rows[g] for g in kept]
    assert [record["genes"][k]["count"] for k in ("kept", "new", "dropped")] == [180, 30, 20]
    assert record["genes"]["new"]["examples"] == [f"ENSG{i:011d}" for i in range(200, 210)]
    assert here != there
    new = [rows[f"ENSG{i:011d}"] for i in range(200, 230)]
    for name in (EMBEDDING, "cls.predictions.bias"):
        assert torch.equal(state[name][here], before[name][there])
        added = state[name][new] - fresh[name][new]
        mean = before[name][there].mean(dim=0).expand_as(added)
        torch.testing.assert_close(added, mean, atol=1e-7, rtol=0)
    assert torch.equal(state[EMBEDDING][:2], before[EMBEDDING][:2])
    assert torch.equal(state["cls.predictions.decoder.weight"], state[EMBEDDING])
    for name in state.keys() - {EMBEDDING, "cls.predictions.bias"}:
        if "decoder" not in name:
            assert torch.equal(state[name], before[name]), name
    again, _ = start(trained[0], vocabulary)
    assert torch.equal(again.bert.state_dict()[EMBEDDING], state[EMBEDDING])
    other, _ = start(trained[0], vocabulary, seed=6)
    assert not torch.equal(other.bert.state_dict()[EMBEDDING][new], state[EMBEDDING][new])


def test_new_genes_do_not_take_the_probability_of_the_others(trained, other_shards, copy):
    """A trained head scores most genes far below 0, where an untrained row would be."""
    from safetensors.torch import load_file, save_file

    weights = {k: t.clone() for k, t in load_file(copy / "model.safetensors").items()}
    weights["cls.predictions.bias"] -= 8
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    vocabulary = load_vocabulary(other_shards / "vocabulary.json")
    model, _ = start(copy, vocabulary)
    shares = logits_of(model.bert, vocabulary.num_tokens).softmax(dim=-1)[..., -30:].sum(dim=-1)
    assert float(shares.mean()) < 1.2 * 30 / 210


def test_record_of_a_run_with_other_genes(trained, other_shards, tmp_path):
    from pretrain.checkpoints import checkpoint
    from pretrain.export.model_folder import export

    config = going_on(trained[0], other_shards, tmp_path / "run")
    run_ranks(1, run_training, config)
    last = checkpoint.newest(config.run.out)
    assert last is not None
    init = last.record["init"]
    assert [init["genes"][k]["count"] for k in ("kept", "new", "dropped")] == [180, 30, 20]
    assert init == json.loads((config.run.out / "init.json").read_text())
    assert init["folder"] == str(trained[0])
    assert not [k for k in last.record["recipe"] if "init_" in k]
    export(config.run.out, tmp_path / "model")
    published = json.loads((tmp_path / "model" / "geneloom.json").read_text())["init"]
    assert published == init | {"folder": trained[0].name}
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"(SHA-256 `{init['weights_sha256'][:12]}`): 180 of 210 genes had weights" in card
    first = json.loads((trained[0] / "geneloom.json").read_text())
    assert first["init"] is None


def test_other_medians_are_a_warning(trained, other_shards, caplog):
    from pretrain.export.model_folder import load_exported
    from pretrain.start.warm_start import log_start

    _, same = load_exported(trained[0])
    with caplog.at_level("INFO"):
        log_start(start(trained[0], same)[1])
        # Twice the medians order a cell's genes as before.
        scaled = Vocabulary(same.genes, same.medians * 2, same.special_tokens, same.max_length)
        log_start(start(trained[0], scaled)[1])
    assert [r.levelname for r in caplog.records] == ["INFO", "INFO"]
    changed = same.medians.copy()
    changed[:50] *= 1.5
    log_start(start(trained[0], Vocabulary(same.genes, changed, same.special_tokens, 2048))[1])
    assert caplog.records[-1].levelname == "WARNING"
    assert "medians of 50 of these genes (25.0%) are others (half of them by more than 0.5)" in (
        caplog.text
    )


def published_folder(
    folder: Path, vocabulary: Vocabulary, form: str, positions: int | None = None, **architecture
) -> BertForMaskedLM:
    """Write a model and dictionaries as Geneformer publishes them; return the model."""
    import torch
    from safetensors.torch import save_file
    from transformers import BertConfig, BertForMaskedLM

    from pretrain.export.model_folder import token_dictionary

    folder.mkdir()
    settings = {
        "attention_probs_dropout_prob": 0.02,
        "hidden_act": "relu",
        "hidden_dropout_prob": 0.02,
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": positions or vocabulary.max_length,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "use_cache": True,
        "vocab_size": vocabulary.num_tokens,
        **architecture,
    }
    torch.manual_seed(11)
    bert = BertForMaskedLM(BertConfig(**settings))
    # As if it was trained: no two rows alike, no bias 0.
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    written = {
        "architectures": ["BertForMaskedLM"],
        "gradient_checkpointing": False,
        "model_type": "bert",
        "position_embedding_type": "absolute",
        "transformers_version": "4.6.0",
    }
    (folder / "config.json").write_text(json.dumps(settings | written))
    tokens = {k: np.int64(v) for k, v in token_dictionary(vocabulary).items()}
    medians = dict(zip(vocabulary.genes, vocabulary.medians, strict=True))
    if form == "pickle":
        state = bert.state_dict()
        state["bert.embeddings.position_ids"] = torch.arange(vocabulary.max_length)[None]
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "token_dictionary.pkl").write_bytes(pickle.dumps(tokens))
        (folder / "gene_median_dictionary.pkl").write_bytes(pickle.dumps(medians))
    else:
        tied = {k: t for k, t in bert.state_dict().items() if "decoder" not in k}
        save_file(tied, folder / "model.safetensors", metadata={"format": "pt"})
        plain = {k: int(v) for k, v in tokens.items()}
        (folder / "token_dictionary_gc104M.json").write_text(json.dumps(plain))
        (folder / "gene_median_dictionary_gc104M.json").write_text(json.dumps(medians))
    return bert


def dictionaries(with_cls: bool, genes: range = range(200)) -> Vocabulary:
    special = ["<pad>", "<mask>", *(["<cls>", "<eos>"] if with_cls else [])]
    ids = [f"ENSG{i:011d}" for i in genes]
    tokens = {name: i for i, name in enumerate([*special, *ids])}
    return from_dictionaries(tokens, {g: 1.0 + i % 7 for i, g in enumerate(ids)})


@pytest.mark.parametrize(("form", "with_cls"), [("pickle", False), ("json", True)])
def test_published_folder_gives_the_same_model(form, with_cls, tmp_path):
    import torch

    vocabulary = dictionaries(with_cls)
    bert = published_folder(tmp_path / "model", vocabulary, form)
    model, record = start(tmp_path / "model", vocabulary, init_vocabulary=tmp_path / "model")
    n = vocabulary.num_tokens
    assert torch.equal(logits_of(model.bert, n), logits_of(bert, n))
    assert record["vocabulary_sha256"] == vocabulary.sha256
    assert record["positions"]["copied"] == (4096 if with_cls else 2048)


def test_run_from_published_weights_to_longer_cells_with_special_tokens(tmp_path):
    """V1's layout to V2's: <cls>, <eos> and half of the positions are new."""
    from pretrain.start.warm_start import describe

    published_folder(tmp_path / "model", dictionaries(False), "pickle")
    shards = make_shards(tmp_path, slice(0, 230), dictionaries(True, range(10, 230)))
    more = f"model.init_vocabulary={tmp_path / 'model'}"
    config = going_on(tmp_path / "model", shards, tmp_path / "run", more)
    run_ranks(1, run_training, config)
    init = json.loads((config.run.out / "init.json").read_text())
    assert init["positions"] == {"copied": 2048, "new": 2048, "cut": 0}
    assert init["special_tokens"] == {"new": ["<cls>", "<eos>"], "dropped": []}
    assert [init["genes"][k]["count"] for k in ("kept", "new", "dropped")] == [190, 30, 10]
    assert init["weights_file"] == "pytorch_model.bin"
    assert "special tokens new: <cls> <eos>; positions: 2,048 copied, 2,048 new" in describe(init)


def test_special_tokens_and_places_can_become_fewer(tmp_path):
    import torch

    bert = published_folder(tmp_path / "model", dictionaries(True), "json")
    model, record = start(
        tmp_path / "model", dictionaries(False), init_vocabulary=tmp_path / "model"
    )
    assert record["special_tokens"] == {"new": [], "dropped": ["<cls>", "<eos>"]}
    assert record["positions"] == {"copied": 2048, "new": 0, "cut": 2048}
    state, before = model.bert.state_dict(), bert.state_dict()
    assert torch.equal(state[EMBEDDING], before[EMBEDDING][[0, 1, *range(4, 204)]])
    assert torch.equal(state[POSITIONS], before[POSITIONS][:2048])


def test_published_dictionaries_of_both_versions(real_data, tmp_path):
    import torch

    from pretrain.model.masked_gene_model import build_model
    from pretrain.start.warm_start import describe, start_weights

    first = open_vocabulary(real_data / "geneformer_v1_dicts")
    second = open_vocabulary(real_data / "geneformer_v2_dicts")
    small: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": 8,
        "num_heads": 1,
        "intermediate_size": 8,
    }
    names = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
    bert = published_folder(tmp_path / "v1", first, "pickle", intermediate_size=8, **names)
    config = ModelConfig(
        **small, init_from=tmp_path / "v1", init_vocabulary=real_data / "geneformer_v1_dicts"
    )
    model = build_model(config, second, 0)
    record = start_weights(model, second, config)
    assert [record["genes"][k]["count"] for k in ("kept", "new", "dropped")] == [19623, 648, 5801]
    assert record["medians"]["changed"] > 19_000
    gene = "ENSG00000141510"
    rows = (second.token_of[gene], first.token_of[gene])
    assert rows[0] != rows[1]
    assert torch.equal(
        model.bert.state_dict()[EMBEDDING][rows[0]], bert.state_dict()[EMBEDDING][rows[1]]
    )
    assert "19,623 of 20,271 genes have weights; 648 are new: ENSG" in describe(record)
    with pytest.raises(ValueError, match=r"has 25,426 tokens, the vocabulary 20,275"):
        wrong = {"init_vocabulary": real_data / "geneformer_v2_dicts"}
        start_weights(model, second, config.model_copy(update=wrong))


def _without(name: str):
    def change(weights: dict[str, torch.Tensor]) -> None:
        del weights[name]

    return change


def _add_layer(weights: dict[str, torch.Tensor]) -> None:
    import torch

    weights["bert.encoder.layer.2.output.dense.bias"] = torch.zeros(32)


def _widen(weights: dict[str, torch.Tensor]) -> None:
    import torch

    weights["bert.encoder.layer.0.intermediate.dense.bias"] = torch.zeros(65)


def _untie(weights: dict[str, torch.Tensor]) -> None:
    weights["cls.predictions.decoder.weight"] = weights[EMBEDDING] + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("cls.predictions.bias"), "cls.predictions.bias is missing"),
        (_without(EMBEDDING), f"{EMBEDDING} is missing"),
        (_add_layer, "bert.encoder.layer.2.output.dense.bias is foreign"),
        (_widen, r"layer.0.intermediate.dense.bias is \[65\] instead of \[64\]"),
        (_untie, "decoder.weight differs from .*only tied heads"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message, copy, trained):
    # Loaded tensors are mapped from the file, which is overwritten below.
    from safetensors.torch import load_file, save_file

    from pretrain.export.model_folder import load_exported

    weights = {k: t.clone() for k, t in load_file(copy / "model.safetensors").items()}
    change(weights)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        start(copy, load_exported(trained[0])[1])


def test_unreadable_weights(copy, trained):
    import torch

    from pretrain.export.model_folder import load_exported

    _, vocabulary = load_exported(trained[0])
    weights = copy / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        start(copy, vocabulary)
    weights.write_bytes(b"torn")
    with pytest.raises(ValueError, match="weights cannot be read"):
        start(copy, vocabulary)
    weights.unlink()
    with pytest.raises(ValueError, match="has no weights; expected model.safetensors or pytorch"):
        start(copy, vocabulary)
    # A pickle that holds more than tensors.
    torch.save({"model": Path("anything")}, copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="weights cannot be read"):
        start(copy, vocabulary)


def test_dictionaries_that_do_not_belong(copy, trained, tmp_path):
    from pretrain.export.model_folder import load_exported

    _, vocabulary = load_exported(trained[0])
    shifted = dictionaries(False, range(500, 700))
    with pytest.raises(
        ValueError, match=r"200 genes that .* only 0 are the same; are both Ensembl"
    ):
        start(copy, shifted)
    for name in ("vocabulary.json", "geneloom.json"):
        (copy / name).unlink()
    with pytest.raises(ValueError, match="model.init_vocabulary="):
        start(copy, vocabulary)
    more = dictionaries(False, range(201))
    more.save(tmp_path / "more.json")
    with pytest.raises(ValueError, match="has 202 tokens, the vocabulary 203"):
        start(copy, vocabulary, init_vocabulary=tmp_path / "more.json")


def test_half_of_the_smaller_vocabulary_is_enough(trained):
    from pretrain.export.model_folder import load_exported

    _, same = load_exported(trained[0])
    start(trained[0], dictionaries(False, range(100, 300)))
    start(trained[0], dictionaries(False, range(100, 1000)))
    with pytest.raises(ValueError, match="only 99 are the same"):
        start(trained[0], dictionaries(False, range(101, 301)))


REQUIRED = ["data.shards=shards", "run.out=out"]


def test_architecture_comes_from_the_folder(trained):
    config = load_config("continue", [*REQUIRED, f"model.init_from={trained[0]}"])
    chosen = {k: getattr(config.model, k) for k in ARCHITECTURE}
    assert chosen == ARCHITECTURE
    more = ["model.hidden_dropout=0.3", "model.num_layers=2", "model.layer_norm_eps=1e-12"]
    config = load_config("continue", [*REQUIRED, f"model.init_from={trained[0]}", *more])
    assert (config.model.hidden_dropout, config.model.attention_dropout) == (0.3, 0.0)


def test_given_architecture_must_be_the_folders(trained):
    from pretrain.export.model_folder import load_exported
    from pretrain.model.masked_gene_model import build_model
    from pretrain.start.warm_start import start_weights

    with pytest.raises(ValueError) as caught:
        load_config(
            "tiny",
            ["data.shards=shards", "optim.lr=1", f"model.init_from={trained[0]}"],
        )
    for part in (
        "another architecture: hidden_size 64 given, 32 there, num_heads 4 given, 2 there",
        "intermediate_size 128 given, 64 there; leave these fields out",
        "'run.out' is required",
        "'optim.lr' is no setting",
    ):
        assert part in str(caught.value)
    assert "num_layers" not in str(caught.value)
    with pytest.raises(ValueError, match="num_layers 6 given, 2 there, hidden_size 256 given, 32"):
        load_config("geneformer_v1_6l", [*REQUIRED, f"model.init_from={trained[0]}"])
    wrong = ARCHITECTURE | {"activation": "gelu", "init_from": trained[0]}
    config = ModelConfig.model_validate(wrong)
    _, vocabulary = load_exported(trained[0])
    with pytest.raises(ValueError, match="activation gelu given, relu there"):
        start_weights(build_model(config, vocabulary, 0), vocabulary, config)


def test_folders_that_are_no_models(trained, copy, tmp_path):
    def load(folder, *more):
        return load_config("continue", [*REQUIRED, f"model.init_from={folder}", *more])

    with pytest.raises(ValueError, match="'model.init_from': .*nowhere: no config.json; expected"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="run folder; `geneloom export` makes"):
        load(trained[0].parent / "run")
    with pytest.raises(ValueError, match="init_vocabulary belongs to init_from"):
        load_config("continue", [*REQUIRED, "model.init_vocabulary=somewhere"])
    content = json.loads((copy / "config.json").read_text())
    for change, message in [
        ({"model_type": "gpt2"}, "type 'gpt2'"),
        ({"hidden_act": "silu"}, "model.activation.*'relu' or 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "another kind of BERT: position_embedding"),
    ]:
        (copy / "config.json").write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message):
            load(copy)
    del content["num_hidden_layers"]
    (copy / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has no num_hidden_layers"):
        load(copy)


def test_run_goes_on_after_its_first_weights_are_gone(copy, trained, other_shards, tmp_path):
    from pretrain.checkpoints import checkpoint
    from pretrain.device import with_precision

    def config(out: str) -> RunConfig:
        return going_on(copy, other_shards, tmp_path / out)

    reference, weights = run_ranks(1, run_training, config("whole"))[0]
    run_ranks(1, run_training, config("cut"))
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000004")
    before = json.loads((tmp_path / "cut" / "init.json").read_text())
    shutil.rmtree(copy)
    (tmp_path / "cut" / "init.json").unlink()
    resumed, again = run_ranks(1, run_training, config("cut"), True)[0]
    assert resumed.losses == reference.losses[2:]
    for name, weight in weights.items():
        np.testing.assert_array_equal(again[name], weight, err_msg=name)
    last = checkpoint.newest(tmp_path / "cut")
    assert last is not None
    assert last.step == 4
    assert last.record["init"] == before
    assert json.loads((tmp_path / "cut" / "init.json").read_text()) == before
    # The run's own file of settings does as well.
    own = load_config(tmp_path / "cut" / "config.yaml")
    assert own == with_precision(config("cut"), None)
    with pytest.raises(ValueError, match="no config.json"):
        config("new")
    with pytest.raises(AssertionError, match="the run started from .*; give model.init_from="):
        changed = own.model_copy(update={"model": ModelConfig(**ARCHITECTURE)})
        run_ranks(1, run_training, changed, True)


def test_other_first_weights_are_refused_on_resume(trained, copy, tmp_path, caplog):
    from safetensors.torch import load_file, save_file

    from pretrain.export.model_folder import load_exported
    from pretrain.start.warm_start import require_same_start

    _, vocabulary = load_exported(trained[0])
    record = {"init": start(trained[0], vocabulary)[1]}
    given = ModelConfig(init_from=trained[0])
    require_same_start(record, given, False)
    # Another copy of the same weights is no other start.
    require_same_start(record, ModelConfig(init_from=copy), False)
    with pytest.raises(ValueError, match="holds no weights to compare"):
        require_same_start(record, ModelConfig(init_from=tmp_path / "gone"), False)
    with pytest.raises(ValueError, match="resume: the run started from random weights"):
        require_same_start({"init": None}, given, False)
    # Checkpoints of earlier versions do not say.
    require_same_start({}, ModelConfig(), False)
    weights = {k: t.clone() for k, t in load_file(copy / "model.safetensors").items()}
    save_file({k: t + 1 for k, t in weights.items()}, copy / "model.safetensors")
    changed = ModelConfig(init_from=copy)
    with pytest.raises(ValueError, match=r"with weights \w{12}; model.init_from=.* holds \w{12}"):
        require_same_start(record, changed, False)
    require_same_start(record, changed, True)
    assert "holds" in caplog.text


def test_dry_run_tells_how_many_genes_match(trained, other_shards, tmp_path, capsys):
    config = going_on(trained[0], other_shards, tmp_path / "run")
    print_resolved(resolved(config))
    shown = capsys.readouterr().out
    assert "180 of 210 genes have weights; 30 are new: ENSG00000000200, " in shown
    assert "20 are dropped: ENSG00000000000, " in shown
    print_resolved(resolved(config, resume=True))
    assert "weights of the newest checkpoint" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
