"""``geneloom pretrain`` and ``geneloom export``: parse and call."""

from __future__ import annotations

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from data_prep.errors import EXIT_RESUMABLE, run_app
from data_prep.options import spread
from pretrain.api import export, train_as_rank, use_cpu_where_no_gpu
from pretrain.config import RunConfig, load_config, settings_to_resume_from
from pretrain.options import CorpusOptions, SpeedOptions, StartOptions, StepOption
from pretrain.settings.model_settings import ModelConfig

ConfigOption = Annotated[str, typer.Option(help="YAML file, or the name of a supplied one")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.field=value")]


@spread
def pretrain_command(
    config: ConfigOption,
    start: StartOptions,
    overrides: Overrides = None,
    resume_from: Annotated[
        Path | None,
        typer.Option(
            help="begin with weights, moments and step count of a DeepSpeed checkpoint; short for "
            "model.init_from=DIR model.init_moments=true"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="print the resolved settings and stop")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, of --dry-run")] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """Pretrain a masked encoder on prepared shards, alone or under a launcher."""
    settings = load_config(config, [*(overrides or []), *settings_to_resume_from(resume_from)])
    if as_json and not dry_run:
        raise ValueError("--json: belongs to --dry-run; a run writes metrics.jsonl")
    if dry_run:
        found = resolved(settings, start.resume or start.restart)
        if as_json:
            print(json.dumps(found, indent=1))
        else:
            print_resolved(found)
        return
    _log_to_console()
    if train_as_rank(settings, start).stopped:
        raise SystemExit(EXIT_RESUMABLE)


def resolved(config: RunConfig, resume: bool = False) -> dict[str, Any]:
    """Return what a run would do, as values of JSON: settings, derived numbers, where it starts.

    `resume`: its weights are a checkpoint's, whatever ``model.init_from`` says.
    """
    from data_prep.shards.order import EpochPlan
    from data_prep.shards.reader import ShardSet
    from pretrain.counting.arithmetic import require_medians
    from pretrain.ds_config import derive_ds_config, zero_stage
    from pretrain.model.counted_start import require_countable
    from pretrain.model.masked_gene_model import build_model
    from pretrain.optim import require_reachable_peak
    from pretrain.start.continued import foreign_checkpoint
    from pretrain.start.warm_start import describe, start_weights

    ds_config = derive_ds_config(config)
    shards = ShardSet(config.data.shards, config.data.cache, share=config.data.share)
    budget, subset = config.batch.tokens_per_step, config.masking.subset
    plan = EpochPlan(shards, "train", config.run.seed, budget, subset)
    steps = config.run.total_steps(plan.steps_per_epoch)
    require_reachable_peak(config.optim, steps)
    if config.objective.prior != "none":
        require_medians(shards)
    model = build_model(config.model, shards.vocabulary, config.run.seed)
    weights = "weights of the newest checkpoint" if resume else "random weights"
    if config.model.init_genes == "counted" and not resume:
        require_countable(config.model, shards.vocabulary)
        weights = f"random weights, genes from what is counted: {', '.join(config.model.counted)}"
    if config.model.init_from and not resume:
        prior = config.objective.prior
        if config.model.init_moments:
            weights = describe(foreign_checkpoint(config, shards, steps).record["init"])
        else:
            weights = describe(start_weights(model, shards.vocabulary, config.model, prior))
    given = config.model_dump(mode="json")
    settings = {
        f"{section}.{key}": {
            "value": given[section][key],
            "default": "required" if field.is_required() else default,
            "changed": getattr(values, key) != default,
        }
        for section, values in config
        for key, field in type(values).model_fields.items()
        for default in [_default(values, key)]
    }
    return {
        "settings": settings,
        "parameters": sum(p.numel() for p in model.parameters()),
        "zero_stage": zero_stage(ds_config),
        "steps_per_epoch": plan.steps_per_epoch,
        "steps": steps,
        "cells_per_step_by_bucket": {b.extent.length: b.cells_per_step for b in plan.buckets},
        "weights": weights,
    }


def _default(section: Any, name: str) -> Any:
    """Return what a setting is where it is not given, in a model of this architecture."""
    if isinstance(section, ModelConfig):
        return section.default_of(name, section.architecture)
    return type(section).model_fields[name].get_default()


def print_resolved(found: dict[str, Any]) -> None:
    """Print what `resolved` returned: settings off their default first, then derived numbers."""
    console = Console()
    table = Table(title="settings (changed ones first)", title_justify="left")
    for name in ("setting", "value", "default"):
        table.add_column(name)
    for name, entry in sorted(found["settings"].items(), key=lambda item: not item[1]["changed"]):
        style = "" if entry["changed"] else "dim"
        table.add_row(name, str(entry["value"]), str(entry["default"]), style=style)
    console.print(table)
    by_bucket = found["cells_per_step_by_bucket"].items()
    sizes = ", ".join(f"{cells} of {length}" for length, cells in by_bucket)
    console.print(
        f"parameters {found['parameters']:,}; ZeRO stage {found['zero_stage']}; "
        f"{found['steps_per_epoch']:,} steps per epoch, {found['steps']:,} in all\n"
        f"cells per step by bucket: {sizes}",
        highlight=False,
    )
    console.print(found["weights"], highlight=False, markup=False, soft_wrap=True)


@spread
def plan_command(
    config: ConfigOption,
    corpus: CorpusOptions,
    speed: SpeedOptions,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs in all")] = 1,
    gpu: Annotated[
        str, typer.Option(help="a100, a100-40, l40s, h100, h200, b200; cpu: cores")
    ] = "h100",
    shards: Annotated[
        Path | None, typer.Option(help="short for data.shards=; else a corpus is assumed")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Memory, steps, hours, traffic and cost of a pretraining, before it is started."""
    from pretrain.plan import corpus as plan_corpus
    from pretrain.plan import needs as plan
    from pretrain.plan.flops import GPUS

    given = list(overrides or [])
    settings = plan_corpus.read_config(
        config, [*given, f"data.shards={shards}"] if shards else given
    )
    if gpu not in GPUS:
        raise ValueError(f"--gpu {gpu}: known are {', '.join(GPUS)}")
    assumed = plan_corpus.assumed_corpus(config, corpus)
    cells, max_length = plan_corpus.read_corpus(
        settings, assumed.cells, assumed.mean_tokens, assumed.max_tokens, assumed.vocabulary_size
    )
    found = plan.make_plan(
        settings, cells, max_length, GPUS[gpu], gpus, speed,
        None if plan_corpus.has_shards(settings) else assumed,
    )  # fmt: skip
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        plan.print_plan(found, Console())


@spread
def export_command(
    run: Annotated[Path, typer.Argument(help="run folder of `geneloom pretrain`")],
    out: Annotated[Path, typer.Option(help="new or empty folder")],
    shards: Annotated[
        Path | None, typer.Option(help="of the pretraining; default: where the run read them")
    ] = None,
    cell_state_cells: Annotated[
        int | None,
        typer.Option(min=0, help="training cells encoded for states of cells [256]; 0: none"),
    ] = None,
    step: StepOption = None,
    to: Annotated[str, typer.Option(help="huggingface (a model), or deepspeed (training)")] = (
        "huggingface"
    ),
    zero: Annotated[
        int | None, typer.Option(help="of --to deepspeed: stage 1, 2 or 3; default: the run's")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="of --to deepspeed; default: as many as saved it")
    ] = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder, or as DeepSpeed's own engine would save it."""
    if to not in ("huggingface", "deepspeed"):
        raise ValueError(f"--to {to}: must be huggingface or deepspeed")
    if to == "huggingface" and (zero or ranks):
        raise ValueError("--zero, --ranks: belong to --to deepspeed")
    if to == "huggingface":
        print(export(run, out, step, shards, cell_state_cells))
    else:
        from pretrain.export.to_deepspeed import export_deepspeed

        use_cpu_where_no_gpu()
        print(export_deepspeed(run, out, step, zero, ranks))


def _log_to_console() -> None:
    """Rank 0 speaks on the console; the other ranks only to warn."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    # DeepSpeed calls a function that torch has renamed; nothing for the user to do.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    for package in ("pretrain", "data_prep"):
        logging.getLogger(package).setLevel(level)


def main() -> None:
    """Run ``pretrain`` as a program of its own, for launchers."""
    app = typer.Typer(add_completion=False)
    app.command()(pretrain_command)
    run_app(app)
