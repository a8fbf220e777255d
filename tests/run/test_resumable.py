"""Stage tables are whole files, resume to the same bytes, and name in one line what is broken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from rag_geotoken.errors import GeoError
from rag_geotoken.run import resumable
from rag_geotoken.storage import files, progress
from rag_geotoken.storage import parquet as tables

KEYS = [f"photo-{i}" for i in range(10)]
RECIPE = {"encoder": "tiny", "seed": 7}


def rows(at: slice) -> pa.Table:
    """Make two rows a photo, so that rows and photos differ in number."""
    position = np.repeat(np.arange(at.start, at.stop), 2)
    vectors = np.sin(np.arange(6) + position[:, None]).astype(np.float32)
    return pa.table({"id": [KEYS[i] for i in position], "image": tables.fixed_list(vectors)})


class Worker:
    """Work that records its blocks and stops at a given one, as a killed run would."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.blocks: list[tuple[int, int]] = []

    def __call__(self, at: slice) -> pa.Table:
        if len(self.blocks) == self.stop_at:
            raise KeyboardInterrupt
        self.blocks.append((at.start, at.stop))
        return rows(at)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "photos.parquet"
    tables.write_table(path, pa.table({"id": KEYS}))
    return path


def make(folder: Path, source: Path, work: Worker, **change: object) -> Path:
    arguments: dict[str, Any] = {"recipe": RECIPE, "inputs": [source], "keys": KEYS, "block": 3, "alone": True} | change
    return resumable.stage(folder, "encode", work=work, **arguments)


def contents(folder: Path) -> dict[str, Any]:
    """Every file's bytes, and manifests without their seconds."""
    return {path.name: timeless(path) if path.suffix == ".json" else path.read_bytes() for path in folder.iterdir()}


def timeless(manifest: Path) -> dict[str, Any]:
    return {name: value for name, value in files.read_json(manifest).items() if name != "seconds"}


# tables


@pytest.mark.parametrize("shape", [(5, 4), (0, 3), (5, 3, 2), (1, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
def test_vectors_survive_parquet(tmp_path: Path, shape: tuple[int, ...], dtype: type) -> None:
    array: NDArray[Any] = (np.random.default_rng(0).normal(size=shape) * 100).astype(dtype)
    path = tmp_path / "a.parquet"
    tables.write_table(path, pa.table({"image": tables.fixed_list(array), "n": np.arange(len(array))}))
    table = tables.read_table(path)
    twice = pa.concat_tables([table, table])["image"], np.concatenate([array, array])
    for column, expected in (
        (table["image"], array),
        (table["n"], np.arange(len(array))),
        (table.slice(2)["image"], array[2:]),
        twice,
    ):
        np.testing.assert_array_equal(tables.to_numpy(column), expected, strict=True)


def test_vectors_are_not_copied() -> None:
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    column = pa.table({"image": tables.fixed_list(array)})["image"]
    assert np.shares_memory(tables.to_numpy(column), array)
    assert np.shares_memory(tables.to_numpy(column.slice(1, 2)), array)
    np.testing.assert_array_equal(tables.to_numpy(column.slice(1, 2)), array[1:3])


def test_a_missing_vector_is_an_error() -> None:
    with pytest.raises(GeoError, match="without a vector"):
        tables.to_numpy(pa.array([[1.0, 2.0], None], pa.list_(pa.float64(), 2)))
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        tables.fixed_list(np.zeros(3))


def test_columns_are_chosen_in_order_and_missing_ones_named(tmp_path: Path) -> None:
    path = tmp_path / "split=test" / "a.parquet"
    tables.write_table(path, pa.table({"id": ["a"], "lat": [1.0], "lon": [2.0]}))
    assert tables.read_table(path).column_names == ["id", "lat", "lon"]
    assert tables.read_table(path, ["lon", "id"]).column_names == ["lon", "id"]
    with pytest.raises(GeoError, match=r"a\.parquet has no column place, author: delete it"):
        tables.read_table(path, ["id", "place", "author"])


def test_missing_and_broken_tables_give_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with pytest.raises(GeoError, match=r"there is no .*a\.parquet: run the stage"):
        tables.read_table(path)
    tables.write_table(path, rows(slice(0, 10)))
    whole = path.read_bytes()
    damaged = whole[:8] + bytes(200) + whole[208:]
    for broken in (b"", b"PAR1", whole[:-1], whole[: len(whole) // 2], damaged):
        path.write_bytes(broken)
        with pytest.raises(GeoError, match=r"a\.parquet is not a whole Parquet table: delete it") as error:
            tables.read_table(path)
        assert "\n" not in str(error.value)
    with pytest.raises(GeoError, match="not a whole Parquet table"):
        tables.read_table(tmp_path)


# stages


@pytest.mark.parametrize("alone", [True, False])
def test_a_stage_gives_its_rows_and_a_manifest(tmp_path: Path, source: Path, alone: bool) -> None:
    work, reported = Worker(), list[int]()
    path = make(tmp_path / "run", source, work, progress=reported.append, alone=alone)
    assert sorted(work.blocks) == [(0, 3), (3, 6), (6, 9), (9, 10)] and reported == [3, 3, 3, 1]
    assert tables.read_table(path).equals(rows(slice(0, 10)))
    assert sorted(contents(path.parent)) == ["encode.json", "encode.parquet"]
    manifest = files.read_json(path.with_suffix(".json"))
    assert manifest["stage"] == "encode" and manifest["recipe"] == RECIPE and manifest["seed"] == 7
    assert manifest["rows"] == 20 and manifest["parquet_sha256"] == files.file_sha256(path)
    assert manifest["inputs"] == [{"file": "photos.parquet", "sha256": files.file_sha256(source)}]
    assert set(manifest["versions"]) == {"python", "numpy", "torch", "transformers", "faiss-cpu", "pillow", "pyarrow"}
    assert str(tmp_path) not in path.with_suffix(".json").read_text()


def test_a_finished_stage_does_nothing(tmp_path: Path, source: Path) -> None:
    path = make(tmp_path / "run", source, Worker())
    before, reported = path.stat(), list[int]()
    work = Worker()
    assert make(tmp_path / "run", source, work, progress=reported.append) == path
    assert work.blocks == [] and sum(reported) == len(KEYS) and path.stat() == before


@pytest.mark.parametrize(
    "change", [{"recipe": RECIPE | {"seed": 8}}, {"keys": KEYS[:-1]}, {"block": 4}, {"inputs": []}]
)
def test_another_recipe_keys_or_block_makes_it_anew(tmp_path: Path, source: Path, change: dict[str, object]) -> None:
    make(tmp_path / "run", source, Worker())
    work = Worker()
    make(tmp_path / "run", source, work, **change)
    assert len(work.blocks) >= 3


def test_another_input_or_a_damaged_table_makes_it_anew(tmp_path: Path, source: Path) -> None:
    path = make(tmp_path / "run", source, Worker())
    good = contents(path.parent)
    for spoil in (path.unlink, path.with_suffix(".json").unlink, lambda: path.write_bytes(good[path.name] + b"x")):
        spoil()
        make(tmp_path / "run", source, Worker())
        assert contents(path.parent) == good
    tables.write_table(source, pa.table({"id": [*KEYS, "more"]}))
    work = Worker()
    make(tmp_path / "run", source, work)
    assert len(work.blocks) == 4


@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_stopped_and_resumed_gives_the_same_bytes(tmp_path: Path, source: Path, stop_at: int) -> None:
    make(tmp_path / "through", source, Worker())
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "run", source, Worker(stop_at))
    assert not (tmp_path / "run" / "encode.parquet").exists()
    work, reported = Worker(), list[int]()
    make(tmp_path / "run", source, work, progress=reported.append)
    assert len(work.blocks) == 4 - stop_at and sum(reported) == len(KEYS)
    assert contents(tmp_path / "run") == contents(tmp_path / "through")


def test_stopped_between_table_and_manifest(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "through", source, Worker())

    def killed(path: Path, obj: object) -> None:
        if path.name == "encode.json":
            raise KeyboardInterrupt
        files.write_json(path, obj)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(resumable, "write_json", killed)
        make(tmp_path / "run", source, Worker())
    work = Worker()
    make(tmp_path / "run", source, work)
    assert work.blocks == [] and contents(tmp_path / "run") == contents(tmp_path / "through")


def test_broken_parts_are_made_again_and_strange_ones_removed(tmp_path: Path, source: Path) -> None:
    make(tmp_path / "through", source, Worker())
    for recipe in (RECIPE | {"seed": 8}, RECIPE):
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "run", source, Worker(2), recipe=recipe)
    parts = sorted((tmp_path / "run" / ".encode.parts").glob("*.parquet"))
    assert len(parts) == 2 and len({part.name.split("-")[0] for part in parts}) == 1
    parts[0].write_bytes(parts[0].read_bytes()[:-9])
    work = Worker()
    make(tmp_path / "run", source, work)
    assert work.blocks == [(0, 3), (6, 9), (9, 10)]
    assert contents(tmp_path / "run") == contents(tmp_path / "through")


def test_killed_outright_and_resumed_gives_the_same_bytes(tmp_path: Path, source: Path) -> None:
    make(tmp_path / "through", source, Worker())
    script = (
        "import os, signal, sys; from pathlib import Path; import test_resumable as t\n"
        "class Killed(t.Worker):\n"
        "    def __call__(self, at):\n"
        "        return os.kill(os.getpid(), signal.SIGKILL) if at.start == 6 else super().__call__(at)\n"
        "t.make(Path(sys.argv[1]), Path(sys.argv[2]), Killed())\n"
    )
    here = str(Path(__file__).parent)
    killed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run"), str(source)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path])},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    work = Worker()
    make(tmp_path / "run", source, work)
    assert work.blocks == [(6, 9), (9, 10)] and contents(tmp_path / "run") == contents(tmp_path / "through")


def test_seconds_are_those_of_the_work_whenever_it_was_done(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("rag_geotoken.run.resumable.time.perf_counter", lambda: now[0])

    class Slow(Worker):
        """Work whose block takes two seconds."""

        def __call__(self, at: slice) -> pa.Table:
            now[0] += 2.0
            return super().__call__(at)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "run", source, Slow(3))
    now[0] = 1000.0  # another process, another clock
    path = make(tmp_path / "run", source, Slow())
    assert files.read_json(path.with_suffix(".json"))["seconds"] == 8.0
    before = path.with_suffix(".json").read_bytes()
    assert make(tmp_path / "run", source, Slow()).with_suffix(".json").read_bytes() == before


def test_no_keys_and_missing_inputs(tmp_path: Path, source: Path) -> None:
    with pytest.raises(GeoError, match="stage encode has no photos"):
        make(tmp_path / "run", source, Worker(), keys=[])
    with pytest.raises(GeoError, match=r"cannot read .*none.parquet"):
        make(tmp_path / "run", tmp_path / "none.parquet", Worker())
    assert not (tmp_path / "run").exists()


# progress


def test_plain_lines_come_at_most_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("rag_geotoken.storage.progress.time.monotonic", lambda: now[0])
    with progress.progress_bar(30, "encode") as advance:
        for _ in range(30):
            now[0] += 0.9
            advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "encode: 12 of 30, about 16 s left",
        "encode: 24 of 30, about 5 s left",
    ]


def test_quick_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar(2, "encode") as advance:
        advance(2)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_and_errors_pass_through(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(GeoError, match="stop"), progress.progress_bar(2, "encode [b]") as advance:
        advance(1)
        raise GeoError("stop")
    out, err = capsys.readouterr()
    assert out == "" and "encode [b]" in err and "1/2" in err
