"""``geneloom prepare`` and ``geneloom inspect``: parse and call."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from data_prep.prepare import PrepareOptions, prepare
from data_prep.shards import MANIFEST_NAME, ShardSet
from data_prep.sources import SourceOptions
from data_prep.tables import print_manifest
from data_prep.vocab import open_vocabulary


def prepare_command(
    sources: Annotated[
        list[str], typer.Argument(help="h5ad, parquet, Hugging Face folders; globs are expanded")
    ],
    out: Annotated[Path, typer.Option(help="new or empty folder for the shards")],
    vocab: Annotated[
        str,
        typer.Option(
            help="vocabulary.json, Geneformer's token dictionary (json, pkl) or its folder; or "
            "'build' to make one from the sources"
        ),
    ],
    medians: Annotated[Path | None, typer.Option(help="median dictionary (json, pkl)")] = None,
    gene_mapping: Annotated[
        Path | None, typer.Option(help="other id or symbol -> gene id (json, pkl)")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens; default 2048, V2 4096")] = None,
    counts: Annotated[str, typer.Option(help="X, raw, or layers/NAME")] = "X",
    gene_column: Annotated[
        str | None, typer.Option(help="column of var with gene ids [ensembl_id, else the index]")
    ] = None,
    strip_gene_versions: Annotated[
        bool, typer.Option(help="cut .5 from ENSG00000141510.5")
    ] = False,
    obs: Annotated[list[str] | None, typer.Option(help="column of obs to carry along")] = None,
    total_column: Annotated[
        str | None, typer.Option(help="column of obs with total counts [sum over the file]")
    ] = None,
    min_genes: Annotated[int, typer.Option(help="fewest vocabulary genes of a cell")] = 7,
    min_overlap: Annotated[float, typer.Option(help="smallest share of known genes")] = 0.1,
    min_cells: Annotated[int, typer.Option(help="fewest cells of a gene, --vocab build")] = 3,
    heldout: Annotated[float, typer.Option(help="share of cells held out")] = 0.02,
    heldout_by: Annotated[str, typer.Option(help="cell, dataset, or an --obs column")] = "cell",
    block_cells: Annotated[int, typer.Option(help="cells of one tar member")] = 256,
    shard_mib: Annotated[int, typer.Option(help="size of one tar")] = 256,
    memory: Annotated[float, typer.Option(help="GiB held while shuffling")] = 2.0,
    seed: Annotated[int, typer.Option(help="of the shuffle and the split")] = 0,
) -> None:
    """Cells -> ranked gene tokens -> length buckets -> webdataset tars with a manifest."""
    options = PrepareOptions(
        seed=seed,
        min_genes=min_genes,
        min_overlap=min_overlap,
        heldout_share=heldout,
        heldout_by=heldout_by,
        block_cells=block_cells,
        shard_mib=shard_mib,
        memory_gib=memory,
        vocabulary_min_cells=min_cells,
        max_length=max_length,
        source=SourceOptions(
            counts, gene_column, tuple(obs or ()), total_column, strip_gene_versions
        ),
    )
    if vocab == "build":
        if medians or gene_mapping:
            raise ValueError("--vocab build: computes medians itself; leave out --medians, mapping")
        vocabulary = None
    else:
        vocabulary = open_vocabulary(Path(vocab), medians, gene_mapping, max_length)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading")

        def show(kept: int) -> None:
            bar.update(task, description=f"{kept:,} cells kept")

        manifest = prepare(expand_sources(sources), out, vocabulary, options, show)
    print_manifest(manifest, str(out))


def expand_sources(patterns: list[str]) -> list[Path]:
    """Return the paths of patterns, in order; a pattern that matches nothing is an error."""
    paths: list[Path] = []
    for pattern in patterns:
        if any(c in pattern for c in "*?["):
            found = sorted(glob.glob(pattern))  # noqa: PTH207  Path.glob refuses absolute patterns
            if not found:
                raise ValueError(f"{pattern}: matches no file")
            paths.extend(Path(p) for p in found)
        else:
            paths.append(Path(pattern))
    return paths


def inspect_command(
    folder: Annotated[Path, typer.Argument(help="output of `geneloom prepare`")],
    as_json: Annotated[bool, typer.Option("--json", help="print the manifest")] = False,
) -> None:
    """Print what a shard folder holds."""
    manifest = ShardSet(folder).manifest
    if as_json:
        print(json.dumps(manifest, indent=1))
    else:
        print_manifest(manifest, str(folder / MANIFEST_NAME))
