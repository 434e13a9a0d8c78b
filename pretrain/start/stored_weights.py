"""Read the weights in a folder of any program: files of weights, or a DeepSpeed checkpoint."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from data_prep.files import file_sha256
from pretrain.export.model_folder import UNREADABLE, WEIGHT_FILES, weight_file
from pretrain.model.architectures import Architecture
from pretrain.start.from_deepspeed import DeepSpeedReader, find_tag

_LFS_POINTER = b"version https://git-lfs"
# Prefixes that programs put before names: DataParallel, torch.compile, a model that holds the
# network.
_WRAPPERS = ("module.", "_orig_mod.")
_HOLDER = "bert."


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a folder.

    Attributes
    ----------
    path
        The file of weights, or the folder of DeepSpeed's files.
    tensors
        float32, by the names of the network; each tensor once.
    sha256
        Hash of the file, or of DeepSpeed's files together.
    state
        The reader of DeepSpeed's files, for moments; None for a file of weights.
    names
        The names of the tensors in the files.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    sha256: str
    state: DeepSpeedReader | None
    names: dict[str, str]


def stored_weights(folder: Path, kind: Architecture, parameters: Collection[str]) -> StoredWeights:
    """Return the weights of a folder.

    A DeepSpeed checkpoint, whose weights are fp32, is preferred over a file of weights.

    Parameters
    ----------
    parameters
        Parameter names of the network that is to be filled. Files may omit their first part
        (``encoder.layer.0...``) or have prefixes before it (``module.bert.encoder.layer.0...``).

    Raises
    ------
    ValueError
        There are no weights, they cannot be read, or the head is not tied to the embeddings.
    """
    tag = find_tag(folder)
    if tag is None:
        path, state = weight_file(folder), None
        found, sha256 = _read_file(path), file_sha256(path)
    else:
        path, state = tag, DeepSpeedReader(tag)
        found, sha256 = {n: state.tensor(n) for n in state.shapes}, state.digest
    try:
        names = own_names(found, parameters, kind)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tensors = {own: found[theirs] for own, theirs in names.items()}
    for copy, name in kind.tied.items():
        if copy in tensors:
            twin = tensors.pop(copy)
            if not torch.equal(tensors.setdefault(name, twin), twin):
                raise ValueError(f"{path}: {copy} differs from {name}; only tied heads are known")
            names.setdefault(name, names.pop(copy))
    tensors = {k: t for k, t in tensors.items() if not k.startswith(kind.not_used)}
    return StoredWeights(path, tensors, sha256, state, {n: names[n] for n in tensors})


def stored_sha256(folder: Path) -> str | None:
    """Return the hash of the weights in a folder (`StoredWeights.sha256`), None without weights."""
    tag = find_tag(folder)
    if tag is not None:
        return DeepSpeedReader(tag).digest
    present = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    return file_sha256(present[0]) if present else None


def own_names(
    found: Collection[str], parameters: Collection[str], kind: Architecture
) -> dict[str, str]:
    """Return network name -> name in a file; names that match no parameter stay unchanged.

    Raises
    ------
    ValueError
        Two names in the file belong to the same parameter.
    """
    base = kind.embedding.partition(".")[0] + "."
    known = {*parameters, *kind.tied}
    own: dict[str, str] = {}
    for theirs in found:
        bare = _without_wrappers(theirs)
        spellings = (bare, base + bare, bare.removeprefix(base), bare.removeprefix(_HOLDER))
        name = next((s for s in spellings if s in known or s.startswith(kind.not_used)), bare)
        if name in own:
            raise ValueError(f"{own[name]} and {theirs} are both {name}; which is meant?")
        own[name] = theirs
    return own


def _without_wrappers(name: str) -> str:
    while any(name.startswith(wrapper) for wrapper in _WRAPPERS):
        name = name.partition(".")[2]
    return name


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    """Return the float32 tensors of a file; a pickled file may contain tensors only."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{path}: is a git-lfs pointer, not the file; run `git lfs pull`")
    try:
        if path.suffix == ".safetensors":
            stored = load_file(path)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.float() for name, tensor in stored.items()}
    except UNREADABLE as error:
        raise ValueError(f"{path}: the weights cannot be read ({error})") from error
