"""Writing checkpoints while training goes on: complete or absent.

A save copies the rank's fragments in memory; a thread does the rest. Every rank writes its file
into ``.step-00000500.NONCE.partial`` and beside it a note with size and SHA-256. When rank 0 finds
the notes of all ranks it writes checkpoint.json, renames the folder, and points `latest` to it.
Files are the only way in which the threads of different ranks talk: collectives belong to the
training.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.shards import file_sha256
from pretrain import checkpoint
from pretrain.config import CheckpointConfig
from pretrain.dist import Ranks
from pretrain.zero_state import BYTES_PER_PARAMETER, Snapshot

logger = logging.getLogger(__name__)

_POLL_S = 0.02
# What a checkpoint needs beside the fragments: names, shapes, the record.
_SLACK_BYTES = 1 << 20


class CheckpointFailed(OSError):
    """A checkpoint could not be written; those before it are as they were."""


class Publisher:
    """Saves checkpoints of one rank in the background, one at a time.

    Parameters
    ----------
    run
        Run folder, shared by all ranks.
    nonce
        The same on all ranks of this start of the run: nobody writes into what an earlier start
        left behind.
    num_parameters
        Of the model, over all ranks.
    timeout_s
        How long rank 0 waits for the files of the others.

    Raises
    ------
    ValueError
        There is no room for a single checkpoint.
    """

    def __init__(
        self,
        run: Path,
        ranks: Ranks,
        config: CheckpointConfig,
        nonce: str,
        num_parameters: int,
        timeout_s: float,
    ) -> None:
        self._root = run / "checkpoints"
        self._ranks, self._config, self._nonce = ranks, config, nonce
        self._total_bytes, self._timeout_s = num_parameters * BYTES_PER_PARAMETER, timeout_s
        lack = lack_of_space(self._root, self._total_bytes)
        if lack:
            raise ValueError(
                f"{self._root}: no room for one checkpoint: {lack}; choose another run.out"
            )
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None
        self._finished: deque[dict[str, float]] = deque()

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def take_finished(self) -> Iterator[dict[str, float]]:
        """Yield, once, what each checkpoint took: step, blocked_s, written_s, bytes."""
        while self._finished:
            yield self._finished.popleft()

    def save(self, engine, stage: int, record: dict[str, Any]) -> None:
        """Copy the state of an engine and write it in the background.

        Waits for the checkpoint before, if that is still being written.
        """
        started = time.perf_counter()
        self._wait()
        if self._error:
            return  # the ranks agree on it in the next step
        lack = lack_of_space(self._root, self._total_bytes)
        if lack:
            self._error = CheckpointFailed(lack)
            return
        self._snapshot.take(engine, stage, self._ranks.rank)
        blocked_s = time.perf_counter() - started
        self._thread = threading.Thread(
            target=self._publish, args=(record, blocked_s), name="publisher", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Return when everything is written.

        Raises
        ------
        CheckpointFailed
            The last one could not be.
        """
        self._wait()
        self.raise_if_failed()

    def raise_if_failed(self) -> None:
        """Raise what went wrong in the background."""
        if self._error is None:
            return
        complete = sorted(p.name for p in self._root.glob("step-*"))
        raise CheckpointFailed(
            f"{self._root}: a checkpoint could not be written ({self._error}); "
            + (f"{complete[-1]} before it is complete. " if complete else "there is none before. ")
            + "Make room, or see to the file system, and go on with --resume"
        ) from self._error

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
        except OSError as error:
            self._error = error
            shutil.rmtree(partial, ignore_errors=True)
            return
        seconds = time.perf_counter() - started
        self._finished.append(
            {
                "step": record["step"],
                "blocked_s": blocked_s,
                "written_s": seconds,
                "bytes": self._total_bytes,
            }
        )

    def _write_mine(self, partial: Path) -> None:
        path = partial / f"rank-{self._ranks.rank:05d}.safetensors"
        self._snapshot.write(path)
        checkpoint.sync(path)
        note = {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        # Renamed, so that rank 0 never reads half a note.
        aside = path.with_suffix(".note.partial")
        aside.write_text(json.dumps(note))
        aside.rename(path.with_suffix(".note"))

    def _finish(self, partial: Path, name: str, record: dict[str, Any]) -> None:
        files = []
        deadline = time.monotonic() + self._timeout_s
        for rank in range(self._ranks.world_size):
            note = partial / f"rank-{rank:05d}.note"
            while not note.exists():
                if time.monotonic() > deadline:
                    raise CheckpointFailed(f"rank {rank} wrote nothing in {self._timeout_s:.0f} s")
                time.sleep(_POLL_S)
            files.append(json.loads(note.read_text()))
        for rank in range(self._ranks.world_size):
            (partial / f"rank-{rank:05d}.note").unlink()
        checkpoint.write_record(partial, record | {"files": files})
        checkpoint.sync(partial)
        partial.rename(self._root / name)
        _point_latest(self._root, name)
        _remove_old(self._root, self._config)


def lack_of_space(root: Path, needed_bytes: int) -> str | None:
    """Return what is said if a checkpoint does not fit on the disk."""
    existing = next(p for p in (root, *root.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free >= needed_bytes + _SLACK_BYTES:
        return None
    return f"it needs {needed_bytes / 2**20:,.0f} MiB, {existing} has {free / 2**20:,.0f} MiB free"


def remove_partial(run: Path) -> None:
    """Remove what earlier starts of a run were writing when they ended."""
    for folder in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _point_latest(root: Path, name: str) -> None:
    aside = root / ".latest.partial"
    aside.write_text(name + "\n")
    checkpoint.sync(aside)
    aside.replace(root / "latest")
    checkpoint.sync(root)


def _remove_old(root: Path, config: CheckpointConfig) -> None:
    every = config.keep_every_steps
    for folder in sorted(root.glob("step-*"), reverse=True)[config.keep :]:
        if every is None or int(folder.name.removeprefix("step-")) % every:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            trash = root / f".{folder.name}.trash"
            folder.rename(trash)
            shutil.rmtree(trash)
