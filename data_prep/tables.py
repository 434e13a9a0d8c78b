"""What a shard folder holds, as tables for the console."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def padding_share(buckets: list[dict]) -> float:
    """Return padded minus real tokens over padded tokens, all buckets together."""
    padded = sum(b["cells"] * b["length"] for b in buckets)
    return 1 - sum(b["tokens"] for b in buckets) / padded if padded else 0.0


def print_manifest(manifest: dict, folder: str, console: Console | None = None) -> None:
    """Print sources, rejections, buckets and totals of a manifest."""
    console = console or Console()
    console.print(_sources_table(manifest["sources"]))
    for s in manifest["sources"]:
        if s["duplicated_genes"]:
            console.print(
                f"summed in {s['name']}: {s['duplicated_genes']:,} columns with a repeated gene id",
                highlight=False,
            )
        for reason, cells in sorted(s["rejected"].items()):
            console.print(f"rejected in {s['name']}: {cells:,} cells: {reason}", highlight=False)
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
        soft_wrap=True,
    )


def _sources_table(sources: list[dict]) -> Table:
    table = Table(title="sources", title_justify="left")
    table.add_column("source", no_wrap=True)
    table.add_column("kind")
    for name in ("read", "kept", "tokens/cell", "truncated", "genes known", "counts known"):
        table.add_column(name, justify="right")
    for s in sources:
        share = s["counts_in_vocabulary"]
        table.add_row(
            s["name"],
            s["kind"],
            f"{s['cells_read']:,}",
            f"{s['cells_kept']:,}",
            f"{s['tokens'] / max(1, s['cells_kept']):,.0f}",
            f"{s['truncated']:,}",
            f"{s['genes_in_vocabulary']:,}/{s['genes']:,}" if s["genes"] else "-",
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
