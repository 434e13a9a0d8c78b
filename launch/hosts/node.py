"""Answers questions about a node, over ssh or on this machine.

The command is ``python -m launch.hosts.node facts|signal|... ...``. It answers with JSON on one
line, and needs the standard library and psutil only.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Container
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from data_prep.running.network import address_of, interface_to
from data_prep.running.owner import LAUNCH_ID, lives
from data_prep.version import code_digest

# Environment variable of ranks only; all processes of a launch have `LAUNCH_ID`.
IN_RANK = "GENELOOM_IN_RANK"
PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "pyarrow")
# The folder that contains the packages `launch`, `pretrain` and the others.
ROOT = Path(__file__).resolve().parents[2]
_GIB = 2**30


def has_gpu() -> bool:
    """Return whether this machine has an NVIDIA GPU."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def signal_process(pid: int, started: float, number: int) -> bool:
    """Send a signal to the process with this id and start time; return whether it is alive."""
    if not lives({"pid": pid, "started": started}):
        return False
    with contextlib.suppress(OSError):
        os.kill(pid, number)
    return True


def signal_processes(launches: Container[str], number: int, ranks_only: bool) -> int:
    """Send a signal to the processes of the given launches on this node; return their number."""
    found = 0
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            continue
        ours = environment.get(LAUNCH_ID, "") in launches and process.pid != os.getpid()
        if ours and (IN_RANK in environment or not ranks_only):
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
                found += 1
    return found


def port_state(port: int) -> dict[str, Any]:
    """Return the port, if it is free on this node, or the problem; port 0 means any free port."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError as error:
            return {"port": port, "problem": str(error)}
        return {"port": probe.getsockname()[1], "problem": None}


def facts(folder: Path, token: str, hosts: list[str]) -> dict[str, Any]:
    """Return the facts about this node that a run on several nodes depends on.

    Parameters
    ----------
    folder
        Folder that all nodes share. This node writes a file with its name there, and reads the file
        ``token`` of the asking node.
    token
        Content of that file.
    hosts
        Names or addresses of all hosts of the run; the ranks connect to the first one.
    """
    now = time.time()
    shared = _look_at(folder, token)
    memory = psutil.virtual_memory()
    return {
        "time": now,
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {p: _version(p) for p in PACKAGES} | {"nccl": _nccl_version()},
        "code": code_digest(),
        "commit": _said("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or None,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "gpus": gpus(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "memory_gib": memory.available / _GIB,
        "shm_gib": shutil.disk_usage("/dev/shm").free / _GIB,
        "disk_gib": shared.pop("disk_gib"),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked_memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "addresses": {host: address_of(host) for host in hosts},
        "interface": interface_to(_first_other(hosts)) if hosts else None,
        "shared": shared,
    }


def _look_at(folder: Path, token: str) -> dict[str, Any]:
    """Return the problem of the shared folder, None if there is none, and its free disk space.

    The folder must be the one of the asking node, and writable.
    """
    if not folder.is_dir():
        return {"problem": "does not exist", "disk_gib": 0.0}
    disk = {"disk_gib": shutil.disk_usage(folder).free / _GIB}
    try:
        seen = (folder / "token").read_text()
    except OSError:
        seen = None
    if seen != token:
        return disk | {"problem": "is another folder here: it is not shared"}
    try:
        (folder / f"seen-by-{socket.gethostname()}").write_text(token)
    except OSError as error:
        return disk | {"problem": f"cannot be written ({error.strerror})"}
    return disk | {"problem": None}


def _first_other(hosts: list[str]) -> str:
    """Return the first host other than this one, whose own name may have a loopback address."""
    return next((h for h in hosts if h != socket.gethostname()), hosts[0])


def gpus() -> list[dict[str, Any]]:
    """Return the name, memory and used memory (GiB) of each GPU of this machine."""
    query = "--query-gpu=name,memory.total,memory.used"
    rows = _said("nvidia-smi", query, "--format=csv,noheader,nounits").splitlines()
    parts = [row.split(", ") for row in rows]
    return [{"name": p[0], "gib": float(p[1]) / 1024, "used": float(p[2]) / 1024} for p in parts]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nccl_version() -> str | None:
    """Return the version of the NCCL that came with torch; None if torch is for CPUs only."""
    found = (_version(f"nvidia-nccl-cu{cuda}") for cuda in (13, 12, 11))
    return next((v for v in found if v), None)


def _said(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def main(words: list[str]) -> None:
    """Print the answer to one question."""
    if words[0] == "facts":
        answer: Any = facts(Path(words[1]), words[2], words[3:])
    elif words[0] == "signal":
        answer = signal_processes(words[1].split(","), int(words[2]), words[3] == "ranks")
    elif words[0] == "process":
        answer = int(signal_process(int(words[1]), float(words[2]), int(words[3])))
    else:
        answer = port_state(int(words[1]))
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
