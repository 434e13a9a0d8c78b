"""Write checkpoints in the background of training, so that each is either complete or absent.

`Publisher.save` copies the fragments of this rank in memory; a thread does the rest. Every rank
writes its file into ``.step-00000500.NONCE.partial``, and next to it a note with size and SHA-256,
or with the error. When rank 0 has read the notes of all ranks, it writes checkpoint.json, renames
the folder, and points `latest` to it. The threads of different ranks communicate through files
only, because collective operations belong to the training thread.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.errors import SharedFailure
from data_prep.files import file_sha256, force_to_disk
from data_prep.running.owner import Owner
from pretrain.checkpoints import checkpoint
from pretrain.checkpoints.zero_state import Snapshot
from pretrain.config import CheckpointConfig
from pretrain.ranks import dist
from pretrain.ranks.dist import Ranks

logger = logging.getLogger(__name__)

_POLL_S = 0.02
_LATEST_PARTIAL = ".latest.partial"
# Space for the names and shapes in the file of each rank, and for the record.
_SLACK_BYTES = 1 << 18


class CheckpointFailed(SharedFailure, OSError):
    """A checkpoint could not be written; earlier checkpoints are unchanged."""


class NoRoom(SharedFailure, ValueError):
    """The disk has too little space for even one checkpoint."""


class Publisher:
    """Saves the checkpoints of one rank in the background, one at a time.

    Parameters
    ----------
    run
        The run folder, which all ranks share.
    state_bytes
        Size of weights and moments over all ranks.
    timeout_s
        How long rank 0 waits for the files of the other ranks.
    owner
        The owner of the run folder; rank 0 publishes nothing if the folder now belongs to another
        run.

    Raises
    ------
    NoRoom
        Raised on all ranks, before anything is written.
    """

    def __init__(
        self,
        run: Path,
        ranks: Ranks,
        config: CheckpointConfig,
        state_bytes: int,
        timeout_s: float,
        owner: Owner,
    ) -> None:
        self._root = run / "checkpoints"
        self._ranks, self._config, self._owner = ranks, config, owner
        # The nonce is the same on all ranks of this start of the run, and no rank writes into
        # folders that an earlier start left behind.
        self._nonce = dist.first_rank_says(uuid.uuid4().hex[:8])
        self._fragment_bytes, self._timeout_s = state_bytes, timeout_s
        lack = dist.first_rank_says(self._lack_of_space())
        if lack:
            raise NoRoom(
                f"{self._root}: no room for one checkpoint: {lack}; choose another run.out"
            )
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._given_up = threading.Event()
        self._finished: deque[dict[str, float]] = deque()

    @property
    def has_failed(self) -> bool:
        """Return whether this rank has noticed that a checkpoint cannot be completed."""
        return self._error is not None

    def take_finished(self) -> Iterator[dict[str, float]]:
        """Yield once, for each finished checkpoint, its step, blocked_s, written_s and bytes."""
        while self._finished:
            yield self._finished.popleft()

    def save(self, engine, stage: int, record: dict[str, Any]) -> None:
        """Copy the state of an engine and write it in the background; called by all ranks.

        If the previous checkpoint is still being written, this waits for it.

        Raises
        ------
        CheckpointFailed
            Raised on all ranks if the previous checkpoint could not be written, or if there is no
            space for this one.
        """
        started = time.perf_counter()
        self._settle()
        self.stop_if_failed(self._lack_of_space() if self._ranks.is_first else "")
        self._snapshot.take(engine, stage, self._ranks.rank)
        blocked_s = time.perf_counter() - started
        self._thread = threading.Thread(
            target=self._publish, args=(record, blocked_s), name="publisher", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Return when all ranks have written everything.

        Raises
        ------
        CheckpointFailed
            Raised on all ranks if the last checkpoint could not be written.
        """
        self._settle()
        self.stop_if_failed()

    def let_finish(self) -> None:
        """Wait for a running write, if this is the only rank: an error elsewhere ends the run.

        With several ranks, this rank cannot know whether the others still write.
        """
        if self._ranks.world_size == 1:
            self._wait()

    def stop_if_failed(self, problem: str = "") -> None:
        """Raise the same error on all ranks if one of them has a problem; called by all ranks.

        Raises
        ------
        CheckpointFailed
            No partly written checkpoint is left.
        """
        if self._error:
            problem = f"{type(self._error).__name__}: {self._error}"
        told = dist.gather_text(problem, self._ranks)
        problems = [f"rank {rank}: {text}" for rank, text in enumerate(told) if text]
        if not problems:
            return
        self._given_up.set()
        self._wait()
        dist.wait_for_all()  # after this no rank writes any more
        if self._ranks.is_first:
            self._owner.require()
            remove_partial(self._root.parent)
        complete = sorted(p.name for p in self._root.glob("step-*"))
        before = f"{complete[-1]} is complete" if complete else "there is none before"
        raise CheckpointFailed(
            f"{self._root}: a checkpoint could not be written ({problems[0]}); {before}. Make "
            "room, or see to the file system, and go on with --resume"
        ) from self._error

    def _lack_of_space(self) -> str:
        """Return an error text if a checkpoint does not fit on the disk, else an empty text."""
        needed = self._fragment_bytes + _SLACK_BYTES * self._ranks.world_size
        existing = next(p for p in (self._root, *self._root.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if free >= needed:
            return ""
        return f"it needs {needed / 2**20:,.1f} MiB, {existing} has {free / 2**20:,.1f} MiB free"

    def _settle(self) -> None:
        """Return when no rank writes any more, or one has failed; called by all ranks.

        The threads are not joined first, because a rank that could not even write its note would
        then be waited for.
        """
        while True:
            is_busy = self._thread is not None and self._thread.is_alive()
            states = {"busy": int(is_busy), "failed": int(self.has_failed)}
            counts = dist.count_over_ranks(states)
            if counts["failed"] or not counts["busy"]:
                return
            time.sleep(_POLL_S)

    def _wait(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None

    def _publish(self, record: dict[str, Any], blocked_s: float) -> None:
        started = time.perf_counter()
        name = checkpoint.folder_name(record["step"])
        partial = self._root / f".{name}.{self._nonce}.partial"
        try:
            partial.mkdir(parents=True, exist_ok=True)
            self._write_mine(partial)
            if self._ranks.is_first:
                self._finish(partial, name, record)
        except Exception as error:  # noqa: BLE001  raised later by all ranks together
            self._error = error
            return
        seconds = time.perf_counter() - started
        self._finished.append(
            {
                "step": record["step"],
                "blocked_s": blocked_s,
                "written_s": seconds,
                "bytes": self._fragment_bytes,
            }
        )

    def _write_mine(self, partial: Path) -> None:
        path = partial / f"rank-{self._ranks.rank:05d}.safetensors"
        try:
            self._snapshot.write(path)
            force_to_disk(path)
            note = {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        except Exception as error:
            # Deleting the file makes space for the note if the disk is full.
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                _write_note(path, {"error": f"{type(error).__name__}: {error}"})
            raise
        _write_note(path, note)

    def _finish(self, partial: Path, name: str, record: dict[str, Any]) -> None:
        deadline = time.monotonic() + self._timeout_s
        notes = [partial / f"rank-{r:05d}.note" for r in range(self._ranks.world_size)]
        files = [self._wait_for(note, deadline) for note in notes]
        for note in notes:
            note.unlink()
        checkpoint.write_record(partial, record | {"files": files})
        force_to_disk(partial)
        self._owner.require()
        partial.rename(self._root / name)
        force_to_disk(self._root)
        _point_latest(self._root, name)
        _remove_old(self._root, self._config)

    def _wait_for(self, path: Path, deadline: float) -> dict[str, Any]:
        """Wait for the note of a rank and return it."""
        while not path.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path.stem} has not been written in {self._timeout_s:.0f} s")
            if self._given_up.wait(_POLL_S):
                raise InterruptedError("given up: another rank failed")
        note = json.loads(path.read_text())
        if "error" in note:
            raise OSError(f"{path.stem}: {note['error']}")
        return note


def _write_note(file: Path, note: dict[str, Any]) -> None:
    # The note gets its name only when it is complete, so that rank 0 never reads half of it.
    aside = file.with_suffix(".note.partial")
    aside.write_text(json.dumps(note))
    aside.rename(file.with_suffix(".note"))


def remove_partial(run: Path) -> None:
    """Remove folders that were being written or deleted when a run ended."""
    for folder in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(folder, ignore_errors=True)
    (run / "checkpoints" / _LATEST_PARTIAL).unlink(missing_ok=True)


def finish_interrupted(run: Path, newest: str, config: CheckpointConfig) -> None:
    """Clean up the checkpoints of a run that ended at any moment.

    `newest` is the name of its newest complete checkpoint.
    """
    remove_partial(run)
    _point_latest(run / "checkpoints", newest)
    _remove_old(run / "checkpoints", config)


def _point_latest(root: Path, name: str) -> None:
    aside = root / _LATEST_PARTIAL
    aside.write_text(name + "\n")
    force_to_disk(aside)
    aside.replace(root / "latest")
    force_to_disk(root)


def _remove_old(root: Path, config: CheckpointConfig) -> None:
    """Remove checkpoints that are not new, not of a step to keep, and not among the best."""
    every = config.keep_every_steps
    stay = set(checkpoint.best_first(checkpoint.heldout_losses(root))[: config.keep_best])
    for folder in sorted(root.glob("step-*"), reverse=True)[config.keep :]:
        if folder not in stay and (every is None or checkpoint.step_of(folder) % every):
            # The folder is renamed first, because a partly deleted folder must not look like a
            # checkpoint.
            trash = root / f".{folder.name}.trash"
            try:
                folder.rename(trash)
                shutil.rmtree(trash)
            except OSError as error:
                logger.warning("%s is left over: it could not be removed (%s)", folder, error)
