"""Estimate the duration of a step: arithmetic, memory, network, and waiting in between.

The module contains arithmetic only and does not import torch. Every part has a best and a worst
case besides the expected one; their sums are the interval that a plan shows. CPU figures were
measured (docs/benchmarks.md, two cores). GPU figures are data sheets and published figures, because
nothing was measured there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.config import RunConfig
from pretrain.settings.architecture import MODERNBERT

# The number of GPUs of a node that NVLink connects.
_NODE = 8
# AdamW reads weight, gradient and two moments in float32, and writes three of them.
_ADAM_BYTES = 28
# Geneloom's own collective operations in a step: counts, losses, gradient norm, and DeepSpeed's for
# overflow.
_SMALL_COLLECTIVES = 4
# The kernels of a layer, forward and backward, without torch.compile; and of head, loss and masks.
_KERNELS = {"bert": 60, MODERNBERT: 80}
_KERNELS_AROUND = 80
_KERNELS_COMPILED = 0.35


@dataclass(frozen=True)
class Machine:
    """The rates of a machine besides arithmetic: bytes a second of a device, seconds of an event.

    Attributes
    ----------
    memory, near, far
        Bytes a second of the device's memory, and that a device sends inside its node and to other
        nodes.
    launch_s, collective_s
        Seconds to start a kernel; seconds of an empty collective operation for each doubling of
        devices.
    host_s
        Seconds of Python and DeepSpeed in a step, in which the device is idle.
    """

    memory: float
    near: float
    far: float
    launch_s: float
    collective_s: float
    host_s: float


_FAR = 40e9  # 400 Gb/s for each GPU, of which 80 % arrive
MACHINES = {
    "a100": Machine(1.6e12, 230e9, 20e9, 5e-6, 12e-6, 4e-3),
    "a100-40": Machine(1.2e12, 230e9, 20e9, 5e-6, 12e-6, 4e-3),
    "l40s": Machine(0.7e12, 20e9, 20e9, 5e-6, 15e-6, 4e-3),
    "h100": Machine(2.7e12, 360e9, _FAR, 5e-6, 12e-6, 4e-3),
    "h200": Machine(3.8e12, 360e9, _FAR, 5e-6, 12e-6, 4e-3),
    "b200": Machine(6.4e12, 700e9, _FAR, 5e-6, 12e-6, 4e-3),
    # A core of an AMD EPYC, and gloo over loopback: benchmarks.muon, benchmarks.zero.
    "cpu": Machine(4e9, 1.0e9, 1.0e9, 0.0, 3e-4, 5e-3),
}


@dataclass(frozen=True)
class StepTime:
    """The seconds of a step, part by part.

    `doubt` is the factor by which the arithmetic may be divided or multiplied, `_OTHERS` the factor
    for all other parts.
    """

    compute: float
    optimizer: float
    network: float
    launch: float
    host: float
    # `doubt` is for the arithmetic, `_OTHERS` for all other parts.
    doubt: float
    _OTHERS = 2.0

    @property
    def seconds(self) -> float:
        return self._sum(1, 1)

    @property
    def interval(self) -> tuple[float, float]:
        """Return the seconds in the best and in the worst case."""
        return self._sum(1 / self.doubt, 1 / self._OTHERS), self._sum(self.doubt, self._OTHERS)

    def _sum(self, of_compute: float, of_others: float) -> float:
        # Kernels are started while others run, so the longer time counts.
        busy = max(self.compute * of_compute, self.launch * of_others)
        return busy + (self.optimizer + self.network + self.host) * of_others


@dataclass(frozen=True)
class Compute:
    """Seconds of a step's arithmetic on one device, and by what factor they may be off.

    `includes_host`: they were measured in a run, so launching and the host are in them.
    """

    seconds: float
    doubt: float
    includes_host: bool = False


def kernels_per_pass(config: RunConfig) -> float:
    """Return about how many kernels a forward and backward pass starts."""
    count = config.model.num_layers * _KERNELS[config.model.architecture] + _KERNELS_AROUND
    return count * (_KERNELS_COMPILED if config.run.compile != "off" else 1)


def step_time(
    config: RunConfig,
    machine: Machine,
    compute: Compute,
    parameters: int,
    stage: int,
    gpus: int,
    passes: int,
    sent_bytes: float,
) -> StepTime:
    """Return the duration of a step, part by part.

    Parameters
    ----------
    passes
        Micro-batches of a device in a step.
    sent_bytes
        Of one device in a step (`plan.traffic_bytes`).
    """
    near = min(gpus, _NODE)
    rounds = math.log2(near) + 4 * math.log2(-(-gpus // _NODE)) if gpus > 1 else 0.0
    calls = _SMALL_COLLECTIVES + 2
    calls += 3 * config.model.num_layers * passes if stage == 3 else passes if stage == 2 else 0
    # The slowest link determines the speed of a ring.
    speed = machine.near if gpus <= _NODE else machine.far
    own = parameters / (gpus if stage else 1)
    return StepTime(
        compute.seconds,
        0.0 if compute.includes_host else own * _ADAM_BYTES / machine.memory,
        sent_bytes / speed + calls * rounds * machine.collective_s,
        0.0 if compute.includes_host else passes * kernels_per_pass(config) * machine.launch_s,
        0.0 if compute.includes_host else machine.host_s,
        compute.doubt,
    )
