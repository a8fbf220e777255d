"""Files appear whole or not at all, and errors say in one line what is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny import OneLine

from rag_geotoken.errors import GeoError
from rag_geotoken.storage import files


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    files.write_text(path, "old")

    def fail(beside: Path) -> None:
        beside.write_text("half")
        assert beside.parent == path.parent and beside.name.startswith(".") and beside.suffix == ".txt"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_whole(path, fail)
    assert contents(path.parent) == {"a.txt": b"old"}


def test_a_folder_that_cannot_be_made_gives_one_line(tmp_path: Path, one_line: OneLine) -> None:
    (tmp_path / "file").write_text("")
    with one_line(r"cannot write .*x\.json: a file stands where a folder is needed; choose"):
        files.write_json(tmp_path / "file" / "x.json", {})
    (tmp_path / "taken").mkdir()
    with pytest.raises(GeoError, match="cannot write"):
        files.write_text(tmp_path / "taken", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_gives_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(GeoError, match=r"cannot write .*: permission denied; choose a folder that can be written"):
        files.write_text(tmp_path / "a.txt", "text")


def test_a_disk_that_is_full_gives_one_line(tmp_path: Path) -> None:
    def full(beside: Path) -> None:
        beside.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(GeoError, match="no space left on device"):
        files.write_whole(tmp_path / "a.parquet", full)
    assert contents(tmp_path) == {}


def test_json_round_trip_and_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"b": [1, 2.5], "a": "São"})
    assert files.read_json(path) == {"b": [1, 2.5], "a": "São"}
    assert list(files.read_json(path)) == ["b", "a"]
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"median_km": float("nan")})
    assert files.read_json(path)["a"] == "São"
    for broken in (b"{", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(broken)
        with pytest.raises(GeoError, match=r"a\.json is not readable JSON"):
            files.read_json(path)
    with pytest.raises(GeoError, match="there is no"):
        files.read_json(tmp_path / "none.json")


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    stray, foreign = tmp_path / ".a+b.0123abcd.json", tmp_path / ".a.0123abcd.json"
    stray.write_text("half")
    foreign.write_text("another file's")
    files.write_json(tmp_path / "a+b.json", {})
    assert not stray.exists() and foreign.exists()
