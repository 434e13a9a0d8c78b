"""``geneloom embed``, ``finetune``, ``attention`` and ``report``: parse and call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_prep.options import AsJson, spread
from data_prep.running.progress import show_progress
from data_prep.sources.source_spec import MATRIX, MATRIX_AND_FILTER, SourceOptions
from eval.cells.settings import AttentionOptions, EmbedOptions
from eval.finetune.settings import FinetuneGenesOptions, FinetuneOptions
from eval.options import CellsArgument, DeviceOption, ModelOption, choose_device, quiet
from pretrain.options import StepOption

if TYPE_CHECKING:
    from pretrain.ranks.dist import Ranks


@spread
def embed_command(
    cells: CellsArgument,
    model: ModelOption,
    out: Annotated[
        Path, typer.Option(help="new .h5ad or .zarr: input and .obsm['X_geneloom']; or .parquet")
    ],
    options: EmbedOptions,
    reading: Annotated[SourceOptions, MATRIX],
) -> None:
    """Write cell embeddings beside the cells: every cell, in the file's order.

    Without --pooling: the cell state where the model folder has one, else the mean. With --genes:
    the model's input table, and the mean state of each gene over the cells (of each --group).

    A killed command goes on after the last thousands of cells that are done.
    """
    quiet()
    from eval.cells.embed import embed_file
    from eval.cells.embed_genes import embed_genes_file

    embed = embed_genes_file if options.genes else embed_file
    with show_progress() as progress:
        said = embed(cells, model, out, options, reading, progress)
    print(said)


finetune_app = typer.Typer(no_args_is_help=True, help="Fine-tune and score beside baselines.")


@finetune_app.callback()
def _finetune_group() -> None:
    """Fine-tune a pretrained encoder on cells or on genes, and score it beside baselines."""


@finetune_app.command("cells")
@spread
def finetune_command(
    context: typer.Context,
    cells: Annotated[Path, typer.Argument(help="h5ad with raw counts and labels")],
    model: ModelOption,
    label: Annotated[str, typer.Option(help="column of obs to predict")],
    out: Annotated[Path, typer.Option(help="new folder for results.json")],
    options: FinetuneOptions,
    reading: Annotated[SourceOptions, MATRIX_AND_FILTER],
    as_json: AsJson = False,
) -> None:
    """Classify cells: pretrained against random weights and simple baselines, over seeds."""
    quiet()
    from eval.finetune.score_cells import finetune_cells

    ranks = context.obj  # of `eval.finetune.__main__`; None without a launcher
    results = finetune_cells(cells, model, label, out, options, reading, ranks)
    _say_scores(results, out, as_json, ranks)


@finetune_app.command("genes")
@spread
def finetune_genes_command(
    context: typer.Context,
    cells: Annotated[Path, typer.Argument(help="h5ad with raw counts: genes are looked at in it")],
    genes: Annotated[Path, typer.Option(help="table (csv, tsv): ensembl_id or gene, and --label")],
    model: ModelOption,
    label: Annotated[str, typer.Option(help="column of --genes with two classes")],
    out: Annotated[Path, typer.Option(help="new folder for results.json")],
    options: FinetuneGenesOptions,
    reading: Annotated[SourceOptions, MATRIX_AND_FILTER],
    as_json: AsJson = False,
) -> None:
    """Classify genes: pretrained against random weights and simple baselines, over folds."""
    quiet()
    from eval.benchmark.finetune_genes import finetune_genes

    ranks = context.obj
    results = finetune_genes(cells, genes, model, label, out, options, reading, ranks)
    _say_scores(results, out, as_json, ranks)


def _say_scores(results: dict, out: Path, as_json: bool, ranks: Ranks | None) -> None:
    """Print the results of a fine-tuning; of several ranks the first one does."""
    from eval.drawing.tables import print_scores

    if ranks is not None and not ranks.is_first:
        return
    if as_json:
        print(json.dumps(results, indent=1))
    else:
        print_scores(results)
        print(out / "results.json")


@spread
def predict_command(
    cells: CellsArgument,
    head: Annotated[Path, typer.Option(help="folder of `geneloom finetune --save-head`")],
    out: Annotated[
        Path,
        typer.Option(help="new h5ad: the input and the predictions; or .csv, .tsv: table of genes"),
    ],
    reading: Annotated[SourceOptions, MATRIX],
    device: DeviceOption = "auto",
) -> None:
    """Write a trained head's classes and probabilities: of cells, or of genes over these cells."""
    quiet()
    from eval.finetune.predict import predict_file

    print(predict_file(cells, head, out, reading, choose_device(device)))


@spread
def attention_command(
    cells: CellsArgument,
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="new folder for the tables")],
    options: AttentionOptions,
    reading: Annotated[SourceOptions, MATRIX_AND_FILTER],
) -> None:
    """Write how much each gene is attended to, head by head, over all cells."""
    quiet()
    from eval.cells.attention_tables import attention_file

    print(attention_file(cells, model, out, options, reading))


@spread
def report_command(
    folder: Annotated[
        Path, typer.Argument(help="of prepare, pretrain, finetune, perturb, benchmark or saturate")
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

    print(write_stage_report(folder, out, scores or [], embedding, color, commands, step))
