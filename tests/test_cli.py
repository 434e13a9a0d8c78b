"""What a user sees: one message, exit code 2, nothing half-written."""

import contextlib
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.version import VERSION
from tests.ranks import start_geneloom
from tests.synthetic import make_cells, write_cells

ROOT = Path(__file__).resolve().parent.parent


_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def geneloom(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run a command line in this process, which has imported what it needs."""
    from launch.cli import main

    words = ["geneloom", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    root, code = logging.getLogger(), 0
    handlers, level = root.handlers[:], root.level
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", words)
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # as the command does, but taken back
        for name in _OF_RANKS:  # with them, an error would end this process at once
            patch.delenv(name, raising=False)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
    root.handlers[:] = handlers
    root.setLevel(level)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def geneloom_process(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run a command line in a process of its own."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from launch.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def geneloom_forked(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run a command line in a process that is forked from the ranks' server; all is stderr."""
    log = cwd.with_name(f"{cwd.name}.log")
    ran = start_geneloom([str(a) for a in arguments], log, cwd)
    return subprocess.CompletedProcess(arguments, ran.code(), "", ran.said)


def log_counts(path: Path) -> None:
    cells = make_cells(30)
    cells.X = np.log1p(cells.X.toarray())
    cells.write_h5ad(path)


BUILD = ("--vocab", "build", "--out", "shards")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prepare", "text.h5ad", *BUILD), "text.h5ad: is not an HDF5 file"),
        (("prepare", "log.h5ad", *BUILD), "looks log-transformed"),
        (("prepare", "cells.h5ad", *BUILD, "--gene-column", "nope"), "no column 'nope'"),
        (("prepare", "cells.h5ad", *BUILD[:3], "."), "not an empty folder"),
        (("prepare", "cells.h5ad", "--vocab", "other", "--out", "shards"), "in the vocabulary"),
        (("prepare", "cells.h5ad", "--vocab", "absent.json", "--out", "shards"), "no such file"),
        (("prepare", "*.loom", *BUILD), "matches no file"),
        (("inspect", "."), "no manifest.json"),
        (("pretrain", "--config", "tiny", "run.out=r", "data.shard=x"), "did you mean 'shards'"),
        (("pretrain", "--config", "tiny", "run.out=r", "data.shards=x"), "no manifest.json"),
        (("export", ".", "--out", "model"), "no model_config.json"),
        (("embed", "cells.h5ad", "--model", ".", "--out", "o.h5ad"), "no config.json"),
        (("attention", "cells.h5ad", "--model", ".", "--out", "o"), "no config.json"),
        (("launch", "local", "embed"), "does not run on several ranks"),
    ],
)
def test_bad_input(arguments, message, tmp_path):
    write_cells(tmp_path / "cells.h5ad", num_cells=30)
    (tmp_path / "text.h5ad").write_text("nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "token_dictionary.json").write_text('{"<pad>": 0, "<mask>": 1, "x": 2}')
    (tmp_path / "other" / "gene_median_dictionary.json").write_text('{"x": 1.0}')
    log_counts(tmp_path / "log.h5ad")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    # A run that has begun ends its process at once.
    run = geneloom_forked if arguments[0] == "pretrain" else geneloom
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr + done.stdout
    assert message in done.stderr
    assert done.stderr.count("error") == 1
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_prepare_inspect_dry_run(tmp_path):
    write_cells(tmp_path / "cells.h5ad")
    done = geneloom("prepare", "cells.h5ad", *BUILD, "--heldout", 0.2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = geneloom("inspect", "shards", cwd=tmp_path)
    assert again.returncode == 0
    summary = next(x for x in done.stdout.splitlines() if x.startswith("cells read"))
    assert summary == "cells read 120, kept 120, rejected 0; held out 22"
    assert summary in again.stdout
    plan = geneloom(
        "pretrain", "--config", "tiny", "--dry-run", "data.shards=shards", "run.out=r", cwd=tmp_path
    )
    assert plan.returncode == 0, plan.stderr
    assert "steps per epoch" in plan.stdout
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("run", [geneloom, geneloom_process])
def test_version_and_a_wrong_word(run, tmp_path):
    """In a process of its own, and as the other tests run commands: the same."""
    done = run("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"geneloom {VERSION}\n")
    wrong = run("inspect", ".", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: ") and "no manifest.json" in wrong.stderr


def test_threads_that_wait_do_not_spin():
    """It is said before any library is loaded that reads it; a user's own word stays."""
    code = (
        "import os, sys; from data_prep.errors import run_app\n"
        "run_app(lambda: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules))"
    )
    for own, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        others = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=others | own, capture_output=True, text=True
        )
        assert ran.stdout == f"{expected} False\n", ran.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("geneloom pre", ["prepare", "pretrain", "predict"]),
        ("geneloom prepare --max-sd", ["--max-sd-counts", "--max-sd-mito"]),
        ("geneloom launch lo", ["local"]),
    ],
)
def test_completion_knows_verbs_that_are_imported_late(words, expected, tmp_path, monkeypatch):
    """What a shell asks for: the words so far, and which of them is being written."""
    monkeypatch.setenv("_GENELOOM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['geneloom']\n"
        "from launch.cli import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.split() == expected, done.stderr
