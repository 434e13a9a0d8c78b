"""Keep what is done: a training's progress after each epoch, and a command's finished parts.

A killed run goes on from it; each file is complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from data_prep.files import PARTIAL, complete_file, file_sha256
from data_prep.genes.vocabulary import Vocabulary
from eval.finetune.classifier import Classifier, FinetuneSettings
from pretrain.cell_states.cell_state import CellState
from pretrain.cell_states.state_reader import digest_of

if TYPE_CHECKING:
    from eval.finetune.classifier import Target

PROGRESS_FORMAT = "geneloom-finetuning/1"
_RECORD, _TENSORS = "progress.json", "progress.safetensors"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class FinetuningProgress:
    """The finished epochs, the loss of each step, and the best weights.

    These are of the lowest validation loss, with early stopping only; epoch -1 is the probe that
    training began at, and `start_loss` its validation loss.
    """

    history: list[dict] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best_epoch: int = -1
    best_loss: float = float("inf")
    best: dict[str, torch.Tensor] | None = None
    start_loss: float | None = None


def identity_of(
    encoder: nn.Module,
    vocabulary: Vocabulary,
    settings: FinetuneSettings,
    seed: int,
    examples: list[tuple[list[np.ndarray], list[Target]] | None],
    state: CellState | None = None,
) -> str:
    """Return a hash of everything that determines the result of a fine-tuning."""
    how = settings.deciding() | settings.of_training_on_genes
    if state:
        how["cell_state"] = digest_of(state)
    digest = hashlib.sha256(json.dumps([how, seed, vocabulary.sha256]).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for part in examples:
        if part is None:
            digest.update(b"none")
            continue
        tokens, targets = part
        digest.update(np.array([len(t) for t in tokens], dtype=np.int64).tobytes())
        for cell in tokens:
            digest.update(np.asarray(cell, dtype=np.int64).tobytes())
        for target in targets:
            digest.update(json.dumps(asdict(target.head)).encode())
            digest.update(np.asarray(target.labels, dtype=np.int64).tobytes())
            if target.groups is not None:
                digest.update("\0".join(map(str, target.groups)).encode())
    return digest.hexdigest()


def save_progress(
    folder: Path,
    key: str,
    classifier: Classifier,
    optimizer: torch.optim.Optimizer,
    progress: FinetuningProgress,
) -> None:
    """Write progress to a temporary folder, rename it, then remove the older progress."""
    tensors = {}
    for name, parameter in _trained(classifier):
        tensors[f"weight/{name}"] = parameter.detach()
        state = optimizer.state[parameter]
        tensors |= {f"{kind}/{name}": state[kind] for kind in _MOMENTS}
    for name, tensor in (progress.best or {}).items():
        tensors[f"best/{name}"] = tensor
    older = _epochs(folder)
    with complete_file(folder / f"epoch-{len(progress.history):05d}") as aside:
        aside.mkdir(parents=True)
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, aside / _TENSORS)
        record = {
            "format": PROGRESS_FORMAT,
            "key": key,
            "tensors_sha256": file_sha256(aside / _TENSORS),
            "history": progress.history,
            "losses": progress.losses,
            "best_epoch": progress.best_epoch,
            "best_loss": progress.best_loss,
            "start_loss": progress.start_loss,
        }
        (aside / _RECORD).write_text(json.dumps(record, indent=1) + "\n")
    for path in older:
        shutil.rmtree(path)


def load_progress(
    folder: Path, key: str, classifier: Classifier, optimizer: torch.optim.Optimizer
) -> FinetuningProgress | None:
    """Load the newest progress into classifier and optimizer and return it; None if there is none.

    Raises
    ------
    ValueError
        The progress is damaged, or belongs to another fine-tuning.
    """
    found = _epochs(folder)
    if not found:
        return None
    path = found[-1]
    try:
        record = json.loads((path / _RECORD).read_text())
        is_whole = (
            record["format"] == PROGRESS_FORMAT
            and file_sha256(path / _TENSORS) == record["tensors_sha256"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{path}: this progress is damaged; delete it to start again")
    if record["key"] != key:
        raise ValueError(
            f"{folder}: holds the progress of another fine-tuning (other cells, labels, model, "
            "settings or seed); give another folder, or delete it"
        )
    tensors = load_file(path / _TENSORS)
    with torch.no_grad():
        for name, parameter in _trained(classifier):
            parameter.copy_(tensors[f"weight/{name}"])
            # torch's fused kernel needs the step count on the device of the parameter.
            optimizer.state[parameter] = {
                kind: tensors[f"{kind}/{name}"].to(parameter.device) for kind in _MOMENTS
            }
    device = classifier.settings.device
    best = {k[len("best/") :]: v.to(device) for k, v in tensors.items() if k.startswith("best/")}
    # What was begun before steps were recorded goes on without those.
    losses = record.get("losses", [])
    return FinetuningProgress(
        record["history"], losses, record["best_epoch"], record["best_loss"], best or None,
        record.get("start_loss"),
    )  # fmt: skip


def _trained(classifier: Classifier) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in classifier.named_parameters() if p.requires_grad]


def _epochs(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*"))


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
        """Return the folder of one training's progress (`load_progress`)."""
        return self._folder / name

    def remove(self) -> None:
        """Remove everything, after the results are written."""
        if self._writes:
            shutil.rmtree(self._everything, ignore_errors=True)
