"""Starts and watches one rank; every launcher runs this module once for each rank.

The command is ``python -m launch.attempts.rank FOLDER MODULE ARGUMENTS``. It runs
``python -m MODULE ARGUMENTS`` with the environment of FOLDER/settings.json, writes the output to
FOLDER/rank_00000.log, and the exit code, host and times to FOLDER/rank_00000.json. Variables that
may be secrets stand in FOLDER/secret_00000.json, which the rank removes when it has read it. The
module needs the standard library and psutil only, because this extra process for each rank must
cost nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from data_prep.errors import EXIT_FAILED, EXIT_USAGE
from data_prep.files import LAUNCH_FOLDER, complete_file
from data_prep.running.launchers import SAVE_LIMIT_S, stop_with_launcher
from data_prep.running.network import interface_to
from data_prep.running.owner import lives, machine
from data_prep.running.queue_variables import rank_of, ranks_here
from launch.hosts.node import IN_RANK, ROOT, has_gpu

_PR_SET_PDEATHSIG = 1
# The supervisor touches this file in the folder of its attempt, as a heartbeat for ranks on other
# machines.
ALIVE, TOUCH_S = "alive", 2.0
# The limit is a number of looks at the file, not a time: while a file system does not answer, the
# supervisor does not count as dead.
_LOOK_S, _LOOKS = 1.0, 12


def log_name(rank: int) -> str:
    """Return the name of the file that holds the output of a rank."""
    return f"rank_{rank:05d}.log"


def end_name(rank: int) -> str:
    """Return the name of the file with a rank's exit code, host and times."""
    return f"rank_{rank:05d}.json"


def write_secrets(folder: Path, ranks: int, variables: Mapping[str, str]) -> None:
    """Write the variables that may be secrets for each rank of an attempt, which removes its file.

    Each rank has a file of its own, so that nobody has to know whether others have read it yet.
    """
    for rank in range(ranks if variables else 0):
        write_private(folder / secret_name(rank), json.dumps(dict(variables)))


def secret_name(rank: int) -> str:
    """Return the name of the file with a rank's secret variables, until the rank has read it."""
    return f"secret_{rank:05d}.json"


def remove_secrets(folder: Path) -> None:
    """Remove the secret variables of ranks that never started, from ``OUT/launch`` or an attempt.

    A process of the folder's own run calls it, not one that may yet be refused.
    """
    for path in folder.glob("**/secret_*.json"):
        path.unlink(missing_ok=True)


def take_secrets(folder: Path, rank: int, names: Sequence[str]) -> dict[str, str]:
    """Return the secret variables of a rank, and remove the file that they are in.

    Raises
    ------
    FileNotFoundError
        The rank was started before.
    """
    path = folder / secret_name(rank)
    if not names:
        return {}
    found = json.loads(path.read_text())
    path.unlink()
    return found


def main() -> int:
    """Run a rank and return its exit code (128 + N if signal N ended it)."""
    folder, module, *arguments = sys.argv[1:]
    settings = json.loads((Path(folder) / "settings.json").read_text())
    rank = rank_of(os.environ)
    try:
        secret = take_secrets(Path(folder), rank, settings.get("secrets", ()))
    except FileNotFoundError as error:
        print(
            f"error: {error.filename} is gone: rank {rank} of this attempt was started before; "
            "start the run again",
            file=sys.stderr,
        )
        return EXIT_FAILED
    environment = rank_environment(os.environ | settings["environment"] | secret, settings)
    if settings["device"] == "gpu" and not has_gpu():
        print(f"error: --device gpu: {socket.gethostname()} has no /dev/nvidia*", file=sys.stderr)
        return EXIT_USAGE
    if problem := _foreign(module):
        print(f"error: {problem}", file=sys.stderr)
        return EXIT_USAGE
    child: subprocess.Popen | None = None

    def pass_on(number: int, _frame: object) -> None:
        if child is not None:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup makes it ignored
            signal.signal(number, pass_on)
    stop_with_launcher()
    started = time.time()
    with (Path(folder) / log_name(rank)).open("ab") as log:
        line = f"# rank {rank} on {socket.gethostname()}, {time.strftime('%Y-%m-%d %H:%M:%S %Z')}\n"
        log.write(line.encode())
        log.flush()
        child = subprocess.Popen(
            [sys.executable, "-u", "-m", module, *arguments],
            env=environment, stdout=log, stderr=log, preexec_fn=_stop_with_parent,
        )  # fmt: skip
        if supervisor := settings.get("supervisor"):
            watch = (Path(folder), supervisor, child, log)
            threading.Thread(target=_stop_with_supervisor, args=watch, daemon=True).start()
        code = child.wait()
    end = {"rank": rank, "host": socket.gethostname(), "code": code, "from": started}
    write_private(Path(folder) / end_name(rank), json.dumps(end | {"to": time.time()}))
    return code if code >= 0 else 128 - code


def rank_environment(given: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment of a rank on this node.

    On CPUs the cores are divided among the ranks of the node. In a run on several nodes the network
    interface is the one that leads to the first node.
    """
    environment = {**given, IN_RANK: "1"}
    if settings["device"] == "cpu" or not has_gpu():
        environment["DS_ACCELERATOR"] = "cpu"
        cores = len(os.sched_getaffinity(0))
        here = int(ranks_here(given) or 1)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // here)))
    if settings["nodes"] > 1 and "MASTER_ADDR" in environment:
        interface = interface_to(environment["MASTER_ADDR"])
        if interface is not None:
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                environment.setdefault(name, interface)
    return environment


def _foreign(module: str) -> str | None:
    """Return a message if a rank would run another module than this package's, None if not."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        return f"python -m {module}: there is no such module beside {ROOT / 'launch'}"
    if not Path(found.origin).resolve().is_relative_to(ROOT):
        return (
            f"python -m {module} would run {found.origin}, not the package in {ROOT}; take it off "
            "PYTHONPATH"
        )
    return None


def make_private(folder: Path) -> None:
    """Make ``OUT/launch`` or a folder in it, such that only its owner can read it."""
    folder.mkdir(parents=True, exist_ok=True)
    own = folder if folder.name == LAUNCH_FOLDER else folder.parent
    for made in {own, folder}:
        made.chmod(0o700)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read and that is never seen incomplete."""
    with complete_file(path) as aside:
        aside.touch(mode=0o600)
        aside.write_text(text)


def _stop_with_parent() -> None:
    # The kernel stops the rank until the rank watches by itself (`data_prep.running.launchers`).
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop_with_supervisor(
    folder: Path, supervisor: dict[str, Any], child: subprocess.Popen, log: IO[bytes]
) -> None:
    """Send a rank SIGTERM when the command that started the run is gone, and kill it if needed."""
    if supervisor["machine"] == machine():
        while lives(supervisor):
            time.sleep(_LOOK_S)
    else:
        _wait_for_silence(folder / ALIVE)
    with contextlib.suppress(OSError):
        log.write(b"# the command that started this run is gone: asked to save and stop\n")
        log.flush()
    child.send_signal(signal.SIGTERM)
    time.sleep(SAVE_LIMIT_S)
    child.kill()


def _wait_for_silence(path: Path) -> None:
    """Wait until a file has not been touched between `_LOOKS` looks at it."""
    seen, unchanged = 0, 0
    while unchanged < _LOOKS:
        time.sleep(_LOOK_S)
        try:
            with path.open("rb") as file:  # opening makes NFS ask its server
                now = os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            now = seen
        except OSError:
            continue
        unchanged = unchanged + 1 if now == seen else 0
        seen = now


if __name__ == "__main__":
    sys.exit(main())
