"""``geneloom doctor``, and what ``launch hostfile`` refuses, on real hosts broken in turn."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.doctor import slow_places
from launch.hosts import ask_hosts
from launch.hosts.ask_hosts import Answer
from launch.hosts.checks import ask_here, find_problems, find_warnings
from launch.hosts.node import main
from tests.hosts import Host, hosts, why_no_hosts
from tests.ranks import run_ranks
from tests.test_cli import geneloom_forked
from tests.test_launch_hosts import environment, launch, small, write_hostfile

_ROOT = Path(__file__).resolve().parent.parent
_WHY_NOT = why_no_hosts()
needs_hosts = pytest.mark.skipif(_WHY_NOT is not None, reason=f"several hosts: {_WHY_NOT}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("doctor")


@pytest.fixture(scope="module")
def three(folder) -> Iterator[list[Host]]:
    with hosts(3, folder) as made:
        yield made


def doctor(host: Host, hostfile: Path, shared: Path, *more: str) -> subprocess.CompletedProcess:
    code = "from launch.cli import main; main()"
    words = ["doctor", "--hostfile", str(hostfile), "--folder", str(shared), *more]
    return host.run([sys.executable, "-c", code, *words], timeout=200, env=environment())


@pytest.mark.long
@needs_hosts
def test_healthy_hosts_and_a_slow_one(three, tmp_path):
    hostfile = write_hostfile(tmp_path, "ds1", "ds2", "ds3")
    done = doctor(three[0], hostfile, tmp_path, "--json", "--mib", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["problems"] == {}
    assert [report["hosts"][h]["interface"] for h in report["hosts"]] == ["eth0"] * 3
    assert report["speed"]["ranks"] == 3
    limit = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "100mbit"]
    made = three[2].run([*limit, "burst", "64kb", "latency", "50ms"])
    if made.returncode:
        pytest.skip(f"links cannot be slowed here: {made.stderr}")
    try:
        done = doctor(three[0], hostfile, tmp_path, "--mib", "8")
    finally:
        three[2].run(["tc", "qdisc", "del", "dev", "eth0", "root"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "slow: ds3 to ds1: 0.01 GiB/s" in done.stdout
    assert list(tmp_path.iterdir()) == [hostfile]


@pytest.mark.long
@needs_hosts
def test_broken_hosts_are_named_with_what_to_do(three, tmp_path, shards):
    """Another version, no shared folder, an unknown host; then the key: doctor and launch."""
    changed = tmp_path / "optim.py"
    changed.write_text((_ROOT / "pretrain" / "optim.py").read_text() + "\n# another version\n")
    shared = tmp_path / "shared"
    shared.mkdir()
    hostfile = write_hostfile(tmp_path, "ds1", "ds2", "ds3", "ds9")
    mine = _ROOT / "pretrain" / "optim.py"
    try:
        three[1].run(["mount", "--bind", str(changed), str(mine)], check=True)
        three[2].run(["mount", "-t", "tmpfs", "tmpfs", str(shared)], check=True)
        done = doctor(three[0], hostfile, shared, "--mib", "0")
        refused = launch(
            three[0], small(shards, shared / "run"), "hostfile", "--hostfile", str(hostfile)
        )
    finally:
        three[1].run(["umount", str(mine)])
        three[2].run(["umount", str(shared)])
    assert done.returncode == 1
    assert refused.returncode == 2
    assert "3 of 4 hosts cannot be used" in refused.stderr
    for said in (done.stdout, refused.stderr):
        assert "ds2: another version of this package" in said
        assert "check out the same commit" in said
        assert "ds3: the run folder is another folder here: it is not shared" in said.replace(
            "does not exist", "is another folder here: it is not shared"
        )
        assert "ds9: not reachable: unknown host; correct the hostfile" in said
    assert list(shared.iterdir()) == [shared / "run.yaml"]
    keys = tmp_path / "authorized_keys"
    keys.write_text("")
    hostfile = write_hostfile(tmp_path, "ds1", "ds2")
    try:
        three[1].run(["mount", "--bind", str(keys), "/root/.ssh/authorized_keys"], check=True)
        refused = launch(
            three[0], small(shards, shared / "run"), "hostfile", "--hostfile", str(hostfile)
        )
    finally:
        three[1].run(["umount", "/root/.ssh/authorized_keys"])
    assert refused.returncode == 2
    assert "ds2: not reachable: no login without a password; `ssh-copy-id ds2`" in refused.stderr


@pytest.mark.long
@needs_hosts
def test_more_slots_than_gpus_and_a_port_in_use(three, tmp_path, shards):
    hostfile = write_hostfile(tmp_path, "ds1", "ds2", slots=8)
    config = small(shards, tmp_path / "run")
    refused = launch(three[0], config, "hostfile", "--device", "gpu", "--hostfile", str(hostfile))
    assert refused.returncode == 2
    assert "ds2: 8 slots, but 0 GPUs are seen; correct the hostfile" in refused.stderr
    busy = "import socket,time; s=socket.socket(); s.bind(('', 23456)); s.listen(); time.sleep(99)"
    process = three[0].start([sys.executable, "-c", busy], tmp_path / "busy")
    try:
        refused = launch(
            three[0], config, "hostfile", "--device", "cpu", "--port", "23456", "--hostfile",
            str(hostfile),
        )  # fmt: skip
    finally:
        process.kill()
    assert refused.returncode == 2
    assert "--port 23456 on ds1: [Errno 98] Address already in use" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_what_makes_a_run_impossible_and_what_may_go_wrong(tmp_path):
    """This machine's own facts, and the same with one thing changed."""
    mine = ask_here(tmp_path)
    names = ["a", "b", "c"]
    fact = mine.content | {"addresses": dict.fromkeys(names, "10.0.0.1"), "interface": "eth0"}
    good = {name: Answer(fact, None) for name in names}
    slots = dict.fromkeys(names, 1)
    assert find_problems(good, slots, "cpu") == {}
    versions = fact["versions"] | {"torch": "1.0"}
    cases = {
        "torch 1.0, the others have": {"versions": versions},
        "python 3.0, the others have": {"python": "3.0"},
        "its clock is 60 s off": {"skew_s": 60.0},
        "does not know a; add it": {"addresses": {"a": None, "b": "10.0.0.2", "c": "10.0.0.3"}},
    }
    for text, change in cases.items():
        found = find_problems(good | {"b": Answer(fact | change, None)}, slots, "cpu")
        assert list(found) == ["b"], text
        assert text in found["b"][0]
    later = {
        "1024 open files allowed": {"open_files": 1024},
        "0.5 GiB left on the run folder's disk": {"disk_gib": 0.5},
        "talks through eth1": {"interface": "eth1"},
        "1 GPUs are in use (20 GiB)": {"gpus": [{"name": "x", "gib": 80.0, "used": 20.0}]},
    }
    for text, change in later.items():
        other = good | {"b": replace(good["b"], content=fact | {"open_files": 65536} | change)}
        assert any(text in t for t in find_warnings(other, True)["b"]), text


def test_the_report_of_the_doctor_names_hosts_problems_and_speed(tmp_path, capsys):
    from launch.doctor import print_report

    mine = ask_here(tmp_path).content
    speed = {"mib": 8, "ranks": 2, "device": "cpu", "seconds": 0.02, "bus_gib_s": 0.5}
    report = {
        "hosts": {"a": mine, "b": {"problem": "no answer"}},
        "problems": {"b": ["no answer; is it on?"]},
        "warnings": {"a": ["1024 open files allowed"]},
        "speed": speed | {"problem": None, "slow": ["a computes 3.0 times as long [median]"]},
    }
    print_report(report, {"a": 1, "b": 2})
    said = capsys.readouterr().out
    for text in (
        mine["python"], mine["code"], "b: no answer; is it on?", "a: 1024 open files allowed",
        "all-reduce of 8 MiB over 2 ranks (cpu): 20.0 ms, bus 0.50 GiB/s",
        "slow: a computes 3.0 times as long [median]",
    ):  # fmt: skip
        assert text in said, text
    print_report(report | {"speed": {"problem": "the all-reduce failed: x"}}, {"a": 1, "b": 2})
    assert "the all-reduce failed: x" in capsys.readouterr().out


def test_an_all_reduce_is_measured_on_every_rank():
    first, second = run_ranks(2, measured_here)
    assert first["ranks"] == 2 and first["seconds"] > 0
    assert len(first["link_gib_s"]) == len(first["matmul_s"]) == 2
    assert first["bus_gib_s"] == first["algorithm_gib_s"]  # 2 (N - 1) / N of two ranks
    assert first["matmul_s"] == second["matmul_s"]


def measured_here() -> dict:
    from pretrain.ranks import dist
    from pretrain.ranks.all_reduce_speed import measure

    found = measure(dist.start(60, threads=1), 1)
    dist.leave()
    return found


def test_what_ssh_says_becomes_advice():
    for complaint, advice in (
        ("ssh: Could not resolve hostname a: Name or service not known", "correct the hostfile"),
        ("root@a: Permission denied (publickey).", "`ssh-copy-id a`"),
        ("ssh: connect to host a port 22: Connection refused", "start sshd"),
        ("ssh: connect to host a port 22: Connection timed out", "is it on"),
        ("something new", "try `ssh` by hand"),
    ):
        answer = ask_hosts._read("a", 255, "", f"a line before\n{complaint}\n")
        assert answer.content is None and advice in (answer.problem or ""), complaint
        assert complaint in (answer.problem or "")
    assert ask_hosts._read("a", 0, 'a banner\n{"port": 7}\n', "") == Answer({"port": 7}, None)
    broken = ask_hosts._read("a", 1, "", "No module named launch\n")
    assert "No module named launch" in (broken.problem or "")


def test_a_slow_place_is_named_once():
    hosts_of_two = {"a": 2, "b": 2, "c": 2, "d": 2}
    speed = {"matmul_s": [1.0] * 8, "link_gib_s": [9, 1, 9, 1, 9, 1, 9, 1]}
    assert slow_places(speed, hosts_of_two) == []
    speed["link_gib_s"] = [9, 0.1, 9, 0.1, 9, 1, 9, 1]
    assert slow_places(speed, hosts_of_two) == ["b: all its links are slow, 0.55 GiB/s is usual"]
    speed["link_gib_s"] = [9, 1, 9, 0.1, 9, 1, 9, 1]
    assert slow_places(speed, hosts_of_two) == ["b to c: 0.10 GiB/s, 1.00 is usual"]
    speed = {"matmul_s": [1.0] * 5 + [3.0, 1.0, 1.0], "link_gib_s": [1.0] * 8}
    assert slow_places(speed, hosts_of_two) == ["c computes 3.0 times as long as the median"]


def test_doctor_of_this_machine_alone(tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    done = geneloom_forked("doctor", "--device", "cpu", "--folder", here, "--mib", "1", cwd=here)
    assert done.returncode == 0, done.stderr
    assert "all-reduce of 1 MiB over 1 ranks (cpu)" in done.stderr
    assert list(here.iterdir()) == []


def test_a_host_answers_one_question_at_a_time(tmp_path, capsys):
    """What ssh runs on every host: facts, a free port, signals to the processes of a launch."""

    def answer(*words: object) -> Any:
        main([str(word) for word in words])
        return json.loads(capsys.readouterr().out)

    (tmp_path / "token").write_text("mine")
    assert answer("facts", tmp_path, "mine", "localhost")["shared"]["problem"] is None
    assert "not shared" in answer("facts", tmp_path, "another")["shared"]["problem"]
    absent = answer("facts", tmp_path / "absent", "mine")
    assert (absent["disk_gib"], absent["shared"]["problem"]) == (0, "does not exist")
    port = answer("port", 0)["port"]
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        assert "in use" in answer("port", port)["problem"]
    assert answer("signal", "no-such-launch", signal.SIGTERM, "ranks") == 0
    assert answer("process", 2**22, 0.0, signal.SIGTERM) == 0, "there is no such process"
