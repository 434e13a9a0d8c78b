"""Checkpoints: complete or absent.

Layout of a run folder::

    checkpoints/step-00000500/rank-00000.safetensors ...   fragments of every rank
    checkpoints/step-00000500/checkpoint.json              step, recipe, files with size and SHA-256
    checkpoints/latest                                      name of the newest, written last

A checkpoint is written to ``.step-00000500.partial``, checked, and renamed. Reading never trusts a
name: sizes and hashes are compared first, and a torn checkpoint is skipped with the reason said.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.shards import file_sha256
from pretrain import dist, zero_state
from pretrain.dist import Ranks
from pretrain.zero_state import FragmentReader

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = "geneloom-checkpoint/1"
_RECORD = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk; `record` is its checkpoint.json."""

    folder: Path
    record: dict[str, Any]

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self.record["step"]

    def reader(self) -> FragmentReader:
        """Return a reader over the files of all ranks."""
        return FragmentReader([self.folder / f["name"] for f in self.record["files"]])


def save(run: Path, engine, stage: int, ranks: Ranks, record: dict[str, Any], keep: int) -> Path:
    """Write one checkpoint, collectively, and return its folder.

    Parameters
    ----------
    record
        What must be known to go on: ``step``, ``recipe``, ``shards_fingerprint``, ...
    keep
        Newest complete checkpoints that stay.
    """
    root = run / "checkpoints"
    folder = root / f"step-{record['step']:08d}"
    partial = root / f".{folder.name}.partial"
    if ranks.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.wait_for_all()
    path = partial / f"rank-{ranks.rank:05d}.safetensors"
    zero_state.save_fragments(path, engine, stage, ranks.rank)
    _sync(path)
    mine = {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    files = [json.loads(text) for text in dist.gather_text(json.dumps(mine), ranks)]
    if ranks.is_first:
        content = {"format": CHECKPOINT_FORMAT, **record, "files": files}
        content["record_sha256"] = _record_sha256(content)
        (partial / _RECORD).write_text(json.dumps(content, indent=1))
        _sync(partial / _RECORD)
        _sync(partial)
        partial.rename(folder)
        _point_latest(root, folder.name)
        _remove_old(root, keep)
    dist.wait_for_all()
    return folder


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return a checkpoint that is known to be complete."""
    return Checkpoint(folder, json.loads((folder / _RECORD).read_text()))


def newest(run: Path, set_aside: bool = False) -> Checkpoint | None:
    """Return the newest complete checkpoint of a run, None if there is none at all.

    Parameters
    ----------
    set_aside
        Rename the torn ones that were skipped, so that they do not count among those kept.

    Raises
    ------
    ValueError
        There are checkpoints, but none is complete: training from scratch would hide the loss.
    """
    folders = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    torn: list[Path] = []
    for folder in folders:
        problem = damage(folder)
        if problem is None:
            if set_aside:
                for path in torn:
                    path.rename(path.with_name(f"torn-{path.name}"))
            return open_checkpoint(folder)
        logger.warning("checkpoint %s is skipped: %s", folder, problem)
        torn.append(folder)
    if folders:
        raise ValueError(
            f"{run / 'checkpoints'}: none of {len(folders)} checkpoints is complete "
            f"(newest: {damage(folders[0])}); restore one from a backup, or start a new run folder"
        )
    return None


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint folder, None if it is complete."""
    try:
        record = json.loads((folder / _RECORD).read_text())
    except FileNotFoundError:
        return f"{_RECORD} is missing"
    except (json.JSONDecodeError, UnicodeDecodeError):
        return f"{_RECORD} is not readable"
    if not isinstance(record, dict) or record.get("record_sha256") != _record_sha256(record):
        return f"{_RECORD} has another SHA-256 than recorded"
    if record["format"] != CHECKPOINT_FORMAT:
        return f"format {record['format']!r}, this version reads {CHECKPOINT_FORMAT}"
    for file in record["files"]:
        path = folder / file["name"]
        if not path.exists():
            return f"{file['name']} is missing"
        if path.stat().st_size != file["bytes"]:
            return f"{file['name']} has {path.stat().st_size} bytes instead of {file['bytes']}"
        if file_sha256(path) != file["sha256"]:
            return f"{file['name']} has another SHA-256 than recorded"
    return None


def _record_sha256(record: dict[str, Any]) -> str:
    """Return the hash of a record's canonical JSON, without the hash itself."""
    rest = {k: v for k, v in record.items() if k != "record_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def require_same(record: dict[str, Any], now: dict[str, Any], allow_changes: bool) -> None:
    """Raise ValueError if a run would go on with other data, vocabulary or recipe.

    A changed recipe can be allowed; other data or another vocabulary cannot.
    """
    for key, what in (("vocabulary_sha256", "vocabulary"), ("shards_fingerprint", "shards")):
        if record[key] != now[key]:
            raise ValueError(
                f"resume: the checkpoint was trained on {what} {record[key][:12]}, data.shards "
                f"holds {what} {now[key][:12]}; give the folder the run was started with"
            )
    before, after = record["recipe"], now["recipe"]
    changed = [
        f"{k}: {before.get(k)!r} -> {after.get(k)!r}"
        for k in sorted(set(before) | set(after))
        if before.get(k) != after.get(k)
    ]
    if changed and not allow_changes:
        raise ValueError(
            "resume: the recipe changed: " + "; ".join(changed) + "; give the old values, or "
            "--allow-changes to go on with the new ones"
        )
    if changed:
        logger.warning("recipe changed on resume: %s", "; ".join(changed))


def _point_latest(root: Path, name: str) -> None:
    aside = root / ".latest.partial"
    aside.write_text(name + "\n")
    _sync(aside)
    aside.replace(root / "latest")
    _sync(root)


def _remove_old(root: Path, keep: int) -> None:
    for folder in sorted(root.glob("step-*"), reverse=True)[keep:]:
        # Renamed first: a half-deleted folder must not look like a checkpoint.
        trash = root / f".{folder.name}.trash"
        folder.rename(trash)
        shutil.rmtree(trash)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
