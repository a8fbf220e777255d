"""An index: what it finds, what it excludes, and what it refuses to open."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from tiny import ROWS, OneLine

from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.index.build import build_index
from rag_geotoken.index.cell_search import cell_vectors
from rag_geotoken.index.geo_index import GeoIndex
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.storage.parquet import read_table, to_numpy, write_table

WEIGHTS = (0.5, 1.0, 0.25)
FILES = ("index.faiss", "rows.parquet", "cells.npy")


def photos_of(folder: Path) -> tuple[Path, Path]:
    return folder / "stages" / "photos.parquet", folder / "stages" / "embeddings.parquet"


def with_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, [values])


def build(folder: Path, photos: pa.Table, embeddings: pa.Table) -> dict[str, Any]:
    """Build an index in folder/index from changed tables."""
    write_table(folder / "photos.parquet", photos)
    write_table(folder / "embeddings.parquet", embeddings)
    return build_index(folder / "index", folder / "photos.parquet", folder / "embeddings.parquet", "tiny")


def queries(count: int) -> NDArray[np.float32]:
    drawn = np.random.default_rng(0).normal(size=(count, 3, 32))
    vectors: NDArray[np.float32] = (drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)).astype(np.float32)
    return vectors


@pytest.fixture
def copy(index_folder: Path, tmp_path: Path) -> Path:
    """A copy of the index, to be broken."""
    return shutil.copytree(index_folder, tmp_path / "copy")


def test_an_index_comes_back_as_it_was_built(index_folder: Path, gallery: GeoIndex, weights: Path) -> None:
    photos, embeddings = (read_table(path) for path in photos_of(index_folder))
    assert gallery.rows.column_names == ["id", "image", "lat", "lon", "place", "author", "digest"]
    assert gallery.rows.drop_columns(["digest"]).equals(photos)
    np.testing.assert_array_equal(gallery.lat_lon, np.column_stack([photos["lat"], photos["lon"]]))
    vectors = gallery.vectors(np.arange(ROWS).reshape(2, -1))
    assert vectors.shape == (2, ROWS // 2, 3, 32)
    for i, name in enumerate(("image", "gps", "text")):
        np.testing.assert_array_equal(vectors.reshape(ROWS, 3, 32)[:, i], to_numpy(embeddings[name]))
    manifest = gallery.manifest
    assert (manifest["rows"], manifest["left_out"], manifest["dim"]) == (ROWS, 0, 32)
    assert manifest["encoder"] == GeoAlignment.from_pretrained(weights).identity
    assert manifest["metric"] == "inner product"
    assert {path.name for path in index_folder.iterdir()} == {*FILES, "manifest.json", "stages"}


@pytest.mark.parametrize("weights_of_parts", [WEIGHTS, (0.0, 1.0, 0.0), (1.0, 0.0, 2.0)])
def test_scores_are_the_weighted_inner_products(gallery: GeoIndex, weights_of_parts: tuple[float, ...]) -> None:
    photo, all_rows = queries(9), gallery.vectors(np.arange(ROWS))
    expected = np.einsum("bpd,rpd,p->br", photo, all_rows, weights_of_parts)
    order = np.argsort(-expected, axis=1)[:, :12]
    found = gallery.search(photo, 12, weights_of_parts)
    np.testing.assert_allclose(found.scores, np.take_along_axis(expected, order, 1), atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, found.rows, 1), found.scores, atol=1e-5)
    np.testing.assert_array_equal(found.lat_lon, gallery.lat_lon[found.rows])
    assert found.rows.shape == (9, 12) and (np.diff(found.scores, axis=1) <= 0).all()


def test_a_photo_never_finds_itself(gallery: GeoIndex) -> None:
    rows = np.array([0, 7, 150])
    photo, digests = gallery.vectors(rows), gallery.rows["digest"].take(rows).to_pylist()
    assert gallery.search(photo, 1, WEIGHTS).rows[:, 0].tolist() == rows.tolist()
    with_itself, without = gallery.search(photo, 11, WEIGHTS), gallery.search(photo, 10, WEIGHTS, digests)
    np.testing.assert_array_equal(without.rows, with_itself.rows[:, 1:])
    np.testing.assert_array_equal(without.scores, with_itself.scores[:, 1:])
    # A photo that the index does not hold loses nothing, whoever is searched beside it.
    mixed = gallery.search(photo, 10, WEIGHTS, [digests[0], "0" * 32, digests[2]])
    np.testing.assert_array_equal(mixed.rows[[0, 2]], without.rows[[0, 2]])
    np.testing.assert_array_equal(mixed.rows[1], with_itself.rows[1, :10])


def test_copies_of_a_photo_are_excluded_as_well(index_folder: Path, tmp_path: Path) -> None:
    photos, embeddings = (read_table(path) for path in photos_of(index_folder))
    thrice = [0, 1, 2, 3, 4, 5, 2, 6, 2]
    build(tmp_path, photos.take(thrice), embeddings.take(thrice))
    index = GeoIndex.load(tmp_path / "index")
    digest = index.rows["digest"].to_pylist()
    found = index.search(index.vectors(np.array([2, 5])), 6, WEIGHTS, [digest[2], digest[5]])
    assert sorted(found.rows[0].tolist()) == [0, 1, 3, 4, 5, 7]
    assert 5 not in found.rows[1] and len(set(found.rows[1].tolist())) == 6


def test_photos_without_a_place_or_a_picture_are_left_out(index_folder: Path, tmp_path: Path) -> None:
    photos, embeddings = (read_table(path) for path in photos_of(index_folder))
    lat = photos["lat"].to_pylist()
    lat[3] = None
    errors = ["broken" if row == 8 else None for row in range(ROWS)]
    manifest = build(tmp_path, with_column(photos, "lat", lat), with_column(embeddings, "error", errors))
    assert (manifest["rows"], manifest["left_out"]) == (ROWS - 2, 2)
    kept = photos["id"].to_pylist()
    del kept[8], kept[3]
    index = GeoIndex.load(tmp_path / "index")
    assert index.rows["id"].to_pylist() == kept
    np.testing.assert_array_equal(index.vectors(np.array([3]))[0, 0], to_numpy(embeddings["image"])[4])


def test_nothing_to_index(index_folder: Path, tmp_path: Path, one_line: OneLine) -> None:
    photos, embeddings = (read_table(path) for path in photos_of(index_folder))
    with one_line("no photo has both a readable picture and coordinates"):
        build(tmp_path, photos, with_column(embeddings, "error", ["broken"] * ROWS))
    assert not (tmp_path / "index").exists()


def test_tables_of_different_photos_are_refused(index_folder: Path, tmp_path: Path, one_line: OneLine) -> None:
    photos, embeddings = (read_table(path) for path in photos_of(index_folder))
    with one_line("photos"):
        build(tmp_path, photos, embeddings.take(list(range(ROWS))[::-1]))


def test_building_again_from_the_same_tables_does_nothing(copy: Path, alignment: GeoAlignment) -> None:
    def state() -> dict[str, tuple[int, int]]:
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in copy.iterdir() if path.is_file()}

    before, manifest = state(), json.loads((copy / "manifest.json").read_text())
    assert build_index(copy, *photos_of(copy), manifest["encoder"], embed=alignment.embed_places) == manifest
    assert state() == before
    assert build_index(copy, *photos_of(copy), "another", embed=alignment.embed_places)["encoder"] == "another"
    assert state() != before


@pytest.mark.parametrize("broken", FILES)
def test_a_broken_index_is_built_again(broken: str, copy: Path, index_folder: Path, alignment: GeoAlignment) -> None:
    (copy / broken).write_bytes(b"")
    build_index(copy, *photos_of(copy), alignment.identity, embed=alignment.embed_places)
    for name in (*FILES, "manifest.json"):
        assert (copy / name).read_bytes() == (index_folder / name).read_bytes()


def test_the_index_keeps_the_cells_around_its_photos(gallery: GeoIndex, copy: Path, alignment: GeoAlignment) -> None:
    assert gallery.cell_vectors is not None and gallery.manifest["cells"] == len(gallery.cell_vectors)
    np.testing.assert_array_equal(gallery.cell_vectors, cell_vectors(gallery.lat_lon, alignment.embed_places))
    # One that was built without a model of places keeps none, and no file of another index.
    build_index(copy, *photos_of(copy), alignment.identity)
    assert GeoIndex.load(copy).cell_vectors is None and not (copy / "cells.npy").exists()


def test_stopped_before_the_manifest_there_is_no_index(
    copy: Path, monkeypatch: pytest.MonkeyPatch, one_line: OneLine
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rag_geotoken.index.build.write_table", stop)
        with pytest.raises(KeyboardInterrupt):
            build_index(copy, *photos_of(copy), "another")
    with one_line("no index in"):
        GeoIndex.load(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"a"', '{"format": "rag-geotoken-index/1"}'])
def test_a_broken_manifest_is_named(copy: Path, text: str, one_line: OneLine) -> None:
    (copy / "manifest.json").write_text(text)
    with one_line("manifest"):
        GeoIndex.load(copy)


@pytest.mark.parametrize("change", [{"rows": ROWS + 1}, {"dim": 16}, {"bytes": {}}, {"sha256": {"index.faiss": 3}}])
def test_a_manifest_that_does_not_fit_is_named(copy: Path, change: dict[str, Any], one_line: OneLine) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with one_line("build"):
        GeoIndex.load(copy)


def test_a_folder_without_an_index_is_named(tmp_path: Path, one_line: OneLine) -> None:
    with one_line("no index in .*: build one"):
        GeoIndex.load(tmp_path / "none")


def test_an_index_where_a_file_stands_is_refused(index_folder: Path, tmp_path: Path, one_line: OneLine) -> None:
    (tmp_path / "file").write_text("")
    with one_line("file"):
        build_index(tmp_path / "file", *photos_of(index_folder), "tiny")


def test_the_index_of_another_encoder_is_refused(copy: Path, weights: Path, one_line: OneLine) -> None:
    build_index(copy, *photos_of(copy), "another")
    with one_line(f"encoder another, the model is {GeoAlignment.from_pretrained(weights).identity}"):
        Geolocator.from_pretrained(copy, weights)


def test_more_neighbors_than_photos_are_refused(gallery: GeoIndex, one_line: OneLine) -> None:
    assert gallery.search(queries(2), ROWS, WEIGHTS).rows.shape == (2, ROWS)
    own = gallery.rows["digest"].to_pylist()[:2]
    assert gallery.search(queries(2), ROWS - 1, WEIGHTS, own).rows.shape == (2, ROWS - 1)
    with one_line(f"holds {ROWS} photos"):
        gallery.search(queries(2), ROWS + 1, WEIGHTS)
    with one_line(f"holds {ROWS} photos"):
        gallery.search(queries(2), ROWS, WEIGHTS, own)


@pytest.mark.parametrize("shape", [(2, 3, 16), (2, 2, 48), (2, 96)])
def test_queries_of_another_size_are_refused(gallery: GeoIndex, shape: tuple[int, ...], one_line: OneLine) -> None:
    with one_line("do not fit an index of"):
        gallery.search(np.zeros(shape, np.float32), 3, WEIGHTS)


def test_the_manifest_says_what_it_was_made_from(gallery: GeoIndex, index_folder: Path) -> None:
    assert set(gallery.manifest["made_from"]) == {"photos", "embeddings", "encoder", "cells"}
    assert gallery.manifest["bytes"] == {name: (index_folder / name).stat().st_size for name in FILES}
