"""Options that several commands of evaluation share, and what they mean."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from data_prep.options import Read


def choose_device(name: str) -> str:
    """Return ``cuda`` or ``cpu``."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    return name


def quiet() -> None:
    """Only this project's own messages, no progress bars of libraries."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("eval").setLevel(logging.INFO)


def conditions(texts: list[str]) -> dict[str, str]:
    """Return column -> value of texts KEY=VALUE; ValueError for any other text."""
    wrong = [t for t in texts if "=" not in t]
    if wrong:
        raise ValueError(f"--cells {wrong[0]}: must be KEY=VALUE, a column of obs and its value")
    return dict(t.split("=", 1) for t in texts)


VocabOption = Annotated[
    Path | None,
    typer.Option("--vocab", help="Geneformer's dictionaries, for models without vocabulary.json"),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto")]
Bf16Option = Annotated[bool, typer.Option(help="compute in bfloat16")]
TokensOption = Annotated[
    int, typer.Option("--tokens-per-batch", min=64, help="padded tokens of a pass on a GPU")
]
ConditionsOption = Annotated[
    dict[str, str],
    typer.Option("--cells", help="KEY=VALUE of obs; may be repeated"),
    Read(conditions, list[str] | None),
]
CellsArgument = Annotated[Path, typer.Argument(help="h5ad with raw counts")]
ModelOption = Annotated[Path, typer.Option(help="folder of `geneloom export`, or Geneformer's")]
