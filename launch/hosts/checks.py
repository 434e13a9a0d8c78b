"""Checks hosts before a run: collects facts about them, and finds problems and warnings.

`ask_facts` (or `ask_here` for this machine) collects the facts, `find_problems` finds what makes a
run impossible, and `find_warnings` what may go wrong later.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launch.hosts.ask_hosts import Answer, ask_all, names_on_network
from launch.hosts.node import PACKAGES, facts

USED_GPU_GIB = 1.0
_SKEW_S = 5.0
_FEW_OPEN_FILES = 4096
_LITTLE_DISK_GIB = 1.0
_LITTLE_SHM_GIB = 0.5


def ask_facts(hosts: Sequence[str], out: Path) -> dict[str, Answer]:
    """Return the facts about all hosts that a run depends on (`launch.hosts.node.facts`).

    `out` is a folder that all hosts must share; it may not exist yet.
    """
    with _shared_token(out) as (folder, token):
        names = names_on_network(hosts)
        asked = time.time()
        answers = ask_all(hosts, "facts", str(folder), token, *names.values())
        for host, answer in answers.items():
            if answer.problem is None:
                # The host read its clock at some time between the question and the answer.
                answer.content["skew_s"] = max(
                    asked - answer.content["time"], answer.content["time"] - time.time(), 0.0
                )
                known = answer.content["addresses"]
                answer.content["addresses"] = {host: known[name] for host, name in names.items()}
                seen = folder / f"seen-by-{answer.content['hostname']}"
                if not answer.content["shared"]["problem"] and not seen.exists():
                    answer.content["shared"]["problem"] = f"what {host} wrote is not seen here"
        return answers


def ask_here(out: Path) -> Answer:
    """Return the same facts about this machine alone."""
    with _shared_token(out) as (folder, token):
        return Answer(facts(folder, token, []) | {"skew_s": 0.0}, None)


@contextlib.contextmanager
def _shared_token(out: Path) -> Iterator[tuple[Path, str]]:
    """Yield a new folder and the content of its file ``token``.

    The folder is made in `out`, or in the nearest parent of it that exists.
    """
    existing = next(p for p in (out, *out.parents) if p.is_dir())
    folder = Path(tempfile.mkdtemp(prefix=".geneloom-", dir=existing))
    try:
        token = uuid.uuid4().hex
        (folder / "token").write_text(token)
        yield folder, token
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_problems(
    answers: dict[str, Answer], slots: dict[str, int], device: str
) -> dict[str, list[str]]:
    """Return for each host the problems that make a run there impossible, with advice.

    Hosts without problems are left out. The right version of a package is the one that most hosts
    have.
    """
    found: dict[str, list[str]] = {h: [a.problem] for h, a in answers.items() if a.problem}
    facts = {h: a.content for h, a in answers.items() if not a.problem}
    usual = {
        "python": _most([f["python"] for f in facts.values()]),
        "code": _most([f["code"] for f in facts.values()]),
        **{p: _most([f["versions"][p] for f in facts.values()]) for p in (*PACKAGES, "nccl")},
    }
    with_gpus = Counter(bool(f["gpus"]) for f in facts.values()).most_common(1)
    on_gpu = device == "gpu" or (device == "auto" and bool(with_gpus) and with_gpus[0][0])
    for host, fact in facts.items():
        texts = []
        for name in ("python", *PACKAGES, "nccl"):
            own = fact["python"] if name == "python" else fact["versions"][name]
            if own != usual[name]:
                texts.append(
                    f"{name} {own or 'is missing'}, the others have {usual[name]}; install the "
                    "same lock on all hosts"
                )
        if fact["code"] != usual["code"]:
            texts.append(
                f"another version of this package ({fact['code']}, commit {fact['commit']}; the "
                f"others have {usual['code']}); check out the same commit"
            )
        if fact["shared"]["problem"]:
            texts.append(
                f"the run folder {fact['shared']['problem']}; put run.out or --out on a file "
                "system that all hosts mount at the same path"
            )
        if on_gpu and len(fact["gpus"]) < slots[host]:
            texts.append(
                f"{slots[host]} slots, but {len(fact['gpus'])} GPUs are seen; correct the "
                "hostfile, or look at `nvidia-smi` there"
            )
        if fact["skew_s"] > _SKEW_S:
            texts.append(f"its clock is {fact['skew_s']:.0f} s off; start chrony or ntpd there")
        unknown = [h for h in facts if fact["addresses"].get(h, "") is None]
        texts += [f"does not know {h}; add it to /etc/hosts" for h in unknown]
        if texts:
            found[host] = texts
    return found


def find_warnings(answers: dict[str, Answer], on_gpu: bool) -> dict[str, list[str]]:
    """Return for each host the warnings about what may go wrong later."""
    found: dict[str, list[str]] = {}
    interfaces = Counter(a.content["interface"] for a in answers.values() if not a.problem)
    for host, answer in answers.items():
        if answer.problem:
            continue
        fact, texts = answer.content, []
        if fact["open_files"] < _FEW_OPEN_FILES:
            texts.append(f"{fact['open_files']} open files allowed; `ulimit -n 65536`")
        if on_gpu and fact["locked_memory"] not in (-1, 2**64 - 1):
            texts.append("locked memory is limited: InfiniBand needs `ulimit -l unlimited`")
        if fact["disk_gib"] < _LITTLE_DISK_GIB:
            texts.append(f"{fact['disk_gib']:.1f} GiB left on the run folder's disk")
        if fact["shm_gib"] < _LITTLE_SHM_GIB:
            texts.append(f"{fact['shm_gib']:.1f} GiB in /dev/shm; NCCL and loaders use it")
        busy = [g for g in fact["gpus"] if g["used"] > USED_GPU_GIB]
        if busy:
            texts.append(f"{len(busy)} GPUs are in use ({busy[0]['used']:.0f} GiB); `nvidia-smi`")
        if fact["interface"] is None and len(answers) > 1:
            texts.append("no interface but loopback leads to the others; set NCCL_SOCKET_IFNAME")
        elif len(answers) > 1 and fact["interface"] != interfaces.most_common(1)[0][0]:
            texts.append(f"talks through {fact['interface']}, most others through another")
        if texts:
            found[host] = texts
    return found


def _most(values: list[Any]) -> Any:
    return Counter(values).most_common(1)[0][0] if values else None
