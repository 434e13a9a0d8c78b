"""``geneloom prepare | check | medians | inspect | verify``: parse and call."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.genes.vocabulary import Vocabulary, open_vocabulary
from data_prep.inspection.tables import print_check, print_manifest, print_problems
from data_prep.prepare.check import check_sources
from data_prep.prepare.medians import (
    RELATIVE_ERROR,
    GeneMedians,
    MedianSketch,
    gene_medians,
)
from data_prep.prepare.run import prepare
from data_prep.prepare.verify_and_repair import repair, verify
from data_prep.prepare.work_list import PrepareOptions
from data_prep.running.progress import show_progress
from data_prep.running.workers import mpi_size, open_workers
from data_prep.shards.format import MANIFEST_NAME
from data_prep.shards.reader import ShardSet
from data_prep.sources.corpus_list import expand_corpus
from data_prep.sources.reading_options import ALL, MATRIX, reading_options
from data_prep.sources.source_spec import SourceOptions

Sources = Annotated[
    list[str],
    typer.Argument(
        help="h5ad, loom, zarr, 10x .h5 and mtx folders, parquet, Hugging Face folders, "
        "hf:NAME, census:VERSION; globs, folders of files, and YAML corpus lists are expanded"
    ),
]
_VOCABULARIES = "vocabulary.json, Geneformer's token dictionary (json, pkl) or its folder"
Vocab = Annotated[str, typer.Option(help=_VOCABULARIES)]
VocabOrBuild = Annotated[
    str, typer.Option(help=f"{_VOCABULARIES}; or 'build' to make one from the sources")
]
Medians = Annotated[Path | None, typer.Option(help="median dictionary (json, pkl)")]
Mapping = Annotated[
    list[Path] | None,
    typer.Option(help="other id or symbol -> gene id (json, pkl); adds to those of --vocab"),
]
MaxLength = Annotated[int | None, typer.Option(help="tokens; default 2048, V2 4096")]
Table = Annotated[
    Path | None, typer.Option(help="table of genes with biotypes (csv, tsv, parquet)")
]
MinGenes = Annotated[int, typer.Option(help="fewest vocabulary genes of a cell")]
SdCounts = Annotated[
    float, typer.Option(help="largest distance of a cell's counts from the mean, in SD; 0: any")
]
SdMito = Annotated[float, typer.Option(help="the same for the mitochondrial share; 0: any")]
Dedup = Annotated[bool, typer.Option(help="reject cells that stood before, gene for gene")]
MinOverlap = Annotated[float, typer.Option(help="smallest share of counts in known genes")]
MinCells = Annotated[int, typer.Option(help="fewest cells of a gene in a built vocabulary")]
Heldout = Annotated[float, typer.Option(help="share of cells held out")]
HeldoutBy = Annotated[str, typer.Option(help="cell, dataset, or an --obs column")]
Memory = Annotated[
    float,
    typer.Option(help="GiB of cells that each process may hold, beside 0.5 for the program itself"),
]
Processes = Annotated[
    int, typer.Option(help="processes on this machine; or start with mpirun -n N")
]

AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]


def _vocabulary(
    vocab: str, medians: Path | None, gene_mapping: list[Path] | None, max_length: int | None
) -> Vocabulary | None:
    if vocab != "build":
        return open_vocabulary(Path(vocab), medians, gene_mapping, max_length)
    if medians or gene_mapping:
        raise ValueError("--vocab build: computes medians itself; leave out --medians, mapping")
    return None


@reading_options(*ALL)
def prepare_command(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="folder for the shards; a killed run continues there")],
    vocab: VocabOrBuild,
    medians: Medians = None,
    gene_mapping: Mapping = None,
    max_length: MaxLength = None,
    *,
    reading: SourceOptions,
    annotation: Table = None,
    min_genes: MinGenes = 7,
    max_sd_counts: SdCounts = 3.0,
    max_sd_mito: SdMito = 3.0,
    dedup: Dedup = False,
    min_overlap: MinOverlap = 0.5,
    min_cells: MinCells = 3,
    heldout: Heldout = 0.02,
    heldout_by: HeldoutBy = "cell",
    block_cells: Annotated[int, typer.Option(help="cells of one tar member")] = 256,
    shard_mib: Annotated[float, typer.Option(help="mean size of a tar")] = 64,
    memory: Memory = 2.0,
    processes: Processes = 1,
    seed: Annotated[int, typer.Option(help="of the shuffle and the split")] = 0,
    as_json: AsJson = False,
) -> None:
    """Cells -> ranked gene tokens -> length buckets -> webdataset tars with a manifest."""
    options = PrepareOptions(
        seed=seed,
        min_genes=min_genes,
        max_sd_counts=max_sd_counts,
        max_sd_mito=max_sd_mito,
        dedup=dedup,
        min_overlap=min_overlap,
        heldout_share=heldout,
        heldout_by=heldout_by,
        block_cells=block_cells,
        shard_mib=shard_mib,
        memory_gib=memory,
        vocabulary_min_cells=min_cells,
        max_length=max_length,
        annotation=annotation,
    )
    with open_workers(processes) as workers:
        if workers is None:
            return
        vocabulary = _vocabulary(vocab, medians, gene_mapping, max_length)
        with show_progress() as progress:
            specs = expand_corpus(sources, reading)
            manifest = prepare(specs, out, vocabulary, options, workers, progress)
    if as_json:
        _print_json(manifest)
    else:
        print_manifest(manifest, str(out))


@reading_options(*ALL)
def check_command(
    sources: Sources,
    vocab: Vocab,
    medians: Medians = None,
    gene_mapping: Mapping = None,
    max_length: MaxLength = None,
    *,
    reading: SourceOptions,
    annotation: Table = None,
    min_genes: MinGenes = 7,
    max_sd_counts: SdCounts = 3.0,
    max_sd_mito: SdMito = 3.0,
    dedup: Dedup = False,
    min_overlap: MinOverlap = 0.5,
    heldout: Heldout = 0.02,
    heldout_by: HeldoutBy = "cell",
    memory: Memory = 2.0,
    work_in: Annotated[
        Path | None, typer.Option("--work", help="folder for temporary files [the system's]")
    ] = None,
    processes: Processes = 1,
    as_json: AsJson = False,
) -> None:
    """Read the sources as `prepare` would, and print what would happen. Exit code 2 on problems."""
    options = PrepareOptions(
        min_genes=min_genes,
        max_sd_counts=max_sd_counts,
        max_sd_mito=max_sd_mito,
        dedup=dedup,
        min_overlap=min_overlap,
        heldout_share=heldout,
        heldout_by=heldout_by,
        memory_gib=memory,
        annotation=annotation,
    )
    with open_workers(processes) as workers:
        if workers is None:
            return
        if work_in is None and mpi_size() > 1:
            raise ValueError("--work: under mpirun give a folder that all nodes share")
        if vocab == "build":
            raise ValueError("--vocab build: give `geneloom medians` the sources first, or a file")
        vocabulary = open_vocabulary(Path(vocab), medians, gene_mapping, max_length)
        with (
            show_progress() as progress,
            tempfile.TemporaryDirectory(prefix="geneloom-", dir=work_in) as work,
        ):
            specs = expand_corpus(sources, reading)
            result = check_sources(specs, Path(work), vocabulary, options, workers, progress)
    if as_json:
        _print_json(asdict(result))
    else:
        print_check(result)
    if result.problems:
        raise typer.Exit(2)


@reading_options(*MATRIX, "total_column", "obs_filter")
def medians_command(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="count matrices, as for prepare; or *.sketch.parquet of earlier calls, to merge"
        ),
    ],
    out: Annotated[Path, typer.Option(help="vocabulary to write (.json)")],
    min_cells: MinCells = 3,
    with_cls: Annotated[
        bool, typer.Option(help="<cls> and <eos> around each cell, as Geneformer V2")
    ] = False,
    max_length: MaxLength = None,
    *,
    reading: SourceOptions,
    gene_mapping: Mapping = None,
    annotation: Table = None,
    memory: Memory = 2.0,
    processes: Processes = 1,
) -> None:
    """Non-zero median of counts / total x 10,000 per gene -> a vocabulary."""
    if out.suffix != ".json":
        raise ValueError(f"--out {out}: must end in .json")
    sketch_path = out.with_suffix(".sketch.parquet")
    table_path = out.with_suffix(".genes.tsv")
    for path in (out, sketch_path, table_path):
        if path.exists():
            raise ValueError(f"{path}: exists; give --out a new name")
    with open_workers(processes) as workers:
        if workers is None:
            return
        earlier = [s for s in sources if s.endswith(".sketch.parquet")]
        rest = [s for s in sources if s not in earlier]
        if len(set(earlier)) < len(earlier):
            raise ValueError("a sketch is given more than once: its cells would count twice")
        if earlier and not rest and (annotation or gene_mapping):
            raise ValueError(
                "--annotation, --gene-mapping: belong to the call that made the sketch"
            )
        found: GeneMedians | None = None
        out.parent.mkdir(parents=True, exist_ok=True)
        with (
            show_progress() as progress,
            # Beside the result: all nodes see that, and row-wise copies may be large.
            tempfile.TemporaryDirectory(prefix=".geneloom-", dir=out.parent) as work,
        ):
            if rest:
                found = gene_medians(
                    expand_corpus(rest, reading), Path(work), workers, progress, annotation,
                    gene_mapping, memory,
                )  # fmt: skip
            for path in earlier:
                sketch = MedianSketch.load(Path(path))
                sketch = found.sketch.merge(sketch) if found else sketch
                found = GeneMedians(sketch, sketch.medians(), RELATIVE_ERROR)
    assert found is not None
    vocabulary = found.vocabulary(min_cells, max_length, with_cls)
    found.sketch.save(sketch_path)
    found.save_table(table_path)
    vocabulary.save(out)
    error = f"within {found.relative_error:.2%}" if found.relative_error else "exact"
    print(
        f"{len(found.sketch.genes):,} genes seen, {len(vocabulary.genes):,} in at least "
        f"{min_cells} cells; medians {error}\n{out}: hash {vocabulary.sha256[:12]}; "
        f"{sketch_path.name} for merging, {out.with_suffix('.genes.tsv').name} to read"
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
    annotation: Table = None,
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
