"""Save and restore the training state that ZeRO divides, independent of stage and world size.

Every rank writes the parts that it owns: for each parameter a range of its flat fp32 weight and of
its optimizer state (two moments for AdamW, a momentum for Muon), with the start of the range
(`owned_fragments`, `Snapshot`). A `FragmentReader` reads any range again, from any number of files.
Thus a run continues with another world size or stage without any conversion, from safetensors files
alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# The optimizer state of every element, by the kind of its parameter group.
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum",)}
KINDS = ("weight", *MOMENTS["adamw"])
BYTES_PER_PARAMETER = 4 * len(KINDS)


@dataclass(frozen=True)
class Fragment:
    """A range of one flat parameter that this rank owns.

    Attributes
    ----------
    name, start, numel
        The parameter's name, and the range in it.
    flat, offset
        The tensor that the torch optimizer updates, and where the range begins in it (flattened).
    state
        The optimizer state of `flat`; empty before the first step.
    """

    name: str
    start: int
    numel: int
    flat: torch.Tensor
    offset: int
    state: dict[str, torch.Tensor]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Return live fp32 views by kind: ``weight``, and those of `MOMENTS` that exist."""
        known = {k for kinds in MOMENTS.values() for k in kinds}
        moments = {k: v for k, v in self.state.items() if k in known}
        return {k: self._view(t) for k, t in ({"weight": self.flat} | moments).items()}

    def _view(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def owned_fragments(engine, stage: int, rank: int) -> Iterator[Fragment]:
    """Yield this rank's fragments of a DeepSpeed engine, with moments after `ensure_moments`.

    At stage 0 rank 0 owns everything.
    """
    states = torch_optimizer(engine, stage).state
    for name, parameter in engine.module.named_parameters():
        if stage == 0:
            if rank == 0:
                yield Fragment(name, 0, parameter.numel(), parameter, 0, states[parameter])
        elif stage == 3:
            yield from _fragments_stage_3(engine, name, parameter, rank)
        elif (mapping := parameter._hp_mapping) is not None:
            flat = _vectors(engine, stage)[mapping.param_group_index][0]
            at, address = mapping.hp_fragment_address.start, mapping.lp_fragment_address
            yield Fragment(name, address.start, address.numel, flat, at, states[flat])


def _fragments_stage_3(engine, name: str, parameter, rank: int) -> Iterator[Fragment]:
    share = parameter.ds_tensor.ds_numel
    start = rank * share
    numel = min(share, parameter.ds_numel - start)
    if numel > 0:
        zero = engine.optimizer
        view, group = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=True)
        flat = zero.fp32_partitioned_groups_flat[group]
        at = view.storage_offset() - flat.storage_offset()
        yield Fragment(name, start, numel, flat, at, zero.optimizer.state[flat])


def _vectors(engine, stage: int) -> list[tuple[torch.Tensor, dict]]:
    """Return (tensor, parameter group) of all tensors that torch's optimizer updates, in order."""
    groups = torch_optimizer(engine, stage).param_groups
    if stage < 3:
        return [(p, g) for g in groups for p in g["params"]]
    zero = engine.optimizer
    flats = enumerate(zero.fp32_partitioned_groups_flat)
    return [(flat, groups[zero.sub_group_to_group_id[number]]) for number, flat in flats]


def vectors_of_kind(engine, stage: int, kind: str) -> list[torch.Tensor]:
    """Return the tensors that the torch optimizer updates in groups of one kind of `MOMENTS`."""
    return [flat for flat, group in _vectors(engine, stage) if _kind(group) == kind]


def _kind(group: dict) -> str:
    return group.get("kind", "adamw")


def torch_optimizer(engine, stage: int) -> torch.optim.Optimizer:
    """Return the torch optimizer inside a DeepSpeed engine."""
    return engine.optimizer if stage == 0 else engine.optimizer.optimizer


def ensure_moments(engine, stage: int, step: int | None = None) -> None:
    """Create the optimizer state before the first step, and link it to the parameters.

    Parameters
    ----------
    step
        Number of finished optimizer steps to set; None leaves existing state unchanged.
    """
    optimizer = torch_optimizer(engine, stage)
    for flat, group in _vectors(engine, stage):
        state, kind = optimizer.state[flat], _kind(group)
        if not state:
            for moment in MOMENTS[kind]:
                state[moment] = torch.zeros_like(flat, dtype=torch.float32)
            if kind == "adamw":
                state["step"] = torch.tensor(0.0, device=flat.device)
        if step is not None and kind == "adamw":
            # Each state has its own tensor, because torch increments it in place.
            state["step"] = torch.tensor(float(step), device=flat.device)
    if stage in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


class Snapshot:
    """A copy of this rank's fragments in host memory, which is reused for every checkpoint."""

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._starts: dict[str, int] = {}

    def take(self, engine, stage: int, rank: int) -> None:
        """Copy the fragments of an engine; training may continue when this returns."""
        ensure_moments(engine, stage)
        on_gpu = False
        for fragment in owned_fragments(engine, stage, rank):
            self._starts[fragment.name] = fragment.start
            for kind, tensor in fragment.tensors.items():
                key = f"{kind}/{fragment.name}"
                if key not in self._tensors:
                    self._tensors[key] = torch.empty(
                        tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
                    )
                self._tensors[key].copy_(tensor.detach(), non_blocking=True)
                on_gpu |= tensor.is_cuda
        if on_gpu:
            torch.cuda.synchronize()

    def write(self, path: Path) -> None:
        """Write the copy to one safetensors file."""
        save_file(self._tensors, path, metadata={"starts": json.dumps(self._starts)})


class FragmentReader:
    """Reads ranges of parameters from the fragment files of any number of ranks."""

    def __init__(self, paths: list[Path]) -> None:
        self._files = [safe_open(p, framework="pt") for p in paths]
        # The stored ranges: name -> [(start, stop, file)]
        self._ranges: dict[str, list[tuple[int, int, int]]] = {}
        for number, file in enumerate(self._files):
            for name, start in json.loads(file.metadata()["starts"]).items():
                numel = file.get_slice(f"weight/{name}").get_shape()[0]
                self._ranges.setdefault(name, []).append((start, start + numel, number))
        for ranges in self._ranges.values():
            ranges.sort()

    @property
    def names(self) -> list[str]:
        return sorted(self._ranges)

    def kinds(self, name: str) -> list[str]:
        """Return the kinds of tensors that are stored for a parameter, including ``weight``."""
        keys = self._files[self._ranges[name][0][2]].keys()
        return [kind for kind, _, of in (key.partition("/") for key in keys) if of == name]

    def numel(self, name: str) -> int:
        """Return how many elements of a parameter are stored."""
        return sum(stop - start for start, stop, _ in self._ranges[name])

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Return float32 [numel], a range of a flat parameter or moment."""
        out = torch.empty(numel)
        filled = 0
        for low, high, number in self._ranges[name]:
            a, b = max(low, start), min(high, start + numel)
            if a < b:
                stored = self._files[number].get_slice(f"{kind}/{name}")
                out[a - start : b - start] = stored[a - low : b - low]
                filled += b - a
        assert filled == numel, f"{name}: {filled} of {numel} elements are in the checkpoint"
        return out


class Reader(Protocol):
    """The interface for reading ranges of flat parameters and moments."""

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Return float32 [numel], a range of a flat parameter or moment."""
        ...


class Renamed:
    """A reader whose parameters have other names; `names` maps the requested to the stored name."""

    def __init__(self, reader: Reader, names: dict[str, str]) -> None:
        self._reader, self._names = reader, names

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Return float32 [numel], a range of a flat parameter or moment."""
        return self._reader.read(kind, self._names[name], start, numel)


def load_weights(module: torch.nn.Module, reader: Reader) -> None:
    """Fill a module with fp32 weights, before DeepSpeed receives it."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            flat = reader.read("weight", name, 0, parameter.numel())
            parameter.copy_(flat.view_as(parameter))


def restore_training_state(engine, stage: int, rank: int, reader: Reader, step: int) -> None:
    """Restore master weights, moments and step count of an engine.

    The module of the engine must have the weights already.
    """
    ensure_moments(engine, stage, step)
    read: Callable[[str, Fragment], torch.Tensor] = lambda kind, f: reader.read(  # noqa: E731
        kind, f.name, f.start, f.numel
    )
    with torch.no_grad():
        # At stage 0 only rank 0 owns fragments when a checkpoint is written, but every rank
        # restores all of them.
        for fragment in owned_fragments(engine, stage, 0 if stage == 0 else rank):
            for kind, tensor in fragment.tensors.items():
                tensor.copy_(read(kind, fragment))
