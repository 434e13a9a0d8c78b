"""Read weights, moments and step count of a DeepSpeed checkpoint that any program wrote.

ZeRO 1 and 2 put the parameters of a group one after another into one vector and cut it into one
part per rank; ZeRO 3 cuts each parameter. The files tell which parameters they contain and in which
order. `find_tag` finds the files and `DeepSpeedReader` reads ranges from them.

The files are pickles from strangers, so only tensors and containers are read. Empty objects replace
DeepSpeed's own classes, and any other name in the pickles is refused.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from data_prep.files import file_sha256

_MODEL_FILES, _OPTIMIZER_FILES = "*_model_states.pt", "*_optim_states.pt"
_TAG_NAMES = ("latest", "latest_universal")
_UNIVERSAL = "zero"
# The kinds of `zero_state.MOMENTS`, and their files in a universal checkpoint.
_KINDS = {"weight": "fp32.pt", "exp_avg": "exp_avg.pt", "exp_avg_sq": "exp_avg_sq.pt"}
_DAMAGE = (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, KeyError, IndexError,
           TypeError)  # fmt: skip
# DeepSpeed pickles these classes of its own; nothing here uses more of them than the stage.
_KNOWN_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


class _Empty:
    """An empty object that replaces a pickled class of DeepSpeed; it accepts any arguments."""

    def __new__(cls, *_arguments: Any) -> _Empty:
        return super().__new__(cls)

    def __init__(self, *_arguments: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


def find_tag(folder: Path) -> Path | None:
    """Return the folder with the files of a DeepSpeed checkpoint, or None if there is none.

    Raises
    ------
    ValueError
        There are several checkpoints and no file says which is the latest, or the latest is
        missing.
    """
    if any(folder.glob(_MODEL_FILES)):
        return folder
    for name in _TAG_NAMES:
        if (folder / name).is_file():
            tag = (folder / name).read_text(errors="replace").strip()
            found = folder / Path(tag).name
            if Path(tag).name != tag or not any(found.glob(_MODEL_FILES)):
                raise ValueError(
                    f"{folder}: `{name}` names {tag!r}, which holds no DeepSpeed checkpoint"
                )
            return found
    tags = sorted({path.parent for path in folder.glob(f"*/{_MODEL_FILES}")})
    if len(tags) > 1:
        raise ValueError(
            f"{folder}: holds several DeepSpeed checkpoints ({', '.join(t.name for t in tags)}); "
            "write the name of one of them into a file `latest` there"
        )
    return tags[0] if tags else None


class DeepSpeedReader:
    """Reads ranges of parameters and moments from the files of a DeepSpeed checkpoint.

    Parameters
    ----------
    tag
        The folder that `find_tag` returned.

    Attributes
    ----------
    shapes
        Shapes of all trained parameters, by the names in the saved model.
    kind
        ``ZeRO 1 or 2``, ``ZeRO 3``, ``universal`` or ``ZeRO 0``, for messages.
    steps, updates
        Optimizer steps that the run had done, and those that the optimizer has counted (fewer if
        fp16 skipped some); None if the files do not tell.
    version
        Version of DeepSpeed.

    Raises
    ------
    ValueError
        Files are missing or damaged, contain other objects than tensors and containers, or are
        those of a model that was divided by tensor parallelism.
    """

    def __init__(self, tag: Path) -> None:
        self.tag = tag
        self._files: list[Path] = []
        # The stored pieces: kind -> name -> [(start, flat tensor)], in the order of starts.
        self._pieces: dict[str, dict[str, list[tuple[int, torch.Tensor]]]] = {k: {} for k in _KINDS}
        self.shapes: dict[str, torch.Size] = {}
        self.updates: int | None = None
        model_files = sorted(tag.glob(_MODEL_FILES))
        divided = [f for f in model_files if "mp_rank_00" not in f.name]
        if divided:
            raise ValueError(f"{divided[0]}: of a model divided by tensor parallelism; not read")
        model = self._load(model_files[0])
        self.steps: int | None = _as_number(model.get("global_steps"))
        self.version = str(model.get("ds_version"))
        try:
            self._find_pieces(model)
        except _DAMAGE as error:
            raise ValueError(
                f"{tag}: not as DeepSpeed writes checkpoints ({type(error).__name__}: {error}); "
                f"written by version {self.version}"
            ) from error

    def has_moments(self, names: Iterable[str]) -> bool:
        """Return whether both moments of AdamW are stored for the parameters of these names."""
        return all(name in self._pieces[kind] for kind in _KINDS for name in names)

    @property
    def digest(self) -> str:
        """Return a hash of all files that were opened."""
        hashes = "".join(file_sha256(path) for path in sorted(self._files))
        return hashlib.sha256(hashes.encode()).hexdigest()

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Return float32 [numel], a range of a flat parameter or moment; ``kind`` as in `Reader`.

        Raises
        ------
        ValueError
            The files do not contain the whole range.
        """
        out = torch.empty(numel)
        filled = 0
        for low, piece in self._pieces[kind].get(name, ()):
            a, b = max(low, start), min(low + len(piece), start + numel)
            if a < b:
                out[a - start : b - start] = piece[a - low : b - low]
                filled += b - a
        if filled != numel:
            raise ValueError(
                f"{self.tag}: {kind} of {name}: {filled} of {numel} elements are there"
            )
        return out

    def tensor(self, name: str) -> torch.Tensor:
        """Return a weight as float32 in its own shape."""
        shape = self.shapes[name]
        return self.read("weight", name, 0, shape.numel()).view(shape)

    def _load(self, path: Path) -> Any:
        self._files.append(path)
        return load_foreign(path)

    def _find_pieces(self, model: dict[str, Any]) -> None:
        optimizer_files = sorted(self.tag.glob(_OPTIMIZER_FILES), key=_rank_of)
        if (self.tag / _UNIVERSAL).is_dir():
            self.kind = "universal"
            self._read_universal(_shapes(model))
        elif not optimizer_files:
            self.kind = "ZeRO 0"
            for name, tensor in model["module"].items():
                self.shapes[name] = tensor.shape
                self._add("weight", name, 0, tensor)
        else:
            states = [self._load(path)["optimizer_state_dict"] for path in optimizer_files]
            self._require_all_ranks(states)
            groups = _shapes(model)
            self.shapes = {name: shape for group in groups for name, shape in group.items()}
            is_stage_3 = "fp32_flat_groups" in states[0]
            self.kind = "ZeRO 3" if is_stage_3 else "ZeRO 1 or 2"
            (self._read_stage_3 if is_stage_3 else self._read_stage_1_or_2)(groups, states)

    def _require_all_ranks(self, states: list[dict[str, Any]]) -> None:
        count = states[0]["partition_count"]
        count = max(count) if isinstance(count, list) else count
        if count != len(states):
            raise ValueError(
                f"{self.tag}: {count} ranks saved, files of {len(states)} are there "
                f"({_OPTIMIZER_FILES})"
            )

    def _read_stage_1_or_2(
        self, groups: list[dict[str, torch.Size]], states: list[dict[str, Any]]
    ) -> None:
        for number, shapes in enumerate(groups):
            places = _places(shapes, states[0].get("param_alignment_paddings"), number)
            first = 0
            for state in states:
                weights = state["single_partition_of_fp32_groups"][number]
                vectors = {"weight": weights} | self._moments(state["base_optimizer_state"], number)
                for kind, vector in vectors.items():
                    for name, start in places.items():
                        self._add_overlap(kind, name, vector, first, start, shapes[name].numel())
                self._count(state.get("base_optimizer_state_step"))
                # The vectors have no padding, except at the end of the last part.
                first += len(weights)

    def _read_stage_3(
        self, groups: list[dict[str, torch.Size]], states: list[dict[str, Any]]
    ) -> None:
        for rank, state in enumerate(states):
            rows: dict[str, list[torch.Tensor]] = {"weight": state["fp32_flat_groups"]}
            numbers = range(len(rows["weight"]))
            moments = [self._moments(state["optimizer_state_dict"], n) for n in numbers]
            for kind in moments[0]:
                rows[kind] = [of[kind] for of in moments]
            for kind, vectors in rows.items():
                offset, ends = 0, _ends(vectors)
                for name, shape in ((n, s) for group in groups for n, s in group.items()):
                    share = -(-shape.numel() // len(states))
                    number = next(i for i, end in enumerate(ends) if offset < end)
                    at = offset - (ends[number] - len(vectors[number]))
                    own = max(0, min(share, shape.numel() - rank * share))
                    self._add(kind, name, rank * share, vectors[number][at : at + own])
                    offset += share

    def _moments(self, optimizer: Any, number: int) -> dict[str, torch.Tensor]:
        """Return the moments that torch's optimizer stores for vector `number`, by kind."""
        states = optimizer["state"] if isinstance(optimizer, dict) else optimizer
        if number not in states and isinstance(states, dict):
            return {}
        state = states[number]
        self._count(state.get("step"))
        if isinstance(optimizer, dict):
            # DeepSpeed's own Adam stores its step count here.
            self._count(optimizer["param_groups"][0].get("step"))
        return {kind: state[kind] for kind in _KINDS if kind in state}

    def _count(self, step: Any) -> None:
        found = _as_number(step)
        self.updates = self.updates if found is None else found

    def _read_universal(self, groups: list[dict[str, torch.Size]]) -> None:
        # The tensors of ZeRO 3 are flat.
        known = {name: shape for group in groups for name, shape in group.items()}
        for file in sorted((self.tag / _UNIVERSAL).rglob(_KINDS["weight"])):
            name = file.parent.name
            for kind, file_name in _KINDS.items():
                path = file.with_name(file_name)
                if not path.exists():
                    continue
                content = self._load(path)
                tensor = content["param"] if isinstance(content, dict) else content
                self.shapes.setdefault(name, known.setdefault(name, tensor.shape))
                self._add(kind, name, 0, tensor)
            if (step := file.with_name("step.pt")).exists():
                self._count(self._load(step))

    def _add_overlap(
        self, kind: str, name: str, vector: torch.Tensor, first: int, start: int, numel: int
    ) -> None:
        """Add the overlap of a vector that begins at `first` with a parameter at `start`."""
        a, b = max(first, start), min(first + len(vector), start + numel)
        if a < b:
            self._add(kind, name, a - start, vector[a - first : b - first])

    def _add(self, kind: str, name: str, start: int, piece: torch.Tensor) -> None:
        pieces = self._pieces[kind].setdefault(name, [])
        if piece.numel():
            pieces.append((start, piece.detach().reshape(-1)))


def load_foreign(path: Path) -> Any:
    """Return the tensors and containers that torch pickled into a file of unknown origin.

    Raises
    ------
    ValueError
        The file is damaged, or contains anything but tensors, containers and DeepSpeed's own
        classes, which are replaced by empty objects.
    """
    stand_ins: list[Any] = [(_Empty, name) for name in _KNOWN_CLASSES]
    try:
        with safe_globals(stand_ins):
            # Older versions of torch did not write zip files, and those files cannot be
            # memory-mapped.
            is_zip = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: is missing") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: refused as a pickle: {_asked_for(path, error)}") from error
    except (OSError, *_DAMAGE) as error:
        raise ValueError(f"{path}: is damaged or cut off ({_first_line(error)})") from error


def _asked_for(path: Path, error: Exception) -> str:
    try:
        asked = set(get_unsafe_globals_in_checkpoint(path)) - set(_KNOWN_CLASSES)
    except (ValueError, *_DAMAGE):  # not a zip file: torch's own message is used
        asked = set()
    return f"it asks for {', '.join(sorted(asked))}" if asked else _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _shapes(model: dict[str, Any]) -> list[dict[str, torch.Size]]:
    """Return name -> shape of the parameters of each group, in the order of their vectors."""
    return [
        {name: torch.Size(shape) for name, shape in group.items()}
        for group in model.get("param_shapes", [])
    ]


def _places(shapes: dict[str, torch.Size], paddings: Any, number: int) -> dict[str, int]:
    """Return where each parameter of a group begins in the vector of the group."""
    behind = paddings[number] if paddings else [0] * len(shapes)
    places, at = {}, 0
    for (name, shape), padding in zip(shapes.items(), behind, strict=True):
        places[name] = at
        at += shape.numel() + padding
    return places


def _ends(vectors: Iterable[torch.Tensor]) -> list[int]:
    ends, at = [], 0
    for vector in vectors:
        at += len(vector)
        ends.append(at)
    return ends


def _as_number(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float | torch.Tensor) else None


def _rank_of(path: Path) -> tuple[int, str]:
    """Return a sort key that puts the files of ranks in the order of ranks."""
    digits = "".join(c if c.isdigit() else " " for c in path.name.partition("rank_")[2]).split()
    return (int(digits[0]) if digits else 0), path.name
