"""``geneloom prepare | check | medians | inspect | verify``: parse and call."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.inspection.tables import (
    print_check,
    print_manifest,
    print_problems,
    print_remarks,
)
from data_prep.options import AsJson, GeneTable, Memory, Processes, spread
from data_prep.prepare.check import check_sources
from data_prep.prepare.medians import SKETCH, TABLE, medians_of
from data_prep.prepare.options import (
    OF_CHECK,
    MediansOptions,
    PrepareOptions,
    VocabularyFiles,
)
from data_prep.prepare.run import prepare
from data_prep.prepare.verify_and_repair import repair, verify
from data_prep.running.progress import show_progress
from data_prep.running.workers import mpi_size, open_workers
from data_prep.shards.format import MANIFEST_NAME
from data_prep.shards.reader import ShardSet
from data_prep.sources.corpus_list import expand_corpus
from data_prep.sources.source_spec import MATRIX, Only, SourceOptions

Sources = Annotated[
    list[str],
    typer.Argument(
        help="h5ad, loom, zarr, 10x .h5 and mtx folders, parquet, Hugging Face folders, "
        "hf:NAME, census:VERSION; globs, folders of files, and YAML corpus lists are expanded"
    ),
]


@spread
def prepare_command(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="folder for the shards; a killed run continues there")],
    vocabulary: VocabularyFiles,
    reading: SourceOptions,
    options: PrepareOptions,
    processes: Processes = 1,
    as_json: AsJson = False,
) -> None:
    """Cells -> ranked gene tokens -> length buckets -> webdataset tars with a manifest."""
    with open_workers(processes) as workers:
        if workers is None:
            return
        opened = vocabulary.open(options.max_length)
        with show_progress() as progress:
            specs = expand_corpus(sources, reading)
            manifest = prepare(specs, out, opened, options, workers, progress)
    if as_json:
        _print_json(manifest)
    else:
        print_manifest(manifest, str(out))


@spread
def check_command(
    sources: Sources,
    vocabulary: VocabularyFiles,
    reading: SourceOptions,
    options: Annotated[PrepareOptions, OF_CHECK],
    work_in: Annotated[
        Path | None, typer.Option("--work", help="folder for temporary files [the system's]")
    ] = None,
    processes: Processes = 1,
    as_json: AsJson = False,
) -> None:
    """Read the sources as `prepare` would, and print what would happen. Exit code 2 on problems."""
    with open_workers(processes) as workers:
        if workers is None:
            return
        if work_in is None and mpi_size() > 1:
            raise ValueError("--work: under mpirun give a folder that all nodes share")
        opened = vocabulary.open(options.max_length)
        if opened is None:
            raise ValueError("--vocab build: give `geneloom medians` the sources first, or a file")
        with (
            show_progress() as progress,
            tempfile.TemporaryDirectory(prefix="geneloom-", dir=work_in) as work,
        ):
            specs = expand_corpus(sources, reading)
            result = check_sources(specs, Path(work), opened, options, workers, progress)
    if as_json:
        _print_json(asdict(result))
    else:
        print_check(result)
    if result.problems:
        raise typer.Exit(2)


@spread
def medians_command(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="count matrices, as for prepare; or *.sketch.parquet of earlier calls, to merge"
        ),
    ],
    out: Annotated[Path, typer.Option(help="vocabulary to write (.json)")],
    options: MediansOptions,
    reading: Annotated[SourceOptions, Only(*MATRIX.names, "total_column", "obs_filter")],
    processes: Processes = 1,
) -> None:
    """Non-zero median of counts / total x 10,000 per gene -> a vocabulary."""
    with open_workers(processes) as workers:
        if workers is None:
            return
        with show_progress() as progress:
            found, vocabulary = medians_of(sources, out, options, reading, workers, progress)
    print_remarks(found.remarks, found.warnings)
    error = f"within {found.relative_error:.2%}" if found.relative_error else "exact"
    print(
        f"{len(found.sketch.genes):,} genes seen, {len(vocabulary.genes):,} in at least "
        f"{options.min_cells} cells; medians {error}\n{out}: hash {vocabulary.sha256[:12]}; "
        f"{out.with_suffix(SKETCH).name} for merging, {out.with_suffix(TABLE).name} to read"
    )


def inspect_command(
    folder: Annotated[str, typer.Argument(help="output of `geneloom prepare`, or its URL")],
    as_json: AsJson = False,
    page: Annotated[Path | None, typer.Option(help="also draw a page: OUT.html or OUT.png")] = None,
    shuffle: Annotated[
        bool, typer.Option("--shuffle", help="measure the order of cells in training instead")
    ] = False,
    label: Annotated[str, typer.Option(help="column whose mixing --shuffle measures")] = "dataset",
    tokens_per_step: Annotated[
        int, typer.Option(help="padded tokens of a global batch, for --shuffle")
    ] = 163_840,
    seed: Annotated[int, typer.Option(help="of the order, for --shuffle")] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="folder for a local copy of what is read from a URL")
    ] = None,
) -> None:
    """Print what a shard folder holds; draw it or measure its order, if asked."""
    shards = ShardSet(folder, cache)
    if shuffle:
        from data_prep.inspection.order_quality import measure_shuffle, print_shuffle

        measured = measure_shuffle(shards, label, tokens_per_step, seed)
        if as_json:
            _print_json(measured)
        else:
            print_shuffle(measured)
        return
    if page:
        from data_prep.inspection.page import write_page  # draws, so imports what draws

        write_page(shards, page)
    if as_json:
        _print_json(shards.manifest)
    else:
        print_manifest(shards.manifest, f"{folder.rstrip('/')}/{MANIFEST_NAME}")


def convert_command(
    folder: Annotated[str, typer.Argument(help="output of `geneloom prepare`, or its URL")],
    out: Annotated[Path, typer.Option(help="new folder for load_from_disk, or FILE.parquet")],
    split: Annotated[str, typer.Option(help="train, heldout, or all (a DatasetDict)")] = "train",
    cache: Annotated[
        Path | None, typer.Option(help="folder for a local copy of what is read from a URL")
    ] = None,
) -> None:
    """Tokens as a Hugging Face dataset, which Geneformer's own pretrainer reads, or parquet."""
    from data_prep.shards.convert import LENGTHS_NAME, convert

    cells = convert(ShardSet(folder, cache), out, split)
    beside = "" if out.suffix == ".parquet" else f"; {LENGTHS_NAME} for Geneformer's pretrainer"
    print(f"{cells:,} cells of {split}: {out}{beside}")


def verify_command(
    folder: Annotated[Path, typer.Argument(help="output of `geneloom prepare`")],
    repair_from: Annotated[
        list[str] | None,
        typer.Option(
            "--repair",
            help="rebuild damaged shards from these sources; once for each, or a glob or list",
        ),
    ] = None,
    annotation: GeneTable = None,
    memory: Memory = 2.0,
    processes: Processes = 1,
    as_json: AsJson = False,
) -> None:
    """Check every byte, count and bound of a shard folder. Exit code 2 on damage."""
    with open_workers(processes) as workers:
        if workers is None:
            return
        with show_progress() as progress:
            problems = verify(folder, workers, progress)
            if problems and repair_from:
                if not as_json:
                    print_problems(problems)
                problems = repair(
                    folder, problems, repair_from, annotation, memory, workers, progress
                )
    if as_json:
        _print_json([asdict(problem) for problem in problems])
    else:
        print_problems(problems)
    if problems:
        raise typer.Exit(2)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))
