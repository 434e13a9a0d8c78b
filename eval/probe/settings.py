"""How a model is probed: what the settings are called, mean and default to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from data_prep.options import Read
from eval.options import Bf16Option, ConditionsOption, DeviceOption, TokensOption, VocabOption
from pretrain.options import StepOption

CELLS_A_CLASS = (10, 25, 100)
_FEWEST_DRAWS = 3


def _numbers(text: str) -> tuple[int, ...]:
    """Return the different numbers of a text like 10,25,100, ascending."""
    try:
        return tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError as error:
        raise ValueError(
            f"--cells-a-class {text}: must be whole numbers separated by commas"
        ) from error


@dataclass(frozen=True)
class ProbeSettings:
    """How a model is probed; the help of an option says what it is.

    `max_cells`: drawn are 200 of each class, or all it has. `shards`: for folders that the corpus
    SVD was not stored in, and for the cell states of a run's checkpoints. `step`: of a run folder
    this checkpoint alone; None: all of them.
    """

    donor: Annotated[
        str | None, typer.Option(help="column of obs; labelled and predicted donors differ")
    ] = None
    keep: ConditionsOption = field(default_factory=dict)
    cells_a_class: Annotated[
        tuple[int, ...],
        typer.Option(help="numbers of labelled cells, separated by commas"),
        Read(_numbers),
    ] = CELLS_A_CLASS
    seeds: Annotated[int, typer.Option(help="draws of each number, at least 3")] = 10
    random_models: Annotated[
        int, typer.Option(help="models of random weights, which the draws take in turn")
    ] = 3
    max_cells: Annotated[int, typer.Option(min=0, help="drawn of more cells; 0: all")] = 10_000
    shards: Annotated[
        Path | None, typer.Option(help="of the pretraining, where the folder has no corpus SVD")
    ] = None
    step: StepOption = None
    vocabulary: VocabOption = None
    bf16: Bf16Option = False
    token_budget: TokensOption = 16_384
    device: DeviceOption = "auto"

    def __post_init__(self) -> None:
        if not self.cells_a_class or min(self.cells_a_class) < 1:
            raise ValueError(f"--cells-a-class {self.cells_a_class}: must be numbers from 1 on")
        if self.seeds < _FEWEST_DRAWS:
            raise ValueError(f"--seeds {self.seeds}: an interval needs {_FEWEST_DRAWS} draws")
        if not 1 <= self.random_models <= self.seeds:
            raise ValueError(f"--random-models {self.random_models}: must be 1 to --seeds")
