"""Export a checkpoint as the folder that DeepSpeed's own `save_checkpoint` would have written.

DeepSpeed writes the files itself: an engine of the plain Hugging Face network receives weights,
moments and step count, and saves them. One process plays each rank in turn, in a process group
whose collective operations do nothing. Their results are not needed, because every rank reads the
whole checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from data_prep.files import complete_folder, require_new
from pretrain.checkpoints import checkpoint, zero_state
from pretrain.checkpoints.zero_state import FragmentReader, Renamed
from pretrain.config import OptimConfig
from pretrain.export.model_folder import (
    RECORD_NAME,
    export_record,
    own_network,
    own_vocabulary,
    write_vocabulary,
)
from pretrain.model.architectures import Network
from pretrain.optim import build_optimizer
from pretrain.ranks import dist

# DeepSpeed's ds_to_universal requires this entry, unless an option tells it to make one up.
_UNIVERSAL = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
CLIENT_STATE = "geneloom"
CLIENT_FORMAT = "geneloom-deepspeed/1"
# The module of a run contains the network under this name.
_WITHIN = "bert."
# Paths on one machine are not part of a run's configuration.
_PATHS = (("data", "shards"), ("data", "cache"), ("run", "out"), ("run", "deepspeed"),
          ("model", "init_from"), ("model", "init_vocabulary"))  # fmt: skip


def export_deepspeed(
    run: Path,
    out: Path,
    step: checkpoint.Which = None,
    stage: int | None = None,
    world_size: int | None = None,
) -> str:
    """Write a checkpoint of a run as DeepSpeed's own engine would; return a summary sentence.

    ``engine.load_checkpoint(out)`` reads ``out/global_stepN`` with the same number of ranks at that
    stage; ``zero_to_fp32.py`` and ``ds_to_universal.py`` read it with any. Names and groups of
    parameters are those of the plain Hugging Face network under torch's AdamW, matrices with weight
    decay first. The folder also contains ``config.json``, the vocabulary and ``geneloom.json``. It
    appears complete or not at all.

    Parameters
    ----------
    step
        Step of the checkpoint; None: the newest.
    stage, world_size
        ZeRO stage 1, 2 or 3, and number of ranks, of the folder; None: those of the checkpoint
        (stage 1 if that was 0).

    Raises
    ------
    ValueError
        As in `pretrain.export.model_folder.export`; or the stage or number of ranks is impossible.
    """
    if stage not in (None, 1, 2, 3):
        raise ValueError(f"--zero {stage}: must be 1, 2 or 3")
    require_new(out)
    found = checkpoint.find(run, step)
    vocabulary = own_vocabulary(run, found)
    record = found.record
    stage = max(1, record["zero_stage"]) if stage is None else stage
    num_ranks: int = world_size or record["world_size"]
    settings = yaml.safe_load((run / "config.yaml").read_text())
    optim = OptimConfig.model_validate(settings["optim"])
    own_network(run, found)  # raises before anything is written
    reader = found.reader()
    config = _engine_config(stage, record["recipe"]["run.precision"], optim.max_grad_norm)
    tag = f"global_step{found.step}"
    with complete_folder(out, "latest") as partial:
        for rank in range(num_ranks):
            network = own_network(run, found)
            with _alone_as(rank, num_ranks):
                engine = _engine(network, optim, config, stage, rank, reader, found)
                _save(engine, partial, tag, _client_state(record, settings))
            if rank == 0:
                network.config.save_pretrained(partial)
        write_vocabulary(partial, vocabulary)
        content = json.dumps(export_record(run, found), indent=1)
        (partial / RECORD_NAME).write_text(content + "\n")
    kind = "" if optim.kind == "adamw" else (
        "; its optimizer is Muon's (pretrain.optimizer.muon.MuonBesideAdamW): zero_to_fp32.py "
        "reads its weights, ds_to_universal.py knows AdamW alone"
    )  # fmt: skip
    return (
        f"{out}/{tag}: ZeRO {stage}, {num_ranks} ranks, weights and moments of step "
        f"{found.step}{kind}"
    )


def _engine_config(stage: int, precision: str, max_grad_norm: float) -> dict[str, Any]:
    """Return the DeepSpeed configuration of the engine, with the keys that affect its files."""
    content: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 1_000_000_000,
    }
    if precision == "bf16":
        content["bf16"] = {"enabled": True}
        content["data_types"] = {"grad_accum_dtype": "fp32"}
    return content


@contextlib.contextmanager
def _alone_as(rank: int, world_size: int) -> Iterator[None]:
    """Let this process be one rank of several; collective operations do nothing."""
    # This import registers a backend whose collective operations do nothing.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    names = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "DS_ACCELERATOR": "cpu"}
    before = {name: os.environ.get(name) for name in names}
    os.environ |= {name: str(value) for name, value in names.items()}
    said = logging.getLogger("DeepSpeed").level
    try:
        dist.start_without_others(FakeStore(), rank, world_size)
        yield
    finally:
        dist.leave()
        logging.getLogger("DeepSpeed").setLevel(said)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _engine(
    network: Network,
    optim: OptimConfig,
    config: dict[str, Any],
    stage: int,
    rank: int,
    reader: FragmentReader,
    found: checkpoint.Checkpoint,
) -> Any:
    """Return the DeepSpeed engine of a rank in the state of a checkpoint."""
    import deepspeed

    own = Renamed(reader, {n: _WITHIN + n for n, _ in network.named_parameters()})
    zero_state.load_weights(network, own)
    optimizer = build_optimizer(network, optim)
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=config)
    zero_state.restore_training_state(engine, stage, rank, own, found.updates)
    engine.global_steps = found.step
    engine.skipped_steps = found.step - found.updates
    return engine


def _save(engine: Any, out: Path, tag: str, client_state: dict[str, Any]) -> None:
    engine.save_checkpoint(str(out), tag=tag, client_state=client_state)


def _client_state(record: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the entries added to DeepSpeed's model files: step, order position, settings."""
    configuration = {section: dict(values) for section, values in settings.items()}
    for section, name in _PATHS:
        configuration.get(section, {}).pop(name, None)
    kept = ("step", "cells_seen", "cells_digest", "vocabulary_sha256", "shards_fingerprint")
    own = {
        "format": CLIENT_FORMAT,
        **{name: record[name] for name in kept},
        # Checkpoints of older versions have no position; their seed and step are known.
        "position": record.get("position", {"seed": record["recipe"]["run.seed"]}),
        "configuration": configuration,
    }
    return {CLIENT_STATE: own, **_UNIVERSAL}
