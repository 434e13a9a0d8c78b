"""Prints the content of a shard folder, and results of `check` and `verify`, to the console."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep.sources.remarks import remarks

if TYPE_CHECKING:
    from data_prep.prepare.check import CheckResult
    from data_prep.prepare.verify_and_repair import Problem


_SHOWN_PAIRS = 10


def padding_share(buckets: list[dict]) -> float:
    """Return the share of padding tokens among all tokens after padding, over all buckets."""
    padded = sum(b["cells"] * b["length"] for b in buckets)
    return 1 - sum(b["tokens"] for b in buckets) / padded if padded else 0.0


def print_manifest(manifest: dict, folder: str, console: Console | None = None) -> None:
    """Print the sources, rejections, warnings, buckets and totals of a manifest."""
    console = console or _console()
    console.print(_sources_table(manifest["sources"]))
    _print_rejections(manifest, console)
    _print_same_cells(manifest.get("same_cells", {}), console)
    _print_warnings(manifest.get("warnings", []), console)
    console.print(_buckets_table(manifest["buckets"]))
    buckets, shards = manifest["buckets"], manifest["shards"]
    tokens = sum(b["tokens"] for b in buckets)
    size = sum(s["bytes"] for s in shards)
    heldout = sum(b["cells"] for b in buckets if b["split"] == "heldout")
    read = sum(s["cells_read"] for s in manifest["sources"])
    kept = sum(s["cells_kept"] for s in manifest["sources"])
    console.print(
        f"cells read {read:,}, kept {kept:,}, rejected {read - kept:,}; held out {heldout:,}\n"
        f"tokens {tokens:,} ({tokens / max(1, kept):,.0f} a cell), padding "
        f"{padding_share(buckets):.2%}, {size:,} bytes in {len(shards)} tars "
        f"({size / max(1, tokens):.2f} B/token)\n"
        f"vocabulary {manifest['num_tokens']:,} tokens, max length {manifest['max_length']:,}, "
        f"hash {manifest['vocabulary_sha256'][:12]}; shards {manifest['fingerprint'][:12]}\n"
        f"folder {folder}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def print_check(result: CheckResult, console: Console | None = None) -> None:
    """Print the cells that `prepare` would keep, the problems and the warnings."""
    console = console or _console()
    if result.sources:
        console.print(_sources_table(result.sources))
        _print_rejections({"sources": result.sources, "datasets": result.datasets}, console)
        read = sum(s["cells_read"] for s in result.sources)
        kept = sum(s["cells_kept"] for s in result.sources)
        tokens = sum(s["tokens"] for s in result.sources)
        console.print(
            f"cells read {read:,}, would be kept {kept:,}, rejected {read - kept:,}; "
            f"{tokens:,} tokens",
            highlight=False,
        )
        _print_same_cells(result.same_cells, console)
    for problem in result.problems:
        console.print(f"problem: {problem}", highlight=False, markup=False, soft_wrap=True)
    _print_warnings(result.warnings, console)
    if not result.problems and not result.warnings:
        console.print("no problem found")


def print_problems(problems: list[Problem], console: Console | None = None) -> None:
    """Print the problems that `verify` found."""
    console = console or _console()
    for problem in problems:
        console.print(f"damaged: {problem.message}", highlight=False, markup=False, soft_wrap=True)
    if not problems:
        console.print("every checksum, count and bound is as recorded")


def print_remarks(
    remarks: Sequence[str], warnings: Sequence[str], console: Console | None = None
) -> None:
    """Print what was noticed about sources, and what a user should mend."""
    console = console or _console()
    for line in remarks:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    _print_warnings(warnings, console)


def _print_warnings(warnings: Sequence[str], console: Console) -> None:
    for warning in warnings:
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)


def _print_same_cells(same: dict, console: Console) -> None:
    """Print how many cells equal an earlier cell, where they stand, and how many were moved."""
    if not same.get("cells"):
        return
    lines = [
        f"{same['cells']:,} cells equal an earlier one; {same['moved']:,} went to the side of the "
        f"split where the first one is, {same['divided']:,} are still on the other"
    ]
    lines += [
        f"  {pair['cells']:,} in '{pair['copy']}' equal one in '{pair['first']}'"
        + (f", {pair['divided']:,} of them on the other side" if pair["divided"] else "")
        for pair in same["pairs"][:_SHOWN_PAIRS]
    ]
    if same["num_pairs"] > _SHOWN_PAIRS:
        lines.append(f"  and {same['num_pairs'] - _SHOWN_PAIRS:,} more pairs (manifest.json)")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _print_rejections(manifest: dict, console: Console) -> None:
    """Print how the genes of each source were found, and the rejected cells by data set."""
    for source in manifest["sources"]:
        for line in remarks(source):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    datasets = [d for d in manifest.get("datasets", manifest["sources"]) if d["rejected"]]
    if not datasets:
        return
    reasons = sorted({r for d in datasets for r in d["rejected"]})
    table = Table(title="rejected cells by data set", title_justify="left")
    table.add_column("data set", no_wrap=True)
    for name in ("read", *reasons):
        table.add_column(name, justify="right")
    for d in datasets:
        numbers = (f"{d['rejected'].get(r, 0):,}" for r in reasons)
        table.add_row(escape(d["name"]), f"{d['cells_read']:,}", *numbers)
    console.print(table)


def _console() -> Console:
    """Return a console; where the output is a file, it is wide enough for whole tables."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def _sources_table(sources: list[dict]) -> Table:
    table = Table(title="sources", title_justify="left")
    table.add_column("source", no_wrap=True)
    table.add_column("kind")
    for name in ("read", "kept", "tokens/cell", "truncated", "genes known", "counts known"):
        table.add_column(name, justify="right")
    for s in sources:
        share, genes = s["counts_in_vocabulary"], s["genes"]
        if isinstance(genes, dict):
            genes = f"{genes['known']:,}/{genes['genes']:,}"
        table.add_row(
            escape(s["name"]),
            s["kind"],
            f"{s['cells_read']:,}",
            f"{s['cells_kept']:,}",
            f"{s['tokens'] / max(1, s['cells_kept']):,.0f}",
            f"{s['truncated']:,}",
            f"{genes or '-'}",
            f"{share:.1%}" if share is not None else "-",
        )
    return table


def _buckets_table(buckets: list[dict]) -> Table:
    table = Table(title="length buckets", title_justify="left")
    table.add_column("split")
    for name in ("length", "cells", "tokens", "padding", "blocks", "tars", "bytes"):
        table.add_column(name, justify="right")
    for b in buckets:
        table.add_row(
            b["split"],
            f"{b['length']:,}",
            f"{b['cells']:,}",
            f"{b['tokens']:,}",
            f"{1 - b['tokens'] / (b['cells'] * b['length']):.1%}",
            f"{b['blocks']:,}",
            f"{b['shards']:,}",
            f"{b['bytes']:,}",
        )
    return table
