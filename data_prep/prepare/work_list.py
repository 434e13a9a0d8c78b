"""Before any cell is read: sources opened once, held-out groups, and the work to do."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.encoding import encode_pass
from data_prep.encoding.encode_pass import EncodeJob, EncodeSettings
from data_prep.files import file_sha256, write_to_disk
from data_prep.genes.annotation import Annotation, read_annotation
from data_prep.genes.rank_genes import token_dtype
from data_prep.genes.vocabulary import Vocabulary
from data_prep.hashing import hash_strings, stream_key
from data_prep.matrices.gene_table import GeneReport
from data_prep.prepare.medians import build_vocabulary
from data_prep.prepare.options import PrepareOptions
from data_prep.running.workers import Progress, Workers
from data_prep.sources.corpus_list import carried_columns
from data_prep.sources.count_source import CountSource
from data_prep.sources.open_source import Source, open_source
from data_prep.sources.source_spec import SourceSpec

logger = logging.getLogger(__name__)

# Cells of one chunk: 40 MB of tokens at 1,300 genes.
CHUNK_CELLS = 16_384


@dataclass(frozen=True)
class SourceSurvey:
    """What a source is before its cells are read."""

    spec: SourceSpec
    signature: str
    quick_signature: str
    kind: str
    num_cells: int
    stretches: list[tuple[int, int]]
    genes: GeneReport | None
    group_sizes: Counter[str]
    filtered_out: int | None = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Survey:
    """All sources, and the vocabulary in use."""

    sources: list[SourceSurvey]
    vocabulary: Vocabulary
    columns: tuple[str, ...]

    @property
    def num_cells(self) -> int:
        return sum(s.num_cells for s in self.sources)

    def estimated_bytes(self, columns: tuple[str, ...]) -> int:
        """Return about how large the shards will be, from file sizes and cells."""
        per_cell = 64 + 16 * len(columns)
        longest = self.vocabulary.max_length * token_dtype(self.vocabulary.num_tokens).itemsize
        total = 0
        for source in self.sources:
            path = Path(source.spec.path)
            files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
            # Compressed counts take about as many bytes as their genes take as tokens.
            size = sum(p.stat().st_size for p in files if p.exists()) or 1 << 62
            total += min(size, source.num_cells * longest) + source.num_cells * per_cell
        return total


def survey_sources(
    specs: list[SourceSpec],
    work: Path,
    vocabulary: Vocabulary | None,
    options: PrepareOptions,
    workers: Workers,
    progress: Progress,
) -> Survey:
    """Open every source once, one at a time, and check what can be checked without its cells."""
    annotation = read_annotation(options.annotation) if options.annotation else None
    if workers.helpers:  # opening copies matrices that are stored by gene: work for all
        workers.run(partial(_open_once, work), specs)
    if vocabulary is None:
        if options.heldout_by != "cell":  # a wrong choice is said before the cells are read twice
            sizes: Counter[str] = Counter()
            for spec in specs:
                sizes.update(open_source(spec, work).group_sizes(options.heldout_by))
            choose_heldout_groups(sizes, options)
        vocabulary = build_vocabulary(
            specs, work, options.vocabulary_min_cells, options.max_length, options.annotation,
            workers, progress,
        )  # fmt: skip
    surveys = []
    for number, spec in enumerate(specs):
        progress("opening", number, len(specs))
        surveys.append(survey_source(spec, work, vocabulary, options, annotation))
    return Survey(surveys, vocabulary, carried_columns(specs))


def _open_once(work: Path, spec: SourceSpec) -> None:
    open_source(spec, work)


def survey_source(
    spec: SourceSpec,
    work: Path,
    vocabulary: Vocabulary,
    options: PrepareOptions,
    annotation: Annotation | None,
) -> SourceSurvey:
    """Open one source and check its genes and columns."""
    source: Source = open_source(spec, work, annotation)
    genes, filtered_out, warnings = None, 0, ()
    if isinstance(source, CountSource):
        source.column_tokens(vocabulary, options.min_overlap)
        genes = source.gene_report(vocabulary)
        filtered_out, warnings = source.num_filtered_out, tuple(source.warnings())
    by = options.heldout_by
    sizes = Counter() if by == "cell" else source.group_sizes(by)
    return SourceSurvey(
        spec, spec.signature(deep=True), spec.signature(), source.kind, source.num_cells,
        source.stretches(CHUNK_CELLS), genes, sizes, filtered_out, warnings,
    )  # fmt: skip


def choose_heldout_groups(sizes: Counter[str], options: PrepareOptions) -> tuple[str, ...]:
    """Return the groups that are held out: in hashed order, until the share is reached.

    `sizes`: cells of each group. A group that would overshoot twice the share is passed over; if
    there are only such groups, the smallest is taken. Cells without a value are never held out.
    """
    by = options.heldout_by
    if by == "cell" or not options.heldout_share:
        return ()
    total = sum(sizes.values())
    names = sorted(n for n in sizes if n)
    if len(sizes) < 2 or not names:
        raise ValueError(
            f"--heldout-by {by}: there is only one, {list(sizes)}; nothing to hold out"
        )
    wanted = options.heldout_share * total
    chosen: list[str] = []
    reached = 0
    for number in np.argsort(hash_strings(stream_key(options.seed, "heldout"), names)):
        size = sizes[names[number]]
        if reached < wanted and reached + size <= 2 * wanted and len(chosen) < len(sizes) - 1:
            chosen.append(names[number])
            reached += size
    if not chosen:
        chosen = [min(names, key=lambda n: (sizes[n], n))]
        reached = sizes[chosen[0]]
    if reached > total / 2 > wanted:
        raise ValueError(
            f"--heldout-by {by}: the smallest choice of whole groups, {chosen}, is {reached:,} of "
            f"{total:,} cells; hold out by another column, or by cell"
        )
    if reached > 2 * wanted:
        logger.warning("held out are %d of %d cells: %s is not divided", reached, total, chosen[0])
    return tuple(sorted(chosen))


def encode_jobs(
    survey: Survey, work: Path, options: PrepareOptions, with_tokens: bool
) -> list[EncodeJob]:
    """Return the jobs of pass 1, in the order of the sources."""
    # Symbols are not in the vocabulary's own hash, but they decide which genes are found.
    text = survey.vocabulary.file_text
    lookup_sha256 = hashlib.sha256(text.encode()).hexdigest()
    path = work / f"vocabulary-{lookup_sha256[:24]}.json"
    if not path.exists():
        write_to_disk(path, text)
    encode_pass.keep_vocabulary(lookup_sha256, survey.vocabulary)
    sizes: Counter[str] = Counter()
    for source in survey.sources:
        sizes.update(source.group_sizes)
    groups = choose_heldout_groups(sizes, options)
    settings = EncodeSettings(
        seed=options.seed,
        min_genes=options.min_genes,
        min_overlap=options.min_overlap,
        heldout_share=options.heldout_share,
        heldout_by=options.heldout_by,
        heldout_groups=(),
        columns=survey.columns,
        with_tokens=with_tokens,
        with_content=options.dedup,
        annotation_sha256=file_sha256(options.annotation) if options.annotation else None,
        chunk_cells=CHUNK_CELLS,
    )
    jobs = []
    for source in survey.sources:
        # Only this source's groups: a change in another one leaves its chunks what they are.
        own = replace(settings, heldout_groups=tuple(g for g in groups if source.group_sizes[g]))
        jobs += [
            EncodeJob(
                work, source.spec, source.signature, source.quick_signature, start, stop, path,
                lookup_sha256, options.annotation, own,
            )
            for start, stop in source.stretches
        ]  # fmt: skip
    return jobs
