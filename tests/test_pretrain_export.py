"""Exports are Hugging Face's, carry their identity, and give the same logits."""

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.runs import run_training, tiny_config


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    config = tiny_config(shards, tmp_path_factory.mktemp("export") / "run", run__precision="bf16")
    run_ranks(2, run_training, config)
    return config.run.out


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    from pretrain.export.model_folder import export

    out = tmp_path_factory.mktemp("exported") / "model"
    export(run, out)
    return out


def test_same_logits_after_reloading(run, exported, shards):
    import torch
    from transformers import AutoModelForMaskedLM

    from pretrain.checkpoints import checkpoint, zero_state
    from pretrain.export.model_folder import load_exported
    from pretrain.model.masked_gene_model import build_model

    model, vocabulary = load_exported(exported)
    trained = build_model(tiny_config(shards, run).model, vocabulary, seed=99)
    last = checkpoint.newest(run)
    assert last is not None
    zero_state.load_weights(trained, last.reader())
    ids = torch.randint(2, vocabulary.num_tokens, (2, 30))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    expected = trained.bert.eval()(input_ids=ids, attention_mask=mask).logits
    again = AutoModelForMaskedLM.from_pretrained(exported).eval()
    for loaded in (model, again):
        torch.testing.assert_close(
            loaded(input_ids=ids, attention_mask=mask).logits, expected, atol=1e-6, rtol=1e-6
        )
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_record_and_card(run, exported, shards):
    record = json.loads((exported / "geneloom.json").read_text())
    manifest = json.loads((shards / "manifest.json").read_text())
    assert record["vocabulary_sha256"] == manifest["vocabulary_sha256"]
    assert record["step"] == 10
    card = (exported / "README.md").read_text()
    assert f"{record['heldout']['loss']:.4f}" in card
    for score in ("top10", "baseline_unigram_by_rank_top10"):
        assert f" {record['heldout'][score]:.2%} |" in card
    assert "unigram by rank" in card
    tokens = json.loads((exported / "token_dictionary.json").read_text())
    assert tokens["<mask>"] == 1
    assert len(tokens) == manifest["num_tokens"]


def test_refusals(run, exported, tmp_path):
    from pretrain.export.model_folder import export, load_exported

    with pytest.raises(ValueError, match="not an empty folder"):
        export(run, exported)
    with pytest.raises(ValueError, match="no model_config.json"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_exported(tmp_path)
    assert not (tmp_path / "out").exists()


def test_geneformer_folder_with_its_dictionaries(exported, tmp_path):
    """A published folder has weights only; its dictionaries are given beside it."""
    import shutil

    from pretrain.export.model_folder import load_exported

    weights = Path(shutil.copytree(exported, tmp_path / "weights"))
    for name in ("vocabulary.json", "geneloom.json"):
        (weights / name).unlink()
    with pytest.raises(ValueError, match="give --vocab"):
        load_exported(weights)
    model, vocabulary = load_exported(weights, weights)
    _, own = load_exported(exported)
    assert vocabulary.sha256 == own.sha256
    assert model.config.vocab_size == own.num_tokens


def test_weights_of_older_pytorch(exported, tmp_path):
    """Tensors are read as they are; what else a pickle would run is refused."""
    import shutil

    import torch
    from safetensors.torch import load_file

    from pretrain.export.model_folder import load_exported, model_digest

    old = Path(shutil.copytree(exported, tmp_path / "old"))
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    model, vocabulary = load_exported(old)
    expected, _ = load_exported(exported)
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    digest = model_digest(old, vocabulary)
    torch.save({"bert": Path("anything")}, old / "pytorch_model.bin")
    assert model_digest(old, vocabulary) != digest
    with pytest.raises(ValueError, match="weights cannot be read"):
        load_exported(old)


def test_torn_or_foreign_weights_are_refused(exported, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    from pretrain.export.model_folder import load_exported

    copy = Path(shutil.copytree(exported, tmp_path / "model"))
    # Loaded tensors are mapped from the file, which is overwritten below.
    weights = {k: v.clone() for k, v in load_file(copy / "model.safetensors").items()}
    (copy / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="weights cannot be read"):
        load_exported(copy)
    fewer = {k: v for k, v in weights.items() if "layer.1" not in k}
    save_file(fewer, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="which would be random"):
        load_exported(copy)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"bert"', '"roberta"'))
    with pytest.raises(ValueError, match="type 'roberta'"):
        load_exported(copy)


def test_model_and_vocabulary_must_belong_together(exported, tmp_path):
    import shutil

    from pretrain.export.model_folder import load_exported

    copy = Path(shutil.copytree(exported, tmp_path / "model"))
    text = (copy / "vocabulary.json").read_text()
    (copy / "vocabulary.json").write_text(text.replace('"max_length":2048', '"max_length":1024'))
    with pytest.raises(ValueError, match="the model was trained with vocabulary"):
        load_exported(copy)
    (copy / "geneloom.json").unlink()
    content = json.loads(text)
    content["genes"], content["medians"] = content["genes"][:-1], content["medians"][:-1]
    (copy / "vocabulary.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="belong to different versions"):
        load_exported(copy)
