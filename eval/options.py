"""Options that several commands of evaluation share, and what they mean."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

VocabOption = Annotated[
    Path | None, typer.Option(help="Geneformer's dictionaries, for models without vocabulary.json")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto")]
Bf16Option = Annotated[bool, typer.Option(help="compute in bfloat16")]
ConditionsOption = Annotated[
    list[str] | None, typer.Option("--cells", help="KEY=VALUE of obs; may be repeated")
]


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


def conditions(texts: list[str] | None) -> dict[str, str]:
    """Return column -> value of texts KEY=VALUE; ValueError for any other text."""
    wrong = [t for t in texts or [] if "=" not in t]
    if wrong:
        raise ValueError(f"--cells {wrong[0]}: must be KEY=VALUE, a column of obs and its value")
    return dict(t.split("=", 1) for t in texts or [])
