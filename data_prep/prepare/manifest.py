"""Writes the record of a finished run: manifest, index, statistics and vocabulary of the tars."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np

from data_prep.encoding import known_share
from data_prep.encoding.chunk_files import Chunk
from data_prep.encoding.duplicates import SameCells
from data_prep.encoding.filters import DatasetMoments, Moments
from data_prep.encoding.known_share import KnownCounts
from data_prep.files import file_sha256, write_to_disk
from data_prep.prepare import lay_out_tars, write_pass
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.work_list import Survey
from data_prep.shards.format import (
    INDEX_NAME,
    MANIFEST_NAME,
    SHARD_FORMAT,
    SPLITS,
    STATISTICS_NAME,
    VOCABULARY_NAME,
    fingerprint,
)
from data_prep.shards.writer import summarise_buckets, write_index
from data_prep.version import VERSION


@dataclass(frozen=True)
class Decisions:
    """The decisions about the cells of all chunk files, and the numbers they are based on."""

    chunks: list[Chunk]
    codes: str
    moments: dict[str, DatasetMoments]
    reports: list[lay_out_tars.DatasetReport]
    known: list[KnownCounts]
    same: SameCells
    # Share of the stored values that are no integers, for each source; None for token corpora.
    fractional_values: list[float | None]


def write_manifest(
    work: Path,
    records: list[write_pass.WriteRecord],
    histogram: np.ndarray,
    decisions: Decisions,
    survey: Survey,
    options: PrepareOptions,
) -> dict:
    """Write vocabulary, index, statistics and manifest next to the tars; return the manifest."""
    survey.vocabulary.save(work / VOCABULARY_NAME)
    pairs = [p for r in records for p in zip(r.shards, r.members, strict=True)]
    pairs.sort(key=lambda p: (SPLITS.index(p[0]["split"]), p[0]["bucket_length"], p[0]["name"]))
    shards, members = [p[0] for p in pairs], [p[1] for p in pairs]
    write_index(work / INDEX_NAME, shards, members)
    per_token = np.sum([r.cells_per_token for r in records], axis=0).tolist()
    statistics = {"cells_by_length": histogram.tolist(), "cells_by_token": per_token}
    write_to_disk(work / STATISTICS_NAME, json.dumps(statistics) + "\n")
    settings = asdict(replace(options, annotation=None))
    # The manifest does not record paths, nor the memory limit, which does not change the result.
    settings.pop("memory_gib")
    settings.pop("annotation")
    settings["annotation_sha256"] = file_sha256(options.annotation) if options.annotation else None
    manifest = {
        "format": SHARD_FORMAT,
        "geneloom": VERSION,
        "vocabulary_sha256": survey.vocabulary.sha256,
        "num_tokens": survey.vocabulary.num_tokens,
        "max_length": survey.vocabulary.max_length,
        "index_sha256": file_sha256(work / INDEX_NAME),
        "statistics_sha256": file_sha256(work / STATISTICS_NAME),
        "buckets": summarise_buckets(shards, members),
        "shards": shards,
        "columns": list(survey.columns),
        "settings": settings,
        "sources": source_reports(survey, decisions),
        "datasets": dataset_reports(decisions, options),
        "same_cells": decisions.same.to_json(),
        "warnings": warnings_of(survey, decisions),
    }
    manifest["fingerprint"] = fingerprint(manifest)
    # The hash is taken of the manifest as JSON reads it back: tuples become lists, keys text.
    manifest = json.loads(json.dumps(manifest))
    manifest["record_sha256"] = record_sha256(manifest)
    text = json.dumps(manifest, indent=1, sort_keys=True)
    write_to_disk(work / MANIFEST_NAME, text + "\n")
    return json.loads(text)


def record_sha256(manifest: dict) -> str:
    """Return the hash of the whole manifest except the entry for this hash."""
    rest = {k: v for k, v in manifest.items() if k != "record_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def source_reports(survey: Survey, decisions: Decisions) -> list[dict]:
    """Return one entry per source: its kind, the options it was read with, numbers of cells."""
    entries = []
    for source, known, fractional in zip(
        survey.sources, decisions.known, decisions.fractional_values, strict=True
    ):
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
                "split": source.spec.split,
                "filtered_out": source.filtered_out,
                "counts_in_vocabulary": known.share,
                "costliest_unknown": [
                    {"gene": gene, "share": share} for gene, share in known.costliest()
                ],
                "fractional_values": fractional,
            }
        )
    return entries


def dataset_reports(decisions: Decisions, options: PrepareOptions) -> list[dict]:
    """Return one entry per data set: numbers of cells, rejections, limits of quality filters."""
    entries: dict[str, dict] = {}
    for report in decisions.reports:
        entry = entries.setdefault(
            report.dataset,
            {"name": report.dataset, "cells_read": 0, "cells_kept": 0, "rejected": {}},
        )
        entry["cells_read"] += report.cells_read
        entry["cells_kept"] += report.cells_kept
        entry["rejected"] = dict(Counter(entry["rejected"]) + Counter(report.rejected))
    known = reduce(KnownCounts.merge, decisions.known, KnownCounts()).shares
    for name, entry in entries.items():
        entry["counts_in_vocabulary"] = known.get(name)
        moments = decisions.moments[name]
        entry["counts_interval"] = _interval(moments.totals, options.max_sd_counts)
        entry["mito_interval"] = _interval(moments.mitochondrial, options.max_sd_mito)
    return list(entries.values())


def warnings_of(survey: Survey, decisions: Decisions) -> list[str]:
    """Return warnings, in sentences, that a user should read before training on the cells."""
    said: list[str] = []
    for source, known in zip(survey.sources, decisions.known, strict=True):
        said += source.warnings
        said += known_share.warnings_of(source.spec.name, known)
    same = decisions.same
    if same.divided:
        (first, copy), (_, divided) = max(same.pairs.items(), key=lambda item: item[1][1])
        said.append(
            f"{same.divided:,} cells are held out and trained on, under other names: the same "
            f"tokens stand on both sides of the split, {divided:,} of them in '{first}' and "
            f"'{copy}'"
        )
    return said


def _interval(moments: Moments, deviations: float) -> list[float] | None:
    low, high = moments.interval(deviations)
    return [low, high] if np.isfinite(low) else None
