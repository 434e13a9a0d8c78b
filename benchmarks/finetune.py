"""Fine-tuning of a cell classifier: cells per second, beside the Hugging Face Trainer.

``python -m benchmarks.finetune --model DIR [--cells CELLS.h5ad] [--num-cells 48] [--freeze 2]``.
The reference is what Geneformer does: ``Trainer`` with ``BertForSequenceClassification``, batches
in random order, each padded to its longest cell (``--padding longest``) or to the model's length
(``--padding maximum``). Same weights, cells, labels, epochs, batch size, frozen layers, precision
and threads; the runs take turns. Two ratios, each the median over turns: of wall times, and of
processor times, which other programs on the machine hardly change.
Without a file the cells are random genes, their lengths drawn as `--log-mean` and `--log-sd` say.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import BertForSequenceClassification, BertModel, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from data_prep.genes.vocabulary import Vocabulary
from eval.cells.read_cells import encode_file
from eval.finetune.classifier import FinetuneSettings, Head, Target
from eval.finetune.training import finetune
from pretrain.export.model_folder import load_exported
from pretrain.model.architectures import encoder_of

_REPEATS = 3
_NUM_CLASSES = 3
_SEED = 0


class Rows(Dataset):
    """Cells as the Trainer takes them."""

    def __init__(self, tokens: list[np.ndarray], labels: np.ndarray) -> None:
        self._tokens, self._labels = tokens, labels

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, cell: int) -> dict:
        return {"input_ids": self._tokens[cell], "labels": int(self._labels[cell])}


class Collator:
    """Pads a batch; counts real and padded tokens."""

    def __init__(self, vocabulary: Vocabulary, padding: str) -> None:
        self._vocabulary, self._padding = vocabulary, padding
        self.real = self.padded = 0

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        lengths = np.array([len(r["input_ids"]) for r in rows])
        width = lengths.max() if self._padding == "longest" else self._vocabulary.max_length
        is_real = np.arange(width) < lengths[:, None]
        ids = np.full(is_real.shape, self._vocabulary.pad_token, dtype=np.int64)
        ids[is_real] = np.concatenate([r["input_ids"] for r in rows])
        self.real += int(is_real.sum())
        self.padded += is_real.size
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(is_real.astype(np.int64)),
            "labels": torch.tensor([r["labels"] for r in rows]),
        }


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """Return wall and processor time of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - processor


def by_trainer(
    encoder: BertModel,
    tokens: list[np.ndarray],
    labels: np.ndarray,
    settings: FinetuneSettings,
    collator: Collator,
) -> tuple[float, float]:
    """Return the Trainer's wall and processor seconds; setting it up is not counted."""
    config = copy.deepcopy(encoder.config)
    config.num_labels = _NUM_CLASSES
    model = BertForSequenceClassification._from_config(config, attn_implementation="sdpa")
    model.bert.load_state_dict(encoder.state_dict(), strict=False)
    if settings.freeze_layers:
        for module in (
            model.bert.embeddings, *model.bert.encoder.layer[: settings.freeze_layers]
        ):  # fmt: skip
            module.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_cells,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            bf16=settings.bf16,
            use_cpu=settings.device == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=_SEED,
        )
        trainer = Trainer(
            model, arguments, data_collator=collator, train_dataset=Rows(tokens, labels)
        )
        return seconds(trainer.train)


def draw_cells(
    vocabulary: Vocabulary, num_cells: int, log_mean: float, log_sd: float
) -> list[np.ndarray]:
    """Return cells of random genes whose lengths are log-normal, cut at the model's length."""
    rng = np.random.default_rng(_SEED)
    lengths = np.exp(rng.normal(log_mean, log_sd, num_cells)).clip(50, vocabulary.max_length)
    return [
        rng.permutation(np.arange(vocabulary.first_gene_token, vocabulary.num_tokens))[: int(n)]
        for n in lengths
    ]


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cells", type=Path)
    parser.add_argument("--num-cells", type=int, default=48)
    parser.add_argument("--log-mean", type=float, default=6.8)
    parser.add_argument("--log-sd", type=float, default=0.5)
    parser.add_argument("--batch-cells", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--freeze", type=int, default=2)
    parser.add_argument("--padding", choices=("longest", "maximum"), default="longest")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    network, vocabulary = load_exported(arguments.model)
    if arguments.cells:
        every = encode_file(arguments.cells, vocabulary).tokens
        chosen = np.random.default_rng(_SEED).permutation(len(every))[: arguments.num_cells]
        tokens = [every[i].astype(np.int64) for i in chosen]
    else:
        tokens = draw_cells(vocabulary, arguments.num_cells, arguments.log_mean, arguments.log_sd)
    labels = np.arange(len(tokens)) % _NUM_CLASSES
    settings = FinetuneSettings(
        epochs=arguments.epochs, batch_cells=arguments.batch_cells, learning_rate=5e-5,
        freeze_layers=arguments.freeze, bf16=arguments.bf16, device=arguments.device,
    )  # fmt: skip
    target = Target(Head("class", "cells", tuple("abc"[:_NUM_CLASSES])), labels)
    collator = Collator(vocabulary, arguments.padding)
    bert = encoder_of(network)
    assert isinstance(bert, BertModel)

    def ours(cells: list[np.ndarray], target: Target) -> tuple[float, float]:
        return seconds(
            lambda: finetune(encoder_of(network), vocabulary, cells, [target], settings, _SEED)
        )

    few = Target(target.head, labels[:2])
    ours(tokens[:2], few)  # first calls of both load code
    by_trainer(bert, tokens[:2], labels[:2], settings, Collator(vocabulary, "longest"))
    runs = [
        (
            ours(tokens, target),
            by_trainer(bert, tokens, labels, settings, collator),
        )
        for _ in range(_REPEATS)
    ]
    fast, reference = (statistics.median(r[i][0] for r in runs) for i in range(2))
    lengths = np.array([len(t) for t in tokens])
    result = {
        "cells": len(tokens),
        "tokens_per_cell": {"mean": lengths.mean(), "sd": lengths.std(), "max": int(lengths.max())},
        "settings": {
            k: getattr(settings, k) for k in ("epochs", "batch_cells", "freeze_layers", "bf16")
        },
        "threads": arguments.threads,
        "padding_of_reference": 1 - collator.real / collator.padded,
        "tokens_per_s": settings.epochs * lengths.sum() / fast,
        "trainer_tokens_per_s": settings.epochs * lengths.sum() / reference,
        "wall_and_processor_s_of_both": runs,
        "ratio_wall": statistics.median(b[0] / a[0] for a, b in runs),
        "ratio_processor": statistics.median(b[1] / a[1] for a, b in runs),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
