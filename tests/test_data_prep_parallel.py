"""Any number of processes, any kill, any accident: the same bytes in the end, and nothing lost."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.encoding.encode_pass import encode_stretch
from data_prep.genes.vocabulary import Vocabulary, open_vocabulary
from data_prep.prepare.medians import gene_medians
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import SERIAL, prepare
from data_prep.prepare.workspace import locked_workspace
from data_prep.running.workers import open_workers
from data_prep.shards.format import MANIFEST_NAME
from data_prep.shards.reader import ShardSet
from data_prep.sources.corpus_list import expand_corpus
from data_prep.sources.source_spec import SourceOptions
from tests.synthetic import make_cells, write_cells

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = PrepareOptions(heldout_share=0.2, block_cells=16, shard_mib=0.002)
READING = SourceOptions(columns=("donor",))
NUM_FILES, CELLS = 6, 100


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Six files of counts and one of tokens, with the vocabulary of all."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(NUM_FILES):
        write_cells(folder / f"cells{i}.h5ad", num_cells=CELLS, seed=i)
    specs = expand_corpus([str(folder)], SourceOptions())
    found = gene_medians(specs, folder, SERIAL, lambda what, done, total: None)
    vocabulary = found.vocabulary(1, None, with_cls=False)
    vocabulary.save(folder / "vocabulary.json")
    rng = np.random.default_rng(0)
    lists = [
        rng.permutation(vocabulary.num_tokens - 2)[: rng.integers(20, 150)] + 2 for _ in "x" * 90
    ]
    table = {"input_ids": lists, "length": [len(x) for x in lists], "donor": ["t"] * len(lists)}
    pq.write_table(pa.table(table), folder / "tokens.parquet", row_group_size=25)
    return folder


def sources(corpus: Path) -> list[str]:
    return [*(str(p) for p in sorted(corpus.glob("*.h5ad"))), str(corpus / "tokens.parquet")]


def run(corpus: Path, out: Path, workers=SERIAL, **arguments) -> dict:
    specs = expand_corpus(sources(corpus), READING)
    return prepare(specs, out, vocabulary_of(corpus), OPTIONS, workers, **arguments)


def vocabulary_of(corpus: Path) -> Vocabulary:
    return open_vocabulary(corpus / "vocabulary.json")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    run(corpus, out)
    return contents(out)


def command(corpus: Path, out: Path, *more: str) -> list[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from launch.cli import main; main()"
    settings = ["--heldout", "0.2", "--block-cells", "16", "--shard-mib", "0.002", "--obs", "donor"]
    vocabulary = ["--vocab", str(corpus / "vocabulary.json")]
    return [
        sys.executable, "-c", code, "prepare", *sources(corpus), "--out", str(out), *vocabulary,
        *settings, *more,
    ]  # fmt: skip


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_give_the_same_bytes(processes, corpus, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "data_prep.prepare.work_list.CHUNK_CELLS", 40
    )  # several stretches of each file
    with open_workers(processes) as workers:
        run(corpus, tmp_path / "out", workers)
    assert contents(tmp_path / "out") == expected
    assert sum(name.startswith("train-") for name in expected) > 20


AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def mpirun(ranks: int) -> list[str]:
    return [str(Path(sys.executable).parent / "mpirun"), "--oversubscribe", "-n", str(ranks)]


@pytest.mark.parametrize("ranks", [2, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 3))])
def test_mpi_ranks_give_the_same_bytes(ranks, corpus, expected, tmp_path):
    done = subprocess.run(
        [*mpirun(ranks), *command(corpus, tmp_path / "out")],
        env=os.environ | AS_ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == expected
    assert done.stdout.count("cells read") == 1


def test_matrices_stored_by_gene_are_copied_by_all(corpus, expected, own_corpus, tmp_path):
    import anndata

    for path in own_corpus.glob("*.h5ad"):
        cells = anndata.read_h5ad(path)
        cells.X = cells.X.tocsc()
        cells.write_h5ad(path)
    with open_workers(2) as workers:
        run(own_corpus, tmp_path / "out", workers)
    assert contents(tmp_path / "out") == expected


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


@pytest.mark.parametrize(
    "moment",
    [
        "chunk-*.json",
        pytest.param("tars-*/written-*.json", marks=pytest.mark.long),
        pytest.param("chunk-*.arrow", marks=pytest.mark.long),
        pytest.param("plan-*.json", marks=pytest.mark.long),
        pytest.param("tars-*/manifest.json", marks=pytest.mark.long),
    ],
)
def test_killed_runs_continue(moment, corpus, expected, tmp_path):
    out = tmp_path / "out"
    first = subprocess.Popen(
        command(corpus, out, "--processes", "2"), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: any((out / ".partial").glob(moment)), first)
    family = psutil.Process(first.pid).children(recursive=True) if first.poll() is None else []
    first.send_signal(signal.SIGKILL)
    first.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, "workers outlive the process that started them"
    if not (out / MANIFEST_NAME).exists():
        kept = {p: p.stat().st_mtime_ns for p in (out / ".partial").glob("chunk-*-*")}
        done = {p.stem for p in (out / ".partial").glob("chunk-*.json")}
        seen = {}

        def look(what: str, number: int, total: int) -> None:
            seen.update({p: p.stat().st_mtime_ns for p in (out / ".partial").glob("chunk-*")})

        run(corpus, out, progress=look)
        finished = [p for p in kept if p.stem[:-5] in done]
        assert all(seen[p] == kept[p] for p in finished), "finished work was done again"
    assert contents(out) == expected


def test_a_killed_mpi_rank_ends_the_run_which_continues(corpus, expected, tmp_path):
    out = tmp_path / "out"
    first = subprocess.Popen(
        # So little memory cuts the work into many parts: time enough to kill.
        [*mpirun(3), *command(corpus, out, "--memory", "0.00001")],
        env=os.environ | AS_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: any((out / ".partial").glob("chunk-*.json")), first)
    ranks = [
        p for p in psutil.Process(first.pid).children(recursive=True) if "prepare" in p.cmdline()
    ]
    assert len(ranks) == 3
    ranks[-1].kill()
    assert first.wait(60) != 0
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive
    run(corpus, out)
    assert contents(out) == expected


def test_killed_while_results_moved_up(corpus, expected, tmp_path):
    out = tmp_path / "out"
    run(corpus, out)
    left = out / ".partial" / "tars-plan-0123"
    left.mkdir(parents=True)
    for path in [*list(out.glob("train-*"))[:3], out / MANIFEST_NAME]:
        path.rename(left / path.name)
    with pytest.raises(ValueError, match="no manifest"):
        ShardSet(out)
    run(corpus, out)
    assert contents(out) == expected


def test_two_runs_into_one_folder(corpus, tmp_path):
    with (
        locked_workspace(tmp_path / "out", MANIFEST_NAME),
        pytest.raises(ValueError, match=f"another run works .*: prepare, process {os.getpid()} on"),
    ):
        run(corpus, tmp_path / "out")
    with pytest.raises(ValueError, match="holds complete shards"):
        run(corpus, tmp_path / "out")
        run(corpus, tmp_path / "out")


@pytest.fixture
def own_corpus(corpus, tmp_path) -> Path:
    return Path(shutil.copytree(corpus, tmp_path / "own"))


@pytest.mark.parametrize("accident", ["changed", "removed"])
def test_files_that_change_while_they_are_read(accident, own_corpus, expected, tmp_path):
    victim = own_corpus / "cells3.h5ad"
    whole = victim.read_bytes()
    state = victim.stat()

    def interfere(what: str, done: int, total: int) -> None:
        if what == "encoding" and done >= CELLS:
            if accident == "removed":
                victim.unlink(missing_ok=True)
            else:
                victim.write_bytes(whole[:-1])

    with pytest.raises(ValueError, match=r"cells3\.h5ad: was changed or removed") as caught:
        run(own_corpus, tmp_path / "out", progress=interfere)
    assert "Finished work is kept" in caught.value.__notes__[0]
    victim.write_bytes(whole)
    os.utime(victim, ns=(state.st_atime_ns, state.st_mtime_ns))
    run(own_corpus, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_finished_files_are_not_encoded_again_without_the_bad_one(
    own_corpus, tmp_path, monkeypatch
):
    bad = own_corpus / "cells5.h5ad"
    cells = make_cells(CELLS)
    cells.X = cells.X * 0.5
    cells.write_h5ad(bad)
    with pytest.raises(ValueError, match=r"cells5\.h5ad.*no integers"):
        run(own_corpus, tmp_path / "out")
    bad.unlink()
    encoded = []
    monkeypatch.setattr(
        "data_prep.prepare.run.encode_stretch",
        lambda job: encoded.append(job.spec.name) or encode_stretch(job),
    )
    run(own_corpus, tmp_path / "out")
    assert encoded == ["tokens"], "five files of counts were finished before"


def test_a_killed_worker_is_said_and_nothing_is_lost(corpus, expected, tmp_path):
    with open_workers(2) as workers:

        def kill(what: str, done: int, total: int) -> None:
            if what == "encoding" and done:
                for process in list(workers.executor._processes.values()):
                    with contextlib.suppress(ProcessLookupError):  # killed a moment ago
                        os.kill(process.pid, signal.SIGKILL)

        with pytest.raises(OSError, match="worker process was killed.*--memory"):
            run(corpus, tmp_path / "out", workers, progress=kill)
    run(corpus, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_a_full_disk_is_said_and_nothing_is_lost(corpus, expected, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=66m", "tmpfs", str(disk)])
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    try:
        filler = disk / "filler"

        def fill(what: str, done: int, total: int) -> None:
            if what == "encoding" and done >= 2 * CELLS and not filler.exists():
                with pytest.raises(OSError, match="No space"), filler.open("wb", 0) as file:
                    while True:
                        file.write(b"\0" * 4096)

        with pytest.raises(OSError, match="No space left"):
            run(corpus, disk / "out", progress=fill)
        filler.unlink()
        run(corpus, disk / "out")
        assert contents(disk / "out") == expected
        filler.write_bytes(b"\0" * (50 << 20))
        with pytest.raises(ValueError, match="are needed .*are free"):
            run(corpus, disk / "other")
        assert not (disk / "other").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_processes_and_mpirun_exclude_each_other(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without mpirun"), open_workers(2):
        pass


def test_tars_of_other_settings_are_never_taken_for_finished(corpus, expected, tmp_path):
    """Two seeds give tars of the same names, and here of the same sizes."""
    lists = [np.random.default_rng(i).permutation(150)[:64] + 2 for i in range(200)]
    pq.write_table(pa.table({"input_ids": lists, "length": [64] * 200}), tmp_path / "t.parquet")
    specs = expand_corpus([str(tmp_path / "t.parquet")], SourceOptions())
    options = replace(OPTIONS, max_sd_counts=0)

    def stop(what: str, done: int, total: int) -> None:
        if what == "writing" and done == 2:
            raise KeyboardInterrupt

    for seed in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            prepare(
                specs, tmp_path / "out", vocabulary_of(corpus), replace(options, seed=seed),
                progress=stop,
            )  # fmt: skip
    for out in ("out", "fresh"):
        prepare(specs, tmp_path / out, vocabulary_of(corpus), options)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_moved_source_is_still_the_same(own_corpus, expected, tmp_path, monkeypatch):
    def stop(what: str, done: int, total: int) -> None:
        if what == "encoding" and done > CELLS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(own_corpus, tmp_path / "out", progress=stop)
    own_corpus.rename(tmp_path / "moved")
    encoded = []
    monkeypatch.setattr(
        "data_prep.prepare.run.encode_stretch",
        lambda job: encoded.append(job.spec.name) or encode_stretch(job),
    )
    run(tmp_path / "moved", tmp_path / "out")
    assert "cells0" not in encoded, "it was finished before"
    assert contents(tmp_path / "out") == expected


def test_a_run_that_finishes_while_another_starts_keeps_its_shards(corpus, expected, tmp_path):
    """The second looks before the first is done, and has the folder after."""
    from data_prep.prepare import workspace

    out, real = tmp_path / "out", workspace.owned

    def late(folder: Path, kind: str):
        workspace.owned = real
        run(corpus, out)
        return real(folder, kind)

    workspace.owned = late
    try:
        with pytest.raises(ValueError, match="holds complete shards"):
            run(corpus, out)
    finally:
        workspace.owned = real
    assert contents(out) == expected


def test_srun_without_mpi_is_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ValueError, match="MPI sees one"), open_workers(1):
        pass
