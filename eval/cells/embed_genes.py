"""Embeddings of genes: the model's input table, and mean states over groups of cells."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data_prep.files import complete_file, require_new_file
from data_prep.genes.vocabulary import Vocabulary
from data_prep.running.workers import Progress
from data_prep.sources.source_spec import SourceOptions
from data_prep.version import VERSION
from eval.cells.embedded_parts import KeptBeside, PartsOf
from eval.cells.read_cells import EncodedPart, encode_parts, open_counts
from eval.cells.settings import EmbedOptions
from eval.options import choose_device
from pretrain.cell_states.frozen_states import computing, encode_batch
from pretrain.export.model_folder import load_exported, model_digest
from pretrain.model.architectures import Encoder, encoder_of, input_table

INPUT, CONTEXT, EVERY = "input", "context", "all"
_PART_CELLS, _MOST_GROUPS = 4096, 200
_KEEP_EVERY_S = 120.0


class KeptSums(KeptBeside):
    """Sums of the first parts of the cells: what a call that was killed goes on from.

    They are kept every few minutes, for with many groups they are large. Sums are of float64, and
    parts are added in their order, so the same bits come out whenever a call was killed.
    """

    _saved = 0.0

    def load(self, sums: GeneSums) -> int:
        """Fill the sums with the newest that are kept; return how many parts they hold."""
        self._saved = time.monotonic()
        paths = sorted(self.folder.glob("0*.npz"))
        if not paths:
            return 0
        with np.load(paths[-1], allow_pickle=False) as kept:
            for name, own, cells in zip(kept["groups"], kept["sums"], kept["cells"], strict=True):
                sums.sums[str(name)], sums.cells[str(name)] = own, cells
        return int(paths[-1].stem)

    def keep(self, sums: GeneSums, parts: int) -> None:
        """Keep the sums of so many parts, if the last ones that were kept are minutes old."""
        if not sums.sums or time.monotonic() - self._saved < _KEEP_EVERY_S:
            return
        self._owner.require()
        before = list(self.folder.glob("0*.npz"))
        path = self.folder / f"{parts:08d}.npz"
        with complete_file(path, to_disk=True) as aside, aside.open("wb") as file:
            np.savez(
                file, groups=np.array(list(sums.sums)), sums=np.stack(list(sums.sums.values())),
                cells=np.stack(list(sums.cells.values())),
            )  # fmt: skip
        for old in before:
            old.unlink()
        self._saved = time.monotonic()


class GeneSums:
    """Sums of the states of each gene, by group of cells.

    Attributes
    ----------
    sums
        Group -> float64 [genes, width].
    cells
        Group -> int64 [genes], how many cells hold the gene.
    """

    def __init__(self, encoder: Encoder, vocabulary: Vocabulary) -> None:
        self._encoder, self._vocabulary = encoder, vocabulary
        self.sums: dict[str, np.ndarray] = {}
        self.cells: dict[str, np.ndarray] = {}

    def add(self, tokens: np.ndarray, group: str) -> None:
        """Add a cell, computed alone; call it inside `computing`.

        Raises
        ------
        ValueError
            There are more groups than can be kept.
        """
        number, first = len(self._vocabulary.genes), self._vocabulary.first_gene_token
        if group not in self.sums:
            if len(self.sums) == _MOST_GROUPS:
                raise ValueError(
                    f"--group: more than {_MOST_GROUPS} values, such as {group!r}; give a column "
                    "of types, not of cells"
                )
            self.sums[group] = np.zeros((number, self._encoder.config.hidden_size))
            self.cells[group] = np.zeros(number, dtype=np.int64)
        hidden, _ = encode_batch(self._encoder, [tokens], self._vocabulary, len(tokens))
        is_gene = tokens >= first
        genes = tokens[is_gene].astype(np.int64) - first
        states = hidden[0][torch.from_numpy(is_gene).to(hidden.device)].float().cpu().numpy()
        # A cell holds each gene once.
        self.sums[group][genes] += states
        self.cells[group][genes] += 1


def embed_genes_file(
    cells: Path,
    model: Path,
    out: Path,
    options: EmbedOptions,
    reading: SourceOptions = SourceOptions(),
    progress: Progress | None = None,
) -> str:
    """Write a table of gene embeddings, and return a summary sentence.

    A row is a gene with ``states`` ``input`` (its row of the input table) or ``context`` (the mean
    of its states in one layer, over the cells of a ``group`` that hold it, ``cells`` of them).
    Genes that no cell of a group holds have no row of it.

    Until then, sums over the first cells lie beside it in ``.NAME.parts``; the same call goes on
    from them and ends with the same bits.

    Raises
    ------
    ValueError
        `out` exists or is no ``.parquet``; another pooling than the mean is asked for; the column
        is not there, or has too many values; or what is kept is of another call.
    """
    if out.suffix != ".parquet":
        raise ValueError(f"--out {out}: with --genes it must end in .parquet")
    if options.pooling not in (None, "mean"):
        raise ValueError(
            f"--pooling {options.pooling}: belongs to cells; leave it out with --genes"
        )
    require_new_file(out)
    network, vocabulary = load_exported(model, options.vocabulary)
    encoder, layer = encoder_of(network), -1 if options.layer is None else options.layer
    table = input_table(encoder).detach().cpu().numpy()[vocabulary.first_gene_token :]
    columns = (options.group,) if options.group else ()
    source = open_counts(cells, replace(reading, columns=columns))
    record = {
        "version": VERSION, "model": model.name, "vocabulary_sha256": vocabulary.sha256,
        "layer": layer, "group": options.group,
    }  # fmt: skip
    device = choose_device(options.device)
    decides = PartsOf(
        cells, source.spec.signature(deep=True), asdict(reading), record,
        model_digest(model, vocabulary), _PART_CELLS, [device, options.bf16],
    )  # fmt: skip
    sums = GeneSums(encoder, vocabulary)
    with (
        KeptSums(out, decides) as kept,
        computing(encoder, layer, device, options.bf16),
    ):
        there = kept.load(sums)
        for number, part in enumerate(encode_parts(source, vocabulary, _PART_CELLS)):
            if number < there:
                continue
            groups = _groups(part, options.group)
            for place, (tokens, group) in enumerate(zip(part.tokens, groups, strict=True)):
                if (tokens >= vocabulary.first_gene_token).any():
                    sums.add(tokens, group)
                if progress:
                    progress("embedding genes", part.start + place + 1, source.num_cells)
            kept.keep(sums, number + 1)
        _write(out, vocabulary, table, sums, record)
    groups = f"{len(sums.sums)} groups of {options.group}" if options.group else "all cells"
    return f"{out}: {len(vocabulary.genes):,} genes x {table.shape[1]}: input table, and {groups}"


def _groups(part: EncodedPart, column: str | None) -> list[str]:
    return part.metadata[column] if column else [EVERY] * len(part.tokens)


def _write(
    out: Path, vocabulary: Vocabulary, table: np.ndarray, sums: GeneSums, record: dict[str, Any]
) -> None:
    schema = pa.schema(
        {
            "gene": pa.string(),
            "states": pa.string(),
            "group": pa.string(),
            "cells": pa.int64(),
            "embedding": pa.list_(pa.float32(), table.shape[1]),
        },
        {"geneloom": json.dumps(record)},
    )
    names = np.array(vocabulary.genes, dtype=str)
    with complete_file(out) as aside, pq.ParquetWriter(aside, schema) as writer:
        every = np.full(len(names), None, dtype=object)
        writer.write_table(_rows(schema, names, INPUT, every, every, table))
        for group in sorted(sums.sums):
            counts = sums.cells[group]
            held = np.flatnonzero(counts)
            means = sums.sums[group][held] / counts[held, None]
            same = np.full(len(held), group, dtype=object)
            writer.write_table(_rows(schema, names[held], CONTEXT, same, counts[held], means))


def _rows(
    schema: pa.Schema,
    names: np.ndarray,
    states: str,
    group: np.ndarray,
    cells: np.ndarray,
    vectors: np.ndarray,
) -> pa.Table:
    flat = pa.array(vectors.astype(np.float32).ravel())
    columns = [
        pa.array(names.tolist(), pa.string()),
        pa.array([states] * len(names), pa.string()),
        pa.array(group.tolist(), pa.string()),
        pa.array(cells.tolist(), pa.int64()),
        pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
    ]
    return pa.table(columns, schema=schema)
