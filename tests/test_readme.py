"""Commands of the README and of pages beside it, run as written, in a user's folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.genes.vocabulary import Vocabulary
from pretrain.settings.model_settings import ModelConfig
from tests.pages import section, slug
from tests.synthetic import make_cells

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def commands(page: str, title: str) -> str:
    """Return the block of commands (the one that names no language) of a section of a page."""
    body = section((ROOT / page).read_text(), slug(title))
    (block,) = re.findall(r"^```\n(.*?)^```", body, flags=re.M | re.S)
    return block


def run_as_written(block: str, folder: Path) -> str:
    """Run a block of commands in a folder and return what they printed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", block], cwd=folder, env=environment,
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    """Cells with the columns that the pages name, and dictionaries in Geneformer's form."""
    (tmp_path / "cells").mkdir()
    for name, seed in (("some", 0), ("others", 1)):
        cells = make_cells(240, seed=seed)
        cells.obs["donor_id"] = cells.obs["donor"]
        cells.write_h5ad(tmp_path / "cells" / f"{name}.h5ad")
    dictionaries = tmp_path / "geneformer_dictionaries"
    dictionaries.mkdir()
    genes = list(make_cells(3).var_names)
    tokens = {"<pad>": 0, "<mask>": 1} | {g: i + 2 for i, g in enumerate(genes)}
    (dictionaries / "token_dictionary.json").write_text(json.dumps(tokens))
    medians = {g: 1.0 + i % 7 for i, g in enumerate(genes)}
    (dictionaries / "gene_median_dictionary.json").write_text(json.dumps(medians))
    (tmp_path / "corpus.yaml").write_text(
        "defaults: {columns: {donor: donor_id}}\n"
        "sources:\n  - {path: cells/some.h5ad, dataset: ours}\n  - {path: cells/o*.h5ad}\n"
    )
    return tmp_path


@pytest.mark.long  # a dozen commands, each with its imports; in process: test_eval.py
def test_commands_run_as_written(user_folder):
    if not (BIN / "geneloom").exists():
        pytest.skip(f"the console command is not installed beside {sys.executable}")
    for page, title in (
        ("docs/guide.md", "With your own cells"),
        ("docs/data.md", "A large corpus"),
        ("docs/checkpoints.md", "Several ranks, stopping, resuming"),
        ("docs/from_geneformer.md", "Going on from published weights"),
    ):
        run_as_written(commands(page, title), user_folder)
    for made in ("shards/manifest.json", "corpus/manifest.json", "corpus.html",
                 "model/model.safetensors", "embedded.h5ad", "scores/results.json",
                 "runs/two/checkpoints/step-00000280", "runs/more/init.json"):  # fmt: skip
        assert (user_folder / made).exists(), made


@pytest.mark.long  # a training of the demo's size, and a probe of 700 cells
def test_five_commands_print_what_the_readme_says(tmp_path):
    """What no processor changes is compared: counts, sizes, shapes; not losses or times."""
    if not (BIN / "geneloom").exists():
        pytest.skip(f"the console command is not installed beside {sys.executable}")
    printed = run_as_written(commands("README.md", "Five commands"), tmp_path)
    text = section((ROOT / "README.md").read_text(), "five-commands")
    (said,) = re.findall(r"^```text\n(.*?)^```", text, flags=re.M | re.S)
    varies = re.compile(r"\d\d:|\$|│|.*±")  # with the clock, the processor, the width of a console
    exact = [line for line in said.splitlines() if not varies.match(line)]
    assert len(exact) == 5
    for line in exact:
        assert line in " ".join(printed.split()), line
    (loss,) = re.findall(r"held-out loss ([\d.]+)", said)
    (measured, *_) = re.findall(r"step 264/264  held-out loss ([\d.]+)", printed)
    assert float(measured) == pytest.approx(float(loss), abs=0.02)


@pytest.mark.slow  # all tasks of the quick suite
def test_the_quick_suite_runs_as_written(tmp_path):
    """On a model like the demo's, with the symbols of the package's cells as vocabulary."""
    from eval.cells.demo_cells import recover_counts
    from pretrain.model.masked_gene_model import build_model

    genes = tuple(recover_counts().var_names)
    vocabulary = Vocabulary(genes, np.ones(len(genes)), {"<pad>": 0, "<mask>": 1}, 512)
    config = ModelConfig(num_layers=2, hidden_size=32, num_heads=2, intermediate_size=32)
    build_model(config, vocabulary, 0).bert.save_pretrained(tmp_path / "demo_out" / "model")
    vocabulary.save(tmp_path / "demo_out" / "model" / "vocabulary.json")
    run_as_written(commands("docs/evaluation.md", "The quick suite"), tmp_path)
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    shown = {"genes", "cells", "integration", "annotation", "context", "attention"}
    assert {t["kind"] for t in results["tasks"]} >= shown
    assert not results["skipped"]
    assert (tmp_path / "report" / "report.html").exists()


@pytest.mark.parametrize(("page", "num_rows"), [("README.md", 5), ("docs/benchmarks.md", 10)])
def test_figures_stand_in_the_page_that_tells_how_they_were_got(page: str, num_rows: int):
    rows = [r for r in (ROOT / page).read_text().splitlines() if "| [command](" in r]
    assert len(rows) == num_rows
    for row in rows:
        _, what, here, beside, link, _ = row.split("|")
        name, anchor = re.findall(r"\]\(([\w/]+\.md)?#([\w-]+)\)", link)[0]
        source = (ROOT / page).parent / name if name else ROOT / page
        recorded = section(source.read_text(), anchor)
        for figure in re.findall(r"(?:\d+(?:,\d{3})*)?\.\d+|\d+(?:,\d{3})*", f"{here} {beside}"):
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", recorded), (what, figure)


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_links_lead_somewhere():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert (ROOT / target).exists(), f"{document.name}: {target}"


def test_tests_named_in_the_readme_exist():
    for document in ("README.md", "CONTRIBUTING.md", "docs/reliability.md"):
        for name in re.findall(r"`(test_\w+\.py)`", (ROOT / document).read_text()):
            assert (ROOT / "tests" / name).exists(), f"{document}: {name}"


def test_tests_named_in_the_promises_exist():
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(test_\w+)\.py`(?:: |, )`(test_\w+)`", text)
    assert len(named) > 20
    for module, function in named:
        code = (ROOT / "tests" / f"{module}.py").read_text()
        assert f"def {function}(" in code, f"{module}.{function}"
