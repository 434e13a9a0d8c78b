"""Checks a shard folder against its manifest, and rebuilds damaged tars from the sources.

`verify` returns a list of problems; `repair` takes it, encodes the sources again and replaces the
damaged tars.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from data_prep.files import file_sha256
from data_prep.genes.vocabulary import CLS, EOS, Vocabulary
from data_prep.prepare import write_pass
from data_prep.prepare.manifest import record_sha256
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import decide_all, encode_all, plan_shards, write_jobs
from data_prep.prepare.work_list import encode_jobs, survey_sources
from data_prep.running.workers import Progress, Workers, counter
from data_prep.shards.format import (
    INDEX_NAME,
    MANIFEST_NAME,
    SHARD_FORMAT,
    SPLITS,
    STATISTICS_NAME,
    fingerprint,
)
from data_prep.shards.reader import ShardSet
from data_prep.shards.writer import summarise_buckets
from data_prep.sources.corpus_list import expand_corpus
from data_prep.sources.source_spec import SourceOptions, SourceSpec

_TAR_HEADER = 512
_WORK = ".repair"


@dataclass(frozen=True)
class Problem:
    """One problem of a shard folder; `shard` is the tar to rebuild, '' if it is not in a tar."""

    shard: str
    message: str


def verify(folder: Path, workers: Workers, progress: Progress) -> list[Problem]:
    """Check all checksums, counts and bucket bounds of a shard folder; return the problems.

    Raises
    ------
    ValueError
        The manifest, the index or the vocabulary is missing or damaged; without these files nothing
        can be checked.
    """
    shards = ShardSet(folder)
    names = [s["name"] for s in shards.manifest["shards"]]
    try:
        problems = _verify_records(shards)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / MANIFEST_NAME}: is incomplete or edited ({error!r})"
        ) from error
    shown = counter(progress, "verifying", [1] * len(names))
    task = partial(_verify_tar, folder, file_sha256(folder / MANIFEST_NAME))
    found = workers.run(task, range(len(names)), shown)
    return problems + [p for inside in found for p in inside]


def _verify_records(shards: ShardSet) -> list[Problem]:
    """Return the problems of the manifest itself, and of manifest and index together."""
    folder, manifest = shards.folder, shards.manifest
    problems = []
    if fingerprint(manifest) != manifest["fingerprint"]:
        problems.append("its fingerprint does not follow from its content: it was edited")
    statistics = folder / STATISTICS_NAME
    wanted = manifest.get("statistics_sha256")
    if wanted and not (statistics.exists() and file_sha256(statistics) == wanted):
        problems.append(f"{STATISTICS_NAME} is missing or damaged (nothing trains on it)")
    wanted = manifest.get("record_sha256")
    if wanted and record_sha256(manifest) != wanted:
        problems.append("its settings, columns or reports were edited: record_sha256 is another")
    block_cells = manifest["settings"].get("block_cells")
    largest = int(shards.index["cells"].max()) if len(shards.index["cells"]) else 0
    if not isinstance(block_cells, int) or largest > block_cells:
        problems.append(f"settings.block_cells is {block_cells}, a block holds {largest} cells")
    counts = np.bincount(shards.index["shard"], minlength=len(manifest["shards"]))
    members = [[{}] * int(n) for n in counts]
    if summarise_buckets(manifest["shards"], members) != manifest["buckets"]:
        problems.append(f"buckets do not add up from shards and {INDEX_NAME}")
    kept = sum(s["cells_kept"] for s in manifest["sources"])
    indexed = int(shards.index["cells"].sum())
    if not kept == indexed == shards.num_cells:
        problems.append(f"sources keep {kept:,} cells, the index holds {indexed:,}")
    for name in ("num_tokens", "max_length"):
        if manifest[name] != getattr(shards.vocabulary, name):
            problems.append(f"{name} is not that of the vocabulary")
    for source in [*manifest["sources"], *manifest.get("datasets", [])]:
        if source["cells_read"] != source["cells_kept"] + sum(source["rejected"].values()):
            problems.append(f"cells of {source['name']} are unaccounted for")
    return [Problem("", f"{folder / MANIFEST_NAME}: {text}") for text in problems]


@lru_cache(maxsize=1)
def _opened(folder: Path, manifest_sha256: str) -> ShardSet:  # noqa: ARG001  part of the cache key
    """Return the opened shards; a process reads their index and vocabulary once for all tars."""
    return ShardSet(folder)


def _verify_tar(folder: Path, manifest_sha256: str, number: int) -> list[Problem]:
    """Return the first problem of one tar, after checking its members and the hash of its bytes."""
    shards = _opened(folder, manifest_sha256)
    entry = shards.manifest["shards"][number]
    path = folder / entry["name"]

    def problem(text: str) -> list[Problem]:
        return [Problem(entry["name"], f"{path}: {text}")]

    if not path.is_file():
        return problem("is missing")
    if path.stat().st_size != entry["bytes"]:
        return problem(f"has {path.stat().st_size:,} bytes, the manifest says {entry['bytes']:,}")
    digest = hashlib.sha256()
    rows = np.flatnonzero(shards.index["shard"] == number)
    same_split = [n for n in shards.bucket_lengths(entry["split"]) if n < entry["bucket_length"]]
    all_lower = {b["length"] for b in shards.manifest["buckets"]} & set(
        range(entry["bucket_length"])
    )
    shortest = max([*same_split, *all_lower], default=0) + 1
    last_byte = 0
    with path.open("rb") as file:
        for row in rows:
            start, size = int(shards.index["offset"][row]), int(shards.index["bytes"][row])
            between = file.read(start - last_byte)
            payload = file.read(size)
            digest.update(between)
            digest.update(payload)
            wrong = _member_problem(between[-_TAR_HEADER:], payload, shards, int(row), shortest)
            if wrong:
                return problem(f"member at byte {start - _TAR_HEADER:,} {wrong}")
            last_byte = start + size
        digest.update(file.read())
    if digest.hexdigest() != entry["sha256"]:
        return problem(f"its SHA-256 is wrong, though its {len(rows)} members are right")
    return []


def _member_problem(
    header: bytes, payload: bytes, shards: ShardSet, row: int, shortest: int
) -> str | None:
    """Return a member's problem as text that continues "member at byte N"; None if none."""
    index = shards.index
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except tarfile.HeaderError as error:
        return f"has a damaged tar header ({error})"
    name = f"({info.name})"
    if info.size != len(payload):
        return f"{name} is {info.size} bytes long, the index says {len(payload)}"
    if zlib.crc32(payload) != int(index["crc32"][row]):
        return f"{name} is damaged: its checksum is wrong"
    batch = pa.ipc.open_stream(payload).read_next_batch()
    lists = batch.column("input_ids")
    lengths = np.diff(np.asarray(lists.offsets))
    tokens = np.asarray(lists.values)
    if len(lengths) != index["cells"][row] or len(tokens) != index["tokens"][row]:
        return f"{name} holds {len(lengths)} cells and {len(tokens)} tokens, the index says others"
    if lengths.min() < shortest or lengths.max() > index["bucket_length"][row]:
        return (
            f"{name} holds cells of {lengths.min()} to {lengths.max()} tokens, its bucket is "
            f"{shortest} to {index['bucket_length'][row]}"
        )
    wrong = _special_problem(tokens, np.asarray(lists.offsets), shards.vocabulary)
    if wrong:
        return f"{name} {wrong}"
    wanted = ["input_ids", "cell_id", "dataset", *shards.manifest["columns"]]
    if batch.schema.names != wanted:
        return f"{name} has the columns {batch.schema.names}, the manifest says {wanted}"
    if tokens.max() >= shards.vocabulary.num_tokens:
        return f"{name} holds token {tokens.max()} of {shards.vocabulary.num_tokens}"
    return None


def _special_problem(tokens: np.ndarray, offsets: np.ndarray, vocabulary: Vocabulary) -> str | None:
    """Return the problem of a block's special tokens, which may only frame a cell; None if none."""
    special = tokens < vocabulary.first_gene_token
    if vocabulary.has_cls:
        first, last = offsets[:-1], offsets[1:] - 1
        framed = (tokens[first] == vocabulary.special_tokens[CLS]) & (
            tokens[last] == vocabulary.special_tokens[EOS]
        )
        if not framed.all():
            return f"holds {int((~framed).sum())} cells without {CLS} and {EOS} around them"
        special[first] = special[last] = False
    if special.any():
        names = {number: name for name, number in vocabulary.special_tokens.items()}
        return f"holds {names[int(tokens[special][0])]} inside a cell ({int(special.sum())} times)"
    return None


def repair(
    folder: Path,
    problems: list[Problem],
    sources: list[str],
    annotation: Path | None,
    memory_gib: float,
    workers: Workers,
    progress: Progress,
) -> list[Problem]:
    """Rebuild the damaged tars from the sources; return the problems that remain.

    The sources are read and encoded again with the settings in the manifest, and only the damaged
    tars are written. A rebuilt tar replaces the damaged one only if it has the recorded hash.

    Raises
    ------
    ValueError
        The sources or the annotation table are not those that the manifest names, or the shards
        have an older format.
    """
    damaged = {p.shard for p in problems if p.shard}
    shards = ShardSet(folder)
    manifest = shards.manifest
    if manifest["format"] != SHARD_FORMAT:
        raise ValueError(
            f"{folder}: format {manifest['format']} does not say how its sources were read: "
            "prepare them again"
        )
    settings: dict[str, Any] = dict(manifest["settings"])
    wanted = settings.pop("annotation_sha256", None)
    settings.setdefault("same_side", False)
    if wanted != (file_sha256(annotation) if annotation else None):
        raise ValueError(f"{folder}: was made with another --annotation table; give that one")
    options = PrepareOptions(**settings | {"memory_gib": memory_gib, "annotation": annotation})
    specs = _recorded_specs(manifest, expand_corpus(sources, SourceOptions()))
    work = folder / _WORK
    work.mkdir(exist_ok=True)
    try:
        survey = survey_sources(specs, work, shards.vocabulary, options, workers, progress)
    except ValueError:
        shutil.rmtree(work)
        raise
    jobs = encode_jobs(survey, work, options, with_tokens=True)
    records = encode_all(jobs, workers, progress)
    decisions = decide_all(work, jobs, records, survey, options, progress)
    plan, _ = plan_shards(work, decisions, survey, options)
    plan_name = write_pass.save_plan(work, plan)
    # The name of a tar ends with its number. One job writes the tars of this number for all buckets
    # of a split.
    numbers = {(SPLITS.index(n.split("-")[0]), int(Path(n).stem.split("-")[-1])) for n in damaged}
    to_write = [
        write_pass.WriteJob(work, plan_name, split, number, memory_gib)
        for split, number in sorted(numbers)
        if number < len(plan.windows[split])  # fewer cells may need fewer tars
    ]
    write_jobs(to_write, workers, progress)
    rebuilt = {path.name: path for job in to_write for path in job.folder.glob("*.tar")}
    left = [p for p in problems if not p.shard]
    for entry in manifest["shards"]:
        if entry["name"] not in damaged:
            continue
        path = rebuilt.get(entry["name"])
        if path is not None and file_sha256(path) == entry["sha256"]:
            path.replace(folder / entry["name"])
        else:
            text = "the sources give other bytes than recorded; they were changed since"
            left.append(Problem(entry["name"], f"{folder / entry['name']}: not repaired: {text}"))
    shutil.rmtree(work)
    return left


def _recorded_specs(manifest: dict, given: list[SourceSpec]) -> list[SourceSpec]:
    """Return the given sources with the order, data sets, splits and options of the manifest."""
    by_name = {s.name: s for s in given}
    missing = [s["name"] for s in manifest["sources"] if s["name"] not in by_name]
    if missing:
        raise ValueError(
            f"--repair: sources {missing} are missing; give all {len(manifest['sources'])} sources "
            f"that the shards were made of, found {sorted(by_name)}"
        )
    specs = []
    for entry in manifest["sources"]:
        options: dict[str, Any] = entry["options"] | {"columns": tuple(entry["options"]["columns"])}
        specs.append(
            replace(
                by_name[entry["name"]],
                dataset=entry["dataset"],
                split=entry.get("split"),
                options=SourceOptions(**options),
            )
        )
    return specs
