"""What a batch job does when its ranks have ended: ``python -m launch.ways.requeue RUN ATTEMPT
CODE``.

Exit code 0: done. 75: start again. Any other: stop, with the evidence on the console.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from data_prep.errors import EXIT_FAILED, EXIT_RESUMABLE, EXIT_USAGE
from data_prep.files import LAUNCH_FOLDER
from launch.attempts.rank_logs import (
    End,
    ends,
    read_events,
    record_event,
    root_cause,
    tail,
)
from launch.verbs import saved_step

_SHOWN_LINES = 15
_READ_BYTES = 20_000


def requeue_code(
    run: Path, attempt: Path, code: int, job: str, hosts: dict[str, int], restarts: int
) -> tuple[int, str]:
    """Return the exit code of this program, and why. Adds to RUN/launch/events.jsonl.

    Parameters
    ----------
    code
        srun's: often that of a rank which it ended itself, so only used if no rank left one.
    hosts
        Host -> ranks.
    restarts
        How many starts of this job may end without a new checkpoint.
    """
    found = ends(attempt)
    step, number = saved_step(run), int(attempt.name.removeprefix("attempt_"))
    failed = [e for e in found if e.code]
    if code == 0 and not failed:
        return 0, "all ranks are done"
    if failed and all(_was_asked(e) for e in failed):
        record_event(run / LAUNCH_FOLDER, "stopped", attempt=number, job=job, step=step)
        return EXIT_RESUMABLE, f"stopped by a signal{_at(step)}; goes on from what is saved"
    cause, log = root_cause(attempt, hosts, [])
    before = crashes_before(run, job)
    record_event(
        run / LAUNCH_FOLDER, "ended", attempt=number, job=job, code=code, cause=cause, step=step
    )
    evidence = "\n" + last_words(log) if log else ""
    if any(e.code == EXIT_USAGE for e in failed):
        return EXIT_USAGE, f"{cause}: wrong input, which would be wrong again"
    if before and (before[-1]["cause"], before[-1]["step"]) == (cause, step):
        return EXIT_FAILED, (
            f"{cause}: the same end twice{_at(step)}, in attempts {before[-1]['attempt']} and "
            f"{number}; not started again{evidence}"
        )
    fruitless = 1 + sum(e["step"] == step for e in before)
    if fruitless > restarts:
        return EXIT_FAILED, (
            f"{cause}: end {fruitless}{_at(step)}, --restarts {restarts}; not started again"
            f"{evidence}"
        )
    return EXIT_RESUMABLE, f"{cause}: starts again{_at(step)}{evidence}"


def last_words(log: Path) -> str:
    """Return the last lines of a log, framed; its name alone if it does not exist."""
    size = log.stat().st_size if log.exists() else 0
    lines = tail(log, max(0, size - _READ_BYTES))[0].splitlines()
    return "\n".join([f"--- {log}", *lines[-_SHOWN_LINES:], "---"])


def _was_asked(end: End) -> bool:
    """Did a rank end because it was asked to? Verbs with nothing to save end by the signal."""
    return end.code in (EXIT_RESUMABLE, -signal.SIGUSR1)


def _at(step: int) -> str:
    return "" if step < 0 else f" at checkpoint {step}"


def crashes_before(run: Path, job: str) -> list[dict[str, Any]]:
    """Return what is recorded of a job's earlier crashes, oldest first."""
    events = read_events(run / LAUNCH_FOLDER)
    return [e for e in events if e["event"] == "ended" and e.get("job") == job]


def main(words: list[str]) -> int:
    """Say how a start ended, and return what to do."""
    parser = argparse.ArgumentParser(prog="python -m launch.ways.requeue")
    parser.add_argument("run", type=Path)
    parser.add_argument("attempt", type=Path)
    parser.add_argument("code", type=int)
    parser.add_argument("--job", required=True)
    parser.add_argument("--hosts", required=True, help="names, separated by commas")
    parser.add_argument("--ranks-per-host", type=int, required=True)
    parser.add_argument("--restarts", type=int, required=True)
    given = parser.parse_args(words)
    hosts = {host: given.ranks_per_host for host in given.hosts.split(",")}
    verdict, why = requeue_code(
        given.run, given.attempt, given.code, given.job, hosts, given.restarts
    )
    print(f"launch: {why}", flush=True)
    return verdict


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
