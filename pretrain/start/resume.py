"""Decide where a run starts: from the beginning, or from the newest complete checkpoint.

`agreed_start` lets rank 0 decide for all ranks.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

from data_prep.errors import SharedFailure, said_of
from data_prep.files import names_in
from data_prep.running.owner import Owner
from data_prep.shards.reader import ShardSet
from pretrain.checkpoints import checkpoint
from pretrain.checkpoints.publish import finish_interrupted, remove_partial
from pretrain.config import RunConfig
from pretrain.ranks import dist
from pretrain.ranks.dist import Ranks
from pretrain.run_folder.run_record import is_run_folder
from pretrain.start.continued import foreign_checkpoint, log_continued
from pretrain.start.warm_start import require_same_start

logger = logging.getLogger(__name__)

# True: continue from a checkpoint; "if-saved": start from the beginning if there is none.
Resume = bool | Literal["if-saved"]


class CannotStart(SharedFailure, ValueError):
    """The run folder or its checkpoints do not fit what was asked for."""


def agreed_start(
    config: RunConfig,
    shards: ShardSet,
    steps: int,
    which: tuple[Resume, checkpoint.Which],
    allow_changes: bool,
    ranks: Ranks,
    owner: Owner,
) -> checkpoint.Checkpoint | None:
    """Return the checkpoint to start from, or None.

    Rank 0 chooses for all ranks, because ranks might see different states of the disk.

    Parameters
    ----------
    which
        Whether to continue from a checkpoint ("if-saved": start from the beginning if there is
        none); and the step of the checkpoint, None: the newest. Later checkpoints are set aside.
    owner
        The owner of the run folder; rank 0 takes the folder before it looks into it.
    """
    decision: dict[str, Any] = {}
    foreign = None
    if ranks.is_first:
        try:
            owner.take()
            last = _find_start(config, shards, steps, which, allow_changes)
            if last is None and config.model.init_moments:
                foreign = foreign_checkpoint(config, shards, steps)
                log_continued(foreign, config.run.seed)
            decision = {"folder": str(last.folder) if last else "", "foreign": bool(foreign)}
        except ValueError as error:
            decision = {"error": str(error)}
        except OSError as error:  # the folder cannot be read or written
            decision = {"error": f"{config.run.out}: {said_of(error)}"}
    decision = json.loads(dist.first_rank_says(json.dumps(decision)))
    if "error" in decision:
        raise CannotStart(decision["error"])
    if decision["foreign"]:
        return foreign or foreign_checkpoint(config, shards, steps)
    return checkpoint.open_checkpoint(Path(decision["folder"])) if decision["folder"] else None


def _find_start(
    config: RunConfig,
    shards: ShardSet,
    steps: int,
    which: tuple[Resume, checkpoint.Which],
    allow_changes: bool,
) -> checkpoint.Checkpoint | None:
    """Return the checkpoint to continue from; None for a new run in an empty folder."""
    out, (resume, step) = config.run.out, which
    if step is not None and resume is not True:
        raise ValueError(f"--step {step}: belongs to --resume")
    if not resume:
        if names_in(out):
            raise ValueError(
                f"{out}: exists and is not empty; add --resume to go on with this run, or give "
                "run.out another folder"
            )
        return None
    last = checkpoint.newest(out, set_aside=True) if step is None else checkpoint.find(out, step)
    if last is None and resume == "if-saved" and (not names_in(out) or is_run_folder(out)):
        logger.warning("%s: no checkpoint yet; the run begins at step 0", out)
        remove_partial(out)
        return None
    if last is None:
        raise ValueError(
            f"{out}: --resume was asked for, but there is no checkpoint; start without --resume "
            "in a new folder"
        )
    now = {
        "vocabulary_sha256": shards.vocabulary.sha256,
        "shards_fingerprint": shards.fingerprint,
        "recipe": config.recipe(),
    }
    require_same_start(last.record, config.model, allow_changes)
    checkpoint.require_same(last.record, now, allow_changes)
    if step is not None:
        checkpoint.set_aside_after(last)
    finish_interrupted(out, last.folder.name, config.checkpoint)
    if last.step >= steps:
        logger.warning("%s: all %d steps are done; nothing to do", out, steps)
    return last
