"""Figures of docs/benchmarks.md are those of the recorded runs under docs/benchmarks/."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from tests.pages import section

pytestmark = pytest.mark.quick

DOCS = Path(__file__).resolve().parent.parent / "docs"
PRETRAINING = section((DOCS / "benchmarks.md").read_text(), "pretraining")


def recorded(name: str) -> dict:
    return json.loads((DOCS / "benchmarks" / f"{name}.json").read_text())


def row(text: str, first: str) -> list[str]:
    """Return the cells of the table's row that begins with `first`, without bold."""
    (line,) = [x for x in text.splitlines() if x.startswith(f"| {first} |")]
    return [c.strip().strip("*") for c in line.strip("|").split("|")][1:]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("published dropout", "published dropout"),
        ("without attention dropout (a changed recipe)", "no attention dropout"),
    ],
)
def test_pretraining_beside_the_reference(precision, words, name):
    found = recorded("pretrain_cpu")[precision]
    ours = found[f"ours, {name}"]
    ratios = found[f"ratio: ours with {name} to the reference with published dropout"]
    said = row(PRETRAINING, f"ours, {precision}, {words}")
    assert said[:2] == [f"{ours['tokens_per_s']:,.0f}", f"{ours['peak_gib']:.1f} GiB"]
    assert said[2:5] == [f"{ratios[k]:.2f}" for k in ("seconds", "processor_s", "user_s")]
    reference = found["reference, published dropout"]
    said = row(PRETRAINING, f"reference, {precision}, published dropout")
    assert said[:2] == [f"{reference['tokens_per_s']:,.0f}", f"{reference['peak_gib']:.1f} GiB"]


def test_zero_by_stage_and_size():
    runs = [recorded(f"zero_cpu{size}")["cases"] for size in ("", "_104m", "_316m")]
    for stage in range(4):
        said = row(PRETRAINING, str(stage))
        for text, cases in zip(said, runs, strict=True):
            case, base = cases[stage], cases[0]["processor_s"]
            seconds, ratio, peak = re.findall(r"([\d.]+) s(?: \(([\d.]+)\))?, ([\d.]+) GiB", text)[
                0
            ]
            assert (case["stage"], case["failed"]) == (stage, 0)
            assert float(seconds) == float(f"{case['processor_s']:.{len(seconds.split('.')[1])}f}")
            assert stage == 0 or ratio == f"{case['processor_s'] / base:.2f}"
            assert peak == f"{case['peak_gib']:.1f}"


def test_what_counting_costs():
    text = section((DOCS / "benchmarks.md").read_text(), "what-counting-costs")
    *runs, by_default, every = recorded("counting")["runs"]
    for name, run in zip(("13 data sets", "the demo", "generated"), runs, strict=True):
        lines = [x for x in text.splitlines() if x.startswith(f"| {name} |")]
        said = [[c.strip().strip("*") for c in x.strip("|").split("|")][1:] for x in lines]
        assert said[0] == [
            f"{run['training_cells']:,}",
            f"{run['by_rank_s']:.1f} s",
            f"{run['arithmetic_s']:.1f} s",
            f"{run['kept_bytes'] / 2**20:.1f} MiB",
            f"{run['peak_gib']:.2f} GiB",
        ]
        if "nats" in run:
            assert said[1][:5] == [f"{loss:.3f}" for loss in run["nats"].values()]
            assert said[1][5] == f"{run['top1']['arithmetic']:.1%}".replace("%", " %")
    assert by_default["generated_cells"] == every["generated_cells"] == 1_000_000
    for run in (by_default, every):
        (line,) = [x for x in text.splitlines() if x.startswith(f"| {run['training_cells']:,}: ")]
        svd = f"{run['svd_s']:.0f}" if run["svd_s"] >= 100 else f"{run['svd_s']:.1f}"
        assert line.endswith(
            f"| {run['by_rank_s']:.1f} s | {run['arithmetic_s']:.1f} s | {svd} s | "
            f"{run['peak_gib']:.2f}, {run['svd_peak_gib']:.2f} GiB |"
        )


def test_a_second_rank():
    one, two = recorded("scaling_cpu")["cases"]
    assert (
        f"{one['wall_s']:.3f} s a step alone, {two['wall_s']:.3f} s with two ranks" in PRETRAINING
    )
    assert f"{two['wall_s'] / one['wall_s']:.2f} in wall time" in PRETRAINING
    assert f"{two['processor_s'] / one['processor_s']:.2f} in processor" in PRETRAINING


def test_muon_beside_adamw():
    found = recorded("muon_cpu")
    for first, said in (
        ("AdamW's step", f"{found['adamw']['step_s']:.2f} s"),
        ("Muon's step, with AdamW for the rest", f"{found['muon']['step_s']:.2f} s"),
        ("Muon's step of a whole step", f"{found['share_of_muon']:.2%}"),
        ("what Muon adds to a whole step", f"{found['added_by_muon']:.2%}"),
    ):
        assert row(PRETRAINING, first) == [said]
    assert found["share_of_muon"] < 0.1, "the aim"


def test_launching():
    text = section((DOCS / "benchmarks.md").read_text(), "launching")
    found = recorded("launch")
    for name, first in (
        ("hosts_checked_s", "hosts checked (login, versions, shared folder)"),
        ("rank_started_s", "first rank's process"),
        ("first_step_s", "first step done"),
    ):
        median = statistics.median(r[name] for r in found["startup_runs"])
        assert row(text, first) == [f"{median:.1f}"]
    shares = found["idle_rank_cpu_share"]
    for share in (found["steady"]["processes_cpu_share"], shares["watched"], shares["unwatched"]):
        assert f"{share:.2%}".replace("%", " %") in text


def test_plan_beside_a_run():
    text = section((DOCS / "benchmarks.md").read_text(), "launching")
    rows = [x.split(" | ")[1:] for x in text.splitlines() if x.endswith("% |")]
    for cells, run in zip(rows, recorded("plan_cpu")["runs"], strict=True):
        expected = [f"{run['memory_gib'][k]:.2f}" for k in ("planned", "given_back", "measured")]
        errors = [run["memory_error_given_back"], run["memory_error"]]
        without, usual = (f"{e:+.0%}".replace("%", " %") for e in errors)
        assert cells == [*expected[:2], without, expected[2], f"{usual} |"]
