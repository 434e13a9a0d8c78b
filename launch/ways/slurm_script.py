"""The batch file of ``geneloom launch slurm``: what SLURM gets, and what runs on the nodes."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.files import LAUNCH_FOLDER
from launch.hosts.node import ROOT

# Below the ports that systems give to connections (from 32768 on Linux).
_FIRST_PORT, _NUM_PORTS = 15_000, 15_000
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
        if line.split("=")[0] in ("--array", "-a"):
            problems.append(
                f"--sbatch {line}: all tasks of an array would write into one folder; "
                "launch a job for each, with a folder of its own"
            )
    if problems:
        raise ValueError("launch slurm: " + "; ".join(problems))


def render(job: SlurmJob, command: RankCommand, out: Path, made_by: str) -> str:
    """Return the batch file.

    Parameters
    ----------
    out
        The run folder, absolute; the file and all logs go to its ``launch/``.
    made_by
        The command line that made it, for a comment.
    """
    require_sound(job)
    folder = out / LAUNCH_FOLDER
    parts = [
        "#!/bin/bash",
        "# Made by: " + made_by.replace("\n", " "),
        *_header(job, folder),
        "",
        *job.setup,
        "set -u",
        f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1  # a file of the working folder is never taken for a module",
        _meeting_point(),
        _attempt(folder),
        _step(job, command),
        _verdict(job, out),
    ]
    return "\n".join(parts)


def _header(job: SlurmJob, folder: Path) -> list[str]:
    """Return the #SBATCH lines. Without ``B:`` the signal goes to the ranks, not to the script."""
    log = str(folder).replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.tasks_per_node}",
        *([f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []),
        *([f"--cpus-per-task={job.cpus_per_task}"] if job.cpus_per_task else []),
        *(
            f"--{name}={value}"
            for name in ("mem", "partition", "account", "qos")
            if (value := getattr(job, name)) is not None
        ),
        f"--time={job.time}",
        f"--signal=USR1@{job.signal_before_s}",
        "--requeue",
        "--open-mode=append",
        f'--output="{log}/job-%j.log"',
        *job.sbatch,
    ]
    return [f"#SBATCH {option}" for option in options]


def _meeting_point() -> str:
    return f"""
# The ranks meet on the first node.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${{nodes%%$'\\n'*}}
# A port of this node, which is the first one, at which nobody listens.
while MASTER_PORT=$(({_FIRST_PORT} + RANDOM % {_NUM_PORTS})); do
    (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null || break
done
export MASTER_ADDR MASTER_PORT"""


def _attempt(folder: Path) -> str:
    return f"""
# A folder for what this start says; a requeued job keeps those of its starts before.
launch={shlex.quote(str(folder))}
number=1
while [ -e "$launch/attempt_$number" ]; do number=$((number + 1)); done
attempt=$launch/attempt_$number
mkdir "$attempt" && cp "$launch/settings.json" "$attempt/" || exit 1
echo "start $((${{SLURM_RESTART_COUNT:-0}} + 1)) of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST," \\
    "$(date '+%F %T'); logs of the ranks: $attempt\""""


def _step(job: SlurmJob, command: RankCommand) -> str:
    inside, around = _containers(job)
    tasks = [
        # Where SBATCH_EXPORT or SLURM_EXPORT_ENV say otherwise, ranks would start with nothing.
        "srun", "--export=ALL", f"--nodes={job.nodes}",
        f"--ntasks={job.nodes * job.tasks_per_node}",
        f"--ntasks-per-node={job.tasks_per_node}", "--kill-on-bad-exit=1", *around,
    ]  # fmt: skip
    if job.cpus_per_task:
        # Since 22.05 a step does not take this over from its job.
        tasks.append(f"--cpus-per-task={job.cpus_per_task}")
    python = shlex.join([*inside, command.python if not job.container else "python3"])
    return f"""
# What each task runs; after another start it goes on where that was ended.
if [ "$number" = 1 ]; then
    arguments=({shlex.join(command.first)})
else
    arguments=({shlex.join(command.again)})
fi
python=({python})

# scancel and pre-emption tell the ranks and this script; who is stopped so is not requeued here.
cancelled=
trap 'cancelled=yes' TERM
{shlex.join(tasks)} \\
    "${{python[@]}}" -m launch.attempts.rank "$attempt" \\
    {command.module} "${{arguments[@]}}" </dev/null &
step=$!
tail -n +1 -F --pid="$step" "$attempt/rank_00000.log" 2>/dev/null &
console=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done  # a signal ends one wait, not the step
wait "$step"
code=$?
wait "$console"  # for the last lines"""


def _verdict(job: SlurmJob, out: Path) -> str:
    _, around = _containers(job)
    alone = shlex.join(["srun", "--nodes=1", "--ntasks=1", *around]) + " " if around else ""
    return f"""
# 0: done. 75: saved by a signal, or ended by something that may not come again: once more.
{alone}"${{python[@]}}" -m launch.ways.requeue {shlex.quote(str(out))} "$attempt" "$code" \\
    --job "$SLURM_JOB_ID" --hosts "${{nodes//$'\\n'/,}}" --ranks-per-host {job.tasks_per_node} \\
    --restarts {job.restarts}
verdict=$?
if [ -n "$cancelled" ]; then
    echo "ended by SIGTERM (scancel, pre-emption or the time limit); not requeued from here"
elif [ "$verdict" = 75 ]; then
    # Requeueing ends this script, and may end scontrol before it has said so.
    scontrol requeue "$SLURM_JOB_ID" || [ "$?" -gt 128 ] || echo "requeue it by hand: sbatch again"
    sleep 60
fi
exit "$verdict"
"""


def _containers(job: SlurmJob) -> tuple[list[str], list[str]]:
    """Return what stands before python inside a task, and options of srun, for a container."""
    if job.container is None:
        return [], []
    if job.runtime == "pyxis":
        mounts = [f"--container-mounts={','.join(job.mounts)}"] if job.mounts else []
        return [], [f"--container-image={job.container}", *mounts]
    gpu = ["--nv"] if job.gpus_per_node else []
    mounts = [word for mount in job.mounts for word in ("--bind", mount)]
    return ["apptainer", "exec", *gpu, *mounts, job.container], []
