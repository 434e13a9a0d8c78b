"""Checkpoints on disk, which are either complete or absent.

Layout of a run folder::

    checkpoints/step-00000500/rank-00000.safetensors ...   fragments of every rank
    checkpoints/step-00000500/checkpoint.json              step, recipe, files with size and SHA-256
    checkpoints/latest                                      name of the newest, written last

`pretrain.checkpoints.publish` writes them. Here `newest` and `find` open them, and `require_same`
compares a checkpoint with the run that continues it. Reading never trusts a name: sizes and hashes
are compared first, and an incomplete checkpoint is skipped with the reason in a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.files import file_sha256, force_to_disk
from pretrain.checkpoints.zero_state import FragmentReader
from pretrain.settings.architecture import ARCHITECTURE, BERT

logger = logging.getLogger(__name__)

# The checkpoint of a run to open: a step, the one with the lowest held-out loss, or None for the
# newest.
Which = int | Literal["best"] | None
# Format /1 was written for another order of cells: continuing would repeat some cells and skip
# others.
CHECKPOINT_FORMAT = "geneloom-checkpoint/2"
_RECORD = "checkpoint.json"
# Not all records contain these settings; a record without them means these values.
_ALWAYS_WAS = {
    "model.architecture": BERT,
    "model.init_genes": "random",
    "optim.kind": "adamw",
    "masking.hidden": "mask",
    "objective.gene_weight": 1.0,
    "objective.cell_weight": 0.0,
}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk; `record` is the content of its checkpoint.json."""

    folder: Path
    record: dict[str, Any]

    @property
    def step(self) -> int:
        """Return the number of finished optimizer steps."""
        return self.record["step"]

    @property
    def updates(self) -> int:
        """Return how many steps changed weights: all but those skipped (`run.on_not_finite`)."""
        # Versions that skipped no steps did not write this entry.
        return self.record.get("updates", self.step)

    @property
    def heldout_loss(self) -> float | None:
        """Return the held-out loss after exactly this step, None if it was not recorded."""
        return self.record.get("heldout_loss")

    def reader(self) -> FragmentReader:
        """Return a reader of the files of all ranks."""
        return FragmentReader([self.folder / f["name"] for f in self.record["files"]])


def folder_name(step: int) -> str:
    """Return the name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write checkpoint.json together with a hash of its content, and force it to disk."""
    content = {"format": CHECKPOINT_FORMAT, **record}
    content["record_sha256"] = _record_sha256(content)
    (folder / _RECORD).write_text(json.dumps(content, indent=1))
    force_to_disk(folder / _RECORD)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return a checkpoint that is already known to be complete."""
    return Checkpoint(folder, json.loads((folder / _RECORD).read_text()))


def newest(run: Path, set_aside: bool = False) -> Checkpoint | None:
    """Return the newest complete checkpoint of a run, or None if the run has no checkpoints.

    Parameters
    ----------
    set_aside
        Rename the incomplete checkpoints that were skipped, so that they do not count as kept ones.

    Raises
    ------
    ValueError
        There are checkpoints, but none is complete; training from scratch would hide this loss.
    """
    folders = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    torn: dict[Path, str] = {}
    for folder in folders:
        problem = damage(folder)
        if problem is None:
            if set_aside:
                for path in torn:
                    aside = path.with_name(f"torn-{path.name}")
                    # An incomplete checkpoint of the same step may lie there already.
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
            return open_checkpoint(folder)
        logger.warning("checkpoint %s is skipped: %s", folder, problem)
        torn[folder] = problem
    if folders:
        raise ValueError(
            f"{run / 'checkpoints'}: none of {len(folders)} checkpoints is complete "
            f"(newest: {torn[folders[0]]}); restore one from a backup, or start a new run folder"
        )
    return None


def find(run: Path, which: Which = None) -> Checkpoint:
    """Return a complete checkpoint of a run for reading only.

    Raises
    ------
    ValueError
        `run` is no run folder, or the checkpoint does not exist or is damaged.
    """
    if not (run / "model_config.json").exists():
        raise ValueError(f"{run}: no model_config.json; expected a folder of `geneloom pretrain`")
    if which is None:
        found = newest(run)
        if found is None:
            raise ValueError(f"{run}: has no checkpoint")
        return found
    folder = _best(run) if which == "best" else run / "checkpoints" / folder_name(which)
    if not folder.is_dir():
        raise ValueError(f"{run}: has no checkpoint of step {which}; {_those_kept(run)}")
    problem = damage(folder)
    if problem is not None:
        raise ValueError(f"{folder}: {problem}; {_those_kept(run)}")
    return open_checkpoint(folder)


def set_aside_after(last: Checkpoint) -> None:
    """Rename the checkpoints of later steps, because the run goes back to this one."""
    for folder in sorted(last.folder.parent.glob("step-*")):
        if step_of(folder) > last.step:
            aside = folder.with_name(f"aside-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            logger.warning("%s: set aside, the run goes on from step %d", aside, last.step)


def _those_kept(run: Path) -> str:
    steps = [step_of(p) for p in sorted((run / "checkpoints").glob("step-*"))]
    return f"kept are those of steps {', '.join(map(str, steps)) or '(none)'}"


def step_of(folder: Path) -> int:
    """Return the step that the name of a checkpoint folder contains."""
    return int(folder.name.removeprefix("step-"))


def heldout_losses(root: Path) -> dict[Path, float]:
    """Return the recorded held-out losses of a run's checkpoints by folder.

    Checkpoints without a readable record are left out. `root` is the run's folder of checkpoints.
    """
    found = {}
    for folder in sorted(root.glob("step-*")):
        try:
            loss = open_checkpoint(folder).heldout_loss
        except (OSError, ValueError):
            continue
        if loss is not None:
            found[folder] = loss
    return found


def best_first(losses: dict[Path, float]) -> list[Path]:
    """Return folders in order of their held-out losses, for equal losses the later step first."""
    return sorted(losses, key=lambda folder: (losses[folder], -step_of(folder)))


def _best(run: Path) -> Path:
    losses = heldout_losses(run / "checkpoints")
    if not losses:
        raise ValueError(
            f"{run}: no checkpoint has a held-out loss of its own step, so none is the best; let "
            f"evaluation.every_steps be a multiple of checkpoint.every_steps, or give a step: "
            f"{_those_kept(run)}"
        )
    return best_first(losses)[0]


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint folder, or None if it is complete."""
    try:
        record = json.loads((folder / _RECORD).read_text())
    except FileNotFoundError:
        return f"{_RECORD} is missing"
    except OSError as error:
        return f"{_RECORD} cannot be read ({error.strerror})"
    except (json.JSONDecodeError, UnicodeDecodeError):
        return f"{_RECORD} is not readable"
    if not isinstance(record, dict) or record.get("record_sha256") != _record_sha256(record):
        return f"{_RECORD} has another SHA-256 than recorded"
    if record["format"] != CHECKPOINT_FORMAT:
        return f"format {record['format']!r}, this version reads {CHECKPOINT_FORMAT}"
    if folder.name != folder_name(record["step"]):
        return f"{_RECORD} is that of step {record['step']}"
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
    """Return the SHA-256 of a record as JSON with sorted keys, without its own hash entry.

    The JSON has Python's default separators: a space follows each comma and colon, unlike in the
    other hashes of the project.
    """
    rest = {k: v for k, v in record.items() if k != "record_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _objective(recipe: dict[str, Any]) -> str:
    """Return what a recipe's loss consists of, in words; weights only where they are zero."""
    genes = "hidden genes" if recipe.get("objective.gene_weight", 1.0) else ""
    prior = recipe.get("objective.prior", "none")
    if genes and prior != "none":
        genes += f" with the prior {prior!r}"
    cells = "cells" if recipe.get("objective.cell_weight", 0.0) else ""
    return " and ".join(filter(None, (genes, cells)))


def require_same(record: dict[str, Any], now: dict[str, Any], allow_changes: bool) -> None:
    """Raise ValueError if a run would continue with other data, vocabulary, model or recipe.

    `allow_changes` permits other shards and another recipe, but never another vocabulary,
    architecture, optimizer or objective.
    """
    if record["vocabulary_sha256"] != now["vocabulary_sha256"]:
        raise ValueError(
            f"resume: the checkpoint was trained on vocabulary {record['vocabulary_sha256'][:12]}, "
            f"data.shards holds vocabulary {now['vocabulary_sha256'][:12]}; give the folder the "
            "run was started with. To train on with other genes, export the run and start a new "
            "one with model.init_from"
        )
    before, after = (_ALWAYS_WAS | r["recipe"] for r in (record, now))
    kinds = [recipe["model.architecture"] for recipe in (before, after)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"resume: the checkpoint holds a {kinds[0]}, model.architecture is {kinds[1]}; give "
            f"model.architecture={kinds[0]}, or start a {kinds[1]} in a new run folder"
        )
    changed = {
        k: f"{k}: {before.get(k)!r} -> {after.get(k)!r}"
        for k in sorted(set(before) | set(after))
        if before.get(k) != after.get(k)
    }
    other_model = [changed[k] for k in changed if k.removeprefix("model.") in ARCHITECTURE]
    if other_model:
        raise ValueError(
            "resume: the checkpoint holds another model: " + "; ".join(other_model) + "; give the "
            "old values"
        )
    if "optim.kind" in changed:
        raise ValueError(
            f"resume: the checkpoint holds another optimizer's state: {changed['optim.kind']}; "
            f"give optim.kind={before['optim.kind']}. To go on from its weights, export the run "
            "and start a new one with model.init_from"
        )
    objectives = [_objective(recipe) for recipe in (before, after)]
    if objectives[0] != objectives[1]:
        raise ValueError(
            f"resume: the run was trained on {objectives[0]}, these settings ask for "
            f"{objectives[1]}; give the old values of objective.*. To go on from its weights, "
            "export the run and start a new one with model.init_from"
        )
    if record["shards_fingerprint"] != now["shards_fingerprint"]:
        changed["shards"] = (
            f"shards: {record['shards_fingerprint'][:12]} -> {now['shards_fingerprint'][:12]}"
        )
    if changed and not allow_changes:
        raise ValueError(
            "resume: the recipe changed: " + "; ".join(changed.values()) + "; give the old "
            "values, or --allow-changes to go on with the new ones"
        )
    if changed:
        logger.warning("recipe changed on resume: %s", "; ".join(changed.values()))
    if not changed.keys().isdisjoint({"shards", "batch.tokens_per_step", "masking.subset"}):
        logger.warning("the order of cells is another one: this epoch is not exact")
