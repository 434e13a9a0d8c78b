"""Count tables in training cells once, and store them beside the shards.

`counted_tables` returns stored tables or counts new ones; `train_blocks` yields the cells to count.

A counted table is a pure function of the shards and of the settings it was counted with. It is
stored as ``counted/NAME-KEY.safetensors`` in the folder of the shards (or in the local copy of
shards behind a URL). KEY is a hash of both, so a table of other shards is never read. If that
folder is not writable, the `fallback` folder of the caller is used.

A table may have been counted without damaged blocks. The file names these blocks, and the table is
counted again as soon as one of them can be read again, or if a caller accepts no missing blocks.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from data_prep.files import complete_file
from data_prep.shards.reader import DamagedBlock, ShardSet

logger = logging.getLogger(__name__)

FOLDER_NAME = "counted"
_KEY_LENGTH = 16  # hex digits in the file's name; the file contains the whole hash


def counted_tables(
    shards: ShardSet,
    name: str,
    settings: Mapping[str, Any],
    count: Callable[[set[int] | None], dict[str, np.ndarray]],
    fallback: Path | None = None,
    quarantine: bool = False,
) -> dict[str, np.ndarray]:
    """Return counted tables, stored for these shards and settings or newly counted.

    Parameters
    ----------
    name
        Name of the tables, which is part of the file's name.
    settings
        All settings that determine the tables besides the shards, including a version of the
        method; JSON values.
    count
        A function that counts the tables. It is called if no tables are stored, or if the stored
        ones are damaged, with `left_out` as in `train_blocks`.
    fallback
        Folder for the tables if the folder of the shards is not writable; None: they are not
        stored.
    quarantine
        Leave damaged blocks out, instead of raising.
    """
    key = _key(shards, name, settings)
    places = [shards.folder / FOLDER_NAME, *([fallback / FOLDER_NAME] if fallback else [])]
    files = [place / f"{name}-{key[:_KEY_LENGTH]}.safetensors" for place in places]
    for file in files:
        found = _stored(file, key)
        if found is not None and (quarantine or not found[1]) and _all_damaged(shards, found[1]):
            return found[0]
    left_out: set[int] | None = set() if quarantine else None
    tables = count(left_out)
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with complete_file(file) as aside:
                # The metadata has a single entry, because several would be written in a different
                # order each time.
                identity: dict[str, Any] = {"key": key, "sha256": digest_of(tables)}
                if left_out:
                    identity["left_out"] = sorted(left_out)
                metadata = {"identity": json.dumps(identity)}
                content = {k: np.ascontiguousarray(v) for k, v in tables.items()}
                # save_file is not used, because only the owner could read the file that it writes.
                aside.write_bytes(save(content, metadata))
            break
        except OSError as error:
            logger.info("%s: %s cannot be kept here (%s)", file.parent, name, error)
    return tables


@dataclass(frozen=True)
class TrainBlock:
    """Training cells: numbers int64 [cells], flat `tokens`, `offsets` int64 [cells + 1]."""

    cells: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray

    def take(self, rows: np.ndarray) -> TrainBlock:
        """Return a block with some of these cells."""
        lengths = np.diff(self.offsets)[rows]
        parts = [self.tokens[self.offsets[row] : self.offsets[row + 1]] for row in rows]
        tokens = np.concatenate([self.tokens[:0], *parts])
        return TrainBlock(self.cells[rows], tokens, np.concatenate([[0], np.cumsum(lengths)]))


def train_blocks(
    shards: ShardSet, max_cells: int, left_out: set[int] | None = None
) -> Iterator[TrainBlock]:
    """Yield blocks of training cells, one at a time, spread evenly over the corpus.

    Parameters
    ----------
    max_cells
        Approximate number of cells in total, in whole blocks, at least one block.
    left_out
        Damaged blocks are left out, and their numbers are added to this set; None: they raise.

    Raises
    ------
    DamagedBlock
        A block is damaged and `left_out` is None.
    """
    extents = shards.extents("train")
    numbers = np.concatenate([shards.block_numbers("train", e.length) for e in extents])
    share = min(1.0, max_cells / sum(e.num_cells for e in extents))
    wanted = max(1, int(len(numbers) * share))
    first_cells = shards.index["first_cell"]
    for number in numbers[np.linspace(0, len(numbers) - 1, wanted).astype(np.int64)].tolist():
        try:
            block = shards.read_block(number)
        except DamagedBlock as error:
            if left_out is None:
                raise
            logger.warning("quarantined: %s", error)
            left_out.add(number)
            continue
        cells = int(first_cells[number]) + np.arange(len(block.offsets) - 1)
        yield TrainBlock(cells, block.tokens, block.offsets)


def _key(shards: ShardSet, name: str, settings: Mapping[str, Any]) -> str:
    decisive = {"name": name, "fingerprint": shards.fingerprint, "settings": dict(settings)}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _all_damaged(shards: ShardSet, numbers: list[int]) -> bool:
    """Return whether none of some blocks can be read."""
    for number in numbers:
        try:
            shards.read_block(number)
        except DamagedBlock:
            continue
        logger.info("%s: block %d can be read again; counted anew", shards.name, number)
        return False
    return True


def _stored(file: Path, key: str) -> tuple[dict[str, np.ndarray], list[int]] | None:
    """Return the tables of a file and the numbers of blocks that they lack.

    The result is None if the file does not exist, is damaged, or has other tables.
    """
    try:
        with safe_open(file, "numpy") as opened:
            identity = json.loads((opened.metadata() or {}).get("identity", "{}"))
            tables = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, json.JSONDecodeError):
        return None
    left_out = identity.pop("left_out", [])
    if identity != {"key": key, "sha256": digest_of(tables)}:
        logger.warning("%s: damaged or not of these shards; counted again", file)
        return None
    return tables, left_out


def digest_of(tables: Mapping[str, np.ndarray]) -> str:
    """Return a hash of tables: their names, types, shapes and numbers."""
    sha256 = hashlib.sha256()
    for name in sorted(tables):
        values = np.ascontiguousarray(tables[name])
        sha256.update(f"{name} {values.dtype.str} {values.shape}".encode())
        sha256.update(values.tobytes())
    return sha256.hexdigest()
