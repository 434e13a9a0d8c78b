"""What a gene of a file is called, and which gene of a vocabulary that is.

Each name is looked up on its own, so that a file may mix them, in this order:

1. as a gene of the vocabulary (*id*);
2. in the table of other ids (*previous id*);
3. the same without the version of an Ensembl id, and without a genome in front (*id without
   version or genome*);
4. as a current symbol (*symbol*);
5. as a symbol that a gene had before, or another name of the mapping (*previous symbol*).

What is not found as it is written is looked up once more in upper case, as Geneformer's tokenizer
for V2 does. Where upper case would make two different genes of a table one, neither is taken.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

ENSEMBL = re.compile(r"^ENS([A-Z]*)G\d{11}$")
ENSEMBL_VERSIONED = re.compile(r"^ENS[A-Z]*G\d{11}\.\d+(?:_PAR_Y)?$")
# Cell Ranger puts the genome in front of ids where a reference has two: GRCh38_ENSG...,
# mm10___Xkr4.
_GENOME_STARTS = ("GRCh", "GRCm", "hg", "mm", "Rnor", "mRatBN", "GRCz", "Mmul", "Sscrofa")
_GENOME = re.compile(rf"^((?:{'|'.join(_GENOME_STARTS)})_?\d[A-Za-z0-9.]*?)_+(?=.)")
# What pandas and R write where there is no name.
_NO_NAME = frozenset({"nan", "none", "na", "n/a", "<na>", "null", "-"})
_LONGEST_NO_NAME = max(map(len, _NO_NAME))
ID, PREVIOUS_ID = "id", "previous id"
CUT_ID = "id without version or genome"
SYMBOL, PREVIOUS_SYMBOL = "symbol", "previous symbol"
NOT_FOUND = "not found"
FOUND_AS = (ID, PREVIOUS_ID, CUT_ID, SYMBOL, PREVIOUS_SYMBOL, NOT_FOUND)
_NAMED = 10


def strip_version(gene_id: str) -> str:
    """Return an Ensembl id without its version (and ``_PAR_Y``); anything else unchanged."""
    if "." not in gene_id:  # most have none, and a pattern costs more to try
        return gene_id
    return gene_id.split(".", 1)[0] if ENSEMBL_VERSIONED.match(gene_id) else gene_id


def genome_of(gene_id: str) -> str:
    """Return the genome in front of a gene id: ``GRCh38`` of ``GRCh38_ENSG...``; '' without one."""
    found = _GENOME.match(gene_id) if gene_id.startswith(_GENOME_STARTS) else None
    return found[1] if found else ""


def without_genome(gene_id: str) -> str:
    """Return a gene id without the genome in front of it."""
    return _GENOME.sub("", gene_id) if gene_id.startswith(_GENOME_STARTS) else gene_id


def plain_id(gene_id: str) -> str:
    """Return a gene id without version and genome."""
    if "." not in gene_id and not gene_id.startswith(_GENOME_STARTS):
        return gene_id
    return strip_version(without_genome(gene_id))


def _is_ensembl(name: str) -> bool:
    """Return whether a name is an Ensembl id, or one that was made up where there is none."""
    plain = plain_id(name)
    made_up = plain.startswith("ENSG") and not plain[4:5].isdecimal()
    return made_up or bool(ENSEMBL.match(plain))


def present(gene_id: str) -> str:
    """Return a name, or '' for the words that stand where there is none."""
    name = gene_id.strip()
    return "" if len(name) <= _LONGEST_NO_NAME and name.lower() in _NO_NAME else name


@dataclass(frozen=True)
class FoundGenes:
    """Genes of a file under a vocabulary.

    Attributes
    ----------
    tokens
        int32 [names], -1 where not found.
    found_as
        One of `FOUND_AS` -> how many.
    upper_cased
        Of them those that were found in upper case only.
    case_collisions
        Names that differ in nothing but case from another name in the file that is the same gene,
        or from a name in the vocabulary's tables that is another gene.
    """

    tokens: np.ndarray
    found_as: dict[str, int]
    upper_cased: int
    case_collisions: list[str]


class GeneLookup:
    """Finds genes by any of their names.

    Parameters
    ----------
    tokens
        Gene id -> token.
    aliases
        Other ids and names -> gene id.
    names
        Current symbols -> gene id.
    """

    def __init__(
        self, tokens: Mapping[str, int], aliases: Mapping[str, str], names: Mapping[str, str]
    ) -> None:
        self._tokens, self._aliases, self._names = tokens, aliases, names
        self._memory: dict[str, tuple[int, str, bool]] = {}

    @cached_property
    def _current(self) -> frozenset[str]:
        return frozenset(name.upper() for name in self._names)

    @cached_property
    def _upper(self) -> tuple[dict[str, str], frozenset[str]]:
        """(name in upper case -> the name as a table writes it, names of two genes)."""
        written: dict[str, str] = {}
        several: set[str] = set()
        for table in (self._tokens, self._aliases, self._names):
            for name in table:
                upper = name.upper()
                before = written.setdefault(upper, name)
                if before is not name and self._token(before) != self._token(name):
                    several.add(upper)
        return {u: n for u, n in written.items() if u not in several}, frozenset(several)

    def _token(self, name: str) -> int:
        gene = self._aliases.get(name, self._names.get(name, name))
        return self._tokens.get(name, self._tokens.get(gene, -1))

    def _exact(self, name: str) -> str | None:
        """Return as what a name is found, if it is."""
        if name in self._tokens:
            return ID
        if name in self._aliases:
            if ENSEMBL.match(name):
                return PREVIOUS_ID
            return SYMBOL if name.upper() in self._current else PREVIOUS_SYMBOL
        return SYMBOL if name in self._names else None

    def find(self, name: str) -> tuple[int, str, bool]:
        """Return (token or -1, as what it was found, only in upper case?)."""
        how = self._exact(name)
        if how is not None:
            return self._token(name), how, False
        if not name:
            return -1, NOT_FOUND, False
        plain = plain_id(name)
        if plain != name and (how := self._exact(plain)) is not None:
            return self._token(plain), CUT_ID if how in (ID, PREVIOUS_ID) else how, False
        if ENSEMBL.match(plain):  # an id of another annotation has no other spelling
            return -1, NOT_FOUND, False
        written = self._upper[0].get(plain.upper())
        how = self._exact(written) if written is not None else None
        if written is None or how is None:
            return -1, NOT_FOUND, False
        return self._token(written), how, True

    def _known(self, name: str) -> tuple[int, str, bool]:
        # The files of a corpus have the same names: what is not found is looked for once.
        known = self._memory.get(name)
        if known is None:
            known = self._memory[name] = self.find(name)
        return known

    def find_all(self, names: list[str], others: Iterable[list[str]] = ()) -> FoundGenes:
        """Return the genes of a file; `others`: further names of the same genes.

        They are tried for names that are there, are not found, and are no Ensembl ids, also not of
        those that somebody made up in their manner (``ENSGunknown_TP53``).
        """
        found = [
            (token, ID, False) if (token := self._tokens.get(name, -1)) >= 0 else self._known(name)
            for name in names
        ]
        for more in others:
            for i, (name, other) in enumerate(zip(names, more, strict=True)):
                if found[i][0] < 0 and name and other and not _is_ensembl(name):
                    found[i] = self.find(other)
        tokens = np.array([token for token, _, _ in found], dtype=np.int32)
        counts = Counter(how for _, how, _ in found)
        upper = sum(is_upper for _, _, is_upper in found)
        return FoundGenes(
            tokens,
            {how: counts[how] for how in FOUND_AS if counts[how]},
            upper,
            self._collisions(names, tokens) if upper or counts[NOT_FOUND] else [],
        )

    def _collisions(self, names: list[str], tokens: np.ndarray) -> list[str]:
        ambiguous = [
            name
            for i in np.flatnonzero(tokens < 0).tolist()
            if (name := names[i]) and name.upper() in self._upper[1]
        ]
        # Only genes with several names.
        _, number, times = np.unique(tokens, return_inverse=True, return_counts=True)
        by_token: dict[int, list[str]] = {}
        for i in np.flatnonzero((times[number] > 1) & (tokens >= 0)).tolist():
            by_token.setdefault(int(tokens[i]), []).append(names[i])
        same = [
            name
            for group in by_token.values()
            if len(set(group)) > 1
            for name in group
            if any(o != name and o.upper() == name.upper() for o in group)
        ]
        return sorted({*same, *ambiguous})


def name_some(names: list[str]) -> str:
    """Return some of many names as text."""
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest
