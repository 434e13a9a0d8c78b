"""Full deletion screens and embeddings per second on one GPU, for the published sizes.

``python -m benchmarks.perturb_gpu [--device cuda] [--lengths 1250] [--size 6l 104m]``

Random weights and random genes: speed does not depend on them. A screen of a cell deletes each of
its genes once: as many passes over the cell as it has genes. Prints JSON: cells, copies and tokens
per second, in bfloat16, for each token budget of a pass.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import BertConfig, BertModel

from data_prep.genes.vocabulary import Vocabulary, from_dictionaries
from eval.cells.embed import embed_cells
from eval.perturb.screen.compare_copies import CopyEngine, EngineSettings
from eval.perturb.screen.edits import Edit, GeneSets

_SEED = 0
# Layers, width, heads, inner width, genes, special tokens: Geneformer V1-10M and V2-104M.
_SIZES = {
    "6l": (6, 256, 4, 512, 25_424, ("<pad>", "<mask>")),
    "104m": (12, 768, 12, 3072, 20_271, ("<pad>", "<mask>", "<cls>", "<eos>")),
}


def build(size: str) -> tuple[BertModel, Vocabulary]:
    """Return an encoder of a published size with random weights."""
    layers, width, heads, inner, genes, special = _SIZES[size]
    names = [*special, *(f"G{i}" for i in range(genes))]
    vocabulary = from_dictionaries({n: i for i, n in enumerate(names)}, dict.fromkeys(names, 1.0))
    config = BertConfig(
        vocab_size=len(names), hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=inner, hidden_act="relu",
        max_position_embeddings=vocabulary.max_length,
    )  # fmt: skip
    torch.manual_seed(_SEED)
    model = BertModel._from_config(config, attn_implementation="sdpa", add_pooling_layer=False)
    return model, vocabulary


def rate(work: Callable[[], None], amount: float, least_s: float, device: str) -> float:
    """Return amount per second, over at least so many seconds, after one call that is not timed."""
    work()
    rounds, started = 0, time.perf_counter()
    while time.perf_counter() - started < least_s:
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        rounds += 1
    return rounds * amount / (time.perf_counter() - started)


def measure(size: str, length: int, budget: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Return rates for cells of one length."""
    model, vocabulary = build(size)
    rng = np.random.default_rng(_SEED)
    genes = np.arange(vocabulary.first_gene_token, vocabulary.num_tokens)
    cell = rng.permutation(genes)[:length]
    # A part of the genes is enough for a rate: all copies of a cell have one length.
    members = cell[: arguments.copies, None]
    sets = GeneSets(members, np.ones_like(members, dtype=bool))
    settings = EngineSettings(bf16=True, device=arguments.device, token_budget=budget)
    engine = CopyEngine(model, vocabulary, settings)
    copies = rate(
        lambda: engine.perturb(cell, sets, Edit("delete")) and None,
        len(members), arguments.seconds, arguments.device,
    )  # fmt: skip
    edge = [[2], [3]] if vocabulary.has_cls else [[], []]
    cells = [np.r_[edge[0], rng.permutation(genes)[:length], edge[1]].astype(np.int64)
             for _ in range(arguments.cells)]  # fmt: skip

    def embed() -> None:
        embed_cells(
            cells, engine.encoder, vocabulary, token_budget=budget, device=arguments.device,
            bf16=True,
        )  # fmt: skip

    embedded = rate(embed, len(cells), arguments.seconds, arguments.device)
    return {
        "screened_cells_per_s": copies / length,
        "copies_per_s": copies,
        "tokens_per_s": copies * (length - 1),
        "embedded_cells_per_s": embedded,
    }


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", nargs="+", choices=sorted(_SIZES), default=["6l", "104m"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1250])
    parser.add_argument("--budgets", type=int, nargs="+", default=[65_536, 262_144])
    parser.add_argument("--copies", type=int, default=1250)
    parser.add_argument("--cells", type=int, default=1024, help="to embed")
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    rows = [
        {"model": s, "genes": n, "tokens_per_pass": b} | measure(s, n, b, arguments)
        for s in arguments.size
        for n in arguments.lengths
        for b in arguments.budgets
    ]
    print(json.dumps({"device": name, "torch": torch.__version__, "rates": rows}, indent=1))


if __name__ == "__main__":
    main()
