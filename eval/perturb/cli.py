"""``geneloom perturb``: parses and calls."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_prep.running.progress import show_progress
from data_prep.sources.reading_options import MATRIX, reading_options
from data_prep.sources.source_spec import SourceOptions
from eval.options import (
    Bf16Option,
    ConditionsOption,
    DeviceOption,
    VocabOption,
    choose_device,
    conditions,
    quiet,
)


@reading_options(*MATRIX, "obs_filter")
def perturb_command(
    context: typer.Context,
    cells: Annotated[Path, typer.Argument(help="h5ad with raw counts")],
    out: Annotated[Path, typer.Option(help="folder for the results; goes on with its own")],
    model: Annotated[
        Path | None, typer.Option(help="folder of `geneloom export`, or Geneformer's")
    ] = None,
    head: Annotated[
        Path | None, typer.Option(help="instead: folder of `geneloom finetune --save-head`")
    ] = None,
    kind: Annotated[str, typer.Option(help="delete, overexpress, inhibit or activate")] = "delete",
    genes: Annotated[
        str, typer.Option(help="all, or ids and symbols: A,B,C, or @FILE with one a line")
    ] = "all",
    group: Annotated[bool, typer.Option("--group", help="--genes as one set")] = False,
    pairs: Annotated[bool, typer.Option("--pairs", help="--set-size 2")] = False,
    set_size: Annotated[int, typer.Option(help="all combinations of so many genes")] = 1,
    anchor: Annotated[str | None, typer.Option(help="a gene in every set besides")] = None,
    rank_shift: Annotated[int, typer.Option(help="quartiles, of inhibit and activate")] = 1,
    to_quantile: Annotated[
        float | None, typer.Option(help="instead: 0 first rank ... 1 last")
    ] = None,
    only: ConditionsOption = None,
    max_cells: Annotated[int | None, typer.Option(min=1, help="drawn; default all")] = None,
    seed: Annotated[int, typer.Option(help="of the cells that are drawn")] = 0,
    donor: Annotated[str | None, typer.Option(help="column of obs")] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--column", help="of obs, to carry; may be repeated")
    ] = None,
    state_key: Annotated[str | None, typer.Option(help="column of obs with states")] = None,
    start: Annotated[str | None, typer.Option(help="state of the perturbed cells")] = None,
    goal: Annotated[str | None, typer.Option(help="state to move to")] = None,
    alternative: Annotated[
        list[str] | None, typer.Option(help="another state; may be repeated")
    ] = None,
    gene_shifts: Annotated[
        bool, typer.Option("--gene-shifts", help="also of every other gene, summed by donor")
    ] = False,
    screen: Annotated[
        int, typer.Option(min=0, help="only so many genes, chosen by an estimate; 0: all")
    ] = 0,
    pooling: Annotated[str, typer.Option(help="mean (over genes) or cls")] = "mean",
    layer: Annotated[int, typer.Option(help="0 last, -1 second-to-last, ...")] = -1,
    score: Annotated[
        str, typer.Option(help="mean_state, or geneformer: as its own perturber defines it")
    ] = "mean_state",
    bf16: Bf16Option = False,
    tokens_per_batch: Annotated[
        int, typer.Option(min=0, help="of one pass; 0: as fits the device")
    ] = 0,
    device: DeviceOption = "auto",
    vocab: VocabOption = None,
    *,
    reading: SourceOptions,
) -> None:
    """Perturb genes in silico and write how far each cell moves, and toward which state."""
    quiet()
    from eval.perturb.screen.cells_and_genes import CellChoice, GeneChoice
    from eval.perturb.screen.compare_copies import EngineSettings
    from eval.perturb.screen.edits import Edit
    from eval.perturb.screen.run import perturb_file
    from eval.perturb.screen.settings import Screen

    ranks = context.obj  # of `eval.perturb.__main__`; None without a launcher
    chosen_device = choose_device(device) if ranks is None else ranks.device.type
    if pairs and set_size not in (1, 2):
        raise ValueError(f"--pairs and --set-size {set_size}: give one of them")
    plan = Screen(
        Edit(kind, rank_shift, to_quantile),  # pyright: ignore[reportArgumentType]  checked there
        GeneChoice(_genes(genes), group, 2 if pairs else set_size, anchor),
        CellChoice(
            conditions(only),
            _states(state_key, start, goal, alternative or []),
            donor,
            tuple(columns or ()),
            max_cells,
            seed,
        ),
        EngineSettings(
            pooling,
            layer,
            bf16,
            chosen_device,
            tokens_per_batch,
            score,  # pyright: ignore[reportArgumentType]  checked there
        ),
        gene_shifts,
        screen,
    )
    with show_progress() as show:
        said = perturb_file(cells, out, plan, model, head, vocab, reading, ranks, show)
    if ranks is None or ranks.is_first:
        print(said)


def _genes(text: str) -> tuple[str, ...]:
    if not text.startswith("@"):
        names = text.split(",")
    else:
        try:
            names = Path(text[1:]).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--genes {text}: cannot be read ({error})") from error
    found = tuple(n.strip() for n in names if n.strip())
    if not found:
        raise ValueError(f"--genes {text}: names no gene; give 'all', A,B,C or @FILE")
    return found


def _states(key: str | None, start: str | None, goal: str | None, others: list[str]):
    from eval.perturb.screen.cells_and_genes import States

    if key is None and start is None and goal is None and not others:
        return None
    if key is None or start is None or goal is None:
        raise ValueError("states: --state-key COLUMN, --start A and --goal B go together")
    return States(key, start, goal, tuple(others))
