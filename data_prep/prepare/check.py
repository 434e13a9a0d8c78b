"""What would `prepare` do with these sources? Everything is read; all problems are collected."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_prep.encoding.encode_pass import EncodeJob, EncodeRecord, encode_stretch
from data_prep.genes.annotation import read_annotation
from data_prep.genes.vocabulary import Vocabulary
from data_prep.prepare.manifest import dataset_reports, source_reports, warnings_of
from data_prep.prepare.options import PrepareOptions, check_options
from data_prep.prepare.run import KnownSoFar, decide_all
from data_prep.prepare.work_list import (
    SourceSurvey,
    Survey,
    encode_jobs,
    survey_source,
)
from data_prep.running.workers import Progress, Workers, counter
from data_prep.sources.corpus_list import carried_columns
from data_prep.sources.source_spec import SourceSpec


@dataclass(frozen=True)
class CheckResult:
    """Entries of a manifest for the sources that can be prepared, and what is wrong with others."""

    sources: list[dict]
    datasets: list[dict]
    problems: list[str]
    warnings: list[str]
    same_cells: dict


def check_sources(
    specs: list[SourceSpec],
    work: Path,
    vocabulary: Vocabulary,
    options: PrepareOptions,
    workers: Workers,
    progress: Progress,
) -> CheckResult:
    """Run the checks and the filters of `prepare` over the sources, without writing shards.

    Parameters
    ----------
    work
        Folder for temporary files, about 100 bytes a cell.
    """
    check_options(options, carried_columns(specs))
    annotation = read_annotation(options.annotation) if options.annotation else None
    problems: dict[str, str] = {}
    surveys: list[SourceSurvey] = []
    for number, spec in enumerate(specs):
        progress("opening", number, len(specs))
        try:
            surveys.append(survey_source(spec, work, vocabulary, options, annotation))
        except ValueError as error:
            problems[spec.path] = str(error)
    survey = Survey(surveys, vocabulary, carried_columns(specs))
    jobs = encode_jobs(survey, work, options, with_tokens=False)
    shown = counter(progress, "checking", [j.stop - j.start for j in jobs])
    outcomes = workers.run(_outcome, jobs, shown)
    known = KnownSoFar(jobs)
    for job, outcome in zip(jobs, outcomes, strict=True):
        if isinstance(outcome, str):
            problems.setdefault(job.spec.path, outcome)
            continue
        try:
            known.add(job, outcome)
        except ValueError as error:
            problems.setdefault(job.spec.path, str(error))
    good = [s for s in surveys if s.spec.path not in problems]
    if not good:
        return CheckResult([], [], list(problems.values()), [], {})
    survey = Survey(good, vocabulary, survey.columns)
    pairs = [
        (job, outcome)
        for job, outcome in zip(jobs, outcomes, strict=True)
        if job.spec.path not in problems and isinstance(outcome, EncodeRecord)
    ]
    decisions = decide_all(
        work, [p[0] for p in pairs], [p[1] for p in pairs], survey, options, progress
    )
    reports = source_reports(survey, decisions)
    for report, source in zip(reports, survey.sources, strict=True):
        if not report["cells_kept"]:
            problems[source.spec.path] = f"{source.spec.path}: no cell would be kept"
    return CheckResult(
        reports, dataset_reports(decisions, options), list(problems.values()),
        warnings_of(survey, decisions), decisions.same.to_json(),
    )  # fmt: skip


def _outcome(job: EncodeJob) -> EncodeRecord | str:
    """Return the record of a stretch, or what is wrong with it."""
    try:
        return encode_stretch(job)
    except ValueError as error:
        return str(error)
