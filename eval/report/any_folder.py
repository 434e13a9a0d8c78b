"""``geneloom report``: one self-contained page about whatever a command left in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.files import complete_file
from data_prep.running.stages import stage_of

if TYPE_CHECKING:
    from pretrain.checkpoints.checkpoint import Which

REPORT_NAME = "report.html"


def write_stage_report(
    folder: Path,
    out: Path | None = None,
    score_folders: Sequence[Path] = (),
    embedding: Path | None = None,
    color: str | None = None,
    commands: Path | None = None,
    step: Which = None,
) -> str:
    """Write the page of a folder of any stage and return its path as text.

    Parameters
    ----------
    out
        HTML file, ``.html`` is added where it has no ending, for a browser shows the source
        otherwise; None: ``report.html`` in the folder.
    score_folders, embedding, color, commands, step
        As in `eval.report.run_page.write_report`; of a pretraining only.

    Raises
    ------
    ValueError
        No command made the folder, it is not finished, or options of a pretraining are given for
        another stage.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    stage, record = stage_of(folder)
    if stage is None:
        raise ValueError(
            f"{folder}: nothing to report on; expected a folder of `geneloom prepare`, `pretrain`, "
            "`finetune`, `perturb`, `benchmark` or `saturate`"
        )
    out = out or folder / REPORT_NAME
    if not out.suffix:
        out = out.with_suffix(".html")
    if stage == "pretrain":
        from eval.report.run_page import write_report

        return write_report(folder, out, list(score_folders), embedding, color, commands, step)
    if score_folders or embedding or color or commands or step is not None:
        raise ValueError(
            f"{folder}: is of `geneloom {stage}`; --scores, --embedding, --color, --commands and "
            "--step belong to a pretraining's page"
        )
    if not out.parent.is_dir():
        raise ValueError(f"{out}: the folder {out.parent} does not exist")
    if stage == "prepare":
        from data_prep.inspection.page import write_page
        from data_prep.shards.reader import ShardSet

        write_page(ShardSet(folder), out)
        return str(out)
    page = _page(stage, record, folder)
    with complete_file(out) as aside:
        aside.write_text(page)
    return str(out)


def _page(stage: str, record: dict, folder: Path) -> str:
    if stage == "finetune":
        from eval.report.run_page import scores_page

        return scores_page(folder)
    if stage == "saturate":
        from eval.saturate.report.page import saturation_page

        return saturation_page(record)
    if stage == "benchmark":
        from eval.benchmark.report.page import benchmark_page

        return benchmark_page(record, None)
    from eval.perturb.effects.analysis import AnalysisSettings, analyse
    from eval.perturb.report.page import perturb_page
    from eval.perturb.screen.results import Results

    screen = Results.open(folder)
    return perturb_page(screen, analyse(screen, AnalysisSettings()))
