"""The version of this package, which is also written into everything that it makes."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

VERSION = "0.1.0"
_ROOT = Path(__file__).resolve().parent.parent
_FOLDERS = ("data_prep", "pretrain", "launch", "eval", "deepspeed_configs")


@functools.cache
def code_digest(root: Path = _ROOT) -> str:
    """Return a hash of the package's installed files, as 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for folder in _FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".yaml", ".json"):
                digest.update(str(path.relative_to(root)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
