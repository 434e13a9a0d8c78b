"""The command ``geneloom doctor``: checks whether hosts can train together, and their speed."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep.errors import EXIT_FAILED
from data_prep.options import spread
from launch.attempts.rank_logs import root_cause
from launch.attempts.supervise import Attempt, Way
from launch.hosts.checks import (
    USED_GPU_GIB,
    ask_facts,
    ask_here,
    find_problems,
    find_warnings,
)
from launch.hosts.host_choice import HostChoice
from launch.hosts.node import gpus
from launch.ways.hostfile import Ssh
from launch.ways.local import HERE, Local, base_environment, require_device

_SLOW = 2.0
_TABLE_WIDTH = 150
_SPEED_S = 180.0


@spread
def doctor_command(
    hostfile: Annotated[
        Path | None, typer.Option(help="lines like `node1 slots=8`; default: this machine")
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="where the run folders will be, or any folder on that disk")
    ] = Path(),
    device: Annotated[str, typer.Option(help="auto, cpu or gpu")] = "auto",
    mib: Annotated[int, typer.Option(min=0, help="of the all-reduce; 0: none")] = 64,
    choice: HostChoice = HostChoice(),
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Check hosts before a run: login, versions, GPUs, clock, shared folder, disk, limits, speed.

    Exit code 0: all hosts can be used; 1: some cannot, or they do not get through an all-reduce.
    """
    require_device(device, here=hostfile is None)
    slots = choice.read(hostfile) if hostfile else {HERE: _slots_here(device)}
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
    """Return the measurements of an all-reduce over the ranks of all hosts, or its ``problem``."""
    folder = Path(tempfile.mkdtemp(prefix=".geneloom-", dir=shared))
    try:
        found = folder / "speed.json"
        arguments = [str(found), str(mib)]
        attempt = Attempt(
            way, "pretrain.ranks.all_reduce_speed", arguments, hosts, folder / "attempt", device,
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
    """Return sentences about hosts that compute slowly and about slow links between hosts.

    Slow means less than half the median speed. If two links of a host are slow, the host is named
    instead of the links.
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
    """Print a table of the hosts, advice for each problem and warning, and the speed."""
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
            free = sum(g["used"] < USED_GPU_GIB for g in fact["gpus"])
            row += [
                fact["python"],
                *(fact["versions"][p] or "-" for p in ("torch", "deepspeed", "nccl")),
                fact["code"], f"{free} of {len(fact['gpus'])} free", str(fact["cores"]),
                f"{fact['load']:.1f}", f"{fact['memory_gib']:.0f} GiB",
                f"{fact['disk_gib']:.0f} GiB", fact["interface"] or "-", f"{fact['skew_s']:.1f} s",
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
