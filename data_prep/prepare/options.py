"""The settings of `prepare`, `check` and `medians`: what they are called, mean and default to."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from data_prep.encoding.chunk_files import INTERNAL
from data_prep.genes.vocabulary import Vocabulary, open_vocabulary
from data_prep.options import GeneMapping, GeneTable, MaxLength, Memory, MinCells, Only

RESERVED_COLUMNS = {"input_ids", "cell_id", "dataset", *INTERNAL}
BUILD = "build"


@dataclass(frozen=True)
class PrepareOptions:
    """Settings of ``geneloom prepare`` beyond the sources; the help of an option says what it is.

    Attributes
    ----------
    min_genes
        7: the paper's filter, so that 15 % masking hides at least one gene (Geneformer, Nature
        2023, Methods).
    max_sd_counts, max_sd_mito
        In standard deviations from the mean of a cell's data set. 3: the paper's.
    heldout_share
        Whole groups are taken until it is reached.
    heldout_by
        The values of a column are never split up.
    block_cells
        256: 333,000 cells/s read on one core and 2,230 B a cell at 1,107 tokens, against 12,700
        cells/s and 3,970 B at one cell a member (measured).
    memory_gib
        Bound of what each process holds at a time while the tars are written.
    annotation
        For ``--vocab build``, and for mitochondrial genes.
    same_side
        Cells that stand more than once are held out together or not at all; False only to make
        anew what was made before this was so.
    """

    seed: Annotated[int, typer.Option(help="of the shuffle and the split")] = 0
    min_genes: Annotated[int, typer.Option(help="fewest vocabulary genes of a cell")] = 7
    max_sd_counts: Annotated[
        float,
        typer.Option(help="largest distance of a cell's counts from the mean, in SD; 0: any"),
    ] = 3.0
    max_sd_mito: Annotated[
        float, typer.Option(help="the same for the mitochondrial share; 0: any")
    ] = 3.0
    dedup: Annotated[bool, typer.Option(help="reject cells that stood before, gene for gene")] = (
        False
    )
    min_overlap: Annotated[float, typer.Option(help="smallest share of counts in known genes")] = (
        0.5
    )
    heldout_share: Annotated[float, typer.Option("--heldout", help="share of cells held out")] = (
        0.02
    )
    heldout_by: Annotated[str, typer.Option(help="cell, dataset, or an --obs column")] = "cell"
    block_cells: Annotated[int, typer.Option(help="cells of one tar member")] = 256
    shard_mib: Annotated[float, typer.Option(help="mean size of a tar")] = 64.0
    memory_gib: Memory = 2.0
    vocabulary_min_cells: MinCells = 3
    max_length: MaxLength = None
    annotation: GeneTable = None
    same_side: bool = True


# Those that decide what becomes of a cell; the others are of shards and of a built vocabulary.
OF_CHECK = Only(
    "min_genes", "max_sd_counts", "max_sd_mito", "dedup", "min_overlap", "heldout_share",
    "heldout_by", "memory_gib", "max_length", "annotation",
)  # fmt: skip


@dataclass(frozen=True)
class VocabularyFiles:
    """Where a vocabulary is read from."""

    vocab: Annotated[
        str,
        typer.Option(
            help="vocabulary.json, Geneformer's token dictionary (json, pkl) or its folder; or "
            "'build', of prepare, to make one from the sources"
        ),
    ]
    medians: Annotated[Path | None, typer.Option(help="median dictionary (json, pkl)")] = None
    gene_mapping: GeneMapping = None

    def open(self, max_length: int | None) -> Vocabulary | None:
        """Return the vocabulary; None where it is to be built from the sources.

        Raises
        ------
        ValueError
            No such file, or one that is no vocabulary; files beside ``build``.
        """
        if self.vocab != BUILD:
            return open_vocabulary(Path(self.vocab), self.medians, self.gene_mapping, max_length)
        if self.medians or self.gene_mapping:
            raise ValueError("--vocab build: computes medians itself; leave out --medians, mapping")
        return None


@dataclass(frozen=True)
class MediansOptions:
    """Settings of ``geneloom medians``: how genes are counted, and what the vocabulary holds."""

    min_cells: MinCells = 3
    with_cls: Annotated[
        bool, typer.Option(help="<cls> and <eos> around each cell, as Geneformer V2")
    ] = False
    max_length: MaxLength = None
    gene_mapping: GeneMapping = None
    annotation: GeneTable = None
    memory_gib: Memory = 2.0


def check_options(options: PrepareOptions, columns: tuple[str, ...]) -> None:
    """Raise ValueError for settings that cannot be."""
    if not 0 <= options.heldout_share < 1:
        raise ValueError(
            f"--heldout {options.heldout_share}: must lie between 0 and 1, or be 0 to hold out none"
        )
    if options.heldout_by not in ("cell", "dataset", *columns):
        raise ValueError(
            f"--heldout-by {options.heldout_by}: must be cell, dataset, or a column given as --obs"
        )
    reserved = RESERVED_COLUMNS & set(columns)
    if reserved:
        raise ValueError(f"--obs {sorted(reserved)}: these names are used by the shards themselves")
    numbers = asdict(options)
    wrong = [n for n, v in numbers.items() if isinstance(v, float) and not math.isfinite(v)]
    if wrong:
        raise ValueError(f"--{wrong[0].replace('_', '-')} {numbers[wrong[0]]}: is no number")
    if "" in columns:
        raise ValueError("--obs: a column without a name")
    for name, value in (
        ("--memory", options.memory_gib),
        ("--block-cells", options.block_cells),
        ("--shard-mib", options.shard_mib),
        ("--min-genes", options.min_genes),
        ("--min-cells", options.vocabulary_min_cells),
    ):
        if value <= 0:
            raise ValueError(f"{name} {value}: must be above 0")
    for name, value in (
        ("--max-sd-counts", options.max_sd_counts),
        ("--max-sd-mito", options.max_sd_mito),
    ):
        if value < 0:
            raise ValueError(f"{name} {value}: must be above 0, or 0 to switch the filter off")
    if options.max_length is not None and options.max_length < 8:
        raise ValueError(f"--max-length {options.max_length}: must be at least 8")
    if not 0 <= options.min_overlap <= 1:
        raise ValueError(f"--min-overlap {options.min_overlap}: must lie between 0 and 1")
