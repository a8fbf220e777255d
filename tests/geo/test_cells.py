"""These tests compare S2 cells with s2sphere and check the properties of tokens."""

from __future__ import annotations

import math
from typing import Any

import bench_cells as bench
import numpy as np
import pytest
import s2sphere  # type: ignore[import-untyped, unused-ignore]
from hypothesis import given
from hypothesis import strategies as st
from properties import repeatable

from rag_geotoken.errors import GeoError
from rag_geotoken.geo import cells
from rag_geotoken.geo.cells import S2Tokenizer, cell_centers, cell_ids, cell_level, parent_ids
from rag_geotoken.geo.sphere import EARTH_RADIUS_KM, haversine_km

pytestmark = pytest.mark.filterwarnings("error")

latitudes = st.floats(-90, 90)
longitudes = st.floats(-180, 180)
levels = st.integers(0, 30)
groups = st.integers(1, 7)


def leaf(lat: float, lon: float) -> Any:
    return s2sphere.CellId.from_lat_lng(s2sphere.LatLng.from_degrees(lat, lon))


def test_the_benchmark_finds_no_difference_at_special_points() -> None:
    record = bench.bench(10_000, seed=12)
    assert set(record["different_ids_by_level"].values()) == {0}
    assert record["parents_checked"]["different"] == 0
    assert record["special_points"] > 15_000
    assert record["largest_center_difference_deg"] < 1e-12


def test_random_points_equal_s2sphere_at_every_level() -> None:
    lat, lon = bench.random_points(20_000, np.random.default_rng(11))
    theirs = [leaf(a, b) for a, b in zip(lat.tolist(), lon.tolist(), strict=True)]
    for level in range(31):
        expected = np.array([cell.parent(level).id() for cell in theirs], np.uint64)
        np.testing.assert_array_equal(cell_ids(lat, lon, level), expected, err_msg=f"level {level}")
        assert (cell_level(expected) == level).all()


def test_poles_date_line_and_corners_by_name() -> None:
    corner = math.degrees(math.asin(1 / math.sqrt(3)))
    for lat in (-90.0, -corner, -0.0, 0.0, corner, 90.0):
        for lon in (-180.0, -135.0, -90.0, -45.0, -0.0, 0.0, 45.0, 90.0, 135.0, 180.0):
            assert int(cell_ids(lat, lon)) == leaf(lat, lon).id(), (lat, lon)


def test_quick_sine_is_within_its_bound() -> None:
    degrees = np.concatenate([np.random.default_rng(0).uniform(-180, 180, 100_000), np.arange(-180, 181, 0.5)])
    sin, cos = cells._sin_cos(degrees)
    radians = degrees * (math.pi / 180)
    assert np.abs(sin - cells.libm_sin(radians)).max() < 8e-16
    assert np.abs(cos - cells.libm_cos(radians)).max() < 8e-16


def test_an_inexact_sine_changes_no_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    lat, lon = bench.special_points(np.random.default_rng(1))
    expected = bench.s2sphere_ids(lat, lon)
    exact, rng = cells._sin_cos, np.random.default_rng(2)

    def noisy(degrees: Any) -> Any:
        return tuple(part + rng.choice([-8e-16, 0, 8e-16], part.shape) for part in exact(degrees))

    monkeypatch.setattr(cells, "_sin_cos", noisy)
    np.testing.assert_array_equal(cell_ids(lat, lon), expected)
    monkeypatch.setattr(cells, "NEAR", -1.0)  # without the exact second pass some cells are wrong
    assert (cell_ids(lat, lon) != expected).any()


@repeatable
@given(latitudes, longitudes, levels)
def test_any_point_equals_s2sphere(lat: float, lon: float, level: int) -> None:
    cell = leaf(lat, lon).parent(level)
    ids, center = cell_ids(lat, lon, level), cell.to_lat_lng()
    assert int(ids) == cell.id() and cell_level(ids) == level
    np.testing.assert_allclose(cell_centers(ids), (center.lat().degrees, center.lng().degrees), rtol=0, atol=1e-12)


@repeatable
@given(latitudes, longitudes, levels, groups)
def test_round_trips(lat: float, lon: float, level: int, group: int) -> None:
    tokenizer = S2Tokenizer(level, group)
    tokens = tokenizer.encode(lat, lon)
    ids = tokenizer.cell_ids(lat, lon)
    assert tokens.shape == (tokenizer.length,) and tokens.dtype == np.int64
    assert (tokens >= 0).all() and (tokens < tokenizer.vocab_sizes).all()
    assert tokenizer.tokens_to_ids(tokens) == ids
    np.testing.assert_array_equal(tokenizer.ids_to_tokens(ids), tokens)
    np.testing.assert_array_equal(tokenizer.ids_to_tokens(cell_ids(lat, lon)), tokens)  # a finer cell
    center = tokenizer.decode(tokens)
    np.testing.assert_array_equal(tokenizer.encode(*center), tokens)
    diagonal_km = 2.438654594434021 * 0.5**level * EARTH_RADIUS_KM  # S2's bound on the diagonal of any cell
    assert haversine_km(lat, lon, *center) <= diagonal_km


@repeatable
@given(latitudes, longitudes, levels, groups)
def test_a_prefix_is_the_parent(lat: float, lon: float, level: int, group: int) -> None:
    tokenizer = S2Tokenizer(level, group)
    row = tokenizer.encode(lat, lon)
    for width, reached in enumerate(tokenizer.levels, start=1):
        parent = parent_ids(tokenizer.cell_ids(lat, lon), reached)
        assert tokenizer.tokens_to_ids(row[:width]) == parent
        np.testing.assert_array_equal(tokenizer.decode(row[:width]), cell_centers(parent))
        np.testing.assert_array_equal(S2Tokenizer(reached, group).encode(lat, lon), row[:width])


@repeatable
@given(st.data(), levels, groups)
def test_every_row_in_range_is_a_cell(data: st.DataObject, level: int, group: int) -> None:
    tokenizer = S2Tokenizer(level, group)
    row = [data.draw(st.integers(0, size - 1)) for size in tokenizer.vocab_sizes]
    np.testing.assert_array_equal(tokenizer.encode(*tokenizer.decode(row)), row)


@repeatable
@given(st.lists(st.tuples(latitudes, longitudes, levels, levels), min_size=1, max_size=8))
def test_parents_of_a_level_each(points: list[tuple[float, float, int, int]]) -> None:
    pairs = [(leaf(lat, lon), *sorted(two)) for lat, lon, *two in points]
    ids = np.array([cell.parent(fine).id() for cell, _, fine in pairs], np.uint64)
    wanted = [coarse for _, coarse, _ in pairs]
    expected = np.array([cell.parent(coarse).id() for cell, coarse, _ in pairs], np.uint64)
    np.testing.assert_array_equal(parent_ids(ids, wanted), expected)
    np.testing.assert_array_equal(parent_ids(ids, np.array(wanted, np.uint8)), expected)
    np.testing.assert_array_equal(cell_level(parent_ids(ids, wanted)), wanted)


def test_levels_of_parents_broadcast() -> None:
    point, every = leaf(48.8583, 2.2945), np.arange(31)
    chain = np.array([point.parent(level).id() for level in range(31)], np.uint64)
    np.testing.assert_array_equal(parent_ids(chain[30], every), chain)
    np.testing.assert_array_equal(parent_ids(chain[[30, 29]][:, None], every[:30]), np.stack([chain[:30]] * 2))
    np.testing.assert_array_equal(parent_ids(chain[30:], [[3], [4]]), chain[[3, 4], None])
    assert parent_ids(chain[30], 7) == chain[7] and parent_ids(chain[30], 7).shape == ()
    np.testing.assert_array_equal(parent_ids(chain, 0), np.full(31, chain[0]))
    np.testing.assert_array_equal(parent_ids(chain, every), chain)
    assert parent_ids(chain[:0], every[:0]).shape == (0,) and parent_ids(chain[:0], 5).dtype == np.uint64
    kept = chain.copy()
    parent_ids(chain, every)[:] = 0
    np.testing.assert_array_equal(chain, kept)


def test_tokens_by_hand() -> None:
    assert S2Tokenizer().vocab_sizes == (6, *[16] * 10)
    assert S2Tokenizer(level=3).vocab_sizes == (6, 16, 4)
    assert S2Tokenizer(level=0).encode([0, 90], [90, 0]).tolist() == [[1], [2]]
    assert S2Tokenizer(level=2).encode(0, 0).tolist() == [0, 8]
    lat, lon = bench.random_points(500, np.random.default_rng(3))
    for row, a, b in zip(S2Tokenizer().encode(lat, lon).tolist(), lat.tolist(), lon.tolist(), strict=True):
        cell = leaf(a, b).parent(20)
        position = cell.pos() >> 21  # 40 bits, below them the lowest set bit
        assert row == [cell.face(), *(position >> shift & 15 for shift in range(36, -1, -4))]


def test_shapes() -> None:
    tokenizer = S2Tokenizer()
    assert tokenizer.encode([[0.0], [1.0]], [0.0, 1.0, 2.0]).shape == (2, 3, 11)
    assert tokenizer.decode(tokenizer.encode([[0.0], [1.0]], [0.0, 1.0, 2.0]))[0].shape == (2, 3)
    assert tokenizer.encode([], []).shape == (0, 11)
    assert tokenizer.decode(np.empty((0, 4), np.int64))[1].shape == (0,)
    assert cell_ids([], []).dtype == np.uint64 and cell_centers([])[0].shape == (0,)
    chunks = np.linspace(-80, 80, 2 * cells.CHUNK + 3)
    np.testing.assert_array_equal(cell_ids(chunks, chunks)[-2:], cell_ids(chunks[-2:], chunks[-2:]))


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.uint64])
def test_any_integer_type_decodes(dtype: Any) -> None:
    rows = S2Tokenizer().encode([48.8583], [2.2945])
    np.testing.assert_array_equal(S2Tokenizer().decode(rows.astype(dtype)), S2Tokenizer().decode(rows))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: S2Tokenizer(31), "level 31"),
        (lambda: S2Tokenizer(20, 0), "group 0"),
        (lambda: cell_ids(0, 0, -1), "level -1"),
        (lambda: cell_ids([0, 91], [0, 0]), "latitude 91.0 at position 1"),
        (lambda: cell_ids(0, math.nan), "longitude nan"),
        (lambda: cell_ids([0, 1], [0, 1, 2]), "one of each"),
        (lambda: S2Tokenizer().decode([[6, 0]]), "token 6 in column 0 is outside 0..5"),
        (lambda: S2Tokenizer().decode([[5, 0], [0, 16]]), "token 16 in column 1 is outside 0..15"),
        (lambda: S2Tokenizer().decode([5, -1]), "token -1 in column 1"),
        (lambda: S2Tokenizer().decode([[0.0, 1.0]]), "give integers"),
        (lambda: S2Tokenizer(level=2).decode([[0, 1, 2]]), "1 to 2"),
        (lambda: S2Tokenizer().decode(np.empty((3, 0), np.int64)), "1 to 11"),
        (lambda: S2Tokenizer().decode(3), "1 to 11"),
        (lambda: S2Tokenizer(20).ids_to_tokens(cell_ids([0], [0], 19)), "no parent of level 20"),
        (lambda: parent_ids(cell_ids(0, 0, 4), 5), "is of level 4"),
        (lambda: parent_ids(cell_ids([0, 1], [0, 1], 4), [4, 5]), "is of level 4: it has no parent of level 5"),
        (lambda: parent_ids(cell_ids(0, 0, 4), [3, 9, 4]), "no parent of level 9"),
        (lambda: parent_ids(cell_ids([0, 1], [0, 1]), [4, 31]), "S2 level 31 is outside 0..30"),
        (lambda: parent_ids(cell_ids(0, 0), -1), "S2 level -1"),
        (lambda: parent_ids(cell_ids(0, 0), 2.5), "S2 level 2.5"),
        (lambda: parent_ids(cell_ids(0, 0), [3, math.nan]), "S2 level nan"),
        (lambda: parent_ids([5, 0], [3, 3]), "0 at position 1"),
        (lambda: cell_level(0), "0 at position 0 is not an S2 cell id"),
        (lambda: cell_centers([1, 2]), "2 at position 1"),
        (lambda: cell_centers(np.uint64(6 << 61 | 1)), "not an S2 cell id"),
        (lambda: cell_centers(np.uint64(1 << 62)), "not an S2 cell id"),
        (lambda: cell_centers([-1]), "uint64"),
        (lambda: cell_centers([1.0]), "uint64"),
    ],
)
def test_what_is_wrong_is_said(call: Any, message: str) -> None:
    with pytest.raises(GeoError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
