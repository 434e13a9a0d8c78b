"""The gene vocabulary: gene ids and their tokens, medians, special tokens, encoding options.

`open_vocabulary` reads a vocabulary of this project (`load_vocabulary`) or makes one from
Geneformer's dictionaries (`from_dictionaries`). One content hash covers the whole vocabulary. It is
passed on from shards to checkpoint, export and evaluation, so that tokens made with one vocabulary
never meet a model trained with another.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from data_prep.genes.gene_names import GeneLookup

logger = logging.getLogger(__name__)

VOCABULARY_FORMAT = "geneloom-vocabulary/1"
PAD, MASK, CLS, EOS = "<pad>", "<mask>", "<cls>", "<eos>"
# Geneformer: 2,048 tokens without special tokens (V1), 4,096 with <cls> and <eos> (V2).
MAX_LENGTH_PLAIN, MAX_LENGTH_SPECIAL = 2048, 4096
TARGET_SUM = 10_000.0
# How equal values are ordered. The rule is part of the hash because it decides token sequences.
TIE_RULE = "token-id-ascending"


@dataclass(frozen=True)
class Vocabulary:
    """Genes with their tokens and medians, special tokens, and the options of the encoding.

    Attributes
    ----------
    genes
        Gene ids in token order; the token of ``genes[i]`` is ``first_gene_token + i``.
    medians
        float64 [num_genes], median of the non-zero values of counts / total x 10,000; all > 0.
    special_tokens
        Tokens of ``<pad>`` and ``<mask>``, and of both or none of ``<cls>`` and ``<eos>``.
    max_length
        Length of the longest sequence, special tokens included.
    aliases
        Gene id of this vocabulary for each other id (retired Ensembl ids, symbols).
    names
        Gene id for each current symbol, to find genes in files (`data_prep.genes.gene_names`). The
        symbols are not in the hash, because nothing that a model has learnt depends on them.
    """

    genes: tuple[str, ...]
    medians: np.ndarray
    special_tokens: dict[str, int]
    max_length: int
    aliases: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        specials = sorted(self.special_tokens.values())
        if PAD not in self.special_tokens or MASK not in self.special_tokens:
            raise ValueError(f"vocabulary: {PAD} and {MASK} are required")
        if (CLS in self.special_tokens) != (EOS in self.special_tokens):
            raise ValueError(f"vocabulary: {CLS} and {EOS} come together or not at all")
        if specials != list(range(len(specials))):
            raise ValueError(f"vocabulary: special tokens must be 0..n-1, found {specials}")
        if len(set(self.genes)) != len(self.genes) or not self.genes:
            raise ValueError("vocabulary: needs at least one gene, and each gene once")
        if self.medians.shape != (len(self.genes),):
            raise ValueError("vocabulary: one median per gene")
        bad = [g for g, m in zip(self.genes, self.medians, strict=True) if not 0 < m < np.inf]
        if bad:
            raise ValueError(f"vocabulary: {len(bad)} medians are not positive, e.g. of {bad[:3]}")
        if self.max_length < 8:
            raise ValueError(f"vocabulary: max_length {self.max_length} is below 8")

    @property
    def first_gene_token(self) -> int:
        return len(self.special_tokens)

    @property
    def num_tokens(self) -> int:
        """Number of special tokens and genes, the size of the embedding table."""
        return len(self.special_tokens) + len(self.genes)

    @property
    def pad_token(self) -> int:
        return self.special_tokens[PAD]

    @property
    def mask_token(self) -> int:
        return self.special_tokens[MASK]

    @property
    def has_cls(self) -> bool:
        return CLS in self.special_tokens

    @property
    def has_medians(self) -> bool:
        """Whether the medians are known; if not, all of them are the same placeholder number."""
        return bool((self.medians != self.medians[0]).any())

    @cached_property
    def token_of(self) -> dict[str, int]:
        """Token id of each gene id and each alias."""
        tokens = {g: i for i, g in enumerate(self.genes, self.first_gene_token)}
        return {a: tokens[g] for a, g in self.aliases.items()} | tokens

    @cached_property
    def median_of_token(self) -> np.ndarray:
        """Median of each token, float64 [num_tokens]; NaN for special tokens."""
        return np.concatenate([np.full(self.first_gene_token, np.nan), self.medians])

    def tokens_of(self, gene_ids: list[str]) -> np.ndarray:
        """Return int32 [names], the tokens of gene ids or other names, -1 for unknown names."""
        return self.lookup.find_all(gene_ids).tokens

    @cached_property
    def lookup(self) -> GeneLookup:
        """The lookup that finds genes by id, previous id or symbol."""
        tokens = {g: i for i, g in enumerate(self.genes, self.first_gene_token)}
        return GeneLookup(tokens, self.aliases, self.names)

    def to_json(self) -> str:
        """Return the canonical JSON text that the hash is taken of."""
        return self._text

    @cached_property
    def _text(self) -> str:
        content = {
            "format": VOCABULARY_FORMAT,
            "encoding": {
                "max_length": self.max_length,
                "target_sum": TARGET_SUM,
                "tie_rule": TIE_RULE,
            },
            "special_tokens": self.special_tokens,
            "genes": list(self.genes),
            "medians": [float(m) for m in self.medians],
            "aliases": self.aliases,
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @cached_property
    def sha256(self) -> str:
        """Content hash of genes, medians, special tokens, aliases and encoding options."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @cached_property
    def file_text(self) -> str:
        """The content of ``vocabulary.json``: the hashed text together with the symbols."""
        if not self.names:
            return self.to_json() + "\n"
        # Keys are sorted and "names" comes before "special_tokens", so the hashed text is kept and
        # the names are inserted.
        head, mark, tail = self.to_json().rpartition(',"special_tokens":')
        names = json.dumps(self.names, sort_keys=True, separators=(",", ":"))
        return f'{head},"names":{names}{mark}{tail}\n'

    def save(self, path: Path) -> None:
        path.write_text(self.file_text)


def load_vocabulary(path: Path) -> Vocabulary:
    """Return the vocabulary stored in a ``vocabulary.json`` of this project.

    Raises
    ------
    ValueError
        The file is missing, is not JSON, or has another format.
    """
    content = _read_json(path)
    if not isinstance(content, dict) or content.get("format") != VOCABULARY_FORMAT:
        raise ValueError(f"{path}: not a vocabulary of format {VOCABULARY_FORMAT}")
    missing = {"encoding", "genes", "medians", "special_tokens", "aliases"} - content.keys()
    if missing:
        raise ValueError(f"{path}: is damaged, it has no {sorted(missing)}")
    encoding = content["encoding"]
    if (encoding["target_sum"], encoding["tie_rule"]) != (TARGET_SUM, TIE_RULE):
        raise ValueError(f"{path}: made with other encoding options: {encoding}")
    return Vocabulary(
        genes=tuple(content["genes"]),
        medians=np.array(content["medians"], dtype=np.float64),
        special_tokens=content["special_tokens"],
        max_length=encoding["max_length"],
        aliases=content["aliases"],
        names=content.get("names", {}),
    )


def open_vocabulary(
    path: Path,
    medians: Path | None = None,
    gene_mapping: Path | Sequence[Path] | None = None,
    max_length: int | None = None,
) -> Vocabulary:
    """Return a vocabulary from this project's JSON or from Geneformer's published dictionaries.

    Parameters
    ----------
    path
        A ``vocabulary.json``, a folder that holds one, a Geneformer token dictionary (pickle or
        JSON), or a folder with Geneformer's dictionaries under their published names.
    medians
        Geneformer's median dictionary. When `path` is a folder, it is found there.
    gene_mapping
        Dictionaries that map other ids or symbols to gene ids, in addition to the Ensembl mapping
        and the table of names that a folder has. The last entry for a name counts.
    max_length
        Length of the longest sequence; None: 4,096 with ``<cls>``/``<eos>`` (V2), 2,048 without
        (V1).
    """
    given = [gene_mapping] if isinstance(gene_mapping, Path) else list(gene_mapping or ())
    own_mapping = names = None
    if path.is_dir():
        own = path / "vocabulary.json"
        if own.exists():
            path = own
        else:
            medians = medians or _find(path, "gene_median_dictionary*")
            own_mapping = _find(path, "ensembl_mapping_dict*", required=False)
            names = _find(path, "gene_name_id_dict*", required=False)
            path = _find(path, "token_dictionary*")  # type: ignore[assignment]
    tokens = read_dictionary(path)
    if isinstance(tokens, dict) and tokens.get("format") == VOCABULARY_FORMAT:
        if medians or max_length:
            raise ValueError(
                f"{path}: is a complete vocabulary; --medians and --max-length belong to a "
                "Geneformer token dictionary"
            )
        complete = load_vocabulary(path)
        known = set(complete.genes)
        more = _known_only(merged_mappings(given), known)
        return replace(complete, names=complete.names | more) if more else complete
    if medians is None:
        raise ValueError(
            f"{path}: a token dictionary needs its median dictionary beside it; give --medians FILE"
        )
    mapping = merged_mappings([*([own_mapping] if own_mapping else []), *given])
    found = from_dictionaries(tokens, read_dictionary(medians), mapping, max_length)
    if names is None:
        return found
    return replace(found, names=_known_only(read_dictionary(names), set(found.genes)))


def merged_mappings(paths: Path | Sequence[Path] | None) -> dict[str, str]:
    """Return the entries of all dictionaries; where they differ, those of the last one."""
    merged: dict[str, str] = {}
    for path in [paths] if isinstance(paths, Path) else paths or ():
        entries = {str(name): str(gene) for name, gene in read_dictionary(path).items()}
        changed = [n for n, gene in entries.items() if merged.get(n, gene) != gene]
        if changed:
            logger.warning(
                "%s: %d names were mapped to other genes before, e.g. %s to %s; what this file "
                "says counts", path, len(changed), changed[0], merged[changed[0]],
            )  # fmt: skip
        merged |= entries
    return merged


def _known_only(names: dict[str, str], known: set[str]) -> dict[str, str]:
    found = {str(n): str(g) for n, g in names.items() if g in known and n not in known}
    return {name: found[name] for name in sorted(found)}


def from_dictionaries(
    tokens: dict[str, int],
    medians: dict[str, float],
    gene_mapping: dict[str, str] | None = None,
    max_length: int | None = None,
) -> Vocabulary:
    """Return the vocabulary that Geneformer's dictionaries describe, with unchanged token ids.

    Raises
    ------
    ValueError
        Token ids are not contiguous, a gene has no positive median, or special tokens are missing.
    """
    try:
        numbers = {str(k): int(v) for k, v in tokens.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"token dictionary: values must be integers ({error})") from error
    special = {k: v for k, v in numbers.items() if k.startswith("<")}
    ordered = sorted((v, k) for k, v in numbers.items() if k not in special)
    if [v for v, _ in ordered] != list(range(len(special), len(numbers))):
        raise ValueError("token dictionary: gene tokens must be contiguous after the special ones")
    genes = tuple(k for _, k in ordered)
    missing = [g for g in genes if g not in medians]
    if missing:
        raise ValueError(
            f"median dictionary: {len(missing)} genes of the token dictionary are absent, e.g. "
            f"{missing[:3]}; use the two files of the same Geneformer version"
        )
    known = set(genes)
    aliases = {str(a): str(g) for a, g in (gene_mapping or {}).items() if g in known and a != g}
    default = MAX_LENGTH_SPECIAL if CLS in special else MAX_LENGTH_PLAIN
    return Vocabulary(
        genes=genes,
        medians=np.array([float(medians[g]) for g in genes]),
        special_tokens=special,
        max_length=max_length or default,
        aliases={a: aliases[a] for a in sorted(aliases) if a not in known},
    )


def read_dictionary(path: Path) -> dict:
    """Return the dictionary in a JSON file, or in a pickle that holds plain values only."""
    content = _read_json(path) if path.suffix == ".json" else _read_plain_pickle(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dictionary")
    return content


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles containers, text, numbers and numpy scalars; refuses every other class."""

    _ALLOWED = {
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy", "dtype"),
        ("collections", "OrderedDict"),
    }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_plain_pickle(path: Path) -> object:
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"{path}: no such file") from error
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: is a git-lfs pointer, not the file; run `git lfs pull`")
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(
            f"{path}: refused as a pickle ({error}); only plain dictionaries are opened"
        ) from error


def _find(folder: Path, pattern: str, required: bool = True) -> Path | None:
    """Return the only file that matches a pattern, JSON before pickle.

    None if no file matches and none is required.
    """
    for suffix in (".json", ".pkl", ".pickle"):
        found = sorted(folder.glob(pattern + suffix))
        if len(found) > 1:
            raise ValueError(f"{folder}: several files match {pattern}{suffix}: name one of them")
        if found:
            return found[0]
    if required:
        raise ValueError(f"{folder}: no {pattern}.json or .pkl; is this Geneformer's folder?")
    return None
