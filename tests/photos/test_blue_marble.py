"""Tests of the Blue Marble source: fair drawing, held-out cells, and views against PROJ's gnomonic projection."""

from __future__ import annotations

import math
from functools import lru_cache
from io import BytesIO

import numpy as np
import pytest
import s2sphere
from numpy.typing import NDArray
from PIL import Image
from pyproj import Proj
from tiny import OneLine

from rag_geotoken.geo.gazetteer import place_text
from rag_geotoken.photos import blue_marble
from rag_geotoken.photos.blue_marble import SPLITS, cut, draw, draw_views, is_unseen
from rag_geotoken.photos.sources import read_source

Floats = NDArray[np.float64]


def level5(lat: Floats, lon: Floats) -> list[int]:
    """Level-5 cells by s2sphere."""
    points = zip(lat.tolist(), lon.tolist(), strict=True)
    return [s2sphere.CellId.from_lat_lng(s2sphere.LatLng.from_degrees(*p)).parent(5).id() for p in points]


def test_the_same_split_n_and_seed_give_the_same_photos() -> None:
    first, again = (read_source("blue-marble:test,n=20,seed=3") for _ in range(2))
    assert first.equals(again)
    assert first.column_names == ["id", "image", "lat", "lon", "place", "author"]
    assert len(set(first["id"].to_pylist())) == 20


def test_another_seed_or_split_draws_fresh_places() -> None:
    drawn = [draw_views(split, 500, seed) for split in ("gallery", "validation", "test", "train") for seed in (0, 1)]
    places = np.concatenate(drawn)[:, :2]
    assert len(np.unique(places, axis=0)) == len(places)


@pytest.mark.parametrize("split", SPLITS)
def test_views_keep_their_bounds(split: str) -> None:
    lat, lon, width, turn, bright, contrast = draw_views(split, 4000, 0).T
    assert lat.min() >= -58.0 and 70.0 < lat.max() <= 76.0 and np.abs(lon).max() <= 180.0
    assert np.log(width / 300.0).mean() == pytest.approx(0.0, abs=0.02)
    assert np.log(width / 300.0).std() == pytest.approx(0.2, abs=0.01)
    for values, low, high in ((turn, -30.0, 30.0), (bright, 0.9, 1.1), (contrast, 0.9, 1.1)):
        assert low <= values.min() < low + 0.02 * (high - low) and high >= values.max() > high - 0.02 * (high - low)


def test_places_are_uniform_by_area_on_land() -> None:
    n = 60_000
    lat, lon, *_ = draw_views("gallery", n, 7).T
    assert blue_marble._is_land(lat, lon).all()
    # The land outside the held-out cells, by the middles of boxes of 5 minutes.
    middles = (np.indices((2160, 4320)) + 0.5) / 12 - np.array([90, 180])[:, None, None]
    inside = blue_marble._land_mask() & (middles[0] > -58.0) & (middles[0] < 76.0)
    middle_lat, middle_lon = middles[:, inside]
    area = np.cos(np.radians(middle_lat)) * ~is_unseen(middle_lat, middle_lon)

    edges = np.arange(-60.0, 81.0, 20.0), np.arange(-180.0, 181.0, 45.0)
    expected = np.histogram2d(middle_lat, middle_lon, bins=edges, weights=area / area.sum())[0]
    drawn = np.histogram2d(lat, lon, bins=edges)[0] / n
    assert (np.abs(drawn - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / n)).all()


def test_known_land_and_sea() -> None:
    lat, lon = np.array([[23.0, 10.0], [72.0, -40.0], [-25.0, 135.0], [0.0, -150.0], [45.0, -30.0], [-0.5, 33.0]]).T
    assert blue_marble._is_land(lat, lon).tolist() == [True, True, True, False, False, False]


def test_no_other_split_has_a_point_in_an_unseen_cell() -> None:
    drawn = {split: draw_views(split, 6000, 0)[:, :2] for split in SPLITS}
    held_out = set(level5(*drawn.pop("unseen").T))
    for places in drawn.values():
        assert not held_out & set(level5(*places.T))
        assert not is_unseen(*places.T).any()
    # A cell is held out or not as a whole, and one in twenty is.
    everywhere = np.random.default_rng(0).uniform([-58.0, -180.0], [76.0, 180.0], (20_000, 2)).T
    by_cell = np.array(level5(*everywhere))
    unseen = is_unseen(*everywhere)
    assert not set(by_cell[unseen].tolist()) & set(by_cell[~unseen].tolist())
    assert unseen.mean() == pytest.approx(0.05, abs=0.01)


def test_the_places_tested_are_those_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    tested: list[Floats] = []

    def record(lat: Floats, lon: Floats) -> NDArray[np.bool_]:
        tested.append(np.column_stack([lat, lon]))
        return is_unseen(lat, lon)

    monkeypatch.setattr(blue_marble, "is_unseen", record)
    places = draw_views("unseen", 100, 0)[:, :2]
    # Rounding them afterwards could move one over an edge.
    assert set(map(tuple, places.tolist())) <= set(map(tuple, np.concatenate(tested).tolist()))


def test_references_give_the_same_pixels_as_the_views() -> None:
    for split, picture in (("test", "bmng"), ("relief", "relief")):
        table = read_source(f"blue-marble:{split},n=12,seed=5")
        views = draw_views(split, 12, 5)
        np.testing.assert_array_equal(draw(table["image"].to_pylist()), cut(views, picture))
        np.testing.assert_array_equal(table["lat"].to_numpy(), views[:, 0])
    # References of both pictures mix.
    numbers = "10.0,20.0,300.0,0.0,1.0,1.0"
    mixed = draw([f"blue-marble:{name}/{numbers}" for name in ("relief", "bmng", "relief")], 16)
    np.testing.assert_array_equal(mixed[0], mixed[2])
    assert mixed.shape == (3, 16, 16, 3) and (mixed[0] != mixed[1]).any()


@pytest.mark.parametrize(
    "reference",
    [
        *("bmng/", "bmng/5", "bmng/1,2,3,4,5", "bmng/1,2,3,4,5,6,7", "mars/0,0,300,0,1,1"),
        *("bmng/a,0,300,0,1,1", "bmng/nan,0,300,0,1,1", "bmng/0,inf,300,0,1,1", "bmng/91,0,300,0,1,1"),
        *("bmng/0,181,300,0,1,1", "bmng/0,0,-300,0,1,1", "bmng/0,0,1e300,0,1,1"),
        *("bmng/0,0,300,1e300,1,1", "bmng/0,0,300,0,1e300,1"),
    ],
)
def test_bad_references_are_named(reference: str, one_line: OneLine) -> None:
    with one_line("not a blue-marble picture reference"):
        draw([f"blue-marble:{reference}"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("red-marble:test", "no source 'red-marble:test'"),
        ("blue-marble:", "no split ''"),
        ("blue-marble:tests", "no split 'tests': choose one of gallery, "),
        ("blue-marble:test,n=0", "n=0"),
        *(
            (f"blue-marble:test,{text}", f"setting '{text}'")
            for text in ("m=3", "n=-1", "n=1e3", "n=9999999999", "seed")
        ),
    ],
)
def test_bad_settings_are_named(source: str, message: str, one_line: OneLine) -> None:
    with one_line(message):
        read_source(source)


def test_a_limit_takes_the_first_of_the_same_photos() -> None:
    whole = read_source("blue-marble:test,n=9,seed=4")
    for rest in ("n=9,seed=4,limit=5", "limit=5,n=9,seed=4", "limit=7,seed=4,n=9,limit=5"):
        assert read_source(f"blue-marble:test,{rest}").equals(whole.slice(0, 5))
    assert read_source("blue-marble:test,n=9,seed=4,limit=50").equals(whole)


@lru_cache(maxsize=1)
def earth() -> NDArray[np.uint8]:
    with Image.open(BytesIO(blue_marble._data("bmng.jpg"))) as image:
        return np.asarray(image.convert("RGB"))


def sampled(lat: float, lon: float, width: float, turn: float, size: int = 64) -> Floats:
    """A view by PROJ's inverse gnomonic on the sphere and a plain bilinear look-up, (size, size, 3)."""
    step = ((np.arange(size) + 0.5) / size - 0.5) * width * 1000
    right, down = np.meshgrid(step, step)
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    plane = Proj(proj="gnom", lat_0=lat, lon_0=lon, R=6371000)
    lons, lats = plane(right * cos - down * sin, -right * sin - down * cos, inverse=True)
    height, columns, _ = earth().shape
    u, v = (lons + 180.0) / 360.0 * columns - 0.5, (90.0 - lats) / 180.0 * height - 0.5
    left, top = np.floor(u).astype(int), np.floor(v).astype(int)
    total = np.zeros((size, size, 3))
    for below, beside in ((0, 0), (0, 1), (1, 0), (1, 1)):
        share = np.abs(1 - beside - (u - left)) * np.abs(1 - below - (v - top))
        total += share[..., None] * earth()[top + below, (left + beside) % columns]
    return total


@pytest.mark.parametrize(
    ("lat", "lon"),
    [(5.5, 0.0), (-5.0, 12.0), (41.0, 29.0), (76.0, -60.0), (-54.0, -70.0), (66.5, 180.0), (-17.0, -179.9)],
)
@pytest.mark.parametrize("turn", [0.0, 25.0])
def test_a_view_is_the_gnomonic_projection(lat: float, lon: float, turn: float) -> None:
    view = cut(np.array([[lat, lon, 600.0, turn, 1.0, 1.0]]))[0]
    expected = sampled(lat, lon, 600.0, turn)
    assert expected.std() > 5
    np.testing.assert_allclose(view.astype(float), expected, atol=1.5)


def test_north_is_up_and_east_is_right() -> None:
    # The coast of Ghana has its sea in the south, that of the Congo in the west.
    ghana, congo = cut(np.array([[5.0, -1.5, 300.0, 0.0, 1.0, 1.0], [-4.5, 11.7, 300.0, 0.0, 1.0, 1.0]])).astype(int)
    sea = [view[..., 2] - view[..., 0] for view in (ghana, congo)]
    assert sea[0][-16:].mean() > sea[0][:16].mean() + 15
    assert sea[1][:, :16].mean() > sea[1][:, -16:].mean() + 15
    # The date line has no seam.
    east, west = cut(np.array([[66.5, 180.0, 300.0, 0.0, 1.0, 1.0], [66.5, -180.0, 300.0, 0.0, 1.0, 1.0]])).astype(int)
    assert np.abs(east - west).max() <= 1


def test_light_changes_brightness_and_contrast() -> None:
    plain, bright, hard = cut(np.array([[5.5, 0.0, 300.0, 0.0, *light] for light in ((1, 1), (1.1, 1), (1, 1.1))]))
    np.testing.assert_allclose(bright.astype(float), np.clip(plain * 1.1, 0, 255), atol=1.1)
    assert hard.std() == pytest.approx(1.1 * plain.std(), rel=0.02)
    assert hard.mean() == pytest.approx(plain.mean(), abs=1.0)


def test_blocks_change_nothing() -> None:
    views = draw_views("test", 260, 0)
    np.testing.assert_array_equal(cut(views, size=8)[250:], cut(views[250:], size=8))
    assert cut(views[:0]).shape == (0, 64, 64, 3)


def test_place_text_names_the_nearest_city() -> None:
    bamako, suva, reykjavik = place_text(np.array([12.65, -18.1, 64.1]), np.array([-8.0, 178.5, -21.9]))
    assert bamako == "Bamako, Mali, Africa"
    assert suva.endswith(", Fiji, Oceania") and reykjavik.endswith(", Iceland, Europe")
    assert read_source("blue-marble:test,n=1")["place"][0].as_py().startswith("An aerial view of ")
    # Off Taveuni, east of the date line, the cities near by lie west of it.
    west, east = place_text(np.array([-16.8, -16.8]), np.array([180.0, -179.9]))
    assert west == east and west.endswith(", Fiji, Oceania")
