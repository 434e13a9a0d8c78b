"""Turns sources into shards, in two passes of bounded memory, on any number of processes.

`prepare` is the entry. It locks the output folder (`workspace`), opens every source once and makes
a list of the work (`work_list`), and then runs these steps:

1. `encode_all`: every stretch of every source is read, checked, encoded and written to chunk files
   (`data_prep.encoding.encode_pass`), in any order, by whichever process is free.
2. `decide_all`, `plan_shards`: one process reads small columns of the chunk files and decides which
   cells are kept and into which tar each cell goes (`data_prep.prepare.lay_out_tars`).
3. `write_jobs`: every tar is written from the chunk files (`data_prep.prepare.write_pass`), again
   by whichever process is free.
4. `data_prep.prepare.manifest` writes the record of the run; all files are moved to their place.

All cells are in one global random order. The shards depend on the sources and the settings, but not
on the number of processes, the memory, or the order in which work was done. The result of each
finished job is on disk under a name that contains a hash of what it was made of, so a killed run
continues.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from data_prep.encoding import encode_pass
from data_prep.encoding.chunk_files import Chunk, tokens_path
from data_prep.encoding.encode_pass import EncodeJob, EncodeRecord, encode_stretch
from data_prep.encoding.filters import merge_moments
from data_prep.encoding.known_share import KnownCounts, refuse_unknown
from data_prep.files import file_sha256, force_to_disk
from data_prep.genes.vocabulary import Vocabulary
from data_prep.prepare import lay_out_tars, write_pass
from data_prep.prepare.lay_out_tars import WritePlan
from data_prep.prepare.manifest import Decisions, write_manifest
from data_prep.prepare.options import PrepareOptions, check_options
from data_prep.prepare.work_list import Survey, encode_jobs, survey_sources
from data_prep.prepare.workspace import (
    check_disk,
    complete_already,
    full_disk_named,
    locked_workspace,
    move_up,
    remove_stale,
    used_bytes,
)
from data_prep.running.workers import SERIAL, Progress, Workers, counter
from data_prep.shards.format import (
    INDEX_NAME,
    MANIFEST_NAME,
    SPLITS,
    STATISTICS_NAME,
    VOCABULARY_NAME,
)
from data_prep.sources.corpus_list import carried_columns
from data_prep.sources.open_source import row_copy_name
from data_prep.sources.source_spec import SourceSpec

logger = logging.getLogger(__name__)

# Memory of libraries, the tables of a vocabulary and a block of cells: 0.46 to 0.50 GiB measured.
PROGRAM_GIB = 0.5


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
        Count matrices and tokenised corpora (see `data_prep.sources.corpus_list.expand_corpus`).
    out
        New or empty folder, or the folder of an unfinished run, whose work is continued. The
        manifest is the last file that is written.
    vocabulary
        The vocabulary to encode with; None: one is built from the count matrices.
    workers
        Workers of `data_prep.running.workers.open_workers`; by default this process works alone.
    progress
        Function that is called with the name of the present step, the amount of work done, and the
        total amount.

    Raises
    ------
    ValueError
        The input is wrong; the message names the file and a remedy. Finished work is kept, and the
        same command continues it; if there is none yet, nothing is left in the folder.
    OSError
        The disk is full, a worker was killed, or a file of the work is damaged.
    """
    columns = carried_columns(specs)
    check_options(options, columns)
    if options.memory_gib < PROGRAM_GIB:
        logger.warning(
            "--memory %g: bounds the cells that are held while tars are written; the program and "
            "the blocks that it reads take about %g GiB beside it, whatever it is",
            options.memory_gib, PROGRAM_GIB,
        )  # fmt: skip
    request = _request(specs, vocabulary, options)
    if complete_already(out, MANIFEST_NAME, request):
        # An earlier run was killed when all but its clean-up was done; that has been done now.
        return json.loads((out / MANIFEST_NAME).read_text())
    with locked_workspace(out, MANIFEST_NAME, request) as work:
        survey = survey_sources(specs, work, vocabulary, options, workers, progress)
        needed = 2 * survey.estimated_bytes(columns) - used_bytes(work)
        check_disk(work, needed)
        with full_disk_named(work, 2 * survey.estimated_bytes(columns)):
            return _encode_and_write(work, survey, options, workers, progress)


def _encode_and_write(
    work: Path, survey: Survey, options: PrepareOptions, workers: Workers, progress: Progress
) -> dict:
    jobs = encode_jobs(survey, work, options, with_tokens=True)
    finished = [encode_pass.finished_record(j) for j in jobs]
    _remove_stale(work, jobs, finished)
    records = encode_all(jobs, workers, progress, finished)
    decisions = decide_all(work, jobs, records, survey, options, progress)
    return _write_all(work, decisions, survey, options, workers, progress)


def _request(
    specs: list[SourceSpec], vocabulary: Vocabulary | None, options: PrepareOptions
) -> str:
    """Return a hash of the arguments of a run, as far as they decide the result."""
    settings = asdict(replace(options, annotation=None, memory_gib=0.0))
    table = file_sha256(options.annotation) if options.annotation else None
    made_of = vocabulary.file_text if vocabulary else None
    text = json.dumps([[s.signature() for s in specs], made_of, settings, table])
    return hashlib.sha256(text.encode()).hexdigest()


def _remove_stale(work: Path, jobs: list[EncodeJob], finished: list[EncodeRecord | None]) -> None:
    keep = {j.vocabulary.name for j in jobs}
    keep |= {row_copy_name(j.spec) for j in jobs}
    for job, record in zip(jobs, finished, strict=True):
        if record is not None:
            keep.add(job.record_path.name)
            for name, _, _ in record.chunks:
                keep |= {name, tokens_path(Path(name)).name}
    prefixes = ("tars-", "plan-", "decisions-", "medians-")
    keep |= {p.name for p in work.iterdir() if p.name.startswith(prefixes)}
    removed = remove_stale(work, keep)
    chunks = sum(name.endswith(".tokens") for name in removed)
    if chunks:
        logger.warning("%d chunks of an earlier run do not fit and are removed", chunks)


def encode_all(
    jobs: list[EncodeJob],
    workers: Workers,
    progress: Progress,
    finished: list[EncodeRecord | None] | None = None,
) -> list[EncodeRecord]:
    """Run pass 1 for all unfinished jobs; return the records of all jobs.

    Parameters
    ----------
    finished
        For each job, the record that an earlier run left, or None; if the whole argument is None,
        the records are searched for.
    """
    records = finished or [encode_pass.finished_record(j) for j in jobs]
    open_jobs = [n for n, r in enumerate(records) if r is None]
    sizes = [jobs[n].stop - jobs[n].start for n in open_jobs]
    done = sum(j.stop - j.start for j in jobs) - sum(sizes)
    shown = counter(progress, "encoding", sizes, done)
    known = KnownSoFar(jobs)
    for job, record in zip(jobs, records, strict=True):
        if record is not None:
            known.add(job, record)
    with contextlib.closing(workers.each(encode_stretch, [jobs[n] for n in open_jobs])) as ended:
        for number, record in ended:
            records[open_jobs[number]] = record
            known.add(jobs[open_jobs[number]], record)
            shown(number)
    return [r for r in records if r is not None]


class KnownSoFar:
    """Refuses a source with too many counts in unknown genes, as soon as all of it was read."""

    def __init__(self, jobs: list[EncodeJob]) -> None:
        self._left = Counter(job.spec for job in jobs)
        self._counts: dict[SourceSpec, KnownCounts] = {}

    def add(self, job: EncodeJob, record: EncodeRecord) -> None:
        """Add the counts of an encoded stretch.

        Raises
        ------
        ValueError
            The stretch was the last one of its source, and too few of a data set's counts are in
            genes of the vocabulary.
        """
        spec = job.spec
        self._counts[spec] = self._counts.get(spec, KnownCounts()).merge(record.known)
        self._left[spec] -= 1
        if not self._left[spec]:
            advice = "Lower it only if this is meant"
            refuse_unknown(spec.path, self._counts[spec], job.settings.min_overlap, advice)


def decide_all(
    work: Path,
    jobs: list[EncodeJob],
    records: list[EncodeRecord],
    survey: Survey,
    options: PrepareOptions,
    progress: Progress,
) -> Decisions:
    """Apply the filters that need the whole corpus, and return the decisions about all cells."""
    progress("filtering", 0, 1)
    number_of = {s.spec: n for n, s in enumerate(survey.sources)}
    chunks: list[Chunk] = []
    known = [KnownCounts() for _ in number_of]
    fractional = np.zeros((len(number_of), 2), dtype=np.int64)
    first = 0
    for job, record in zip(jobs, records, strict=True):
        number = number_of[job.spec]
        known[number] = known[number].merge(record.known)
        fractional[number] += record.fractional
        for name, cells, _ in record.chunks:
            chunks.append(Chunk(name, number, cells, first))
            first += cells
    moments = merge_moments(r.moments for r in records)
    codes, same = lay_out_tars.decide_reasons(
        work, chunks, moments, [s.spec for s in survey.sources], options
    )
    names = [s.spec.name for s in survey.sources]
    slots = survey.vocabulary.max_length - (2 if survey.vocabulary.has_cls else 0)
    specials = survey.vocabulary.max_length - slots
    reports = lay_out_tars.report_datasets(work, chunks, codes, names, slots, specials)
    fractions = [int(n) / int(of) if of else None for n, of in fractional]
    return Decisions(chunks, codes, moments, reports, known, same, fractions)


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
    histogram = lay_out_tars.length_histogram(work, decisions.chunks, decisions.codes, length)
    for split, cells in zip(SPLITS, histogram.sum(axis=1).tolist(), strict=True):
        # With --heldout 0 the held-out split is meant to be empty.
        if cells == 0 and (split == "train" or options.heldout_share > 0):
            raise ValueError(
                f"no cell is left for the {split} split ({survey.num_cells} read, "
                f"{int(histogram.sum())} kept): give more cells, or another --heldout share"
            )
    plan = lay_out_tars.plan_writing(
        work, decisions.chunks, decisions.codes, histogram, survey.vocabulary,
        list(survey.columns), options,
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
    plan_name = write_pass.save_plan(work, plan)
    jobs = [
        write_pass.WriteJob(work, plan_name, split, number, options.memory_gib)
        for split, numbers in enumerate(plan.windows)
        for number in range(len(numbers))
    ]
    records = write_jobs(jobs, workers, progress)
    folder = jobs[0].folder
    manifest = write_manifest(folder, records, histogram, decisions, survey, options)
    names = [s["name"] for s in manifest["shards"]]
    for name in names:  # most of it has been written in the background by now
        force_to_disk(folder / name)
    names += [
        INDEX_NAME, VOCABULARY_NAME, STATISTICS_NAME,
    ]  # fmt: skip
    move_up(work, folder, names, MANIFEST_NAME)
    return manifest


def write_jobs(
    jobs: list[write_pass.WriteJob], workers: Workers, progress: Progress
) -> list[write_pass.WriteRecord]:
    """Run pass 2 for all unfinished jobs; return the records of all jobs."""
    records = [write_pass.finished_writing(j) for j in jobs]
    open_jobs = [n for n, r in enumerate(records) if r is None]
    shown = counter(progress, "writing", [1] * len(open_jobs), len(jobs) - len(open_jobs))
    new = workers.run(write_pass.write_tars, [jobs[n] for n in open_jobs], shown)
    for number, record in zip(open_jobs, new, strict=True):
        records[number] = record
    return [r for r in records if r is not None]
