"""How long the other ranks are waited for after one has failed: by what is known."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from launch.attempts import grace
from launch.attempts.grace import Grace

_HOSTS = {"one": 2, "two": 1}
_SILENT = "rank 2 gave no sign of life for 20.0 s"


def write_end(attempt: Path, rank: int, code: int, said: str = "") -> None:
    log = f"# rank {rank}\n" + (
        f"rank {rank} ends: {said}. The last complete checkpoint\n" * bool(said)
    )
    (attempt / f"rank_{rank:05d}.log").write_text(log)
    end = {"rank": rank, "host": "one", "code": code, "from": 0.0, "to": float(rank)}
    (attempt / f"rank_{rank:05d}.json").write_text(json.dumps(end))


def begun(attempt: Path, lost: list[str], ago_s: float = 0) -> Grace:
    """Return a grace that began some time ago, and has heard which hosts are lost."""
    asked = threading.Event()

    def ask(hosts: dict[str, int]) -> list[str]:
        asked.set()
        return lost

    found = Grace(attempt, _HOSTS, ask)
    found.begin()
    assert asked.wait(10)
    until = time.monotonic() + 10
    while lost and not found.known_lost() and time.monotonic() < until:
        time.sleep(0.01)
    found.end()
    found._failed_at -= ago_s
    return found


def test_nothing_is_waited_for_that_nobody_can_say(tmp_path):
    """A rank that has ended, one on a host that does not answer, one that was missed by another."""
    assert begun(tmp_path, []).unaccounted() == {0, 1, 2}
    assert begun(tmp_path, ["two"]).unaccounted() == {0, 1}
    write_end(tmp_path, 1, 1, _SILENT)
    waiting = begun(tmp_path, [])
    assert waiting.unaccounted() == {0} and not waiting.is_over()
    write_end(tmp_path, 0, 1, _SILENT)
    assert waiting.unaccounted() == set() and waiting.is_over()


def test_rank_0_is_known_by_its_store(tmp_path):
    said = "rank 0 (which all ranks talk through), or what started it gave no sign of life for 20 s"
    for rank in (1, 2):
        write_end(tmp_path, rank, 1, said)
    assert begun(tmp_path, []).is_over()


@pytest.mark.parametrize(
    ("code", "said", "limit_s"),
    [
        (1, "rank 1 failed: OSError: no room", grace.KNOWN_S),
        (-9, "", grace.KNOWN_S),
        (1, "", grace.UNKNOWN_S),
        # The others save a checkpoint too, or were asked to.
        (75, "", grace.UNKNOWN_S),
        (-15, "", grace.UNKNOWN_S),
    ],
)
def test_what_is_known_shortens_the_wait(code, said, limit_s, tmp_path):
    write_end(tmp_path, 1, code, said)
    assert not begun(tmp_path, [], limit_s - 5).is_over()
    assert begun(tmp_path, [], limit_s + 5).is_over()


def test_a_host_that_is_lost_later_is_found_too(tmp_path, monkeypatch):
    monkeypatch.setattr(grace, "_ASK_AGAIN_S", 0.01)
    answers = iter([[], [], ["one"]])
    found = Grace(tmp_path, _HOSTS, lambda _: next(answers, ["one", "two"]))
    found.begin()
    until = time.monotonic() + 10
    while not found.is_over() and time.monotonic() < until:
        time.sleep(0.01)
    found.end()
    assert found.is_over() and found.known_lost() == {"one", "two"}
