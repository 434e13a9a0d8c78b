"""Knows which environment variables tell a process its rank and its job, for every launcher.

No other file names these variables, except batch files, which are bash. The meeting point
(``MASTER_ADDR``, ``MASTER_PORT``) is torch's own and has one name everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launcher:
    """A launcher, and the names of the variables that it sets for each process.

    `ranks_here`: the number of ranks on the machine; '' if the launcher does not tell.
    """

    name: str
    rank: str
    world_size: str
    local_rank: str
    ranks_here: str
    is_mpi: bool = False


# The names that torch and DeepSpeed read, in the order of `Launcher`.
OWN_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# A PyTorchJob of Kubernetes sets RANK and WORLD_SIZE for its pods; torchrun in a pod sets them
# anew for its ranks.
_OWN = (
    Launcher("DeepSpeed's launcher", *OWN_NAMES, "LOCAL_SIZE"),
    Launcher("torchrun", *OWN_NAMES, "LOCAL_WORLD_SIZE"),
)
_OTHERS = (
    Launcher(
        "mpirun of Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", is_mpi=True,
    ),
    Launcher(
        "mpirun of MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
        is_mpi=True,
    ),
    # A batch script has SLURM_NTASKS too; the number of tasks of a step only processes of srun.
    Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
)  # fmt: skip
_SRUN = _OTHERS[-1]
_JOB, _RESTARTS = "SLURM_JOB_ID", "SLURM_RESTART_COUNT"
# Variables of an allocation, which another job must not inherit, and the one that it needs.
_OF_ALLOCATION, _KEPT = ("SLURM_", "SRUN_"), "SLURM_CONF"


@dataclass(frozen=True)
class Started:
    """What another launcher than torch's told a process: its name, and values for `OWN_NAMES`."""

    launcher: str
    values: tuple[str, str, str]


@dataclass(frozen=True)
class Job:
    """The job of a queue; `number` is '' outside of one. A requeued job keeps its number."""

    number: str
    restarts: str


def rank_of(environment: Mapping[str, str]) -> int:
    """Return the rank of a process, 0 if no launcher has told one."""
    return int(_first(environment, [known.rank for known in (*_OWN, *_OTHERS)]) or 0)


def ranks_here(environment: Mapping[str, str]) -> str | None:
    """Return the number of ranks on this machine as the launcher wrote it, None if it did not."""
    names = [known.ranks_here for known in (*_OWN, *_OTHERS)]
    return _first(environment, [name for name in names if name])


def started_by_another(environment: Mapping[str, str]) -> Started | None:
    """Return what mpirun or srun told this process if they started several; None otherwise."""
    if OWN_NAMES[0] in environment:
        return None
    for known in _OTHERS:
        names = (known.rank, known.world_size, known.local_rank)
        rank, world_size, local_rank = (environment.get(name, "") for name in names)
        if rank and world_size and local_rank and world_size != "1":
            return Started(known.name, (rank, world_size, local_rank))
    return None


def mpi_ranks(environment: Mapping[str, str]) -> int:
    """Return the number of ranks that mpirun started, 1 without mpirun."""
    names = [name for mpi in _OTHERS if mpi.is_mpi for name in (mpi.world_size, mpi.ranks_here)]
    return max(int(environment.get(name, 1)) for name in names)


def srun_tasks(environment: Mapping[str, str]) -> int:
    """Return the number of tasks that srun started in this step, 1 without srun."""
    return int(environment.get(_SRUN.world_size, 1))


def job_of(environment: Mapping[str, str]) -> Job:
    """Return the job of SLURM that this process belongs to, and how often it was restarted."""
    return Job(environment.get(_JOB, ""), environment.get(_RESTARTS, "0"))


def outside_of_allocation(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables of the allocation that this may run in."""
    return {
        name: value
        for name, value in environment.items()
        if name == _KEPT or not name.startswith(_OF_ALLOCATION)
    }


def _first(environment: Mapping[str, str], names: list[str]) -> str | None:
    return next((environment[name] for name in names if environment.get(name)), None)
