"""From sources to shards, in two passes of bounded memory, on any number of processes.

1. Every stretch of every source is read, checked, encoded and written to chunk files
   (`data_prep.encode`), in any order, by whichever process is free.
2. One process looks at small columns of the chunk files and decides which cells stay and which
   cell goes into which tar (`data_prep.decide`).
3. Every tar is written from the chunk files (`data_prep.write`), again by whoever is free.

All cells are in one global random order. What is written depends on the sources and the settings;
not on processes, memory or the order in which work was done. Each finished piece of work is on disk
under a name that says what it is, so a killed run continues.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from data_prep import decide, encode, write
from data_prep import shards as shards_format
from data_prep.corpus import carried_columns
from data_prep.decide import Chunk, WritePlan
from data_prep.encode import EncodeJob, EncodeRecord, EncodeSettings, encode_stretch
from data_prep.filters import DatasetMoments, merge_moments
from data_prep.genes import read_annotation
from data_prep.hashing import hash_strings, stream_key
from data_prep.medians import build_vocabulary
from data_prep.open import Source, open_source
from data_prep.shards import SPLITS, file_sha256
from data_prep.sources import CountSource, GeneReport, SourceSpec
from data_prep.vocab import Vocabulary
from data_prep.workers import Workers
from data_prep.workspace import (
    check_disk,
    force_to_disk,
    locked_workspace,
    move_up,
    remove_stale,
)

logger = logging.getLogger(__name__)

# Cells of one chunk file: 40 MB of tokens at 1,300 genes.
CHUNK_CELLS = 16_384
RESERVED_COLUMNS = {"input_ids", "cell_id", "dataset", *encode.INTERNAL}
SERIAL = Workers(None, 0)
# (what is being done, cells or tars done, of how many)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PrepareOptions:
    """Settings of ``geneloom prepare`` beyond the sources.

    Attributes
    ----------
    min_genes
        Cells with fewer detected genes of the vocabulary are rejected. 7: the paper's filter, so
        that 15 % masking hides at least one gene (Geneformer, Nature 2023, Methods).
    max_sd_counts, max_sd_mito
        Cells whose total counts, or mitochondrial share, lie further than so many standard
        deviations from the mean of their data set are rejected; 0 switches the filter off. 3: the
        paper's.
    dedup
        Reject cells whose counts (or tokens) equal those of an earlier cell.
    min_overlap
        Smallest share of a source's genes that must be in the vocabulary.
    heldout_share
        Share of cells in the held-out split; whole groups are taken until it is reached.
    heldout_by
        ``cell``, ``dataset``, or a metadata column: its values are never split up.
    block_cells
        Cells of one tar member. 256: 333,000 cells/s read on one core and 2,230 B a cell at 1,107
        tokens, against 12,700 cells/s and 3,970 B at one cell a member (measured).
    shard_mib
        Mean size of a tar.
    memory_gib
        Bound of what each process holds at a time while the tars are written.
    annotation
        Table of genes with biotypes, for ``--vocab build`` and for mitochondrial genes.
    """

    seed: int = 0
    min_genes: int = 7
    max_sd_counts: float = 3.0
    max_sd_mito: float = 3.0
    dedup: bool = False
    min_overlap: float = 0.1
    heldout_share: float = 0.02
    heldout_by: str = "cell"
    block_cells: int = 256
    shard_mib: float = 64
    memory_gib: float = 2.0
    vocabulary_min_cells: int = 3
    max_length: int | None = None
    annotation: Path | None = None


def prepare(
    specs: list[SourceSpec],
    out: Path,
    vocabulary: Vocabulary | None,
    options: PrepareOptions,
    workers: Workers = SERIAL,
    progress: Progress = lambda what, done, total: None,
) -> dict:
    """Write the shards of the sources into `out` and return the manifest.

    Parameters
    ----------
    specs
        Count matrices and tokenised corpora (see `data_prep.corpus.expand_corpus`).
    out
        New or empty folder, or one that an unfinished run left: its work is taken up. A manifest
        appears in it last.
    vocabulary
        None: built from the count matrices.
    workers
        From `data_prep.workers.open_workers`; the default works alone.
    progress
        Called with what is being done, how much of it is done, and how much there is.

    Raises
    ------
    ValueError
        Wrong input, said with file and remedy. Before work on cells began nothing is left behind;
        after that the work is kept, and the same command continues it.
    OSError
        A full disk, a killed worker, a damaged file of the work.
    """
    columns = carried_columns(specs)
    check_options(options, columns)
    with locked_workspace(out, shards_format.MANIFEST_NAME) as work:
        survey = survey_sources(specs, work, vocabulary, options, workers, progress)
        check_disk(work, 2 * survey.estimated_bytes(columns))
        jobs = encode_jobs(survey, work, options, with_tokens=True)
        _remove_stale(work, jobs)
        records = encode_all(jobs, workers, progress)
        decisions = decide_all(work, jobs, records, survey, options, progress)
        return _write_all(work, decisions, survey, options, workers, progress)


def check_options(options: PrepareOptions, columns: tuple[str, ...]) -> None:
    """Raise ValueError for settings that cannot be."""
    if not 0 < options.heldout_share < 1:
        raise ValueError(f"--heldout {options.heldout_share}: must lie between 0 and 1")
    if options.heldout_by not in ("cell", "dataset", *columns):
        raise ValueError(
            f"--heldout-by {options.heldout_by}: must be cell, dataset, or a column given as --obs"
        )
    reserved = RESERVED_COLUMNS & set(columns)
    if reserved:
        raise ValueError(f"--obs {sorted(reserved)}: these names are used by the shards themselves")
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


@dataclass(frozen=True)
class SourceSurvey:
    """What a source is before its cells are read."""

    spec: SourceSpec
    signature: str
    kind: str
    num_cells: int
    stretches: list[tuple[int, int]]
    genes: GeneReport | None
    group_sizes: Counter[str]


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
        token_bytes = 2 if self.vocabulary.num_tokens <= 1 << 16 else 4
        longest = self.vocabulary.max_length * token_bytes
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
    if options.annotation:
        read_annotation(options.annotation)
    if vocabulary is None:
        vocabulary = build_vocabulary(
            specs, work, options.vocabulary_min_cells, options.max_length, options.annotation,
            workers, progress,
        )  # fmt: skip
    surveys = []
    for number, spec in enumerate(specs):
        progress("opening", number, len(specs))
        surveys.append(survey_source(spec, work, vocabulary, options))
    return Survey(surveys, vocabulary, carried_columns(specs))


def survey_source(
    spec: SourceSpec, work: Path, vocabulary: Vocabulary, options: PrepareOptions
) -> SourceSurvey:
    """Open one source and check its genes and columns."""
    annotation = read_annotation(options.annotation) if options.annotation else None
    source: Source = open_source(spec, work, annotation)
    genes = None
    if isinstance(source, CountSource):
        source.column_tokens(vocabulary, options.min_overlap)
        genes = source.gene_report(vocabulary)
    by = options.heldout_by
    sizes = Counter() if by == "cell" else source.group_sizes(by)
    return SourceSurvey(
        spec, spec.signature(), source.kind, source.num_cells,
        source.stretches(CHUNK_CELLS), genes, sizes,
    )  # fmt: skip


def choose_heldout_groups(survey: Survey, options: PrepareOptions) -> tuple[str, ...]:
    """Return the groups that are held out: in hashed order, until the share is reached."""
    by = options.heldout_by
    if by == "cell":
        return ()
    sizes: Counter[str] = Counter()
    for source in survey.sources:
        sizes.update(source.group_sizes)
    names = sorted(sizes)
    if len(names) < 2:
        raise ValueError(f"--heldout-by {by}: there is only one, {names}; nothing to hold out")
    wanted = options.heldout_share * sum(sizes.values())
    chosen: list[str] = []
    for number in np.argsort(hash_strings(stream_key(options.seed, "heldout"), names)):
        if sum(sizes[n] for n in chosen) >= wanted or len(chosen) == len(names) - 1:
            break
        chosen.append(names[number])
    return tuple(sorted(chosen))


def encode_jobs(
    survey: Survey, work: Path, options: PrepareOptions, with_tokens: bool
) -> list[EncodeJob]:
    """Return the jobs of pass 1, in the order of the sources."""
    path = work / f"vocabulary-{survey.vocabulary.sha256[:24]}.json"
    if not path.exists():
        encode.write_text(path, survey.vocabulary.to_json() + "\n")
    settings = EncodeSettings(
        seed=options.seed,
        min_genes=options.min_genes,
        min_overlap=options.min_overlap,
        heldout_share=options.heldout_share,
        heldout_by=options.heldout_by,
        heldout_groups=choose_heldout_groups(survey, options),
        columns=survey.columns,
        with_tokens=with_tokens,
        with_content=options.dedup,
        annotation_sha256=file_sha256(options.annotation) if options.annotation else None,
        chunk_cells=CHUNK_CELLS,
    )
    return [
        EncodeJob(
            work, source.spec, source.signature, start, stop, path, survey.vocabulary.sha256,
            options.annotation, settings,
        )
        for source in survey.sources
        for start, stop in source.stretches
    ]  # fmt: skip


def _remove_stale(work: Path, jobs: list[EncodeJob]) -> None:
    keep = {j.vocabulary.name for j in jobs} | {shards_format.MANIFEST_NAME}
    for job in jobs:
        record = encode.finished_record(job)
        if record is not None:
            keep.add(job.record_path.name)
            for name, _, _ in record.chunks:
                keep |= {name, encode.tokens_path(Path(name)).name}
    prefixes = ("written-", "plan-", "decisions-", "medians-", *(f"{s}-L" for s in SPLITS))
    keep |= {p.name for p in work.iterdir() if p.name.startswith(prefixes)}
    remove_stale(work, keep)


def encode_all(jobs: list[EncodeJob], workers: Workers, progress: Progress) -> list[EncodeRecord]:
    """Run pass 1 for all jobs that are not finished; return the records of all."""
    records = [encode.finished_record(j) for j in jobs]
    total = sum(j.stop - j.start for j in jobs)
    open_jobs = [n for n, r in enumerate(records) if r is None]
    done = total - sum(jobs[n].stop - jobs[n].start for n in open_jobs)
    progress("encoding", done, total)

    def finished(number: int, record: EncodeRecord) -> None:
        nonlocal done
        job = jobs[open_jobs[number]]
        done += job.stop - job.start
        progress("encoding", done, total)

    new = workers.run(encode_stretch, [jobs[n] for n in open_jobs], finished)
    for number, record in zip(open_jobs, new, strict=True):
        records[number] = record
    return [r for r in records if r is not None]


@dataclass(frozen=True)
class Decisions:
    """What becomes of the cells of all chunk files."""

    chunks: list[Chunk]
    codes: str
    moments: dict[str, DatasetMoments]
    reports: list[decide.DatasetReport]
    counts_in_vocabulary: list[float | None]


def decide_all(
    work: Path,
    jobs: list[EncodeJob],
    records: list[EncodeRecord],
    survey: Survey,
    options: PrepareOptions,
    progress: Progress,
) -> Decisions:
    """Apply the filters that need the whole corpus; return what became of the cells."""
    progress("filtering", 0, 1)
    number_of = {s.spec: n for n, s in enumerate(survey.sources)}
    chunks: list[Chunk] = []
    inside, total = np.zeros(len(number_of)), np.zeros(len(number_of))
    first = 0
    for job, record in zip(jobs, records, strict=True):
        number = number_of[job.spec]
        inside[number] += record.counts_in_vocabulary
        total[number] += record.counts
        for name, cells, _ in record.chunks:
            chunks.append(Chunk(name, number, cells, first))
            first += cells
    moments = merge_moments(r.moments for r in records)
    codes = decide.decide_reasons(
        work, chunks, moments, options.max_sd_counts, options.max_sd_mito, options.dedup,
        options.memory_gib,
    )  # fmt: skip
    names = [s.spec.name for s in survey.sources]
    slots = survey.vocabulary.max_length - (2 if survey.vocabulary.has_cls else 0)
    specials = survey.vocabulary.max_length - slots
    reports = decide.report_datasets(work, chunks, codes, names, slots, specials)
    shares = [i / t if t else None for i, t in zip(inside.tolist(), total.tolist(), strict=True)]
    return Decisions(chunks, codes, moments, reports, shares)


def plan_shards(
    work: Path, decisions: Decisions, survey: Survey, options: PrepareOptions
) -> tuple[WritePlan, np.ndarray]:
    """Return the plan of pass 2 and the length histogram int64 [splits, max_length + 1].

    Raises
    ------
    ValueError
        One of the splits would be empty.
    """
    length = survey.vocabulary.max_length
    histogram = decide.length_histogram(work, decisions.chunks, decisions.codes, length)
    for split, cells in zip(SPLITS, histogram.sum(axis=1).tolist(), strict=True):
        if cells == 0:
            raise ValueError(
                f"no cell is left for the {split} split ({survey.num_cells} read, "
                f"{int(histogram.sum())} kept): give more cells, or another --heldout share"
            )
    plan = decide.plan_writing(
        work, decisions.chunks, decisions.codes, histogram, length, options.shard_mib,
        options.block_cells, list(survey.columns), survey.vocabulary.num_tokens,
    )  # fmt: skip
    return plan, histogram


def _write_all(
    work: Path,
    decisions: Decisions,
    survey: Survey,
    options: PrepareOptions,
    workers: Workers,
    progress: Progress,
) -> dict:
    plan, histogram = plan_shards(work, decisions, survey, options)
    plan_name = write.save_plan(work, plan)
    jobs = [
        write.WriteJob(work, plan_name, split, number, options.memory_gib)
        for split, numbers in enumerate(plan.windows)
        for number in range(len(numbers))
    ]
    records = write_jobs(jobs, workers, progress)
    manifest = _write_manifest(work, records, plan, histogram, decisions, survey, options)
    names = [s["name"] for s in manifest["shards"]]
    force_to_disk([work / name for name in names])
    names += [
        shards_format.INDEX_NAME, shards_format.VOCABULARY_NAME, shards_format.STATISTICS_NAME,
    ]  # fmt: skip
    move_up(work, names, shards_format.MANIFEST_NAME)
    return manifest


def write_jobs(
    jobs: list[write.WriteJob], workers: Workers, progress: Progress
) -> list[write.WriteRecord]:
    """Run pass 2 for all jobs that are not finished; return the records of all."""
    records = [write.finished_writing(j) for j in jobs]
    open_jobs = [n for n, r in enumerate(records) if r is None]
    done = len(jobs) - len(open_jobs)
    progress("writing", done, len(jobs))

    def finished(number: int, record: write.WriteRecord) -> None:
        nonlocal done
        done += 1
        progress("writing", done, len(jobs))

    new = workers.run(write.write_tars, [jobs[n] for n in open_jobs], finished)
    for number, record in zip(open_jobs, new, strict=True):
        records[number] = record
    return [r for r in records if r is not None]


def _write_manifest(
    work: Path,
    records: list[write.WriteRecord],
    plan: WritePlan,
    histogram: np.ndarray,
    decisions: Decisions,
    survey: Survey,
    options: PrepareOptions,
) -> dict:
    """Write vocabulary, index, statistics and manifest beside the tars; return the manifest."""
    survey.vocabulary.save(work / shards_format.VOCABULARY_NAME)
    pairs = [p for r in records for p in zip(r.shards, r.members, strict=True)]
    pairs.sort(key=lambda p: (SPLITS.index(p[0]["split"]), p[0]["bucket_length"], p[0]["name"]))
    shards, members = [p[0] for p in pairs], [p[1] for p in pairs]
    shards_format.write_index(work / shards_format.INDEX_NAME, shards, members)
    per_token = np.sum([r.cells_per_token for r in records], axis=0).tolist()
    statistics = {"cells_by_length": histogram.tolist(), "cells_by_token": per_token}
    encode.write_text(work / shards_format.STATISTICS_NAME, json.dumps(statistics) + "\n")
    settings = asdict(replace(options, annotation=None))
    # How the work was cut never shows in its result: out of the record. So are paths.
    settings.pop("memory_gib")
    settings.pop("annotation")
    settings["annotation_sha256"] = file_sha256(options.annotation) if options.annotation else None
    manifest = {
        "format": shards_format.SHARD_FORMAT,
        "vocabulary_sha256": survey.vocabulary.sha256,
        "num_tokens": survey.vocabulary.num_tokens,
        "max_length": survey.vocabulary.max_length,
        "index_sha256": file_sha256(work / shards_format.INDEX_NAME),
        "statistics_sha256": file_sha256(work / shards_format.STATISTICS_NAME),
        "buckets": shards_format.summarise_buckets(shards, members),
        "shards": shards,
        "columns": list(survey.columns),
        "settings": settings,
        "sources": source_reports(survey, decisions),
        "datasets": dataset_reports(decisions, options),
    }
    manifest["fingerprint"] = shards_format.fingerprint(manifest)
    text = json.dumps(manifest, indent=1, sort_keys=True)
    encode.write_text(work / shards_format.MANIFEST_NAME, text + "\n")
    return json.loads(text)


def source_reports(survey: Survey, decisions: Decisions) -> list[dict]:
    """Return one entry per source: what it is, how it was read, what became of its cells."""
    entries = []
    for source, share in zip(survey.sources, decisions.counts_in_vocabulary, strict=True):
        mine = [r for r in decisions.reports if r.source == source.spec.name]
        rejected: Counter[str] = Counter()
        for report in mine:
            rejected.update(report.rejected)
        entries.append(
            {
                "name": source.spec.name,
                "dataset": source.spec.dataset,
                "kind": source.kind,
                "options": asdict(source.spec.options),
                "cells_read": sum(r.cells_read for r in mine),
                "cells_kept": sum(r.cells_kept for r in mine),
                "tokens": sum(r.tokens for r in mine),
                "truncated": sum(r.truncated for r in mine),
                "rejected": dict(rejected),
                "genes": asdict(source.genes) if source.genes else None,
                "counts_in_vocabulary": share,
            }
        )
    return entries


def dataset_reports(decisions: Decisions, options: PrepareOptions) -> list[dict]:
    """Return one entry per data set: cells, rejections, and the limits of the quality filters."""
    entries: dict[str, dict] = {}
    for report in decisions.reports:
        entry = entries.setdefault(
            report.dataset,
            {"name": report.dataset, "cells_read": 0, "cells_kept": 0, "rejected": {}},
        )
        entry["cells_read"] += report.cells_read
        entry["cells_kept"] += report.cells_kept
        entry["rejected"] = dict(Counter(entry["rejected"]) + Counter(report.rejected))
    for name, entry in entries.items():
        moments = decisions.moments[name]
        entry["counts_interval"] = _interval(moments.totals, options.max_sd_counts)
        entry["mito_interval"] = _interval(moments.mitochondrial, options.max_sd_mito)
    return list(entries.values())


def _interval(moments, deviations: float) -> list[float] | None:
    low, high = moments.interval(deviations)
    return [low, high] if np.isfinite(low) else None
