"""Cell classification: fine-tune an encoder, beside the baselines and its random-weights twin."""

from __future__ import annotations

import copy
import json
import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import BertModel

from data_prep.sources import SourceOptions
from data_prep.vocab import Vocabulary
from eval.baselines import predict_baselines, predict_from_embedding
from eval.embed import embed_cells, encode_batch, length_batches, pool_genes
from eval.encode import CellSet, encode_file
from eval.metrics import mean_and_interval, score_classes
from eval.splits import limit_per_class, split_cells
from pretrain.export import load_exported, random_twin

logger = logging.getLogger(__name__)

RESULTS_NAME = "results.json"
_FEWEST_CELLS_OF_CLASS = 5
_SORT_WINDOW_BATCHES = 16
_NO_VALUE = ["", "nan", "None", "NA", "unlabelled"]


@dataclass(frozen=True)
class FinetuneSettings:
    """How a classifier is trained; the same for pretrained and random weights.

    Attributes
    ----------
    learning_rate
        Peak of AdamW, linear warm-up over the first tenth, linear decay. Geneformer: 5e-5.
    freeze_layers
        Lowest encoder layers (and the embeddings) that are not trained; 0 trains everything.
    batch_cells
        Cells of one optimizer step.
    token_budget
        Padded tokens of one forward pass when predicting.
    """

    epochs: int = 5
    learning_rate: float = 2e-4
    batch_cells: int = 16
    freeze_layers: int = 0
    weight_decay: float = 0.001
    dropout: float = 0.1
    token_budget: int = 16_384
    bf16: bool = False
    device: str = "cpu"


class CellClassifier(nn.Module):
    """Encoder, mean over a cell's genes, linear layer."""

    def __init__(self, encoder: BertModel, num_classes: int, dropout: float, has_cls: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(encoder.config.hidden_size, num_classes)
        self._has_cls = has_cls

    def forward(self, cells: list[np.ndarray], vocabulary: Vocabulary) -> torch.Tensor:
        """Return float32 [cells, classes] logits."""
        hidden, lengths = encode_batch(self.encoder, cells, vocabulary)
        pooled = pool_genes(hidden, lengths, self._has_cls, "mean")
        return self.head(self.dropout(pooled))


def train_classifier(
    encoder: BertModel,
    vocabulary: Vocabulary,
    tokens: list[np.ndarray],
    labels: np.ndarray,
    num_classes: int,
    settings: FinetuneSettings,
    seed: int,
) -> CellClassifier:
    """Return a trained classifier; `encoder` itself is not changed.

    Classes weigh alike in the loss (inverse frequency), since macro-F1 is the headline.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = CellClassifier(
        copy.deepcopy(encoder), num_classes, settings.dropout, vocabulary.has_cls
    ).to(settings.device)
    _freeze(model.encoder, settings.freeze_layers)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    steps = settings.epochs * -(-len(labels) // settings.batch_cells)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, (steps - s) / max(1, steps - warmup))
    )
    frequency = np.bincount(labels, minlength=num_classes) / len(labels)
    weights = torch.tensor(1 / np.maximum(frequency * num_classes, 1e-12), dtype=torch.float32)
    weights = weights.to(settings.device)
    lengths = np.array([len(t) for t in tokens])
    model.train()
    for _ in range(settings.epochs):
        for batch in _shuffled_batches(lengths, settings.batch_cells, rng):
            with torch.autocast(settings.device, torch.bfloat16, enabled=settings.bf16):
                logits = model([tokens[i] for i in batch], vocabulary)
            target = torch.from_numpy(labels[batch]).to(settings.device)
            loss = functional.cross_entropy(logits.float(), target, weight=weights)
            loss.backward()
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()


def predict(
    model: CellClassifier,
    vocabulary: Vocabulary,
    tokens: list[np.ndarray],
    settings: FinetuneSettings,
) -> np.ndarray:
    """Return int [cells] predicted classes, in the order of `tokens`."""
    lengths = np.array([len(t) for t in tokens], dtype=np.int64)
    out = np.zeros(len(tokens), dtype=np.int64)
    with (
        torch.inference_mode(),
        torch.autocast(settings.device, torch.bfloat16, enabled=settings.bf16),
    ):
        for batch in length_batches(lengths, settings.token_budget):
            out[batch] = model([tokens[i] for i in batch], vocabulary).argmax(dim=-1).cpu()
    return out


def finetune_cells(
    cells: Path,
    model_folder: Path,
    label: str,
    out: Path,
    donor: str | None = None,
    seeds: int = 3,
    vocabulary_path: Path | None = None,
    settings: FinetuneSettings = FinetuneSettings(),  # noqa: B008  frozen
    options: SourceOptions = SourceOptions(),  # noqa: B008  frozen
    max_train_per_class: int | None = None,
    max_test_per_class: int | None = None,
) -> dict:
    """Write and return the scores of a fine-tuned encoder beside its baselines.

    Every seed has its own split, drawn cells, head and random twin; all contenders of a seed see
    the same cells.

    Raises
    ------
    ValueError
        Missing columns, fewer than two classes, fewer than three seeds, or `out` is not empty.
    """
    if seeds < 3:
        raise ValueError(f"--seeds {seeds}: at least 3, or there is no interval to report")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not an empty folder; give --out a new one")
    network, vocabulary = load_exported(model_folder, vocabulary_path)
    columns = tuple(dict.fromkeys([*options.columns, label, *([donor] if donor else [])]))
    options = replace(options, columns=columns)
    cell_set, dropped = _labelled(encode_file(cells, vocabulary, options), label, donor)
    classes = sorted(set(cell_set.metadata[label]))
    labels = np.array([classes.index(v) for v in cell_set.metadata[label]])
    donors = cell_set.metadata[donor].to_numpy(dtype=str) if donor else None
    per_seed = []
    for seed in range(seeds):
        train, test = split_cells(labels, donors, seed)
        train = limit_per_class(train, labels, max_train_per_class, seed)
        test = limit_per_class(test, labels, max_test_per_class, seed)
        started = time.perf_counter()
        predictions = predict_baselines(cell_set.counts, labels, train, test, seed)
        for weights, encoder in (
            ("pretrained", network.bert),
            ("random weights", random_twin(network, seed).bert),
        ):
            frozen, tuned = _predict_with(
                encoder, vocabulary, cell_set.tokens, labels, train, test, settings, seed
            )
            predictions[f"frozen embedding, {weights}"] = frozen
            predictions[f"fine-tuned, {weights}"] = tuned
        scores = {n: score_classes(labels[test], p, classes) for n, p in predictions.items()}
        per_seed.append(
            {"seed": seed, "train_cells": len(train), "test_cells": len(test), "scores": scores}
        )
        logger.info(
            "seed %d: macro-F1 %s (%.0f s)", seed,
            ", ".join(f"{s['macro_f1']:.3f} {n}" for n, s in scores.items()),
            time.perf_counter() - started,
        )  # fmt: skip
    results = {
        "task": f"{label} of {cells.name}",
        "label": label,
        "classes": classes,
        "cells": len(labels),
        "dropped": dropped,
        "split": f"by {donor}" if donor else "stratified by class, cells of a donor on both sides",
        "model": str(model_folder.name),
        "vocabulary_sha256": vocabulary.sha256,
        "settings": asdict(settings),
        "max_train_per_class": max_train_per_class,
        "summary": summarise(per_seed),
        "seeds": per_seed,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS_NAME).write_text(json.dumps(results, indent=1) + "\n")
    return results


def _predict_with(
    encoder: BertModel,
    vocabulary: Vocabulary,
    tokens: list[np.ndarray],
    labels: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    settings: FinetuneSettings,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return predictions of a linear layer on the frozen encoder, and of the fine-tuned one."""
    used = np.concatenate([train, test])
    embedding = np.zeros((len(tokens), encoder.config.hidden_size), dtype=np.float32)
    embedding[used] = embed_cells(
        [tokens[i] for i in used], encoder, vocabulary, layer=0,
        token_budget=settings.token_budget, device=settings.device, bf16=settings.bf16,
    )  # fmt: skip
    frozen = predict_from_embedding(embedding, labels, train, test, seed)
    classifier = train_classifier(
        encoder, vocabulary, [tokens[i] for i in train], labels[train], int(labels.max()) + 1,
        settings, seed,
    )  # fmt: skip
    return frozen, predict(classifier, vocabulary, [tokens[i] for i in test], settings)


def summarise(per_seed: list[dict]) -> dict[str, dict]:
    """Return contender -> score -> mean and 95 % half-width over seeds; F1 of classes as means."""
    summary = {}
    for name in per_seed[0]["scores"]:
        scores = [s["scores"][name] for s in per_seed]
        summary[name] = {
            key: mean_and_interval([s[key] for s in scores])
            for key in ("macro_f1", "balanced_accuracy", "accuracy")
        }
        classes = {c for s in scores for c in s["f1_by_class"]}
        summary[name]["f1_by_class"] = {
            c: float(np.mean([s["f1_by_class"].get(c, np.nan) for s in scores]))
            for c in sorted(classes)
        }
    return summary


def _labelled(cell_set: CellSet, label: str, donor: str | None) -> tuple[CellSet, dict[str, int]]:
    """Return the cells that can be classified, and how many were dropped for which reason."""
    values = cell_set.metadata[label]
    unlabelled = values.isin(_NO_VALUE).to_numpy()
    no_donor = np.zeros(len(values), dtype=bool)
    if donor:
        no_donor = cell_set.metadata[donor].isin(_NO_VALUE).to_numpy() & ~unlabelled
    unlabelled |= no_donor
    counts = values[~unlabelled].value_counts()
    rare = (
        ~unlabelled & values.map(counts.to_dict()).fillna(0).lt(_FEWEST_CELLS_OF_CLASS).to_numpy()
    )
    empty = ~cell_set.has_genes & ~unlabelled & ~rare
    keep = np.flatnonzero(~(unlabelled | rare | empty))
    if values.iloc[keep].nunique() < 2:
        raise ValueError(
            f"column '{label}': fewer than two classes with at least {_FEWEST_CELLS_OF_CLASS} "
            f"cells; it holds {values.value_counts().head(5).to_dict()}"
        )
    dropped = {
        "no label": int((unlabelled & ~no_donor).sum()),
        "no donor": int(no_donor.sum()),
        f"class below {_FEWEST_CELLS_OF_CLASS} cells": int(rare.sum()),
        "no gene of the vocabulary": int(empty.sum()),
    }
    return cell_set.subset(keep), {k: v for k, v in dropped.items() if v}


def _freeze(encoder: BertModel, num_layers: int) -> None:
    depth = len(encoder.encoder.layer)
    if not 0 <= num_layers <= depth:
        raise ValueError(f"--freeze-layers {num_layers}: the model has {depth} layers")
    if num_layers:
        frozen = [encoder.embeddings, *encoder.encoder.layer[:num_layers]]
        for module in frozen:
            module.requires_grad_(False)


def _shuffled_batches(
    lengths: np.ndarray, batch_cells: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Return batches in random order, sorted by length within windows of some batches."""
    order = rng.permutation(len(lengths))
    window = batch_cells * _SORT_WINDOW_BATCHES
    batches = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_cells] for i in range(0, len(part), batch_cells)]
    return [batches[i] for i in rng.permutation(len(batches))]
