"""The way of a step to a GPU: one piece of pinned memory, filled by the loader, one copy.

Pinning memory costs a call of the driver, and each copy another one; a step of eight packed
micro-batches has a hundred tensors. Here the loader's threads lay all of a step's tensors into one
pinned buffer out of a few, which are used again; the training thread copies it on a stream of its
own while the GPU computes, and looks at its parts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Kernels read vectors of this many bytes.
_ALIGNMENT = 256


@dataclass(frozen=True)
class _Part:
    """Where a tensor lies in a buffer."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        size = self.dtype.itemsize * torch.Size(self.shape).numel()
        return buffer[self.start : self.start + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Staged:
    """Arguments of forward passes in one buffer on the host: uint8, of which `size` are used."""

    buffer: torch.Tensor
    size: int
    arguments: list[Any]


class Staging:
    """Buffers of one rank for one device. Any thread may `fill`, one `copies`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: deque[torch.Tensor] = deque()
        # Buffers that are being copied, each with what says that it is done.
        self._busy: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fill(self, arguments: Sequence[Any]) -> Staged:
        """Lay the tensors in nested tuples into a buffer; anything else stays as it is."""
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
            # Some room: steps of a bucket differ by a few tokens.
            room = size + size // 8
            buffer = torch.empty(room, dtype=torch.uint8, pin_memory=self._stream is not None)
        return buffer

    def copies(self, staged: Staged) -> list[Any]:
        """Return the arguments on the device, after one copy; the buffer is used again later."""
        self._collect()
        source, event = staged.buffer[: staged.size], None
        if self._stream is None:
            on_device = source.clone()
        else:
            current = torch.cuda.current_stream(self._device)
            with torch.cuda.stream(self._stream):
                # Of this stream's memory: nothing that computes has to be waited for.
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
