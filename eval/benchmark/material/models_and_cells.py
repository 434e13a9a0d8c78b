"""What contenders get: models, and a task's cells as counts and as every model's tokens."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse

from data_prep.genes.vocabulary import Vocabulary, read_dictionary
from data_prep.sources.source_spec import SourceOptions, content_sha256
from eval.benchmark.outcome import Store
from eval.benchmark.task_file import Cells
from eval.cells.demo_cells import recover_counts
from eval.cells.read_cells import CellSet, encode_file
from eval.scores.splits import repeated_cells
from pretrain.cell_states.cell_state import CellState
from pretrain.counting.corpus_svd import CorpusSvd
from pretrain.export.model_folder import folder_cell_state, load_exported, model_digest
from pretrain.model.architectures import Network
from pretrain.ranks.dist import Ranks


@dataclass(frozen=True)
class Model:
    """A pretrained model under a name; `digest` is a hash of its weights and vocabulary.

    `gene_names` maps other names of genes, such as symbols, to ids of the vocabulary: for reading
    cells and labels only, no part of the model.
    """

    name: str
    folder: Path
    network: Network
    vocabulary: Vocabulary
    digest: str
    gene_names: dict[str, str] = field(default_factory=dict)

    @cached_property
    def svd(self) -> CorpusSvd | None:
        """The SVD of its training cells, where the folder holds it."""
        return CorpusSvd.found_in(self.folder, self.vocabulary)

    @cached_property
    def state(self) -> CellState | None:
        """What makes its cell states, where the folder holds it."""
        return folder_cell_state(self.folder, self.vocabulary)

    @cached_property
    def reading_vocabulary(self) -> Vocabulary:
        """The vocabulary that also knows `gene_names`."""
        known = set(self.vocabulary.genes)
        names = {n: g for n, g in self.gene_names.items() if g in known and n not in known}
        return replace(self.vocabulary, aliases=names | self.vocabulary.aliases)

    def tokens_of(self, genes: list[str]) -> np.ndarray:
        """Return int64 tokens of gene ids or other names, -1 where the vocabulary lacks one."""
        return self.reading_vocabulary.tokens_of(genes).astype(np.int64)


@dataclass(frozen=True)
class Bench:
    """What every task of a benchmark is run with.

    Attributes
    ----------
    models
        At least one.
    data
        Folder that files of tasks are below; None for cells of a package.
    seed
        Of the cells that are drawn, splits, heads and random twins.
    device, bf16
        ``cpu`` or ``cuda``; compute the encoders in bfloat16.
    ranks
        Of `pretrain.ranks.dist.start`: fine-tunings of genes are divided over them.
    reading
        How files are read, beside what a task says of its cells.
    """

    models: list[Model]
    data: Path | None
    store: Store
    seed: int
    device: str
    bf16: bool
    ranks: Ranks | None = None
    reading: SourceOptions = SourceOptions()

    def cells(
        self,
        cells: Cells,
        columns: tuple[str | None, ...] = (),
        max_cells: int | None = None,
        change: Callable[[anndata.AnnData], anndata.AnnData] | None = None,
    ) -> TaskCells:
        """Return a task's cells for these models (`load_cells`); columns of None are none."""
        named = tuple(c for c in columns if c)
        drawn = (max_cells, self.seed)
        return load_cells(cells, named, self.models, self.data, *drawn, change, self.reading)


@dataclass(frozen=True)
class TaskCells:
    """Cells of a task, the same ones in the same order for every contender.

    Attributes
    ----------
    counts
        CSR float32 [cells, genes], raw counts of all files, joined by gene id.
    genes
        Gene ids of the columns of `counts`: each once, or '' for columns without an id.
    metadata
        The asked-for columns of obs as strings; index: cell ids (with several files:
        ``file:cell``).
    tokens
        Model name -> token ids of each cell, special tokens included.
    excluded
        Reason -> cells that were left out.
    digest
        Hash of the files' bytes and of what was chosen from them.
    """

    counts: scipy.sparse.csr_matrix
    genes: list[str]
    metadata: pd.DataFrame
    tokens: dict[str, list[np.ndarray]]
    excluded: dict[str, int]
    digest: str

    def codes(self, column: str | None) -> np.ndarray:
        """Return int64 [cells]: number of each cell's value in a column; 0 for all without one."""
        if column is None:
            return np.zeros(len(self.metadata), dtype=np.int64)
        return np.unique(self.metadata[column], return_inverse=True)[1].astype(np.int64)

    def subset(self, cells: np.ndarray) -> TaskCells:
        """Return chosen cells (int positions), in the given order."""
        chosen = hashlib.sha256(self.digest.encode() + np.asarray(cells, np.int64).tobytes())
        return TaskCells(
            self.counts[cells],
            self.genes,
            self.metadata.iloc[cells],
            {name: [tokens[i] for i in cells] for name, tokens in self.tokens.items()},
            self.excluded,
            chosen.hexdigest(),
        )


def at_most(cells: np.ndarray, most: int | None, seed: int) -> np.ndarray:
    """Return sorted positions: all of these, or so many drawn from them; None: all."""
    if most is None or len(cells) <= most:
        return cells
    return np.sort(np.random.default_rng(seed).choice(cells, most, replace=False))


def load_models(
    folders: list[Path], vocabulary: Path | None = None, gene_names: Path | None = None
) -> list[Model]:
    """Return the models of some folders, named by the folders.

    Parameters
    ----------
    vocabulary
        Geneformer's dictionaries, for folders without ``vocabulary.json``.
    gene_names
        Dictionary (JSON, or a pickle of plain values) from symbols to gene ids, such as
        Geneformer's ``gene_name_id_dict``.

    Raises
    ------
    ValueError
        Two folders have one name, or one is no model (see
        `pretrain.export.model_folder.load_exported`).
    """
    models: list[Model] = []
    names = read_dictionary(gene_names) if gene_names else {}
    for folder in folders:
        name = folder.resolve().name
        if name in [m.name for m in models]:
            raise ValueError(f"--model {folder}: another model is called '{name}' too; rename one")
        network, vocab = load_exported(folder, vocabulary)
        models.append(Model(name, folder, network, vocab, model_digest(folder, vocab), names))
    return models


def load_cells(
    cells: Cells,
    columns: tuple[str, ...],
    models: list[Model],
    data: Path | None,
    max_cells: int | None,
    seed: int,
    change: Callable[[anndata.AnnData], anndata.AnnData] | None = None,
    reading: SourceOptions = SourceOptions(),
) -> TaskCells:
    """Return a task's cells: those that pass `keep`, with genes for every model, at most so many.

    Parameters
    ----------
    columns
        Columns of obs to carry along.
    data
        Folder that `cells.files` are below.
    seed
        Which cells are drawn when there are more than `max_cells`.
    change
        What is done to the cells of each file before they are encoded.
    reading
        How files are read, but for counts, gene column and columns of obs.

    Raises
    ------
    ValueError
        A file or column is missing, the counts are none, the genes do not fit a model's
        vocabulary, or no cell is left.
    """
    wanted = tuple(dict.fromkeys([*columns, *cells.keep]))
    of_task = {"counts": cells.counts, "gene_column": cells.gene_column, "columns": wanted}
    options = replace(reading, **of_task)
    with tempfile.TemporaryDirectory() as scratch:
        paths = _paths(cells, data, Path(scratch))
        if change is not None:
            paths = [_changed(p, change, Path(scratch)) for p in paths]
        digests = [content_sha256(p) for p in paths]
        by_model = {
            m.name: [encode_file(p, m.reading_vocabulary, options) for p in paths] for m in models
        }
    sets = next(iter(by_model.values()))
    counts, genes = _join([s.counts for s in sets], [s.genes for s in sets])
    metadata = pd.concat(
        [
            s.metadata if len(sets) == 1 else _prefixed(s, p)
            for s, p in zip(sets, paths, strict=True)
        ]
    )
    kept = np.ones(len(metadata), dtype=bool)
    for column, values in cells.keep.items():
        kept &= metadata[column].isin(values).to_numpy()
    has_genes = np.all(
        [np.concatenate([s.has_genes for s in found]) for found in by_model.values()], axis=0
    )
    usable = np.flatnonzero(kept & has_genes)
    # A copy could be trained on in one fold and be asked for in another.
    again = repeated_cells(counts[usable])
    excluded = {
        f"not {' and '.join(cells.keep)} as the task asks": int((~kept).sum()),
        "no gene of a vocabulary": int((kept & ~has_genes).sum()),
        "exactly the counts of another cell": int(again.sum()),
    }
    if cells.expected_cells not in (None, int(kept.sum())):
        excluded[f"(expected {cells.expected_cells:,} cells, found {int(kept.sum()):,})"] = 0
    chosen = usable[~again]
    if not len(chosen):
        raise ValueError(f"{paths[0]}: no cell is left ({excluded})")
    drawn = at_most(chosen, max_cells, seed)
    if len(drawn) < len(chosen):
        excluded["not drawn"] = len(chosen) - len(drawn)
    whole = TaskCells(
        counts,
        genes,
        metadata,
        {name: [t for s in found for t in s.tokens] for name, found in by_model.items()},
        {k: v for k, v in excluded.items() if v or k.startswith("(")},
        hashlib.sha256("".join([*digests, repr(options)]).encode()).hexdigest(),
    )
    return whole.subset(drawn)


def _paths(cells: Cells, data: Path | None, scratch: Path) -> list[Path]:
    if cells.package:
        path = scratch / f"{cells.package}.h5ad"
        recover_counts().write_h5ad(path)
        return [path]
    if data is None:
        raise ValueError("--data: this task needs files; give the folder they are in")
    paths = []
    for pattern in cells.files:
        found = sorted(data.glob(pattern))
        if not found:
            raise ValueError(f"{data / pattern}: no such file. {cells.recipe}")
        paths += found
    return paths


def _changed(
    path: Path, change: Callable[[anndata.AnnData], anndata.AnnData], scratch: Path
) -> Path:
    aside = scratch / "changed" / path.name
    aside.parent.mkdir(exist_ok=True)
    change(anndata.read_h5ad(path)).write_h5ad(aside)
    return aside


def _prefixed(cells: CellSet, path: Path) -> pd.DataFrame:
    return cells.metadata.set_axis([f"{path.stem}:{i}" for i in cells.metadata.index], axis=0)


def _join(
    matrices: list[scipy.sparse.csr_matrix], genes: list[list[str]]
) -> tuple[scipy.sparse.csr_matrix, list[str]]:
    """Return counts over the union of gene ids; columns of one id are summed.

    Columns without an id stay, each for itself.
    """
    names: dict[str, int] = {}
    for number, ids in enumerate(genes):
        for column, gene in enumerate(ids):
            names.setdefault(gene or f"\0{number}:{column}", len(names))
    parts = []
    for number, (matrix, ids) in enumerate(zip(matrices, genes, strict=True)):
        place = [names[g or f"\0{number}:{c}"] for c, g in enumerate(ids)]
        to_union = scipy.sparse.csr_matrix(
            (np.ones(len(ids), np.float32), (np.arange(len(ids)), place)),
            shape=(len(ids), len(names)),
        )
        parts.append(matrix @ to_union)
    joined = scipy.sparse.vstack(parts).tocsr().astype(np.float32)
    return joined, ["" if n.startswith("\0") else n for n in names]
