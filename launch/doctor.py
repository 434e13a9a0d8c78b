"""``geneloom doctor``: can these hosts train together, and how fast do they talk?"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep.errors import EXIT_FAILED
from launch.hosts import Answer, ask_all, read_hostfile
from launch.local import HERE, Local, base_environment, require_device
from launch.logs import root_cause
from launch.node import PACKAGES, facts, gpus
from launch.supervise import Attempt, Way

_SKEW_S = 5.0
_FEW_OPEN_FILES = 4096
_LITTLE_DISK_GIB = 1.0
_LITTLE_SHM_GIB = 0.5
_USED_GPU_GIB = 1.0
_SLOW = 2.0
_TABLE_WIDTH = 150
_SPEED_S = 180.0


def ask_facts(hosts: Sequence[str], out: Path) -> dict[str, Answer]:
    """Ask all hosts what a run depends on; `out`: a folder that is to be shared, or will be."""
    with _shared_token(out) as (folder, token):
        asked = time.time()
        answers = ask_all(hosts, "facts", str(folder), token, *hosts)
        for host, answer in answers.items():
            if answer.problem is None:
                # Read somewhere between question and answer.
                answer.content["skew_s"] = max(
                    asked - answer.content["time"], answer.content["time"] - time.time(), 0.0
                )
                seen = folder / f"seen-by-{answer.content['hostname']}"
                if not answer.content["shared"]["problem"] and not seen.exists():
                    answer.content["shared"]["problem"] = f"what {host} wrote is not seen here"
        return answers


def ask_here(out: Path) -> Answer:
    """Return the same about this machine alone."""
    with _shared_token(out) as (folder, token):
        return Answer(facts(folder, token, []) | {"skew_s": 0.0}, None)


@contextlib.contextmanager
def _shared_token(out: Path) -> Iterator[tuple[Path, str]]:
    """Give a new folder in `out`, or in the nearest above it that exists, and what is in it."""
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
    """Return host -> what makes a run there impossible, each with what to do.

    Versions are those that most hosts have.
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
    """Return host -> what may go wrong later."""
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
        busy = [g for g in fact["gpus"] if g["used"] > _USED_GPU_GIB]
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


def doctor_command(
    hostfile: Annotated[
        Path | None, typer.Option(help="lines like `node1 slots=8`; default: this machine")
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="where the run folders will be, or any folder on that disk")
    ] = Path(),
    device: Annotated[str, typer.Option(help="auto, cpu or gpu")] = "auto",
    mib: Annotated[int, typer.Option(min=0, help="of the all-reduce; 0: none")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Check hosts before a run: login, versions, GPUs, clock, shared folder, disk, limits, speed.

    Exit code 0: all hosts can be used; 1: some cannot, or they do not get through an all-reduce.
    """
    from launch.hostfile import Ssh  # it imports this module

    require_device(device, here=hostfile is None)
    slots = read_hostfile(hostfile) if hostfile else {HERE: _slots_here(device)}
    out = folder.absolute()
    if not out.is_dir():
        raise ValueError(f"--folder {folder}: no such folder; give one that all hosts share")
    way = Ssh(slots, out / "doctor", device) if hostfile else Local(slots[HERE])
    answers = ask_facts(list(slots), out) if hostfile else {HERE: ask_here(out)}
    problems = find_problems(answers, slots, device)
    good = {host: n for host, n in slots.items() if host not in problems}
    on_gpu = device != "cpu" and any(a.content["gpus"] for a in answers.values() if a.content)
    warnings = find_warnings(answers, on_gpu)
    speed: dict[str, Any] | None = None
    if good and mib:
        if isinstance(way, Ssh):
            way.know({h: answers[h].content for h in good})
        speed = measure_speed(way, good, out, device, mib)
    report = {
        "hosts": {h: a.content or {"problem": a.problem} for h, a in answers.items()},
        "problems": problems,
        "warnings": warnings,
        "speed": speed,
    }
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        print_report(report, slots)
    failed = bool(problems) or bool(speed and speed.get("problem"))
    raise SystemExit(EXIT_FAILED if failed else 0)


def _slots_here(device: str) -> int:
    return max(1, len(gpus())) if device != "cpu" else 1


def measure_speed(
    way: Way, hosts: dict[str, int], shared: Path, device: str, mib: int
) -> dict[str, Any]:
    """Return what an all-reduce over the ranks of all hosts measured, or ``problem``."""
    folder = Path(tempfile.mkdtemp(prefix=".geneloom-", dir=shared))
    try:
        found = folder / "speed.json"
        arguments = [str(found), str(mib)]
        attempt = Attempt(
            way, "pretrain.allreduce", arguments, hosts, folder / "attempt", device,
            base_environment(device, HERE in hosts), limit_s=_SPEED_S, is_quiet=True,
        )  # fmt: skip
        if attempt.run() == 0 and found.exists():
            speed = json.loads(found.read_text())
            return speed | {"problem": None, "slow": slow_places(speed, hosts)}
        cause, _ = root_cause(attempt.folder, hosts, way.lost(hosts))
        hint = "is a firewall between them? Ports above 1024 must be open; try NCCL_DEBUG=INFO"
        return {"problem": f"the all-reduce failed: {cause}; {hint}"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def slow_places(speed: dict[str, Any], hosts: dict[str, int]) -> list[str]:
    """Return in words which hosts compute slowly, and which links between hosts are slow.

    Slow is below half of the median. A host with two slow links is named, else the link.
    """
    owners = [host for host, ranks in hosts.items() for _ in range(ranks)]
    usual = statistics.median(speed["matmul_s"])
    found = [
        f"{host} computes {worst / usual:.1f} times as long as the median"
        for host in hosts
        if (worst := max(s for o, s in zip(owners, speed["matmul_s"], strict=True) if o == host))
        > _SLOW * usual
    ]
    ring = list(zip(owners, owners[1:] + owners[:1], speed["link_gib_s"], strict=False))
    between = [(a, b, rate) for a, b, rate in ring if a != b]
    if not between:
        return found
    usual = statistics.median(rate for _, _, rate in between)
    slow = [(a, b, rate) for a, b, rate in between if rate * _SLOW < usual]
    ends = Counter(host for a, b, _ in slow for host in (a, b))
    named = {host for host, times in ends.items() if times > 1}
    found += [f"{host}: all its links are slow, {usual:.2f} GiB/s is usual" for host in named]
    found += [
        f"{a} to {b}: {rate:.2f} GiB/s, {usual:.2f} is usual"
        for a, b, rate in slow
        if not {a, b} & named
    ]
    return found


def print_report(report: dict[str, Any], slots: dict[str, int]) -> None:
    """Print one table, what to do for each red and yellow line, and the speed."""
    console = Console()
    console.width = max(console.width, _TABLE_WIDTH)
    table = Table(title="hosts", title_justify="left")
    columns = (
        "host", "slots", "", "python", "torch", "deepspeed", "NCCL", "code", "GPUs", "cores",
        "load", "memory", "disk", "network", "clock",
    )  # fmt: skip
    for name in columns:
        table.add_column(name)
    for host, fact in report["hosts"].items():
        texts, later = report["problems"].get(host, []), report["warnings"].get(host, [])
        state = "[red]no[/red]" if texts else "[yellow]look[/yellow]" if later else "yes"
        row = [host, str(slots[host]), state]
        if "versions" in fact:
            free = sum(g["used"] < _USED_GPU_GIB for g in fact["gpus"])
            row += [
                fact["python"], *(str(fact["versions"][p]) for p in ("torch", "deepspeed", "nccl")),
                fact["code"], f"{free} of {len(fact['gpus'])} free", str(fact["cores"]),
                f"{fact['load']:.1f}", f"{fact['memory_gib']:.0f} GiB",
                f"{fact['disk_gib']:.0f} GiB", str(fact["interface"]), f"{fact['skew_s']:.1f} s",
            ]  # fmt: skip
        table.add_row(*row)
    console.print(table)
    for color, kind in (("red", "problems"), ("yellow", "warnings")):
        for host, texts in report[kind].items():
            for text in texts:
                console.print(f"[{color}]{host}[/{color}]: {escape(text)}", soft_wrap=True)
    speed = report["speed"]
    if not speed:
        return
    if speed["problem"]:
        console.print(f"[red]{escape(speed['problem'])}[/red]", soft_wrap=True)
        return
    console.print(
        f"all-reduce of {speed['mib']} MiB over {speed['ranks']} ranks ({speed['device']}): "
        f"{speed['seconds'] * 1000:.1f} ms, bus {speed['bus_gib_s']:.2f} GiB/s",
        highlight=False,
    )
    for text in speed["slow"]:
        console.print(f"[yellow]slow[/yellow]: {escape(text)}", soft_wrap=True)
