"""The result of fine-tuning: an encoder with heads for cells and genes, in memory and on disk.

`Classifier` predicts, `save_classifier` and `load_classifier` write and read its folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertModel

from data_prep.files import complete_folder, file_sha256, require_new
from data_prep.genes.vocabulary import Vocabulary, load_vocabulary
from data_prep.version import VERSION
from eval.finetune.settings import FinetuneSettings
from pretrain.cell_states.cell_state import CellState
from pretrain.cell_states.frozen_states import encode_batch, length_batches, pool_genes
from pretrain.cell_states.state_reader import StateReader
from pretrain.model.architectures import (
    Encoder,
    architecture_of,
    layers_of,
    new_encoder,
    read_encoder_config,
)

CLASSIFIER_FORMAT = "geneloom-classifier/1"
RECORD_NAME = "classifier.json"
WEIGHTS_NAME = "classifier.safetensors"


@dataclass(frozen=True)
class Head:
    """A prediction target: one class per cell, or one class per gene in a cell."""

    name: str
    kind: Literal["cells", "genes"]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.kind not in ("cells", "genes"):
            raise ValueError(f"head {self.name}: kind must be cells or genes, not {self.kind!r}")
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"head {self.name}: needs two classes or more, each once")


@dataclass(frozen=True)
class GenePredictions:
    """One row for each wanted token of each cell, ordered by cell and by rank in the cell.

    Attributes
    ----------
    cell, token
        int32 [rows]: index of the cell, token id of the gene.
    probabilities
        float32 [rows, classes].
    """

    cell: np.ndarray
    token: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True)
class Items:
    """The states of a batch that a head reads: that of a `cell`, or of the token at its `place`.

    All arrays are int64 [items]; `place` counts from the cell's first token and is 0 for heads of
    cells.
    """

    cell: np.ndarray
    place: np.ndarray
    label: np.ndarray


def gene_items(tokens: list[np.ndarray], labels: np.ndarray) -> Items:
    """Return the tokens of cells that have a label.

    Parameters
    ----------
    labels
        int64 [num_tokens] of the vocabulary, -1 for tokens without a label.
    """
    lengths = np.array([len(t) for t in tokens], dtype=np.int64)
    found = labels[np.concatenate(tokens)] if len(tokens) else np.zeros(0, dtype=np.int64)
    at = np.flatnonzero(found >= 0)
    cell = np.repeat(np.arange(len(tokens)), lengths)[at]
    first = np.cumsum(lengths) - lengths
    return Items(cell, at - first[cell], found[at])


class Classifier(nn.Module):
    """An encoder and one linear layer per head, on a cell's state or a gene's own state.

    Attributes
    ----------
    reader
        Computes what heads of cells read; None: they read the mean of a cell's gene states.
    history
        One entry per finished epoch: its number, training and validation loss.
    losses
        The training loss of each step; empty in a classifier that was loaded.
    start_loss
        The validation loss of the probe that training began at, where its weights may be kept.
    centres
        float32 [heads, largest width]: dropout sets a state's numbers to these. They are 0, or, in
        a training that begins at a probe, the means of the states that it was fitted on: between
        cells a state varies by a small part of its mean, so that a 0 there says more than any cell.
    """

    centres: torch.Tensor

    def __init__(
        self,
        encoder: Encoder,
        vocabulary: Vocabulary,
        heads: tuple[Head, ...],
        settings: FinetuneSettings,
        state: CellState | None = None,
    ) -> None:
        """Take over `encoder`: freeze layers and insert adapters as `settings` ask for.

        `state`: heads of cells read cell states like this one.
        """
        super().__init__()
        if not heads or len({h.name for h in heads}) < len(heads):
            raise ValueError("classifier: needs one head or more, each with a name of its own")
        if isinstance(encoder, BertModel):
            encoder.pooler = None  # it reads the first token only, which nothing here does
        self.encoder = encoder
        self.vocabulary, self.heads, self.settings = vocabulary, heads, settings
        self.history: list[dict] = []
        self.losses: list[float] = []
        self.start_loss: float | None = None
        _freeze(encoder, settings)
        self.dropout = nn.Dropout(settings.dropout)
        self.read(state)

    def read(self, state: CellState | None) -> None:
        """Let heads of cells read cell states like this one, or means; heads begin anew."""
        self.reader = StateReader(state) if state else None
        widths = [self._width(h) for h in self.heads]
        self.outputs = nn.ModuleList(
            nn.Linear(w, len(h.classes)) for w, h in zip(widths, self.heads, strict=True)
        )
        # Not saved: without dropout, as in predictions, it changes nothing.
        centres = torch.zeros(len(self.heads), max(widths))
        self.register_buffer("centres", centres, persistent=False)
        nn.Module.to(self, torch.device(self.settings.device))

    def _width(self, head: Head) -> int:
        """Return how many numbers a head reads."""
        if self.reader and head.kind == "cells":
            return self.reader.width
        return self.encoder.config.hidden_size

    def train(self, mode: bool = True) -> Classifier:
        """Set the mode; frozen modules stay without dropout, because they only compute features."""
        super().train(mode)
        for module in _frozen_modules(self.encoder, self.settings.freeze_layers):
            module.eval()
        return self

    def forward(self, cells: list[np.ndarray], items: list[Items]) -> list[torch.Tensor]:
        """Return float32 [items, classes] logits of each head; `items` is in the order of heads."""
        states = self.states(cells, items)
        logits = []
        for output, state, centre in zip(self.outputs, states, self.centres, strict=True):
            around = centre[: state.shape[1]]
            logits.append(output(around + self.dropout(state - around)))
        return logits

    def states(self, cells: list[np.ndarray], items: list[Items]) -> list[torch.Tensor]:
        """Return float32 [items, width], the states that each head reads."""
        with torch.autocast(self.settings.device, torch.bfloat16, enabled=self.settings.bf16):
            hidden_BLD, lengths = self._encode(cells)
        pooled_BD = None
        states = []
        for head, chosen in zip(self.heads, items, strict=True):
            cell = torch.from_numpy(chosen.cell).to(hidden_BLD.device)
            if head.kind == "cells":
                if pooled_BD is None:
                    pooled_BD = pool_genes(hidden_BLD, lengths, self.vocabulary.has_cls, "mean")
                    if self.reader:
                        pooled_BD = self.reader(cells, pooled_BD)
                state = pooled_BD[cell]
            else:
                state = hidden_BLD[cell, torch.from_numpy(chosen.place).to(cell.device)].float()
            states.append(state)
        return states

    def _encode(self, cells: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = {len(c) for c in cells}
        if len(lengths) > 1:
            return encode_batch(self.encoder, cells, self.vocabulary)
        # Without padding no mask is passed, because every layer would turn it into a float matrix
        # of [L, L].
        ids = torch.from_numpy(np.stack(cells).astype(np.int64)).to(self.encoder.device)
        hidden_BLD = self.encoder(input_ids=ids).last_hidden_state
        return hidden_BLD, torch.full((len(cells),), *lengths, device=ids.device)

    def predict_cells(self, tokens: list[np.ndarray], head_name: str) -> np.ndarray:
        """Return float32 [cells, classes] probabilities in input order; NaN for empty cells."""
        head = self._head(head_name, "cells")
        out = np.full((len(tokens), len(head.classes)), np.nan, dtype=np.float32)
        for batch in self._batches(tokens):
            every = np.arange(len(batch))
            items = Items(every, np.zeros_like(every), every)
            out[batch] = self._probabilities([tokens[i] for i in batch], head, items)
        return out

    def predict_genes(
        self, tokens: list[np.ndarray], head_name: str, wanted: np.ndarray
    ) -> GenePredictions:
        """Return the probabilities of every wanted token in every cell.

        Parameters
        ----------
        wanted
            bool [num_tokens] of the vocabulary. Cells without any wanted token are not computed.
        """
        head = self._head(head_name, "genes")
        labels = np.where(wanted, 0, -1)
        has_item = np.array([bool(wanted[t].any()) for t in tokens], dtype=bool)
        cells, places, found = [], [], []
        for batch in self._batches(tokens, has_item):
            members = [tokens[i] for i in batch]
            items = gene_items(members, labels)
            found.append(self._probabilities(members, head, items))
            cells.append(batch[items.cell])
            places.append(items.place)
        if not cells:
            nothing = np.zeros(0, dtype=np.int32)
            return GenePredictions(nothing, nothing, np.zeros((0, len(head.classes)), np.float32))
        cell, place = np.concatenate(cells), np.concatenate(places)
        order = np.lexsort((place, cell))
        cell, place = cell[order], place[order]
        token = np.array([tokens[c][p] for c, p in zip(cell, place, strict=True)], dtype=np.int32)
        return GenePredictions(cell.astype(np.int32), token, np.concatenate(found)[order])

    def _head(self, name: str, kind: str) -> Head:
        for head in self.heads:
            if head.name == name and head.kind == kind:
                return head
        known = [f"{h.name} ({h.kind})" for h in self.heads]
        raise ValueError(f"head '{name}': this classifier has no such head of {kind}, only {known}")

    def _batches(
        self, tokens: list[np.ndarray], chosen: np.ndarray | None = None
    ) -> Iterator[np.ndarray]:
        lengths = np.array([len(t) for t in tokens], dtype=np.int64)
        num_special = 2 if self.vocabulary.has_cls else 0
        computed = lengths > num_special
        if chosen is not None:
            computed &= chosen
        yield from length_batches(np.where(computed, lengths, 0), self.settings.token_budget)

    @torch.inference_mode()
    def _probabilities(self, cells: list[np.ndarray], head: Head, items: Items) -> np.ndarray:
        self.eval()
        nothing = Items(*(np.zeros(0, dtype=np.int64),) * 3)
        logits = self(cells, [items if h is head else nothing for h in self.heads])
        return logits[self.heads.index(head)].softmax(dim=-1).cpu().numpy()


def _frozen_modules(encoder: Encoder, num_layers: int) -> list[nn.Module]:
    return [encoder.embeddings, *layers_of(encoder)[:num_layers]] if num_layers else []


def _freeze(encoder: Encoder, settings: FinetuneSettings) -> None:
    """Freeze the lowest layers; with LoRA, freeze everything but the adapters inserted here."""
    depth = len(layers_of(encoder))
    if not 0 <= settings.freeze_layers <= depth:
        raise ValueError(f"--freeze-layers {settings.freeze_layers}: the model has {depth} layers")
    encoder.requires_grad_(True)
    if settings.lora_rank and settings.freeze_layers == depth:
        raise ValueError(f"--lora-rank: no layer is left for it, all {depth} are frozen")
    if settings.lora_rank:
        kind = architecture_of(encoder)
        adapters = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            target_modules=kind.lora_targets,
            layers_to_transform=list(range(settings.freeze_layers, depth)),
            layers_pattern=kind.layers_name,
        )
        inject_adapter_in_model(adapters, encoder)
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_("lora_" in name)
    for module in _frozen_modules(encoder, settings.freeze_layers):
        module.requires_grad_(False)


def save_classifier(classifier: Classifier, folder: Path, record: dict) -> None:
    """Write a classifier as a folder that is either complete or absent.

    The folder contains everything needed to predict: the encoder's ``config.json``, all weights
    (including adapters) as safetensors, ``vocabulary.json``, and ``classifier.json`` with heads,
    settings, history, hashes and `record`.

    Parameters
    ----------
    record
        Description of the training data as JSON values; stored under ``record``.

    Raises
    ------
    ValueError
        `folder` exists and is not empty.
    """
    require_new(folder)
    with complete_folder(folder, RECORD_NAME) as partial:
        # The tensors are made contiguous, because safetensors refuses views, and peft may create
        # some.
        weights = {k: v.detach().cpu().contiguous() for k, v in classifier.state_dict().items()}
        save_file(weights, partial / WEIGHTS_NAME)
        classifier.encoder.config.to_json_file(partial / "config.json", use_diff=False)
        classifier.vocabulary.save(partial / "vocabulary.json")
        state = classifier.reader.state if classifier.reader else None
        if state:
            state.save(partial)
        content = {
            "format": CLASSIFIER_FORMAT,
            "geneloom": VERSION,
            "heads": [asdict(h) for h in classifier.heads],
            "settings": asdict(classifier.settings),
            "history": classifier.history,
            "vocabulary_sha256": classifier.vocabulary.sha256,
            "weights_sha256": file_sha256(partial / WEIGHTS_NAME),
            # Of the model whose cell state the heads of cells read; null: they read means.
            "cell_state": state.origin["weights_sha256"] if state else None,
            "record": record,
        }
        (partial / RECORD_NAME).write_text(json.dumps(content, indent=1) + "\n")


def read_record(folder: Path) -> dict:
    """Return the content of a classifier's ``classifier.json``.

    Raises
    ------
    ValueError
        The folder contains no classifier, or one of another format.
    """
    path = folder / RECORD_NAME
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder}: no {RECORD_NAME}; expected a folder of `geneloom finetune --save-head`"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != CLASSIFIER_FORMAT:
        raise ValueError(f"{path}: not of format {CLASSIFIER_FORMAT}")
    return content


def load_classifier(folder: Path, device: str = "cpu") -> Classifier:
    """Return the classifier of a folder, with exactly the weights that were saved.

    Raises
    ------
    ValueError
        There is no classifier, or its weights or vocabulary are not those that were saved.
    """
    content = read_record(folder)
    vocabulary = load_vocabulary(folder / "vocabulary.json")
    if vocabulary.sha256 != content["vocabulary_sha256"]:
        raise ValueError(f"{folder / 'vocabulary.json'}: is not the one of this classifier")
    weights = folder / WEIGHTS_NAME
    if not weights.exists() or file_sha256(weights) != content["weights_sha256"]:
        raise ValueError(f"{weights}: is missing or damaged (another SHA-256 than recorded)")
    encoder = new_encoder(read_encoder_config(folder / "config.json"))
    heads = tuple(Head(h["name"], h["kind"], tuple(h["classes"])) for h in content["heads"])
    settings = replace(FinetuneSettings(**content["settings"]), device=device)
    of_model = content.get("cell_state")  # absent in folders from before heads read cell states
    state = CellState.load(folder, vocabulary, of_model) if of_model is not None else None
    classifier = Classifier(encoder, vocabulary, heads, settings, state)
    try:
        # Loading is strict, because a missing tensor would stay random without any message.
        classifier.load_state_dict(load_file(weights), strict=True)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{weights}: the weights cannot be read ({error})") from error
    classifier.history = content["history"]
    return classifier.eval()


@dataclass(frozen=True)
class Target:
    """The labels that a head learns.

    Attributes
    ----------
    labels
        int64, indices into ``head.classes``, and -1 for no label. Kind ``cells``: [cells]. Kind
        ``genes``: [num_tokens] of the vocabulary; a token has the same class in every cell.
    groups
        Of heads of cells: [cells], such as donors, which the penalty of a probe is chosen by; None:
        each cell is a group.
    """

    head: Head
    labels: np.ndarray
    groups: np.ndarray | None = None

    def of_cells(self, cells: np.ndarray) -> Target:
        """Return the labels of some cells, int positions; a head of genes keeps its own."""
        if self.head.kind == "genes":
            return self
        groups = None if self.groups is None else self.groups[cells]
        return replace(self, labels=self.labels[cells], groups=groups)
