"""Copy a whole step to a GPU at once, through one buffer of pinned memory.

Pinning memory costs a call of the driver, and each copy costs another one; a step of eight packed
micro-batches has a hundred tensors. Here the threads of the loader write all tensors of a step into
one pinned buffer (`Staging.fill`); a few buffers are reused for all steps. The training thread
copies the buffer on a separate stream while the GPU computes, and takes the tensors as views of the
copy (`Staging.copies`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Kernels read vectors of this many bytes, so each tensor begins at a multiple of it.
_ALIGNMENT = 256


@dataclass(frozen=True)
class _Part:
    """The position, shape and dtype of a tensor in a buffer."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        size = self.dtype.itemsize * torch.Size(self.shape).numel()
        return buffer[self.start : self.start + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Staged:
    """The arguments of forward passes in one uint8 buffer on the host, which uses `size` bytes."""

    buffer: torch.Tensor
    size: int
    arguments: list[Any]


class Staging:
    """The buffers of one rank for one device.

    Any thread may call `fill`, but only one thread may call `copies`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: deque[torch.Tensor] = deque()
        # Buffers that are being copied, each with the event that tells when its copy is done.
        self._busy: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fill(self, arguments: Sequence[Any]) -> Staged:
        """Write the tensors in nested tuples into a buffer; all other values stay as they are."""
        size, parts = 0, []

        def place(tensor: torch.Tensor) -> _Part:
            nonlocal size
            part = _Part(size, tuple(tensor.shape), tensor.dtype)
            parts.append((part, tensor))
            size += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
            return part

        layout = [_changed(one, torch.Tensor, place) for one in arguments]
        buffer = self._buffer(size)
        for part, tensor in parts:
            part.of(buffer).copy_(tensor)
        return Staged(buffer, size, layout)

    def _buffer(self, size: int) -> torch.Tensor:
        try:
            buffer = self._free.popleft()
        except IndexError:
            buffer = torch.empty(0, dtype=torch.uint8)
        if len(buffer) < size:
            # The buffer is somewhat larger than needed, because steps of a bucket differ by a few
            # tokens.
            room = size + size // 8
            buffer = torch.empty(room, dtype=torch.uint8, pin_memory=self._stream is not None)
        return buffer

    def copies(self, staged: Staged) -> list[Any]:
        """Return the arguments on the device after one copy; the buffer is reused later."""
        self._collect()
        source, event = staged.buffer[: staged.size], None
        if self._stream is None:
            on_device = source.clone()
        else:
            current = torch.cuda.current_stream(self._device)
            with torch.cuda.stream(self._stream):
                # The memory belongs to this stream, so the copy does not wait for any computation.
                on_device = source.to(self._device, non_blocking=True)
                event = torch.cuda.Event()
                event.record(self._stream)
            on_device.record_stream(current)
            current.wait_event(event)
        self._busy.append((staged.buffer, event))
        return [_changed(one, _Part, lambda part: part.of(on_device)) for one in staged.arguments]

    def _collect(self) -> None:
        while self._busy and (self._busy[0][1] is None or self._busy[0][1].query()):
            self._free.append(self._busy.popleft()[0])


def _changed(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_changed(one, kind, change) for one in value)
    return value
