"""What launchers and queues tell their processes: one table, and what mpirun really sets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.running.queue_variables import (
    job_of,
    mpi_ranks,
    outside_of_allocation,
    rank_of,
    ranks_here,
    srun_tasks,
    started_by_another,
)
from launch.ways.mpi import mpi_command

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("data_prep", "pretrain", "launch", "eval")
_OF_OTHERS = re.compile(r"""["'](SLURM_|SRUN_|PMI_|OMPI_|MPI_LOCAL|LOCAL_SIZE|LOCAL_WORLD_SIZE)""")


def test_no_other_file_names_them():
    files = [p for package in _PACKAGES for p in (_ROOT / package).rglob("*.py")]
    found = [p.name for p in files if _OF_OTHERS.search(p.read_text())]
    # The other one gives ranks what DeepSpeed's launcher gives them; it reads none.
    assert sorted(found) == ["node_ranks.py", "queue_variables.py"]


def test_what_mpirun_sets():
    code = "import json, os; print(json.dumps(dict(os.environ)), flush=True)"
    words = mpi_command(["json.tool", "--help"], 3, ["--oversubscribe"], {})
    command = [*words[: words.index(sys.executable)], sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    ranks = sorted(said, key=rank_of)
    assert [rank_of(e) for e in ranks] == [0, 1, 2]
    assert [mpi_ranks(e) for e in ranks] == [3, 3, 3]
    assert [ranks_here(e) for e in ranks] == ["3", "3", "3"]
    for rank, environment in enumerate(ranks):
        started = started_by_another(environment)
        assert started is not None and started.launcher == "mpirun of Open MPI"
        assert started.values == (str(rank), "3", str(rank))


@pytest.mark.parametrize(
    ("environment", "rank", "here", "by_mpi", "by_srun"),
    [
        ({}, 0, None, 1, 1),
        ({"RANK": "5", "LOCAL_SIZE": "4", "PMI_RANK": "1"}, 5, "4", 1, 1),
        ({"RANK": "5", "LOCAL_WORLD_SIZE": "2"}, 5, "2", 1, 1),
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"}, 3, "2", 4, 1),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "8"}, 2, None, 1, 8),
        # A batch script, before srun.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, 0, None, 1, 1),
    ],
)
def test_each_launcher(environment, rank, here, by_mpi, by_srun):
    assert rank_of(environment) == rank
    assert ranks_here(environment) == here
    assert (mpi_ranks(environment), srun_tasks(environment)) == (by_mpi, by_srun)


def test_jobs_and_allocations():
    inside = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "SLURM_CONF": "/c", "HOME": "/h"}
    assert (job_of(inside).number, job_of(inside).restarts) == ("7", "2")
    assert (job_of({}).number, job_of({}).restarts) == ("", "0")
    assert outside_of_allocation(inside) == {"SLURM_CONF": "/c", "HOME": "/h"}
