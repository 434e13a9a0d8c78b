"""Finds out which command filled a folder, from the files that are in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

Stage = Literal["prepare", "pretrain", "finetune", "perturb", "benchmark", "saturate"]
# For each command: the file to read, and the beginning of its entry "format".
_FORMATS: dict[Stage, tuple[str, str]] = {
    "prepare": ("manifest.json", "geneloom-shards/"),
    "perturb": ("manifest.json", "geneloom-perturb/"),
    "benchmark": ("results.json", "geneloom-benchmark/"),
    "saturate": ("results.json", "geneloom-saturation/"),
    "finetune": ("results.json", "geneloom-finetune/"),
}


def stage_of(folder: Path) -> tuple[Stage | None, dict[str, Any]]:
    """Return the command that filled a folder, None if unknown, and the record that names it.

    The record of a pretraining is empty, because a run has many files and none of them describes
    the whole run.
    """
    if (folder / "config.yaml").exists() and (folder / "shards_manifest.json").exists():
        return "pretrain", {}
    for stage, (name, beginning) in _FORMATS.items():
        record = _read(folder / name)
        if str(record.get("format", "")).startswith(beginning):
            return stage, record
        # Early versions wrote scores without a format.
        if stage == "finetune" and {"seeds", "summary", "task"} <= record.keys():
            return stage, record
    return None, {}


def _read(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} if the file is missing or holds anything else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}
