"""Read the loss and the gradient norm of a step from the device together.

To read a number, the host waits until the device has computed it, and then the device waits for new
work. DeepSpeed reads the norm three to five times a step (to check whether it is finite, and for
clipping), and the sums of losses would be read separately. Here all of them are read once, and
DeepSpeed receives the norm as a number on the host. The numbers are the same to the last bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch


def read(values: torch.Tensor) -> list[float]:
    """Return the numbers of a vector; all waiting of a step for its device happens here."""
    return values.tolist()


class StepLoss:
    """Sums of losses over all ranks of a global step.

    The sums are over hidden genes and over cells; a part whose objective has weight 0 is 0.

    Parameters
    ----------
    sums
        float64 [3] on the device: loss of genes, hits, loss of cells.
    own
        For each of this rank's micro-batches, float32 [M] losses of genes and, with a cell
        objective, [B] losses of cells.
    """

    def __init__(self, sums: torch.Tensor, own: list[tuple[torch.Tensor, ...]]) -> None:
        self.own = own
        self._on_device, self._sums = sums, None

    @property
    def sums(self) -> tuple[float, float, float]:
        """Return the loss of genes, the hits and the loss of cells.

        This waits for the device, unless `read_with` has already read them.
        """
        if self._sums is None:
            self._sums = read(self._on_device)
        loss, hits, cell_loss = self._sums
        return loss, hits, cell_loss

    @property
    def loss(self) -> float:
        return self.sums[0]

    @property
    def cell_loss(self) -> float:
        return self.sums[2]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss + self.cell_loss)

    def read_with(self, value: torch.Tensor) -> float:
        """Return the number of a float32 scalar; the sums are read together with it."""
        if self._sums is not None:
            return read(value.reshape(1))[0]
        number, *self._sums = read(torch.cat([value.reshape(1).double(), self._on_device]))
        return number


@contextlib.contextmanager
def norm_read_once(optimizer: Any, loss: StepLoss) -> Iterator[None]:
    """Let DeepSpeed's optimizer read the gradient norm together with the loss.

    It is used as a ``with`` block around the optimizer's step. A loss that is not finite makes the
    norm infinite, so that the step is skipped.
    """
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    def on_host(compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def computed(*arguments: Any, **named: Any) -> torch.Tensor:
            norm = loss.read_with(compute(*arguments, **named))
            return torch.tensor(norm if loss.is_finite else math.inf)

        return computed

    places = [
        (bf16_optimizer, "get_global_norm_of_tensors"),
        (stage_1_and_2, "combine_grad_norm_groups"),
        (stage3, "combine_grad_norm_groups"),
    ]
    originals = [getattr(module, name) for module, name in places]
    # DeepSpeed's check searches all gradients for values that are not finite, but the norm shows
    # them as well.
    looks_first = isinstance(optimizer, stage_1_and_2.DeepSpeedZeroOptimizer)
    looks_first = looks_first and not optimizer.cpu_offload
    if looks_first:
        optimizer.check_overflow = lambda **_: None
    for (module, name), original in zip(places, originals, strict=True):
        setattr(module, name, on_host(original))
    try:
        yield
    finally:
        for (module, name), original in zip(places, originals, strict=True):
            setattr(module, name, original)
        if looks_first:
            del optimizer.check_overflow
