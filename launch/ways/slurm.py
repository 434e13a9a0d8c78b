"""``geneloom launch slurm``: a batch file for SLURM, shown, stored in the run folder, submitted."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from data_prep.files import LAUNCH_FOLDER, names_in
from data_prep.running.network import TOKEN
from data_prep.running.owner import refuse_if_in_use
from data_prep.running.queue_variables import outside_of_allocation
from data_prep.running.redact import is_public, redacted_command
from launch.attempts.rank import make_private, write_private
from launch.attempts.rank_logs import read_events, record_event
from launch.environment import ENV_HELP, named_variables
from launch.verbs import MODULES, check_and_find_folder, module_of, to_go_on
from launch.ways.render_template import BATCH_FILE, TEMPLATE_HELP, for_sbatch
from launch.ways.slurm_script import RankCommand, SlurmJob, render

JOB_NAME = "geneloom-"


def launch_slurm(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(help=f"what to run: {', '.join(MODULES)}")],
    time: Annotated[str, typer.Option(help="limit of one start, e.g. 1-00:00:00 for a day")],
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="a rank for each; 0: CPU nodes")] = 0,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="default: one per GPU; 1 on CPU nodes")
    ] = None,
    partition: Annotated[str | None, typer.Option()] = None,
    account: Annotated[str | None, typer.Option()] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="cores of a rank")] = None,
    mem: Annotated[str | None, typer.Option(help="memory of a node, e.g. 200G; 0: all")] = None,
    container: Annotated[str | None, typer.Option(help="image with geneloom in it")] = None,
    runtime: Annotated[
        str, typer.Option(help="of the container: apptainer or pyxis")
    ] = "apptainer",
    mount: Annotated[
        list[str] | None, typer.Option(help="folder the container sees; may be repeated")
    ] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option(help="line run first, e.g. 'module load cuda'; may be repeated"),
    ] = None,
    env: Annotated[list[str] | None, typer.Option(help=ENV_HELP)] = None,
    signal_before: Annotated[
        int, typer.Option(min=1, help="seconds before the limit: save, requeue, resume")
    ] = 120,
    restarts: Annotated[
        int, typer.Option(min=0, help="starts of a job that may crash without a new checkpoint")
    ] = 3,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="another #SBATCH option; may be repeated")
    ] = None,
    template: Annotated[Path, typer.Option(help=TEMPLATE_HELP, show_default=False)] = BATCH_FILE,
    show: Annotated[bool, typer.Option("--show", help="print the file and stop")] = False,
) -> None:
    """Submit a verb to SLURM: ``geneloom launch slurm --nodes 2 --gpus-per-node 8 --time
    1-00:00:00 pretrain --config geneformer_v1_6l ...``.

    Before the time limit the ranks save, and the job is requeued; so it is after a crash, unless it
    ends so twice at the same step. It resumes by itself until it is done.
    """
    arguments, module = context.args, module_of(verb)
    out = check_and_find_folder(verb, arguments)
    tasks = ranks_per_node or gpus_per_node or 1
    if verb == "prepare":
        nodes, tasks, arguments = _one_task(nodes, ranks_per_node, cpus_per_task, arguments)
    job = SlurmJob(
        name=f"{JOB_NAME}{verb}", nodes=nodes, tasks_per_node=tasks, time=time,
        gpus_per_node=gpus_per_node, cpus_per_task=cpus_per_task, mem=mem, partition=partition,
        account=account, qos=qos, signal_before_s=signal_before, restarts=restarts,
        container=container, runtime=runtime, mounts=mount or [], setup=setup or [],
        sbatch=[f"--chdir={for_sbatch(Path.cwd())}", *(sbatch or [])],
    )  # fmt: skip
    made_by = redacted_command(["geneloom", *sys.argv[1:]])
    command = RankCommand(sys.executable, module, arguments, to_go_on(verb, arguments))
    text = render(job, command, out, made_by, template)
    variables = named_variables(env or [])
    settings = rank_settings(job, variables, made_by)
    print(text, end="", flush=True)
    if show:
        return
    _require_free(verb, arguments, out)
    path = store(text, settings, out)
    number = submit(path, variables)
    record_event(path.parent, "submitted", job=number)
    print(
        f"submitted job {number} ({path})\n"
        f"  what it says      tail -F {shlex.quote(str(path.parent / f'job-{number}.log'))}\n"
        f"  save and requeue  scancel --signal=USR1 {number}\n"
        f"  save and stop     scancel {number}"
    )


def _one_task(
    nodes: int, ranks_per_node: int | None, cpus: int | None, arguments: list[str]
) -> tuple[int, int, list[str]]:
    """Return nodes, tasks and arguments of ``prepare``: one task, whose processes share a node."""
    if nodes > 1 or (ranks_per_node or 1) > 1:
        raise ValueError(
            "launch slurm prepare: runs as one task on one node, with as many processes as "
            "--cpus-per-task; over several nodes `geneloom launch mpi --hostfile` runs it"
        )
    if cpus and not any(a.split("=")[0] == "--processes" for a in arguments):
        arguments = [*arguments, "--processes", str(cpus)]
    return 1, 1, arguments


def rank_settings(job: SlurmJob, variables: dict[str, str], made_by: str) -> dict:
    """Return what `launch.attempts.rank` reads on every node.

    A variable that may be a secret is not written: the job has it from sbatch's environment.
    """
    environment = {"GENELOOM_LAUNCH_COMMAND": made_by}
    if job.cpus_per_task and not job.gpus_per_node:
        environment["OMP_NUM_THREADS"] = str(job.cpus_per_task)
    return {
        "environment": environment | {n: v for n, v in variables.items() if is_public(n)},
        "device": "gpu" if job.gpus_per_node else "cpu",
        "nodes": job.nodes,
    }


def _require_free(verb: str, arguments: list[str], out: Path) -> None:
    """Raise ValueError where the job would be refused, on the cluster, hours later."""
    refuse_if_in_use(out)
    for number in jobs_of(out):
        if state := state_of(number):
            raise ValueError(
                f"{out}: job {number} is for this folder, and {state}: `squeue -j {number}` shows "
                f"it, `scancel {number}` ends it; or give another folder"
            )
    goes_on = {"--resume", "--restart"} & set(arguments)
    if verb == "pretrain" and not goes_on and out.is_dir() and names_in(out):
        raise ValueError(
            f"{out}: exists and is not empty; add --resume to go on with this run, or give "
            "run.out another folder"
        )


def store(text: str, settings: dict, out: Path) -> Path:
    """Write the batch file and its settings into the run folder; return the file's path."""
    folder = out / LAUNCH_FOLDER
    make_private(folder)
    token = {TOKEN: secrets.token_hex(32)}
    environment = settings["environment"] | token
    write_private(folder / "settings.json", json.dumps(settings | {"environment": environment}))
    path = folder / "job.sbatch"
    write_private(path, text)
    return path


def jobs_of(out: Path) -> list[str]:
    """Return the numbers of the jobs that were submitted for a folder, the last one first."""
    found = [e["job"] for e in read_events(out / LAUNCH_FOLDER) if e["event"] == "submitted"]
    return found[::-1]


def state_of(job: str, what: str = "%T") -> str:
    """Return what SLURM says of a job that waits or runs, e.g. PENDING; empty if it does not.

    `what`: a field of squeue's format.
    """
    if shutil.which("squeue") is None:
        return ""
    words = ["squeue", "--noheader", f"--format={what}", f"--jobs={job}"]
    said = subprocess.run(words, capture_output=True, text=True)
    return "" if said.returncode else said.stdout.strip().partition("\n")[0]


def submit(path: Path, variables: Mapping[str, str]) -> str:
    """Submit a batch file, with more variables, and return the number of the job.

    Raises
    ------
    ValueError
        There is no sbatch here, or SLURM refused.
    """
    if shutil.which("sbatch") is None:
        raise ValueError(
            f"launch slurm: no sbatch on this machine; run `sbatch {path}` where it is"
        )
    # The new job has an allocation of its own.
    environment = outside_of_allocation(os.environ)
    done = subprocess.run(
        ["sbatch", "--parsable", "--export=ALL", str(path)],
        capture_output=True, text=True, env={**environment, **variables},
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"launch slurm: sbatch refused {path}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
