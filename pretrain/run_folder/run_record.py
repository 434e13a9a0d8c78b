"""The record of a run: its settings, its data, and the software and machine it ran on.

`write_run_files` writes the record when a run starts; `run_record` and `step_record` give the part
that every checkpoint contains.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data_prep.running.redact import redacted_command
from data_prep.shards.reader import ShardSet
from data_prep.version import VERSION
from pretrain.config import RunConfig
from pretrain.counting.arithmetic_prior import ArithmeticPrior
from pretrain.counting.corpus_svd import corpus_svd
from pretrain.model.architectures import encoder_config

logger = logging.getLogger(__name__)


def run_record(
    config: RunConfig,
    shards: ShardSet,
    world_size: int,
    stage: int,
    init: dict[str, Any] | None,
    prior: ArithmeticPrior | None = None,
    computing: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the entries about the run that every checkpoint contains.

    `init` is the record that `start_weights` or `start_counted` returned, None for random weights.
    `computing` is the choice for the device (`pretrain.device`).
    """
    return {
        "vocabulary_sha256": shards.vocabulary.sha256,
        "shards_fingerprint": shards.fingerprint,
        "recipe": config.recipe(),
        "init": init,
        "prior": prior.record if prior else None,
        "world_size": world_size,
        "zero_stage": stage,
        "computing": computing,
        "versions": _versions("torch", "deepspeed", "transformers"),
    }


def step_record(
    done: int, seed: int, steps_per_epoch: int, heldout_loss: float | None
) -> dict[str, Any]:
    """Return a checkpoint's entries about its step: position among the cells, held-out loss."""
    epoch, within = divmod(done, steps_per_epoch)
    return {
        "step": done,
        "position": {
            "seed": seed, "epoch": epoch, "step_in_epoch": within,
            "steps_per_epoch": steps_per_epoch,
        },
        "heldout_loss": heldout_loss,
    }  # fmt: skip


def write_run_files(
    config: RunConfig,
    ds_config: dict,
    shards: ShardSet,
    init: dict[str, Any] | None,
    prior: ArithmeticPrior | None = None,
) -> None:
    """Write the record of a run: settings, derived settings, vocabulary, start, environment."""
    out = config.run.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(config.to_yaml())
    (out / "ds_config.json").write_text(json.dumps(ds_config, indent=1))
    (out / "model_config.json").write_text(
        encoder_config(config.model, shards.vocabulary).to_json_string()
    )
    shards.vocabulary.save(out / "vocabulary.json")
    (out / "shards_manifest.json").write_text(json.dumps(shards.manifest, indent=1))
    if init:
        (out / "init.json").write_text(json.dumps(init, indent=1))
    (out / "env.json").write_text(json.dumps(environment(), indent=1))
    if prior:
        prior.save(out)
    _write_corpus_svd(config, shards)


def _write_corpus_svd(config: RunConfig, shards: ShardSet) -> None:
    """Write the corpus SVD, so that users of the model can also embed new cells with it."""
    number = config.evaluation.svd_cells
    if number == 0:
        return
    started = time.perf_counter()
    quarantine = config.data.on_damage == "quarantine"
    svd = corpus_svd(shards, fallback=config.run.out, max_cells=number, quarantine=quarantine)
    svd.save(config.run.out)
    seconds = time.perf_counter() - started
    logger.info("corpus SVD of %d training cells: %.1f s", svd.origin["cells"], seconds)


def is_run_folder(out: Path) -> bool:
    """Return whether a run has written its settings into this folder."""
    return (out / "config.yaml").is_file()


def environment() -> dict[str, Any]:
    """Return the environment of a run: commit, versions, machine."""
    packages = ("torch", "deepspeed", "transformers", "numpy", "pyarrow", "safetensors")
    folder = Path(__file__).resolve().parent
    commit = _git(folder, "rev-parse", "HEAD")
    return {
        "commit": commit,
        "dirty": bool(_git(folder, "status", "--porcelain")) if commit else None,
        "command": os.environ.get("GENELOOM_LAUNCH_COMMAND", redacted_command(sys.argv)),
        "python": platform.python_version(),
        "versions": _versions(*packages),
        "machine": platform.platform(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _versions(*packages: str) -> dict[str, str]:
    return {"geneloom": VERSION} | {p: version(p) for p in packages}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
