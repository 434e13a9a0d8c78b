"""``ended.json``: how a run ended, for scripts that cannot see its exit code.

DeepSpeed's launcher and torchrun exit with 1 for any exit code other than 0. This file contains the
exit code of the run itself.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from data_prep.errors import EXIT_FAILED, EXIT_RESUMABLE
from data_prep.files import complete_file
from data_prep.running.owner import Owner
from pretrain.ranks.dist import Ranks

ENDED_NAME = "ended.json"


class TrainingProgress(Protocol):
    """The interface that tells how far a run is, and whether it was stopped."""

    stopped: bool
    last_step: int


@contextlib.contextmanager
def recorded_end(
    run: Path, ranks: Ranks, progress: TrainingProgress, owner: Owner
) -> Iterator[None]:
    """Let rank 0 write how the ``with`` block ended.

    While the block runs, and after the process was killed, the file does not exist.
    """
    if not ranks.is_first:
        yield
        return
    (run / ENDED_NAME).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        with contextlib.suppress(OSError):
            text = f"{type(error).__name__}: {error}"
            _write(run, owner, "failed", EXIT_FAILED, progress.last_step, text)
        raise
    state, code = ("stopped", EXIT_RESUMABLE) if progress.stopped else ("finished", 0)
    _write(run, owner, state, code, progress.last_step)


def _write(run: Path, owner: Owner, state: str, code: int, step: int, error: str = "") -> None:
    owner.require()
    content = {"state": state, "code": code, "step": step, "time": time.time(), "error": error}
    with complete_file(run / ENDED_NAME) as aside:
        aside.write_text(json.dumps(content) + "\n")
