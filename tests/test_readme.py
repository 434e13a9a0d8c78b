"""The README's commands, run as written, in a folder that looks like a user's."""

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


def commands(title: str) -> list[str]:
    """Return the code blocks of a section of the README."""
    body = section((ROOT / "README.md").read_text(), slug(title))
    return re.findall(r"```\n(.*?)```", body, flags=re.S)


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    """Cells with the columns that the README names, and dictionaries in Geneformer's form."""
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
    sections = (
        "Your own cells", "A large corpus", "Several ranks, stopping, resuming",
        "Going on from published weights",
    )  # fmt: skip
    blocks = [block for section in sections for block in commands(section)]
    assert len(blocks) == 4
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    for block in blocks:
        done = subprocess.run(
            ["bash", "-e", "-c", block], cwd=user_folder, env=environment,
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    for made in ("shards/manifest.json", "corpus/manifest.json", "corpus.html",
                 "model/model.safetensors", "embedded.h5ad", "scores/results.json",
                 "runs/two/checkpoints/step-00000280", "runs/more/init.json"):  # fmt: skip
        assert (user_folder / made).exists(), made


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
    (block,) = commands("Did pretraining help?")
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-e", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    shown = {"genes", "cells", "integration", "annotation", "context", "attention"}
    assert {t["kind"] for t in results["tasks"]} >= shown
    assert not results["skipped"]
    assert (tmp_path / "report" / "report.html").exists()


def test_figures_stand_in_the_page_that_tells_how_they_were_got():
    rows = [r for r in (ROOT / "README.md").read_text().splitlines() if "[command](docs/" in r]
    assert len(rows) > 5
    for row in rows:
        _, what, here, beside, link, _ = row.split("|")
        page, anchor = re.findall(r"\]\((docs/\w+\.md)#([\w-]+)\)", link)[0]
        recorded = section((ROOT / page).read_text(), anchor)
        for figure in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", f"{here} {beside}"):
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", recorded), (what, figure)


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
