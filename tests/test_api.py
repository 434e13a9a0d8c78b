"""The Python API: the same settings as the commands, the same results, and little to import."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.api import (
    MediansOptions,
    PrepareOptions,
    SourceOptions,
    check,
    medians,
    prepare,
    verify,
)
from tests.synthetic import write_cells
from tests.test_cli import geneloom
from tests.test_docs import MARKED

ROOT = Path(__file__).resolve().parent.parent
APIS = ("data_prep.api", "pretrain.api", "eval.api")
PAGE = (ROOT / "docs" / "python.md").read_text()


def test_shards_are_those_of_the_command(tmp_path):
    write_cells(tmp_path / "cells.h5ad")
    done = geneloom(
        "prepare", "cells.h5ad", "--vocab", "build", "--out", "a", "--heldout", 0.2, "--obs",
        "donor", "--min-cells", 1, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    options = PrepareOptions(heldout_share=0.2, vocabulary_min_cells=1)
    reading = SourceOptions(columns=("donor",))
    shards = prepare(tmp_path / "cells.h5ad", tmp_path / "b", options=options, reading=reading)
    one, other = (
        {p.name: p.read_bytes() for p in (tmp_path / f).iterdir() if p.is_file()} for f in "ab"
    )
    assert one == other and "manifest.json" in one
    assert shards.num_cells == sum(b["cells"] for b in shards.manifest["buckets"])
    assert not check([tmp_path / "cells.h5ad"], shards.vocabulary, options, reading).problems
    assert verify(tmp_path / "b") == []


def test_the_manifest_records_the_dataclasses(tmp_path):
    """All fields but how the work was cut and where a table lies."""
    write_cells(tmp_path / "cells.h5ad")
    options = PrepareOptions(seed=4, heldout_share=0.3, heldout_by="donor", memory_gib=1.0)
    reading = SourceOptions(columns=("donor",), force_counts=True)
    shards = prepare(tmp_path / "cells.h5ad", tmp_path / "s", options=options, reading=reading)
    settings = dict(shards.manifest["settings"])
    assert settings.pop("annotation_sha256") is None
    assert PrepareOptions(**settings, memory_gib=1.0) == options
    read = shards.manifest["sources"][0]["options"]
    assert SourceOptions(**read | {"columns": tuple(read["columns"])}) == reading


def test_medians_and_a_wrong_vocabulary(tmp_path):
    write_cells(tmp_path / "cells.h5ad")
    found = medians(tmp_path / "cells.h5ad", tmp_path / "v.json", MediansOptions(max_length=64))
    assert found.max_length == 64 and (tmp_path / "v.genes.tsv").exists()
    with pytest.raises(ValueError, match="exists; give --out a new name"):
        medians(tmp_path / "cells.h5ad", tmp_path / "v.json")
    with pytest.raises(ValueError, match="no such file"):
        prepare(tmp_path / "cells.h5ad", tmp_path / "s", tmp_path / "absent.json")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("module", APIS)
def test_functions_have_examples_and_frozen_defaults(module):
    api = importlib.import_module(module)
    assert sorted(api.__all__) == list(api.__all__)
    own = [f for f in map(api.__dict__.get, api.__all__) if inspect.isfunction(f)]
    for function in [f for f in own if f.__module__ == module]:
        assert ">>> " in (function.__doc__ or ""), f"{module}.{function.__name__} has no example"
        for parameter in inspect.signature(function).parameters.values():
            if dataclasses.is_dataclass(parameter.default):
                assert type(parameter.default).__dataclass_params__.frozen  # pyright: ignore
                assert parameter.default == type(parameter.default)(), parameter


@pytest.mark.parametrize("module", APIS)
def test_an_import_is_light(module):
    code = (
        f"import sys, {module}; print(*{{'torch', 'deepspeed', 'transformers'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_the_page_names_what_there_is():
    """The short form of `test_the_page_runs`: every name that a block imports, every function."""
    for module, name in re.findall(r"`((?:data_prep|pretrain|eval)\.api)\.(\w+)`", PAGE):
        assert name in importlib.import_module(module).__all__, f"{module}.{name}"
    blocks = [block for _, block in MARKED.findall(PAGE)]
    assert len(blocks) >= 6
    for node in ast.walk(ast.parse("\n".join(blocks))):
        if isinstance(node, ast.ImportFrom) and node.module in APIS:
            known = importlib.import_module(node.module).__all__
            assert all(alias.name in known for alias in node.names), ast.unparse(node)


@pytest.mark.long
def test_the_page_runs(tmp_path):
    """All blocks of the page as one program, as a notebook would run them."""
    code = "\n".join(block for _, block in MARKED.findall(PAGE))
    outside = ("RANK", "WORLD_SIZE", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if k not in outside}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "60 steps, held-out loss" in done.stdout and "(600, " in done.stdout
