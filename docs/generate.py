"""Pages of the site that are written from the code: commands and settings."""

from __future__ import annotations

import inspect
import re
import types
from typing import Any, Literal, Union, cast, get_args, get_origin

import typer
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.core import TyperCommand, TyperGroup

from launch.cli import VERBS, build_app

# Recipe, cells, mean and largest tokens of a cell, vocabulary: what each was published with.
_RECIPES = (
    "geneformer_v1_6l", "geneformer_v1_12l", "geneformer_v2_104m", "geneformer_v2_316m",
    "geneloom_10m", "geneloom_100m",
)  # fmt: skip
_TYPES = {
    "str": "text",
    "Path": "path",
    "int": "integer",
    "float": "number",
    "bool": "true or false",
}
_BOUNDS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}


def command(verb: str) -> TyperCommand | TyperGroup:
    """Return a verb of the command line as typer sees it."""
    group = typer.main.get_command(build_app(verb))
    assert isinstance(group, TyperGroup)
    return cast(Any, group.commands[verb])


def commands_page() -> str:
    """Return the reference of all commands as Markdown."""
    parts = [
        "# Commands\n\nWritten from the code; `geneloom VERB --help` says the same. Exit codes: 0 "
        "done, 1 failed, 2 wrong usage or input, 75 stopped early on a signal and resumable.\n",
        "| command | |\n|---|---|",
    ]
    for verb, (_, _, summary) in VERBS.items():
        parts.append(f"| [`geneloom {verb}`](#geneloom-{verb}) | {_cell(summary)} |")
    parts.append("")
    for verb in VERBS:
        parts += _command_section(command(verb), f"geneloom {verb}", 2)
    return "\n".join(parts) + "\n"


def _command_section(found: Any, name: str, level: int) -> list[str]:
    lines = [f"{'#' * level} `{name}`\n", _text(found.help), ""]
    if isinstance(found, TyperGroup):
        for sub, inner in found.commands.items():
            lines += _command_section(inner, f"{name} {sub}", level + 1)
        return lines
    context = typer.Context(found, info_name=name, **found.context_settings)
    usage = " ".join([name, *found.collect_usage_pieces(context)])
    if context.ignore_unknown_options:
        usage += " ..."
    rows = [_parameter_row(p, context) for p in found.params if not p.hidden]
    lines += [f"```text\n{usage}\n```\n"]
    if rows:
        lines += ["| | | default |\n|---|---|---|", *rows, ""]
    return lines


def _parameter_row(parameter: Any, context: typer.Context) -> str:
    if parameter.param_type_name == "argument":
        shown = f"`{parameter.name}`"
    else:
        shown = ", ".join(f"`{n}`" for n in [*parameter.opts, *parameter.secondary_opts])
    if parameter.param_type_name == "argument" or not parameter.is_flag:
        shown += f" {parameter.display_type(context)[1:-1]}"
    default = parameter.default
    if parameter.required:
        said = "required"
    elif isinstance(default, bool):
        said = "on" if default else ""
    else:
        said = "" if default is None else f"`{default}`"
    return f"| {_cell(shown)} | {_cell(parameter.help or '')} | {said} |"


def configuration_page() -> str:
    """Return the reference of all settings as Markdown."""
    # Late: only this page needs what these need.
    from data_prep.sources.corpus_list import _CorpusList, _Entry
    from eval.benchmark import task_file as task
    from eval.simulate.settings import SimulationSettings
    from pretrain.config import RunConfig

    parts = [
        "# Settings\n\nWritten from the models that check them. Order: defaults < YAML file < "
        "command line. An unknown name is refused with the nearest known one.\n",
        "## A pretraining run\n\n`geneloom pretrain --config FILE section.field=value ...`; in the "
        "file, sections hold fields. `--dry-run` prints what follows from them.\n",
    ]
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        parts += [f"### `{name}`\n", _text(section.__doc__), "", *_table(section, f"{name}.")]
    parts += [
        "## A corpus list\n\nYAML that `geneloom prepare`, `check` and `medians` take as a source: "
        "[Preparing cells](data.md#sources).\n",
        *_table(_CorpusList, ""),
        "An entry of `sources`, and (but for `path` and `dataset`) `defaults`:\n",
        *_table(_Entry, ""),
        "## A simulation\n\n`geneloom simulate`, options and `--set NAME=VALUE`: "
        "[Simulated cells](simulator.md).\n",
        *_table(SimulationSettings, ""),
        "## A benchmark task\n\nOne YAML file: [a task of your own]"
        "(evaluation.md#a-task-of-your-own).\n",
    ]
    for kind in get_args(task.AnyTask):
        title = get_args(kind.model_fields["kind"].annotation)[0]
        parts += [f"### `kind: {title}`\n", _text(kind.__doc__), "", *_table(kind, "", {"kind"})]
    inner = (task.Cells, task.Size, task.GeneList, task.Edges, task.CellStates, task.Published)
    for model in inner:
        parts += [f"### {model.__name__}\n", _text(model.__doc__), "", *_table(model, "")]
    return "\n".join(parts) + "\n"


def plans_table() -> str:
    """Return what the supplied recipes need on one H100, as a table."""
    from pretrain.plan import corpus as plan_corpus
    from pretrain.plan import needs as plan
    from pretrain.plan.flops import GPUS

    lines = [
        "| recipe | parameters | GiB at ZeRO 1 | a checkpoint, GiB | tokens, billions | hours |",
        "|---|---|---|---|---|---|",
    ]
    gpu = GPUS["h100"]
    for name in _RECIPES:
        config = plan_corpus.read_config(name, ["run.precision=bf16"])
        assumed = plan_corpus.assumed_corpus(name)
        corpus, length = plan_corpus.read_corpus(
            config, assumed.cells, assumed.mean_tokens, assumed.max_tokens, assumed.vocabulary_size
        )
        made = plan.make_plan(config, corpus, length, gpu, 1)
        low, high = made["hours_interval"]
        memory = next(m["total"] for m in made["memory"] if m["stage"] == 1)
        lines.append(
            f"| `{name}` | {made['parameters'] / 1e6:,.1f} M | {memory / plan.GIB:,.1f} "
            f"| {made['checkpoint_bytes'] / plan.GIB:,.2f} | {made['tokens'] / 1e9:,.0f} "
            f"| {made['hours']:,.0f} ({low:,.0f} to {high:,.0f}) |"
        )
    return "\n".join(lines)


def roofline_table() -> str:
    """Return predicted speeds of the supplied recipes on one GPU, packed and compiled, by
    arithmetic alone."""
    from pretrain.plan import corpus as plan_corpus
    from pretrain.plan import needs as plan
    from pretrain.plan.flops import GPUS

    lines = [
        "| recipe | TFLOP, GB moved, launches of a step | A100 | H100 | H200 |",
        "|---|---|---|---|---|",
    ]
    for name in _RECIPES:
        config = plan_corpus.read_config(name, ["run.precision=bf16"])
        assumed = plan_corpus.assumed_corpus(name)
        corpus, length = plan_corpus.read_corpus(
            config, assumed.cells, assumed.mean_tokens, assumed.max_tokens, assumed.vocabulary_size
        )
        row, said = [], ""
        for gpu in ("a100", "h100", "h200"):
            found = plan.make_plan(config, corpus, length, GPUS[gpu], 1)["roofline"]["compiled"]
            work = found["flops_per_step"] / 1e12, found["bytes_per_step"] / 1e9
            said = f"{work[0]:,.1f}, {work[1]:,.0f}, {found['launches_per_step']:,}"
            rate = found["tokens_per_s"] / 1e6
            row.append(f"{rate:.2f} M, {found['mfu']:.0%} MFU; {found['limit']}")
        lines.append(f"| `{name}` | {said} | {' | '.join(row)} |")
    return "\n".join(lines)


def _table(model: type[BaseModel], prefix: str, without: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if name in without:
            continue
        lines.append(
            f"| `{prefix}{name}` | {_cell(_type(field.annotation) + _bounds(field.metadata))} "
            f"| {_default(field)} | {_cell(meaning(model, name))} |"
        )
    return [*lines, ""]


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or value is None or value in ((), {}, "", []):
        said = "-"
    else:
        said = "-" if isinstance(value, BaseModel) else f"`{value}`"
    # A default that is another one for another architecture.
    others = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return said + "".join(f"; {k}: `{v}`" for k, v in others.items())


def _type(annotation: Any) -> str:
    """Return a type in words: ``Literal["a", "b"] | None`` -> ``a, b``."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return " or ".join(_type(p) for p in parts if p is not type(None))
    if origin in (tuple, list):
        return f"list of {_type(parts[0])}"
    if origin is dict:
        return f"{_type(parts[0])} → {_type(parts[1])}"
    name = getattr(annotation, "__name__", str(annotation)).removeprefix("_")
    return _TYPES.get(name, name)


def _bounds(metadata: list[Any]) -> str:
    said = [
        f"{sign} {getattr(m, attribute)}"
        for m in metadata
        for kind, (attribute, sign) in _BOUNDS.items()
        if isinstance(m, kind)
    ]
    said += [f"at least {m.min_length}" for m in metadata if isinstance(m, MinLen)]
    return f" ({', '.join(said)})" if said else ""


def meaning(model: type[BaseModel], name: str) -> str:
    """Return what a setting is: its description, else the comment above it, else ''."""
    described = model.model_fields[name].description
    if described:
        return described
    for owner in model.__mro__:
        if name not in vars(owner).get("__annotations__", {}):
            continue
        lines = inspect.getsource(owner).splitlines()
        at = next(i for i, line in enumerate(lines) if re.match(rf"    {name}:", line))
        said: list[str] = []
        while at and (comment := re.match(r"    # (.*)", lines[at - 1])):
            said.insert(0, comment[1])
            at -= 1
        return " ".join(said)
    return ""


def _text(doc: str | None) -> str:
    """Return a docstring as paragraphs, double backticks as single ones."""
    return inspect.cleandoc(doc or "").replace("``", "`")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
