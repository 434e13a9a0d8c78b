"""Time an all-reduce over all ranks, to find the speed between nodes and slow nodes.

``geneloom doctor`` starts it on every rank: ``python -m pretrain.ranks.all_reduce_speed OUT.json
MIB``.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import EXIT_FAILED
from pretrain.ranks import dist
from pretrain.ranks.dist import Ranks

_REPEATS = 5
_TIMEOUT_S = 60


def measure(ranks: Ranks, mib: int) -> dict[str, Any]:
    """Return the cost of an all-reduce of float32 [mib x 2**18]; all rates are of median times.

    ``algorithm_gib_s``: bytes / seconds. ``bus_gib_s``: that x 2 (N - 1) / N, the rate through each
    link of a ring, which is comparable for any number of ranks. ``link_gib_s``: from each rank to
    the next, one link at a time. ``matmul_s``: for each rank, the seconds of ten products of
    float32 1,024 x 1,024.
    """
    values = torch.ones(mib * 2**18, device=ranks.device)
    gib = values.numel() * 4 / 2**30
    seconds = _median(lambda: dist.sum_in_place(values), ranks)
    values.fill_(1)
    links = [gib / s for s in _links(values, ranks)]
    matrix = torch.ones(1024, 1024, device=ranks.device)
    own = _median(lambda: [matrix @ matrix for _ in range(10)], ranks)
    on_gpu = ranks.device.type == "cuda"
    return {
        "ranks": ranks.world_size,
        "mib": mib,
        "device": ranks.device.type,
        "seconds": seconds,
        "algorithm_gib_s": gib / seconds,
        "bus_gib_s": gib / seconds * 2 * (ranks.world_size - 1) / ranks.world_size,
        "link_gib_s": links,
        "matmul_s": [float(t) for t in dist.gather_text(str(own), ranks)],
        "nccl": _nccl() if on_gpu else None,
    }


def _nccl() -> str:
    import torch.cuda.nccl as nccl

    return ".".join(map(str, nccl.version()))


def _links(values: torch.Tensor, ranks: Ranks) -> list[float]:
    """Return the seconds of a transfer from each rank to the next, while the other ranks wait."""
    found = []
    for source in range(ranks.world_size if ranks.world_size > 1 else 0):
        target = (source + 1) % ranks.world_size

        def pass_on(source: int = source, target: int = target) -> None:
            if ranks.rank == source:
                dist.send(values, target)
            elif ranks.rank == target:
                dist.receive(values, source)

        own = str(_median(pass_on, ranks))
        # The receiver's time is taken, because a sender may return while the data is still on its
        # way.
        found.append(float(dist.gather_text(own, ranks)[target]))
    return found


def _median(work: Callable[[], object], ranks: Ranks) -> float:
    """Return the median seconds of `work`, after one run that does not count."""
    times = []
    for _ in range(_REPEATS + 1):
        dist.wait_for_all()
        started = time.perf_counter()
        work()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main() -> None:
    """Measure the all-reduce on all ranks; rank 0 writes the result."""
    out, mib = Path(sys.argv[1]), int(sys.argv[2])
    try:
        ranks = dist.start(_TIMEOUT_S, threads=1)
        dist.limit_waiting(_TIMEOUT_S)
        found = measure(ranks, mib)
    except (RuntimeError, ValueError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        sys.exit(EXIT_FAILED)
    if ranks.is_first:
        out.write_text(json.dumps(found))
    dist.leave()


if __name__ == "__main__":
    main()
