"""The page about a run: every figure from its records, old records, lost numbers, no network."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.test_data_prep_page import Reader

LENGTHS = ("96", "2048")


def heldout_record(step: int, loss: float) -> dict:
    """Return a record with every score, all different."""
    from pretrain.counting.baselines import BASELINE_NAMES

    record = {"kind": "heldout", "step": step, "cells": 1234, "genes": 30, "loss": loss}
    record |= {"masked_accuracy": 0.0123, "top10": 0.0789}
    record["genes_by_bucket"] = {"96": 10, "2048": 20}
    record["genes_by_dataset"] = {"blood": 12, "brain <2>": 18}
    record |= {"beyond_arithmetic": 7.5 - loss}
    record["beyond_arithmetic_by_dataset"] = {"blood": 1.25, "brain <2>": -0.75}
    record["loss_by_dataset"] = {"blood": 6.25, "brain <2>": 8.25}
    record["baseline_arithmetic_loss_by_dataset"] = {"blood": 7.5, "brain <2>": 7.5}
    for score in ("loss", "accuracy", "top10"):
        record[f"{score}_by_rank_decile"] = [loss + i / 10 for i in range(9)] + [None]
        record[f"{score}_by_bucket"] = {"2048": 0.3456, "96": 0.2345}
    for i, name in enumerate(BASELINE_NAMES, 1):
        record |= {f"baseline_{name}": 7 + i / 10, f"baseline_{name}_accuracy": 0.001 * i}
        record[f"baseline_{name}_top10"] = 0.01 * i
        record[f"baseline_{name}_loss_by_rank_decile"] = [7 + i / 10] * 10
        record[f"baseline_{name}_loss_by_bucket"] = {"96": 6 + i / 10, "2048": 8 + i / 10}
    return record


def train_record(step: int, rate: float | None) -> dict:
    return {
        "kind": "train", "step": step, "loss": 8 - step / 100, "masked_accuracy": 0.1,
        "grad_norm": 1.5, "learning_rate": 1e-3, "tokens_per_s": rate, "cells_per_s": rate,
        "data_wait": None if rate is None else 0.02, "padding": 0.03,
    }  # fmt: skip


def run_folder(folder: Path, metrics: list[dict]) -> Path:
    """Return a run folder with just what a report reads."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    versions = dict.fromkeys(("torch", "deepspeed", "transformers"), "1.0")
    environment = {"commit": "c0ffee", "dirty": False, "versions": versions, "machine": "m",
                   "gpus": [], "command": "geneloom pretrain"}  # fmt: skip
    (folder / "env.json").write_text(json.dumps(environment))
    buckets = [{"split": "train", "length": 96, "cells": 1, "tokens": 90}]
    manifest = {"buckets": buckets, "sources": []}
    (folder / "shards_manifest.json").write_text(json.dumps(manifest))
    (folder / "config.yaml").write_text("run: {}\n")
    return folder


def page_of(folder: Path, metrics: list[dict]) -> tuple[str, Reader, dict[str, str]]:
    """Return a report as text, as tables, and its figures as SVG by caption."""
    from eval.report.run_page import write_report

    out = folder / "report.html"
    write_report(run_folder(folder / "run", metrics), out, [], None, None, None)
    html = out.read_text()
    figures = {}
    for source, caption in re.findall(
        r'<img src="data:image/svg\+xml;base64,([^"]*)" alt="([^"]*)"', html
    ):
        figures[caption] = base64.b64decode(source).decode()
        ElementTree.fromstring(figures[caption])
    return html, Reader(html), figures


def figure_with(figures: dict[str, str], word: str) -> str:
    """Return the text of the one figure whose caption holds a word, without its drawing."""
    (svg,) = (svg for caption, svg in figures.items() if word in caption)
    texts = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return " ".join("".join(text.itertext()) for text in texts)


def test_a_run_is_shown_in_eight_figures(tmp_path):
    heldout = [heldout_record(20, 7.5), heldout_record(40, 6.5)]
    heldout[1]["remark"] = "step 40: below <the> best"
    metrics = [*(train_record(s, None if s < 20 else 1000.0) for s in range(10, 50, 10)), *heldout]
    html, page, figures = page_of(tmp_path, metrics)
    assert len(figures) == 8
    beside = ["unigram", "unigram by rank", "mean rank", "no repeat", "arithmetic"]
    for word, texts in {
        "training and held out": ["training", "held out", "optimizer step", *beside],
        "needs no learning": ["nats beyond arithmetic", "optimizer step", "this model", *beside],
        "by data set": ["nats beyond arithmetic", "blood", "brain <2>"],
        "first ten guesses": ["top-1", "top-10", "this model", *beside],
        "by rank": ["decile of rank", "this model", *beside],
        "length of the cell": ["96", "2,048", "this model", *beside],
        "Gradient norm": ["gradient norm", "learning rate"],
        "Speed": ["real tokens/s", "data wait"],
    }.items():
        shown = figure_with(figures, word)
        for text in texts:
            assert text in shown, (word, text)
    assert "<li>step 40: below &lt;the&gt; best</li>" in html
    assert page.table("held out") == [
        {"held out": name, "cross-entropy (nats)": loss, "beyond arithmetic": beyond,
         "top-1": top1, "top-10": top10}
        for name, loss, beyond, top1, top10 in [
            ("this model", "6.5000", "+1.0000", "1.23%", "7.89%"),
            ("unigram", "7.1000", "+0.4000", "0.10%", "1.00%"),
            ("unigram by rank", "7.2000", "+0.3000", "0.20%", "2.00%"),
            ("mean rank", "7.3000", "+0.2000", "0.30%", "3.00%"),
            ("no repeat", "7.4000", "+0.1000", "0.40%", "4.00%"),
            ("arithmetic", "7.5000", "+0.0000", "0.50%", "5.00%"),
        ]
    ]  # fmt: skip
    assert "<b>The loss is 1.0000 nats below what counting tells" in html
    assert [list(row.values()) for row in page.table("data set")] == [
        ["blood", "12", "6.2500", "7.5000", "+1.2500"],
        ["brain <2>", "18", "8.2500", "7.5000", "-0.7500"],
    ]
    assert [list(row.values()) for row in page.table("tokens, at most")] == [
        [
            "96",
            "10",
            "0.2345",
            "6.1000",
            "6.2000",
            "6.3000",
            "6.4000",
            "6.5000",
            "23.45%",
            "23.45%",
        ],
        [
            "2,048",
            "20",
            "0.3456",
            "8.1000",
            "8.2000",
            "8.3000",
            "8.4000",
            "8.5000",
            "34.56%",
            "34.56%",
        ],
    ]


def test_share_of_the_peak_is_shown_where_it_is_known(tmp_path):
    known = train_record(20, 1000.0) | {"mfu": 0.345}
    (tmp_path / "gpu").mkdir()
    assert "MFU 34.5 %" in page_of(tmp_path / "gpu", [known])[0]
    assert "MFU" not in page_of(tmp_path, [train_record(20, 1000.0)])[0]


def test_records_of_older_runs_are_readable(tmp_path):
    """Without top-10, buckets, baselines by decile, remarks: what there is, and "-"."""
    old = {k: v for k, v in heldout_record(40, 6.5).items()
           if "top10" not in k and "_by_bucket" not in k and k != "genes"
           and not re.match("baseline_.*_loss_by_|.*by_dataset|.*arithmetic|.*no_repeat", k)
           }  # fmt: skip
    _, page, figures = page_of(tmp_path, [train_record(40, 1000.0), old])
    assert len(figures) == 5
    assert "top-10" not in figure_with(figures, "first guess")
    assert "unigram" not in figure_with(figures, "by rank of the gene")
    assert [row["held out"] for row in page.table("held out")] == [
        "this model", "unigram", "unigram by rank", "mean rank",
    ]  # fmt: skip
    assert [row["top-10"] for row in page.table("held out")] == ["-"] * 4
    assert page.table("held out")[0]["beyond arithmetic"] == "-"
    assert page.table("held out")[0]["top-1"] == "1.23%"


def test_lost_numbers_leave_gaps(tmp_path):
    lost = heldout_record(40, 6.5) | {"loss": None}
    lost["loss_by_bucket"] = dict.fromkeys(LENGTHS)
    lost["loss_by_rank_decile"] = [None] * 10
    lost["beyond_arithmetic"] = None
    lost["beyond_arithmetic_by_dataset"] = {"blood": None, "brain <2>": None}
    _, page, figures = page_of(tmp_path, [train_record(40, None), lost])
    assert page.table("held out")[0]["cross-entropy (nats)"] == "-"
    assert page.table("tokens, at most")[0]["this model, nats"] == "-"
    assert not any("Speed" in caption for caption in figures), "no number, no figure"


def test_a_run_that_has_only_begun(tmp_path):
    html, _, figures = page_of(tmp_path, [train_record(10, 1000.0)])
    assert len(figures) == 3
    assert "held-out cells" not in html


def test_the_page_needs_nothing_else(tmp_path):
    html, page, _ = page_of(tmp_path, [train_record(10, 1000.0), heldout_record(10, 7.0)])
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert not {"script", "link"} & {tag for tag, _ in page.tags}
    assert ("meta", "viewport") in [(tag, attrs.get("name")) for tag, attrs in page.tags]


@pytest.mark.parametrize("largest", [False, True])
def test_long_curves_are_thinned(largest):
    from eval.report.run_figures import _thinned

    steps, values = np.arange(10, 25_010, 10), np.sin(np.arange(2500.0))
    values[[0, 1, 2, 50]] = np.nan
    x, y = _thinned(steps, values, largest)
    assert len(x) == 834
    assert x.tolist() == steps[::3].tolist()
    assert np.isnan(y[0])
    for i in range(1, 834):
        part = values[3 * i : 3 * i + 3]
        assert y[i] == pytest.approx(np.nanmax(part) if largest else np.nanmean(part))
    same, _ = _thinned(steps[:1000], values[:1000], largest)
    assert same.tolist() == steps[:1000].tolist()


def test_scores_are_printed_best_first(capsys):
    from eval.drawing.tables import print_scores

    def row(f1: float) -> dict:
        interval = {"mean": f1, "half_width": 0.01}
        names = ("macro_f1", "balanced_accuracy", "accuracy")
        return dict.fromkeys(names, interval) | {"f1_by_class": {"T": f1}}

    results = {
        "task": "cell_type", "classes": ["T", "B"], "cells": 1200, "split": "donor",
        "seeds": [{"train_cells": 1000, "test_cells": 200}], "dropped": {"no label": 1500},
        "summary": {"worse": row(0.5), "better": row(0.75)},
    }  # fmt: skip
    print_scores(results)
    said = capsys.readouterr().out
    assert "2 classes, 1,200 cells, split donor" in " ".join(said.split())
    assert said.index("better") < said.index("worse")
    assert "0.750 ± 0.010" in said and "left out: 1,500 cells: no label" in said
    assert "-" in next(line for line in said.splitlines() if " B " in line)
