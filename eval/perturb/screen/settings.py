"""What a screen is: its settings, what they are called, mean and default to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from eval.options import Bf16Option, DeviceOption, VocabOption
from eval.perturb.screen.cells_and_genes import CellChoice, GeneChoice
from eval.perturb.screen.edits import Edit

Score = Literal["mean_state", "geneformer"]
SCORES: tuple[Score, ...] = ("mean_state", "geneformer")


@dataclass(frozen=True)
class EngineSettings:
    """The settings for computing copies.

    Attributes
    ----------
    pooling
        Embedding of a cell: ``mean`` over the compared genes, or ``cls``.
    layer
        0: last, -1: second-to-last (Geneformer's count and default), ...
    bf16
        Compute the encoder in bfloat16; all comparisons stay in float32 or float64.
    token_budget
        Tokens of one forward pass; results depend on it only by rounding. 0: 4,096 on a CPU, which
        fit into its cache, 65,536 on a GPU.
    score
        What is compared if the pooling is the mean. ``mean_state``: the mean states of the genes
        that original and copy both have, without the perturbed ones. ``geneformer``: as
        Geneformer's own perturber; ``shift`` is 1 - the mean over those genes of each gene's own
        cosine, and ``toward_<state>`` uses the mean states over all genes, including the perturbed
        ones. For the state of ``<cls>`` both scores are the same.
    """

    pooling: Annotated[str, typer.Option(help="mean (over genes) or cls")] = "mean"
    layer: Annotated[int, typer.Option(help="0 last, -1 second-to-last, ...")] = -1
    bf16: Bf16Option = False
    device: DeviceOption = "auto"
    token_budget: Annotated[
        int,
        typer.Option("--tokens-per-batch", min=0, help="of one pass; 0: as fits the device"),
    ] = 0
    score: Annotated[
        Score, typer.Option(help="mean_state, or geneformer: as its own perturber defines it")
    ] = "mean_state"

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"--score {self.score}: must be one of {', '.join(SCORES)}")

    @property
    def batch_tokens(self) -> int:
        return self.token_budget or (4096 if self.device == "cpu" else 65_536)

    def deciding(self) -> dict[str, Any]:
        """Return what changes values by more than their last bits."""
        return {
            "pooling": self.pooling, "layer": self.layer, "bf16": self.bf16, "score": self.score,
        }  # fmt: skip


@dataclass(frozen=True)
class Screen:
    """All settings that determine the results of a screen, except the cells and the model.

    `top` genes are chosen by an estimate (`eval.perturb.screen.estimate`).
    """

    edit: Edit = Edit()
    genes: GeneChoice = GeneChoice()
    cells: CellChoice = field(default_factory=CellChoice)
    engine: EngineSettings = EngineSettings()
    gene_shifts: Annotated[
        bool, typer.Option("--gene-shifts", help="also of every other gene, summed by donor")
    ] = False
    top: Annotated[
        int,
        typer.Option("--screen", min=0, help="only so many genes, chosen by an estimate; 0: all"),
    ] = 0

    def num_computed(self, num_sets: int) -> int:
        """Return how many of `num_sets` sets are computed exactly."""
        return min(num_sets, self.top) if self.top else num_sets

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        found = asdict(self.edit) | asdict(self.genes) | asdict(self.cells)
        found |= self.engine.deciding()
        return json.loads(json.dumps(found | {"gene_shifts": self.gene_shifts, "top": self.top}))


@dataclass(frozen=True)
class ModelChoice:
    """What computes a screen: a pretrained model, or a classifier, whose own encoder is used."""

    model: Annotated[
        Path | None, typer.Option(help="folder of `geneloom export`, or Geneformer's")
    ] = None
    head: Annotated[
        Path | None, typer.Option(help="instead: folder of `geneloom finetune --save-head`")
    ] = None
    vocabulary: VocabOption = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.head is None):
            raise ValueError(
                "give --model DIR, or --head DIR (its own encoder is used): one of them"
            )
