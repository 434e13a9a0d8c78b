"""Pretraining beside the recipe of Geneformer's script: real tokens per second, one core each.

``python -m benchmarks.pretrain WORK [--cells CELLS.h5ad ... --vocab V1] [--precision fp32 bf16]``

The reference is Geneformer's published script rebuilt on today's libraries: ``Trainer`` with
``BertForMaskedLM`` and eager attention, ``DataCollatorForLanguageModeling`` (15 %, 80/10/10),
batches of 12 cells grouped by length and padded to their longest, the vocabulary head at every
position, AdamW, bf16 by autocast. The original sampler groups within larger mega-batches; here each
of its batches holds cells of one bucket, as there. Ours is what ``geneloom pretrain`` runs: shards,
masks, micro-batches, DeepSpeed ZeRO-1, exact loss. Same cells (one step of ours from each of the
buckets that cut the cells into `--steps` equal parts by length), same model (V1, 6 layers),
precision and optimizer settings; about as many optimizer steps.

Every contender is a process of its own on one core, all on the same one, and they take turns; a
ratio is the median over turns of (reference's seconds / ours) in the same turn: wall time,
processor time, which other programs on the machine hardly change, and of that what is not the
kernel's, whose part depends on how a machine hands out memory. Left out: starting, loading, a
first turn (the reference's on two cells). Without `--cells` the cells are random genes with lengths
log-normal around 1,100, cut at 2,048 (mean 1,180).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.genes.vocabulary import Vocabulary, open_vocabulary
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.shards.reader import ShardSet
from data_prep.sources.source_spec import SourceOptions, source_at
from pretrain.batches.step_dataset import StepDataset
from pretrain.config import RunConfig, load_config

_CELLS_A_BATCH = 12
_REFERENCE = "reference"
_PUBLISHED_DROPOUT = 0.02
# Trains once over the cells, or a few of them to warm up, and says what it did.
Turn = Callable[[bool], dict]


def make_shards(work: Path, cells: list[Path], vocab: Path | None) -> Path:
    """Return the folder of shards in `work`, made of the files given or of generated cells."""
    from benchmarks.prepare import write_tokens, write_vocabulary

    out = work / "shards"
    if (out / "manifest.json").exists():
        return out
    work.mkdir(parents=True, exist_ok=True)
    if not cells:
        write_tokens(work / "tokens", 4000)
        write_vocabulary(work / "vocabulary.json")
        cells, vocab = [work / "tokens"], work / "vocabulary.json"
    vocabulary = open_vocabulary(vocab) if vocab else None
    sources = [source_at(c, SourceOptions()) for c in cells]
    prepare(sources, out, vocabulary, PrepareOptions())
    return out


def settings(arguments: argparse.Namespace, contender: dict[str, Any]) -> RunConfig:
    """Return our run: the published recipe, an optimizer step for as many tokens as 12 cells."""
    return load_config(
        "geneformer_v1_6l",
        [
            f"data.shards={arguments.work / 'shards'}",
            f"run.out={arguments.work / 'run'}",
            "data.num_workers=0",
            "run.threads=1",
            f"run.precision={contender['precision']}",
            f"model.attention_dropout={contender['attention_dropout']}",
            f"batch.tokens_per_step={arguments.tokens_per_step}",
            f"batch.tokens_per_micro_batch={arguments.micro_batch}",
            *arguments.set,
        ],
    )


def dataset_of(shards: ShardSet, config: RunConfig) -> StepDataset:
    """Return the batches of one rank."""
    batch = config.batch
    return StepDataset(
        shards, "train", config.run.seed, batch.tokens_per_step, batch.tokens_per_micro_batch,
        config.masking, 0, 1,
    )  # fmt: skip


def chosen_steps(data: StepDataset, number: int) -> list[int]:
    """Return the first step of the epoch from each bucket at the middles of `number` equal parts
    of the cells by length."""
    buckets = data.plan.buckets
    cells = np.array([b.extent.num_cells for b in buckets])
    middles = (np.arange(number) + 0.5) / number
    wanted = np.searchsorted(cells.cumsum() / cells.sum(), middles)
    steps = {}
    for step in range(data.plan.steps_per_epoch):
        steps.setdefault(data.plan.step(step).bucket, step)
    return [steps[b] for b in wanted.tolist()]


def our_turn(arguments: argparse.Namespace, contender: dict[str, Any]) -> Turn:
    """Return a function that trains over the steps and says what it did."""
    from pretrain.ds_config import derive_ds_config
    from pretrain.engine import Engine
    from pretrain.ranks import dist

    config = settings(arguments, contender)
    shards = ShardSet(config.data.shards, None)
    ranks = dist.start(config.run.collective_timeout_s, config.run.threads)
    engine = Engine(config, derive_ds_config(config), shards, ranks, None)
    data = dataset_of(shards, config)
    engine.dry_pass(data.heaviest_micro_batch())
    steps = chosen_steps(data, arguments.steps)

    def turn(_is_first: bool) -> dict:
        tokens = padded = cells = 0
        started, processor = time.perf_counter(), time.process_time()
        losses = []
        for step in steps:
            work = data[step]
            found = engine.forward_backward(work, step, work.masked)
            engine.step(step, 1000)
            losses.append(found.loss / work.masked)
            tokens += work.tokens
            padded += work.padded_tokens
            cells += work.cells
        return {
            "seconds": time.perf_counter() - started,
            "processor_s": time.process_time() - processor, "tokens": tokens,
            "padded_tokens": padded, "cells": cells, "steps": arguments.steps,
            "first_loss": losses[0],
        }  # fmt: skip

    return turn


def reference_cells(arguments: argparse.Namespace, config: RunConfig) -> list[list[int]]:
    """Return the tokens of the cells that our steps hold, unmasked."""
    shards = ShardSet(config.data.shards, None)
    data = dataset_of(shards, config)
    rows = []
    for step in chosen_steps(data, arguments.steps):
        batch = data.plan.step(step)
        cells = data.plan.cells(batch, 0, batch.num_cells)
        tokens, offsets = data.blocks.gather(data.plan.buckets[batch.bucket].extent, cells)
        rows += [
            tokens[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True) if b > a
        ]
    return rows


def reference_turn(arguments: argparse.Namespace, contender: dict[str, Any]) -> Turn:
    """Return a function that trains over the same cells as Geneformer's script would."""
    import datasets
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        DataCollatorForLanguageModeling,
        PreTrainedTokenizerFast,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    config = settings(arguments, contender)
    vocabulary: Vocabulary = ShardSet(config.data.shards, None).vocabulary
    names = {f"G{i}": i for i in range(vocabulary.num_tokens)}
    names = {k: v for k, v in names.items() if v not in (vocabulary.pad_token, 1)}
    names |= {"<pad>": vocabulary.pad_token, "<mask>": vocabulary.mask_token}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(names, unk_token="<pad>")),
        pad_token="<pad>",
        mask_token="<mask>",
    )
    rows = reference_cells(arguments, config)
    data = datasets.Dataset.from_dict({"input_ids": rows, "length": [len(r) for r in rows]})
    bert = BertConfig(
        vocab_size=vocabulary.num_tokens, hidden_size=256, num_hidden_layers=6,
        num_attention_heads=4, intermediate_size=512, hidden_act="relu",
        hidden_dropout_prob=_PUBLISHED_DROPOUT,
        attention_probs_dropout_prob=contender["attention_dropout"],
        max_position_embeddings=2048, type_vocab_size=2, initializer_range=0.02,
        layer_norm_eps=1e-12, pad_token_id=vocabulary.pad_token,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForMaskedLM._from_config(bert, attn_implementation="eager")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.15)
    seen = {"padded_tokens": 0, "first_loss": 0.0}

    def collate(batch: list[dict]) -> dict:
        made = collator(batch)
        seen["padded_tokens"] += made["input_ids"].numel()
        return made

    class Clock(TrainerCallback):
        started = processor = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not self.started:
                self.started, self.processor = time.perf_counter(), time.process_time()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                seen["first_loss"] = seen["first_loss"] or logs["loss"]

    def turn(is_first: bool) -> dict:
        seen["padded_tokens"] = 0
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model,
                TrainingArguments(
                    output_dir=folder, num_train_epochs=1, learning_rate=1e-3, weight_decay=0.001,
                    lr_scheduler_type="linear", warmup_steps=10_000,
                    per_device_train_batch_size=_CELLS_A_BATCH,
                    train_sampling_strategy="group_by_length", length_column_name="length",
                    bf16=contender["precision"] == "bf16", use_cpu=True, save_strategy="no",
                    logging_steps=1, report_to="none", disable_tqdm=True, seed=0,
                ),
                data_collator=collate,
                train_dataset=data.select(range(2)) if is_first else data,
                callbacks=[clock],
            )  # fmt: skip
            trainer.train()
            seconds = time.perf_counter() - clock.started
            processor_s = time.process_time() - clock.processor
        return {
            "seconds": seconds, "processor_s": processor_s, "tokens": sum(map(len, rows)),
            "cells": len(rows), "steps": -(-len(rows) // _CELLS_A_BATCH), **seen,
        }  # fmt: skip

    return turn


def serve(arguments: argparse.Namespace) -> None:
    """Answer each line of the input with one turn, as JSON."""
    contender = json.loads(arguments.contender)
    os.sched_setaffinity(0, {arguments.core})
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    make = reference_turn if contender["kind"] == _REFERENCE else our_turn
    turn = make(arguments, contender)
    for number, _ in enumerate(sys.stdin):
        before = os.times().system
        found = turn(number == 0)
        # Without the kernel's share, which makes and clears pages of memory.
        found["user_s"] = found["processor_s"] - (os.times().system - before)
        found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(found), file=answers, flush=True)


class Contender:
    """A process that trains when it is its turn."""

    def __init__(self, what: dict[str, Any]) -> None:
        self.what = what
        command = [sys.executable, "-m", "benchmarks.pretrain", *sys.argv[1:]]
        environment = {"OMP_NUM_THREADS": "1"}
        if what["kind"] != _REFERENCE:
            environment["THP_MEM_ALLOC_ENABLE"] = "1"  # as `geneloom pretrain` sets it
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  open as long as the process
        self._process = subprocess.Popen(
            [*command, "--contender", json.dumps(what)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
            env=os.environ | environment,
        )  # fmt: skip

    def turn(self) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._said.seek(0)
            raise SystemExit(f"{self.what} failed:\n{self._said.read()[-3000:]}")
        return json.loads(answer)

    def close(self) -> None:
        self._process.communicate()


def compare(precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return turns, rates and ratios of all contenders at one precision."""
    dropouts = {"published dropout": _PUBLISHED_DROPOUT, "no attention dropout": 0.0}
    chosen = [("ours", name) for name in dropouts] + [(_REFERENCE, "published dropout")]
    if arguments.changed_reference:
        chosen.append((_REFERENCE, "no attention dropout"))
    contenders = {
        (kind, name): Contender(
            {"kind": kind, "attention_dropout": dropouts[name], "precision": precision}
        )
        for kind, name in chosen
    }
    turns: dict[tuple[str, str], list[dict]] = {key: [] for key in contenders}
    for number in range(arguments.turns + 1):
        for key, contender in contenders.items():
            found = contender.turn()
            if number:  # the first one allocates and loads code
                turns[key].append(found)
    for contender in contenders.values():
        contender.close()
    result: dict[str, Any] = {}
    for (kind, name), found in turns.items():
        median = statistics.median(t["seconds"] for t in found)
        result[f"{kind}, {name}"] = found[-1] | {
            "seconds": [round(t["seconds"], 2) for t in found],
            "processor_s": [round(t["processor_s"], 2) for t in found],
            "user_s": [round(t["user_s"], 2) for t in found],
            "tokens_per_s": found[-1]["tokens"] / median,
            "tokens_per_processor_s": found[-1]["tokens"]
            / statistics.median(t["processor_s"] for t in found),
            "padding": 1 - found[-1]["tokens"] / found[-1]["padded_tokens"],
            "tokens_per_cell": found[-1]["tokens"] / found[-1]["cells"],
        }
    for ours, theirs in (
        ("published dropout", "published dropout"),
        ("no attention dropout", "no attention dropout"),
        ("no attention dropout", "published dropout"),
    ):
        if (_REFERENCE, theirs) in turns:
            pairs = list(zip(turns[_REFERENCE, theirs], turns["ours", ours], strict=True))
            result[f"ratio: ours with {ours} to the reference with {theirs}"] = {
                what: statistics.median(a[what] / b[what] for a, b in pairs)
                for what in ("seconds", "processor_s", "user_s")
            }
    return result


def main() -> None:
    """Measure, print JSON and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--cells", type=Path, nargs="+", default=[])
    parser.add_argument("--vocab", type=Path, help="for --cells")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of ours in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens-per-step", type=int, default=16_384)
    parser.add_argument("--micro-batch", type=int, default=4096, help="tokens of one forward")
    parser.add_argument(
        "--changed-reference", action="store_true", help="the reference without dropout as well"
    )
    parser.add_argument("--set", nargs="*", default=[], help="more settings of ours")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file, e.g. docs/benchmarks/pretrain.json")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        serve(arguments)
        return
    make_shards(arguments.work, arguments.cells, arguments.vocab)
    found: dict[str, Any] = {
        "date": date.today().isoformat(),
        "versions": {p: version(p) for p in ("torch", "transformers", "deepspeed")},
        "load_before": os.getloadavg(),
    }
    found |= {precision: compare(precision, arguments) for precision in arguments.precision}
    found["load_after"] = os.getloadavg()
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
