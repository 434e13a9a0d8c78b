"""From tars to padded, masked tensors: cells per second of one thread, beside what others do.

``python -m benchmarks.loader WORK [--cells 100000]``

Generated cells (those of `benchmarks.prepare`, about 1,100 tokens) are prepared into WORK. Then, in
one process and one thread, files in the page cache:

- *geneloom*: the batches of an epoch in the order of training, padded tensors, 80/10/10 masks,
  labels. Each epoch with an empty cache of blocks. Made in line; and by two threads ahead.
- *geneloom, read and padded*: the same without what masking adds (keys, hashes, selection), by
  subtraction: the masking kernel is timed apart on the same batches, and padding alone too.
- *Hugging Face random access*: the same cells as a ``datasets`` folder of int64 lists; a random
  batch at a time, padded with numpy (its own collator is slower), no masks.
- *One cell a member*: the same cells as a webdataset of one ``.npy`` per cell, read in order,
  padded, no masks.

Then what it costs to find a position: to read on to it from the start of the epoch, per million
cells, with each of these; and the time in which it is computed, for these shards and for a billion
cells in 40,000 tars on 1,024 ranks (with the memory that this takes). Medians of five runs, in
turns. Ratios are what to look at.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.prepare import apart, write_tokens, write_vocabulary

_ROUNDS = 5
_SECONDS = 3.0  # of each measurement
_BATCH_CELLS = 128


def measure(batches: Callable, num_cells: Callable = len) -> float:
    """Return cells per second over some seconds of an iterator's batches, begun anew at its end."""
    cells, started = 0, time.perf_counter()
    while True:
        for batch in batches():
            cells += num_cells(batch)
            if time.perf_counter() - started > _SECONDS:
                return cells / (time.perf_counter() - started)


def own_batches(shards: Path, threads: int) -> Callable:
    """Return an iterator of the steps of one epoch as the training gets them (0: made in line)."""
    from data_prep.shards.reader import ShardSet
    from pretrain.batches.step_dataset import StepDataset, steps_in_background
    from pretrain.config import MaskingConfig

    opened = ShardSet(shards)

    def batches():
        dataset = StepDataset(opened, "train", 0, 163_840, 32_768, MaskingConfig(), 0, 1)
        yield from steps_in_background(dataset, 0, dataset.plan.steps_per_epoch, threads)

    return batches


def masking_s_per_cell(shards: Path) -> float:
    """Return seconds per cell that masking takes beyond padding, on batches of these shards."""
    from data_prep.shards.order import EpochPlan
    from data_prep.shards.reader import ShardSet
    from pretrain.batches.shard_blocks import BlockCache
    from pretrain.config import MaskingConfig
    from pretrain.objective.masking import mask_rows, masks_of

    opened = ShardSet(shards)
    plan = EpochPlan(opened, "train", 0, 32_768)
    cache = BlockCache(opened, 10_000, False)
    masks = masks_of(0, "train", 0, opened.vocabulary, MaskingConfig())
    masking, padding, num_cells = [], [], 0
    for number in range(200):
        step = plan.step(number)
        cells = plan.cells(step)
        tokens, offsets = cache.gather(plan.buckets[step.bucket].extent, cells)
        shape, most = (len(cells), step.length), len(cells) * masks.most(step.length)
        inputs, real = np.empty(shape, np.int32), np.empty(shape, bool)
        places, labels, ranks = (np.empty(most, t) for t in (np.int64, np.int64, np.float32))
        started = time.perf_counter()
        mask_rows(tokens, offsets, cells, masks, 0, inputs, real, places, labels, ranks)
        masking.append(time.perf_counter() - started)
        started = time.perf_counter()
        real[:] = np.arange(step.length) < np.diff(offsets)[:, None]
        inputs[:] = 0
        inputs[real] = tokens
        padding.append(time.perf_counter() - started)
        num_cells += len(cells)
    return max(0.0, float(np.median(masking) - np.median(padding)) * len(masking) / num_cells)


def billion_cells(folder: Path) -> dict:
    """Return what opening a billion cells and finding a step takes (call it in a fresh process)."""
    from data_prep.shards.order import EpochPlan, share
    from data_prep.shards.reader import ShardSet

    before = peak_mib()
    started = time.perf_counter()
    plan = EpochPlan(ShardSet(folder), "train", 0, 2**25)
    step = plan.step(plan.steps_per_epoch * 5 // 2)
    plan.cells(step, *share(step.num_cells, 1024, 700))
    first_s = time.perf_counter() - started
    rng, seconds = np.random.default_rng(0), []
    for number in rng.integers(0, 3 * plan.steps_per_epoch, 200):
        started = time.perf_counter()
        step = plan.step(int(number))
        plan.cells(step, *share(step.num_cells, 1024, int(rng.integers(1024))))
        seconds.append(time.perf_counter() - started)
    return {
        "train_cells": plan.num_cells,
        "open_and_find_s": round(first_s, 3),
        "step_ms_median": round(1e3 * float(np.median(seconds)), 2),
        "step_ms_max": round(1e3 * max(seconds), 2),
        "memory_mib": round(peak_mib() - before),
    }


def huggingface_batches(folder: Path) -> Callable:
    """Return an iterator of padded random batches of a ``datasets`` folder."""
    import datasets

    data = datasets.Dataset.from_file(str(folder / "data-00000-of-00001.arrow"))
    data = data.select_columns(["input_ids"]).with_format("numpy")

    def batches():
        order = np.random.default_rng(0).permutation(len(data))
        for start in range(0, len(order), _BATCH_CELLS):
            yield padded(data[order[start : start + _BATCH_CELLS]]["input_ids"])

    return batches


def webdataset_batches(folder: Path) -> Callable:
    """Return an iterator of padded batches of a webdataset with one cell a member."""
    from webdataset.compat import WebDataset

    names = sorted(str(p) for p in folder.glob("*.tar"))

    def batches():
        held = []
        for sample in WebDataset(names, shardshuffle=False, empty_check=False):
            held.append(np.load(io.BytesIO(sample["npy"])))
            if len(held) == _BATCH_CELLS:
                yield padded(held)
                held = []

    return batches


def padded(cells) -> np.ndarray:
    """Return int64 [cells, longest]."""
    out = np.zeros((len(cells), max(len(c) for c in cells)), dtype=np.int64)
    for row, cell in enumerate(cells):
        out[row, : len(cell)] = cell
    return out


def write_single_cells(shards: Path, folder: Path, cells_per_tar: int = 20_000) -> None:
    """Write the cells of shards as tars of one uint16 ``.npy`` per cell."""
    from data_prep.shards.reader import ShardSet

    folder.mkdir()
    number, tar = 0, None
    for block in ShardSet(shards).iter_blocks("train"):
        for start, stop in zip(block.offsets[:-1], block.offsets[1:], strict=True):
            if number % cells_per_tar == 0:
                if tar:
                    tar.close()
                tar = tarfile.open(folder / f"{number:09d}.tar", "w")  # noqa: SIM115
            buffer = io.BytesIO()
            np.save(buffer, block.tokens[start:stop])
            info = tarfile.TarInfo(f"{number:09d}.npy")
            info.size = buffer.tell()
            buffer.seek(0)
            assert tar
            tar.addfile(info, buffer)
            number += 1
    if tar:
        tar.close()


def bytes_per_cell(folder: Path, cells: int, suffix: str) -> float:
    """Return bytes on disk over cells."""
    return sum(p.stat().st_size for p in folder.iterdir() if p.name.endswith(suffix)) / cells


def peak_mib() -> float:
    """Return the peak resident memory of this process (ru_maxrss begins with the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def print_billion_cells(folder: Path) -> None:
    """Print `billion_cells` as JSON."""
    print(json.dumps({"a billion cells, 1,024 ranks": billion_cells(folder)}), flush=True)


def write_billion_cells(folder: Path) -> None:
    """Write manifest and index: a billion cells to train on in 40,000 tars, others held out."""
    from tests.synthetic import make_large_manifest

    make_large_manifest(folder, 1_400_000_000, 56_000)


def time_to_position(shards: Path) -> float:
    """Return the median seconds to open shards and find any step's cells, each time anew."""
    from data_prep.shards.order import EpochPlan
    from data_prep.shards.reader import ShardSet

    seconds = []
    for number in range(_ROUNDS):
        started = time.perf_counter()
        plan = EpochPlan(ShardSet(shards), "train", 0, 163_840)
        plan.cells(plan.step(plan.steps_per_epoch * (number + 2) // 3))
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--cells", type=int, default=100_000)
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    apart(write_vocabulary, work / "vocabulary.json")
    apart(write_tokens, work / "tokens", arguments.cells)
    prepare = ["geneloom", "prepare", str(work / "tokens"), "--vocab"]
    prepare += [str(work / "vocabulary.json"), "--out", str(work / "shards")]
    subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
    apart(write_single_cells, work / "shards", work / "single")
    readers = {
        "geneloom": own_batches(work / "shards", 0),
        "geneloom, two threads": own_batches(work / "shards", 2),
        "Hugging Face random access": huggingface_batches(work / "tokens"),
        "one cell a member": webdataset_batches(work / "single"),
    }
    for batches in readers.values():
        next(batches())  # compiles, opens
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(_ROUNDS):
        for name, batches in readers.items():
            own = name.startswith("geneloom")
            rates[name].append(measure(batches, (lambda b: b.cells) if own else len))
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    unmasked_s = 1 / medians["geneloom"] - masking_s_per_cell(work / "shards")
    medians["geneloom, read and padded"] = 1 / unmasked_s
    print(
        json.dumps(
            {
                "cells_per_s": {n: round(v) for n, v in medians.items()},
                "ratio": {n: round(medians["geneloom"] / v, 1) for n, v in medians.items()},
                "runs": {n: [round(v) for v in values] for n, values in rates.items()},
                "bytes_per_cell": {
                    "geneloom": round(bytes_per_cell(work / "shards", arguments.cells, ".tar")),
                    "one cell a member": round(
                        bytes_per_cell(work / "single", arguments.cells * 98 // 100, ".tar")
                    ),
                    "Hugging Face": round(bytes_per_cell(work / "tokens", arguments.cells, "w")),
                },
                "s_to_a_position": time_to_position(work / "shards"),
                "s_to_replay_a_million_cells": {n: 1e6 / v for n, v in medians.items()},
            },
            indent=1,
        )
    )
    apart(write_billion_cells, work / "large")
    apart(print_billion_cells, work / "large")
    for name in ("tokens", "shards", "single", "large"):
        shutil.rmtree(work / name)


if __name__ == "__main__":
    main()
