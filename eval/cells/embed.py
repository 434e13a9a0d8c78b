"""Embed the cells of a file with a pretrained encoder: every cell, in the order of the file.

Cells are read, embedded and kept in parts of a few thousand, so memory does not grow with their
number, and a killed command goes on after the last part that is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.files import require_new_file
from data_prep.genes.vocabulary import Vocabulary
from data_prep.running.workers import Progress
from data_prep.sources.count_source import CountSource
from data_prep.sources.source_spec import SourceOptions
from data_prep.version import VERSION
from eval.cells.annotated import require_annotated
from eval.cells.embedded_parts import Parts, PartsOf
from eval.cells.read_cells import EncodedPart, encode_parts, open_counts
from eval.cells.settings import EmbedOptions
from eval.options import choose_device
from pretrain.cell_states.cell_state import FILE_NAME as STATE_NAME
from pretrain.cell_states.cell_state import CellState
from pretrain.cell_states.frozen_states import embed_cells
from pretrain.export.model_folder import folder_cell_state, load_exported, model_digest
from pretrain.model.architectures import Encoder, encoder_of

OBSM_KEY = "X_geneloom"
STATE = "state"
PART_CELLS = 4096


@dataclass(frozen=True)
class _Embedder:
    """A model, and what of it is a cell's embedding."""

    encoder: Encoder
    vocabulary: Vocabulary
    state: CellState | None
    pooling: str
    layer: int
    settings: dict[str, Any]

    def embed(self, tokens: list[np.ndarray], progress: Progress | None) -> np.ndarray:
        """Return float32 [cells, width]; NaN for cells without a gene."""
        settings: dict[str, Any] = self.settings | {"progress": progress}
        if self.state:
            return self.state.embed(tokens, self.encoder, self.vocabulary, **settings)
        return embed_cells(
            tokens, self.encoder, self.vocabulary, self.pooling, self.layer, **settings
        )

    @property
    def width(self) -> int:
        return self.state.width if self.state else self.encoder.config.hidden_size


def embed_file(
    cells: Path,
    model: Path,
    out: Path,
    options: EmbedOptions = EmbedOptions(),
    reading: SourceOptions = SourceOptions(),
    progress: Progress | None = None,
) -> str:
    """Write the embeddings of a file's cells in the file's order, and return a summary sentence.

    A ``.h5ad`` or ``.zarr`` output is the input with ``obsm["X_geneloom"]``,
    ``obs["geneloom_tokens"]`` and ``uns["geneloom"]``; nothing else is changed. Cells that were not
    read (of another genome) are NaN there. A ``.parquet``
    output is a table of ``cell_id``, ``geneloom_tokens`` and ``embedding`` (float32 lists of the
    same length), with the same record as text under ``geneloom`` in its schema.

    Until then, finished parts lie beside it in ``.NAME.parts``; the same call goes on from them.

    Raises
    ------
    ValueError
        `out` exists or has another suffix, or the cells are no AnnData file and `out` is to be one;
        or the cell state is asked for, and the model has none or a layer is given; or the parts are
        of another call.
    """
    if out.suffix not in (".h5ad", ".zarr", ".parquet"):
        raise ValueError(f"--out {out}: must end in .h5ad, .zarr or .parquet")
    require_new_file(out)
    if out.suffix != ".parquet":
        require_annotated(cells, out, "NAME.parquet")
    embedder = _open_embedder(model, options)
    vocabulary = embedder.vocabulary
    record = {
        "version": VERSION,
        "model": model.name,
        "vocabulary_sha256": vocabulary.sha256,
        "pooling": STATE if embedder.state else embedder.pooling,
        "layer": embedder.layer,
    }
    source = open_counts(cells, reading)
    decides = PartsOf(
        cells, source.spec.signature(deep=True), asdict(reading), record,
        model_digest(model, vocabulary), PART_CELLS, [embedder.settings["device"], options.bf16],
    )  # fmt: skip
    empty = 0
    with Parts(out, decides, embedder.width) as parts:
        for number, part in enumerate(_encoded(source, vocabulary)):
            empty += int((~part.has_genes).sum())
            if not parts.has(number):
                found = embedder.embed(part.tokens, _of_all(progress, part.start, source.num_cells))
                parts.put(number, part.cell_ids, part.lengths, found)
        parts.write(source, OBSM_KEY)
    note = f"; {empty} cells without any gene of the vocabulary are NaN" if empty else ""
    kind = "cell states" if embedder.state else f"{embedder.pooling} of layer {embedder.layer}"
    return (
        f"{out}: {source.num_cells:,} cells x {embedder.width} in obsm['{OBSM_KEY}'] ({kind}){note}"
    )


def _open_embedder(model: Path, options: EmbedOptions) -> _Embedder:
    network, vocab = load_exported(model, options.vocabulary)
    pooling, layer = options.pooling, options.layer
    state = folder_cell_state(model, vocab) if pooling in (None, STATE) else None
    if pooling is None:
        pooling = STATE if state and layer is None else "mean"
    if pooling == STATE and layer is not None:
        raise ValueError(f"--layer {layer}: belongs to --pooling mean or cls")
    if pooling == STATE and state is None:
        raise ValueError(
            f"--pooling {STATE}: {model} has no {STATE_NAME}; export the run again with its shards"
        )
    settings: dict[str, Any] = {
        "token_budget": options.token_budget, "device": choose_device(options.device),
        "bf16": options.bf16,
    }  # fmt: skip
    if pooling == STATE:
        return _Embedder(encoder_of(network), vocab, state, "mean", 0, settings)
    return _Embedder(
        encoder_of(network), vocab, None, pooling, -1 if layer is None else layer, settings
    )


def _encoded(source: CountSource, vocabulary: Vocabulary) -> Iterator[EncodedPart]:
    return encode_parts(source, vocabulary, PART_CELLS)


def _of_all(progress: Progress | None, start: int, total: int) -> Progress | None:
    """Return a progress of one part that shows that of all cells."""
    if progress is None:
        return None
    return lambda what, done, _of_part: progress(what, start + done, total)
