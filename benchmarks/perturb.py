"""In silico deletion and embedding beside the way Geneformer does them: same weights, same cells.

``python -m benchmarks.perturb --model DIR --cells CELLS.h5ad [--num-cells 2] [--genes 100]``

The reference is written from a description of Geneformer's ``InSilicoPerturber`` and
``EmbExtractor``: for each cell a Hugging Face data set of one row per deleted gene, made by two
passes of ``.map``; batches of 100, padded; float32; the full model with its vocabulary head at
every position, all hidden states kept; cosine of the mean over the genes that remain (our
``--score mean_state``; Geneformer takes the mean of the genes' cosines, which costs as much).
Embedding: the same model on batches of 100 cells, longest first. Attention is what transformers
chooses by itself (``--attention`` changes it).

All take turns in one process on the same threads. A ratio is the median over turns of
(reference's time / ours) in the same turn: wall time, and processor time, which other programs on
the machine hardly change. `--genes` limits the deletions of a cell for both (its first ones by
rank), because the reference needs minutes for a cell. What is left out of times: loading the model
and encoding the file. ``--memory N`` instead screens N cells once, one gene each by default, and
prints the peak of the process's memory beside what it held with the model loaded.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForMaskedLM, BertForMaskedLM
from transformers.utils.logging import disable_progress_bar

from data_prep.genes.vocabulary import Vocabulary
from eval.cells.embed import embed_cells
from eval.cells.read_cells import encode_file
from eval.perturb.screen.cells_and_genes import CellChoice, GeneChoice
from eval.perturb.screen.compare_copies import CopyEngine, EngineSettings
from eval.perturb.screen.edits import Edit, GeneSets
from eval.perturb.screen.run import perturb_file
from eval.perturb.screen.settings import ModelChoice, Screen
from pretrain.export.model_folder import load_exported
from pretrain.model.architectures import encoder_of

_BATCH = 100
_SEED = 0


class Original:
    """The published way, re-written: data sets, the full model, padded batches."""

    def __init__(self, model: BertForMaskedLM, vocabulary: Vocabulary) -> None:
        import datasets

        datasets.disable_progress_bars()
        self._datasets, self._model, self._vocabulary = datasets, model, vocabulary

    def _hidden(self, rows: list[list[int]]) -> torch.Tensor:
        """Return [B, L, D] of the second-to-last layer, padded to the longest row."""
        longest = max(map(len, rows))
        pad = self._vocabulary.pad_token
        ids = torch.tensor([r + [pad] * (longest - len(r)) for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
        device = self._model.device
        with torch.no_grad():
            out = self._model(
                input_ids=ids.to(device), attention_mask=mask.to(device), output_hidden_states=True
            )
        return out.hidden_states[-2]

    def embed(self, cells: list[np.ndarray]) -> np.ndarray:
        """Return the mean over a cell's genes."""
        rows = [c.tolist() for c in cells]
        data = self._datasets.Dataset.from_dict({"input_ids": rows, "at": list(range(len(rows)))})
        data = data.map(lambda row: {"length": len(row["input_ids"])})
        data = data.sort("length", reverse=True)
        found = np.zeros((len(rows), self._model.config.hidden_size), dtype=np.float32)
        for start in range(0, len(rows), _BATCH):
            batch = data.select(range(start, min(start + _BATCH, len(rows))))
            hidden = self._hidden(batch["input_ids"][:])
            for at, length, states in zip(batch["at"], batch["length"], hidden, strict=True):
                found[at] = states[:length].mean(dim=0).cpu()
        return found

    def delete(self, cell: np.ndarray, num_genes: int) -> np.ndarray:
        """Return 1 - cosine for each of the first genes: remaining genes' means."""
        whole = cell.tolist()
        original = self._hidden([whole])[0]
        data = self._datasets.Dataset.from_dict(
            {"input_ids": [whole] * num_genes, "perturb_index": [[i] for i in range(num_genes)]}
        )

        def without(row: dict[str, Any]) -> dict[str, Any]:
            gone = set(row["perturb_index"])
            row["input_ids"] = [t for i, t in enumerate(row["input_ids"]) if i not in gone]
            return row

        data = data.map(without)
        data = data.map(lambda row: {"length": len(row["input_ids"])})
        found = []
        for start in range(0, num_genes, _BATCH):
            batch = data.select(range(start, min(start + _BATCH, num_genes)))
            hidden = self._hidden(batch["input_ids"][:])
            for (gone,), states in zip(batch["perturb_index"], hidden, strict=True):
                kept = torch.cat([original[:gone], original[gone + 1 :]]).mean(dim=0)
                after = states[: len(whole) - 1].mean(dim=0)
                found.append(1 - torch.cosine_similarity(kept, after, dim=0).item())
        return np.array(found)


def seconds(function: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return wall time, processor time and the value of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    value = function()
    return time.perf_counter() - wall, time.process_time() - processor, value


def take_turns(
    contenders: dict[str, Callable[[], Any]], repeats: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what was measured, the first contender being the reference, and the values."""
    runs: dict[str, list[tuple[float, float]]] = {n: [] for n in contenders}
    values: dict[str, Any] = {}
    for _ in range(repeats):
        for name, function in contenders.items():
            wall, processor, values[name] = seconds(function)
            runs[name].append((wall, processor))
    reference, *ours = contenders
    found: dict[str, Any] = {"wall_and_processor_s": runs}
    for name in ours:
        for i, kind in enumerate(("wall", "processor")):
            found[f"{name}_ratio_{kind}"] = statistics.median(
                a[i] / b[i] for a, b in zip(runs[reference], runs[name], strict=True)
            )
    return found, values


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return ratios and differences of deletion and of embedding."""
    network, vocabulary = load_exported(arguments.model, arguments.vocab)
    full = AutoModelForMaskedLM.from_pretrained(
        arguments.model, attn_implementation=arguments.attention
    ).eval()
    if vocabulary.has_cls:
        raise ValueError("the reference here is Geneformer's V1: take a vocabulary without <cls>")
    every = [t.astype(np.int64) for t in encode_file(arguments.cells, vocabulary).tokens]
    order = np.random.default_rng(_SEED).permutation([i for i, t in enumerate(every) if len(t) > 2])
    original = Original(full, vocabulary)
    engines = {
        "fp32": CopyEngine(copy.deepcopy(encoder_of(network)), vocabulary),
        "bf16": CopyEngine(
            copy.deepcopy(encoder_of(network)), vocabulary, EngineSettings(bf16=True)
        ),
    }
    chosen = [every[i] for i in order[: arguments.num_cells]]
    results: dict[str, Any] = {"deletion": {"tokens": [len(c) for c in chosen]}}

    def deletions(engine: CopyEngine) -> np.ndarray:
        found = []
        for cell in chosen:
            members = cell[: arguments.genes, None]
            sets = GeneSets(members, np.ones_like(members, dtype=bool))
            found.append(engine.perturb(cell, sets, Edit("delete")).values["shift"])
        return np.concatenate(found)

    original.delete(chosen[0], 2)  # the first calls load code
    measured, values = take_turns(
        {
            "original": lambda: np.concatenate(
                [original.delete(c, min(len(c), arguments.genes)) for c in chosen]
            ),
            **{n: lambda e=e: deletions(e) for n, e in engines.items()},
        },
        arguments.repeats,
    )
    results["deletion"] |= measured | differences(values)
    if arguments.embed_cells:
        some = [every[i] for i in order[: arguments.embed_cells]]

        def embedded(bf16: bool) -> np.ndarray:
            return embed_cells(some, encoder_of(network), vocabulary, bf16=bf16)

        embed_cells(some[:1], encoder_of(network), vocabulary)
        contenders = {
            "original": lambda: original.embed(some),
            "fp32": lambda: embedded(False),
            "bf16": lambda: embedded(True),
        }
        measured, values = take_turns(contenders, arguments.repeats)
        results["embedding"] = {"cells": len(some)} | measured | differences(values)
    return results


def differences(values: dict[str, np.ndarray]) -> dict[str, float]:
    """Return how far ours are from the reference, and in which order they are."""
    found = {}
    for name in ("fp32", "bf16"):
        found[f"{name}_largest_difference"] = float(abs(values[name] - values["original"]).max())
        if values[name].ndim == 1:
            found[f"{name}_spearman"] = float(spearmanr(values[name], values["original"]).statistic)
    return found


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Screen many cells and return the peak of memory, MiB, with the model's share beside it."""

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    with_model = load_exported(arguments.model, arguments.vocab)
    del with_model
    before = peak()
    genes = tuple(arguments.gene_list.split(",")) if arguments.gene_list else ("all",)
    screen = Screen(
        Edit("delete"), GeneChoice(genes), CellChoice({}, max_cells=arguments.memory),
        EngineSettings(bf16=True, device=arguments.device),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        said = perturb_file(
            arguments.cells, Path(folder) / "out", screen,
            ModelChoice(arguments.model, vocabulary=arguments.vocab),
        )  # fmt: skip
    return {"said": said, "with_model_mib": before, "peak_mib": peak(), "beside": peak() - before}


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cells", type=Path, required=True)
    parser.add_argument("--vocab", type=Path)
    parser.add_argument("--num-cells", type=int, default=2)
    parser.add_argument("--genes", type=int, default=100, help="deletions per cell")
    parser.add_argument("--embed-cells", type=int, default=100, help="0: deletion only")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--attention", help="eager or sdpa; default: transformers' choice")
    parser.add_argument("--memory", type=int, default=0, help="cells")
    parser.add_argument("--gene-list", help="for --memory: A,B,C; default all")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    found = memory(arguments) if arguments.memory else measure(arguments)
    print(json.dumps(found | {"torch": torch.__version__, "threads": arguments.threads}, indent=1))


if __name__ == "__main__":
    main()
