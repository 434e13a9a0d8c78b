"""Files and folders that are complete or absent."""

from __future__ import annotations

import os

import pytest

from data_prep.files import complete_file, read_json_lines, write_to_disk

pytestmark = pytest.mark.quick


def test_a_file_is_as_it_was_until_it_is_complete(tmp_path):
    out = tmp_path / "a.json"
    out.write_text("old")
    with complete_file(out) as aside:
        aside.write_text("new")
        assert out.read_text() == "old"
    assert out.read_text() == "new"
    with pytest.raises(KeyError), complete_file(out) as aside:
        aside.write_text("half")
        raise KeyError
    assert out.read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_takes_the_place_of_what_a_killed_process_left(tmp_path):
    out = tmp_path / "epoch-00001"
    with pytest.raises(KeyError), complete_file(out) as aside:
        aside.mkdir()
        (aside / "half").touch()
        left = aside.rename(tmp_path / "kept")  # as if the process were gone now
        raise KeyError
    left.rename(aside)
    with complete_file(out) as aside:
        aside.mkdir()
        (aside / "whole").touch()
    assert [p.name for p in out.iterdir()] == ["whole"]
    assert list(tmp_path.iterdir()) == [out]


def test_to_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """The system's own call is watched: a power failure cannot be had."""
    seen, force = [], os.fsync

    def watched(file: int) -> None:
        seen.append([p.name for p in tmp_path.iterdir()])
        force(file)

    monkeypatch.setattr(os, "fsync", watched)
    write_to_disk(tmp_path / "a.json", "text")
    assert seen == [[".a.json.partial"]]
    assert (tmp_path / "a.json").read_text() == "text"


def test_a_torn_line_is_skipped_and_said(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    assert read_json_lines(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
    assert caplog.messages == [f"{path}: a torn line is skipped"]
