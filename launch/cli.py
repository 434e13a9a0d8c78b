"""The ``geneloom`` command: a table of verbs; each imports its folder when it is called."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from data_prep.errors import EXIT_USAGE, run_app
from data_prep.version import VERSION

# verb -> (module, function or typer application, what it makes of what)
VERBS = {
    "prepare": ("data_prep.cli", "prepare_command", "cells -> shards"),
    "check": ("data_prep.cli", "check_command", "what prepare would do with these cells"),
    "medians": ("data_prep.cli", "medians_command", "cells -> vocabulary with medians"),
    "inspect": ("data_prep.cli", "inspect_command", "show what a shard folder holds"),
    "convert": ("data_prep.cli", "convert_command", "shards -> Hugging Face dataset or parquet"),
    "verify": ("data_prep.cli", "verify_command", "check every byte of a shard folder; repair"),
    "pretrain": ("pretrain.cli", "pretrain_command", "shards -> checkpoints"),
    "plan": ("pretrain.cli", "plan_command", "memory, hours and cost of a run, before it starts"),
    "launch": (
        "launch.ways.commands",
        "app",
        "pretrain, prepare, finetune, perturb on several ranks",
    ),
    "runs": ("launch.runs", "runs_command", "what lies in a folder, and how far it is"),
    "stop": ("launch.stop", "stop_command", "end a run, and what is left of it, on all its hosts"),
    "doctor": ("launch.doctor", "doctor_command", "can these hosts train together, and how fast"),
    "saturate": ("eval.saturate.cli", "saturate_command", "does more data pay? growing shares"),
    "export": ("pretrain.cli", "export_command", "checkpoint -> Hugging Face folder"),
    "embed": ("eval.cli", "embed_command", "cells -> embeddings in an h5ad"),
    "probe": ("eval.probe.cli", "probe_command", "frozen cells beside what counting knows"),
    "finetune": ("eval.cli", "finetune_app", "fine-tune and score beside baselines"),
    "benchmark": (
        "eval.benchmark.cli",
        "benchmark_command",
        "did pretraining help? tasks, baselines",
    ),
    "simulate": ("eval.simulate.cli", "simulate_command", "cells with a known gene network"),
    "perturb": ("eval.perturb.cli", "perturb_command", "delete or activate genes in silico"),
    "predict": ("eval.cli", "predict_command", "a trained head's classes in an h5ad"),
    "attention": ("eval.cli", "attention_command", "who attends to whom, over all cells"),
    "perturb-report": (
        "eval.perturb.report.cli",
        "perturb_report_command",
        "a screen's effects by donors, beside matched genes",
    ),
    "report": ("eval.cli", "report_command", "one HTML page about any folder made here"),
}


def build_app(verb: str | None) -> typer.Typer:
    """Return the command line with one verb imported; the others are names with a line of help."""
    app = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(_general_options)
    for name, (module, attribute, summary) in VERBS.items():
        if name != verb:
            app.command(name, help=summary)(_not_imported)
            continue
        target = getattr(importlib.import_module(module), attribute)
        if isinstance(target, typer.Typer):
            for command in target.registered_commands:
                command.help = _help(command.callback)
            app.add_typer(target, name=name)
        else:
            app.command(name, help=_help(target))(target)
    return app


def _help(function: Callable[..., Any] | None) -> str:
    """Return a docstring as a terminal shows it: paragraphs of one line, single backticks."""
    text = (inspect.getdoc(function) or "").replace("``", "`")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _print_version(asked: bool) -> None:
    if asked:
        print(f"geneloom {VERSION}")
        raise typer.Exit()


def _general_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="print the version and end"
        ),
    ] = False,
) -> None:
    """Pretrain masked encoders on single cells, and see what they are good for."""


def _not_imported() -> None:
    raise AssertionError("only listed in --help")


def main() -> None:
    """Run ``geneloom <verb> ...``."""
    try:
        run_app(build_app(next((word for word in _words() if word in VERBS), None)))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if any(missing == module.partition(".")[0] for module, *_ in VERBS.values()):
            raise  # a part of this project
        print(
            f"error: the package {missing} is not installed. Commands of evaluation need more than "
            "preparing and pretraining: pip install 'geneloom[eval]'",
            file=sys.stderr,
        )
        sys.exit(EXIT_USAGE)


def _words() -> list[str]:
    """Return the words of the command line, or those that a shell wants completed."""
    if "_GENELOOM_COMPLETE" not in os.environ:
        return [a for a in sys.argv[1:] if not a.startswith("-")][:1]
    # Bash, and what typer tells of the other shells.
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
    return line.split()[1:2]
