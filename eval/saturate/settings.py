"""How saturation is measured: what the settings are called, mean and default to."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from data_prep.options import Read
from pretrain.options import SpeedOptions

Equal = Literal["tokens", "epochs"]
SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(sorted({float(word) for word in text.split(",")}))
    except ValueError as error:
        raise ValueError(f"--shares {text}: must be numbers, separated by commas") from error


@dataclass(frozen=True)
class SaturateOptions:
    """The sizes, how they are trained, and what they are held against; the help says what is what.

    Attributes
    ----------
    cells_a_class, probe_cells
        As of `eval.probe.settings.ProbeSettings`.
    speed
        Of the estimate.
    """

    shares: Annotated[
        tuple[float, ...],
        typer.Option(help="of the training cells, separated by commas; 1 must be among them"),
        Read(_shares, str),
    ] = SHARES
    equal: Annotated[
        Equal, typer.Option(help="what all sizes have alike: tokens (steps) or epochs")
    ] = "tokens"
    seeds: Annotated[int, typer.Option(min=1, help="trainings of each size")] = 1
    launch: Annotated[
        str, typer.Option(help="trains below `geneloom launch`: its words, as 'local --ranks 2'")
    ] = ""
    cells: Annotated[
        Path | None, typer.Option(help="h5ad with raw counts: frozen cells of each size, probed")
    ] = None
    label: Annotated[str | None, typer.Option(help="of --cells: column of obs to predict")] = None
    cells_a_class: Annotated[int, typer.Option(min=1, help="of the probe: labelled cells")] = 25
    probe_cells: Annotated[int, typer.Option(min=0, help="drawn of more --cells; 0: all")] = 2000
    gpu: Annotated[str, typer.Option(help="of the estimate: as of `geneloom plan`")] = "cpu"
    gpus: Annotated[int, typer.Option(min=1, help="of the estimate; of cpu: cores")] = 1
    speed: SpeedOptions = SpeedOptions()

    def __post_init__(self) -> None:
        if self.equal not in ("tokens", "epochs"):
            raise ValueError(f"--equal {self.equal}: must be tokens or epochs")
        if not self.shares or min(self.shares) <= 0 or max(self.shares) != 1:
            raise ValueError(
                f"--shares {','.join(f'{s:g}' for s in self.shares)}: must be above 0, and 1, the "
                "whole corpus, must be the largest: it is what more cells are asked of"
            )
        if (self.cells is None) != (self.label is None):
            raise ValueError("--cells and --label: one needs the other")
        if self.launch and shlex.split(self.launch)[0] not in ("local", "hostfile", "mpi"):
            raise ValueError(
                f"--launch {self.launch}: must begin with local, hostfile or mpi, which return "
                "when the ranks have ended; in a job of SLURM, saturate itself is the job"
            )
