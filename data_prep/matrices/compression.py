"""Finds compression filters that a file needs and this installation lacks.

Such a file gets an error that names the filter and the package to install, and is not called
damaged. `require_filters` checks HDF5 files, `missing_codec` interprets errors of zarr.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import h5py

# Registered filter numbers: https://github.com/HDFGroup/hdf5_plugins, and those of hdf5plugin.
_FILTERS = {
    307: "bzip2", 32000: "lzf", 32001: "blosc", 32004: "lz4", 32008: "bitshuffle", 32013: "zfp",
    32015: "zstd", 32017: "sz", 32018: "fcidecomp", 32024: "sz3", 32026: "blosc2", 32028: "sperr",
}  # fmt: skip
# Files, in their present state, whose filters are all available.
_FINE: set[tuple[str, int, int, int, int]] = set()
_MOST_FINE = 10_000
# Groups and datasets that may be read; other parts of a file are not checked.
_READ = ("X", "raw", "layers", "obs", "var", "mod", "matrix", "row_attrs", "col_attrs")


def require_filters(path: object, root: h5py.File) -> None:
    """Make the filters of an HDF5 file available; those that HDF5 lacks come from hdf5plugin.

    Raises
    ------
    ValueError
        A part of the file that may be read needs a filter that is not installed.
    """
    state = Path(str(path)).stat()
    key = (str(path), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    if key in _FINE:  # a process opens a file twice, and checking all its parts takes a while
        return
    missing = _missing(root)
    if not missing:
        if len(_FINE) >= _MOST_FINE:
            _FINE.clear()
        _FINE.add(key)
        return
    if _import_plugins():
        missing = _missing(root)
    if missing:
        names = ", ".join(sorted({f"{name} ({dataset})" for dataset, name in missing.items()})[:3])
        raise ValueError(
            f"{path}: is compressed with {names}: needs hdf5plugin, or a version of it that has "
            "this filter; pip install hdf5plugin"
        )


def _import_plugins() -> bool:
    try:
        importlib.import_module("hdf5plugin")
    except ImportError:
        return False
    return True


def _missing(root: h5py.File) -> dict[str, str]:
    """Return the name of the missing filter for each dataset of a file that needs one."""
    found: dict[str, str] = {}

    def look(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset) or item.chunks is None:
            return
        plan = item.id.get_create_plist()
        for number in range(plan.get_nfilters()):
            code, _, _, said = plan.get_filter(number)
            if not is_available(code):
                found[name] = _FILTERS.get(code, said.decode() or f"filter {code}")

    for part in _READ:
        if part in root:
            item = root[part]
            look(part, item)
            if isinstance(item, h5py.Group):
                item.visititems(lambda name, inner, part=part: look(f"{part}/{name}", inner))
    return found


def is_available(code: int) -> bool:
    """Return whether HDF5 can use the filter with this number."""
    return bool(h5py.h5z.filter_avail(code))


def missing_codec(error: BaseException) -> str | None:
    """Return the message for an error that means that zarr lacks a codec; None otherwise."""
    text = str(error)
    unknown = "codec" in text.lower() and ("not available" in text or "nknown" in text)
    if type(error).__name__ == "UnknownCodecError" or unknown:
        return (
            f"is compressed with a codec that is not installed ({text}): needs numcodecs with it, "
            "or the package that brings it; pip install 'numcodecs[msgpack,zfpy,pcodec]'"
        )
    return None
