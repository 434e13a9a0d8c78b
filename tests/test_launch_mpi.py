"""``geneloom launch mpi``: real ranks under mpirun; hostfiles; the variables of other launchers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.hosts.ask_hosts import SSH_ARGUMENTS, names_on_network, read_hostfile, ssh
from launch.hosts.host_choice import HostChoice, chosen_hosts
from launch.ways.mpi import mpi_command
from tests.ranks import commands, end_commands, run_command, start_functions

ROOT = Path(__file__).resolve().parent.parent
GENELOOM = [sys.executable, "-c", "from launch.cli import main; main()"]
SMALL = [
    "pretrain", "--config", "tiny", "run.epochs=1", "run.max_steps=4", "run.log_every_steps=1",
    "optim.warmup_steps=2", "checkpoint.every_steps=4", "evaluation.every_steps=4",
    "model.hidden_dropout=0", "model.attention_dropout=0",
]  # fmt: skip


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in rows if r["kind"] == "train"]


def alone(shards: Path, out: Path) -> list[float]:
    """Return the losses of the run of one rank."""
    settings = [f"data.shards={shards}", f"run.out={out}"]
    with commands([[*SMALL[1:], *settings]], out.parent / "logs") as (rank,):
        assert rank.code() == 0, rank.said
    return losses(out)


def rank_of_mpirun(words: list[str]) -> None:
    """Be a rank that knows who it is from the variables that Open MPI sets."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        theirs = {"RANK": "RANK", "WORLD_SIZE": "SIZE", "LOCAL_RANK": "LOCAL_RANK"}[name]
        os.environ[f"OMPI_COMM_WORLD_{theirs}"] = os.environ.pop(name)
    run_command(words)


def test_ranks_with_the_variables_of_open_mpi_are_one_run(shards, tmp_path):
    settings = [*SMALL[1:], f"data.shards={shards}", f"run.out={tmp_path / 'two'}"]
    ranks = start_functions(rank_of_mpirun, [[settings]] * 2, tmp_path / "logs")
    try:
        assert [rank.code() for rank in ranks] == [0, 0], ranks[0].said
    finally:
        end_commands(ranks)
    two = losses(tmp_path / "two")
    assert len(two) == 4
    assert two == pytest.approx(alone(shards, tmp_path / "one"), rel=1e-5)


@pytest.mark.long
def test_two_ranks_under_mpirun_are_one_run(shards, tmp_path):
    out = tmp_path / "two"
    done = subprocess.run(
        [*GENELOOM, "launch", "mpi", "--ranks", "2", "--device", "cpu", *SMALL,
         f"data.shards={shards}", f"run.out={out}"],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(out) == pytest.approx(alone(shards, tmp_path / "one"), rel=1e-5)
    record = json.loads((out / "env.json").read_text())
    assert "launch mpi --ranks 2" in record["command"]


@pytest.mark.long
def test_request_to_stop_reaches_the_ranks(shards, tmp_path):
    """SIGTERM to the launcher: a checkpoint, exit code 75, no process left behind."""
    out = tmp_path / "run"
    settings = [s for s in SMALL if not s.startswith(("run.epochs", "run.max_steps"))]
    process = subprocess.Popen(
        [*GENELOOM, "launch", "mpi", "--ranks", "2", "--device", "cpu", *settings,
         "run.epochs=500", f"data.shards={shards}", f"run.out={out}"],
        cwd=ROOT,
    )  # fmt: skip
    until = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert list((out / "checkpoints").glob("step*"))
    assert not psutil.wait_procs(below, timeout=10)[1]


def test_hostfile_is_read(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# the cluster\nnode1 slots=8\n\nnode2 slots=4  # half of it\n")
    assert read_hostfile(path) == {"node1": 8, "node2": 4}
    path.write_text("me@node_1 slots=1\n10.0.0.7 slots=1\nfe80::1%eth0 slots=1\n")
    assert list(read_hostfile(path)) == ["me@node_1", "10.0.0.7", "fe80::1%eth0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("node1\n", "line 1: 'node1' is not"),
        ("node1 slots=0\n", "is not `host slots=N`"),
        ("node1 slots=2\nnode1 slots=2\n", "line 2: node1 stands twice"),
        ("node1 slots=two\n", "is not `host slots=N`"),
        (
            "-oProxyCommand=touch${IFS}here slots=2\n",
            "line 1: '-oProxyCommand=.* is no host: a name",
        ),
        ("a;b slots=2\n", "is no host"),
    ],
)
def test_hostfile_is_refused(text, message, tmp_path):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_hostfile(path)


@pytest.mark.parametrize(
    ("include", "exclude"),
    [("", ""), ("node2", ""), ("me@node1@node2", ""), ("node3@me@node1", ""), ("", "me@node1"),
     ("", "node2@node3")],
)  # fmt: skip
def test_chosen_hosts_are_deepspeeds(include, exclude):
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    slots = {"me@node1": 8, "node2": 4, "node3": 2}
    # DeepSpeed has no users in its hostfiles: it separates hosts at the same sign.
    theirs = parse_inclusion_exclusion(
        {h.removeprefix("me@"): n for h, n in slots.items()},
        include.replace("me@", ""), exclude.replace("me@", ""),
    )  # fmt: skip
    found = chosen_hosts(slots, include, exclude)
    assert {h.removeprefix("me@"): n for h, n in found.items()} == {
        h: len(found) for h, found in theirs.items()
    }


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("node1", "node2", "give one of them"),
        ("node9", "", "'node9' is not in the hostfile, which has node1, node2"),
        ("node1:0,1", "", "slots .* cannot be named"),
        ("", "node1@node2", "leaves no host"),
    ],
)
def test_a_wrong_choice_of_hosts_is_refused(include, exclude, message):
    with pytest.raises(ValueError, match=message):
        chosen_hosts({"node1": 1, "node2": 1}, include, exclude)


def test_every_ssh_takes_the_port(tmp_path, monkeypatch):
    monkeypatch.setenv(SSH_ARGUMENTS, "-i 'my key'")
    (tmp_path / "hosts").write_text("a slots=1\n")
    assert HostChoice(ssh_port=2222).read(tmp_path / "hosts") == {"a": 1}
    assert ssh("a", ["true"])[-7:-1] == ["-i", "my key", "-p", "2222", "--", "a"]
    assert names_on_network(["me@a"]) == {"me@a": "a"}


def test_command_exports_what_ranks_need(monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SECRET", "stays here")
    given = {"PYTHONPATH": "/x", "MASTER_ADDR": "a"}
    command = mpi_command(["pretrain", "--config", "tiny"], 3, ["--host", "a:3"], given)
    exported = [b for a, b in zip(command, command[1:], strict=False) if a == "-x"]
    assert {"NCCL_DEBUG", "PATH", "PYTHONPATH=/x", "MASTER_ADDR=a"} <= set(exported)
    assert "SECRET" not in exported
    assert command[-6:] == [sys.executable, "-u", "-m", "pretrain", "--config", "tiny"]
    assert command[command.index("-n") : command.index("-n") + 2] == ["-n", "3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "3", "--hostfile", "HOSTS", *SMALL], "2 slots; one rank needs one"),
        (["benchmark"], "does not run on several ranks"),
        (["--hostfile", "nowhere", "pretrain"], "cannot be read"),
    ],
)
def test_wrong_launches_are_refused(arguments, message, tmp_path):
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    given = [str(tmp_path / "hosts") if a == "HOSTS" else a for a in arguments]
    given += [f"data.shards={tmp_path}", f"run.out={tmp_path / 'run'}"]
    done = subprocess.run(
        [*GENELOOM, "launch", "mpi", *given], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert message in done.stderr


def test_variables_of_other_launchers():
    from pretrain.ranks.dist import _of_other_launchers

    slurm = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
    meet = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    assert _of_other_launchers(slurm | meet) == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    # In a batch script, before srun, there is no step.
    assert _of_other_launchers({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"} | meet) == {}
    assert _of_other_launchers(slurm | meet | {"RANK": "0"}) == {}
    alone = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    assert _of_other_launchers(alone | {"OMPI_COMM_WORLD_LOCAL_RANK": "0"}) == {}
    with pytest.raises(ValueError, match="srun started rank 3 of 4, but MASTER_ADDR and"):
        _of_other_launchers(slurm)
