"""``geneloom launch slurm``: the batch file, and a real SLURM of three nodes that runs it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.ways.requeue import main, requeue_code
from launch.ways.slurm_script import RankCommand, SlurmJob, render, seconds_of
from pretrain.config import RunConfig
from tests.ranks import run_ranks
from tests.runs import (
    LIMIT_S,
    last_step,
    metrics,
    require_same_state,
    run_training,
    tiny_config,
)
from tests.slurm_hosts import Slurm, slurm, why_no_slurm
from tests.synthetic import write_cells

GENELOOM = [sys.executable, "-c", "from launch.cli import main; main()"]
ROOT = Path(__file__).resolve().parent.parent
STARTED = "submitted job "
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    reason = why_no_slurm()
    if reason:
        pytest.skip(reason)
    with slurm(3, tmp_path_factory.mktemp("slurm") / "cluster") as raised:
        yield raised


def start(cluster: Slurm, config: RunConfig, *options: str) -> str:
    """Submit a run on two nodes and return the job's number."""
    path = config.run.out.with_name("config.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config.to_yaml())
    said = cluster.run(
        *GENELOOM, "launch", "slurm", "--nodes", "2", "--time", "10", *options,
        "pretrain", "--config", str(path),
    )  # fmt: skip
    return said.split(STARTED)[1].split()[0]


def said(config: RunConfig) -> str:
    return "".join(p.read_text() for p in (config.run.out / "launch").glob("job-*.log"))


def events(config: RunConfig) -> list[dict]:
    path = config.run.out / "launch" / "events.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [e for e in found if e["event"] != "submitted"]


def wait_until(condition: Callable[[], bool], config: RunConfig) -> None:
    until = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < until, said(config)
        time.sleep(0.05)


def wait_for_step(config: RunConfig, step: int) -> None:
    wait_until(lambda: last_step(config.run.out) >= step, config)


@pytest.mark.long
def test_killed_and_signalled_run_ends_as_if_undisturbed(cluster, shards, tmp_path):
    """A rank dies, then USR1 as before a time limit: requeued twice, same cells, same bits."""
    settings = {"run__max_steps": 300, "checkpoint__every_steps": 10}
    config = tiny_config(shards, tmp_path / "a 'run' of $HOME \"100%\"" / "out", **settings)
    job = start(cluster, config)
    wait_for_step(config, 25)
    (rank,) = [p for p in cluster.nodes[1].processes("-u -m pretrain")]
    assert cluster.nodes[1].run(["kill", "-9", str(rank)]).returncode == 0
    second_start = config.run.out / "launch" / "attempt_2" / "rank_00000.log"
    wait_until(lambda: second_start.exists() and "/300" in second_start.read_text(), config)
    cluster.run("scancel", "--signal=USR1", job)
    whole = tiny_config(shards, tmp_path / "whole", **settings)
    run_ranks(2, run_training, whole)
    assert cluster.wait_for(job, OVER, LIMIT_S) == "COMPLETED", said(config)

    first, *others = events(config)
    assert first["event"] == "ended"
    assert "rank 1 on ds2: ended by SIGKILL" in first["cause"]
    # More than one where SLURM, slow under load, sends a signal to a step again: it has the same
    # number in the next start, here seconds later, in clusters two minutes.
    assert {e["event"] for e in others} == {"stopped"}
    assert others[0]["step"] > first["step"] >= 20
    rows, expected = metrics(config.run.out, "train"), metrics(whole.run.out, "train")
    same = ("step", "loss", "cells_seen", "cells_digest")
    assert [[r[k] for k in same] for r in rows] == [[r[k] for k in same] for r in expected]
    require_same_state(config.run.out, whole.run.out)
    text = said(config)
    assert "start 3 of job" in text
    assert "step 300/300" in text
    assert "all ranks are done" in text


@pytest.mark.long
def test_cancelled_run_saves_and_stays_cancelled(cluster, shards, tmp_path):
    from pretrain.checkpoints import checkpoint

    config = tiny_config(shards, tmp_path / "run", run__max_steps=20_000, run__epochs=5000)
    job = start(cluster, config)
    wait_for_step(config, 3)
    cluster.run("scancel", job)
    assert cluster.wait_for(job, OVER, LIMIT_S) == "CANCELLED"
    wait_until(lambda: "not requeued from here" in said(config), config)
    last = checkpoint.newest(config.run.out)
    assert last is not None
    assert last.step == last_step(config.run.out)
    assert cluster.state(job) == "CANCELLED"
    assert not cluster.nodes[1].processes("-m pretrain")


@pytest.mark.long
def test_prepare_is_a_job_of_one_task(cluster, tmp_path):
    """The shards are those of the command without a queue, byte for byte."""
    cells = write_cells(tmp_path / "cells.h5ad")
    words = ["prepare", str(cells), "--vocab", "build", "--min-genes", "1", "--out"]
    plain, queued = tmp_path / "plain", tmp_path / "queued"
    subprocess.run([*GENELOOM, *words, str(plain)], cwd=ROOT, check=True, capture_output=True)
    options = ["--time", "10", "--cpus-per-task", "2"]
    text = cluster.run(*GENELOOM, "launch", "slurm", *options, *words, str(queued))
    job = text.split(STARTED)[1].split()[0]
    log = queued / "launch" / f"job-{job}.log"
    assert cluster.wait_for(job, OVER, LIMIT_S) == "COMPLETED", log.read_text()
    names = {p.relative_to(plain) for p in plain.rglob("*") if p.is_file()}
    assert names == {
        p.relative_to(queued)
        for p in queued.rglob("*")
        if p.is_file() and p.relative_to(queued).parts[0] != "launch"
    }
    for name in names:
        assert (queued / name).read_bytes() == (plain / name).read_bytes(), name


@pytest.mark.slow
def test_time_limit_saves_and_requeues(cluster, shards, tmp_path):
    """SLURM's own signal, twice; no step is lost or repeated."""
    config = tiny_config(
        shards, tmp_path / "run", run__max_steps=100_000, run__epochs=50_000,
        checkpoint__every_steps=100_000,
    )  # fmt: skip
    job = start(cluster, config, "--time", "2", "--signal-before", "60")
    for number in (1, 2):
        wait_until(lambda n=number: len(events(config)) >= n, config)
    stops = events(config)
    assert {e["event"] for e in stops} == {"stopped"}
    assert 0 < stops[0]["step"] < stops[1]["step"]
    wait_for_step(config, stops[1]["step"] + 1)
    cluster.run("scancel", job)
    cluster.wait_for(job, OVER, LIMIT_S)
    rows = metrics(config.run.out, "train")
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1))


@pytest.mark.slow
def test_crash_that_repeats_stops_with_the_evidence(cluster, shards, tmp_path):
    config = tiny_config(
        shards, tmp_path / "run", optim__learning_rate=1e30, optim__warmup_steps=0,
        optim__max_grad_norm=0,
    )  # fmt: skip
    job = start(cluster, config)
    assert cluster.wait_for(job, OVER, LIMIT_S) == "FAILED", said(config)
    assert "the same end twice, in attempts 1 and 2; not started again" in said(config)
    assert said(config).count("stopped before the optimizer's step") >= 2
    assert len(events(config)) == 2


@pytest.mark.slow
def test_wrong_input_is_not_tried_again(cluster, tmp_path):
    config = tiny_config(tmp_path / "no shards here", tmp_path / "run")
    job = start(cluster, config)
    assert cluster.wait_for(job, OVER, LIMIT_S) == "FAILED", said(config)
    assert "wrong input, which would be wrong again" in said(config)
    assert "Restarts=0" in cluster.run("scontrol", "show", "job", job)


def command(*arguments: str) -> RankCommand:
    return RankCommand("/opt/python", "pretrain", [*arguments], [*arguments, "--restart"])


@pytest.mark.parametrize(
    ("time_limit", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400),
     ("1-00:00:10", 86410)],
)  # fmt: skip
def test_time_limits(time_limit, seconds):
    assert seconds_of(time_limit) == seconds


def test_arguments_reach_the_ranks_whatever_they_hold(tmp_path):
    """bash itself reads the file: what stands there is what a rank would get."""
    odd = ["a b", "$(touch hacked)", "'", '"', "`id`", "run.out=/x y", "*", "--x=\\n", "ä"]
    text = render(SlurmJob("geneloom-pretrain", 1, 1, "60"), command(*odd), tmp_path, "geneloom")
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("if [ "))
    stop = lines.index("fi", start)
    shown = 'printf "%s\\0" "${arguments[@]}"'
    for number, expected in (("1", odd), ("2", [*odd, "--restart"])):
        done = subprocess.run(
            ["bash", "-uc", "\n".join([*lines[start : stop + 1], shown])],
            env={"number": number}, cwd=tmp_path, capture_output=True, check=True,
        )  # fmt: skip
        assert done.stdout.decode().split("\0")[:-1] == expected
    # Submitted by hand as an array, or through SBATCH_ARRAY_INX.
    done = subprocess.run(["bash"], input=text, env={"SLURM_ARRAY_TASK_ID": "1"}, cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and "all tasks of an array would write" in done.stderr
    assert not list(tmp_path.iterdir())


def test_gpu_nodes_and_containers(tmp_path):
    job = SlurmJob(
        "geneloom-pretrain", 4, 8, "1-00:00:00", gpus_per_node=8, cpus_per_task=12, mem="0",
        partition="gpu", container="/images/geneloom.sif", mounts=["/data", "/scratch"],
        setup=["module load apptainer"], sbatch=["--exclusive"],
    )  # fmt: skip
    text = render(job, command("--config", "tiny"), tmp_path, "geneloom launch slurm")
    assert "#SBATCH --gpus-per-node=8\n" in text
    assert "#SBATCH --exclusive\n" in text
    tasks = "--nodes=4 --ntasks=32 --ntasks-per-node=8"
    assert f"srun --export=ALL {tasks} --kill-on-bad-exit=1" in text
    assert "--cpus-per-task=12 \\\n" in text
    inside = "apptainer exec --nv --bind /data --bind /scratch /images/geneloom.sif python3"
    assert f"python=({inside})" in text
    assert text.index("module load apptainer") < text.index("set -u")
    pyxis = SlurmJob("n", 1, 1, "60", container="img.sqsh", runtime="pyxis", mounts=["/d:/d"])
    text = render(pyxis, command(), tmp_path, "geneloom")
    assert "--container-image=img.sqsh --container-mounts=/d:/d" in text
    assert "python=(python3)" in text
    for one in (text, render(job, command("a b"), tmp_path, "geneloom")):
        subprocess.run(["bash", "-n"], input=one, text=True, check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--time", "soon"], "--time soon: SLURM knows"),
        (["--time", "3", "--signal-before", "170"], "nothing is left to train in"),
        (["--time", "60", "--partition", "a b"], "--partition 'a b': letters"),
        (["--time", "60", "--mount", "/x"], "--mount belongs to --container"),
        (["--time", "60", "--container", "i", "--runtime", "docker"], "apptainer or pyxis"),
        (["--time", "60", "--sbatch", "exclusive"], "one option of sbatch"),
        (["--time", "60", "--sbatch=--array=0-3"], "all tasks of an array would write"),
        (["--time", "60", "--sbatch=--arra 0-3"], "all tasks of an array would write"),
        (["--time", "60", "--sbatch=-a0-3"], "all tasks of an array would write"),
        (["--time", "60", "--env", "A"], "--env A: this shell has no such variable"),
    ],
)
def test_wrong_jobs_are_refused(options, message, tmp_path):
    done = subprocess.run(
        [*GENELOOM, "launch", "slurm", *options, "pretrain", "--config", "tiny",
         "data.shards=x", f"run.out={tmp_path / 'run'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_shown_is_not_stored(tmp_path):
    out = tmp_path / "run"
    done = subprocess.run(
        [*GENELOOM, "launch", "slurm", "--time", "60", "--cpus-per-task", "4", "--show",
         "prepare", "cells.h5ad", "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"arguments=(cells.h5ad --out {out} --processes 4)" in done.stdout
    assert not out.exists()


def attempt(run: Path, number: int, *ends: tuple[int, int, str]) -> Path:
    """Make what a launched rank leaves: (rank, exit code, last words) in the order of ends."""
    folder = run / "launch" / f"attempt_{number}"
    folder.mkdir(parents=True)
    for place, (rank, code, words) in enumerate(ends):
        (folder / f"rank_{rank:05d}.log").write_text(words + "\n")
        content = {"rank": rank, "host": f"n{rank}", "code": code, "from": 0.0, "to": 1.0 + place}
        (folder / f"rank_{rank:05d}.json").write_text(json.dumps(content))
    return folder


def save(run: Path, step: int) -> None:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")


def test_verdicts(tmp_path):
    def verdict(run: str, number: int, code: int, *ends: tuple[int, int, str], restarts: int = 3):
        folder = attempt(tmp_path / run, number, *ends)
        return requeue_code(tmp_path / run, folder, code, "7", {"n0": 1, "n1": 1}, restarts)

    assert verdict("done", 1, 0, (0, 0, ""), (1, 0, "")) == (0, "all ranks are done")
    assert verdict("limit", 1, 75, (0, 75, ""), (1, 75, ""))[0] == 75
    assert verdict("usr1", 1, 138, (0, -10, ""), (1, -10, ""))[0] == 75
    # srun says 143, of the rank that it ended; the first one failed for its own reason.
    code, why = verdict("wrong", 1, 143, (0, 2, "error: no such shards"), (1, -15, ""))
    assert code == 2
    assert "no such shards" in why
    code, why = verdict("crash", 1, 1, (1, 1, "OSError: disk full"), (0, 1, "another rank is gone"))
    assert code == 75
    assert why.startswith("rank 1 on n1: OSError: disk full: starts again")
    code, why = verdict("crash", 2, 1, (1, 1, "OSError: disk full"), (0, 1, "another rank is gone"))
    assert code == 1
    assert "the same end twice, in attempts 1 and 2" in why


def test_crashes_are_counted_between_checkpoints(tmp_path):
    run, codes = tmp_path / "run", []
    for number in range(1, 8):
        if number == 3:
            save(run, 100)
        folder = attempt(run, number, (0, 1, f"OSError: {number}"))
        codes.append(requeue_code(run, folder, 1, "7", {"n0": 1}, 2)[0])
    # Two without a checkpoint, then two more starts at step 100, and the next one is the last.
    assert codes == [75, 75, 75, 75, 1, 1, 1]
    other = requeue_code(run, attempt(run, 8, (0, 1, "OSError: 8")), 1, "8", {"n0": 1}, 2)
    assert other[0] == 75, "another job starts to count anew"


def test_the_batch_file_asks_what_to_do(tmp_path, capsys):
    words = ["--job", "7", "--hosts", "n0,n1", "--ranks-per-host", "1", "--restarts", "0"]
    for ended, code in (((0, 0, ""), 0), ((0, 1, "OSError: x"), 1)):
        folder = attempt(tmp_path, code + 1, ended)
        assert main([str(tmp_path), str(folder), str(code), *words]) == code
        said = capsys.readouterr().out
        assert said.startswith("launch: "), said
        assert ("all ranks are done" in said) == (code == 0), said


def test_nothing_started_at_all(tmp_path):
    code, why = requeue_code(tmp_path, attempt(tmp_path, 1), 1, "7", {"n0": 1, "n1": 1}, 3)
    assert code == 75
    assert "no rank started" in why


@pytest.mark.slow
def test_lost_node_is_replaced(cluster, shards, tmp_path):
    """The second of three nodes loses its power; the job goes on with the third. Last of all."""
    config = tiny_config(
        shards, tmp_path / "run", run__max_steps=400, run__heartbeat_s=5,
        run__collective_timeout_s=20, checkpoint__every_steps=10,
    )  # fmt: skip
    job = start(cluster, config)
    wait_for_step(config, 25)
    cluster.nodes[1].power_off()
    assert cluster.wait_for(job, OVER, 2 * LIMIT_S) == "COMPLETED", said(config)
    assert "on ds[1,3]" in said(config)
    rows = metrics(config.run.out, "train")
    assert [r["step"] for r in rows] == list(range(1, 401))
