"""Lookup of the genes of a file in a vocabulary, by Ensembl id, previous id or symbol.

`GeneLookup.find_all` looks up each name on its own, so that a file may mix kinds of names. The
lookups are tried in this order:

1. the name is a gene of the vocabulary (*id*);
2. the name is an Ensembl id in the table of other ids (*previous id*);
3. the same two lookups without the version of an Ensembl id and without the genome in front of it
   (*id without version or genome*);
4. the name is a current gene symbol (*symbol*);
5. the name is a symbol that a gene had before, or another name of the mapping (*previous symbol*).

A name that is not found as it is written is looked up once more in upper case, as Geneformer's
tokenizer for V2 does. Where two different genes of a table have the same name in upper case,
neither is taken.
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
# Cell Ranger puts the genome in front of a gene id where its reference has two genomes:
# GRCh38_ENSG..., mm10___Xkr4.
_GENOME_STARTS = ("GRCh", "GRCm", "hg", "mm", "Rnor", "mRatBN", "GRCz", "Mmul", "Sscrofa")
_GENOME = re.compile(rf"^((?:{'|'.join(_GENOME_STARTS)})_?\d[A-Za-z0-9.]*?)_+(?=.)")
# Words that pandas and R write for a missing name.
_NO_NAME = frozenset({"nan", "none", "na", "n/a", "<na>", "null", "-"})
_LONGEST_NO_NAME = max(map(len, _NO_NAME))
ID, PREVIOUS_ID = "id", "previous id"
CUT_ID = "id without version or genome"
SYMBOL, PREVIOUS_SYMBOL = "symbol", "previous symbol"
NOT_FOUND = "not found"
FOUND_AS = (ID, PREVIOUS_ID, CUT_ID, SYMBOL, PREVIOUS_SYMBOL, NOT_FOUND)
_NAMED = 10


def strip_version(gene_id: str) -> str:
    """Return an Ensembl id without its version (and ``_PAR_Y``); other names are unchanged."""
    if "." not in gene_id:  # most ids have no version, and this test is cheaper than the pattern
        return gene_id
    return gene_id.split(".", 1)[0] if ENSEMBL_VERSIONED.match(gene_id) else gene_id


def genome_of(gene_id: str) -> str:
    """Return the genome in front of a gene id, ``GRCh38`` for ``GRCh38_ENSG...``; '' if none."""
    found = _GENOME.match(gene_id) if gene_id.startswith(_GENOME_STARTS) else None
    return found[1] if found else ""


def without_genome(gene_id: str) -> str:
    """Return a gene id without the genome in front of it."""
    return _GENOME.sub("", gene_id) if gene_id.startswith(_GENOME_STARTS) else gene_id


def plain_id(gene_id: str) -> str:
    """Return a gene id without its version and without the genome in front of it."""
    if "." not in gene_id and not gene_id.startswith(_GENOME_STARTS):
        return gene_id
    return strip_version(without_genome(gene_id))


def _is_ensembl(name: str) -> bool:
    """Return whether a name is an Ensembl id, or looks like one (``ENSGunknown_TP53``)."""
    plain = plain_id(name)
    made_up = plain.startswith("ENSG") and not plain[4:5].isdecimal()
    return made_up or bool(ENSEMBL.match(plain))


def present(gene_id: str) -> str:
    """Return a name without spaces around it; '' for words that mean a missing name (``nan``)."""
    name = gene_id.strip()
    return "" if len(name) <= _LONGEST_NO_NAME and name.lower() in _NO_NAME else name


@dataclass(frozen=True)
class FoundGenes:
    """The result of looking up the genes of a file in a vocabulary.

    Attributes
    ----------
    tokens
        int32 [names], the token of each name, -1 where a name was not found.
    found_as
        Number of names for each lookup of `FOUND_AS`; lookups without names are left out.
    upper_cased
        Number of names that were found in upper case only.
    case_collisions
        Names that differ only by case from another name of the same gene in the file, and names
        that were not found because two genes of the vocabulary's tables share them in upper case.
    """

    tokens: np.ndarray
    found_as: dict[str, int]
    upper_cased: int
    case_collisions: list[str]


class GeneLookup:
    """Finds the token of a gene by any of the gene's names.

    Parameters
    ----------
    tokens
        Token of each gene id.
    aliases
        Gene id of each other id or name.
    names
        Gene id of each current symbol.
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
        """Two tables of upper-case names.

        The first maps a name in upper case to the name as a table writes it; the second holds the
        upper-case names that two different genes share.
        """
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
        """Return the lookup of `FOUND_AS` that finds a name as it is written, None if none does."""
        if name in self._tokens:
            return ID
        if name in self._aliases:
            if ENSEMBL.match(name):
                return PREVIOUS_ID
            return SYMBOL if name.upper() in self._current else PREVIOUS_SYMBOL
        return SYMBOL if name in self._names else None

    def find(self, name: str) -> tuple[int, str, bool]:
        """Return (token or -1, the lookup of `FOUND_AS`, whether upper case was needed)."""
        how = self._exact(name)
        if how is not None:
            return self._token(name), how, False
        if not name:
            return -1, NOT_FOUND, False
        plain = plain_id(name)
        if plain != name and (how := self._exact(plain)) is not None:
            return self._token(plain), CUT_ID if how in (ID, PREVIOUS_ID) else how, False
        if ENSEMBL.match(plain):  # an unknown Ensembl id cannot be found in upper case either
            return -1, NOT_FOUND, False
        written = self._upper[0].get(plain.upper())
        how = self._exact(written) if written is not None else None
        if written is None or how is None:
            return -1, NOT_FOUND, False
        return self._token(written), how, True

    def _known(self, name: str) -> tuple[int, str, bool]:
        # The files of a corpus share their names, so each name is searched for once only.
        known = self._memory.get(name)
        if known is None:
            known = self._memory[name] = self.find(name)
        return known

    def find_all(self, names: list[str], others: Iterable[list[str]] = ()) -> FoundGenes:
        """Return the genes of a file.

        Parameters
        ----------
        names
            First name of each gene, '' where the file has none.
        others
            Lists of further names of the same genes. They are tried where the first name is not
            empty, was not found, is no Ensembl id and does not look like one
            (``ENSGunknown_TP53``).
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
        # Only genes that stand in the file under several names can collide.
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
    """Return the first ten names as text, with the number of those that are left out."""
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest
