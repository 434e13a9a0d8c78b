"""All that is to be measured on a GPU: is it right, how fast is it, does the plan tell the memory?

``python -m benchmarks.gpu --out FILE.json [--budget-s 540] [--shards SHARDS]``; the same command
again goes on with the parts that FILE.json does not have. ``--smoke``: all parts at toy size,
without a GPU.

Made for a bare checkout on a machine that has packages of its own: torch, transformers, numba,
pydantic, PyYAML; no data, no network. Where DeepSpeed is installed a step is the package's (ZeRO-1,
bf16 weights, float32 sums); where it is not, autocast over float32 weights with the same optimizer,
and no runs. Weights, genes and masks are random: speed does not depend on them.

- correctness: losses of 50 steps on the CPU in fp32, beside the GPU in fp32 and, packed, in bf16;
- logits of one model on both;
- training: full steps over cells of three lengths, a third of the tokens each, every cell up to 63
  tokens shorter than its bucket: in rows and packed, as written and compiled; memory beside that
  of the plan;
- embedding and deleting genes (`benchmarks.perturb_gpu`, in full there);
- runs of `geneloom pretrain` on random cells: waiting for data, and a step's for a checkpoint;
- time until the held-out loss of the published recipe, on the shards of ``--shards``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_prep.files import read_json_lines
from data_prep.genes.vocabulary import Vocabulary, from_dictionaries
from pretrain.config import RunConfig, load_config
from pretrain.measure.metrics import peak_memory_gib
from pretrain.model.masked_gene_model import MaskedGeneModel, build_model
from pretrain.model.packing import packed
from pretrain.optim import build_optimizer
from pretrain.plan.corpus import Corpus
from pretrain.plan.flops import Work, known_gpu
from pretrain.plan.needs import memory_per_gpu

_LENGTHS, _SMOKE_LENGTHS = (768, 1216, 2048), (40, 64)
_SHORTER = 64
_SEED = 0
# Genes and special tokens of Geneformer's vocabularies.
_V1, _V2 = (25_424, ("<pad>", "<mask>")), (20_271, ("<pad>", "<mask>", "<cls>", "<eos>"))
_MODELS = {
    "geneformer_v1_6l": (_V1, 65_536), "geneformer_v2_104m": (_V2, 32_768),
    "geneloom_10m": (_V1, 65_536), "geneformer_v1_12l": (_V1, 65_536),
    "geneloom_100m": (_V2, 32_768), "geneformer_v2_316m": (_V2, 16_384),
}  # fmt: skip
_SMALL = ("num_layers=2", "hidden_size=64", "num_heads=4", "intermediate_size=128")
_CORRECTNESS_STEPS = 50
# The loss that the published recipe reached on 20,595 real cells (docs/results.md).
_PUBLISHED_LOSS = 8.541


@dataclass(frozen=True)
class Case:
    """A row of the table of training."""

    model: str
    packed: bool
    compiled: bool


def vocabulary_of(name: str, smoke: bool) -> Vocabulary:
    """Return a vocabulary of the published size; for a smoke test a small one."""
    genes, special = _MODELS[name][0]
    names = [*special, *(f"G{i}" for i in range(300 if smoke else genes))]
    return from_dictionaries({n: i for i, n in enumerate(names)}, dict.fromkeys(names, 1.0))


def settings_of(name: str, small: bool, precision: str = "bf16") -> RunConfig:
    """Return supplied settings; small: two narrow layers. Without what is counted in a corpus."""
    changes = [f"model.{s}" for s in _SMALL] if small else []
    changes += ["data.shards=x", "run.out=x", f"run.precision={precision}"]
    if name.startswith("geneloom"):
        changes += ["model.init_genes=random", "objective.prior=none"]
    return load_config(name, [*changes, "model.activation_checkpointing=false"])


def micro_batches(
    config: RunConfig, vocabulary: Vocabulary, places: int, lengths: tuple[int, ...],
    is_packed: bool, device: torch.device,
) -> list[tuple[int, tuple]]:  # fmt: skip
    """Return (real tokens, arguments of the model), one of each length."""
    rng = np.random.default_rng(_SEED)
    share, found = config.masking.probability, []
    for length in lengths:
        rows = max(1, places // length)
        real = rng.integers(length - min(_SHORTER, length // 2) + 1, length + 1, rows)
        ids = rng.integers(vocabulary.first_gene_token, vocabulary.num_tokens, (rows, length))
        hidden, labels = [], []
        for row, size in enumerate(real):
            chosen = np.sort(rng.permutation(size)[: round(share * size)])
            hidden.append(row * length + chosen)
            labels.append(ids[row, chosen])
            ids[row, chosen] = vocabulary.mask_token
            ids[row, size:] = vocabulary.pad_token
        inputs = torch.from_numpy(ids.astype(np.int32))
        mask = torch.arange(length) < torch.from_numpy(real)[:, None]
        flat, asked = (torch.from_numpy(np.concatenate(x)) for x in (hidden, labels))
        arguments: tuple = inputs, mask, flat, asked
        if is_packed:
            tokens, cells = packed(inputs, mask, flat, round(share * length))
            arguments = tokens, None, flat, asked, None, None, None, None, tuple(cells)
        found.append((int(real.sum()), moved(arguments, device)))
    return found


def moved(value: Any, device: torch.device) -> Any:
    """Return tensors in nested tuples on a device."""
    if isinstance(value, tuple):
        return tuple(moved(one, device) for one in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def make_step(
    model: MaskedGeneModel, config: RunConfig, device: torch.device, use_deepspeed: bool
) -> Callable[[list], torch.Tensor]:
    """Return a function that trains on micro-batches and returns the summed loss."""
    if use_deepspeed:
        return _deepspeed_step(model, config)
    if config.optim.kind == "muon":  # it asks ZeRO where the matrices are
        config = config.model_copy(update={"optim": type(config.optim)()})
    optimizer = build_optimizer(model, config.optim)

    def step(batches: list) -> torch.Tensor:
        total = torch.zeros((), device=device)
        hidden = sum(len(batch[3]) for _, batch in batches)
        for _, batch in batches:
            with torch.autocast(device.type, torch.bfloat16, config.run.precision == "bf16"):
                losses, _ = model(*batch)
            (losses.sum() / hidden).backward()
            total += losses.sum().detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total / hidden

    return step


def _deepspeed_step(model: MaskedGeneModel, config: RunConfig) -> Callable[[list], torch.Tensor]:
    import deepspeed

    from pretrain.checkpoints import zero_state
    from pretrain.ds_config import derive_ds_config
    from pretrain.optimizer.muon import MuonBesideAdamW
    from pretrain.ranks import dist

    dist.forget_earlier_runs()
    optimizer = build_optimizer(model, config.optim)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=derive_ds_config(config)
    )
    if isinstance(optimizer, MuonBesideAdamW):
        ranks = dist.Ranks(0, 1, next(model.parameters()).device)
        vectors = zero_state.vectors_of_kind(engine, 1, "muon")
        optimizer.deal(vectors, zero_state.owned_fragments(engine, 1, 0), ranks, False)

    def step(batches: list) -> torch.Tensor:
        total = torch.zeros((), device=next(model.parameters()).device)
        hidden = sum(len(batch[3]) for _, batch in batches)
        for _, batch in batches:
            losses, _ = engine(*batch)
            engine.backward(losses.sum() / hidden, scale_wrt_gas=False)
            total += losses.sum().detach()
        engine.step()
        return total / hidden

    return step


def wait(device: torch.device) -> None:
    """Return when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def correctness(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return losses of the same steps on the CPU and on the GPU, and how far they are apart."""
    steps, cpu = 2 if arguments.smoke else _CORRECTNESS_STEPS, torch.device("cpu")
    found: dict[str, Any] = {"steps": steps}
    for name in ("geneformer_v1_6l", "geneloom_10m"):
        losses = {}
        for how, where, precision, is_packed in (
            ("cpu", cpu, "fp32", False), ("fp32", device, "fp32", False),
            ("bf16 packed", device, "bf16", True),
        ):  # fmt: skip
            config = settings_of(name, True, precision)
            # Dropped states are other ones on another device.
            none = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
            model_config = config.model.model_copy(update=none)
            model = build_model(model_config, vocabulary_of(name, True), _SEED).to(where).train()
            batches = micro_batches(
                config, vocabulary_of(name, True), 256, _SMOKE_LENGTHS, is_packed, where
            )
            step = make_step(model, config, where, False)
            losses[how] = [float(step(batches)) for _ in range(steps)]
        away = {
            how: max(abs(a / b - 1) for a, b in zip(values, losses["cpu"], strict=True))
            for how, values in losses.items()
        }
        found[name] = {"losses": losses, "largest_relative_difference": away}
    return found


def logits(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return how far logits of the same weights, as Hugging Face computes them, are apart."""
    found = {}
    for name in ("geneformer_v1_6l", "geneloom_10m"):
        config, vocabulary = settings_of(name, True, "fp32"), vocabulary_of(name, True)
        network = build_model(config.model, vocabulary, _SEED).bert.eval()
        ids = torch.randint(vocabulary.first_gene_token, vocabulary.num_tokens, (4, 128))
        with torch.no_grad():
            here = network(input_ids=ids).logits
            nn.Module.to(network, device)
            there = network(input_ids=ids.to(device)).logits.cpu()
        found[name] = {"largest_difference": float((here - there).abs().max())}
    return found


def training(case: Case, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return rates and memory of one row."""
    config, vocabulary = (
        settings_of(case.model, arguments.smoke),
        vocabulary_of(case.model, arguments.smoke),
    )
    lengths = _SMOKE_LENGTHS if arguments.smoke else _LENGTHS
    places = 256 if arguments.smoke else _MODELS[case.model][1]
    batches = micro_batches(config, vocabulary, places, lengths, case.packed, device)
    model = build_model(config.model, vocabulary, _SEED).to(device).train()
    num_parameters = sum(p.numel() for p in model.parameters())
    if case.compiled:
        shapes = {(len(b[0]), b[0].shape[1]) for _, b in batches if not case.packed}
        model.compile_layers("default", None if case.packed else shapes)
    step = make_step(model, config, device, arguments.deepspeed)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    step(batches)
    wait(device)
    first_s = time.perf_counter() - started
    step(batches)
    wait(device)
    steps, started, loss = 0, time.perf_counter(), torch.zeros(())
    while steps == 0 or time.perf_counter() - started < arguments.seconds:
        loss = step(batches)
        wait(device)
        steps += 1
    seconds = (time.perf_counter() - started) / steps
    gpu = known_gpu(torch.cuda.get_device_name()) if device.type == "cuda" else None
    work = Work(config, vocabulary.num_tokens, gpu)
    real = sum(tokens for tokens, _ in batches)
    computed = [tokens if case.packed else b[0].numel() for tokens, b in batches]
    flops = sum(n * work.flops_per_token(L) for n, L in zip(computed, lengths, strict=True))
    memory, planned = peak_memory_gib(), _planned_gib(config, vocabulary, max(computed), lengths)
    return {
        "parameters": num_parameters,
        "real_tokens_per_s": real / seconds,
        "padding": 1 - real / sum(computed),
        "tflops_per_s": flops / seconds / 1e12,
        "mfu": flops / seconds / work.peak_flops if work.peak_flops else None,
        "step_ms": seconds * 1000,
        "first_step_s": first_s,
        "memory_gib": memory,
        "planned_gib": planned,
        "memory_over_plan": memory / planned,
        "loss": float(loss),
    }


def _planned_gib(
    config: RunConfig, vocabulary: Vocabulary, places: int, lengths: tuple[int, ...]
) -> float:
    """Return what the plan says of memory; its share of the CUDA context is no tensor's."""
    corpus = Corpus(1, 1, [(length, 1) for length in lengths], vocabulary.num_tokens, 2.0)
    found = memory_per_gpu(config, corpus, vocabulary.max_length, 1, 1, places)
    return (found.weights + found.gradients + found.optimizer + found.activations
            + found.logits) / 2**30  # fmt: skip


def embed_and_perturb(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return cells embedded, and screened with each gene deleted once, per second."""
    from benchmarks import perturb_gpu

    own = argparse.Namespace(
        device=device.type, copies=8 if arguments.smoke else 1250,
        cells=4 if arguments.smoke else 1024, seconds=max(0.01, min(arguments.seconds, 5.0)),
    )  # fmt: skip
    sizes, length, budget = (
        (("6l",), 40, 512) if arguments.smoke else (("6l", "104m"), 1250, 262_144)
    )
    return {size: perturb_gpu.measure(size, length, budget, own) for size in sizes}


def run(name: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return what a run of `geneloom pretrain` on random cells says of its speed and waiting."""
    if not arguments.deepspeed:
        return {"skipped": "DeepSpeed is not installed"}
    with tempfile.TemporaryDirectory() as work:
        shards = _random_shards(Path(work), arguments.smoke)
        steps = 6 if arguments.smoke else 60
        changes = [f"model.{s}" for s in _SMALL] if arguments.smoke else []
        changes += ["batch.tokens_per_step=2048"] if arguments.smoke else []
        records = _pretrain(
            name, shards, Path(work) / "run", device,
            [*changes, f"run.max_steps={steps}", "run.epochs=50", "optim.warmup_steps=2",
             f"run.log_every_steps={steps // 3}", f"checkpoint.every_steps={steps // 3}",
             "evaluation.svd_cells=100", "evaluation.max_cells=64"],
        )  # fmt: skip
    last = [m for m in records if m["kind"] == "train"][-1]
    blocked = [m["blocked_s"] for m in records if m["kind"] == "checkpoint"]
    return {k: last[k] for k in ("tokens_per_s", "mfu", "data_wait", "padding", "memory_gib")
            if k in last} | {"checkpoint_blocked_s": max(blocked)}  # fmt: skip


def _random_shards(folder: Path, smoke: bool) -> Path:
    """Write shards of random counts: 1,200 genes of a cell in the mean."""
    import anndata
    import scipy.sparse

    from data_prep.prepare.options import PrepareOptions
    from data_prep.prepare.run import prepare
    from data_prep.sources.source_spec import SourceOptions, source_at

    cells, genes, detected = (60, 100, 0.4) if smoke else (6000, 24_000, 0.05)
    rng = np.random.default_rng(_SEED)
    counts = scipy.sparse.random(
        cells, genes, detected, "csr", np.float32, rng, lambda n: rng.geometric(0.4, n)
    )
    data = anndata.AnnData(counts)
    data.obs_names = [f"cell{i}" for i in range(cells)]
    data.var_names = [f"ENSG{i:011d}" for i in range(genes)]
    data.write_h5ad(folder / "cells.h5ad")
    options = PrepareOptions(heldout_share=0.1, vocabulary_min_cells=1)
    prepare([source_at(folder / "cells.h5ad", SourceOptions())], folder / "shards", None, options)
    return folder / "shards"


def _pretrain(
    name: str, shards: Path, out: Path, device: torch.device, changes: list[str]
) -> list[dict[str, Any]]:
    """Run `python -m pretrain` and return its records."""
    environment = dict(os.environ) | ({"DS_ACCELERATOR": "cpu"} if device.type == "cpu" else {})
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(variable, None)
    command = [sys.executable, "-m", "pretrain", "--config", name, f"data.shards={shards}"]
    done = subprocess.run(
        [*command, f"run.out={out}", *changes], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return read_json_lines(out / "metrics.jsonl")


def time_to_loss(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return tokens and seconds until the recommended recipe has the published one's loss."""
    if not arguments.shards:
        return {"skipped": "no --shards of real cells"}
    with tempfile.TemporaryDirectory() as work:
        records = _pretrain(
            "geneloom_10m", arguments.shards, Path(work) / "run", device,
            ["run.epochs=1", "evaluation.every_steps=20", "optim.warmup_steps=10",
             "run.max_steps=200", "run.log_every_steps=20"],
        )  # fmt: skip
    began = records[0]["time"]
    reached = [m for m in records if m["kind"] == "heldout" and m["loss"] <= _PUBLISHED_LOSS]
    if not reached:
        return {"skipped": f"a loss of {_PUBLISHED_LOSS} was not reached in 200 steps"}
    return {"step": reached[0]["step"], "seconds": reached[0]["time"] - began,
            "loss": reached[0]["loss"]}  # fmt: skip


def parts(
    arguments: argparse.Namespace, device: torch.device
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield (name, work) of all parts, those of most interest first."""
    yield "correctness", lambda: correctness(arguments, device)
    yield "logits", lambda: logits(arguments, device)
    models = ["geneformer_v1_6l", "geneloom_10m"] if arguments.smoke else list(_MODELS)
    for name in models:
        for is_packed, compiled in ((True, False), (True, True), (False, False), (False, True)):
            if arguments.smoke and compiled:
                continue  # needs a compiler in C++, and a minute
            case = Case(name, is_packed, compiled)
            how = f"{'packed' if is_packed else 'rows'}, {'compiled' if compiled else 'as written'}"
            yield f"training {name}, {how}", lambda c=case: training(c, arguments, device)
        if name == "geneformer_v1_6l":
            yield "embed and perturb", lambda: embed_and_perturb(arguments, device)
    for name in models[:1] if arguments.smoke else ("geneformer_v1_6l", "geneloom_10m"):
        yield f"run {name}", lambda n=name: run(n, arguments, device)
    yield "time to the published loss", lambda: time_to_loss(arguments, device)


def measured(
    arguments: argparse.Namespace, device: torch.device, found: dict[str, Any]
) -> dict[str, Any]:
    """Do the parts that are missing, until the budget is spent; keep each as it comes."""
    started = time.perf_counter()
    for name, work in parts(arguments, device):
        if name in found["parts"]:
            continue
        if time.perf_counter() - started > arguments.budget_s:
            print(f"{arguments.budget_s:g} s are over; the same command goes on with {name!r}")
            break
        began = time.perf_counter()
        try:
            row = work()
        except torch.OutOfMemoryError:
            row = {"skipped": "does not fit into memory"}
        except ImportError as error:
            row = {"skipped": str(error)}
        found["parts"][name] = row | {"took_s": time.perf_counter() - began}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps({name: row}), flush=True)
        if device.type == "cuda":
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    return found


def table(found: dict[str, Any]) -> str:
    """Return the rows of training as a table for the documents."""
    lines = [
        "| model | cells | layers | real tokens/s | MFU | peak GiB, planned | first step, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found["parts"].items():
        if not name.startswith("training ") or "skipped" in row:
            continue
        model, cells, layers = name.removeprefix("training ").split(", ")
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(
            f"| `{model}` | {cells} | {layers} | {row['real_tokens_per_s']:,.0f} | {mfu} "
            f"| {row['memory_gib']:.2f}, {row['planned_gib']:.2f} | {row['first_step_s']:.1f} |"
        )
    return "\n".join(lines)


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
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
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


def main(words: list[str] | None = None) -> None:
    """Measure what is missing in the file, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON; what it has is not redone")
    parser.add_argument("--smoke", action="store_true", help="toy size, on the CPU")
    parser.add_argument("--budget-s", type=float, default=540.0, help="of this command")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each row")
    parser.add_argument("--shards", type=Path, help="of real cells, for the time to a loss")
    parser.add_argument("--no-deepspeed", action="store_true")
    arguments = parser.parse_args(words)
    device = torch.device("cpu" if arguments.smoke else "cuda")
    if arguments.smoke:
        arguments.seconds = 0.0
        os.environ["DS_ACCELERATOR"] = "cpu"
    arguments.deepspeed = installed("deepspeed") is not None and not arguments.no_deepspeed
    if arguments.deepspeed:
        from pretrain.ranks import dist

        dist.start(600, None)
    found = machine(device) | {"step": "deepspeed" if arguments.deepspeed else "torch", "parts": {}}
    if arguments.out.exists():
        before = json.loads(arguments.out.read_text())
        if before["device"] != found["device"]:
            raise SystemExit(f"{arguments.out}: was measured on {before['device']}; give another")
        found["parts"] = before["parts"]
    print(table(measured(arguments, device, found)))


if __name__ == "__main__":
    main()
