"""A source as the user names it: where its cells are, and how they are to be read."""

from __future__ import annotations

import glob
import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import typer

from data_prep.files import file_sha256
from data_prep.genes.annotation import organism_name
from data_prep.matrices.matrix_store import mtx_sample
from data_prep.options import Only, Read

INDEX = "index"  # as a gene column: the index of var, also where it has a column of ids
CENSUS = "census"  # in front of a version or URI, where others have a path
_SUFFIXES = (".h5ad", ".h5mu", ".loom", ".zarr", ".h5", ".parquet", ".arrow", ".dataset")


@dataclass(frozen=True)
class SourceOptions:
    """How a count matrix is read; the help of an option says what a field is.

    None means: `gene_column` is ``ensembl_id`` where that exists, else the index; totals are sums
    of the file; the whole source is one data set; the organism is not checked; all cells are read;
    fractional counts are refused. The query of `obs_filter` is that of the SOMA experiment, of
    other files that of pandas (`data_prep.matrices.choose_cells`).
    """

    counts: Annotated[str, typer.Option(help="X, raw, or layers/NAME")] = "X"
    gene_column: Annotated[
        str | None,
        typer.Option(help="column of var with gene ids; 'index' [ensembl_id, else the index]"),
    ] = None
    columns: Annotated[
        tuple[str, ...],
        typer.Option("--obs", help="column of obs to carry along; NAME=COLUMN renames it"),
    ] = ()
    total_column: Annotated[
        str | None, typer.Option(help="column of obs with total counts [sum over the file]")
    ] = None
    strip_versions: Annotated[
        bool,
        typer.Option(
            "--strip-gene-versions/--no-strip-gene-versions",
            help="cut .5 from ENSG00000141510.5 in every id",
        ),
    ] = False
    dataset_column: Annotated[
        str | None, typer.Option(help="column of obs that names the data set [the file is one]")
    ] = None
    organism: Annotated[
        str | None,
        typer.Option(help="species that the gene ids must be of"),
        Read(organism_name, str | None),
    ] = None
    obs_filter: Annotated[
        str | None, typer.Option(help="query over obs: only cells for which it is true are read")
    ] = None
    genome: Annotated[
        str | None, typer.Option(help="of files with features of several genomes, such as GRCh38")
    ] = None
    fractional: Annotated[
        Literal["round", "keep"] | None,
        typer.Option(help="take fractional counts (RSEM, SoupX): rounded, or ranked as they are"),
    ] = None
    force_counts: Annotated[
        bool,
        typer.Option(help="take integers that do not look like counts: binarised, rounded CPM"),
    ] = False

    @property
    def column_names(self) -> tuple[str, ...]:
        """What the carried columns are called in the shards."""
        return tuple(c.split("=", 1)[0] for c in self.columns)

    @property
    def column_sources(self) -> dict[str, str]:
        """Name in the shards -> name in obs."""
        return {c.split("=", 1)[0]: c.split("=", 1)[-1] for c in self.columns}


# Of commands that read cells for a model: neither which cells nor columns of obs.
MATRIX = Only(
    "counts", "gene_column", "strip_versions", "genome", "fractional", "force_counts"
)  # fmt: skip
MATRIX_AND_FILTER = Only(*MATRIX.names, "obs_filter")


@dataclass(frozen=True)
class SourceSpec:
    """One source of a corpus: where it is, what it is called, how it is read.

    `name` is its identity: with the row number it decides a cell's place in the shuffle.
    `dataset` groups sources for the quality filters. `path` is text, because a Census is no file,
    and ``FOLDER#SPLIT`` is one split of a Hugging Face DatasetDict. `split` is ``train`` or
    ``heldout`` where the source says it of all its cells.
    """

    path: str
    name: str
    dataset: str
    options: SourceOptions = field(default_factory=SourceOptions)
    split: str | None = None

    def signature(self, deep: bool = False) -> str:
        """Return a hash of what the source is: settings, size and time of its files.

        Of folders, two levels; `deep`: all of it. A zarr group may have a million files, so that is
        for once a run, and two levels are for each stretch. The path is not in it.
        """
        path = split_path(self.path.removeprefix("hf:"))[0]
        found = [path] if path.exists() else []
        found += _tables_beside(path)
        found += path.rglob("*") if deep else [*path.glob("*"), *path.glob("*/*")]
        base = path.parent if path.is_file() else path
        states = sorted((str(p.relative_to(base)) if p != path else ".", p.stat()) for p in found)
        files = [(name, s.st_size, s.st_mtime_ns) for name, s in states]
        text = f"[{_settings_text(self)}, {json.dumps(files)}]"
        return hashlib.sha256(text.encode()).hexdigest()


def _tables_beside(path: Path) -> list[Path]:
    """Return the tables of a sample's mtx file (``GSM1_P1_matrix.mtx.gz``); they belong to it."""
    sample = mtx_sample(path)
    if sample is None or not path.is_file():
        return []
    return [
        p for name in ("barcodes", "features", "genes")
        for p in path.parent.glob(f"{glob.escape(sample[0] + name + sample[1])}.tsv*")
    ]  # fmt: skip


def content_sha256(path: Path) -> str:
    """Return a hash of all bytes of a source: of a file its SHA-256.

    Of folders it is over names and hashes of all files in it, so a copy has the same. A Census by
    its version has no files here: the hash is of its name.
    """
    if path.is_file() and not _tables_beside(path):
        return file_sha256(path)
    if path.exists():
        files = [path, *_tables_beside(path)] if path.is_file() else path.rglob("*")
        base = path.parent if path.is_file() else path
        parts = sorted(
            f"{p.relative_to(base).as_posix()} {file_sha256(p)}" for p in files if p.is_file()
        )
    elif str(path).startswith(f"{CENSUS}:"):
        parts = [str(path)]
    else:
        raise ValueError(f"{path}: no such file or folder")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@lru_cache(maxsize=64)
def _settings_text(spec: SourceSpec) -> str:
    """Return JSON of all that a spec says but for the path of a file."""
    settings = asdict(spec) | {"path": ""}
    if spec.path.startswith((f"{CENSUS}:", "hf:")):
        settings["path"] = spec.path
    return json.dumps(settings, sort_keys=True)


def split_path(path: str) -> tuple[Path, str | None]:
    """Return the folder and the split that ``FOLDER#SPLIT`` names; any other path and None."""
    folder, mark, name = path.rpartition("#")
    if mark and name and not Path(path).exists() and Path(folder).is_dir():
        return Path(folder), name
    return Path(path), None


def source_at(path: Path | str, options: SourceOptions) -> SourceSpec:
    """Return the spec of a single path: its name is the file's, and so is its data set's."""
    if str(path).startswith("hf:"):
        name = str(path).removeprefix("hf:").rstrip("/")
        return SourceSpec(str(path), name, name.partition("#")[0], options)
    folder, split = split_path(str(path))
    if split is not None:
        whole = source_at(folder, options)
        return replace(whole, path=str(path), name=f"{whole.name}#{split}")
    sample = mtx_sample(Path(path))
    if sample is not None:  # GSM1_P1_matrix.mtx.gz: GSM1_P1
        name = (sample[0].rstrip("_.-") + sample[1]) or Path(path).absolute().parent.name
        return SourceSpec(str(path), name, name, options)
    name = str(path) if str(path).startswith(f"{CENSUS}:") else Path(path).absolute().name
    for suffix in (".zip", *_SUFFIXES):
        name = name.removesuffix(suffix)
    return SourceSpec(str(path), name, name, options)
