"""The arithmetic prior: add to the head's logits what counting tells about a hidden gene.

Most of the information about a hidden gene is arithmetic (`pretrain.counting.arithmetic`): its
value lies between those of its visible neighbours. A network needs millions of tokens to learn
that, and its head cannot express it precisely, because the possible genes lie within a few
ten-thousandths of log(median). Therefore the log-probabilities of counting are added to the head's
logits before the loss, like an offset in a generalised linear model. At its first step the model
has the loss of the arithmetic baseline, and only what medians and frequencies do not tell can lower
its loss.

The prior is a table and not weights: it has no gradient, and the network is still Hugging Face's.
Apart from a constant, the head's own output is log p(gene | cell) - log p(gene | counting).

`objective_prior` makes the prior of a run; `ArithmeticPrior.added_to` is called in the forward
pass.

Shapes: B cells, L positions, M hidden genes, V vocabulary, G points of the grid of log(1 / median).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from data_prep.errors import SharedFailure
from data_prep.files import complete_file
from data_prep.genes.vocabulary import Vocabulary
from data_prep.shards.reader import ShardSet
from pretrain.checkpoints.checkpoint import Checkpoint
from pretrain.config import RunConfig
from pretrain.counting.arithmetic import FOLDS, arithmetic_tables, grid_places
from pretrain.counting.arithmetic_kernels import (
    NEIGHBOURS,
    RANK_CLASSES,
    SLOTS,
    add_prior,
)
from pretrain.counting.counted_tables import digest_of
from pretrain.objective.masking import NO_LABEL
from pretrain.ranks import dist
from pretrain.ranks.dist import Ranks

FILE_NAME = "prior.safetensors"
FORMAT = "geneloom-prior/1"
# A gene that is visible in the cell is practically excluded, because no gene occurs twice in a
# cell. The value is not infinite, because a corpus of tokens may contain a gene twice.
_SEEN = -20.0
_TABLES = ("frequency", "length_edges", "log_ratios", "exponents", "counted")
_ROWS_AT_ONCE = 512  # hidden genes for which a GPU holds [rows, G] numbers


class Hidden(NamedTuple):
    """Cells and the genes that are hidden in them, as `MaskedGeneModel.forward` receives them."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    masked_places: torch.Tensor
    labels: torch.Tensor
    folds: torch.Tensor | None = None

    @property
    def lengths(self) -> torch.Tensor:
        """Return int64 [B], the number of tokens of each cell."""
        num_cells, length = self.input_ids.shape
        if self.attention_mask is None:
            return self.labels.new_full((num_cells,), length)
        return self.attention_mask.sum(dim=1)

    @property
    def tables(self) -> torch.Tensor:
        """Return int64 [B], the table of each cell: that of its fold, or the one of all cells."""
        if self.folds is None:
            return self.labels.new_full((len(self.input_ids),), FOLDS)
        return self.folds


class CannotUsePrior(SharedFailure, ValueError):
    """The vocabulary, the shards or the run folder do not provide the tables of the prior."""


class ArithmeticPrior:
    """The log-probabilities of `pretrain.counting.arithmetic`, ready to be added to logits.

    Parameters
    ----------
    tables
        The result of `arithmetic_tables` by fold. A training cell uses the table that was counted
        without it. Otherwise the prior would know the cell by heart, and the network would learn to
        trust information that does not hold for other cells.
    """

    def __init__(self, tables: dict[str, np.ndarray], vocabulary: Vocabulary) -> None:
        self._tables = {name: np.ascontiguousarray(tables[name]) for name in _TABLES}
        self._vocabulary_sha256 = vocabulary.sha256
        self._first_gene = vocabulary.first_gene_token
        self._place_of = grid_places(vocabulary)
        self._size = (tables["log_ratios"].shape[-1] + 1) // 2
        self._log_factors = tables["log_ratios"] * tables["exponents"][:, None].astype(np.float32)
        frequency = tables["frequency"]
        lowest = frequency[frequency > 0].min()
        self._log_frequency = np.log(np.maximum(frequency, lowest)).astype(np.float32)
        self._log_frequency[: vocabulary.first_gene_token] += _SEEN  # special tokens are no guess
        self._on_device: dict[torch.device, dict[str, torch.Tensor]] = {}

    @property
    def record(self) -> dict[str, Any]:
        """Return the prior's record: numbers of training cells and genes counted, and a hash."""
        cells, genes = self._tables["counted"].tolist()
        return {
            "kind": "arithmetic",
            "cells": cells,
            "genes": genes,
            "sha256": digest_of(self._tables),
        }

    def added_to(self, logits_MV: torch.Tensor, hidden: Hidden) -> torch.Tensor:
        """Return float32 [M, V], the logits plus the unnormalised prior of each hidden gene.

        Float32 logits are overwritten. Only tokens of visible positions are read, so the tokens at
        hidden positions do not matter. Rows without a label stay unchanged.
        """
        return _Added.apply(logits_MV.float(), self, hidden)  # type: ignore[return-value]

    def add_in_place(self, logits_MV: torch.Tensor, hidden: Hidden) -> None:
        """Add the prior as `added_to` does, to float32 logits without a gradient history."""
        if len(logits_MV) == 0:
            return
        if logits_MV.device.type != "cpu":
            self.add_on_device(logits_MV, hidden)
            return
        add_prior(
            logits_MV.numpy(), hidden.input_ids.numpy(), hidden.lengths.numpy(),
            hidden.tables.numpy(), hidden.masked_places.numpy(), hidden.labels.numpy(),
            self._first_gene, self._place_of, self._tables["length_edges"], self._log_factors,
            self._log_frequency, np.float32(_SEEN),
        )  # fmt: skip

    def add_on_device(self, logits_MV: torch.Tensor, hidden: Hidden) -> None:
        """Add the prior as `add_in_place` does, with torch's own operations."""
        values = self.on_device(hidden)
        for first in range(0, len(hidden.labels), _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            logits_MV[rows] += values(rows)

    def on_device(self, hidden: Hidden) -> Callable[[slice], torch.Tensor]:
        """Return a function that gives the prior of a range of rows, float32 [rows, V].

        Shapes depend on B, L and M alone, and nothing waits for the device.
        """
        input_ids, _, masked_places, labels, _ = hidden
        tables = self._tables_on(input_ids.device)
        num_cells, length = input_ids.shape
        lengths_B, table_B = hidden.lengths, hidden.tables
        is_real_M = labels != NO_LABEL
        rows_M, places_M = masked_places // length, masked_places % length
        # The array has one additional position, to which entries without a gene are written.
        flat = torch.where(is_real_M, masked_places, num_cells * length)
        visible = torch.cat([(input_ids >= self._first_gene).flatten(), is_real_M.new_zeros(1)])
        visible_BL = visible.index_fill(0, flat, False)[:-1].view(num_cells, length)
        upto_BL = visible_BL.cumsum(dim=1)
        # The visible genes of each cell, moved to the left without gaps.
        order_BL = (~visible_BL).to(torch.uint8).argsort(dim=1, stable=True)
        genes_BL = input_ids.long().gather(1, order_BL)
        num_visible_B = upto_BL[:, -1]
        length_class_B = torch.searchsorted(tables["edges"], lengths_B)
        context_M = length_class_B[rows_M] * RANK_CLASSES
        context_M += places_M * RANK_CLASSES // lengths_B[rows_M].clamp(min=1)
        context_M.clamp_(max=self._log_factors.shape[1] - 1)  # rows without a label
        before_M = upto_BL.flatten()[masked_places]
        seen_BV = self._seen(genes_BL, num_visible_B, len(tables["log_frequency"]))

        def values(m: slice) -> torch.Tensor:
            found = tables["log_frequency"].new_zeros(len(labels[m]), self._size)
            for slot in range(SLOTS):
                at = before_M[m] + slot - NEIGHBOURS
                is_there = (at >= 0) & (at < num_visible_B[rows_M[m]])
                gene = genes_BL[rows_M[m], at.clamp(0, length - 1)]
                start = self._size - 1 - tables["place_of"][gene]
                windows = tables["windows"][table_B[rows_M[m]], context_M[m], slot, start]
                found += windows * is_there[:, None]
            added = tables["log_frequency"] + found[:, tables["place_of"]]
            added += seen_BV[rows_M[m]]
            return added * is_real_M[m][:, None]

        return values

    def _seen(self, genes_BL: torch.Tensor, num_visible_B: torch.Tensor, size: int) -> torch.Tensor:
        """Return float32 [B, V], `_SEEN` times how often a gene is visible in a cell."""
        is_gene = torch.arange(genes_BL.shape[1], device=genes_BL.device) < num_visible_B[:, None]
        seen = torch.zeros(len(genes_BL), size, device=genes_BL.device)
        return seen.scatter_add(1, genes_BL, _SEEN * is_gene.float())

    def _tables_on(self, device: torch.device) -> dict[str, torch.Tensor]:
        if device not in self._on_device:
            tables = {
                "place_of": torch.from_numpy(self._place_of.astype(np.int64)),
                "edges": torch.from_numpy(self._tables["length_edges"]),
                "log_frequency": torch.from_numpy(self._log_frequency),
                "factors": torch.from_numpy(self._log_factors),
            }
            moved = {name: table.to(device) for name, table in tables.items()}
            # A view [tables, contexts, SLOTS, G, G]: the window that begins at each place.
            moved["windows"] = moved["factors"].unfold(3, self._size, 1)
            self._on_device[device] = moved
        return self._on_device[device]

    def save(self, folder: Path) -> None:
        """Write ``prior.safetensors`` into a folder, complete or not at all."""
        identity = {
            "format": FORMAT,
            "vocabulary_sha256": self._vocabulary_sha256,
            "sha256": digest_of(self._tables),
        }
        with complete_file(folder / FILE_NAME) as aside:
            aside.write_bytes(save(self._tables, {"identity": json.dumps(identity)}))

    @classmethod
    def load(cls, folder: Path, vocabulary: Vocabulary) -> ArithmeticPrior:
        """Return the prior of a run folder or model folder.

        Raises
        ------
        ValueError
            The file is missing or damaged, or belongs to another vocabulary.
        """
        path = folder / FILE_NAME
        try:
            with safe_open(path, "numpy") as opened:
                identity = json.loads((opened.metadata() or {}).get("identity", "{}"))
                tables = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); copy the folder again") from error
        if identity.get("format") != FORMAT or set(tables) != set(_TABLES):
            raise ValueError(f"{path}: no {FORMAT}; copy the folder again")
        if identity["vocabulary_sha256"] != vocabulary.sha256:
            raise ValueError(
                f"{path}: of vocabulary {identity['vocabulary_sha256'][:12]}, not of "
                f"{vocabulary.sha256[:12]}"
            )
        prior = cls(tables, vocabulary)
        if digest_of(tables) != identity["sha256"]:
            raise ValueError(f"{path}: damaged (wrong checksum); copy the folder again")
        return prior


class _Added(torch.autograd.Function):
    """Logits to which a prior is added in place; the gradient passes through unchanged."""

    @staticmethod
    def forward(
        ctx: Any, logits_MV: torch.Tensor, prior: ArithmeticPrior, hidden: Hidden
    ) -> torch.Tensor:
        ctx.mark_dirty(logits_MV)
        prior.add_in_place(logits_MV, hidden)
        return logits_MV

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple:
        return gradients[0], None, None


def objective_prior(
    config: RunConfig, shards: ShardSet, last: Checkpoint | None, ranks: Ranks
) -> ArithmeticPrior | None:
    """Return the prior that the settings of a run ask for, or None.

    Rank 0 counts it, and all other ranks receive exactly its numbers. A resumed run uses the tables
    that it began with, even if the shards have changed.

    Raises
    ------
    CannotUsePrior
        Raised on all ranks: the vocabulary has no medians, or the run folder has lost its tables.
    """
    if config.objective.prior == "none":
        return None
    tables, said = {}, {}
    if ranks.is_first:
        try:
            tables = _tables(config, shards, last.record.get("prior") if last else None)
            said = {"shapes": {k: (v.shape, v.dtype.str) for k, v in tables.items()}}
        except ValueError as error:
            said = {"error": str(error)}
    said = json.loads(dist.first_rank_says(json.dumps(said)))
    if "error" in said:
        raise CannotUsePrior(said["error"])
    agreed = {}
    for name, (shape, kind) in said["shapes"].items():
        own = tables.get(name, np.zeros(shape, np.dtype(kind)))
        shared = torch.from_numpy(np.ascontiguousarray(own)).to(ranks.device)
        dist.sum_in_place(shared)  # all are zeros except those of rank 0
        agreed[name] = shared.cpu().numpy()
    return ArithmeticPrior(agreed, shards.vocabulary)


def _tables(
    config: RunConfig, shards: ShardSet, record: dict[str, Any] | None
) -> dict[str, np.ndarray]:
    if record is None:
        quarantine = config.data.on_damage == "quarantine"
        cells = config.evaluation.baseline_cells
        return arithmetic_tables(shards, cells, quarantine, by_fold=True)
    out = config.run.out
    found = ArithmeticPrior.load(out, shards.vocabulary)
    if found.record["sha256"] != record["sha256"]:
        raise ValueError(
            f"{out / FILE_NAME}: has hash {found.record['sha256'][:12]}, the checkpoint was made "
            f"with {record['sha256'][:12]}; restore the run folder"
        )
    return found._tables
