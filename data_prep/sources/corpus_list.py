"""Makes the list of sources from paths, globs, folders and YAML corpus lists of the command line.

`expand_corpus` is the entry: `expand_path` turns one path or glob into paths of sources,
`sources_at` makes one `SourceSpec` of each (one per split of a Hugging Face DatasetDict), and
sources of the same name get names that tell them apart. A corpus list is a YAML file::

    defaults: {counts: raw, columns: {donor: donor_id, cell_type: cell_type}, organism: human}
    sources:
      - path: data/heart/*.h5ad        # relative to the list; globs, folders as elsewhere
        dataset: heart_atlas           # groups files for the quality filters
        columns: {donor: individual}   # name in the shards: column of obs
      - path: census:2025-01-30
        obs_filter: tissue_general == 'blood' and is_primary_data == True
        dataset_column: dataset_id
"""

from __future__ import annotations

import glob
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator
from typer.models import ParameterInfo

from data_prep.genes.annotation import organism_name
from data_prep.matrices.matrix_store import mtx_sample
from data_prep.sources.hugging_face import PREFIX, hub_splits
from data_prep.sources.source_spec import (
    CENSUS,
    SourceOptions,
    SourceSpec,
    source_at,
    split_path,
)
from data_prep.sources.token_corpus import split_names

# Names of the splits of a DatasetDict that count as training set and as held-out set.
_SIDES = {
    "train": ("train", "training"),
    "heldout": ("test", "validation", "valid", "val", "dev", "eval", "heldout", "held_out"),
}
_SUFFIXES = {".h5ad", ".h5mu", ".loom", ".zarr", ".h5", ".parquet", ".arrow"}


def _optional(name: str, hint: Any) -> tuple[Any, Any]:
    """Return a field of `SourceOptions` as one of a list, where it may be left out."""
    kind, *marks = get_args(hint)
    if name == "columns":
        kind = dict[str, str] | list[str]  # name in the shards -> column
    said = next(m.help for m in marks if isinstance(m, ParameterInfo))
    return kind | None, Field(None, description=said)


_HINTS = get_type_hints(SourceOptions, include_extras=True)
_OPTIONAL: dict[str, Any] = {name: _optional(name, hint) for name, hint in _HINTS.items()}
_Fields: Any = create_model(
    "_Fields", __config__=ConfigDict(extra="forbid", frozen=True), **_OPTIONAL
)


class _Settings(_Fields):
    """How sources are read; what is left out comes from `defaults`, then from the command line."""

    @field_validator("organism")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        return organism_name(name) if name is not None else None

    def over(self, options: SourceOptions) -> SourceOptions:
        """Return `options` with the settings of this entry in place of theirs."""
        given = {k: v for k, v in dict(self).items() if v is not None and hasattr(options, k)}
        if isinstance(self.columns, dict):
            given["columns"] = tuple(f"{name}={column}" for name, column in self.columns.items())
        elif self.columns is not None:
            given["columns"] = tuple(self.columns)
        if self.organism is not None:
            given["organism"] = organism_name(self.organism)
        return replace(options, **given)


class _Entry(_Settings):
    # File, folder or glob, relative to the list; or census:VERSION.
    path: str
    # Name that groups files for the quality filters; without it each file is its own data set.
    dataset: str | None = None


class _CorpusList(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    # Settings of entries that do not give their own.
    defaults: _Settings = _Settings()
    # The sources that the corpus is made of.
    sources: list[_Entry] = Field(min_length=1)


def expand_corpus(arguments: list[str], options: SourceOptions) -> list[SourceSpec]:
    """Return the sources that the arguments name, sorted within each glob or folder.

    Parameters
    ----------
    arguments
        Paths, globs, folders of files, ``census:...``, or YAML corpus lists.
    options
        Settings for all sources, as far as a corpus list does not give its own.

    Raises
    ------
    ValueError
        A path matches nothing, a corpus list is wrong (the message names all its problems), or a
        source is given more than once.
    """
    specs: list[SourceSpec] = []
    for argument in arguments:
        if Path(argument).suffix in (".yaml", ".yml"):
            specs += _read_list(Path(argument), options)
        else:
            specs += [s for p in expand_path(argument) for s in sources_at(p, options)]
    return _with_distinct_names(specs)


def sources_at(path: str, options: SourceOptions) -> list[SourceSpec]:
    """Return the source at a path, or one source for each split of a Hugging Face DatasetDict.

    Raises
    ------
    ValueError
        The name of a split says neither training set nor held-out set.
    """
    if path.startswith(PREFIX):
        names = hub_splits(path)
        if names == ["train"]:  # the Hub's name for a dataset without splits
            return [source_at(f"{path}#train", options)]
    else:
        names = [] if split_path(path)[1] else split_names(Path(path))
    if not names:
        return [source_at(path, options)]
    sides = {name: side for side, known in _SIDES.items() for name in known}
    unknown = [n for n in names if n.lower() not in sides]
    if unknown:
        raise ValueError(
            f"{path}: holds splits {names}, of which {unknown} are neither for training nor for "
            f"holding out; choose by name: {path}#{unknown[0]}"
        )
    specs = []
    for name in names:
        spec = source_at(f"{path}#{name}", options)
        specs.append(replace(spec, split=sides[name.lower()]))
    return specs


def expand_path(pattern: str) -> list[str]:
    """Return the paths of sources behind one argument.

    They are the path itself, the matches of a glob, or the files of a folder, sorted.
    """
    if pattern.startswith((f"{CENSUS}:", PREFIX)):
        return [pattern]
    path = Path(pattern)
    if split_path(pattern)[1] or split_names(path):
        return [pattern]
    if any(c in pattern for c in "*?[") and not path.exists():
        found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207  absolute patterns too
        if not found:
            raise ValueError(f"{pattern}: matches no file")
        return found
    if path.is_dir() and path.suffix not in _SUFFIXES:
        inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        matrices = [p for p in inside if p.suffix in _SUFFIXES - {".parquet", ".arrow"}]
        matrices += [p for p in inside if p.name.endswith(".zarr.zip")]
        # GEO keeps several 10x samples in one folder: GSM1_P1_matrix.mtx.gz.
        matrices += [p for p in inside if any(mtx_sample(p) or ())]
        matrices += [
            p for p in inside if list(p.glob("matrix.mtx*")) or (p / "state.json").exists()
        ]
        # A 10x folder, a Hugging Face folder, a SOMA experiment or a zarr group is one source.
        markers = ("*.arrow", "*.parquet", "state.json", "matrix.mtx*", "__tiledb*", ".zgroup",
                   "zarr.json")  # fmt: skip
        if matrices and (list(path.glob("*.arrow")) or list(path.glob("*.parquet"))):
            raise ValueError(
                f"{pattern}: holds count matrices and token files; name them one by one"
            )
        if not any(list(path.glob(m)) for m in markers):
            if not matrices:
                raise ValueError(f"{pattern}: is a folder without any source; accepted: "
                                 f"{sorted(_SUFFIXES)} and 10x folders")  # fmt: skip
            return [str(p) for p in sorted(matrices)]
    return [pattern]


def _read_list(path: Path, options: SourceOptions) -> list[SourceSpec]:
    try:
        content = yaml.safe_load(path.read_text())
        corpus = _CorpusList.model_validate(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not readable as YAML ({error})") from error
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()
        )
        raise ValueError(f"{path}: {problems}") from error
    specs = []
    for entry in corpus.sources:
        settings = entry.over(corpus.defaults.over(options))
        is_census = entry.path.startswith((f"{CENSUS}:", PREFIX))
        pattern = entry.path if is_census else str(path.parent / entry.path)
        for spec in [s for p in expand_path(pattern) for s in sources_at(p, settings)]:
            specs.append(replace(spec, dataset=entry.dataset or spec.dataset))
    return specs


def _with_distinct_names(specs: list[SourceSpec]) -> list[SourceSpec]:
    """Return the sources with distinct names.

    Files of the same name get as many folder names in front as tell them apart, because Cell Ranger
    gives every matrix the same name. A Census gets its organism and its filter appended.
    """
    double = [s for s, n in Counter(_identity(s) for s in specs).items() if n > 1]
    if double:
        raise ValueError(f"{double[0][0]}: given more than once")
    result = list(specs)
    for name, number in Counter(s.name for s in specs).items():
        group = [i for i, s in enumerate(specs) if s.name == name]
        depth, deepest = 1, max(len(Path(specs[i].path).absolute().parts) for i in group)
        while len({_name(specs[i], depth) for i in group}) < number and depth <= deepest:
            depth += 1
        for i in group if number > 1 else []:
            longer = _name(specs[i], depth)
            dataset = longer if specs[i].dataset == name else specs[i].dataset
            result[i] = replace(specs[i], name=longer, dataset=dataset)
    return result


def _identity(spec: SourceSpec) -> tuple[str, str | None, str | None]:
    is_census = spec.path.startswith((f"{CENSUS}:", PREFIX))
    path = spec.path if is_census else str(Path(spec.path).resolve())
    return path, spec.options.organism, spec.options.obs_filter


def _name(spec: SourceSpec, depth: int) -> str:
    """Return a source's name with `depth` folders in front, or with a Census' query appended."""
    if spec.path.startswith(f"{CENSUS}:"):
        query = (spec.options.organism, spec.options.obs_filter)
        return " ".join([spec.name, *(q for q in query if q)])
    path = Path(spec.path).absolute()
    folders = path.parent.parts[1:]
    if depth > len(folders):  # s.h5ad and s.loom in one folder differ by their suffix only
        return f"{folders[-1]}/{path.name}"
    return "/".join([*folders[len(folders) - depth :], spec.name])


def carried_columns(specs: list[SourceSpec]) -> tuple[str, ...]:
    """Return the metadata columns of the shards: every column that any source carries, sorted."""
    return tuple(sorted({c for s in specs for c in s.options.column_names}))
