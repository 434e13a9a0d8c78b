"""Measure and log a run: the console line, ``metrics.jsonl`` and TensorBoard.

A `Meter` collects the steps between two log lines and computes rates; a `RunLog` writes them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data_prep.files import complete_file, read_json_lines
from data_prep.running.owner import Owner
from pretrain.config import ObjectiveConfig, RunConfig
from pretrain.counting.baselines import ARITHMETIC, BASELINE_NAMES
from pretrain.plan.flops import Work, known_gpu

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
HELDOUT_CELLS_NAME = "heldout_cells.parquet"
# The plots in TensorBoard's tab "Custom scalars"; each list is shown in one plot.
LAYOUT = {
    "does it learn?": {
        "loss, training and held out": ["Multiline", ["train/loss", "heldout/loss"]],
        "loss of cells, training and held out": [
            "Multiline",
            ["train/cell_loss", "heldout/cell_loss", "heldout/baseline_unigram_cell_loss"],
        ],
        "held-out loss beside the baselines": [
            "Multiline",
            ["heldout/loss", *(f"heldout/baseline_{name}" for name in BASELINE_NAMES)],
        ],
        "held-out loss below the arithmetic baseline, nats": [
            "Multiline",
            [f"heldout/beyond_{ARITHMETIC}"],
        ],
        "held-out top-10 beside the baselines": [
            "Multiline",
            ["heldout/top10", *(f"heldout/baseline_{name}_top10" for name in BASELINE_NAMES)],
        ],
    },
    "is it stable?": {
        "gradient norm": ["Multiline", ["train/grad_norm"]],
        "learning rate": ["Multiline", ["train/learning_rate", "train/muon_learning_rate"]],
    },
    "is it fast?": {
        "real tokens a second": ["Multiline", ["train/tokens_per_s", "train/tokens_per_s_wall"]],
        "padding and waiting": ["Multiline", ["train/padding", "train/data_wait"]],
        "a step waits for a checkpoint, s": ["Multiline", ["checkpoint/blocked_s"]],
    },
}
# The first steps of a process allocate and compile, so they are left out of the rates.
_WARMUP_STEPS = 2


@dataclass
class LogWindow:
    """Sums over the steps since the last log line; all are over all ranks, except the times."""

    loss: float = 0.0
    hits: float = 0.0
    cell_loss: float = 0.0
    masked: float = 0.0
    scored_cells: float = 0.0
    tokens: float = 0.0
    padded_tokens: float = 0.0
    cells: float = 0.0
    data_wait_s: float = 0.0
    timed_tokens: float = 0.0
    timed_padded_tokens: float = 0.0
    timed_cells: float = 0.0
    timed_flops: float = 0.0
    timed_s: float = 0.0
    timed_steps: int = 0
    steps: int = 0


@dataclass
class Meter:
    """Collects steps, and turns a window of them into rates.

    The first steps of a process allocate and compile. They count in ``tokens_per_s_wall`` only,
    which covers all time since the meter was made, including everything between steps.

    Attributes
    ----------
    work
        Floating point operations of a token, and the peak of the device.
    started
        Time at which the meter was made, before the first pass, by `time.perf_counter`.
    """

    world_size: int
    total_steps: int
    work: Work
    window: LogWindow = field(default_factory=LogWindow)
    started: float = field(default_factory=time.perf_counter)
    _seen: int = 0
    _all_tokens: int = 0

    def add(
        self,
        counts: dict[str, int],
        length: int,
        loss: float,
        hits: float,
        cell_loss: float,
        wait_s: float,
        step_s: float,
    ) -> None:
        """Add one step of cells padded to `length`.

        `counts` are sums over ranks of masked, tokens, padded_tokens and cells, and with a cell
        objective also of scored, the number of cells whose losses sum to `cell_loss`.
        """
        w = self.window
        self._all_tokens += counts["tokens"]
        w.loss, w.hits = w.loss + loss, w.hits + hits
        w.masked += counts["masked"]
        if self._objective.cell_weight:
            w.cell_loss += cell_loss
            w.scored_cells += counts["scored"]
        w.tokens += counts["tokens"]
        w.padded_tokens += counts["padded_tokens"]
        w.cells += counts["cells"]
        w.steps += 1
        self._seen += 1
        if self._seen > _WARMUP_STEPS:
            w.timed_tokens += counts["tokens"]
            w.timed_padded_tokens += counts["padded_tokens"]
            w.timed_cells += counts["cells"]
            w.timed_flops += counts["padded_tokens"] * self.work.flops_per_token(length)
            w.timed_s += step_s
            w.data_wait_s += wait_s
            w.timed_steps += 1

    @property
    def _objective(self) -> ObjectiveConfig:
        return self.work.config.objective

    @property
    def has_steps(self) -> bool:
        """Return whether the window contains any step; skipped steps are not added."""
        return self.window.steps > 0

    def close_window(self, step: int) -> dict[str, float]:
        """Return the rates and losses of the window, and start a new window."""
        w, self.window = self.window, LogWindow()
        # A window that contains only warm-up steps has no rates.
        seconds, timed_steps = (w.timed_s, w.timed_steps) if w.timed_steps else (math.nan, 1)
        flops_per_s = w.timed_flops / seconds / self.world_size
        known = {"mfu": flops_per_s / self.work.peak_flops} if self.work.peak_flops else {}
        of_cells = {}
        if self._objective.cell_weight:
            of_cells["cell_loss"] = w.cell_loss / w.scored_cells
        # If single genes have no weight in training, there is no loss, which is not the same as a
        # loss of 0.
        masked = w.masked if self._objective.gene_weight else math.nan
        return {
            "loss": w.loss / masked,
            "masked_accuracy": w.hits / masked,
            **of_cells,
            "cells_per_s": w.timed_cells / seconds,
            "tokens_per_s": w.timed_tokens / seconds,
            "tokens_per_s_per_rank": w.timed_tokens / seconds / self.world_size,
            "padded_tokens_per_s": w.timed_padded_tokens / seconds,
            "tokens_per_s_wall": self._all_tokens / (time.perf_counter() - self.started),
            "tokens_per_cell": w.tokens / max(w.cells, 1),
            "flops_per_s_per_rank": flops_per_s,
            **known,
            "padding": 1 - w.tokens / w.padded_tokens,
            "data_wait": w.data_wait_s / seconds,
            "memory_gib": peak_memory_gib(),
            "eta_s": seconds / timed_steps * (self.total_steps - step),
        }


def meter_of(config: RunConfig, num_tokens: int, world_size: int, steps: int) -> Meter:
    """Return a meter for this device and vocabulary size, and log how it counts operations."""
    name = torch.cuda.get_device_name() if torch.cuda.is_initialized() else ""
    work = Work(config, num_tokens, known_gpu(name))
    logger.info("%s", work.formula())
    return Meter(world_size, steps, work)


def peak_memory_gib() -> float:
    """Return the peak memory of this process in GiB: on the GPU if there is one, else resident."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class RunLog:
    """Writes the metrics of rank 0; a resumed run continues the files after its step."""

    def __init__(self, run: Path, resumed_step: int, owner: Owner | None = None) -> None:
        # The import is here, because tensorboard takes a second, and only rank 0 of a run needs it.
        from torch.utils.tensorboard.writer import SummaryWriter

        self._path, self._owner = run / METRICS_NAME, owner
        self._require_own()
        with _named(self._path):
            kept = read_metrics(run, resumed_step)
            # The file is written aside first, so that a process killed here loses nothing.
            with complete_file(self._path) as aside:
                aside.write_text("".join(json.dumps(m) + "\n" for m in kept))
        with _named(run / "tensorboard"):
            self._tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_step + 1)
            self._tensorboard.add_custom_scalars(LAYOUT)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl and TensorBoard (train, heldout, checkpoint or skipped).

        In TensorBoard, each element of a list or dict of numbers is one scalar:
        ``heldout/loss_by_bucket/0512``, ``heldout/loss_by_rank_decile/1``.
        """
        self._require_own()
        finite = _finite(values)
        record = {"kind": kind, "step": step, "time": time.time(), **finite}
        with _named(self._path), self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        with _named(self._path.with_name("tensorboard")):
            for name, value in _scalars(kind, finite):
                self._tensorboard.add_scalar(name, value, step)

    def write_heldout_cells(self, step: int, columns: dict[str, np.ndarray]) -> None:
        """Write a table with a row for each held-out cell, in place of that of an earlier step."""
        self._require_own()
        table = pa.table(columns).replace_schema_metadata({"step": str(step)})
        path = self._path.with_name(HELDOUT_CELLS_NAME)
        with _named(path), complete_file(path) as aside:
            pq.write_table(table, aside)

    def _require_own(self) -> None:
        if self._owner is not None:
            self._owner.require()

    def close(self) -> None:
        self._tensorboard.close()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the name of the file, and what to do, to an OSError of the ``with`` block."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path}: cannot be written ({error.strerror or error}); make room, or see to the file "
            "system, and go on with --resume"
        ) from error


def _finite(value: Any) -> Any:
    """Return a JSON value in which None replaces every number that JSON cannot represent."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield (name, number) of all numbers in a JSON value; list elements are counted from 1."""
    if isinstance(value, int | float):
        yield name, value
    elif isinstance(value, list):
        for place, part in enumerate(value, 1):
            yield from _scalars(f"{name}/{place}", part)
    elif isinstance(value, dict):
        for key, part in value.items():
            # Padding the bucket lengths with zeros sorts them as numbers.
            yield from _scalars(f"{name}/{key.zfill(4) if key.isdigit() else key}", part)


def read_metrics(run: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """Return the records of a run up to a step as written; an incomplete last line is left out.

    The steps of each kind are in order. The record of a checkpoint comes when it is finished.
    """
    records = read_json_lines(run / METRICS_NAME)
    return [m for m in records if last_step is None or m["step"] <= last_step]


def console_line(step: int, total: int, values: dict[str, float]) -> str:
    """Return the console line of a log window."""
    known = math.isfinite(values["eta_s"])
    flops = f"{values['flops_per_s_per_rank'] / 1e12:.3g} TFLOP/s"
    used = f"MFU {values['mfu']:.1%}" if "mfu" in values else flops
    eta = str(timedelta(seconds=int(values["eta_s"]))) if known else "-"
    muon = f"muon {values['muon_learning_rate']:.2e}  " if "muon_learning_rate" in values else ""
    shown = []
    if math.isfinite(values["masked_accuracy"]):
        shown.append(f"loss {values['loss']:.4f}  acc {values['masked_accuracy']:.2%}")
    if "cell_loss" in values:
        shown.append(f"cell loss {values['cell_loss']:.4f}")
    return (
        f"step {step}/{total}  {'  '.join(shown)}  "
        f"gnorm {values['grad_norm']:.2f}  lr {values['learning_rate']:.2e}  {muon}"
        f"{values['cells_per_s']:.1f} cells/s of {values['tokens_per_cell']:,.0f}  "
        f"{values['tokens_per_s_per_rank']:,.0f} tok/s/rank  {used}  "
        f"pad {values['padding']:.1%}  wait {values['data_wait']:.1%}  "
        f"mem {values['memory_gib']:.2f} GiB  eta {eta}"
    )
