"""The report of a screen: its numbers are those of the tables, and it needs no network."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from eval.perturb.effects.columns import (
    AGREEMENT_COLUMNS,
    COMBINATION_COLUMNS,
    GENE_COLUMNS,
    GENE_SET_COLUMNS,
)
from launch.cli import build_app
from tests.perturb_results import names, noise, write_screen
from tests.test_data_prep_page import Reader

DOCUMENT = Path(__file__).parent.parent / "docs" / "perturbation_statistics.md"
PLANTED = list(range(15, 200, 40))
PAIRS = [["G0001", "G0002"], ["G0003", "G0004"]]


def planted_screen(folder: Path, kind: str, sign: int):
    values, donors = noise(np.random.default_rng(abs(sign - 3)), 200, 6, 6, donor_sd=0.2)
    values[:, PLANTED] += 8 * sign
    pairs = values[:, [1, 3]] + values[:, [2, 4]] + np.array([5.0, 0.0])
    genes = names(200) + PAIRS
    genes[15] = ["<b>$x$&"]  # a name is text, whatever it holds
    return write_screen(folder, np.hstack([values, pairs]), donors, genes, kind=kind)


# Six figures, each as SVG and PNG, take two seconds: drawn once for all tests.
@pytest.fixture(scope="module")
def written(tmp_path_factory):
    from eval.perturb.effects.analysis import AnalysisSettings, analyse
    from eval.perturb.report.page import write_perturb_report

    folder = tmp_path_factory.mktemp("screens")
    screen = planted_screen(folder / "delete", "delete", 1)
    other = planted_screen(folder / "over", "overexpress", -1)
    sets = {"planted": [f"G{i:04d}" for i in PLANTED] + ["G0055x"]}
    sets["any"] = [g[0] for g in names(190)[2::20]]
    sets["small"] = ["G0001"]
    analysis = analyse(screen, AnalysisSettings(num_matched=30), other, sets)
    path = write_perturb_report(screen, analysis, folder / "report")
    assert path == folder / "report" / "report.html"
    return analysis, folder, path.read_text()


def test_tables_hold_all_columns_with_their_meaning(written):
    analysis, folder, _ = written
    tables = {
        "genes": (analysis.genes, GENE_COLUMNS | AGREEMENT_COLUMNS),
        "combinations": (analysis.combinations, COMBINATION_COLUMNS),
        "gene_sets": (analysis.gene_sets, GENE_SET_COLUMNS),
    }
    for name, (table, columns) in tables.items():
        path = folder / "report" / f"{name}.parquet"
        schema = pq.read_schema(path)
        assert schema.names == list(columns)
        for field in schema:
            assert field.metadata[b"description"].decode() == columns[field.name]
        pd.testing.assert_frame_equal(
            pd.read_parquet(path).drop(columns="genes"), table.drop(columns="genes"),
            check_dtype=False,
        )  # fmt: skip
        csv = pd.read_csv(path.with_suffix(".csv"))
        assert csv.columns.tolist() == list(columns) and len(csv) == len(table)
    csv = pd.read_csv(folder / "report" / "combinations.csv")
    assert set(csv["genes"]) == {";".join(pair) for pair in PAIRS}


def test_every_column_is_documented():
    text = DOCUMENT.read_text()
    for columns in (GENE_COLUMNS, AGREEMENT_COLUMNS, COMBINATION_COLUMNS, GENE_SET_COLUMNS):
        missing = [name for name in columns if f"`{name}`" not in text]
        assert not missing, f"docs/perturbation_statistics.md says nothing of {missing}"


def test_the_pages_numbers_are_the_tables(written):
    from eval.perturb.effects.analysis import FOUND
    from eval.perturb.report.page import format_number, format_p

    analysis, _, html = written
    found = analysis.genes[analysis.genes["verdict"] == FOUND]
    assert len(found) >= len(PLANTED)
    rows = Reader(html).table("gene")
    assert [r["gene"] for r in rows] == found["name"].tolist()
    for row, truth in zip(rows, found.itertuples(), strict=True):
        interval = f"{format_number(truth.matched_low)} to {format_number(truth.matched_high)}"
        assert row["minus matched genes"] == format_number(truth.matched_effect) + interval
        assert row["FDR"] == format_p(truth.matched_fdr)
        assert row["size"] == format_number(truth.matched_size)
        assert row["donors"] == str(truth.donors)
        assert row["agrees"] == ("yes" if truth.agrees else "no")
    rows = Reader(html).table("combination")
    assert [r["combination"] for r in rows] == analysis.combinations["name"].tolist()
    assert rows[0]["combination"] == "g0001+g0002" and rows[0]["synergy"].startswith("+5.0")
    assert f"{len(found)} of 200 genes found at a false discovery rate of 5 %" in html
    sets = {r["set"]: r for r in Reader(html).table("set")}
    assert sets["small"]["AUROC"] == "-" and sets["planted"]["not in the screen"] == "2"


def test_a_set_of_planted_genes_stands_out_and_any_set_does_not(written):
    rows = written[0].gene_sets.set_index("name")
    assert rows.loc["any", "auroc"] == pytest.approx(0.5, abs=0.2)
    assert rows.loc["any", "fdr"] > 0.05
    assert np.isnan(rows.loc["small", "p"])


def test_the_page_needs_nothing_else_and_shows_names_as_text(written):
    _, folder, html = written
    tags = Reader(html).tags
    assert not [t for t, _ in tags if t in ("script", "link", "iframe", "base")]
    for tag, attributes in tags:
        for name in ("src", "href"):
            if name in attributes:
                assert attributes[name].startswith(("data:", "#")), (tag, attributes[name][:80])
    assert "&lt;b&gt;$x$&amp;" in html and "<b>$x$" not in html
    assert not re.search(r"url\(|@import", html)
    figures = {p.stem for p in (folder / "report" / "plots").glob("*.svg")}
    assert figures == {"volcano", "rank", "by_rank", "heatmap", "agreement", "combinations"}
    for name in figures:
        ElementTree.parse(folder / "report" / "plots" / f"{name}.svg")
        with Image.open(folder / "report" / "plots" / f"{name}.png") as image:
            assert min(image.size) > 400
    anchors = [a["href"][1:] for t, a in tags if t == "a"]
    assert set(anchors) <= set(Reader(html).ids)


def test_without_donors_the_page_warns_and_calls_nothing_found(tmp_path):
    from eval.perturb.effects.analysis import AnalysisSettings, analyse
    from eval.perturb.report.page import format_number, write_perturb_report

    values, _ = noise(np.random.default_rng(5), 60, 1, 12, 0.0)
    results = write_screen(
        tmp_path / "s", np.abs(values), [""] * 12, names(60), column="shift", kind="activate"
    )
    analysis = analyse(results, AnalysisSettings())
    html = write_perturb_report(results, analysis, tmp_path / "out").read_text()
    assert "The screen has no donors" in html and "Nothing was tested" in html
    assert "In silico activation: shift of the cell" in html
    first = analysis.genes.iloc[0]
    row = Reader(html).table("other gene")[0]
    assert row["other gene"] == first["name"]
    assert row["effect"].startswith(format_number(first["effect"]))
    assert "FDR" not in row
    assert not (tmp_path / "out" / "combinations.csv").exists()
    assert not (tmp_path / "out" / "plots" / "volcano.png").exists()


def test_few_genes_and_groups_alone_have_a_page(tmp_path):
    from eval.perturb.effects.analysis import AnalysisSettings, analyse
    from eval.perturb.report.page import write_perturb_report

    values, donors = noise(np.random.default_rng(6), 3, 4, 5, 0.1)
    results = write_screen(tmp_path / "s", values, donors, [["A"], ["B"], ["C", "D"]])
    html = write_perturb_report(
        results, analyse(results, AnalysisSettings()), tmp_path / "out"
    ).read_text()
    assert "too few to match" in html and "No synergy" in html
    assert [r["group"] for r in Reader(html).table("group")] == ["c+d"]


def test_gene_sets_are_read_and_damaged_ones_refused(tmp_path):
    from eval.perturb.effects.gene_sets import read_gene_sets

    (tmp_path / "a.gmt").write_text("one\tabout\tA\tB\ntwo\t\tC\n")
    (tmp_path / "mine.txt").write_text("A\nB extra\n\n")
    assert read_gene_sets(tmp_path / "a.gmt") == {"one": ["A", "B"], "two": ["C"]}
    assert read_gene_sets(tmp_path / "mine.txt") == {"mine": ["A", "B"]}
    for name, text, message in (
        ("short.gmt", "one\tabout\n", "set 1: expected name, description and genes"),
        ("twice.gmt", "one\tx\tA\none\tx\tB\n", "two sets have one name"),
        ("empty.txt", "\n", "holds no genes"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_gene_sets(tmp_path / name)
    with pytest.raises(ValueError, match="not readable"):
        read_gene_sets(tmp_path / "absent.gmt")


def test_the_command_writes_the_report_and_names_mistakes(tmp_path):
    values, donors = noise(np.random.default_rng(7), 60, 5, 5, 0.1)
    write_screen(tmp_path / "s", values, donors, names(60))

    app = build_app("perturb-report")
    arguments = ["perturb-report", str(tmp_path / "s"), "--out"]
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "out"), "--test", "wilcoxon"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "report.html").exists()
    assert "0 of 60 tested genes found" in done.stdout
    wrong = [*arguments, str(tmp_path / "bad"), "--effect", "toward_mars"]
    error = CliRunner().invoke(app, wrong).exception
    assert isinstance(error, ValueError) and "must be one of toward_goal" in str(error)
    assert not (tmp_path / "bad").exists()
