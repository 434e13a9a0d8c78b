"""Which command filled a folder: told by the files that it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

Stage = Literal["prepare", "pretrain", "finetune", "perturb", "benchmark"]
# File, how its "format" begins.
_FORMATS: dict[Stage, tuple[str, str]] = {
    "prepare": ("manifest.json", "geneloom-shards/"),
    "perturb": ("manifest.json", "geneloom-perturb/"),
    "benchmark": ("results.json", "geneloom-benchmark/"),
    "finetune": ("results.json", "geneloom-finetune/"),
}


def stage_of(folder: Path) -> tuple[Stage | None, dict[str, Any]]:
    """Return the command that filled a folder, and the record that says so; None: no command.

    The record of a pretraining is empty: it has many files, and none of them is all of it.
    """
    if (folder / "config.yaml").exists() and (folder / "shards_manifest.json").exists():
        return "pretrain", {}
    for stage, (name, beginning) in _FORMATS.items():
        record = _read(folder / name)
        if str(record.get("format", "")).startswith(beginning):
            return stage, record
        # Scores had no format at first.
        if stage == "finetune" and {"seeds", "summary", "task"} <= record.keys():
            return stage, record
    return None, {}


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object; any other file of this name, or none, is an empty one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}
