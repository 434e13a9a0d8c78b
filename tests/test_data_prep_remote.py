"""Shards behind a URL give the cells of the folder, whatever server, disk and network do."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.shards import tar_members
from data_prep.shards.format import BucketExtent, fingerprint
from data_prep.shards.reader import DamagedBlock, ShardSet
from data_prep.sources.source_spec import SourceOptions, source_at
from launch.cli import build_app
from pretrain.config import load_config
from tests.synthetic import make_large_manifest, write_cells

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden" / "shards-1"
SMALL_FILES = ["manifest.json", "vocabulary.json", "index.parquet"]


def make_corpus(folder: Path, seed: int) -> Path:
    """Return shards with buckets of several tars and tars of several blocks."""
    source = write_cells(folder / "cells.h5ad", num_cells=400, num_genes=60, seed=seed)
    options = PrepareOptions(
        heldout_share=0.2, block_cells=4, vocabulary_min_cells=1, shard_mib=0.003
    )
    prepare([source_at(source, SourceOptions())], folder / "shards", None, options)
    return folder / "shards"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"), 0)


@pytest.fixture(scope="module")
def other_corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("other"), 1)


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: in two, each answer waits 40 ms
    server: Server

    def do_GET(self) -> None:
        server, name, wanted = self.server, self.path.lstrip("/"), self.headers["Range"]
        with server.lock:
            server.requests.append((name, wanted))
            fails = server.failures.pop(0) if server.failures else None
        path = server.folder / name
        if fails == "close":
            self.close_connection = True
        elif isinstance(fails, int) or not path.is_file():
            self._send(fails or 404, b"<html>nothing here</html>")
        else:
            content = bytearray(path.read_bytes())
            for flipped, at in server.flipped:
                if flipped == name:
                    content[at] ^= 1
            status, body = self._part(bytes(content), wanted)
            self._send(status, body, cut=fails == "cut")

    def _part(self, content: bytes, wanted: str | None) -> tuple[int, bytes]:
        if wanted is None or self.server.ignores_ranges:
            return 200, content
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        return (416, b"") if first >= len(content) else (206, content[first : last + 1])

    def _send(self, status: int, body: bytes, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = body[: len(body) // 2] if cut else body
        self.wfile.write(sent)
        self.close_connection = cut
        with self.server.lock:
            self.server.bytes_served += len(sent)

    def log_message(self, *arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Serves a folder; counts, and fails as told.

    `failures` are what comes of the next requests: a status, "close" or "cut" (half of the body).
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder = folder
        self.requests: list[tuple[str, str | None]] = []
        self.failures: list[int | str | None] = []
        self.flipped: list[tuple[str, int]] = []
        self.bytes_served = 0
        self.ignores_ranges = False
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def names(self) -> Counter:
        """Return how often each file was asked for since the last call."""
        asked = Counter(name for name, _ in self.requests)
        self.requests.clear()
        return asked


@pytest.fixture
def served(corpus, monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(corpus) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def open_at(url: str, cache: Path, pauses_s=(0.01, 0.01)) -> ShardSet:
    return ShardSet(url, cache, pauses_s)


def num_blocks(shards: ShardSet) -> int:
    return len(shards.index["crc32"])


def contents(shards: ShardSet) -> list[dict]:
    """Return every block, by number."""
    return [shards.read_block(n).batch.to_pydict() for n in range(num_blocks(shards))]


def copy_of(cache: Path) -> Path:
    (folder,) = cache.iterdir()
    return folder


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("golden", [False, True])
def test_blocks_over_http_are_those_of_the_folder(golden, served, corpus, tmp_path):
    served.folder = GOLDEN if golden else corpus
    local = ShardSet(served.folder)
    shards = open_at(served.url + "/", tmp_path / "cache")
    assert served.names() == dict.fromkeys(SMALL_FILES, 1)
    assert (shards.fingerprint, shards.vocabulary.sha256, shards.num_cells) == (
        local.fingerprint, local.vocabulary.sha256, local.num_cells
    )  # fmt: skip
    served.bytes_served = 0
    assert contents(shards) == contents(local)
    assert served.bytes_served == local.index["bytes"].sum(), "only the blocks, each once"
    assert served.names().total() == num_blocks(local)
    assert copy_of(tmp_path / "cache").name == local.fingerprint[:32]
    again = open_at(served.url, tmp_path / "cache")
    assert contents(again) == contents(shards) == contents(local)
    assert served.names() == {"manifest.json": 1}


def test_a_block_is_one_request_of_its_range(served, tmp_path):
    shards = open_at(served.url, tmp_path)
    served.requests.clear()
    shards.read_block(5)
    ((_, wanted),) = served.requests
    start, size = int(shards.index["offset"][5]), int(shards.index["bytes"][5])
    assert wanted == f"bytes={start}-{start + size - 1}"


def test_damage_of_the_copy_heals(served, corpus, tmp_path):
    local = ShardSet(corpus)
    expected = contents(local)
    assert contents(open_at(served.url, tmp_path)) == expected
    copy, index = copy_of(tmp_path), local.index
    flipped, cut, lost = (s["name"] for s in local.manifest["shards"][:3])
    flip(copy / flipped, int(index["offset"][0]) + 100)
    size = (copy / cut).stat().st_size
    os.truncate(copy / cut, size - 10)
    (copy / lost).unlink()
    flip(copy / "index.parquet", 300)
    (copy / "vocabulary.json").write_text("{}")
    served.names()
    assert contents(open_at(served.url, tmp_path)) == expected
    blocks = int((index["shard"] == 2).sum())
    assert served.names() == dict.fromkeys([*SMALL_FILES, flipped, cut], 1) | {lost: blocks}
    assert contents(open_at(served.url, tmp_path)) == expected
    assert served.names() == {"manifest.json": 1}


def test_damage_at_the_source_is_named(served, corpus, tmp_path):
    local = ShardSet(corpus)
    number = int(local.block_numbers("train", local.bucket_lengths("train")[-1])[3])
    shard = int(local.index["shard"][number])
    tar = local.manifest["shards"][shard]["name"]
    place = number - int(np.flatnonzero(local.index["shard"] == shard)[0])
    with tarfile.open(corpus / tar) as archive:
        member = archive.getnames()[place]
    served.flipped = [(tar, int(local.index["offset"][number]) + 50)]
    shards = open_at(served.url, tmp_path)
    for _ in range(2):
        with pytest.raises(
            DamagedBlock, match=f"{served.url}/{tar}.*{member}.*damaged at the source"
        ) as caught:
            shards.read_block(number)
    copied = pickle.loads(pickle.dumps(caught.value))
    for error in (caught.value, copied):
        assert (error.number, error.shard, str(error)) == (number, tar, str(caught.value))
    served.flipped = []
    assert contents(shards) == contents(local), "what was wrong was not kept"


def test_a_damaged_block_of_a_folder_is_named(corpus, tmp_path):
    folder = Path(shutil.copytree(corpus, tmp_path / "shards"))
    entry = ShardSet(folder).manifest["shards"][-1]
    os.truncate(folder / entry["name"], entry["bytes"] // 3)
    shards = ShardSet(folder)
    number = num_blocks(shards) - 1
    with tarfile.open(corpus / entry["name"]) as archive:
        member = archive.getnames()[-1]
    with pytest.raises(DamagedBlock, match=f"{entry['name']}.*{member}.*damaged: ") as caught:
        shards.read_block(number)
    assert (caught.value.number, caught.value.shard) == (number, entry["name"])


def test_a_shard_that_is_short_at_the_source(served, corpus, tmp_path):
    served.folder = Path(shutil.copytree(corpus, tmp_path / "short"))
    shards = open_at(served.url, tmp_path / "cache")
    shard = int(np.bincount(shards.index["shard"]).argmax())
    first, second, third = np.flatnonzero(shards.index["shard"] == shard)[:3].tolist()
    path = served.folder / shards.manifest["shards"][shard]["name"]
    os.truncate(path, int(shards.index["offset"][second]) + 10)
    assert shards.read_block(first).batch == ShardSet(corpus).read_block(first).batch
    for number in (second, third):  # too few bytes, and a range behind the end
        with pytest.raises(DamagedBlock, match="at the source"):
            shards.read_block(number)


@pytest.mark.parametrize("failure", [503, 500, 429, "close", "cut"])
def test_failures_that_pass(failure, served, corpus, tmp_path):
    served.failures = [failure, failure, None, failure]
    shards = open_at(served.url, tmp_path)
    served.failures = [failure, failure]
    assert contents(shards) == contents(ShardSet(corpus))


def test_failures_that_stay(served, tmp_path):
    shards = open_at(served.url, tmp_path)
    served.requests.clear()
    served.failures = [503] * 10
    with pytest.raises(ConnectionError, match=rf"{served.url}/train.*503.*tried 3 times"):
        shards.read_block(0)
    assert len(served.requests) == 3


def test_nobody_there(tmp_path):
    with Server(tmp_path) as server:
        url = server.url
    with pytest.raises(ConnectionError, match=rf"{url}/manifest.json.*tried 2 times"):
        open_at(url, tmp_path / "cache", pauses_s=(0.01,))


@pytest.mark.parametrize("status", [403, 401, 400])
def test_refusals_are_not_repeated(status, served, tmp_path):
    served.failures = [status] * 5
    with pytest.raises(ValueError, match=f"{served.url}/manifest.json.*{status}"):
        open_at(served.url, tmp_path)
    assert len(served.requests) == 1


def test_what_is_missing_is_named(served, corpus, tmp_path):
    served.folder = Path(shutil.copytree(corpus, tmp_path / "copy"))
    with pytest.raises(ValueError, match=f"{served.url}/deeper: no manifest.json"):
        open_at(f"{served.url}/deeper", tmp_path / "cache")
    shards = open_at(served.url, tmp_path / "cache")
    tar = shards.manifest["shards"][0]["name"]
    (served.folder / tar).unlink()
    served.requests.clear()
    with pytest.raises(ValueError, match=f"{served.url}/{tar}: shard is missing"):
        shards.read_block(0)
    assert len(served.requests) == 1
    for name in ("index.parquet", "vocabulary.json"):
        (served.folder / name).rename(tmp_path / name)
        empty = tmp_path / f"cache without {name}"
        with pytest.raises(ValueError, match=f"{served.url}/{name}: is missing"):
            open_at(served.url, empty)
        (served.folder / name).write_bytes(b"{}")
        with pytest.raises(ValueError, match=f"{served.url}/{name}: does not match"):
            open_at(served.url, empty)
        (tmp_path / name).rename(served.folder / name)


def test_a_server_that_knows_no_ranges(served, corpus, tmp_path, caplog):
    local = ShardSet(corpus)
    served.ignores_ranges = True
    shards = open_at(served.url, tmp_path)
    served.names()
    assert contents(shards) == contents(local)
    tars = [s["name"] for s in local.manifest["shards"]]
    assert served.names() == dict.fromkeys(tars, 1), "what came is kept"
    assert all((copy_of(tmp_path) / t).read_bytes() == (corpus / t).read_bytes() for t in tars)
    assert len([r for r in caplog.records if "no range requests" in r.message]) == 1


def test_no_message_has_the_password_of_a_url(tmp_path, caplog):
    with pytest.raises(ConnectionError, match="http://HIDDEN@127.0.0.1:1/manifest.json") as raised:
        open_at("http://me:canary@127.0.0.1:1", tmp_path, pauses_s=(0.0,))
    assert "canary" not in f"{raised.value}{caplog.text}" and "trying again" in caplog.text


def test_another_corpus_at_the_same_url(served, corpus, other_corpus, tmp_path):
    first = open_at(served.url, tmp_path)
    expected = contents(ShardSet(corpus))
    assert [first.read_block(n).batch.to_pydict() for n in range(3)] == expected[:3]
    served.folder = other_corpus
    second = open_at(served.url, tmp_path)
    assert second.fingerprint != first.fingerprint
    assert contents(second) == contents(ShardSet(other_corpus))
    assert len(list(tmp_path.iterdir())) == 2
    # The first is served from its copy, and never with cells of the second.
    assert [first.read_block(n).batch.to_pydict() for n in range(3)] == expected[:3]
    with pytest.raises(ValueError, match="at the source|is missing"):
        contents(first)


def test_a_manifest_that_was_edited(served, corpus, tmp_path):
    served.folder = Path(shutil.copytree(corpus, tmp_path / "copy"))
    path = served.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["name"] = "../../outside.tar"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="manifest.json: its fingerprint does not follow"):
        open_at(served.url, tmp_path / "cache")
    path.write_text(json.dumps(manifest | {"fingerprint": fingerprint(manifest)}))
    shards = open_at(served.url, tmp_path / "cache")
    before = {p for p in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match="outside.tar"):
        shards.read_block(0)
    assert {p for p in tmp_path.rglob("*")} == before
    path.write_text("[1]")
    with pytest.raises(ValueError, match=f"{served.url}/manifest.json: is not the manifest"):
        open_at(served.url, tmp_path / "cache")


def test_a_full_disk_is_said_once(served, corpus, tmp_path, caplog):
    shards = open_at(served.url, tmp_path)
    expected = contents(ShardSet(corpus))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A real error of the file system: no file may grow beyond this; a block is written in part.
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        read = contents(shards)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read == expected
    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert str(copy_of(tmp_path)) in warning.message and "cannot be written" in warning.message
    assert contents(open_at(served.url, tmp_path)) == expected


def test_a_cache_that_cannot_be(served, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"{tmp_path / 'file'}.*give another folder"):
        open_at(served.url, tmp_path / "file")
    with pytest.raises(ValueError, match=f"{served.url}.*data.cache=FOLDER"):
        ShardSet(served.url)


def read_all(open_shards, expected: list[dict], results) -> None:
    results.put(contents(open_shards()) == expected)


@pytest.mark.parametrize("start", ["fork", "forkserver"])
@pytest.mark.parametrize("opened", [False, True])
def test_processes_share_a_copy(start, opened, served, corpus, tmp_path):
    """They open it themselves, or get one that has been read from here."""
    context = multiprocessing.get_context(start)
    expected, results = contents(ShardSet(corpus)), context.Queue()
    shards = open_at(served.url, tmp_path)
    shards.read_block(0)
    give = partial(return_it, shards) if opened else partial(open_at, served.url, tmp_path)
    processes = [context.Process(target=read_all, args=(give, expected, results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert contents(shards) == expected
    assert [results.get(timeout=60) for _ in processes] == [True, True]
    for process in processes:
        process.join()


def return_it(shards: ShardSet) -> ShardSet:
    return shards


@pytest.mark.parametrize("remote", [False, True])
def test_threads_share_shards(remote, served, corpus, tmp_path, monkeypatch):
    """With one descriptor open at a time, every other read closes one."""
    monkeypatch.setattr(tar_members, "_MAX_OPEN_FILES", 1)
    expected = contents(ShardSet(corpus))
    shards = open_at(served.url, tmp_path) if remote else ShardSet(corpus)
    numbers = np.random.default_rng(0).permutation(np.arange(num_blocks(shards)).repeat(8))
    open_before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208  names only
    with ThreadPoolExecutor(4) as pool:
        blocks = list(pool.map(lambda n: shards.read_block(int(n)).batch.to_pydict(), numbers))
    assert blocks == [expected[n] for n in numbers]
    targets = [
        os.readlink(f"/proc/self/fd/{n}")  # noqa: PTH115
        for n in set(os.listdir("/proc/self/fd")) - open_before  # noqa: PTH208
        if os.path.exists(f"/proc/self/fd/{n}")  # noqa: PTH110
    ]
    assert len([t for t in targets if t.endswith(".tar")]) <= 1, "descriptors are closed"


def test_threads_that_take_turns_often_share_open_files(monkeypatch):
    """Thousands of closing descriptors, with a switch of threads wherever one is possible."""
    monkeypatch.setattr(tar_members, "_MAX_OPEN_FILES", 1)
    files = tar_members.OpenFiles()

    def read_often(seed: int) -> None:
        for name in np.random.default_rng(seed).choice(["a", "b", "c"], 30_000).tolist():
            files.get(name, lambda: os.open("/dev/null", os.O_RDONLY))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(read_often, range(4)))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_other_protocols(protocol, corpus, tmp_path):
    url = f"file://{corpus}"
    if protocol == "memory":
        url = f"memory://{tmp_path.name}"
        fsspec.filesystem("memory").put(f"{corpus}/", f"/{tmp_path.name}/", recursive=True)
    shards = open_at(url, tmp_path)
    assert contents(shards) == contents(ShardSet(corpus))
    assert shards.name == Path(url).name
    with pytest.raises(ValueError, match="no manifest.json"):
        open_at(f"{url}/none", tmp_path)


def test_an_unknown_protocol(tmp_path):
    with pytest.raises(ValueError, match="nosuch://shards/manifest.json: cannot be read"):
        open_at("nosuch://shards", tmp_path)


def test_settings_of_a_run(tmp_path):
    url = "s3://bucket/shards"
    with pytest.raises(ValueError, match="give data.cache=FOLDER"):
        load_config("tiny", [f"data.shards={url}", "run.out=out"])
    config = load_config("tiny", [f"data.shards={url}", "data.cache=copy", "run.out=out"])
    assert (config.data.shards, config.data.cache) == (url, Path("copy"))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


def test_inspect_and_page_of_a_url(served, corpus, tmp_path):
    def call(*arguments: object) -> str:
        done = CliRunner().invoke(build_app("inspect"), ["inspect", *map(str, arguments)])
        assert done.exit_code == 0, done.output
        return done.output

    def page(shown: object, *arguments: object) -> str:
        call(shown, *arguments, "--page", tmp_path / "page.html")
        return (tmp_path / "page.html").read_text()

    there = (served.url, "--cache", tmp_path / "cache")
    assert call(*there).splitlines()[:-1] == call(corpus).splitlines()[:-1]
    title = f"127.0.0.1:{served.server_address[1]}"
    assert page(*there).replace(title, "shards") == page(corpus)


def check_layout(shards: ShardSet) -> None:
    """Compare what is computed from the manifest with the index."""
    index = shards.index
    assert shards.num_cells == index["cells"].sum()
    for code, split in enumerate(("train", "heldout")):
        extents = shards.extents(split)
        lengths = np.unique(index["bucket_length"][index["split"] == code])
        assert shards.bucket_lengths(split) == lengths.tolist()
        for extent in extents:
            rows = np.flatnonzero(
                (index["split"] == code) & (index["bucket_length"] == extent.length)
            )
            np.testing.assert_array_equal(shards.block_numbers(split, extent.length), rows)
            cells = index["cells"][rows]
            assert (cells[:-1] == extent.block_cells).all()
            tars = np.bincount(index["shard"][rows] - index["shard"][rows[0]], cells)
            run = tars[0] if len(tars) > 1 else extent.block_cells
            assert extent == BucketExtent(
                extent.length, index["first_cell"][rows[0]], cells.sum(), rows[0],
                extent.block_cells, run,
            )  # fmt: skip
    assert len(shards.block_numbers("train", 7)) == 0


def test_layout_follows_from_the_manifest(corpus):
    for folder in (corpus, GOLDEN):
        shards = ShardSet(folder)
        check_layout(shards)
        for split, code in (("train", 0), ("heldout", 1)):
            blocks = [b.batch for b in shards.iter_blocks(split)]
            rows = np.flatnonzero(shards.index["split"] == code)
            assert blocks == [shards.read_block(int(n)).batch for n in rows]


def test_columns_of_the_index(corpus):
    table = pq.read_table(corpus / "index.parquet")
    index = ShardSet(corpus).index
    assert list(index) == table.column_names and len(index) == 9
    for name, column in index.items():
        np.testing.assert_array_equal(column, table[name].to_numpy(), strict=True)
        assert not column.flags.writeable
    with pytest.raises(KeyError):
        index["nothing"]


_MEASURE = """
import re, sys, time
from pathlib import Path
from data_prep.shards.reader import ShardSet

def memory_mib(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

before, start = memory_mib("VmRSS"), time.perf_counter()
shards = ShardSet(sys.argv[1])
places = [shards.index[name] for name in ("offset", "bytes", "crc32")]
extents = [shards.extents(split) for split in ("train", "heldout")]
print(memory_mib("VmHWM") - before, time.perf_counter() - start, sum(c.nbytes for c in places))
"""


@pytest.mark.long  # test_data_prep_order.py: what is read of so many
def test_a_billion_cells_are_opened_in_little_memory(tmp_path):
    """Takes 4 s: what is measured is the size."""
    folder = make_large_manifest(tmp_path / "shards")
    # VmHWM is this process's own peak; ru_maxrss starts at the peak of the process it came from.
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(folder)], cwd=ROOT, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    mib, seconds, size = map(float, re.findall(r"[\d.]+", done.stdout))
    shards = ShardSet(folder)
    assert (shards.num_cells, len(shards.manifest["shards"])) == (10**9, 40_000)
    assert size == 16 * num_blocks(shards) > 60e6
    assert size / 2**20 < mib < 200
    assert seconds < 10
    assert len(pickle.dumps(shards)) < size / 2, "columns are not sent to another process"
    check_layout(shards)
