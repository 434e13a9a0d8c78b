"""`geneloom saturate`: which sizes are trained, the fitted curve, the words, going on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from launch.cli import build_app
from tests.ranks import run_ranks

# Of `geneloom pretrain`, as `tests.runs.tiny_config`.
TINY = [
    "model.num_layers=2", "model.hidden_size=32", "model.num_heads=2", "model.intermediate_size=64",
    "batch.tokens_per_step=1024", "batch.tokens_per_micro_batch=1024", "optim.warmup_steps=2",
    "run.threads=1", "run.log_every_steps=1", "evaluation.max_cells=12", "evaluation.svd_cells=0",
    "checkpoint.every_steps=1", "data.num_workers=0",
]  # fmt: skip
SHARES = (0.2, 0.4, 0.7, 1.0)


def planned(shards, out, more=(), **options):
    from eval.saturate.settings import SaturateOptions
    from eval.saturate.trainings import plan_trainings

    given = SaturateOptions(shares=SHARES, **options)
    return plan_trainings(shards, out, "tiny", [*TINY, *more], given)


def test_equal_tokens(shards, tmp_path):
    found = planned(shards, tmp_path, ["run.epochs=2"])
    assert [t.name for t in found] == [
        "cells-0.2", "cells-0.4", "cells-0.7", "cells-1", "cells-1-half-tokens",
    ]  # fmt: skip
    whole = found[3]
    assert [t.corpus.cells for t in found] == sorted(t.corpus.cells for t in found)
    for training in found[:4]:
        assert training.tokens == pytest.approx(whole.tokens, rel=0.1)
        assert training.config.data.share == training.share
        assert training.config.run.epochs >= training.epochs
        assert training.config.evaluation.every_steps == training.steps
    assert found[4].steps == pytest.approx(whole.steps / 2, abs=1)
    assert found[4].config.optim.warmup_steps == 1 and whole.config.optim.warmup_steps == 2
    assert found[0].epochs > 4 * whole.epochs


def test_equal_epochs_and_seeds(shards, tmp_path):
    found = planned(shards, tmp_path, ["run.epochs=6"], equal="epochs", seeds=2)
    assert len(found) == 10 and {t.seed for t in found[5:]} == {found[0].seed + 1}
    assert found[9].name == "cells-1-half-tokens-seed-1"
    for training in found[:4]:
        assert training.epochs == pytest.approx(6, rel=0.1)
    assert found[4].epochs == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize(
    ("more", "options", "said"),
    [
        (["data.share=0.5"], {}, "data.share=0.5: each size has its own; leave it out"),
        (["run.out=elsewhere"], {}, "run.out=elsewhere: each size has its own"),
        (["run.max_steps=1"], {}, "1 step for the whole corpus, which cannot be halved"),
        (["run.max_steps=4", "optim.warmup_steps=4"], {}, "the run has only 4 steps"),
        ([], {"gpu": "abacus"}, "--gpu abacus: known are"),
        (["optim.larning_rate=1"], {}, "optim.larning_rate"),
    ],
)
def test_refusals_of_a_plan(more, options, said, shards, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)):
        planned(shards, tmp_path, more, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shares": (0.1, 0.5)}, "--shares 0.1,0.5: must be above 0, and 1, the whole corpus"),
        ({"shares": (0.0, 1.0)}, "--shares 0,1: must be above 0"),
        ({"equal": "hours"}, "--equal hours: must be tokens or epochs"),
        ({"cells": Path("x.h5ad")}, "--cells and --label: one needs the other"),
        ({"launch": "slurm --nodes 2"}, "--launch slurm --nodes 2: must begin with local"),
    ],
)
def test_refusals_of_options(options, said):
    from eval.saturate.settings import SaturateOptions

    with pytest.raises(ValueError, match=re.escape(said)):
        SaturateOptions(**options)


def scored(losses_of, seeds=1, cells=400, half=0.0, noise=0.3, seed_noise=0.0):
    """Return losses whose mean over cells is `losses_of` shares; cells differ, alike for all."""
    from eval.saturate.report.fit import Scored

    rng = np.random.default_rng(1)
    shares = np.array([0.01, 0.03, 0.1, 0.3, 1.0])
    level = rng.normal(0, noise, cells)
    level -= level.mean()
    sizes = losses_of(shares)[None, :, None] + level
    losses = np.repeat(sizes, seeds, axis=0) + rng.normal(0, seed_noise, (seeds, 5, 1))
    small = rng.normal(0, 0.02, losses.shape)
    losses = losses + small - small.mean(axis=2, keepdims=True)
    whole = losses[:, -1] + half
    return Scored(shares, losses, whole, np.full(cells, 10))


@pytest.mark.parametrize("truth", [(3.0, 0.5, 0.3), (2.0, 1.5, 0.05), (4.0, 0.01, 1.0)])
def test_a_planted_curve_is_found(truth):
    from eval.saturate.report.fit import curve, saturation, with_interval

    found = saturation(scored(lambda s: curve(np.array(truth), s)), draws=200)
    gain = with_interval(found.gains("tokens")["ten_times_cells"])
    expected = curve(np.array(truth), 1.0) - curve(np.array(truth), 10.0)
    assert gain["value"] == pytest.approx(expected, rel=0.15)
    assert gain["low"] <= gain["value"] <= gain["high"]
    assert found.losses[0] == pytest.approx(
        curve(np.array(truth), np.array([0.01, 0.03, 0.1, 0.3, 1.0]))
    )


def test_a_rising_curve_promises_nothing():
    from eval.saturate.report.fit import saturation

    found = saturation(scored(lambda s: 3 + 0.1 * s), draws=50)
    assert found.gains("tokens")["ten_times_cells"][0] == 0
    assert found.curves[0, 1] == 0


def test_intervals_cover_seeds_too():
    from eval.saturate.report.fit import saturation, with_interval

    def width(seed_noise):
        some = scored(lambda s: 3 + 0.2 * s**-0.3, seeds=4, seed_noise=seed_noise)
        gain = with_interval(saturation(some, 300).gains("tokens")["ten_times_cells"])
        return gain["high"] - gain["low"]

    assert width(0.05) > 3 * width(0.0)


def test_the_interval_is_that_of_new_cells():
    """Of sizes that differ cell by cell, the mean difference varies as statistics say."""
    from eval.saturate.report.fit import Scored, saturation

    rng = np.random.default_rng(3)
    losses = rng.normal(3, 0.5, (1, 5, 900))
    some = Scored(np.array([0.01, 0.03, 0.1, 0.3, 1.0]), losses, losses[:, -1], np.ones(900))
    drawn = saturation(some, 1000).losses[1:, 4] - saturation(some, 1000).losses[1:, 3]
    expected = np.std(losses[0, 4] - losses[0, 3]) / 30
    assert np.std(drawn) == pytest.approx(expected, rel=0.1)


def record_of(
    twice_tokens: float,
    twice_cells: float,
    ten: float = 0.1,
    equal: str = "tokens",
    beyond: float | None = 0.3,
    epochs: float = 4.0,
    width: float = 0.02,
) -> dict[str, Any]:
    def around(value):
        return {"value": value, "low": value - width, "high": value + width}

    size = {"share": 1.0, "tokens_part": 1.0, "cells": 1000, "loss": 3.0, "epochs": epochs,
            "beyond_arithmetic": beyond}  # fmt: skip
    return {
        "equal": equal,
        "seeds": 1,
        "sizes": [size | {"share": 0.1, "cells": 100, "loss": 3.5, "epochs": 10 * epochs}, size],
        "fit": {"residual": 0.05},
        "gains": {
            "ten_times_cells": around(ten), "ten_times_cells_line": around(1.5 * ten),
            "twice_cells": around(twice_cells),
            "twice_tokens": around(twice_tokens),
            "tokens_above_cells": around(twice_tokens - twice_cells),
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (record_of(0.2, 0.01), "Tokens are the limit, not cells: train longer"),
        (record_of(0.01, 0.2), "Cells are the limit, not tokens: more cells first."),
        (record_of(0.1, 0.1), "Whether cells or tokens are the limit is not told apart here."),
        (record_of(0.1, 0.0, equal="epochs", epochs=1.0), "no cell was seen twice"),
        (record_of(0.2, 0.1), "10 times as many cells (10,000) and the same tokens would bring "
         "0.100 nats (0.080 to 0.120) by the fitted curve, 0.150 nats (0.130 to 0.170) by a "
         "straight line on log cells: a loss of 2.850 to 2.900 instead of 3.000."),
        (record_of(0.2, 0.1, ten=0.03), "The curve misses the sizes by 0.050 nats, more than it"),
        (record_of(0.2, 0.1, equal="epochs"), "10 times as many cells (10,000) and as many epochs"),
        (record_of(0.2, 0.1, ten=0.01), "would bring nothing that can be told from zero"),
        (record_of(0.2, 0.1, beyond=-0.5), "0.500 nats above what counting tells"),
        (record_of(0.2, 0.1, beyond=None), "the vocabulary has no medians"),
        (record_of(0.2, 0.1), "From 100 to 1,000 cells the held-out loss went from 3.500 to 3.000"),
        (record_of(0.2, 0.1), "not on the seed of a training"),
    ],
)  # fmt: skip
def test_words(record, said):
    from eval.saturate.report.words import words

    assert any(said in sentence for sentence in words(record)), words(record)


def test_twice_the_cells_with_equal_epochs():
    """What doubling both brings, without what the tokens bring."""
    from eval.saturate.report.fit import curve, saturation

    truth = np.array([3.0, 0.4, 0.5])
    found = saturation(scored(lambda s: curve(truth, s), half=0.05), draws=10)
    # The line through 0.1, 0.3 and 1.
    slope = -np.polyfit(np.log10([0.1, 0.3, 1.0]), curve(truth, np.array([0.1, 0.3, 1.0])), 1)[0]
    both = slope * np.log10(2)
    gains = {k: v[0] for k, v in found.gains("epochs").items()}
    assert gains["ten_times_cells_line"] == pytest.approx(slope)
    assert gains["twice_tokens"] == pytest.approx(0.05)
    assert gains["twice_cells"] == pytest.approx(both - 0.05)
    assert gains["tokens_above_cells"] == pytest.approx(0.1 - both)


def wait_until(happened, seconds):
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.05)


def command(shards, out, *more):
    return [
        sys.executable, "-c", "from launch.cli import main; main()", "saturate", str(shards),
        "--out", str(out), "--config", "tiny", *TINY, "run.max_steps=6", "--shares",
        ",".join(map(str, SHARES)), *more,
    ]  # fmt: skip


def test_show_prints_and_writes_nothing(shards, tmp_path):
    out = tmp_path / "out"
    words = command(shards, out, "--show")
    done = CliRunner().invoke(build_app("saturate"), words[words.index("saturate") :])
    assert done.exit_code == 0, done.output
    assert "cells-0.2" in done.stdout and "minutes in all" in done.stdout
    assert not out.exists()


@pytest.mark.long
@pytest.mark.parametrize("launch", ["", "local --ranks 2 --device cpu"])
def test_killed_and_gone_on_with(launch, shards, tmp_path):
    """Killed in its second training, it goes on; what is done stays; other settings are refused."""
    out, more = tmp_path / "out", ["--launch", launch] if launch else []
    first = subprocess.Popen(command(shards, out, *more), start_new_session=True)
    seen = out / "runs" / "cells-0.2" / "heldout_cells.parquet"
    wait_until(lambda: (out / "runs" / "cells-0.4").is_dir(), 300)
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait(300) == 75
    before = seen.stat().st_mtime_ns
    wrong = subprocess.run(
        command(shards, out, "optim.learning_rate=0.5", *more), capture_output=True, text=True
    )
    assert wrong.returncode == 2 and "optim.learning_rate" in wrong.stderr
    subprocess.run(command(shards, out, *more), check=True, capture_output=True)
    assert seen.stat().st_mtime_ns == before
    record = json.loads((out / "results.json").read_text())
    assert [s["share"] for s in record["sizes"]] == [*SHARES, 1.0]
    assert not (out / ".owner.json").exists()


def train_all(trainings):
    """Train in this process of a rank, without a start for each."""
    from pretrain.ranks import dist
    from pretrain.train import train

    for training in trainings:
        train(training.config)
    dist.leave()


@pytest.fixture(scope="module")
def measured(shards, tmp_path_factory):
    """A measurement of four sizes of fake cells, three steps each; all but one are trained before.

    That one was killed after its first checkpoint.
    """
    from eval.saturate.run import saturate
    from eval.saturate.settings import SaturateOptions

    out = tmp_path_factory.mktemp("saturate") / "out"
    trainings = planned(shards, out, ["run.max_steps=3"])
    run_ranks(1, train_all, trainings)
    killed = out / "runs" / "cells-0.4"
    (killed / "heldout_cells.parquet").unlink()
    shutil.rmtree(sorted((killed / "checkpoints").glob("step-*"))[-1])
    said: list[str] = []
    options = SaturateOptions(shares=SHARES)
    record = saturate(shards, out, "tiny", [*TINY, "run.max_steps=3"], options, say=said.append)
    return out, record, said


def test_measured(measured, shards):
    from pretrain.measure.metrics import read_metrics

    out, record, said = measured
    (line,) = said
    assert line.startswith("cells-0.4: ")
    assert re.search(r" [1-9] of \d steps done", (out / "logs" / "cells-0.4.log").read_text())
    assert record == json.loads((out / "results.json").read_text())
    for size, name in zip(
        record["sizes"], ["0.2", "0.4", "0.7", "1", "1-half-tokens"], strict=True
    ):
        (last,) = [
            m for m in read_metrics(out / "runs" / f"cells-{name}") if m["kind"] == "heldout"
        ]
        assert size["loss"] == last["loss"] and size["probe"] is None
        assert size["beyond_own_arithmetic"] == last["beyond_arithmetic"]
        if name.startswith("1"):
            assert size["beyond_arithmetic"] == pytest.approx(last["beyond_arithmetic"])
    assert record["gains"].keys() == {
        "ten_times_cells", "ten_times_cells_line", "twice_cells", "twice_tokens",
        "tokens_above_cells",
    }  # fmt: skip


def test_done_is_not_done_again_and_sizes_are_added(measured, shards):
    from eval.saturate.run import saturate
    from eval.saturate.settings import SaturateOptions

    out, record, _ = measured
    said: list[str] = []
    overrides = [*TINY, "run.max_steps=3"]
    again = saturate(
        shards, out, "tiny", overrides, SaturateOptions(shares=SHARES), say=said.append
    )
    assert again == record and not said


def test_other_settings_are_refused(measured, shards):
    from eval.saturate.run import saturate
    from eval.saturate.settings import SaturateOptions

    out, _, _ = measured
    for overrides, options, said in [
        (["run.max_steps=3", "optim.learning_rate=0.1"], {}, "optim.learning_rate: "),
        (["run.max_steps=30"], {}, "tokens of the whole corpus: "),
        (["run.max_steps=3"], {"equal": "epochs"}, "--equal: 'tokens' -> 'epochs'"),
    ]:
        with pytest.raises(ValueError, match=re.escape(said)):
            saturate(
                shards, out, "tiny", [*TINY, *overrides], SaturateOptions(shares=SHARES, **options)
            )


def test_page_and_report(measured, tmp_path):
    from data_prep.running.stages import stage_of
    from eval.report.any_folder import write_stage_report
    from launch.runs import look_at

    out, record, _ = measured
    page = (out / "saturation.html").read_text()
    for sentence in record["words"]:
        assert sentence.replace("'", "&#39;") in page
    assert "http" not in re.sub(r"data:image/svg\+xml;base64,\S+", "", page)
    assert stage_of(out)[0] == "saturate"
    again = Path(write_stage_report(out, tmp_path / "again.html")).read_text()
    image = r"data:image/svg\+xml;base64,\S+"  # its ids differ
    assert re.sub(image, "", again) == re.sub(image, "", page)
    run = look_at(out, 1e12)
    assert run is not None and (run.kind, run.state, run.step) == ("saturate", "finished", 5)


def test_a_training_that_fails_says_why(tmp_path):
    from eval.train_run import train_run

    with pytest.raises(OSError, match=r"exit code 2, its log .*nothing: no such file"):
        train_run(("--config", "nothing"), "", tmp_path / "log")
