"""What is counted before a run starts: seconds, memory and bytes, on real and on many cells.

``python -m benchmarks.counting WORK [--shards SHARDS ...] [--cells 1000000] [--length 1100]``

For each folder of shards the baselines of held-out loss and the corpus SVD are counted anew from
all training cells, and the baselines are scored on all held-out cells. Then token ids are generated
(lengths lognormal around ``--length``, cut at 60 and 2,048; as many genes as Geneformer V1 has,
with random medians), prepared in WORK, and counted: from all cells, and from as many as a run reads
by default. They are removed again. Times are processor seconds of all threads, kernels compiled
before.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.prepare import apart, write_tokens
from data_prep.genes.vocabulary import MASK, PAD, Vocabulary
from data_prep.shards.reader import ShardSet
from pretrain.config import EvaluationConfig
from pretrain.counting import arithmetic
from pretrain.counting.baselines import Baselines, RankBaselines
from pretrain.counting.corpus_svd import (
    NUM_COMPONENTS,
    RankWeights,
    chosen_blocks,
    leading_vectors,
)
from pretrain.counting.counted_tables import TrainBlock
from pretrain.objective.masking import EVALUATION_MASKING, masks_of

_GENES = 25_424
_ALL = 10**9


def timed(function: Callable) -> tuple:
    """Return what a function returns, and the processor seconds it took."""
    started = time.process_time()
    result = function()
    return result, time.process_time() - started


def count(shards: ShardSet, max_cells: int = _ALL) -> tuple[Baselines, dict]:
    """Count everything from training cells; return the baselines, and what it cost."""
    by_rank, by_rank_s = timed(lambda: RankBaselines(shards, max_cells))
    tables, arithmetic_s = timed(lambda: arithmetic._count(shards, max_cells, 1))
    baselines_gib = _peak_gib()
    matrix = RankWeights(shards, chosen_blocks(shards, max_cells))
    size = shards.vocabulary.num_tokens
    (_, _, residual), svd_s = timed(lambda: leading_vectors(matrix.gram, size, NUM_COMPONENTS))
    cells, genes = tables["counted"].tolist()
    cost = {
        "training_cells": cells,
        "hidden_genes_counted": genes,
        "by_rank_s": by_rank_s,
        "arithmetic_s": arithmetic_s,
        "kept_bytes": sum(table.nbytes for table in tables.values()),
        "peak_gib": baselines_gib,
        "svd_s": svd_s,
        "svd_residual": residual,
        "svd_peak_gib": _peak_gib(),
        "exponents": tables["exponents"].round(3).tolist(),
    }
    return Baselines(by_rank, arithmetic.Arithmetic(tables, shards.vocabulary)), cost


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def score(shards: ShardSet, baselines: Baselines) -> dict:
    """Score the held-out cells; return nats and accuracy of each baseline, and by data set."""
    vocabulary = shards.vocabulary
    masks = masks_of(0, "heldout", 0, vocabulary, EVALUATION_MASKING)
    losses: dict[str, list] = {name: [] for name in baselines.names}
    places: dict[str, list] = {name: [] for name in baselines.names}
    seconds, owners = 0.0, []
    for extent in shards.extents("heldout"):
        for number in shards.block_numbers("heldout", extent.length).tolist():
            block = shards.read_block(number)
            cells = int(shards.index["first_cell"][number]) + np.arange(len(block.offsets) - 1)
            block_of = TrainBlock(cells, block.tokens, block.offsets)
            rows = arithmetic._hidden_rows(block_of, masks, vocabulary.pad_token)
            where, at = np.nonzero(rows.inputs == vocabulary.mask_token)
            ranks = (at / rows.lengths[where]).astype(np.float32)
            names = np.array(block.batch.column("dataset").to_pylist())
            owners.append(names[where])
            found, took = timed(lambda r=rows, k=ranks: baselines.scores(r, k))
            seconds += took
            for name, (loss, place) in found.items():
                losses[name].append(loss)
                places[name].append(place)
    owner = np.concatenate(owners)
    joined = {name: np.concatenate(parts) for name, parts in losses.items()}
    return {
        "hidden_genes": len(owner),
        "score_s": seconds,
        "nats": {name: float(loss.mean()) for name, loss in joined.items()},
        "top1": {k: float((np.concatenate(p) == 0).mean()) for k, p in places.items()},
        "nats_by_dataset": {
            name: {str(o): float(loss[owner == o].mean()) for o in np.unique(owner)}
            for name, loss in joined.items()
        },
    }


def write_vocabulary(path: Path) -> None:
    """Write a vocabulary of as many genes as V1 has, medians spread as those of V1."""
    rng = np.random.default_rng(0)
    genes = tuple(f"ENSG{i:011d}" for i in range(_GENES))
    medians = np.exp(rng.gamma(2.0, 0.5, _GENES) + 0.1)
    Vocabulary(genes, medians, {PAD: 0, MASK: 1}, 2048).save(path)


def write_shards(work: Path, num_cells: int, typical_length: int) -> Path:
    """Return a folder of shards of generated cells."""
    from data_prep.genes.vocabulary import load_vocabulary
    from data_prep.prepare.options import PrepareOptions
    from data_prep.prepare.run import prepare
    from data_prep.sources.source_spec import SourceOptions, source_at

    write_vocabulary(work / "vocabulary.json")
    write_tokens(work / "tokens", num_cells, typical_length)
    source = source_at(work / "tokens", SourceOptions())
    prepare([source], work / "shards", load_vocabulary(work / "vocabulary.json"), PrepareOptions())
    shutil.rmtree(work / "tokens")
    return work / "shards"


def main() -> None:
    """Measure and print JSON, one object per line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--shards", type=Path, nargs="*", default=[])
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--length", type=int, default=1100)
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    count(ShardSet(write_shards(work, 1000, 1100)))  # compiles
    shutil.rmtree(work / "shards")
    for folder in arguments.shards:
        shards = ShardSet(folder)
        baselines, cost = count(shards)
        score(shards, baselines)  # compiles
        print(json.dumps({"shards": folder.name} | cost | score(shards, baselines)), flush=True)
    if arguments.cells:
        apart(write_shards, work, arguments.cells, arguments.length)
        shards = ShardSet(work / "shards")
        cells, tokens = (int(shards.index[name].sum()) for name in ("cells", "tokens"))
        generated = {"generated_cells": cells, "tokens": tokens}
        for most in (EvaluationConfig().baseline_cells, _ALL):
            _, cost = count(shards, most)
            print(json.dumps(generated | {"most_cells": min(most, cells)} | cost), flush=True)
        shutil.rmtree(work / "shards")


if __name__ == "__main__":
    main()
