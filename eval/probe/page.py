"""A probe on the console, and as one self-contained page: the answer in words first."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_prep.files import complete_file, complete_folder, require_new, require_new_file
from eval.drawing.page import page_template
from eval.drawing.plot import Plot, as_png, as_svg, benchmark_style
from eval.drawing.tables import format_interval
from eval.probe.figures import probe_plots
from eval.probe.run import BELOW, RANDOM_PREFIX, Probe, main_contender

PAGE_NAME, RECORD_NAME, TABLE_NAME = "probe.html", "probe.json", "probe.csv"
_TEMPLATE = Path(__file__).parent / "page.html"


def require_new_place(out: Path | None) -> None:
    """Raise ValueError unless a page or folder can be written."""
    if out is None:
        return
    if out.suffix == ".html":
        require_new_file(out)
    else:
        require_new(out)


def write_probe(probe: Probe, out: Path) -> Path:
    """Write the page (``.html``), or a folder with it, and return the page's path.

    A folder holds ``probe.html``, ``probe.json`` (the record), ``probe.csv`` (the scores) and each
    figure as ``.svg`` and ``.png``. It appears complete or not at all.
    """
    with benchmark_style():
        drawn = [(plot, as_svg(plot.figure), as_png(plot.figure)) for plot in probe_plots(probe)]
    page = _page(probe, [(plot, svg) for plot, svg, _ in drawn])
    if out.suffix == ".html":
        with complete_file(out) as aside:
            aside.write_text(page)
        return out
    with complete_folder(out, RECORD_NAME) as partial:
        (partial / PAGE_NAME).write_text(page)
        (partial / RECORD_NAME).write_text(json.dumps(probe.record, indent=1) + "\n")
        table = probe.scores.drop(columns=["macro_f1", "draws"])
        for part in ("mean", "half_width"):
            table[part] = [score[part] for score in probe.scores["macro_f1"]]
        table.to_csv(partial / TABLE_NAME, index=False)
        for plot, svg, png in drawn:
            (partial / f"{plot.name}.svg").write_text(svg)
            (partial / f"{plot.name}.png").write_bytes(png)
    return out / PAGE_NAME


def print_probe(probe: Probe) -> None:
    """Print the answer, the scores and what was left out."""
    console = Console()
    record = probe.record
    for sentence in answer(record):
        console.print(sentence, highlight=False, markup=False)
    table = Table(title=_title(record), title_justify="left")
    table.add_column("frozen features")
    for size in record["classes"]:
        table.add_column(f"{size} cells a class", justify="right")
    for name, cells in rows(record):
        table.add_row(name, *cells)
    console.print(table)
    for line in notes(record):
        console.print(line, highlight=False, markup=False)


def answer(record: dict[str, Any]) -> list[str]:
    """Return in sentences where the frozen cells of the last step stand to the corpus SVD."""
    if record["corpus_svd"] is None:
        missing = record["corpus_svd_missing"]
        return [f"Not held against the corpus SVD, so nothing is said of its worth. {missing}."]
    found = []
    last, main = record["steps"][-1], main_contender(record)
    for name in (main, RANDOM_PREFIX + main):
        step = None if name != main else last
        verdicts = [v for v in record["verdicts"] if v["contender"] == name and v["step"] == step]
        who = "Frozen cells" if name == main else "Those of random weights"
        for verdict in verdicts:
            found.append(
                f"{who} are {verdict['word']} the corpus SVD with {verdict['cells_a_class']} "
                f"labelled cells a class: macro-F1 {_difference(verdict['difference'])}."
            )
        if name == main and verdicts and all(v["word"] == BELOW for v in verdicts):
            found.append(
                "A table of gene loadings, which takes seconds to make, tells these cells better."
            )
    return found


def rows(record: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Return (name, score with each number of labelled cells), as the record orders them."""
    found: dict[str, dict[int, str]] = {}
    for row in record["scores"]:
        name = _row_name(row, record)
        found.setdefault(name, {})[row["cells_a_class"]] = format_interval(row["macro_f1"])
    sizes = [int(size) for size in record["classes"]]
    return [(name, [cells.get(size, "-") for size in sizes]) for name, cells in found.items()]


def notes(record: dict[str, Any]) -> list[str]:
    """Return what a reader must know besides: cells and classes left out, cells seen before."""
    lines = [f"left out: {n:,} cells: {reason}" for reason, n in record["left_out"].items()]
    for size, classes in record["classes_left_out"].items():
        if classes:
            named = ", ".join(f"{name} ({cells:,})" for name, cells in classes.items())
            lines.append(f"too small for {size} labelled cells: {named}")
    if record["seen"]:
        lines.append(
            f"The model was pretrained on a file of this name ({', '.join(record['seen'])}): it "
            "has seen these cells, without their labels, and so has the corpus SVD."
        )
    if record["corpus_svd"] is None:
        lines.append(f"no corpus SVD: {record['corpus_svd_missing']}")
    return lines


def _row_name(row: dict[str, Any], record: dict[str, Any]) -> str:
    several = len(record["steps"]) > 1 and row["step"] is not None
    return f"{row['contender']}, step {row['step']:,}" if several else row["contender"]


def _difference(value: dict[str, float]) -> str:
    return f"{value['mean']:+.3f} ± {value['half_width']:.3f}".replace("-", "−")


def _title(record: dict[str, Any]) -> str:
    return (
        f"{record['model']} on {record['file']}, {record['label']}: macro-F1 of "
        f"{record['cells']:,} cells, mean and 95 % interval over {record['seeds']} draws"
    )


def _page(probe: Probe, figures: list[tuple[Plot, str]]) -> str:
    record = probe.record
    return page_template(_TEMPLATE).render(
        r=record,
        title=_title(record),
        answer=answer(record),
        rows=rows(record),
        notes=notes(record),
        verdicts=[
            (_row_name(v, record), v["cells_a_class"], v["word"], _difference(v["difference"]))
            for v in record["verdicts"]
        ],
        figures=[
            {
                "caption": plot.caption,
                "source": "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode(),
            }
            for plot, svg in figures
        ],
    )
