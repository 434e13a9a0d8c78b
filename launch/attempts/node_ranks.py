"""Starts the ranks of one node and waits for them; `launch.ways.hostfile.Ssh` runs it on each host.

The command is ``python -m launch.attempts.node_ranks NODE RANKS ADDRESS PORT MODULE ARGUMENTS``;
RANKS are the numbers of ranks of all nodes, such as ``8,8``. It gives its ranks the environment
that DeepSpeed's launcher gives them, and ends as that does. DeepSpeed's own would import torch and
DeepSpeed first, for nothing: as much processor time as a fifth of a rank's whole start.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


def rank_environments(node: int, ranks: list[int], address: str, port: str) -> list[dict[str, str]]:
    """Return the variables of each rank of a node, as DeepSpeed's launcher sets them.

    `ranks` are the numbers of ranks of all nodes, in the order of nodes.
    """
    here, before = ranks[node], sum(ranks[:node])
    shared = {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "WORLD_SIZE": str(sum(ranks)),
        "LOCAL_SIZE": str(here),
        "CROSS_RANK": str(node),
        "CROSS_SIZE": str(len(ranks)),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(here))),
    }
    # DeepSpeed counts so: each local rank once, beginning anywhere if nodes have unequal numbers.
    numbers = range(before, before + here)
    return [shared | {"RANK": str(n), "LOCAL_RANK": str(n % here)} for n in numbers]


def main() -> int:
    """Start the ranks; return 0 when all are done, else the code of the first that failed.

    The others are asked to stop when one has failed, or when this process is.
    """
    node, ranks, address, port, *words = sys.argv[1:]
    command = [sys.executable, "-u", "-m", *words]
    children: dict[int, subprocess.Popen] = {}

    def ask_to_stop(*_: object) -> None:
        for child in children.values():
            with contextlib.suppress(ProcessLookupError):
                child.terminate()

    for number in _INTERRUPTS:
        signal.signal(number, ask_to_stop)
    counts = [int(n) for n in ranks.split(",")]
    for environment in rank_environments(int(node), counts, address, port):
        child = subprocess.Popen(command, env=os.environ | environment)
        children[child.pid] = child
    first = 0
    while children:
        pid, status = os.wait()
        if children.pop(pid, None) is None:
            continue
        code = os.waitstatus_to_exitcode(status)
        if code and not first:
            first = code if code > 0 else 128 - code
            ask_to_stop()
    return first


if __name__ == "__main__":
    sys.exit(main())
