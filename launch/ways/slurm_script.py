"""The batch file of ``geneloom launch slurm``: what SLURM gets, and what runs on the nodes."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.files import LAUNCH_FOLDER
from launch.hosts.node import ROOT
from launch.ways.render_template import BATCH_FILE, render_bash

_PLAIN = re.compile(r"[A-Za-z0-9_.,:+@\-]+")
_TIMES = re.compile(r"(?:(?P<d>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")


@dataclass(frozen=True)
class SlurmJob:
    """What a job asks for. `tasks_per_node`: ranks; `time` as SLURM writes it, e.g. 1-00:00:00."""

    name: str
    nodes: int
    tasks_per_node: int
    time: str
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    signal_before_s: int = 120
    restarts: int = 3
    container: str | None = None
    runtime: str = "apptainer"
    mounts: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    sbatch: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RankCommand:
    """What every task runs: `first` arguments at the first start, `again` at those after it."""

    python: str
    module: str
    first: list[str]
    again: list[str]


def seconds_of(time: str) -> int:
    """Return the seconds of a time limit in one of SLURM's six notations.

    Raises
    ------
    ValueError
        It is none of them.
    """
    match = _TIMES.fullmatch(time)
    if match is None:
        raise ValueError(
            f"--time {time}: SLURM knows minutes, M:S, H:M:S, D-H, D-H:M and D-H:M:S, e.g. "
            "1-00:00:00 for a day"
        )
    parts = [int(p) for p in match["rest"].split(":")]
    if match["d"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(match["d"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 1:
        return parts[0] * 60
    hours, minutes, seconds = (0, 0, *parts)[-3:]
    return (hours * 60 + minutes) * 60 + seconds


def require_sound(job: SlurmJob) -> None:
    """Raise ValueError, with all problems, if SLURM or a shell would misread the job."""
    problems = []
    for option in ("name", "partition", "account", "qos", "mem"):
        value = getattr(job, option)
        if value is not None and not _PLAIN.fullmatch(value):
            problems.append(f"--{option} {value!r}: letters, digits and _ . , : + @ - only")
    try:
        limit_s = seconds_of(job.time)
        if limit_s < job.signal_before_s + 60:
            problems.append(
                f"--time {job.time} is {limit_s} s: with the signal {job.signal_before_s} s (and "
                "up to 60 s more, SLURM says) before its end nothing is left to train in; give "
                "more time or a smaller --signal-before"
            )
    except ValueError as error:
        problems.append(str(error))
    if job.runtime not in ("apptainer", "pyxis"):
        problems.append(f"--runtime {job.runtime}: must be apptainer or pyxis")
    if job.mounts and job.container is None:
        problems.append("--mount belongs to --container, which is not given")
    for line in job.sbatch:
        if not line.startswith("-") or "\n" in line:
            problems.append(f"--sbatch {line!r}: one option of sbatch, e.g. --sbatch=--exclusive")
        if line.startswith(("--arr", "-a")):  # sbatch takes options cut short
            problems.append(
                f"--sbatch {line}: all tasks of an array would write into one folder; "
                "launch a job for each, with a folder of its own"
            )
    if problems:
        raise ValueError("launch slurm: " + "; ".join(problems))


def render(
    job: SlurmJob, command: RankCommand, out: Path, made_by: str, template: Path = BATCH_FILE
) -> str:
    """Return the batch file.

    Parameters
    ----------
    out
        The run folder, absolute; the file and all logs go to its ``launch/``.
    made_by
        The command line that made it, for a comment.
    template
        The file whose gaps are filled in with `variables`.

    Raises
    ------
    ValueError
        The job or the template cannot be right.
    """
    require_sound(job)
    return render_bash(template, variables(job, command, out, made_by))


def variables(job: SlurmJob, command: RankCommand, out: Path, made_by: str) -> dict[str, Any]:
    """Return what a template of a batch file gets, by name (docs/clusters.md lists them)."""
    folder = out / LAUNCH_FOLDER
    return {
        **asdict(job),
        **asdict(command),
        "out": str(out),
        "launch_folder": str(folder),
        # In a name of SLURM's, %j is the number of the job and %% a percent sign.
        "log": str(folder).replace("%", "%%") + "/job-%j.log",
        "root": str(ROOT),
        "made_by": made_by,
    }
