"""The files of deepspeed_configs/: read by DeepSpeed itself, and trained with where a CPU can."""

import json
import re

import numpy as np
import pytest

from pretrain.ds_config import DEEPSPEED_CONFIG_FOLDER, derive_ds_config
from tests.ranks import run_ranks
from tests.runs import metrics, require_same_state, run_training, tiny_config

FILES = sorted(p.stem for p in DEEPSPEED_CONFIG_FOLDER.glob("*.json"))
# Quantized weights are not implemented on CPU; NVMe needs an extension that is compiled.
NOT_ON_CPU = {"nodes_slow_zeropp", "offload_nvme"}
# As zero1, but for the size of buckets, which changes no sum.
AS_ZERO_1 = ["cpu", "nodes_fast", "one_gpu", "one_node"]


def content(name: str) -> dict:
    return json.loads((DEEPSPEED_CONFIG_FOLDER / f"{name}.json").read_text())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FILES)
def test_deepspeed_takes_every_key(name, precision, tmp_path):
    """Unknown keys of a section are an error of DeepSpeed's; here, before any GPU is taken."""
    from deepspeed.runtime.config import DeepSpeedConfig

    config = tiny_config(tmp_path, tmp_path, run__deepspeed=name, run__precision=precision)
    derived = derive_ds_config(config)
    read = DeepSpeedConfig(derived | {"train_batch_size": 1})
    given = content(name)["zero_optimization"]
    assert read.zero_config.stage == given["stage"]
    for key, value in given.items():
        if not isinstance(value, dict):
            field = key.removeprefix("stage3_")
            assert getattr(read.zero_config, field) == value, key
    for part in ("offload_optimizer", "offload_param"):
        section = getattr(read.zero_config, part)
        assert (section.device if section else None) == given.get(part, {}).get("device")


@pytest.fixture(scope="module")
def as_zero1(shards, tmp_path_factory):
    config = tiny_config(shards, tmp_path_factory.mktemp("zero1") / "run", run__max_steps=5)
    run_ranks(2, run_training, config)
    return config


@pytest.mark.parametrize("name", AS_ZERO_1)
def test_same_bits_as_zero1(name, as_zero1, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", run__max_steps=5, run__deepspeed=name)
    run_ranks(2, run_training, config)
    require_same_state(config.run.out, as_zero1.run.out)


def test_gradients_in_half_the_bytes_train_alike(as_zero1, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", run__max_steps=5, run__deepspeed="nodes_slow")
    run_ranks(2, run_training, config)
    losses = [[m["loss"] for m in metrics(c.run.out, "train")] for c in (config, as_zero1)]
    # bfloat16 has 8 bits: a gradient is right to 0.4 %.
    np.testing.assert_allclose(*losses, rtol=5e-3)
    assert losses[0] != losses[1], "the gradients were not sent in bfloat16"


@pytest.mark.parametrize("name", ["nodes_slow", pytest.param("one_node", marks=pytest.mark.long)])
def test_two_ranks_in_bf16(name, as_zero1, shards, tmp_path):
    """Where the type of what is sent matters."""
    changes = {"run__max_steps": 5, "run__deepspeed": name, "run__precision": "bf16"}
    config = tiny_config(shards, tmp_path / "run", **changes)
    run_ranks(2, run_training, config)
    losses = [[m["loss"] for m in metrics(c.run.out, "train")] for c in (config, as_zero1)]
    np.testing.assert_allclose(*losses, rtol=1e-2)


def test_every_file_is_tried_or_named():
    elsewhere = {n for n in FILES if re.fullmatch(r"zero[0-3](_offload)?", n)}
    assert set(FILES) == elsewhere | NOT_ON_CPU | {*AS_ZERO_1, "nodes_slow"}


def test_the_readme_names_every_file():
    text = (DEEPSPEED_CONFIG_FOLDER / "README.md").read_text()
    assert set(re.findall(r"`(\w+)\.json`", text)) == set(FILES)
