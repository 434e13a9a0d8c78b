"""The options of the command line that say how cells are read, the same for all commands."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from data_prep.sources.corpus_list import organism_name
from data_prep.sources.source_spec import SourceOptions

_COUNTS = Annotated[str, typer.Option(help="X, raw, or layers/NAME")]
_GENES = Annotated[
    str | None,
    typer.Option(help="column of var with gene ids; 'index' [ensembl_id, else the index]"),
]
_STRIP = Annotated[bool, typer.Option(help="cut .5 from ENSG00000141510.5 in every id")]
_OBS = Annotated[
    list[str] | None, typer.Option(help="column of obs to carry along; NAME=COLUMN renames it")
]
_TOTAL = Annotated[
    str | None, typer.Option(help="column of obs with total counts [sum over the file]")
]
_ORGANISM = Annotated[str | None, typer.Option(help="species that the gene ids must be of")]
_DATASET = Annotated[
    str | None, typer.Option(help="column of obs that names the data set [the file is one]")
]
_FILTER = Annotated[
    str | None, typer.Option(help="query over obs: only cells for which it is true are read")
]
_GENOME = Annotated[
    str | None, typer.Option(help="of files with features of several genomes, such as GRCh38")
]
_FRACTIONAL = Annotated[
    Literal["round", "keep"] | None,
    typer.Option(help="take fractional counts (RSEM, SoupX): rounded, or ranked as they are"),
]
_FORCE = Annotated[
    bool, typer.Option(help="take integers that do not look like counts: binarised, rounded CPM")
]
# Option -> (field of SourceOptions, its kind, its default).
_OPTIONS: dict[str, tuple[str, Any, Any]] = {
    "counts": ("counts", _COUNTS, "X"),
    "gene_column": ("gene_column", _GENES, None),
    "strip_gene_versions": ("strip_versions", _STRIP, False),
    "obs": ("columns", _OBS, None),
    "total_column": ("total_column", _TOTAL, None),
    "organism": ("organism", _ORGANISM, None),
    "dataset_column": ("dataset_column", _DATASET, None),
    "obs_filter": ("obs_filter", _FILTER, None),
    "genome": ("genome", _GENOME, None),
    "fractional": ("fractional", _FRACTIONAL, None),
    "force_counts": ("force_counts", _FORCE, False),
}
ALL = tuple(_OPTIONS)
# What says how counts and genes are read, and nothing of which cells or columns of obs.
MATRIX = ("counts", "gene_column", "strip_gene_versions", "genome", "fractional", "force_counts")


def reading_options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator: a command's parameter `reading` becomes the options of these names."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        # Typer reads a signature; that of the function has one parameter for all of them.
        own = inspect.signature(function, eval_str=True)
        options = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=_OPTIONS[name][2],
                annotation=_OPTIONS[name][1],
            )
            for name in names
        ]  # fmt: skip
        parameters: list[inspect.Parameter] = []
        for parameter in own.parameters.values():
            keyword = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            parameters += options if parameter.name == "reading" else [keyword]

        @functools.wraps(function)
        def command(**given: Any) -> Any:
            values = {_OPTIONS[name][0]: given.pop(name) for name in names}
            return function(**given, reading=source_options(**values))

        signature = own.replace(parameters=parameters)
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        del command.__wrapped__  # type: ignore[attr-defined]
        return command

    return decorate


def source_options(**values: Any) -> SourceOptions:
    """Return the options of sources as a command line gives them."""
    if "columns" in values:
        values["columns"] = tuple(values["columns"] or ())
    if values.get("organism"):
        values["organism"] = organism_name(values["organism"])
    return SourceOptions(**values)
