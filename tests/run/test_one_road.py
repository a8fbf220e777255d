"""One road: memory, a folder, a resumed folder, any batch, Python and the command line give the same answers."""

from __future__ import annotations

import csv
import io
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from command import call
from PIL import Image
from tiny import OneLine

from rag_geotoken import Geolocator, Options
from rag_geotoken.mllm.session import MllmSession
from rag_geotoken.options import CHOICES, VERIFIERS, parse_option
from rag_geotoken.photos import blue_marble
from rag_geotoken.run import resumable
from rag_geotoken.run.road import road
from rag_geotoken.run.walk import RunFolder, answered, embedded
from rag_geotoken.storage.parquet import read_table, write_table
from rag_geotoken.types import Answers, Photos, Prediction, Tables, Verdict
from rag_geotoken.verifiers import Verifier

PHOTOS = 16
EVERY = Options(
    neighbors=6, beam_width=4, samples=6, openings=8, gps_places=8, area=True, verify=tuple(VERIFIERS), picture_size=64
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Views as PNG files; the last is the first under another name."""
    folder = tmp_path_factory.mktemp("pictures")
    views = blue_marble.draw_views("validation", PHOTOS - 1, 4)
    paths = [folder / f"{i:02}.png" for i in range(PHOTOS)]
    for path, pixels in zip(paths, blue_marble.cut(np.concatenate([views, views[:1]])), strict=True):
        Image.fromarray(pixels).save(path)
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def asking(geolocator: Geolocator, llava: Path) -> Geolocator:
    """The tiny models with a tiny multimodal one."""
    return geolocator.replace(mllm=MllmSession.open(str(llava)))


def photos_table(folder: Path, pictures: list[str]) -> Path:
    unknown = pa.nulls(len(pictures), pa.float64())
    names = pa.array(pictures)
    columns = {"id": names, "image": names, "lat": unknown, "lon": unknown}
    nobody = pa.nulls(len(pictures), pa.string())
    write_table(folder / "photos.parquet", pa.table(columns | {"place": nobody, "author": nobody}))
    return folder


def in_memory(models: Geolocator, options: Options, pictures: list[str], batch: int) -> tuple[Tables, list[Prediction]]:
    """All tables and the answers of a walk in memory, so many photos at a time."""
    parts, answers, photos = [], [], Photos.of(pictures, pictures)
    for start in range(0, len(pictures), batch):
        tables = embedded(models, options, photos[start : start + batch])
        answers += answered(models, options, tables).rows()
        parts.append(tables)
    whole = Tables(photos)
    for stage in road(options)[:-1]:
        key = stage.name.split("-")[1] if stage.name.startswith("verdicts-") else None
        diverse = stage.name == "verdicts-mllm-diversify"
        found = [
            part.diverse if diverse else vars(part)[stage.name] if key is None else part.verdicts[key] for part in parts
        ]
        whole.put(stage.name, joined(found))
    return whole, answers


def joined(parts: list[Any]) -> Any:
    """Results of several batches in one, the narrower ones padded with what counts for nothing."""
    columns = []
    for name in vars(parts[0]):
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], np.ndarray) and values[0].ndim > 1:
            width = max(value.shape[1] for value in values)
            empty = np.nan if name in ("lat_lon", "confidence") else 0
            wide = [[(0, 0), (0, width - v.shape[1]), *[(0, 0)] * (v.ndim - 2)] for v in values]
            values = [np.pad(v, pad, constant_values=empty) for v, pad in zip(values, wide, strict=True)]
        flat = isinstance(values[0], np.ndarray)
        columns.append(np.concatenate(values) if flat else [one for value in values for one in value])
    return type(parts[0])(*columns)


def same(one: Tables, other: Tables, options: Options) -> None:
    """The same neighbors, cells, candidates and sources; numbers within 1e-5."""
    masks = one.pool.mask, other.pool.mask
    for stage in road(options)[:-1]:
        if stage.name == "verdicts-mllm-diversify":
            pairs = [(t.diverse.lat_lon[np.isfinite(t.diverse.lat_lon)],) for t in (one, other)]
            assert one.diverse.raw == other.diverse.raw
        elif stage.name.startswith("verdicts-"):
            verdicts = [tables.verdicts[stage.name.split("-")[1]] for tables in (one, other)]
            pairs = [(verdict.scores[verdict.mask],) for verdict in verdicts]
        elif stage.name == "pool":
            pairs = [
                (t.pool.lat_lon[m], t.pool.log_weight[m], t.pool.source[m])
                for t, m in zip((one, other), masks, strict=True)
            ]
        elif stage.name == "posterior":
            pairs = [(np.sort(t.posterior.mass)[:, -8:],) for t in (one, other)]  # equal masses come in any order
        else:
            pairs = [
                tuple(v for v in vars(getattr(t, stage.name)).values() if not isinstance(v, list)) for t in (one, other)
            ]
        for a, b in zip(*pairs, strict=True):
            if np.issubdtype(a.dtype, np.floating):
                np.testing.assert_allclose(a, b, atol=1e-5, err_msg=stage.name)
            else:
                np.testing.assert_array_equal(a, b, err_msg=stage.name)


def same_answers(one: list[Prediction], other: list[Prediction]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a.error, a.source, a.verified) == (b.error, b.source, b.verified)
        if a.error is None:
            np.testing.assert_allclose((a.lat, a.lon), (b.lat, b.lon), atol=1e-5)
            np.testing.assert_allclose(a.confidence, b.confidence, atol=1e-5)  # type: ignore[arg-type]
        assert (a.area_km2 is None) == (b.area_km2 is None)
        if a.area_km2 is not None:
            assert a.area_km2 == pytest.approx(b.area_km2, rel=1e-3)


LONG = [pytest.param(mode, marks=pytest.mark.slow) for mode in CHOICES["mllm_mode"] if mode != "pool"]


@pytest.mark.parametrize("mode", ["pool", *LONG])
def test_memory_and_folders_and_batches_agree_with_every_verifier(
    mode: str, asking: Geolocator, pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, pictures = (
        replace(EVERY, mllm_mode=mode, answers=1),
        pictures[: 16 if mode == "pool" else 3],
    )  # free answers are long
    whole, answers = in_memory(asking, options, pictures, 256)
    assert all(answer.error is None and answer.lat is not None for answer in answers)
    same_answers(asking(pictures, options), answers)
    for batch in (1, 7) if mode == "pool" else (1,):
        tables, found = in_memory(asking, options, pictures, batch)
        same(tables, whole, options)
        same_answers(found, answers)
    run = RunFolder(photos_table(tmp_path / "run", pictures), asking)
    files = run.walk(options)
    same(run.tables(options, files), whole, options)
    same_answers(run.result(files["predictions"], Answers).rows(), answers)
    # Stopped in every stage after some blocks, and gone on with.
    monkeypatch.setattr(resumable, "BLOCK", 3)
    half = photos_table(tmp_path / "half", pictures)
    write, written = resumable.write_table, []

    def stop(path: Path, table: pa.Table) -> None:
        written.append(path)
        if len(written) % 3 == 0:
            raise KeyboardInterrupt
        write(path, table)

    monkeypatch.setattr(resumable, "write_table", stop)
    for _ in range(200):
        try:
            resumed = RunFolder(half, asking)
            files = resumed.walk(options)
            break
        except KeyboardInterrupt:
            continue
    same_answers(resumed.result(files["predictions"], Answers).rows(), answers)


def test_a_picture_has_one_answer_under_any_name_and_anywhere(geolocator: Geolocator, pictures: list[str]) -> None:
    options = replace(EVERY, verify=("alignment", "reward", "visual", "look"))
    answers = geolocator(pictures, options)
    same_answers(answers[:1], answers[-1:])
    same_answers(geolocator(pictures[0], options), answers[:1])
    same_answers(geolocator(pictures[::-1], options, batch=3)[::-1], answers)
    cells = [in_memory(geolocator, options, [pictures[i]], 1)[0].candidates for i in (0, -1)]
    np.testing.assert_array_equal(cells[0].tokens, cells[1].tokens)


def test_paths_bytes_pillow_and_arrays_are_one_picture(geolocator: Geolocator, pictures: list[str]) -> None:
    path = Path(pictures[3])
    picture = Image.open(path)
    given: list[Any] = [path, str(path), path.read_bytes(), picture, np.asarray(picture)]
    answers = [geolocator(one, EVERY_PLAIN)[0] for one in given]
    together = geolocator(given, EVERY_PLAIN)
    for answer in (*answers, *together):
        same_answers([answer], answers[:1])
    assert [answer.id for answer in together] == [str(path), str(path), "2", "3", "4"]
    picture.load()  # still open: it belongs to the caller
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3
    picture.transpose(Image.Transpose.ROTATE_180).save(turned, "PNG", exif=exif)
    same_answers(geolocator(Image.open(turned), EVERY_PLAIN), answers[:1])


EVERY_PLAIN = replace(EVERY, verify=("alignment",))


def test_what_is_no_picture_has_an_error(geolocator: Geolocator, pictures: list[str], one_line: OneLine) -> None:
    wrong: list[Any] = [b"no picture", np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), "missing.png"]
    answers = geolocator([*wrong, pictures[0]])
    assert all(answer.error and answer.lat is None for answer in answers[:4]) and answers[4].error is None
    assert geolocator([]) == [] and geolocator(wrong[0])[0].error
    with one_line("2 names for 1 pictures"):
        geolocator(pictures[:1], ids=["a", "b"])


# Every option from both doors. What stands here is another value than the default; a new field fails until it is added.
OTHER: dict[str, tuple[str, dict[str, str]]] = {
    "neighbors": ("5", {}),
    "exact": ("", {}),
    "other_authors": ("", {}),
    "within": ("47,8,3000", {}),
    "gps_places": ("3", {}),
    "propose": ("greedy", {}),
    "beam_width": ("3", {}),
    "samples": ("4", {}),
    "temperature": ("2.5", {}),
    "top_p": ("0.5", {}),
    "epsilon": ("0.2", {}),
    "seed": ("3", {}),
    "openings": ("2", {"area": ""}),
    "sources": ("neighbor", {}),
    "verify": ("visual,look", {}),
    "select": ("medoid", {}),
    "mllm_mode": ("free", {"verify": "mllm"}),
    "evidence": ("no", {"verify": "mllm"}),
    "near_pictures": ("", {"verify": "mllm"}),
    "answers": ("1", {"verify": "none", "mllm_mode": "diversify"}),
    "picture_size": ("24", {"verify": "mllm"}),
    "area": ("", {}),
    "max_area_km2": ("100000", {}),
    "least_confidence": ("0.05", {}),
}
FLAGS = {"max_area_km2": "--max-area", "least_confidence": "--abstain-below", "evidence": "--no-evidence"}


def test_every_option_is_tried_and_known_to_a_stage() -> None:
    names = {item.name for item in fields(Options)}
    assert set(OTHER) == names
    every = Options(verify=tuple(VERIFIERS), mllm_mode="diversify", other_authors=True, area=True)
    assert {name for stage in road(every) for name in stage.depends} == names


@pytest.mark.parametrize("name", OTHER)
def test_an_option_says_the_same_from_python_and_from_the_command_line(
    name: str, asking: Geolocator, pictures: list[str], index_folder: Path, weights: Path, llava: Path, tmp_path: Path
) -> None:
    value, more = OTHER[name]
    given: list[object] = []
    values: dict[str, Any] = {"samples": 6, "beam_width": 4}
    for option, text in ({"samples": "6", "beam_width": "4"} | more | {name: value}).items():
        given.append(FLAGS.get(option, "--" + option.replace("_", "-")))
        given += [text] * (text not in ("", "no"))
        kind = float if option == "max_area_km2" else type(getattr(Options(), option))
        values[option] = (
            text != "no" if kind is bool else kind(text) if kind in (int, float) else parse_option(option, text)
        )
    options = Options(**values)
    model = ["--mllm", llava] if options.asks_mllm else []
    out, few = tmp_path / "answers.csv", pictures[: 2 if options.diverse else 8]
    command = ["locate", *few, "--index", index_folder, "--weights", weights, "--out", out]
    assert call(*command, *model, *given) == 0
    answers = asking(few, options)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == few
    for row, answer in zip(rows, answers, strict=True):
        assert (row["error"] or None) == answer.error and (row["source"] or None) == answer.source
        if answer.lat is not None and answer.lon is not None:
            assert float(row["lat"]) == pytest.approx(answer.lat, abs=1e-5)
            assert float(row["lon"]) == pytest.approx(answer.lon, abs=1e-5)


def test_an_author_is_passed_over_in_memory_too(geolocator: Geolocator, pictures: list[str]) -> None:
    index = geolocator.index
    near = in_memory(geolocator, EVERY_PLAIN, pictures[:1], 1)[0].neighbors.rows[0]
    authors = [None] * len(index.rows)
    authors[int(near[0])] = "Ann"  # type: ignore[call-overload]
    column = index.rows.column_names.index("author")
    rows = index.rows.set_column(column, "author", pa.array(authors, pa.string()))
    signed = Geolocator(geolocator.alignment, geolocator.tokens, replace(index, rows=rows), geolocator.tuning)
    options = Options(sources=("neighbor",), verify=(), select="log-probability", other_authors=True)
    by_ann = signed(pictures[0], options, authors=["Ann"])[0]
    by_nobody = signed(pictures[0], options)[0]
    assert (by_nobody.lat, by_nobody.lon) == tuple(index.lat_lon[near[0]].tolist())
    assert (by_ann.lat, by_ann.lon) == tuple(index.lat_lon[near[1]].tolist())


def test_asking_without_a_model_is_one_line(geolocator: Geolocator, pictures: list[str], one_line: OneLine) -> None:
    with one_line("which multimodal model"):
        geolocator(pictures[:1], Options(verify=("mllm",)))


def test_a_new_verifier_needs_its_file_and_its_line(
    geolocator: Geolocator, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of a module that nothing else knows reach the decision."""
    import sys
    from types import ModuleType

    def scores(models: Any, options: Any, tables: Tables, pool: Any) -> Verdict:
        north = 100 * pool.lat_lon[..., 0].astype(np.float32)
        return Verdict(np.where(pool.mask, north, 0.0).astype(np.float32), pool.mask)

    module = ModuleType("rag_geotoken.verifiers.northernmost")
    module.VERIFIER = Verifier(scores, Verdict, reads=())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(VERIFIERS, "northernmost", "northernmost")  # the line
    answer = geolocator(pictures[0], Options(verify=("northernmost",), samples=4))[0]
    pool = in_memory(geolocator, Options(verify=("alignment",), samples=4), pictures[:1], 1)[0].pool
    assert answer.lat == pytest.approx(pool.lat_lon[pool.mask][:, 0].max())


def test_an_old_table_of_another_version_of_a_stage_is_not_taken(
    geolocator: Geolocator, pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(photos_table(tmp_path, pictures[:3]), geolocator)
    run.walk(EVERY_PLAIN)
    again = RunFolder(tmp_path, geolocator)
    again.walk(EVERY_PLAIN)
    assert set(again.reused) == set(again.seconds) and not run.reused
    from rag_geotoken.run import walk

    monkeypatch.setattr(
        walk, "road", lambda o: [replace(s, version=s.version + 1) if s.name == "pool" else s for s in road(o)]
    )
    other = RunFolder(tmp_path, geolocator)
    other.walk(EVERY_PLAIN)
    assert "pool" not in other.reused and "neighbors" in other.reused
    assert read_table(tmp_path / "pool.parquet").num_rows
