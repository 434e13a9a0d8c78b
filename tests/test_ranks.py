"""The pool of rank processes: reused, and clean, or it says who left what behind."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import time

import pytest

from tests import ranks as pool
from tests.ranks import run_new_ranks, run_ranks


def own_pid() -> int:
    return os.getpid()


def world() -> tuple[int, int]:
    from pretrain.ranks import dist

    here = dist.start(60, 1)
    total = dist.count_over_ranks({"ranks": here.rank})["ranks"]
    dist.leave()
    return here.world_size, total


def leave_environment() -> None:
    os.environ["LEFT_BEHIND"] = "1"


def leave_a_group() -> None:
    from pretrain.ranks import dist

    dist.start(60, 1)


def leave_a_thread() -> None:
    threading.Thread(target=time.sleep, args=(100,), name="sleeper", daemon=True).start()


def leave_a_hook() -> None:
    from torch.nn.modules.module import register_module_forward_hook

    register_module_forward_hook(lambda *_: None)


def leave_random_state() -> None:
    random.random()


def leave_a_setting() -> None:
    import torch

    torch.use_deterministic_algorithms(True)


def leave_another_method() -> None:
    from pretrain.engine import Engine

    Engine.dry_pass = lambda *_: None  # type: ignore[method-assign]


def leave_a_log_handler() -> None:
    logging.getLogger("pretrain").addHandler(logging.NullHandler())


def draw() -> float:
    import torch

    return float(torch.rand(()))


def fail() -> None:
    raise ValueError("as asked")


def fail_and_leave() -> None:
    leave_environment()
    raise ValueError("as asked")


def handler_of_sigterm() -> str:
    before = str(signal.getsignal(signal.SIGTERM))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return before


def test_processes_are_used_again_and_meet_in_a_group_of_their_own():
    first = set(run_ranks(2, own_pid))
    assert run_ranks(2, world) == [(2, 1)] * 2
    assert run_ranks(1, world) == [(1, 0)]
    assert set(run_ranks(2, own_pid)) == first
    assert not set(run_new_ranks(2, own_pid)) & first


def test_a_use_does_not_see_the_random_numbers_and_signals_of_the_one_before():
    assert run_ranks(1, draw) == run_ranks(1, draw)
    assert run_ranks(1, handler_of_sigterm) == run_ranks(1, handler_of_sigterm)


@pytest.mark.parametrize(
    ("leave", "what"),
    [
        (leave_environment, "environment variable LEFT_BEHIND: None -> "),
        (leave_a_group, "process group: False -> True"),
        (leave_a_thread, "threads: .*sleeper"),
        (leave_a_hook, "hooks: "),
        (leave_random_state, "random state of Python"),
        (leave_a_setting, "torch: "),
        (leave_another_method, r"pretrain\.engine\.Engine\.dry_pass was replaced"),
        (leave_a_log_handler, "handlers of loggers: "),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_a_test_leaves_behind_fails_the_next_use_by_its_name(leave, what, monkeypatch):
    # A pool of its own: the shared one goes on clean.
    monkeypatch.setattr(pool, "_pool", own := pool._Pool())
    run_ranks(1, leave)
    name = r"test_ranks\.py::test_what_a_test_leaves\S*"
    with pytest.raises(AssertionError, match=rf"{name}.* left behind in a rank.*{what}"):
        run_ranks(1, own_pid)
    # It is not asked again.
    assert run_ranks(1, world) == [(1, 0)]
    run_ranks(1, leave)
    with pytest.raises(AssertionError, match=f"left behind.*{what}"):
        own.close()
    own.close()


def test_a_failure_is_raised_and_only_a_clean_process_is_used_again():
    first = run_ranks(1, own_pid)
    with pytest.raises(AssertionError, match="(?s)rank 0 failed.*as asked"):
        run_ranks(1, fail)
    assert run_ranks(1, own_pid) == first
    with pytest.raises(AssertionError, match="(?s)rank 0 failed.*as asked"):
        run_ranks(1, fail_and_leave)
    assert run_ranks(1, own_pid) != first
