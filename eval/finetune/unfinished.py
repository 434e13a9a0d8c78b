"""Keep the finished parts of ``geneloom finetune``, so that a killed run can continue."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.files import PARTIAL, complete_file


class Unfinished:
    """Scores of finished seeds and the current training, in a part of the output folder.

    They are stored below a hash of everything that determines them, so results of other settings
    are not found. With several ranks only the first one writes.
    """

    def __init__(self, out: Path, identity: dict[str, Any], writes: bool) -> None:
        """Take the JSON values that determine all results; nothing is written yet."""
        whole = json.dumps(identity, sort_keys=True)
        self._everything = out / PARTIAL
        self._folder = self._everything / hashlib.sha256(whole.encode()).hexdigest()[:24]
        self._writes = writes

    def seed(self, number: int, compute: Callable[[], dict]) -> dict:
        """Return the scores of a seed, stored before or computed and stored now."""
        path = self._folder / f"seed-{number}.json"
        if path.exists():
            return json.loads(path.read_text())
        scores = compute()
        if self._writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            with complete_file(path) as aside:
                aside.write_text(json.dumps(scores))
        return scores

    def training(self, name: str) -> Path:
        """Return the folder of one training's progress (`eval.finetune.progress`)."""
        return self._folder / name

    def remove(self) -> None:
        """Remove everything, after the results are written."""
        if self._writes:
            shutil.rmtree(self._everything, ignore_errors=True)
