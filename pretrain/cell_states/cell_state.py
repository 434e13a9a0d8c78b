"""The cell state: an embedding of a cell with a counted part and a part that the network adds.

The mean of the last layer alone describes a cell worse than the corpus SVD of its training cells
(docs/recipe.md), because it must contain what the head needs at each position. Therefore a cell
state has two parts:

- **counted**: the cell's 80 leading components of the corpus SVD (`pretrain.counting.corpus_svd`);
- **learned**: the mean of the last layer over the cell's genes, reduced to the 32 directions in
  which pretraining cells differ most. If few cells are labelled, directions in which cells hardly
  differ only do harm.

Each part is divided by one number, the root of its total variance over those pretraining cells, so
that both have equal weight in distances. The numbers of components were chosen with labels of six
data sets of the pretraining corpus; docs/recipe.md has the scores of data sets that no model was
trained on.

`fit_cell_state` makes the cell state of an encoder; `CellState.embed` embeds cells with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data_prep.files import complete_file
from data_prep.genes.vocabulary import Vocabulary
from data_prep.shards.reader import ShardSet
from pretrain.cell_states.frozen_states import embed_layers
from pretrain.counting.corpus_svd import MAX_CELLS, CorpusSvd, corpus_svd
from pretrain.model.architectures import Encoder

FILE_NAME = "cell_state.safetensors"
NUM_COUNTED, NUM_LEARNED = 80, 32
# The number of pretraining cells whose states are computed. 200, 500 and 1,000 give the same scores
# (.835, .835, .836 on average over six labelled sets), so a few are enough for the directions.
NUM_CELLS = 256
_FORMAT = "geneloom-cell-state/1"
# A layer norm leaves one direction without any spread. In a narrow network it would be among the
# axes, and a regression that standardises its features would weigh nothing but rounding.
_ROUNDING = 1e-5
# All cells of a block have a similar length, so a few cells of many blocks are used.
_MOST_BLOCKS = 64


@dataclass(frozen=True)
class CellState:
    """Computes states of cells from tokens and from means of the last layer.

    Attributes
    ----------
    svd
        The loadings of the counted part; float32 [tokens, at most 80] in `svd.components`.
    centre
        float32 [width], the mean state of the pretraining cells.
    axes
        float32 [width, at most 32], orthonormal columns; none in which cells differ by rounding
        only. The entry of a column with the largest
        absolute value is positive.
    scales
        float32 [2], the divisors of the two parts.
    origin
        ``weights_sha256`` of the model folder, empty for a network in memory; ``cells``, the number
        of cells that the axes were computed from.
    """

    svd: CorpusSvd
    centre: np.ndarray
    axes: np.ndarray
    scales: np.ndarray
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return self.svd.components.shape[1] + self.axes.shape[1]

    def embed(
        self, tokens: list[np.ndarray], encoder: Encoder, vocabulary: Vocabulary, **settings: Any
    ) -> np.ndarray:
        """Return float32 [cells, width], NaN for cells without a gene.

        Parameters
        ----------
        settings
            ``token_budget``, ``device``, ``bf16`` and ``progress`` of
            `pretrain.cell_states.frozen_states.embed_layers`.
        """
        return self.of_means(tokens, embed_layers(tokens, encoder, vocabulary, (0,), **settings)[0])

    def of_means(self, tokens: list[np.ndarray], means: np.ndarray) -> np.ndarray:
        """Return the states of cells whose means of the last layer [cells, width] are given."""
        counted = self.svd.embed_cells(tokens) / self.scales[0]
        # A BLAS matrix product is not used, because its last bits depend on the number of rows.
        learned = np.einsum("cw,wk->ck", means - self.centre, self.axes) / self.scales[1]
        return np.concatenate([counted, learned], axis=1, dtype=np.float32)

    def save(self, folder: Path) -> Path:
        """Write ``cell_state.safetensors`` into a folder and return its path."""
        tables = {
            "loadings": self.svd.components, "singular_values": self.svd.singular_values,
            "centre": self.centre, "axes": self.axes, "scales": self.scales,
        }  # fmt: skip
        metadata = {
            "format": _FORMAT,
            "vocabulary_sha256": self.svd.vocabulary_sha256,
            "first_gene_token": str(self.svd.first_gene_token),
            **{f"svd_{name}": str(value) for name, value in self.svd.origin.items()},
            **{name: str(value) for name, value in self.origin.items()},
        }
        with complete_file(folder / FILE_NAME) as aside:
            save_file({k: np.ascontiguousarray(v) for k, v in tables.items()}, aside, metadata)
        return folder / FILE_NAME

    @classmethod
    def load(cls, folder: Path, vocabulary: Vocabulary, weights_sha256: str) -> CellState:
        """Return the cell state that `save` wrote into a model folder.

        Raises
        ------
        ValueError
            The file cannot be read, or belongs to another vocabulary or other weights.
        """
        path = folder / FILE_NAME
        try:
            with safe_open(path, "numpy") as opened:
                metadata = opened.metadata() or {}
                tables = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); export again") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path}: is of format {metadata.get('format')!r}, not {_FORMAT!r}")
        for what, found, wanted in (
            ("vocabulary", metadata["vocabulary_sha256"], vocabulary.sha256),
            ("weights", metadata["weights_sha256"], weights_sha256),
        ):
            if found != wanted:
                raise ValueError(
                    f"{path}: was made with {what} {found[:12]}, the model has {wanted[:12]}; it "
                    "belongs to another model. Export again, or give --pooling mean"
                )
        svd = CorpusSvd(
            tables["loadings"], tables["singular_values"], vocabulary.sha256,
            int(metadata["first_gene_token"]),
            {
                "shards_fingerprint": metadata["svd_shards_fingerprint"],
                "cells": int(metadata["svd_cells"]),
                "residual": float(metadata["svd_residual"]),
            },
        )  # fmt: skip
        origin = {"weights_sha256": weights_sha256, "cells": int(metadata["cells"])}
        return cls(svd, tables["centre"], tables["axes"], tables["scales"], origin)


def fit_cell_state(
    encoder: Encoder,
    shards: ShardSet,
    num_cells: int = NUM_CELLS,
    weights_sha256: str = "",
    **settings: Any,
) -> CellState:
    """Return the cell state of an encoder and the shards it was pretrained on.

    Parameters
    ----------
    num_cells
        Training cells whose states are computed, spread over the corpus; at least 2.
    settings
        ``token_budget``, ``device`` and ``bf16`` of
        `pretrain.cell_states.frozen_states.embed_layers`.

    Raises
    ------
    ValueError
        There are too few training cells, or a block is damaged.
    """
    tokens = some_training_cells(shards, num_cells)
    if len(tokens) < 2:
        raise ValueError(f"{shards.name}: {len(tokens)} training cells; a cell state needs 2")
    svd = corpus_svd(shards, NUM_COUNTED, None, MAX_CELLS)
    means = embed_layers(tokens, encoder, shards.vocabulary, (0,), **settings)[0]
    return reduced(svd, tokens, means, weights_sha256)


def reduced(
    svd: CorpusSvd, tokens: list[np.ndarray], means: np.ndarray, weights_sha256: str = ""
) -> CellState:
    """Return the cell state with axes computed from `means` [cells, width] of the last layer."""
    has_genes = np.flatnonzero(np.isfinite(means).all(axis=1))
    spread = means[has_genes].astype(np.float64)
    centre = spread.mean(axis=0)
    sizes, rows = np.linalg.svd(spread - centre, full_matrices=False)[1:]
    vectors = rows[: min(NUM_LEARNED, int((sizes > _ROUNDING * sizes[0]).sum()) or 1)].T
    largest = np.abs(vectors).argmax(axis=0)
    axes = vectors * np.sign(vectors[largest, np.arange(vectors.shape[1])])
    counted = svd.embed_cells([tokens[i] for i in has_genes])
    scales = [
        np.sqrt(part.var(axis=0).sum()) or 1.0 for part in (counted, (spread - centre) @ axes)
    ]
    origin = {"weights_sha256": weights_sha256, "cells": len(has_genes)}
    single = [x.astype(np.float32) for x in (centre, axes, np.array(scales))]
    return CellState(svd, single[0], single[1], single[2], origin)


def some_training_cells(shards: ShardSet, number: int) -> list[np.ndarray]:
    """Return the tokens of at most `number` training cells, from blocks spread over all lengths."""
    extents = shards.extents("train")
    if not extents:
        return []
    blocks = np.concatenate([shards.block_numbers("train", e.length) for e in extents])
    sizes = shards.cells_of_blocks(blocks)
    wanted = min(number, int(sizes.sum()))
    chosen = np.arange(len(blocks))
    if len(blocks) > _MOST_BLOCKS:
        # The blocks that contain evenly spaced cells are chosen, so that each length has its share.
        places = np.linspace(0, sizes.sum(), min(wanted, _MOST_BLOCKS), endpoint=False)
        chosen = np.unique(np.searchsorted(np.cumsum(sizes), places, side="right"))
    found = []
    # Small blocks come first, so that larger blocks can provide the cells that they lack.
    for turn, place in enumerate(chosen[np.argsort(sizes[chosen], kind="stable")]):
        block = shards.read_block(int(blocks[place]))
        share = -(-(wanted - len(found)) // (len(chosen) - turn))
        cells = len(block.offsets) - 1
        for i in np.unique(np.linspace(0, cells - 1, min(share, cells)).astype(np.int64)):
            found.append(block.tokens[block.offsets[i] : block.offsets[i + 1]])
    return found
