"""How cells are embedded and looked at: what the settings are called, mean and default to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from eval.options import Bf16Option, DeviceOption, TokensOption, VocabOption


@dataclass(frozen=True)
class EmbedOptions:
    """How cells are embedded.

    `pooling`: by default the cell state (`pretrain.cell_states.cell_state`) where the model folder
    has one and no layer is asked for, else the mean. `layer`: by default -1.
    """

    vocabulary: VocabOption = None
    pooling: Annotated[
        str | None,
        typer.Option(help="state (of the model's corpus and network), mean over genes, or cls"),
    ] = None
    layer: Annotated[
        int | None, typer.Option(help="of mean and cls: 0 last, -1 second-to-last, ... [-1]")
    ] = None
    genes: Annotated[
        bool, typer.Option("--genes", help="of genes, not of cells: a .parquet of both tables")
    ] = False
    group: Annotated[
        str | None, typer.Option(help="of --genes: column of obs, a mean state for each value")
    ] = None
    bf16: Bf16Option = False
    token_budget: TokensOption = 16_384
    device: DeviceOption = "auto"

    def __post_init__(self) -> None:
        if self.group and not self.genes:
            raise ValueError(f"--group {self.group}: belongs to --genes")


@dataclass(frozen=True)
class AttentionOptions:
    """Whose attention is averaged, and how it is computed."""

    genes: Annotated[
        Path | None, typer.Option(help="list of genes; default: the 300 that most cells have")
    ] = None
    group: Annotated[str | None, typer.Option(help="column of obs to average apart")] = None
    pairs: Annotated[bool, typer.Option(help="also each pair of the genes")] = False
    vocabulary: VocabOption = None
    bf16: Bf16Option = False
    token_budget: TokensOption = 4_096
    device: DeviceOption = "auto"
