"""The script for a GPU runs from end to end where there is none, and goes on where it stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRAININGS = [
    f"training {model}, {how}, as written"
    for model in ("geneformer_v1_6l", "geneloom_10m")
    for how in ("packed", "rows")
]


def require_complete(found: dict) -> None:
    """Every part is there, what can be known of it without a GPU is right."""
    parts = found["parts"]
    assert set(parts) == {
        "correctness", "logits", "embed and perturb", "run geneformer_v1_6l",
        "time to the published loss", *TRAININGS,
    }  # fmt: skip
    for model in ("geneformer_v1_6l", "geneloom_10m"):
        away = parts["correctness"][model]["largest_relative_difference"]
        assert away["fp32"] == 0  # the CPU beside itself
        assert 0 < away["bf16 packed"] < 1e-3
        assert parts["logits"][model]["largest_difference"] == 0
    for name in TRAININGS:
        row = parts[name]
        assert row["real_tokens_per_s"] > 0
        assert row["planned_gib"] > 0
        assert (row["padding"] == 0) == ("packed" in name)
    same = [parts[name]["loss"] for name in TRAININGS]
    assert same[0] == pytest.approx(same[1], rel=1e-2)
    assert same[2] == pytest.approx(same[3], rel=1e-2)
    assert parts["embed and perturb"]["6l"]["embedded_cells_per_s"] > 0


def test_smoke(tmp_path, capsys, monkeypatch):
    from benchmarks.gpu import main

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    out = tmp_path / "gpu.json"
    # Without DeepSpeed's step and runs, which the long test has.
    words = ["--smoke", "--no-deepspeed", "--out", str(out)]
    main([*words, "--budget-s", "0"])
    assert "the same command goes on with 'correctness'" in capsys.readouterr().out
    main(words)
    found = json.loads(out.read_text())
    require_complete(found)
    assert "skipped" in found["parts"]["run geneformer_v1_6l"]
    said = capsys.readouterr().out
    assert said.count("| `gene") == len(TRAININGS)
    del found["parts"]["logits"]
    out.write_text(json.dumps(found))
    main(words)
    again = json.loads(out.read_text())
    assert list(again["parts"])[-1] == "logits"
    assert {k: v for k, v in again["parts"].items() if k != "logits"} == found["parts"]
    out.write_text(json.dumps(found | {"device": "NVIDIA H200"}))
    with pytest.raises(SystemExit, match="was measured on NVIDIA H200"):
        main(words)


@pytest.mark.long
def test_smoke_with_deepspeed(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads(out.read_text())
    require_complete(found)
    row = found["parts"]["run geneformer_v1_6l"]
    assert row["tokens_per_s"] > 0 <= row["data_wait"] < 1
    assert row["checkpoint_blocked_s"] > 0
