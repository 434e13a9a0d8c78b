"""One source of settings, refused early."""

import json
import re

import pytest
import yaml

from pretrain.config import CONFIG_FOLDER, load_config
from pretrain.ds_config import DEEPSPEED_CONFIG_FOLDER, derive_ds_config, zero_stage

pytestmark = pytest.mark.quick

REQUIRED = ["data.shards=shards", "run.out=out"]


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("*.yaml")), ids=lambda p: p.stem)
@pytest.mark.parametrize(
    "deepspeed", sorted(p.stem for p in DEEPSPEED_CONFIG_FOLDER.glob("*.json"))
)
def test_every_supplied_file_resolves(path, deepspeed):
    config = load_config(path.stem, [*REQUIRED, f"run.deepspeed={deepspeed}"])
    if config.optim.kind == "muon" and re.search("offload|zeropp", deepspeed):
        with pytest.raises(ValueError, match="not with optim.kind=muon"):
            derive_ds_config(config)
        return
    derived = derive_ds_config(config)
    given = json.loads((DEEPSPEED_CONFIG_FOLDER / f"{deepspeed}.json").read_text())
    assert zero_stage(derived) == given["zero_optimization"]["stage"]
    if deepspeed.startswith("zero"):
        assert zero_stage(derived) == int(deepspeed[4])
    assert derived["gradient_accumulation_steps"] == 1
    assert json.dumps(derived)


def test_order_of_precedence(tmp_path):
    (tmp_path / "mine.yaml").write_text("optim: {learning_rate: 1.0e-4}\nrun: {seed: 3}\n")
    config = load_config(tmp_path / "mine.yaml", [*REQUIRED, "optim.learning_rate=5e-4"])
    assert (config.optim.learning_rate, config.run.seed) == (5e-4, 3)
    assert config.optim.warmup_steps == 10_000
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load_config(again) == config
    assert yaml.safe_load(config.to_yaml())["model"]["num_layers"] == 6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optim.lerning_rate=1"],
            "'optim.lerning_rate' is no setting; did you mean 'learning_rat",
        ),
        (["optm.learning_rate=1"], "did you mean 'optim'"),
        (["optim.learning_rate=-1"], "optim.learning_rate.*greater than 0"),
        (["model.hidden_size=65"], "not divisible"),
        (["masking.mask_share=0.95"], "exceed 1"),
        (["optim.schedule=square"], "optim.schedule"),
        (["learning_rate=1"], "section.field=value"),
        (["run.precision=fp16"], "run.precision"),
    ],
)
def test_wrong_settings(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config("tiny", REQUIRED + overrides)


def test_all_problems_at_once():
    with pytest.raises(ValueError, match="data.shards.*run.out.*model.layers"):
        load_config("tiny", ["model.layers=3"])


def test_unknown_config_names_the_supplied_ones():
    with pytest.raises(ValueError, match="geneformer_v1_6l"):
        load_config("geneformer", REQUIRED)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimisation": {"stage": 1}}, "zero_optimisation"),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, "bf16"),
        ({"zero_optimization": {"stage": 4}}, "stage must be"),
        ({}, "stage must be"),
    ],
)
def test_foreign_deepspeed_keys_are_refused(content, message, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(content))
    config = load_config("tiny", [*REQUIRED, f"run.deepspeed={tmp_path / 'ds.json'}"])
    with pytest.raises(ValueError, match=message):
        derive_ds_config(config)
