"""Read and write the folder of a perturbation screen, whose parts are complete or absent.

`ResultsWriter` writes a screen and `Results` reads it. ``manifest.json`` describes what was
computed and from what. ``cells.parquet`` and ``perturbations.parquet`` describe the rows and
columns of the screen. ``shifts/part-NNNNN.parquet`` contain its values, one part for each range of
cells; ``gene_shifts/`` contains those of single genes, if asked for. docs/perturbation.md describes
every column.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.files import complete_file, names_in

logger = logging.getLogger(__name__)

PERTURB_FORMAT = "geneloom-perturb/1"
MANIFEST_NAME = "manifest.json"
_BEFORE_MANIFEST = ("perturbations", "states", "screen")
_KEYS = ("cell", "perturbation", "changed")
_IDENTITY = b"geneloom_screen"


@dataclass(frozen=True)
class Results:
    """A finished screen.

    Attributes
    ----------
    manifest
        Content of ``manifest.json``; ``settings`` are those of the screen, ``columns`` the values
        of a shift.
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, unfinished: bool = False) -> Results:
        """Return the screen in a folder.

        Parameters
        ----------
        unfinished
            Also open a screen that still runs or was killed, with the parts that exist.

        Raises
        ------
        ValueError
            The folder contains no screen, one of another format, or an unfinished one.
        """
        manifest = _read_manifest(folder)
        if manifest is None:
            raise ValueError(
                f"{folder}: no {MANIFEST_NAME}; expected a folder of `geneloom perturb`"
            )
        if not manifest["complete"] and not unfinished:
            raise ValueError(
                f"{folder}: this screen is not finished ({len(_parts(folder, 'shifts'))} of "
                f"{manifest['parts']} parts); start the same command again to go on"
            )
        return cls(folder, manifest)

    @property
    def columns(self) -> list[str]:
        """Return the names of the values: ``shift``, ``toward_<state>``, ``class_<label>``."""
        return self.manifest["columns"]

    @cached_property
    def cells(self) -> pd.DataFrame:
        """Return one row per perturbed cell: ``cell`` (its number), ``cell_id``, ``donor``, ..."""
        whole = self.folder / "cells.parquet"
        return pd.read_parquet(whole) if whole.exists() else _join(self.folder, "cells").to_pandas()

    @cached_property
    def perturbations(self) -> pd.DataFrame:
        """Return a row per perturbation: ``perturbation`` (its number), ``kind``, ``genes``, ..."""
        return pd.read_parquet(self.folder / "perturbations.parquet")

    def shifts(self, columns: list[str] | None = None) -> Iterator[pd.DataFrame]:
        """Yield tables of the values part by part, ordered by cell.

        Their columns are ``cell``, ``perturbation``, ``changed`` and the values.

        Parameters
        ----------
        columns
            Names of the values; None: all of them.

        Raises
        ------
        ValueError
            The screen has no such value.
        """
        unknown = [c for c in columns or [] if c not in self.columns]
        if unknown:
            raise ValueError(
                f"{self.folder}: has no value {unknown[0]!r}, only {', '.join(self.columns)}"
            )
        wanted = list(_KEYS) + (self.columns if columns is None else columns)
        for path in _parts(self.folder, "shifts"):
            yield pq.read_table(path, columns=wanted).to_pandas()

    def gene_shifts(self) -> Iterator[pd.DataFrame]:
        """Yield the shifts of genes part by part, as sums over a part's cells by donor.

        Columns ``donor``, ``perturbation``, ``gene``, ``cells``, ``sum``, ``sum_of_squares``.
        """
        for path in _parts(self.folder, "gene_shifts"):
            yield pq.read_table(path).to_pandas()

    def donor_means(self, column: str) -> pd.DataFrame:
        """Return the mean of a value over each donor's cells, for each perturbation.

        There is one row per perturbation and donor with a cell in which it applies:
        ``perturbation``, ``donor``, ``mean`` (float64), ``cells`` (int64). The memory is
        proportional to perturbations x donors.
        """
        donors = pd.Categorical(self.cells["donor"])
        code_of_cell = np.full(int(self.cells["cell"].max()) + 1, -1, dtype=np.int64)
        code_of_cell[self.cells["cell"]] = donors.codes
        shape = (len(self.perturbations), len(donors.categories))
        sums, counts = np.zeros(shape[0] * shape[1]), np.zeros(shape[0] * shape[1], dtype=np.int64)
        for part in self.shifts([column]):
            place = part["perturbation"].to_numpy(np.int64) * shape[1] + code_of_cell[part["cell"]]
            sums += np.bincount(place, part[column].to_numpy(np.float64), minlength=len(sums))
            counts += np.bincount(place, minlength=len(sums))
        seen = np.flatnonzero(counts)
        return pd.DataFrame(
            {
                "perturbation": (seen // shape[1]).astype(np.int32),
                "donor": np.asarray(donors.categories, dtype=object)[seen % shape[1]],
                "mean": sums[seen] / counts[seen],
                "cells": counts[seen],
            }
        )


class ResultsWriter:
    """Writes one screen part by part; existing parts are kept.

    Several processes may write parts of one screen: the first one calls `begin` before the others
    write, and `finish` after them.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], parts: int) -> None:
        """Take `identity`: all JSON values that determine the results (settings, model, cells)."""
        self.folder, self.identity, self.parts = folder, identity, parts
        text = json.dumps(identity, sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def begin(self, perturbations: pd.DataFrame, columns: list[str], about: dict[str, Any]) -> None:
        """Write manifest and perturbations, or check that the folder contains this same screen.

        A complete screen is left unchanged.

        Parameters
        ----------
        perturbations
            `kind`, `genes` (list of ids), `name`, `cells`, `mean_rank`, `detection`, ...; they are
            numbered here in their order.
        columns
            The names of the values in the parts.
        about
            Further entries of the manifest that do not determine results: counts, versions.

        Raises
        ------
        ValueError
            The folder contains another screen or other files.
        """
        self.require_own()
        if self.is_complete:
            return
        (self.folder / "shifts").mkdir(parents=True, exist_ok=True)
        numbered = perturbations.reset_index(drop=True)
        numbered.insert(0, "perturbation", np.arange(len(numbered), dtype=np.int32))
        self._write(
            self.folder / "perturbations.parquet",
            pa.Table.from_pandas(numbered, preserve_index=False),
        )
        manifest = {"format": PERTURB_FORMAT, "screen": self.digest, **self.identity, **about}
        manifest |= {"columns": columns, "parts": self.parts, "complete": False}
        _write_manifest(self.folder, manifest)

    @property
    def is_complete(self) -> bool:
        manifest = _read_manifest(self.folder)
        return manifest is not None and manifest["complete"]

    def require_own(self) -> None:
        """Raise ValueError if the folder contains another screen or other files."""
        manifest = _read_manifest(self.folder)
        if manifest is None:
            # A job that is killed before it has written the manifest leaves these files.
            left = {"shifts", *(f"{n}.parquet" for n in _BEFORE_MANIFEST)}
            if {n for n in names_in(self.folder) if not n.endswith(".partial")} - left:
                raise ValueError(f"{self.folder}: holds other files; give --out a new folder")
        elif manifest["screen"] != self.digest:
            other = "; ".join(_differences(manifest, self.identity))
            raise ValueError(
                f"{self.folder}: holds another screen ({other}); give --out a new folder, or the "
                "same cells, model and settings to go on with it"
            )

    def has_part(self, part: int) -> bool:
        """Return whether a part of this screen exists; it gets its name when it is complete."""
        path = self.folder / "shifts" / _part_name(part)
        if not path.exists():
            return False
        return (pq.read_schema(path).metadata or {}).get(_IDENTITY) == self.digest.encode()

    def write_part(
        self, part: int, cells: pa.Table, shifts: pa.Table, gene_shifts: pa.Table | None = None
    ) -> None:
        """Write one part; its shifts come last, because they mark it as done."""
        for name, table in (("cells", cells), ("gene_shifts", gene_shifts), ("shifts", shifts)):
            if table is not None:
                folder = self.folder / name
                folder.mkdir(exist_ok=True)
                self._write(folder / _part_name(part), table)

    def finish(self) -> None:
        """Join the parts of ``cells.parquet`` and mark the screen as complete."""
        if self.is_complete:
            return
        missing = [p for p in range(self.parts) if not self.has_part(p)]
        assert not missing, f"parts {missing[:5]} are not written"
        self._write(self.folder / "cells.parquet", _join(self.folder, "cells"))
        manifest = _read_manifest(self.folder)
        assert manifest is not None
        _write_manifest(self.folder, manifest | {"complete": True})
        shutil.rmtree(self.folder / "cells", ignore_errors=True)

    def _write(self, path: Path, table: pa.Table) -> None:
        metadata = (table.schema.metadata or {}) | {_IDENTITY: self.digest.encode()}
        with complete_file(path) as aside:
            pq.write_table(table.replace_schema_metadata(metadata), aside, compression="zstd")


def _part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"


def _parts(folder: Path, name: str) -> list[Path]:
    """Return the parts in the order of their numbers, which have five digits or more."""
    return sorted((folder / name).glob("part-*.parquet"), key=lambda p: int(p.stem[5:]))


def _join(folder: Path, name: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(p) for p in _parts(folder, name)])


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != PERTURB_FORMAT:
        raise ValueError(f"{path}: not of format {PERTURB_FORMAT}")
    return manifest


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with complete_file(folder / MANIFEST_NAME) as aside:
        aside.write_text(json.dumps(manifest, indent=1) + "\n")


def _differences(manifest: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """Return the differing settings, each as `name: there / here`."""
    found = []
    for key, here in identity.items():
        there = manifest.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            found += _differences(there, here)
        elif there != here:
            found.append(f"{key}: {str(there)[:40]} there, {str(here)[:40]} here")
    return found
