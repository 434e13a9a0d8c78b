"""Options of `pretrain`, `plan` and `export` beside the settings of a run (`pretrain.config`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from data_prep.options import Read


def chosen_step(text: str) -> int | Literal["best"]:
    """Return which checkpoint ``--step`` names: a step, or ``best``."""
    if text == "best":
        return text
    if not text.isdecimal():
        raise ValueError(f"--step {text}: must be the step of a checkpoint, or best")
    return int(text)


StepOption = Annotated[
    int | Literal["best"] | None,
    typer.Option(help="of which checkpoint: its step, or best; default: the newest"),
    Read(chosen_step, str | None),
]


@dataclass(frozen=True)
class StartOptions:
    """Where a run begins; the help of an option says what it is."""

    resume: Annotated[bool, typer.Option(help="go on from the newest checkpoint")] = False
    restart: Annotated[
        bool, typer.Option(help="as --resume; from step 0 if this run has no checkpoint yet")
    ] = False
    step: Annotated[
        int | Literal["best"] | None,
        typer.Option(help="of --resume: from this checkpoint, or from the best; later ones aside"),
        Read(chosen_step, str | None),
    ] = None
    allow_changes: Annotated[bool, typer.Option(help="resume with a changed recipe")] = False
    profile: Annotated[
        int, typer.Option(min=0, help="steps to profile, after two; RUN/profile")
    ] = 0


@dataclass(frozen=True)
class CorpusOptions:
    """What is known of a corpus that is not prepared yet; None: as of the recipe's paper."""

    cells: Annotated[int | None, typer.Option(min=1, help="without shards: how many")] = None
    mean_tokens: Annotated[int | None, typer.Option(min=1, help="without shards: a cell")] = None
    max_tokens: Annotated[int | None, typer.Option(min=64, help="without shards")] = None
    vocabulary_size: Annotated[int | None, typer.Option(min=10, help="without shards")] = None


@dataclass(frozen=True)
class SpeedOptions:
    """How fast a GPU is, and what it costs."""

    tokens_per_second: Annotated[
        float | None, typer.Option(min=1, help="of one GPU, measured; default: from --mfu")
    ] = None
    mfu: Annotated[
        float | None, typer.Option(min=0.001, max=1, help="share of peak; default: published")
    ] = None
    price: Annotated[float | None, typer.Option(min=0, help="of a GPU for an hour")] = None
