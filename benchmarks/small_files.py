"""`geneloom prepare` on many small files: CPU seconds for each file.

``python -m benchmarks.small_files WORK [--files 1000 --cells 20 --genes 33000 --kinds 1]``

The files are h5ad (gzip) as studies deposit them sample by sample: Ensembl ids as the index of var,
symbols beside them, a table of genes of full length, few cells. `--kinds` is the number of
different tables of genes among them (another release of the annotation: other genes, another
order). The start of the command (imports) is measured apart and left out; what is counted is user
and system time of the command and its children, so that other work on the machine does not matter.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.prepare import apart

_DETECTED = 1200


def write_files(folder: Path, files: int, cells: int, genes: int, kinds: int) -> None:
    """Write small h5ad files with generated counts, and the vocabulary of three quarters."""
    import anndata
    import pandas as pd
    import scipy.sparse

    from data_prep.genes.vocabulary import MASK, PAD, Vocabulary

    rng = np.random.default_rng(0)
    ids = np.array([f"ENSG{i:011d}" for i in range(genes)])
    known = tuple(ids[: genes * 3 // 4])
    names = {f"SYMBOL{i}": gene for i, gene in enumerate(known)}
    vocabulary = Vocabulary(
        known, rng.lognormal(0, 1, len(known)), {PAD: 0, MASK: 1}, 2048, names=names
    )
    folder.mkdir(parents=True)
    vocabulary.save(folder / "vocabulary.json")
    tables = []
    for _ in range(kinds):
        order = rng.permutation(genes)[: genes - genes // 20]
        symbols = pd.DataFrame({"symbol": [f"SYMBOL{i}" for i in order]}, index=ids[order])
        tables.append(symbols)
    for number in range(files):
        table = tables[number % kinds]
        columns = rng.integers(0, len(table), size=(cells, _DETECTED))
        values = rng.geometric(0.4, size=columns.shape).astype(np.float32)
        rows = np.repeat(np.arange(cells), _DETECTED)
        counts = scipy.sparse.csr_matrix(
            (values.ravel(), (rows, columns.ravel())), (cells, len(table))
        )
        obs = pd.DataFrame(
            {"donor": f"donor{number}"}, index=[f"c{number}-{i}" for i in range(cells)]
        )
        whole = anndata.AnnData(counts, obs=obs, var=table)
        whole.write_h5ad(folder / f"sample{number:04d}.h5ad", compression="gzip")


def cpu_seconds(arguments: list[str]) -> tuple[float, float]:
    """Run a command; return its user and system time, s, and its peak memory, GiB."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{arguments} failed with {status}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--cells", type=int, default=20)
    parser.add_argument("--genes", type=int, default=33_000)
    parser.add_argument("--kinds", type=int, default=1)
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    folder, out = work / "samples", work / "out"
    if not folder.exists():
        size = (arguments.files, arguments.cells, arguments.genes, arguments.kinds)
        apart(write_files, folder, *size)
    command = [sys.executable, "-m", "data_prep"]
    start = min(cpu_seconds([*command, "--help"])[0] for _ in range(3))
    vocabulary = str(folder / "vocabulary.json")
    cpu, peak = cpu_seconds([*command, str(folder), "--vocab", vocabulary, "--out", str(out)])
    shutil.rmtree(out)
    files = len(list(folder.glob("*.h5ad")))
    result = {
        "files": files,
        "cells_per_file": arguments.cells,
        "genes": arguments.genes,
        "kinds": arguments.kinds,
        "start_cpu_s": start,
        "cpu_s": cpu,
        "cpu_s_per_file": (cpu - start) / files,
        "peak_gib": peak,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
