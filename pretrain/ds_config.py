"""Derive the dictionary that DeepSpeed receives from the run configuration and a DeepSpeed file.

The files in ``deepspeed_configs/`` hold ZeRO and communication keys only. Batch sizes,
accumulation, clipping, precision and optimizer belong to the run configuration. DeepSpeed silently
ignores unknown top-level keys, so all other keys are refused here.
"""

from __future__ import annotations

import json
from pathlib import Path

from pretrain.config import RunConfig

DEEPSPEED_VERSION = "0.19.8"
DEEPSPEED_CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "deepspeed_configs"
_ALLOWED_KEYS = {
    "zero_optimization",
    "communication_data_type",
    "wall_clock_breakdown",
    "memory_breakdown",
    "prescale_gradients",
    "comms_logger",
}
_OFFLOADING = ("offload_optimizer", "offload_param", "cpu_offload", "zenflow")


def find_deepspeed_file(name: str) -> Path:
    """Return the path of a DeepSpeed configuration given by name or path."""
    named = DEEPSPEED_CONFIG_FOLDER / f"{name}.json"
    if named.is_file():
        return named
    if Path(name).is_file():
        return Path(name)
    known = sorted(p.stem for p in DEEPSPEED_CONFIG_FOLDER.glob("*.json"))
    raise ValueError(f"run.deepspeed={name}: no such file, and none of the supplied ones: {known}")


def derive_ds_config(config: RunConfig) -> dict:
    """Return the DeepSpeed dictionary of a run.

    The engine weights the gradients of every micro-batch itself (sum over masked genes x world size
    / masked genes of the global step), so DeepSpeed's own accumulation and batch sizes are set to
    one.

    Raises
    ------
    ValueError
        The file is unreadable, has keys that belong to the run configuration, or has no ZeRO stage.
        Or it asks for an order of weights that checkpoints do not understand, or for Muon under
        settings where it is not exact. Or torch.compile is on at stage 3, whose hooks break its
        graphs (docs/speed_log.md).
    """
    path = find_deepspeed_file(config.run.deepspeed)
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    unknown = sorted(set(content) - _ALLOWED_KEYS)
    if unknown:
        raise ValueError(
            f"{path}: {unknown} do not belong here; allowed: {sorted(_ALLOWED_KEYS)}. Batch, "
            "precision, clipping and optimizer are set in the run configuration"
        )
    stage = content.get("zero_optimization", {}).get("stage")
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, found {stage}")
    if stage == 3 and config.run.compile != "off":
        raise ValueError(
            f"run.compile={config.run.compile}: not with ZeRO 3, which gathers weights while a "
            "layer runs; use zero1 or zero2, or run.compile=off"
        )
    if content["zero_optimization"].get("round_robin_gradients"):
        raise ValueError(
            f"{path}: round_robin_gradients: not supported, for DeepSpeed then says wrongly where "
            "a weight is, and a checkpoint would hold it under another's name; leave it out"
        )
    if config.optim.kind == "muon":
        _require_exact_muon(path, content["zero_optimization"])
    result = content | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # At stage 0 DeepSpeed neither reports the norm nor stops at NaN, so optim.py clips there.
        "gradient_clipping": 0.0 if stage == 0 else config.optim.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        # Offloading also uses torch's optimizer, because DeepSpeed's own resumes with other last
        # bits.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
    if config.run.precision == "bf16":
        if stage == 0:
            # Stage 0 has no fp32 master weights of its own; autocast keeps the weights in fp32.
            result["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        else:
            result["bf16"] = {"enabled": True}
            result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


def _require_exact_muon(path: Path, zero: dict) -> None:
    """Raise ValueError if the ZeRO settings make Muon's update of a matrix inexact."""
    offloads = [k for k in _OFFLOADING if zero.get(k)]
    if offloads:
        raise ValueError(
            f"{path}: {', '.join(offloads)}: not with optim.kind=muon, whose matrices are computed "
            "where the ranks talk to each other; take zero1, zero2 or zero3, or optim.kind=adamw"
        )
    quantized = [k for k, v in zero.items() if k.startswith("zero_quantized") and v]
    if quantized:
        raise ValueError(
            f"{path}: {', '.join(quantized)}: not with optim.kind=muon, which makes small errors "
            "of a gradient large ones of a step; take zero3, or optim.kind=adamw"
        )


def zero_stage(ds_config: dict) -> int:
    """Return the ZeRO stage of a derived DeepSpeed dictionary."""
    return ds_config["zero_optimization"]["stage"]
