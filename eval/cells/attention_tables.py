"""``geneloom attention``: write tables of the attention that genes receive in each head.

The tables are Parquet files. ``received.parquet``: ``layer`` (1 is the first), ``head`` (from 1),
``gene``, ``symbol``, ``group``, ``cells``, ``attention`` (see `eval.cells.attention.Attention`);
rows without cells are left out. ``pairs.parquet``: ``layer``, ``head``, the attending ``gene``,
``attended``, ``cells``, ``attention``, over all groups. ``attention.json``: model, cells, genes and
settings.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.files import complete_folder, require_new
from data_prep.genes.vocabulary import Vocabulary
from data_prep.sources.source_spec import SourceOptions, content_sha256
from data_prep.version import VERSION
from eval.cells.attention import Attention, mean_attention
from eval.cells.gene_lists import read_genes
from eval.cells.read_cells import CellSet, encode_file
from eval.cells.settings import AttentionOptions
from eval.options import choose_device
from pretrain.export.model_folder import load_exported
from pretrain.model.architectures import encoder_of

ATTENTION_FORMAT = "geneloom-attention/1"
RECORD_NAME = "attention.json"
_MOST_DETECTED = 300
_EVERYTHING = "all"


def attention_file(
    cells: Path,
    model: Path,
    out: Path,
    options: AttentionOptions = AttentionOptions(),
    reading: SourceOptions = SourceOptions(),
) -> str:
    """Write a folder with tables of the attention that genes receive; return a summary sentence.

    Raises
    ------
    ValueError
        Cells, model, list or column are wrong, no cell has a gene of the list, or `out` is not
        empty.
    """
    require_new(out)
    network, vocab = load_exported(model, options.vocabulary)
    genes, group = options.genes, options.group
    settings: dict[str, Any] = {
        "token_budget": options.token_budget, "device": choose_device(options.device),
        "bf16": options.bf16,
    }  # fmt: skip
    columns = (group,) if group else ()
    found = encode_file(cells, vocab, replace(reading, columns=columns))
    asked = read_genes(genes) if genes else _most_detected(found, vocab)
    tokens = vocab.tokens_of(list(asked)).astype(np.int64)
    known = {t: g for t, g in zip(tokens.tolist(), asked, strict=True) if t >= 0}
    if not known:
        raise ValueError(f"{genes}: none of {len(asked):,} genes is in the vocabulary of {model}")
    names, numbers = _groups(found, group)
    attention = mean_attention(
        found.tokens,
        encoder_of(network),
        vocab,
        np.array(list(known)),
        numbers,
        options.pairs,
        **settings,
    )
    ids = list(known.values())
    unknown = [g for g, t in zip(asked, tokens, strict=True) if t < 0]
    absent = [g for g, n in zip(ids, attention.cells.sum(axis=0), strict=True) if not n]
    record = {
        "format": ATTENTION_FORMAT,
        "geneloom": VERSION,
        "model": model.resolve().name,
        "vocabulary_sha256": vocab.sha256,
        "cells": {"file": cells.name, "sha256": content_sha256(cells), "number": len(found.tokens)},
        "genes": len(known),
        "not_in_vocabulary": unknown,
        "in_no_cell": absent,
        "group": group,
        "settings": settings,
    }
    _write(out, attention, names, ids, [asked[g] for g in ids], record)
    return _sentence(out, attention, record)


def _sentence(out: Path, attention: Attention, record: dict[str, Any]) -> str:
    layers, heads = attention.received.shape[1:3]
    absent, unknown = len(record["in_no_cell"]), len(record["not_in_vocabulary"])
    return (
        f"{out}: {layers} layers x {heads} heads, {record['genes'] - absent:,} genes in "
        f"{record['cells']['number']:,} cells; {unknown} genes are not in the vocabulary, "
        f"{absent} in no cell"
    )


def _write(
    out: Path,
    attention: Attention,
    groups: list[str],
    genes: list[str],
    symbols: list[str],
    record: dict[str, Any],
) -> None:
    with complete_folder(out, RECORD_NAME) as partial:
        _write_received(partial / "received.parquet", attention, groups, genes, symbols)
        if attention.pairs is not None:
            _write_pairs(partial / "pairs.parquet", attention, genes)
        (partial / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n")


def _most_detected(cells: CellSet, vocabulary: Vocabulary) -> dict[str, str]:
    """Return the genes that most cells have among their tokens, the most common first."""
    first = vocabulary.first_gene_token
    number = np.bincount(np.concatenate(cells.tokens), minlength=vocabulary.num_tokens)[first:]
    order = np.argsort(-number, kind="stable")[:_MOST_DETECTED]
    return {vocabulary.genes[i]: "" for i in order if number[i]}


def _groups(cells: CellSet, column: str | None) -> tuple[list[str], np.ndarray]:
    """Return the names of groups, and int64 [cells], the index of each cell's group."""
    if column is None:
        return [_EVERYTHING], np.zeros(len(cells.tokens), dtype=np.int64)
    names, numbers = np.unique(cells.metadata[column].to_numpy(dtype=str), return_inverse=True)
    return names.tolist(), numbers.astype(np.int64)


def _write_received(
    path: Path, attention: Attention, groups: list[str], genes: list[str], symbols: list[str]
) -> None:
    group, layer, head, gene = np.nonzero(np.isfinite(attention.received))
    table = pa.table(
        {
            "layer": (layer + 1).astype(np.int16),
            "head": (head + 1).astype(np.int16),
            "gene": pa.array(genes).take(gene),
            "symbol": pa.array(symbols, pa.string()).take(gene),
            "group": pa.array(groups).take(group),
            "cells": attention.cells[group, gene].astype(np.int32),
            "attention": attention.received[group, layer, head, gene].astype(np.float32),
        }
    )
    pq.write_table(table, path)


def _write_pairs(path: Path, attention: Attention, genes: list[str]) -> None:
    """Write one row for each head and pair of genes, head by head."""
    assert attention.pairs is not None and attention.pair_cells is not None
    query, key = np.nonzero(attention.pair_cells)
    columns = {
        "gene": pa.array(genes).take(query),
        "attended": pa.array(genes).take(key),
        "cells": pa.array(attention.pair_cells[query, key].astype(np.int32)),
    }
    writer = None
    for layer, by_head in enumerate(attention.pairs):
        for head, values in enumerate(by_head):
            place = {
                "layer": pa.array(np.full(len(query), layer + 1, np.int16)),
                "head": pa.array(np.full(len(query), head + 1, np.int16)),
            }
            value = {"attention": pa.array(values[query, key].astype(np.float32))}
            table = pa.table(place | columns | value)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
    assert writer is not None
    writer.close()
