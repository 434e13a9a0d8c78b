"""Computes the non-zero median of each gene, which makes values comparable between genes.

The median of a gene is taken of counts / total x 10,000 over the cells that express the gene
(Geneformer, Nature 2023, Methods). `gene_medians` makes two passes over the cells. The first pass
counts values in logarithmic bins, 64 per octave; the counts are integers, so the results of
processes and of earlier runs add up exactly, in any order. Then the bin that holds a gene's median
is known, and the second pass keeps only the values in these bins and takes the exact median. Where
these values do not fit into memory, or where only earlier results are merged, the median is
interpolated in its bin, with a relative error below 1/64. `build_vocabulary` makes a vocabulary of
the medians.

Quantile sketches of a library, such as KLL, draw random numbers, so two runs over the same cells
would give two vocabularies with different hashes. They are not used, because everything that is
made with a vocabulary is identified by its hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numba
import numpy as np

from data_prep.files import file_sha256, write_to_disk
from data_prep.genes.annotation import read_annotation
from data_prep.genes.gene_names import plain_id, strip_version
from data_prep.genes.median_sketch import (
    BIN_SHIFT,
    FIRST_BIN,
    NUM_BINS,
    RELATIVE_ERROR,
    MedianSketch,
    middle_bins,
)
from data_prep.genes.vocabulary import (
    CLS,
    EOS,
    MASK,
    MAX_LENGTH_PLAIN,
    MAX_LENGTH_SPECIAL,
    PAD,
    TARGET_SUM,
    Vocabulary,
    load_vocabulary,
    merged_mappings,
)
from data_prep.prepare.options import MediansOptions
from data_prep.running.workers import Progress, Workers, counter
from data_prep.sources.corpus_list import expand_corpus
from data_prep.sources.count_source import CountBlock, CountSource
from data_prep.sources.obs_columns import FILTER_COLUMN
from data_prep.sources.open_source import open_source
from data_prep.sources.remarks import entry_of, remarks
from data_prep.sources.source_spec import SourceOptions, SourceSpec

_CHUNK_CELLS = 16_384
SKETCH, TABLE = ".sketch.parquet", ".genes.tsv"
_VALUE_BYTES = 36  # memory per value while the values of the median bins are sorted


@dataclass(frozen=True)
class GeneMedians:
    """Medians of all genes, and what was noticed while the sources were read.

    Attributes
    ----------
    relative_error
        The largest relative error of a median, 0 if they are exact.
    remarks, warnings
        Lines for the user about each source; nothing of sources whose sketches were merged.
    """

    sketch: MedianSketch
    medians: np.ndarray
    relative_error: float
    remarks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def save_table(self, path: Path) -> None:
        """Write a tsv table with each gene, the number of cells that express it, and the median."""
        rows = zip(self.sketch.genes, self.sketch.detected, self.medians, strict=True)
        lines = [f"{gene}\t{cells}\t{float(median)!r}\n" for gene, cells, median in rows]
        path.write_text("gene\tcells\tmedian\n" + "".join(lines))

    def vocabulary(self, min_cells: int, max_length: int | None, with_cls: bool) -> Vocabulary:
        """Return the vocabulary of the genes that at least `min_cells` cells express.

        Tokens are numbered in the order of gene ids, so they do not depend on the order of sources.
        """
        special = {PAD: 0, MASK: 1} | ({CLS: 2, EOS: 3} if with_cls else {})
        chosen = np.flatnonzero(self.sketch.detected >= min_cells)
        if not chosen.size:
            raise ValueError(f"no gene is detected in at least {min_cells} cells: no vocabulary")
        genes = tuple(self.sketch.genes[i] for i in chosen)
        known, aliases = set(genes), sorted(self.sketch.aliases.items())
        return Vocabulary(
            genes=genes,
            medians=self.medians[chosen],
            special_tokens=special,
            max_length=max_length or (MAX_LENGTH_SPECIAL if with_cls else MAX_LENGTH_PLAIN),
            aliases={a: g for a, g in aliases if g in known and a not in known},
        )


@dataclass(frozen=True)
class _Job:
    """A stretch of a source to count; `genes` is the path of the file that numbers the genes."""

    spec: SourceSpec
    work: Path
    genes: Path
    start: int
    stop: int


def build_vocabulary(
    specs: list[SourceSpec],
    work: Path,
    min_cells: int,
    max_length: int | None,
    annotation: Path | None,
    workers: Workers,
    progress: Progress,
) -> Vocabulary:
    """Return the vocabulary of the genes in count matrices.

    It is stored in `work`, so that a restarted run does not compute it again.
    """
    table = file_sha256(annotation) if annotation else None
    settings = [min_cells, max_length, table, [s.signature() for s in specs]]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]
    path = work / f"medians-{digest}.json"
    if path.exists():
        return load_vocabulary(path)
    found = gene_medians(specs, work, workers, progress, annotation)
    vocabulary = found.vocabulary(min_cells, max_length, with_cls=False)
    write_to_disk(path, vocabulary.to_json() + "\n")
    return vocabulary


def medians_of(
    sources: list[str],
    out: Path,
    options: MediansOptions,
    reading: SourceOptions,
    workers: Workers,
    progress: Progress,
) -> tuple[GeneMedians, Vocabulary]:
    """Write a vocabulary with the medians of sources, its sketch and its table; return both.

    Parameters
    ----------
    sources
        Count matrices, as a user names them, or sketches of earlier calls, which are merged.
    out
        ``NAME.json``; beside it come ``NAME.sketch.parquet`` and ``NAME.genes.tsv``.

    Raises
    ------
    ValueError
        As `gene_medians`; one of the files exists; a sketch is given twice.
    """
    if out.suffix != ".json":
        raise ValueError(f"--out {out}: must end in .json")
    sketch_path, table_path = out.with_suffix(SKETCH), out.with_suffix(TABLE)
    for path in (out, sketch_path, table_path):
        if path.exists():
            raise ValueError(f"{path}: exists; give --out a new name")
    earlier = [s for s in sources if s.endswith(SKETCH)]
    rest = [s for s in sources if s not in earlier]
    if len(set(earlier)) < len(earlier):
        raise ValueError("a sketch is given more than once: its cells would count twice")
    if earlier and not rest and (options.annotation or options.gene_mapping):
        raise ValueError("--annotation, --gene-mapping: belong to the call that made the sketch")
    found: GeneMedians | None = None
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the result: all nodes see that, and row-wise copies may be large.
    with tempfile.TemporaryDirectory(prefix=".geneloom-", dir=out.parent) as work:
        if rest:
            found = gene_medians(
                expand_corpus(rest, reading), Path(work), workers, progress, options.annotation,
                options.gene_mapping, options.memory_gib,
            )  # fmt: skip
        for path in earlier:
            sketch = MedianSketch.load(Path(path))
            sketch = found.sketch.merge(sketch) if found else sketch
            said = (found.remarks, found.warnings) if found else ((), ())
            found = GeneMedians(sketch, sketch.medians(), RELATIVE_ERROR, *said)
    if found is None:
        raise ValueError("no source is given")
    vocabulary = found.vocabulary(options.min_cells, options.max_length, options.with_cls)
    found.sketch.save(sketch_path)
    found.save_table(table_path)
    vocabulary.save(out)
    return found, vocabulary


def gene_medians(
    specs: list[SourceSpec],
    work: Path,
    workers: Workers,
    progress: Progress,
    annotation: Path | None = None,
    gene_mapping: Path | Sequence[Path] | None = None,
    memory_gib: float = 2.0,
) -> GeneMedians:
    """Return the medians of all genes of count matrices, over the cells that pass ``filter_pass``.

    Parameters
    ----------
    work
        Folder for temporary files.
    annotation
        Annotation table; only its protein-coding and miRNA genes are counted.
    gene_mapping
        Dictionaries that map retired ids or symbols to gene ids.
    memory_gib
        Memory for the values of the second pass; if they need more, medians are interpolated.

    Raises
    ------
    ValueError
        A source is a token corpus, or has no raw counts.
    """
    aliases = merged_mappings(gene_mapping)
    chosen = read_annotation(annotation).chosen if annotation else None
    genes: set[str] = set()
    stretches, entries, warnings = [], [], []
    for number, spec in enumerate(specs):
        progress("opening", number, len(specs))
        source = open_source(spec, work)
        if not isinstance(source, CountSource):
            raise ValueError(
                f"{spec.path}: medians need count matrices; tokenised corpora come with the "
                "vocabulary they were made with"
            )
        source.check_ids()
        ids = {_gene_of(i, aliases) for i in source.gene_ids if i}
        genes |= ids if chosen is None else {i for i in ids if strip_version(i) in chosen}
        stretches += [(number, start, stop) for start, stop in source.stretches(_CHUNK_CELLS)]
        entries.append(entry_of(source, None))
        warnings += source.warnings()
    if not genes:
        raise ValueError("no gene of the sources is in the annotation; are the ids of its kind?")
    names = sorted(genes)
    numbers = {n: i for i, n in enumerate(names)}
    path = work / "genes.json"
    write_to_disk(path, json.dumps([numbers, aliases]))
    jobs = [_Job(specs[number], work, path, start, stop) for number, start, stop in stretches]
    sizes = [j.stop - j.start for j in jobs]
    counts = np.zeros((len(names), NUM_BINS), dtype=np.int64)
    shown = counter(progress, "counting genes", sizes)
    seen = np.zeros((len(specs), 4), dtype=np.int64)
    with contextlib.closing(workers.each(_count_stretch, jobs)) as ended:
        # Added one by one: all of them would fill the memory.
        for number, (places, added, of_cells) in ended:
            counts.reshape(-1)[places] += added
            seen[stretches[number][0]] += of_cells
            shown(number)
    lines, more = _said(entries, seen)
    said = (tuple(lines), tuple(warnings + more))
    sketch = MedianSketch(tuple(names), counts, {a: g for a, g in aliases.items() if g in genes})
    wanted = middle_bins(counts)
    held = int(counts[np.arange(len(names))[:, None], wanted].sum())
    if held * _VALUE_BYTES > memory_gib * 2**30:
        return GeneMedians(sketch, sketch.medians(), RELATIVE_ERROR, *said)
    np.save(work / "wanted.npy", wanted)
    shown = counter(progress, "taking medians", sizes)
    found = workers.run(partial(_collect_stretch, work / "wanted.npy"), jobs, shown)
    medians = _exact_medians(counts, wanted, *(np.concatenate(p) for p in zip(*found, strict=True)))
    return GeneMedians(sketch, medians, 0.0, *said)


def _said(entries: list[dict], seen: np.ndarray) -> tuple[list[str], list[str]]:
    """Return remarks and warnings about the sources, after their cells were read.

    Parameters
    ----------
    entries
        Of `data_prep.sources.remarks.entry_of`.
    seen
        int64 [sources, 4]: as `_count_stretch` returns them.
    """
    lines, warnings = [], []
    for entry, (fractional, stored, excluded, cells) in zip(entries, seen.tolist(), strict=True):
        lines += remarks(entry | {"fractional_values": fractional / stored if stored else 0.0})
        if excluded:
            warnings.append(
                f"{entry['name']}: {excluded:,} of {cells:,} cells do not count: they do not pass "
                f"obs['{FILTER_COLUMN}']"
            )
    return lines, warnings


def _gene_of(gene_id: str, aliases: dict[str, str]) -> str:
    """Return the gene that an id is counted as.

    It is the mapped gene if `aliases` has the id, else the id without version and genome.
    """
    plain = plain_id(gene_id)
    for name in (gene_id, plain, plain.upper()):
        if name in aliases:
            return aliases[name]
    return plain


def _exact_medians(
    counts: np.ndarray, wanted: np.ndarray, genes: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """Return float64 [genes], exact medians from the values in the bins of the middle values."""
    order = np.lexsort((values, genes))
    genes, values = genes[order], values[order]
    first = np.searchsorted(genes, np.arange(len(counts)))
    before = np.cumsum(counts, axis=1) - counts
    number = counts.sum(axis=1)
    medians = np.full(len(counts), np.nan)
    seen = number > 0
    rows = np.arange(len(counts))
    # The kept values of a gene begin with its lower middle bin, so ranks are counted from there.
    skipped = before[rows, wanted[:, 0]]
    low = first + (number - 1) // 2 - skipped
    # Bins between the two middle bins are empty, so the upper value follows the lower one directly.
    high = first + number // 2 - skipped
    medians[seen] = (values[low[seen]] + values[high[seen]]) / 2
    return medians


def _blocks(job: _Job):
    """Yield (block, gene numbers, number of genes) for the blocks of a stretch.

    The gene numbers are int32 [genes of the source], -1 for genes that are not counted.
    """
    source = open_source(job.spec, job.work)
    assert isinstance(source, CountSource)
    numbers, aliases = json.loads(job.genes.read_text())
    genes = [_gene_of(i, aliases) for i in source.gene_ids]
    columns = np.array([numbers.get(g, -1) for g in genes], dtype=np.int32)
    num_genes = max(numbers.values()) + 1
    for block in source.blocks(job.start, job.stop):
        yield block, columns, num_genes


def _scales(block: CountBlock) -> np.ndarray:
    """Return float64 [cells], total counts; NaN for cells that are left out of the medians."""
    return np.where(block.passes & (block.totals > 0), block.totals, np.nan)


def _count_stretch(job: _Job) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (flat indices into [genes, bins], numbers of cells) that a stretch adds.

    The third is int64 [4]: values that were no integers, all values, cells that ``filter_pass``
    excludes, all cells.
    """
    counts, seen = np.zeros(0, dtype=np.uint32), np.zeros(4, dtype=np.int64)
    for block, columns, num_genes in _blocks(job):
        if not counts.size:
            counts = np.zeros(num_genes * NUM_BINS, dtype=np.uint32)
        excluded = int((~block.passes).sum())
        seen += (block.fractional, len(block.data), excluded, len(block.passes))
        _count(block.data, block.indices, block.indptr, _scales(block), columns, num_genes, counts)
    places = np.flatnonzero(counts)
    return places, counts[places].astype(np.int64), seen


def _collect_stretch(wanted_path: Path, job: _Job) -> tuple[np.ndarray, np.ndarray]:
    """Return (gene numbers, values) of a stretch for the values in the wanted bins."""
    wanted = np.load(wanted_path)
    parts = [
        _collect(b.data, b.indices, b.indptr, _scales(b), columns, num_genes, wanted)
        for b, columns, num_genes in _blocks(job)
    ]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


@numba.njit(cache=True, nogil=True)
def _cell_values(data, indices, indptr, totals, cell, columns, sums, touched, values, bins):
    """Fill `touched` (genes), `values` and `bins` of one cell; return the number of its genes.

    The number is 0 for a cell that is left out of the medians.
    """
    size = 0
    if np.isnan(totals[cell]):
        return size
    for k in range(indptr[cell], indptr[cell + 1]):
        gene = columns[indices[k]]
        if gene >= 0 and data[k] > 0:
            if sums[gene] == 0.0:
                touched[size] = gene
                size += 1
            sums[gene] += data[k]
    for i in range(size):
        values[i] = sums[touched[i]] / totals[cell] * TARGET_SUM
        sums[touched[i]] = 0.0
    bits = values.view(np.int64)
    for i in range(size):
        bins[i] = min(max((bits[i] >> BIN_SHIFT) - FIRST_BIN, 0), NUM_BINS - 1)
    return size


@numba.njit(cache=True, nogil=True)
def _count(data, indices, indptr, totals, columns, num_genes, counts):
    sums, touched = np.zeros(num_genes), np.empty(num_genes, np.int32)
    values, bins = np.empty(num_genes), np.empty(num_genes, np.int64)
    for cell in range(len(indptr) - 1):
        size = _cell_values(
            data, indices, indptr, totals, cell, columns, sums, touched, values, bins
        )
        for i in range(size):
            counts[touched[i] * NUM_BINS + bins[i]] += 1


@numba.njit(cache=True, nogil=True)
def _collect(data, indices, indptr, totals, columns, num_genes, wanted):
    sums, touched = np.zeros(num_genes), np.empty(num_genes, np.int32)
    values, bins = np.empty(num_genes), np.empty(num_genes, np.int64)
    found_genes, found_values = np.empty(1024, np.int32), np.empty(1024)
    used = 0
    for cell in range(len(indptr) - 1):
        size = _cell_values(
            data, indices, indptr, totals, cell, columns, sums, touched, values, bins
        )
        for i in range(size):
            gene = touched[i]
            if bins[i] == wanted[gene, 0] or bins[i] == wanted[gene, 1]:
                if used == len(found_genes):
                    found_genes = np.concatenate((found_genes, np.empty_like(found_genes)))
                    found_values = np.concatenate((found_values, np.empty_like(found_values)))
                found_genes[used] = gene
                found_values[used] = values[i]
                used += 1
    return found_genes[:used], found_values[:used]
