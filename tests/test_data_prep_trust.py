"""Nothing on the way is trusted: chunks by hash, cells by verify, the last moments of a run."""

from __future__ import annotations

import errno
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from data_prep.encoding import encode_pass
from data_prep.files import file_sha256
from data_prep.genes.vocabulary import Vocabulary
from data_prep.prepare import run as prepare_module
from data_prep.prepare.manifest import record_sha256
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.prepare.verify_and_repair import verify
from data_prep.prepare.workspace import full_disk_named
from data_prep.running.owner import owned
from data_prep.running.workers import SERIAL
from data_prep.shards.format import fingerprint
from data_prep.sources.source_spec import SourceOptions, source_at
from tests.synthetic import make_cells

GENES = tuple(make_cells(2).var_names)
PLAIN = Vocabulary(GENES, np.ones(200), {"<pad>": 0, "<mask>": 1}, 256)
FRAMED = Vocabulary(GENES, np.ones(200), {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}, 256)
OPTIONS = PrepareOptions(heldout_share=0.3, block_cells=16)


class Killed(BaseException):
    pass


@pytest.fixture
def spec(tmp_path):
    make_cells(60).write_h5ad(tmp_path / "cells.h5ad")
    return source_at(tmp_path / "cells.h5ad", SourceOptions(columns=("donor",)))


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def killed_at(monkeypatch, spec, out: Path, module, name: str) -> None:
    """Run until a function is called, as if killed there."""

    def stop(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stop)
        with pytest.raises(Killed):
            prepare([spec], out, PLAIN, OPTIONS)


@pytest.mark.parametrize("suffix", [".tokens", ".arrow", ".json"])
def test_a_flipped_bit_in_a_chunk_is_found(suffix, spec, tmp_path, monkeypatch):
    expected = prepare([spec], tmp_path / "whole", PLAIN, OPTIONS)
    out = tmp_path / "out"
    killed_at(monkeypatch, spec, out, prepare_module, "decide_all")
    (chunk,) = [p for p in (out / ".partial").glob("chunk-*") if p.suffix == suffix]
    whole = bytearray(chunk.read_bytes())
    whole[len(whole) // 2] ^= 1
    chunk.write_bytes(whole)
    calls = []
    real = encode_pass.encode_stretch
    monkeypatch.setattr(
        prepare_module, "encode_stretch", lambda job: calls.append(job) or real(job)
    )
    assert prepare([spec], out, PLAIN, OPTIONS) == expected
    assert content(out) == content(tmp_path / "whole")
    assert len(calls) == 1 or suffix == ".json"  # a bit of the record may be one of no meaning


def test_a_flipped_bit_in_a_finished_tar_is_found(spec, tmp_path, monkeypatch):
    expected = prepare([spec], tmp_path / "whole", PLAIN, OPTIONS)
    out = tmp_path / "out"
    killed_at(monkeypatch, spec, out, prepare_module, "write_manifest")
    tar = sorted((out / ".partial").glob("tars-*/*.tar"))[0]
    whole = bytearray(tar.read_bytes())
    whole[700] ^= 1
    tar.write_bytes(whole)
    assert prepare([spec], out, PLAIN, OPTIONS) == expected
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("left", ["all", "part", "request"])
def test_killed_in_the_last_moments(left, spec, tmp_path, monkeypatch):
    out = tmp_path / "out"
    before = prepare([spec], tmp_path / "whole", PLAIN, OPTIONS)
    # The manifest is in place; the working folder is about to go.
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *a, **k: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare([spec], out, PLAIN, OPTIONS)
    assert (out / "manifest.json").exists() and (out / ".request").exists()
    if left == "part":
        next((out / ".partial").glob("chunk-*.json")).unlink()
    if left == "request":
        shutil.rmtree(out / ".partial")
    other = PrepareOptions(heldout_share=0.3, block_cells=16, seed=9)
    with pytest.raises(ValueError, match="holds complete shards already"):
        prepare([spec], out, PLAIN, other)
    assert prepare([spec], out, PLAIN, OPTIONS) == before
    assert content(out) == content(tmp_path / "whole")
    with pytest.raises(ValueError, match="holds complete shards already"):
        prepare([spec], out, PLAIN, OPTIONS)


def test_a_run_that_is_alive_is_not_completed_by_another(spec, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *a, **k: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare([spec], out, PLAIN, OPTIONS)
    with (
        owned(out, "prepare"),
        pytest.raises(ValueError, match="holds complete shards already"),
    ):
        prepare([spec], out, PLAIN, OPTIONS)
    assert (out / ".partial").exists()


def edited(folder: Path, change) -> None:
    """Change the first block of the first tar and make every hash of it right again."""
    manifest = json.loads((folder / "manifest.json").read_text())
    index = pq.read_table(folder / "index.parquet").to_pylist()
    path, row = folder / manifest["shards"][0]["name"], index[0]
    data = bytearray(path.read_bytes())
    at, size = row["offset"], row["bytes"]
    batch = pa.ipc.open_stream(bytes(data[at : at + size])).read_next_batch()
    tokens = np.array(batch.column("input_ids").values)
    change(tokens, np.asarray(batch.column("input_ids").offsets))
    lists = pa.ListArray.from_arrays(batch.column("input_ids").offsets, pa.array(tokens))
    columns = [lists, *batch.columns[1:]]
    sink = pa.BufferOutputStream()
    made = pa.record_batch(columns, names=batch.schema.names)
    with pa.ipc.new_stream(sink, made.schema) as stream:
        stream.write_batch(made)
    payload = sink.getvalue().to_pybytes()
    assert len(payload) == size
    data[at : at + size] = payload
    path.write_bytes(data)
    row["crc32"] = zlib.crc32(payload)
    schema = pq.read_schema(folder / "index.parquet")
    pq.write_table(pa.Table.from_pylist(index, schema=schema), folder / "index.parquet")
    manifest["shards"][0]["sha256"] = file_sha256(path)
    manifest["index_sha256"] = file_sha256(folder / "index.parquet")
    write(folder, manifest)


def write(folder: Path, manifest: dict, honest: bool = True) -> None:
    manifest["fingerprint"] = fingerprint(manifest)
    if honest:
        manifest["record_sha256"] = record_sha256(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def messages(folder: Path) -> str:
    return "\n".join(p.message for p in verify(folder, SERIAL, lambda *_: None))


def put(token: int, place: int):
    def change(tokens, offsets):
        tokens[offsets[-2] + place] = token

    return change


@pytest.mark.parametrize(
    ("vocabulary", "change", "message"),
    [
        (PLAIN, put(0, 3), "holds <pad> inside a cell"),
        (PLAIN, put(1, 0), "holds <mask> inside a cell"),
        (FRAMED, put(1, 3), "holds <mask> inside a cell"),
        (FRAMED, put(2, 3), "holds <cls> inside a cell"),
        (FRAMED, put(7, 0), "1 cells without <cls> and <eos>"),
    ],
)
def test_special_tokens_inside_cells_are_found(vocabulary, change, message, spec, tmp_path):
    prepare([spec], tmp_path / "out", vocabulary, OPTIONS)
    assert messages(tmp_path / "out") == ""
    edited(tmp_path / "out", lambda tokens, offsets: None)
    assert messages(tmp_path / "out") == ""
    edited(tmp_path / "out", change)
    assert message in messages(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "honest", "message"),
    [
        (lambda m: m["settings"].update(seed=5), False, "record_sha256 is another"),
        (lambda m: m["columns"].append("sex"), False, "record_sha256 is another"),
        (lambda m: m["columns"].append("sex"), True, "the manifest says"),
        (lambda m: m["columns"].clear(), True, "the manifest says"),
        (lambda m: m["settings"].update(block_cells=1), False, "settings.block_cells is 1"),
    ],
)
def test_settings_and_columns_of_the_manifest_are_checked(change, honest, message, spec, tmp_path):
    folder = tmp_path / "out"
    prepare([spec], folder, PLAIN, OPTIONS)
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    write(folder, manifest, honest)
    assert message in messages(folder)


def test_a_full_disk_says_how_much_is_needed(tmp_path):
    with (
        pytest.raises(OSError, match="No space") as caught,
        full_disk_named(tmp_path, 5 << 30),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "about 5.00 GiB are needed in all, 5.00 GiB more" in caught.value.__notes__[0]


def test_nothing_is_held_out_where_nothing_is_wanted(spec, tmp_path):
    for by in ("cell", "donor"):
        options = PrepareOptions(heldout_share=0, heldout_by=by)
        manifest = prepare([spec], tmp_path / by, PLAIN, options)
        assert {s["split"] for s in manifest["shards"]} == {"train"}
        assert messages(tmp_path / by) == ""
