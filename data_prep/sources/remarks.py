"""What a command says of a source beside its cells: names of genes, features and cells left out.

`prepare`, `check` and `inspect` print these lines from the entries of a manifest. Commands that
read cells without writing shards make such an entry of the opened source (`entry_of`), so that no
command takes a file in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from data_prep.genes.gene_names import FOUND_AS
from data_prep.genes.vocabulary import Vocabulary
from data_prep.sources.count_source import CountSource


def entry_of(
    source: CountSource, vocabulary: Vocabulary | None, fractional: tuple[int, int] = (0, 0)
) -> dict[str, Any]:
    """Return what a manifest holds of a source, as far as it is known without `prepare`.

    Parameters
    ----------
    vocabulary
        None while there is none: then nothing is said of how genes were found.
    fractional
        Number of values that were no integers, and of all values.
    """
    number, stored = fractional
    return {
        "name": source.name,
        "options": asdict(source.options),
        "genes": asdict(source.gene_report(vocabulary)),
        "filtered_out": source.num_filtered_out,
        "fractional_values": number / stored if stored else 0.0,
    }


def remarks(entry: Mapping[str, Any]) -> list[str]:
    """Return a line for each thing that a user should know of a source's entry in a manifest."""
    name, genes = entry["name"], entry["genes"]
    lines = []
    if entry.get("filtered_out"):
        given = ("--obs-filter", "obs_filter"), ("--genome", "genome")
        by = " and ".join(text for text, field in given if entry["options"].get(field))
        lines.append(f"{entry['filtered_out']:,} cells left out by {by}")
    if isinstance(genes, Mapping):  # else a token corpus, or a manifest of format 1
        lines += _of_genes(genes)
    if entry.get("fractional_values"):
        done = {"round": "rounded", "keep": "ranked as they are"}[entry["options"]["fractional"]]
        lines.append(f"{entry['fractional_values']:.1%} of the values are fractions: {done}")
    if isinstance(genes, Mapping):
        lines += [
            f"{n:,} features left out: {kind}" for kind, n in genes.get("left_out", {}).items()
        ]
    return [f"{name}: {line}" for line in lines]


def _of_genes(genes: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{number:,} {text}"
        for number, text in (
            (genes["duplicated"], "columns with a repeated gene id: their counts are summed"),
            (genes["by_alias"], "gene ids mapped to current ones"),
            (genes["nameless"], "columns without a gene id: they count in the totals only"),
        )
        if number
    ]
    found = genes.get("found_as", {})
    if set(found) - {"id", "not found"}:
        counts = ", ".join(f"{number:,} as {how}" for how in FOUND_AS if (number := found.get(how)))
        upper = genes["upper_cased"]
        lines.append(
            f"genes found as: {counts}" + (f"; {upper:,} in upper case only" if upper else "")
        )
    if genes.get("case_collisions"):
        names = ", ".join(genes["case_collisions"])
        lines.append(f"names that differ in case only from another gene's: {names}")
    return lines
