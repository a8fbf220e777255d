"""Approximate indexes: which factory, what they find against an exact search, what they hold and refuse."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from tiny import OneLine

from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.geo.sphere import to_unit
from rag_geotoken.index import approximate
from rag_geotoken.index import build as indexing
from rag_geotoken.index.approximate import GIB, choose_factory, inverted_lists, recall_at, sample_size
from rag_geotoken.index.build import Plan, build_index
from rag_geotoken.index.exact import scan
from rag_geotoken.index.geo_index import GeoIndex
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.run.build_index import make_index
from rag_geotoken.storage.parquet import read_table, to_numpy

N, K = 600, 10
WEIGHTS = (0.5, 1.0, 0.5)
SOURCE = f"blue-marble:gallery,n={N}"
FACTORIES = ["HNSW16,SQfp16", "IVF16,SQfp16", "RR32,IVF16,SQ8"]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, alignment: GeoAlignment, weights: Path) -> GeoIndex:
    folder = tmp_path_factory.mktemp("exact")
    make_index(folder, SOURCE, alignment)
    return GeoIndex.load(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, alignment: GeoAlignment, weights: Path) -> dict[str, Path]:
    """An index of each factory, from the same tables."""
    folders = {factory: tmp_path_factory.mktemp("index") for factory in FACTORIES}
    first = folders[FACTORIES[0]]
    for factory, folder in folders.items():
        if folder != first:
            shutil.copytree(first / "stages", folder / "stages")
        make_index(folder, SOURCE, alignment, Plan(factory, recall=0.9))
    return folders


@pytest.fixture(scope="module", params=FACTORIES)
def index(request: pytest.FixtureRequest, folders: dict[str, Path], alignment: GeoAlignment) -> GeoIndex:
    return GeoIndex.load(folders[request.param], alignment.heads)


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[FACTORIES[0]], tmp_path / "copy"))


def queries(index: GeoIndex, alignment: GeoAlignment, count: int = 40) -> NDArray[np.float32]:
    """Photos between those of the gallery."""
    rng = np.random.default_rng(3)
    pairs = rng.integers(0, N, (2, count))
    assert index.projections is not None
    return alignment.heads(index.projections[pairs].astype(np.float32).mean(axis=0))


def ids(index: GeoIndex, rows: NDArray[np.int64]) -> list[list[str]]:
    return [index.rows["id"].take(row).to_pylist() for row in rows]


def with_authors(index: GeoIndex, names: list[str | None]) -> GeoIndex:
    column = index.rows.column_names.index("author")
    return replace(index, rows=index.rows.set_column(column, "author", pa.array(names, pa.string())))


def overlap(ids: list[list[str]], expected: list[list[str]]) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(ids, expected, strict=True)]))


def test_every_photo_is_there_once_with_its_embedding(index: GeoIndex, exact: GeoIndex) -> None:
    assert sorted(index.rows["id"].to_pylist()) == sorted(exact.rows["id"].to_pylist())
    row_of = {name: row for row, name in enumerate(exact.rows["id"].to_pylist())}
    same = np.array([row_of[name] for name in index.rows["id"].to_pylist()])
    assert index.rows.equals(exact.rows.take(same))
    np.testing.assert_allclose(index.vectors(np.arange(N)), exact.vectors(same), atol=2e-3)
    twice = index.vectors(np.array([[5, 3], [3, 0]]))
    np.testing.assert_allclose(twice[1, 0], index.vectors(np.array([3]))[0], atol=1e-6)


def test_it_finds_what_an_exact_search_finds(index: GeoIndex, exact: GeoIndex, alignment: GeoAlignment) -> None:
    photo = queries(index, alignment)
    near, truth = index.search(photo, K, WEIGHTS), exact.search(photo, K, WEIGHTS)
    assert overlap(ids(index, near.rows), ids(exact, truth.rows)) > 0.8
    compared = index.search(photo, K, WEIGHTS, exact=True)
    assert overlap(ids(index, compared.rows), ids(exact, truth.rows)) > 0.99
    np.testing.assert_allclose(compared.scores, truth.scores, atol=2e-3)
    # What the approximate search brings is compared by all three parts.
    parts = np.einsum("bpd,bkpd,p->bk", photo, index.vectors(near.rows), WEIGHTS)
    np.testing.assert_allclose(near.scores, parts, atol=1e-5)
    assert (np.diff(near.scores, axis=1) <= 0).all()


def test_the_least_similar_are_exact(index: GeoIndex, exact: GeoIndex, alignment: GeoAlignment) -> None:
    photo = queries(index, alignment)
    far, truth = (gallery.search(photo, K, WEIGHTS, dissimilar=True) for gallery in (index, exact))
    assert overlap(ids(index, far.rows), ids(exact, truth.rows)) > 0.99
    scores = exact.search(photo, N, WEIGHTS).scores
    np.testing.assert_allclose(truth.scores, scores[:, : -K - 1 : -1], atol=1e-5)


@pytest.mark.parametrize("few", [True, False])
def test_a_filter_comes_before_the_search(
    index: GeoIndex, exact: GeoIndex, alignment: GeoAlignment, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not few:  # through the approximate index, with a selector
        monkeypatch.setattr("rag_geotoken.index.geo_index.EXACT_ROWS", 0)
    photo, region = queries(index, alignment), (20.0, 10.0, 5000.0)
    keep, kept = index.mask(region), exact.mask(region)
    assert keep is not None and kept is not None and K < keep.sum() == kept.sum() < N / 2
    near, truth = index.search(photo, K, WEIGHTS, keep=keep), exact.search(photo, K, WEIGHTS, keep=kept)
    assert keep[near.rows].all() and kept[truth.rows].all()
    assert overlap(ids(index, near.rows), ids(exact, truth.rows)) > (0.99 if few else 0.75)
    order = exact.search(photo, N, WEIGHTS).rows
    assert truth.rows.tolist() == [rows[kept[rows]][:K].tolist() for rows in order]


def test_an_authors_photos_are_excluded(index: GeoIndex, exact: GeoIndex, alignment: GeoAlignment) -> None:
    """One author took most of the gallery, so that hardly any of the nearest photos are another's."""
    photo = queries(index, alignment, 12)
    names = [None if i % 10 == 0 else "rare" if i % 10 == 1 else "most" for i in range(N)]
    galleries = [with_authors(gallery, names) for gallery in (index, exact)]
    authors = ["most", "rare", None, "unheard of"] * 3
    for gallery in galleries:
        near = gallery.search(photo, K, WEIGHTS, authors=authors, exact=True)
        order = gallery.search(photo, N, WEIGHTS, exact=True).rows
        for i, author in enumerate(authors):
            allowed = [row for row in order[i].tolist() if author is None or names[row] != author]
            assert near.rows[i].tolist() == allowed[:K]
        np.testing.assert_array_equal(near.lat_lon, gallery.lat_lon[near.rows])
    near = galleries[0].search(photo, K, WEIGHTS, authors=authors)
    for rows, author in zip(near.rows, authors, strict=True):
        assert author is None or author not in [names[row] for row in rows]


def test_a_photo_never_finds_itself(index: GeoIndex) -> None:
    rows = np.array([0, 17, N - 1])
    digests = index.rows["digest"].take(rows).to_pylist()
    photo = index.vectors(rows)
    assert index.search(photo, 1, WEIGHTS).rows[:, 0].tolist() == rows.tolist()
    assert not (index.search(photo, K, WEIGHTS, digests).rows == rows[:, None]).any()


def test_the_manifest_says_what_was_measured(index: GeoIndex, folders: dict[str, Path]) -> None:
    facts = index.manifest
    assert facts["recall@20"] >= 0.9 and facts["queries"] == N // 10 and facts["rows"] == N
    assert facts["effort_name"] == ("efSearch" if facts["factory"].startswith("HNSW") else "nprobe")
    assert facts["effort"] >= 1 and facts["build_seconds"] >= 0
    assert set(facts["bytes"]) == {"index.faiss", "rows.parquet", "projections.npy", "cells.npy"}
    assert facts["memory_bytes"] == facts["bytes"]["index.faiss"]


def test_projections_are_read_as_they_were_written(folders: dict[str, Path]) -> None:
    """In blocks, held-out rows last."""
    folder = folders[FACTORIES[0]]
    table = read_table(folder / "stages" / "projections.parquet")
    made = dict(zip(table["id"].to_pylist(), to_numpy(table["projection"]), strict=True))
    index = GeoIndex.load(folder)
    assert index.projections is not None and isinstance(index.projections, np.memmap)
    for name, row in zip(index.rows["id"].to_pylist(), index.projections, strict=True):
        np.testing.assert_array_equal(made[name], row)


def test_building_again_does_nothing_and_another_plan_does(copy: Path, alignment: GeoAlignment, weights: Path) -> None:
    before = (copy / "index.faiss").stat().st_mtime_ns
    make_index(copy, SOURCE, alignment, Plan(FACTORIES[0], recall=0.9))
    assert (copy / "index.faiss").stat().st_mtime_ns == before
    assert make_index(copy, SOURCE, alignment, Plan("IVF4,SQ8"))["factory"] == "IVF4,SQ8"
    assert make_index(copy, SOURCE, alignment)["format"] == "rag-geotoken-index/1"
    assert not (copy / "projections.npy").exists()
    GeoIndex.load(copy)


def test_few_photos_left_of_many_are_searched_approximately_too(copy: Path, alignment: GeoAlignment) -> None:
    """The plan was made for all of a source; so few are enough for an exact index, of which there are no tables."""
    tables = copy / "stages" / "photos.parquet", copy / "stages" / "projections.parquet"
    manifest = build_index(copy, *tables, alignment.identity, plan=Plan(), heads=alignment.heads)
    assert manifest["factory"] == "IVF128,SQfp16" and manifest["recall@20"] >= 0.9


@pytest.mark.parametrize("name", ["index.faiss", "rows.parquet", "projections.npy", "cells.npy"])
@pytest.mark.parametrize("harm", ["cut", "changed", "missing"])
def test_truncated_changed_and_missing_files_are_named(copy: Path, name: str, harm: str, one_line: OneLine) -> None:
    path = copy / name
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.unlink()
    if harm != "missing":
        path.write_bytes(content[:-100] if harm == "cut" else content)
    with one_line(f"{name}.*build the index again"):
        GeoIndex.load(copy)


@pytest.mark.parametrize(
    "change", [{"dim": 16}, {"rows": N - 1}, {"cells": 3}, {"refine": 0}, {"effort": "x"}, {"refine": None}]
)
def test_a_manifest_that_does_not_fit_is_named(copy: Path, change: dict[str, object], one_line: OneLine) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with one_line("build it again"):
        GeoIndex.load(copy)


def test_without_heads_it_cannot_be_compared(copy: Path, one_line: OneLine) -> None:
    with one_line("open it with the model"):
        GeoIndex.load(copy).vectors(np.array([1]))


def test_the_road_goes_through_it(copy: Path, weights: Path) -> None:
    images = read_table(copy / "rows.parquet", ["image"])["image"].to_pylist()[:3]
    assert [p.error for p in Geolocator.from_pretrained(copy, weights)(images)] == [None] * 3


@pytest.mark.parametrize(
    ("factory", "words"), [("Nonsense", "no FAISS factory"), ("IVF4096,SQfp16", "at least 4096 rows")]
)
def test_a_factory_that_does_not_fit_is_refused(
    tmp_path: Path, alignment: GeoAlignment, weights: Path, factory: str, words: str, one_line: OneLine
) -> None:
    with one_line(words):
        make_index(tmp_path, "blue-marble:gallery,n=50", alignment, Plan(factory))


@pytest.mark.parametrize(
    ("rows", "dim", "memory", "recall", "factory"),
    [
        (24_000, 256, 16.0, 0.95, "Flat"),
        (65_536, 768, 16.0, 0.999, "Flat"),
        (65_537, 768, 16.0, 0.95, "IVF1024,SQfp16"),
        (400_000, 512, 16.0, 0.99, "IVF2048,SQfp16"),
        (400_000, 512, 16.0, 1.0, "Flat"),
        (1_000_000, 768, 16.0, 0.95, "IVF4096,SQfp16"),
        (5_000_000, 768, 16.0, 1.0, "IVF8192_HNSW32,SQfp16"),
        (5_000_000, 768, 16.0, 0.95, "IVF8192_HNSW32,SQfp16"),
        (5_000_000, 768, 4.0, 0.95, "IVF8192_HNSW32,SQ8"),
        (5_000_000, 768, 2.0, 0.95, "OPQ384,IVF8192_HNSW32,PQ384"),
        (100_000_000, 768, 16.0, 0.95, "OPQ128,IVF32768_HNSW32,PQ128"),
    ],
)
def test_the_factory_follows_rows_memory_and_recall(
    rows: int, dim: int, memory: float, recall: float, factory: str
) -> None:
    assert choose_factory(rows, dim, memory, recall) == factory
    per_row = {"SQfp16": 2 * dim, "SQ8": dim, "PQ384": 384, "PQ128": 128, "Flat": 12 * dim}[factory.split(",")[-1]]
    assert rows * per_row <= memory * GIB
    assert 4 * dim * sample_size(factory, rows, dim) <= approximate.SAMPLE_BYTES + 4 * dim


def test_what_fits_nowhere_is_refused(one_line: OneLine) -> None:
    with one_line("allow more memory"):
        choose_factory(100_000_000, 768, 1.0)
    with one_line("give 0 to 1"):
        Plan(recall=1.5).choose(100, 32)
    assert inverted_lists(1_000_000) == 4096


def test_scan_is_a_search_of_everything() -> None:
    rng = np.random.default_rng(0)
    gallery, photo = rng.normal(size=(50, 8)).astype(np.float32), rng.normal(size=(7, 8)).astype(np.float32)
    blocks = [(np.arange(start, start + 20)[: 50 - start], gallery[start : start + 20]) for start in (0, 20, 40)]
    scores, rows = scan(photo, blocks, 12)
    expected = np.argsort(-(photo @ gallery.T), axis=1)[:, :12]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(photo @ gallery.T, expected, 1), atol=1e-5)
    scores, rows = scan(photo, blocks[:1], 25)
    assert (rows[:, 20:] == -1).all() and np.isneginf(scores[:, 20:]).all() and (rows[:, :20] >= 0).all()


def test_recall_counts_the_true_rows() -> None:
    assert recall_at(np.array([[1, 2, 3], [4, 5, -1]]), np.array([[3, 9], [5, 4]])) == 0.75


def test_held_out_photos_are_not_in_the_index_while_it_is_measured(
    copy: Path, alignment: GeoAlignment, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, measure = list[int](), indexing._measure

    def measured(index: Any, *args: Any, **options: Any) -> dict[str, Any]:
        sizes.append(index.ntotal)
        return measure(index, *args, **options)

    monkeypatch.setattr(indexing, "_measure", measured)
    make_index(copy, SOURCE, alignment, Plan("IVF8,SQfp16"))
    assert sizes == [N - N // 10]


def test_a_region_is_widened_to_the_nearest_photos(exact: GeoIndex) -> None:
    place = (-60.0, -140.0, 1.0)  # in the southern ocean
    keep = exact.mask(place)
    assert keep is not None and not keep.any()
    keep = exact.mask(place, at_least=7)
    assert keep is not None and keep.sum() == 7
    away = np.linalg.norm(to_unit(*exact.lat_lon.T) - to_unit(*place[:2]), axis=1)
    assert set(np.flatnonzero(keep)) == set(np.argsort(away)[:7])
    assert exact.mask(place, at_least=N + 5) is None and exact.mask() is None


def test_an_author_is_left_out(exact: GeoIndex) -> None:
    gallery = with_authors(exact, ["Ada" if row % 3 else None for row in range(N)])
    keep = gallery.mask(not_author="Ada")
    assert keep is not None and np.flatnonzero(keep).tolist() == list(range(0, N, 3))
    assert gallery.mask(not_author="Bob") is None
