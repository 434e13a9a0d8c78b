"""What is counted from training cells: counted once, kept beside the shards.

A counted table is a pure function of the shards and of the settings it was counted with. It is
stored as ``counted/NAME-KEY.safetensors`` in the folder of the shards (or in the local copy of
shards behind a URL), where KEY is a hash of both, so a table of other shards is never read. Where
that folder cannot be written to, the caller's `fallback` folder is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data_prep.files import complete_file
from data_prep.shards import ShardSet

logger = logging.getLogger(__name__)

FOLDER_NAME = "counted"
_KEY_LENGTH = 16  # hex digits of the file's name; the whole hash stands in the file


def counted_tables(
    shards: ShardSet,
    name: str,
    settings: Mapping[str, Any],
    count: Callable[[], dict[str, np.ndarray]],
    fallback: Path | None = None,
) -> dict[str, np.ndarray]:
    """Return counted tables: those stored for these shards and settings, else newly counted ones.

    Parameters
    ----------
    name
        What is counted, part of the file's name.
    settings
        Everything besides the shards that decides the tables, a version of the method included;
        JSON values.
    count
        Makes the tables. It is called when none are stored, or the stored ones are damaged.
    fallback
        Folder to keep them in where the shards' own cannot be written to; None: they are not kept.
    """
    key = _key(shards, name, settings)
    places = [shards.folder / FOLDER_NAME, *([fallback / FOLDER_NAME] if fallback else [])]
    files = [place / f"{name}-{key[:_KEY_LENGTH]}.safetensors" for place in places]
    for file in files:
        if (tables := _stored(file, key)) is not None:
            return tables
    tables = count()
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with complete_file(file) as aside:
                metadata = {"key": key, "sha256": _digest(tables)}
                save_file({k: np.ascontiguousarray(v) for k, v in tables.items()}, aside, metadata)
            break
        except OSError as error:
            logger.info("%s: %s cannot be kept here (%s)", file.parent, name, error)
    return tables


def _key(shards: ShardSet, name: str, settings: Mapping[str, Any]) -> str:
    decisive = {"name": name, "fingerprint": shards.fingerprint, "settings": dict(settings)}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _stored(file: Path, key: str) -> dict[str, np.ndarray] | None:
    """Return the tables of a file; None if there are none, of another key, or damaged ones."""
    try:
        with safe_open(file, "numpy") as opened:
            metadata = opened.metadata() or {}
            tables = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    if metadata.get("key") != key or metadata.get("sha256") != _digest(tables):
        logger.warning("%s: damaged or not of these shards; counted again", file)
        return None
    return tables


def _digest(tables: Mapping[str, np.ndarray]) -> str:
    sha256 = hashlib.sha256()
    for name in sorted(tables):
        values = np.ascontiguousarray(tables[name])
        sha256.update(f"{name} {values.dtype.str} {values.shape}".encode())
        sha256.update(values.tobytes())
    return sha256.hexdigest()
