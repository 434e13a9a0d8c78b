"""``geneloom embed``, ``finetune``, ``attention`` and ``report``: parse and call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from data_prep.running.progress import show_progress
from data_prep.sources.reading_options import MATRIX, reading_options
from data_prep.sources.source_spec import SourceOptions
from eval.options import Bf16Option, DeviceOption, JsonOption, VocabOption, choose_device, quiet
from pretrain.cli import StepOption, chosen_step


@reading_options(*MATRIX)
def embed_command(
    cells: Annotated[Path, typer.Argument(help="h5ad with raw counts")],
    model: Annotated[Path, typer.Option(help="folder of `geneloom export`, or Geneformer's")],
    out: Annotated[
        Path, typer.Option(help="new .h5ad or .zarr: input and .obsm['X_geneloom']; or .parquet")
    ],
    vocab: VocabOption = None,
    pooling: Annotated[
        str | None,
        typer.Option(help="state (of the model's corpus and network), mean over genes, or cls"),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="of mean and cls: 0 last, -1 second-to-last, ... [-1]")
    ] = None,
    bf16: Bf16Option = False,
    tokens_per_batch: Annotated[
        int, typer.Option(min=64, help="padded tokens of a pass on a GPU")
    ] = 16_384,
    device: DeviceOption = "auto",
    *,
    reading: SourceOptions,
) -> None:
    """Write cell embeddings beside the cells: every cell, in the file's order.

    Without --pooling: the cell state where the model folder has one, else the mean.
    """
    quiet()
    from eval.cells.embed import embed_file

    settings = {
        "pooling": pooling,
        "layer": layer,
        "bf16": bf16,
        "token_budget": tokens_per_batch,
        "device": choose_device(device),
    }
    with show_progress() as progress:
        said = embed_file(cells, model, out, vocab, reading, progress=progress, **settings)
    print(said)


finetune_app = typer.Typer(no_args_is_help=True, help="Fine-tune and score beside baselines.")


@finetune_app.callback()
def _finetune_group() -> None:
    """Fine-tune a pretrained encoder and score it beside baselines."""


@finetune_app.command("cells")
@reading_options(*MATRIX, "obs_filter")
def finetune_command(
    context: typer.Context,
    cells: Annotated[Path, typer.Argument(help="h5ad with raw counts and labels")],
    model: Annotated[Path, typer.Option(help="folder of `geneloom export`, or Geneformer's")],
    label: Annotated[str, typer.Option(help="column of obs to predict")],
    out: Annotated[Path, typer.Option(help="new folder for results.json")],
    donor: Annotated[str | None, typer.Option(help="column of obs; donors stay whole")] = None,
    seeds: Annotated[int, typer.Option(help="splits and trainings, at least 3")] = 3,
    epochs: Annotated[int, typer.Option(min=1)] = 5,
    steps: Annotated[int, typer.Option(min=0, help="at least, in more epochs if need be")] = 300,
    start: Annotated[
        str, typer.Option(help="head's first weights: probe (of the frozen encoder) or random")
    ] = "probe",
    learning_rate: Annotated[float, typer.Option(help="peak, of the encoder")] = 3e-4,
    head_learning_rate: Annotated[float, typer.Option(help="peak, of the head")] = 1e-3,
    batch_cells: Annotated[int, typer.Option(min=1)] = 8,
    freeze_layers: Annotated[int, typer.Option(min=0, help="lowest layers not trained")] = 0,
    max_train_per_class: Annotated[
        int | None, typer.Option(min=1, help="few-shot; default all")
    ] = None,
    max_test_per_class: Annotated[int | None, typer.Option(min=1, help="default all")] = None,
    patience: Annotated[
        int, typer.Option(min=0, help="epochs without a better validation loss; 0: all epochs")
    ] = 0,
    lora_rank: Annotated[
        int, typer.Option(min=0, help="train low-rank adapters instead of the encoder; 0: off")
    ] = 0,
    class_weights: Annotated[bool, typer.Option(help="classes weigh alike in the loss")] = True,
    save_head: Annotated[
        Path | None, typer.Option(help="new folder: a classifier of all labelled cells")
    ] = None,
    bf16: Bf16Option = False,
    device: DeviceOption = "auto",
    vocab: VocabOption = None,
    *,
    reading: SourceOptions,
    as_json: JsonOption = False,
) -> None:
    """Classify cells: pretrained against random weights and simple baselines, over seeds."""
    quiet()
    from eval.drawing.tables import print_scores
    from eval.finetune.classifier import FinetuneSettings
    from eval.finetune.score_cells import finetune_cells

    ranks = context.obj  # of `eval.finetune.__main__`; None without a launcher
    settings = FinetuneSettings(
        epochs=epochs,
        steps=steps,
        start=cast(Any, start),
        learning_rate=learning_rate,
        head_learning_rate=head_learning_rate,
        batch_cells=batch_cells,
        freeze_layers=freeze_layers,
        patience=patience,
        lora_rank=lora_rank,
        class_weights=class_weights,
        bf16=bf16,
        device=choose_device(device) if ranks is None else ranks.device.type,
    )
    results = finetune_cells(
        cells, model, label, out, donor, seeds, vocab, settings, reading,
        max_train_per_class, max_test_per_class, save_head, ranks,
    )  # fmt: skip
    if ranks is not None and not ranks.is_first:
        return
    if as_json:
        print(json.dumps(results, indent=1))
    else:
        print_scores(results)
        print(out / "results.json")


@reading_options(*MATRIX)
def predict_command(
    cells: Annotated[Path, typer.Argument(help="h5ad with raw counts")],
    head: Annotated[Path, typer.Option(help="folder of `geneloom finetune cells --save-head`")],
    out: Annotated[Path, typer.Option(help="new h5ad: the input and the predictions")],
    device: DeviceOption = "auto",
    *,
    reading: SourceOptions,
) -> None:
    """Write a trained head's classes and probabilities beside the cells: all, in their order."""
    quiet()
    from eval.finetune.predict import predict_file

    print(predict_file(cells, head, out, reading, choose_device(device)))


@reading_options(*MATRIX, "obs_filter")
def attention_command(
    cells: Annotated[Path, typer.Argument(help="h5ad with raw counts")],
    model: Annotated[Path, typer.Option(help="folder of `geneloom export`, or Geneformer's")],
    out: Annotated[Path, typer.Option(help="new folder for the tables")],
    genes: Annotated[
        Path | None, typer.Option(help="list of genes; default: the 300 that most cells have")
    ] = None,
    group: Annotated[str | None, typer.Option(help="column of obs to average apart")] = None,
    pairs: Annotated[bool, typer.Option(help="also each pair of the genes")] = False,
    vocab: VocabOption = None,
    bf16: Bf16Option = False,
    tokens_per_batch: Annotated[int, typer.Option(min=64, help="padded tokens")] = 4_096,
    device: DeviceOption = "auto",
    *,
    reading: SourceOptions,
) -> None:
    """Write how much each gene is attended to, head by head, over all cells."""
    quiet()
    from eval.cells.attention_tables import attention_file

    settings = {
        "token_budget": tokens_per_batch, "device": choose_device(device), "bf16": bf16
    }  # fmt: skip
    print(attention_file(cells, model, out, genes, group, pairs, vocab, reading, **settings))


def report_command(
    folder: Annotated[
        Path, typer.Argument(help="of prepare, pretrain, finetune, perturb or benchmark")
    ],
    out: Annotated[Path | None, typer.Option(help="HTML file [FOLDER/report.html]")] = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option(help="of a pretraining: folder of `geneloom finetune`; may be repeated"),
    ] = None,
    embedding: Annotated[
        Path | None, typer.Option(help="of a pretraining: h5ad of `geneloom embed`")
    ] = None,
    color: Annotated[str | None, typer.Option(help="column of obs that colours the UMAP")] = None,
    commands: Annotated[Path | None, typer.Option(help="text file of what was run")] = None,
    step: StepOption = None,
) -> None:
    """Write one self-contained page about what a command left in a folder, whichever it was."""
    quiet()
    from eval.report.any_folder import write_stage_report

    which = chosen_step(step)
    print(write_stage_report(folder, out, scores or [], embedding, color, commands, which))
