"""What a run says of its own speed: the meter, its formula, the profile."""

from __future__ import annotations

import json

import pytest

from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.sources.source_spec import SourceOptions, source_at
from pretrain.config import ObjectiveConfig, load_config
from pretrain.plan.flops import GPUS, Work, known_gpu
from tests.ranks import run_new_ranks, run_ranks
from tests.runs import metrics, run_training, tiny_config
from tests.synthetic import write_cells

COUNTS = {"masked": 30, "scored": 2, "tokens": 190, "padded_tokens": 200, "cells": 2}
CONFIG = load_config("geneformer_v1_6l", ["data.shards=x", "run.out=x", "run.precision=bf16"])


def filled_meter(gpu, config=CONFIG):
    """Two steps of warm-up and two of one second, on two ranks."""
    from pretrain.measure.metrics import Meter

    meter = Meter(2, 10, Work(config, 25_426, gpu))
    for seconds in (50.0, 50.0, 1.0, 1.0):
        meter.add(COUNTS, 100, 60.0, 3.0, 0.0, seconds / 10, seconds)
    meter.started -= 200.0
    return meter


def test_rates_leave_the_warm_up_out_and_the_wall_does_not():
    from pretrain.measure.metrics import console_line

    found = filled_meter(GPUS["h200"]).close_window(4)
    assert found["tokens_per_s"] == 190
    assert found["padded_tokens_per_s"] == 200
    assert found["tokens_per_s_per_rank"] == 95
    assert found["tokens_per_cell"] == 95
    assert found["padding"] == pytest.approx(0.05)
    assert found["data_wait"] == pytest.approx(0.1)
    assert found["tokens_per_s_wall"] == pytest.approx(4 * 190 / 200, rel=0.01)
    assert "MFU" in console_line(4, 10, found | {"grad_norm": 1.0, "learning_rate": 1e-3})


@pytest.mark.parametrize("objective", [{}, {"cell_weight": 1}])
def test_mfu_is_what_its_formula_says(objective):
    config = CONFIG.model_copy(update={"objective": ObjectiveConfig(**objective)})
    meter = filled_meter(GPUS["h200"], config)
    found, text = meter.close_window(4), meter.work.formula()
    # The printed sum, computed.
    right = text.split(" = ", 1)[1].split(", only")[0]
    for word in ("(weights)", "(attention)", "(head)"):
        right = right.replace(word, "")
    by_hand = eval(right.replace(" x ", "*"), {"L": 100})
    assert meter.work.flops_per_token(100) == pytest.approx(by_hand, rel=1e-5)
    assert found["flops_per_s_per_rank"] == pytest.approx(100 * by_hand, rel=1e-5)
    assert found["mfu"] == pytest.approx(100 * by_hand / 989e12, rel=1e-5)
    assert "989 TFLOP/s" in text


def test_no_mfu_without_a_published_peak():
    from pretrain.measure.metrics import console_line

    meter = filled_meter(None)
    found = meter.close_window(4)
    assert "mfu" not in found
    assert "no MFU" in meter.work.formula()
    assert "TFLOP/s" in console_line(4, 10, found | {"grad_norm": 1.0, "learning_rate": 1e-3})


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_gpus_by_the_name_cuda_gives_them(name, key):
    assert known_gpu(name) is (GPUS[key] if key else None)


def run_with_profile(config, steps):
    from pretrain.ranks import dist
    from pretrain.train import train

    train(config, profile=steps)
    dist.leave()


def shards_in(tmp_path):
    source = write_cells(tmp_path / "cells.h5ad", num_cells=40, num_genes=60)
    options = PrepareOptions(heldout_share=0.2, block_cells=8, vocabulary_min_cells=1)
    prepare([source_at(source, SourceOptions())], tmp_path / "shards", None, options)
    return tmp_path / "shards"


def test_deterministic_option_changes_nothing_on_a_cpu(tmp_path):
    shards, losses = shards_in(tmp_path), []
    for name in (False, True):
        config = tiny_config(
            shards, tmp_path / str(name), run__max_steps=3, run__deterministic=name,
            optim__warmup_steps=1, model__attention_dropout=0.1, model__hidden_dropout=0.1,
        )  # fmt: skip
        # It is a setting of the process, which nothing takes back.
        losses.append(run_new_ranks(1, run_training, config)[0][0].losses)
    assert losses[0] == losses[1]


def test_profile_says_where_a_step_goes(tmp_path):
    from pretrain.measure.step_profile import PHASES

    config = tiny_config(shards_in(tmp_path), tmp_path / "run", run__max_steps=6)
    run_ranks(2, run_with_profile, config, 3)
    folder = tmp_path / "run" / "profile"
    found = json.loads((folder / "table.json").read_text())
    assert found["steps"] == 3
    host = {name: row["host"] for name, row in found["phases"].items()}
    assert set(host) == {*PHASES, "other"}
    assert sum(host.values()) == pytest.approx(found["step_ms"])
    assert min(host[p] for p in ("forward", "backward", "optimizer", "communication")) > 0
    assert "forward" in (folder / "table.txt").read_text()
    for rank in (0, 1):
        events = json.loads((folder / f"rank-{rank}.trace.json").read_text())["traceEvents"]
        assert sum(e.get("name") == "geneloom::forward" for e in events) >= 3
    written = metrics(tmp_path / "run", "train")[-1]
    assert written["tokens_per_s_wall"] > 0
    assert written["padded_tokens_per_s"] >= written["tokens_per_s"]
