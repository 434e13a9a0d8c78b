"""Does more data pay? One recipe, trained on growing shares of a corpus, asked for the same cells.

`saturate` trains what is not trained yet, reads the losses of the same held-out cells, fits their
curve (`eval.saturate.report.fit`) and says in words what more cells would bring.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data_prep.files import complete_file, write_to_disk
from data_prep.running.owner import owned
from data_prep.shards.reader import ShardSet
from data_prep.sources.source_spec import SourceOptions
from data_prep.version import VERSION
from eval.saturate.probes import probe_size
from eval.saturate.report.fit import FEWEST_SIZES, Scored, saturation, with_interval
from eval.saturate.report.page import PAGE_NAME, saturation_page
from eval.saturate.report.words import words
from eval.saturate.settings import SaturateOptions
from eval.saturate.trainings import CELLS_NAME, Training, plan_trainings
from eval.train_run import train_run
from pretrain.measure.metrics import read_metrics

logger = logging.getLogger(__name__)

FORMAT = "geneloom-saturation/1"
RESULTS_NAME, BEGUN_NAME = "results.json", "begun.json"
ARITHMETIC = "baseline_arithmetic"


def saturate(
    shards: Path | str,
    out: Path,
    config: str,
    overrides: Sequence[str],
    options: SaturateOptions,
    reading: SourceOptions = SourceOptions(),
    say: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Measure what more training cells bring, and return what ``results.json`` in `out` holds.

    What is trained is not trained again, so the same command goes on with a killed one, and another
    one with more `shares` or `seeds` adds to it.

    Parameters
    ----------
    shards
        Of ``geneloom prepare``, with held-out cells.
    config, overrides
        As of ``geneloom pretrain``.
    reading
        Of the file of cells to probe.
    say
        Called with a line after each training.

    Raises
    ------
    ValueError
        The settings are wrong, the shards hold no held-out cells, or `out` was begun with others.
    eval.train_run.Stopped
        A signal asked to stop.
    OSError
        A training failed.
    """
    trainings = plan_trainings(shards, out, config, overrides, options)
    opened = ShardSet(shards, trainings[0].config.data.cache)
    if not opened.extents("heldout"):
        raise ValueError(f"{shards}: no cell is held out; prepare with --heldout")
    with owned(out, "saturate"):
        _require_same(out, opened, trainings[0], options)
        for training in trainings:
            if not training.is_done():
                log = out / "logs" / f"{training.name}.log"
                train_run(training.arguments, options.launch, log)
                say(_line(training))
        scored, genes_and_cells = _scores(trainings, options)
        record = _record(opened, config, overrides, options) | genes_and_cells
        record["sizes"] = _sizes(trainings, options, record["arithmetic"])
        if options.cells:
            for size, training in zip(record["sizes"], trainings, strict=False):
                size["probe"] = probe_size(training, options, reading)
        record |= _fitted(scored, options.equal)
        record["words"] = words(record)
        write_to_disk(out / RESULTS_NAME, json.dumps(record, indent=1) + "\n")
        with complete_file(out / PAGE_NAME) as aside:
            aside.write_text(saturation_page(record))
    return record


def _require_same(out: Path, shards: ShardSet, any_of: Training, options: SaturateOptions) -> None:
    """Record what the trainings of a folder have alike; raise if it was begun with something else.

    Shares and seeds are not among it, for each training stands for itself.
    """
    # As JSON gives it back.
    recipe = json.loads(json.dumps(any_of.config.recipe()))
    own = ("run.max_steps", "run.epochs", "run.seed", "data.share")
    now = {k: v for k, v in recipe.items() if k not in own and "warmup" not in k}
    now |= {
        "shards": shards.fingerprint,
        "--equal": options.equal,
        "evaluation.max_cells": any_of.config.evaluation.max_cells,
        "evaluation.baseline_cells": any_of.config.evaluation.baseline_cells,
        "tokens of the whole corpus": round(any_of.tokens / _part_of(any_of, options.equal), -3),
    }
    path = out / BEGUN_NAME
    if not path.exists():
        write_to_disk(path, json.dumps(now, indent=1) + "\n")
        return
    begun = json.loads(path.read_text())
    changed = [
        f"{k}: {begun.get(k)!r} -> {now.get(k)!r}"
        for k in dict.fromkeys([*begun, *now])
        if not _alike(begun.get(k), now.get(k))
    ]
    if changed:
        raise ValueError(
            f"{out}: was begun with other settings: {'; '.join(changed)}; give the old ones, or "
            "another folder"
        )


def _part_of(training: Training, equal: str) -> float:
    return training.tokens_part * (training.share if equal == "epochs" else 1.0)


def _alike(before: Any, now: Any) -> bool:
    # Steps of the smallest size round its tokens.
    if isinstance(before, float) and isinstance(now, float):
        return bool(np.isclose(before, now, rtol=0.05))
    return before == now


def _line(training: Training) -> str:
    loss = _heldout(training)["loss"]
    return (
        f"{training.name}: {training.corpus.cells:,} cells, {training.steps:,} steps, "
        f"{training.tokens:,} tokens, held-out loss {loss:.4f}"
    )


def _heldout(training: Training) -> dict[str, Any]:
    records = [m for m in read_metrics(training.run) if m["kind"] == "heldout"]
    return records[-1]


def _table(training: Training) -> dict[str, np.ndarray]:
    table = pq.read_table(training.run / CELLS_NAME)
    return {name: table[name].to_numpy() for name in table.column_names}


def _scores(
    trainings: list[Training], options: SaturateOptions
) -> tuple[Scored, dict[str, int | float | None]]:
    """Return the losses of all trainings, and ``heldout_cells`` with the line of counting.

    The arithmetic line is the one that was counted on the whole corpus.
    """
    tables = [_table(training) for training in trainings]
    first = tables[0]
    for training, table in zip(trainings, tables, strict=True):
        if any(not np.array_equal(table[k], first[k]) for k in ("cell", "genes")):
            raise ValueError(
                f"{training.run}: was scored in other held-out cells than {trainings[0].run}; "
                "give another folder"
            )
    losses = np.stack([table["loss"] for table in tables])
    losses = losses.reshape(options.seeds, -1, len(first["cell"]))
    whole = next(t for n, t in zip(trainings, tables, strict=True) if n.share == 1)
    line = None
    if ARITHMETIC in whole:
        line = float(np.average(np.nan_to_num(whole[ARITHMETIC]), weights=whole["genes"]))
    scored = Scored(np.array(options.shares), losses[:, :-1], losses[:, -1], first["genes"])
    return scored, {"heldout_cells": len(first["cell"]), "arithmetic": line}


def _record(
    shards: ShardSet, config: str, overrides: Sequence[str], options: SaturateOptions
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "shards": shards.name,
        "shards_fingerprint": shards.fingerprint,
        "config": config,
        "overrides": list(overrides),
        "equal": options.equal,
        "seeds": options.seeds,
        "file": options.cells.name if options.cells else None,
        "label": options.label,
    }


def _sizes(
    trainings: list[Training], options: SaturateOptions, line: float | None
) -> list[dict[str, Any]]:
    """Return a row for each size, with the mean over its seeds, and no probe yet."""
    found = []
    number = len(trainings) // options.seeds
    for place in range(number):
        same = trainings[place::number]
        first, records = same[0], [_heldout(training) for training in same]
        losses = [record["loss"] for record in records]
        own = [r["beyond_arithmetic"] for r in records if "beyond_arithmetic" in r]
        loss = float(np.mean(losses))
        found.append(
            {
                "share": first.share,
                "tokens_part": first.tokens_part,
                "cells": first.corpus.cells,
                "steps": first.steps,
                "tokens": first.tokens,
                "epochs": first.epochs,
                "loss": loss,
                "losses": losses,
                "beyond_arithmetic": None if line is None else line - loss,
                "beyond_own_arithmetic": float(np.mean(own)) if own else None,
                "probe": None,
            }
        )
    return found


def _fitted(scored: Scored, equal: str) -> dict[str, Any]:
    """Return the fit and the gains with their intervals; None with too few sizes for a curve."""
    if len(scored.shares) < FEWEST_SIZES:
        return {"fit": None, "gains": None}
    found = saturation(scored)
    at_sizes = np.array([found.at(share)[0] for share in scored.shares])
    gains = {name: with_interval(values) for name, values in found.gains(equal).items()}
    fit: dict[str, Any] = {
        name: with_interval(found.curves[:, i]) for i, name in enumerate(("a", "b", "c"))
    }
    fit["residual"] = float(np.sqrt(np.mean((at_sizes - found.losses[0]) ** 2)))
    fit["loss_of_ten_times"] = with_interval(found.at(10.0))
    fit["intervals"] = [with_interval(column) for column in found.losses.T]
    return {"fit": fit, "gains": gains}
