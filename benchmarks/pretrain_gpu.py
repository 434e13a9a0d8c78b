"""Pretraining steps on one GPU: real tokens per second, MFU, memory, time to compile; embeddings.

``python -m benchmarks.pretrain_gpu [--out FILE.json] [--budget-s 540]``; to see that it runs,
without a GPU: ``python -m benchmarks.pretrain_gpu --device cpu --tiny``

Made for a bare checkout on a machine that has packages of its own: torch, transformers, numba,
pydantic, PyYAML; no data, no network. The model is that of the package, and so is the
step where DeepSpeed is installed (ZeRO-1, bf16 weights, float32 sums); where it is not, autocast
over float32 weights with the same optimizer. The output says which. Weights, genes and masks are
random: speed does not depend on them.

Each row is a model and a micro-batch: full steps of `--passes` micro-batches over cells of three
padded lengths, a third of the tokens each (mean about 1,200 tokens a cell), every cell up to 63
tokens shorter than its bucket. ``compiled``: false, and true, as `run.compile`
does it (a graph of a layer per shape; ``--compile-mode reduce-overhead`` for CUDA graphs,
``--compile-whole`` for one graph of the model); ``mask`` false: the same cells filled up, so
that attention needs no mask, to see what a mask costs. Rows are in order of interest; after
`--budget-s` seconds the rest is skipped, and said to be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.vocab import Vocabulary, from_dictionaries
from pretrain.config import RunConfig, load_config
from pretrain.encoders import encoder_of
from pretrain.flops import Work, known_gpu
from pretrain.masking import NO_LABEL
from pretrain.metrics import peak_memory_gib
from pretrain.model import MaskedGeneModel, build_model
from pretrain.optim import build_optimizer

_LENGTHS = (768, 1216, 2048)
_SHORTER = 64
_SEED = 0
# Genes and special tokens of Geneformer's vocabularies.
_V1, _V2 = (25_424, ("<pad>", "<mask>")), (20_271, ("<pad>", "<mask>", "<cls>", "<eos>"))
_MODELS = {
    "geneformer_v1_6l": (_V1, (65_536, 131_072, 32_768)),
    "geneformer_v2_104m": (_V2, (65_536, 32_768)),
    "geneformer_v1_12l": (_V1, (65_536, 131_072)),
    "geneformer_v2_316m": (_V2, (32_768, 65_536)),
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    micro_batch: int
    compiled: bool
    mask: bool = True


def cases() -> list[Case]:
    """Return all rows, those of most interest first."""
    first = [Case(m, sizes[0], c) for m, (_, sizes) in _MODELS.items() for c in (False, True)]
    rest = [Case(m, s, True) for m, (_, sizes) in _MODELS.items() for s in sizes[1:]]
    return first + [Case("geneformer_v1_6l", 65_536, True, mask=False)] + rest


def vocabulary_of(name: str) -> Vocabulary:
    """Return a vocabulary of the published size."""
    genes, special = _MODELS[name][0]
    names = [*special, *(f"G{i}" for i in range(genes))]
    return from_dictionaries({n: i for i, n in enumerate(names)}, dict.fromkeys(names, 1.0))


def settings_of(name: str, tiny: bool) -> RunConfig:
    """Return the published settings in bf16; tiny: two narrow layers."""
    small = ["num_layers=2", "hidden_size=64", "num_heads=4", "intermediate_size=128"]
    changes = [f"model.{s}" for s in small] if tiny else []
    changes += ["data.shards=x", "run.out=x", "run.precision=bf16"]
    return load_config(name, [*changes, "model.activation_checkpointing=false"])


def micro_batches(
    vocabulary: Vocabulary, case: Case, lengths: tuple[int, ...], device: torch.device
) -> list[tuple[int, tuple[torch.Tensor | None, ...]]]:
    """Return (real tokens, arguments of the model), one of each length."""
    rng = np.random.default_rng(_SEED)
    found = []
    for length in lengths:
        rows = max(1, case.micro_batch // length)
        hidden = round(0.15 * length)
        real = rng.integers(length - _SHORTER + 1, length + 1, rows)
        if not case.mask:
            real[:] = length
        ids = rng.integers(vocabulary.first_gene_token, vocabulary.num_tokens, (rows, length))
        places, labels = [], []
        for row, size in enumerate(real):
            chosen = np.sort(rng.permutation(size)[: round(0.15 * size)])
            places.append(row * length + chosen)
            labels.append(ids[row, chosen])
            ids[row, chosen] = vocabulary.mask_token
            ids[row, size:] = vocabulary.pad_token
        filler = rows * hidden - sum(map(len, places))
        flat_places = np.concatenate([*places, np.zeros(filler, dtype=np.int64)])
        flat_labels = np.concatenate([*labels, np.full(filler, NO_LABEL)])
        mask = torch.arange(length) < torch.from_numpy(real)[:, None] if case.mask else None
        tensors = (
            torch.from_numpy(ids.astype(np.int32)), mask,
            torch.from_numpy(flat_places), torch.from_numpy(flat_labels),
        )  # fmt: skip
        found.append((int(real.sum()), tuple(None if t is None else t.to(device) for t in tensors)))
    return found


def make_step(
    model: MaskedGeneModel, config: RunConfig, device: torch.device, use_deepspeed: bool
) -> Callable[[list], torch.Tensor]:
    """Return a function that trains on micro-batches and returns the summed loss."""
    optimizer = build_optimizer(model, config.optim)
    if use_deepspeed:
        import deepspeed

        from pretrain.ds_config import derive_ds_config

        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=derive_ds_config(config)
        )

        def step(batches: list) -> torch.Tensor:
            total = torch.zeros((), device=device)
            for _, batch in batches:
                losses, _ = engine(*batch)
                engine.backward(losses.sum() / 1000, scale_wrt_gas=False)
                total += losses.sum().detach()
            engine.step()
            return total

        return step

    def plain_step(batches: list) -> torch.Tensor:
        total = torch.zeros((), device=device)
        for _, batch in batches:
            with torch.autocast(device.type, torch.bfloat16):
                losses, _ = model(*batch)
            (losses.sum() / 1000).backward()
            total += losses.sum().detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return plain_step


def wait(device: torch.device) -> None:
    """Return when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(case: Case, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return rates of one row."""
    config, vocabulary = settings_of(case.model, arguments.tiny), vocabulary_of(case.model)
    lengths = (96, 128) if arguments.tiny else _LENGTHS
    batches = micro_batches(vocabulary, case, lengths, device)
    torch.manual_seed(_SEED)
    model = build_model(config.model, vocabulary, _SEED).to(device).train()
    num_parameters = sum(p.numel() for p in model.parameters())
    if case.compiled:
        if arguments.compile_whole:
            model.compile(mode=arguments.compile_mode, dynamic=False)
        else:
            shapes = {(ids.shape[0], ids.shape[1]) for _, (ids, *_) in batches if ids is not None}
            model.compile_layers(arguments.compile_mode, shapes)
    step = make_step(model, config, device, arguments.deepspeed)
    # Micro-batches of one step: the lengths in turn.
    order = [batches[i % len(batches)] for i in range(max(arguments.passes, len(batches)))]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    step(order)
    wait(device)
    first_s = time.perf_counter() - started
    step(order)
    wait(device)
    steps, started = 0, time.perf_counter()
    loss = torch.zeros(())
    while time.perf_counter() - started < arguments.seconds:
        loss = step(order)
        wait(device)
        steps += 1
    seconds = (time.perf_counter() - started) / steps
    gpu = known_gpu(torch.cuda.get_device_name()) if device.type == "cuda" else None
    work = Work(config, vocabulary.num_tokens, gpu)
    shapes = [b[1][0].shape for b in order]  # type: ignore[union-attr]
    flops = sum(s.numel() * work.flops_per_token(s[1]) for s in shapes)
    real, padded = sum(b[0] for b in order), sum(s.numel() for s in shapes)
    return {
        "parameters": num_parameters,
        "real_tokens_per_s": real / seconds,
        "padded_tokens_per_s": padded / seconds,
        "cells_per_s": sum(s[0] for s in shapes) / seconds,
        "tokens_per_cell": real / sum(s[0] for s in shapes),
        "padding": 1 - real / padded,
        "tflops_per_s": flops / seconds / 1e12,
        "mfu": flops / seconds / work.peak_flops if work.peak_flops else None,
        "step_ms": seconds * 1000,
        "passes": len(order),
        "first_step_s": first_s,
        "memory_gib": peak_memory_gib(),
        "loss_per_gene": float(loss) / sum(int((b[1][3] >= 0).sum()) for b in order),  # type: ignore[operator]
    }


def embedding(name: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return cells embedded per second, at 1,250 genes."""
    from eval.embed import embed_cells

    config, vocabulary = settings_of(name, arguments.tiny), vocabulary_of(name)
    model = build_model(config.model, vocabulary, _SEED).to(device).eval()
    rng = np.random.default_rng(_SEED)
    genes = np.arange(vocabulary.first_gene_token, vocabulary.num_tokens)
    edge = [[2], [3]] if vocabulary.has_cls else [[], []]
    number, size = (4, 100) if arguments.tiny else (2048, 1250)
    cells = [
        np.r_[edge[0], rng.permutation(genes)[:size], edge[1]].astype(np.int64)
        for _ in range(number)
    ]

    def run() -> None:
        embed_cells(
            cells,
            encoder_of(model.bert),
            vocabulary,
            token_budget=262_144,
            device=str(device),
            bf16=True,
        )
        wait(device)

    run()
    started = time.perf_counter()
    run()
    return {"embedded_cells_per_s": number / (time.perf_counter() - started), "genes": size}


def rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the rows, each as soon as it is measured."""
    started = time.perf_counter()
    chosen = (
        [Case("geneformer_v1_6l", 512, c) for c in (False, True)] if arguments.tiny else cases()
    )
    chosen = [c for c in chosen if not arguments.models or c.model in arguments.models]
    todo: list[tuple[dict, Callable[[], dict]]] = [
        (vars(c) | {"what": "pretraining"}, lambda c=c: measure(c, arguments, device))
        for c in chosen
    ]
    todo[4:4] = [
        ({"what": "embedding", "model": n}, lambda n=n: embedding(n, arguments, device))
        for n in ("geneformer_v1_6l", "geneformer_v2_104m")[: 1 if arguments.tiny else 2]
    ]
    for row, work in todo:
        if time.perf_counter() - started > arguments.budget_s:
            yield row | {"skipped": f"{arguments.budget_s} s are over"}
            continue
        try:
            yield row | work()
        except torch.OutOfMemoryError:
            yield row | {"skipped": "does not fit into memory"}
        except ImportError as error:
            yield row | {"skipped": str(error)}
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def installed(package: str) -> str | None:
    """Return a package's version, None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(device: torch.device) -> dict[str, Any]:
    """Return what it runs on."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {p: installed(p) for p in ("torch", "triton", "transformers", "deepspeed")},
        "device": str(device),
    }
    commands = {
        "commit": ["git", "rev-parse", "HEAD"],
        "driver": ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
    }
    for name, command in commands.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name] = done.stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            found[name] = None
    return found


def main() -> None:
    """Print a line of JSON per row, and keep all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="to see that it runs")
    parser.add_argument("--models", nargs="+", choices=sorted(_MODELS), default=[])
    parser.add_argument("--passes", type=int, default=3, help="micro-batches a step")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each row")
    parser.add_argument("--budget-s", type=float, default=540.0, help="of the whole run")
    parser.add_argument("--compile-mode", default="default", help="reduce-overhead: CUDA graphs")
    parser.add_argument(
        "--compile-whole", action="store_true", help="the whole model, not its layers"
    )
    parser.add_argument("--no-deepspeed", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.tiny:
        arguments.seconds = min(arguments.seconds, 1.0)
    arguments.deepspeed = installed("deepspeed") is not None and not arguments.no_deepspeed
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        torch.backends.cuda.matmul.allow_tf32 = True
    if arguments.deepspeed:
        from pretrain import dist

        dist.start(600, None)
    found = machine(device) | {"step": "deepspeed" if arguments.deepspeed else "torch", "rows": []}
    print(json.dumps({k: v for k, v in found.items() if k != "rows"}), flush=True)
    for row in rows(arguments, device):
        found["rows"].append(row)
        print(json.dumps(row), flush=True)
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
