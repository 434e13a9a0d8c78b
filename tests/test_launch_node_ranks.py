"""The ranks of a node that `launch hostfile` starts over ssh, beside DeepSpeed's own launcher."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_OURS = [sys.executable, "-m", "launch.attempts.node_ranks"]
_THEIRS = [sys.executable, "-m", "deepspeed.launcher.launch"]
_SAYS = """
import json, os, sys
path = f"{sys.argv[1]}/{os.environ['RANK']}"
with open(path, "w") as file:
    json.dump([sys.argv[2:], dict(os.environ)], file)
"""
_ENDS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(f"{sys.argv[1]}/{os.environ['RANK']}", "w").close()
time.sleep(float(os.environ["RANK"]) * 600)
sys.exit(3)
"""


def environment(tmp_path: Path, code: str) -> dict[str, str]:
    (tmp_path / "said.py").write_text(code)
    path = os.pathsep.join([str(_ROOT), str(tmp_path)])
    return os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "7", "DS_ACCELERATOR": "cpu"}


def said(command: list[str], folder: Path, env: dict[str, str]) -> dict[str, list]:
    folder.mkdir()
    subprocess.run([*command, "said", str(folder), "a b", "--x"], env=env, check=True)
    return {p.name: json.loads(p.read_text()) for p in folder.iterdir()}


def test_ranks_get_what_deepspeeds_launcher_gives_them(tmp_path):
    env = environment(tmp_path, _SAYS)
    world = base64.urlsafe_b64encode(json.dumps({"a": [0, 1, 2], "b": [0, 1]}).encode()).decode()
    theirs = said(
        [*_THEIRS, f"--world_info={world}", "--node_rank=1", "--master_addr=10.0.0.7",
         "--master_port=4711", "--no_local_rank", "--log_level=error", "--module"],
        tmp_path / "theirs", env,
    )  # fmt: skip
    ours = said([*_OURS, "1", "3,2", "10.0.0.7", "4711"], tmp_path / "ours", env)
    assert sorted(ours) == ["3", "4"]
    for rank, (words, variables) in theirs.items():
        # The import of DeepSpeed sets it, in its launcher as in each rank, and perhaps here.
        for given in (variables, ours[rank][1]):
            given.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
        assert ours[rank] == [words, variables]


def test_the_first_failure_stops_the_others_and_is_the_code(tmp_path):
    done = subprocess.run(
        [*_OURS, "0", "2", "a", "1", "said", str(tmp_path)], env=environment(tmp_path, _ENDS),
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 3


def test_ranks_are_asked_to_stop_when_it_is(tmp_path):
    # The first of these ranks is number 1, which waits.
    words = [*_OURS, "1", "1,1", "a", "1", "said", str(tmp_path)]
    process = subprocess.Popen(words, env=environment(tmp_path, _ENDS))
    until = time.monotonic() + 60
    while not (tmp_path / "1").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
