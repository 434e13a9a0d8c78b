"""`geneloom prepare` end to end: cells per second and core, peak memory, bytes per token.

``python -m benchmarks.prepare WORK [--h5ad CELLS.h5ad --vocab DICTIONARIES] [--sizes 100000 ...]``

Two kinds of input are written into WORK and removed again: a Hugging Face folder of generated token
ids (int64 lists, as Genecorpus-30M; lengths lognormal, median 1,100, cut at 2,048), in several
sizes, to see that memory does not grow with the corpus; and an h5ad (gzip) of real cells repeated.
Each is prepared by the command in a process of its own; its peak is what the system reports for it
and its children, mapped files included. The start of the command (imports, about 2 s) is measured
apart and left out of the rates.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np

_POOL_CELLS, _BATCH_CELLS = 20_000, 1000
_GENES = 25_424


def write_tokens(folder: Path, num_cells: int, typical_length: int = 1100) -> None:
    """Write a Hugging Face folder of generated cells: a pool of different ones, repeated."""
    import pyarrow as pa

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    lengths = (
        rng.lognormal(np.log(typical_length), 0.45, _POOL_CELLS).clip(60, 2048).astype(np.int64)
    )
    weights = rng.gamma(0.3, 1.0, _GENES)
    order = np.argsort(-weights)
    batches = []
    for start in range(0, _POOL_CELLS, _BATCH_CELLS):
        cells = lengths[start : start + _BATCH_CELLS]
        noise = order[np.argsort(rng.gumbel(size=(20, _GENES)) + np.log(weights[order]))[:, ::-1]]
        tokens = np.concatenate(
            [np.roll(noise[i % 20], i)[:n] + 2 for i, n in enumerate(cells)]
        ).astype(np.int64)
        offsets = np.r_[0, np.cumsum(cells)].astype(np.int32)
        batches.append(
            pa.record_batch(
                [pa.ListArray.from_arrays(offsets, tokens), pa.array(cells)],
                names=["input_ids", "length"],
            )
        )
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), batches[0].schema) as file:
        for number in range(num_cells // _BATCH_CELLS):
            file.write_batch(batches[number % len(batches)])
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))


def write_vocabulary(path: Path) -> None:
    """Write a vocabulary of as many genes as Geneformer V1 has."""
    from data_prep.genes.vocabulary import MASK, PAD, Vocabulary

    genes = tuple(f"ENSG{i:011d}" for i in range(_GENES))
    Vocabulary(genes, np.ones(_GENES), {PAD: 0, MASK: 1}, 2048).save(path)


def write_h5ad(source: Path, path: Path, repeats: int) -> None:
    """Write the cells of `source` several times over, gzip-compressed."""
    import anndata

    cells = anndata.read_h5ad(source)
    whole = anndata.concat([cells] * repeats, index_unique="-", merge="same")
    whole.write_h5ad(path, compression="gzip")


def apart(function: Callable, *arguments: object) -> None:
    """Call in a process of its own: a child's peak memory begins with that of its parent."""
    process = get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed")


def run(arguments: list[str]) -> dict:
    """Run a command; return seconds and the peak resident memory of it and its children, GiB."""
    started = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{arguments} failed with {status}")
    return {
        "seconds": seconds,
        "peak_gib": usage.ru_maxrss / 2**20,
    }


def prepare(start_s: float, source: Path, vocabulary: Path, out: Path, *more: str) -> dict:
    """Run `geneloom prepare` and describe what came out."""
    command = ["geneloom", "prepare", str(source), "--vocab", str(vocabulary), "--out", str(out)]
    measured = run([*command, *more])
    manifest = json.loads((out / "manifest.json").read_text())
    cells = sum(s["cells_read"] for s in manifest["sources"])
    tokens = sum(b["tokens"] for b in manifest["buckets"])
    size = sum(p.stat().st_size for p in out.iterdir() if p.suffix in (".tar", ".parquet"))
    padded = sum(b["cells"] * b["length"] for b in manifest["buckets"])
    shutil.rmtree(out)
    return {
        "cells": cells,
        "tokens_per_cell": tokens / cells,
        "seconds": measured["seconds"],
        "cells_per_s": cells / (measured["seconds"] - start_s),
        "peak_gib": measured["peak_gib"],
        "bytes_per_token": size / tokens,
        "padding": 1 - tokens / padded,
        "tars": len(manifest["shards"]),
        "buckets": len({b["length"] for b in manifest["buckets"]}),
    }


def main() -> None:
    """Measure and print JSON, one object per line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--h5ad", type=Path)
    parser.add_argument("--vocab", type=Path)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--sizes", type=int, nargs="*", default=[100_000, 2_000_000])
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    vocabulary = work / "vocabulary.json"
    apart(write_vocabulary, vocabulary)
    start_s = min(run(["geneloom", "prepare", "--help"])["seconds"] for _ in range(3))
    print(json.dumps({"start_s": start_s}))
    for size in arguments.sizes:
        apart(write_tokens, work / "tokens", size)
        result = prepare(start_s, work / "tokens", vocabulary, work / "out")
        print(json.dumps({"input": "token ids, Arrow int64"} | result), flush=True)
        shutil.rmtree(work / "tokens")
    if arguments.h5ad:
        path = work / "cells.h5ad"
        apart(write_h5ad, arguments.h5ad, path, arguments.repeats)
        for processes in ("1", "2"):
            result = prepare(start_s, path, arguments.vocab, work / "out", "--processes", processes)
            label = {"input": "h5ad, gzip", "processes": int(processes)}
            print(json.dumps(label | result), flush=True)
        path.unlink()


if __name__ == "__main__":
    main()
