"""``geneloom probe``: parses and calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from data_prep.sources.reading_options import MATRIX, reading_options
from data_prep.sources.source_spec import SourceOptions
from eval.options import (
    Bf16Option,
    ConditionsOption,
    DeviceOption,
    JsonOption,
    VocabOption,
    choose_device,
    conditions,
    quiet,
)
from pretrain.cli import StepOption, chosen_step


@reading_options(*MATRIX)
def probe_command(
    model: Annotated[
        Path, typer.Argument(help="folder of `geneloom export`, Geneformer's, or a run folder")
    ],
    cells: Annotated[Path, typer.Argument(help="h5ad with raw counts and labels")],
    label: Annotated[str, typer.Option(help="column of obs to predict")],
    out: Annotated[
        Path | None, typer.Option(help="new .html, or a new folder for page, figure and scores")
    ] = None,
    donor: Annotated[
        str | None, typer.Option(help="column of obs; labelled and predicted donors differ")
    ] = None,
    only: ConditionsOption = None,
    cells_a_class: Annotated[
        str, typer.Option(help="numbers of labelled cells, separated by commas")
    ] = "10,25,100",
    seeds: Annotated[int, typer.Option(help="draws of each number, at least 3")] = 10,
    random_models: Annotated[
        int, typer.Option(help="models of random weights, which the draws take in turn")
    ] = 3,
    max_cells: Annotated[int, typer.Option(min=0, help="drawn of more cells; 0: all")] = 10_000,
    shards: Annotated[
        Path | None, typer.Option(help="of the pretraining, where the folder has no corpus SVD")
    ] = None,
    step: StepOption = None,
    vocab: VocabOption = None,
    bf16: Bf16Option = False,
    tokens_per_batch: Annotated[int, typer.Option(min=64, help="padded tokens")] = 16_384,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    *,
    reading: SourceOptions,
) -> None:
    """Frozen cells beside what counting knows: has pretraining earned its hours?

    A few cells of each class are labelled, logistic regression predicts the others: from the
    model's frozen states, the SVD of its training cells, random weights, and the cells' own genes.
    """
    quiet()
    from eval.probe.page import print_probe, require_new_place, write_probe
    from eval.probe.run import ProbeSettings, probe_cells

    require_new_place(out)
    settings = ProbeSettings(
        _numbers(cells_a_class), seeds, random_models, max_cells,
        conditions(only), tokens_per_batch, choose_device(device), bf16,
    )  # fmt: skip
    probe = probe_cells(
        model, cells, label, donor, shards, vocab, settings, reading, chosen_step(step)
    )
    page = write_probe(probe, out) if out else None
    if as_json:
        print(json.dumps(probe.record, indent=1))
        return
    print_probe(probe)
    if page:
        print(page)


def _numbers(text: str) -> tuple[int, ...]:
    """Return the different numbers of a text like 10,25,100, ascending."""
    try:
        return tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError as error:
        raise ValueError(
            f"--cells-a-class {text}: must be whole numbers separated by commas"
        ) from error
