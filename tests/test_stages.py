"""Stopping and going on: between stages, inside one, and by a real kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rag_geotoken import stages, tables
from rag_geotoken.demo import run_demo
from rag_geotoken.tables import read_table

GALLERY, TEST_N = 400, 60
STAGES = ("photos", "embeddings", "neighbours", "candidates", "pool", "verdicts", "predictions-pool+alignment")


def run(out: Path) -> None:
    run_demo(out, TEST_N, seed=1, gallery=GALLERY)


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a run but those that hold its seconds."""
    files = [p for p in out.rglob("*") if p.is_file() and p.name not in ("metrics.json", "report.html")]
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    run(out)
    return contents(out)


def test_a_run_leaves_every_table_and_nothing_else(uninterrupted: dict[str, bytes]) -> None:
    for split in ("test", "unseen", "relief"):
        assert {f"{split}/{name}.parquet" for name in STAGES} <= set(uninterrupted)
    assert not [name for name in uninterrupted if "/." in name]


@pytest.mark.parametrize("stopped", STAGES)
def test_stopped_before_a_stage_ends_goes_on_to_the_same_bytes(
    stopped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, bytes]
) -> None:
    whole = tables._write_tables

    def stop(path: Path, parts: object) -> int:
        if Path(path).name == f"{stopped}.parquet":
            raise KeyboardInterrupt
        return whole(path, parts)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(tables, "_write_tables", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert not list(tmp_path.rglob(f"{stopped}.parquet"))
    run(tmp_path)
    assert contents(tmp_path) == uninterrupted


def test_killed_processes_end_in_the_same_bytes(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    program = (
        f"from pathlib import Path; from rag_geotoken.demo import run_demo; "
        f"run_demo(Path({str(tmp_path)!r}), {TEST_N}, seed=1, gallery={GALLERY})"
    )
    # Killed as soon as a table of the next folder is there, wherever the process is by then.
    for marker in ("index/stages/photos.parquet", "test/neighbours.parquet", "relief/embeddings.parquet"):
        process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while not (tmp_path / marker).exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    run(tmp_path)
    assert contents(tmp_path) == uninterrupted


def test_done_stages_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    monkeypatch.setattr(stages, "load_pictures", lambda *_: pytest.fail("pictures were read again"))
    monkeypatch.setattr("rag_geotoken.pipeline.Geolocator.propose", lambda *_: pytest.fail("decoded again"))
    run(tmp_path)


def test_other_options_redo_only_what_depends_on_them(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "test" / "neighbours.parquet").stat().st_mtime_ns
    (tmp_path / "test" / "pool.parquet").unlink()
    run(tmp_path)
    assert (tmp_path / "test" / "neighbours.parquet").stat().st_mtime_ns == before
    assert len(read_table(tmp_path / "test" / "pool.parquet")) > TEST_N
