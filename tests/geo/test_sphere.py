"""These tests compare distances and directions with geopy, with known values and with the laws of a metric."""

from __future__ import annotations

import math
from typing import Any

import geopy.distance  # type: ignore[import-untyped, unused-ignore]
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import repeatable

from rag_geotoken.errors import GeoError
from rag_geotoken.geo.sphere import (
    EARTH_RADIUS_KM,
    check_lat_lon,
    destination,
    from_unit,
    geodesic_km,
    haversine_km,
    pairwise_km,
    to_unit,
)

pytestmark = pytest.mark.filterwarnings("error")

METER = 1e-3
HALF_ROUND = EARTH_RADIUS_KM * math.pi
points = st.tuples(st.floats(-90, 90), st.floats(-180, 180))


def some_points(n: int, seed: int = 0) -> tuple[Any, Any]:
    """Return points uniform by area, with the special ones in front."""
    rng = np.random.default_rng(seed)
    lat = np.degrees(np.arcsin(rng.uniform(-1, 1, n)))
    lon = rng.uniform(-180, 180, n)
    lat[:8] = [90, -90, 0, 0, 0, 45, -45, 1e-9]
    lon[:8] = [0, 77, 180, -180, 0, 180, -180, 179.9999999]
    return lat, lon


def test_distances_are_those_of_geopy() -> None:
    starts, ends = np.stack(some_points(500, 1), axis=-1), np.stack(some_points(500, 2), axis=-1)
    pairs = list(zip(starts, ends, strict=True))
    expected = [geopy.distance.great_circle(a, b, radius=EARTH_RADIUS_KM).km for a, b in pairs]
    np.testing.assert_allclose(haversine_km(*starts.T, *ends.T), expected, rtol=1e-9, atol=1e-6)
    expected = [geopy.distance.geodesic(a, b).km for a, b in pairs]
    np.testing.assert_allclose(geodesic_km(*starts.T, *ends.T), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("one", "two", "great_circle", "geodesic"),
    [
        ((0, 0), (1, 0), 111.19493, 110.57439),
        ((0, 0), (0, 1), 111.19493, 111.31949),
        ((0, 179.5), (0, -179.5), 111.19493, 111.31949),  # across the date line
        ((12, 180), (12, -180), 0, 0),
        ((90, 0), (90, 120), 0, 0),  # one pole, whatever the longitude
        ((90, 0), (-90, 50), HALF_ROUND, 20003.93146),
        ((40, 10), (-40, -170), HALF_ROUND, 20003.93146),  # antipodes: the geodesic goes over a pole
    ],
)
def test_by_hand(one: Any, two: Any, great_circle: float, geodesic: float) -> None:
    assert haversine_km(*one, *two) == pytest.approx(great_circle, abs=METER)
    assert pairwise_km([one, two])[0, 1] == pytest.approx(great_circle, abs=METER)
    assert geodesic_km(*one, *two) == pytest.approx(geodesic, abs=METER)


@repeatable
@given(points, points, points)
def test_a_great_circle_is_a_metric(a: Any, b: Any, c: Any) -> None:
    km = pairwise_km([a, b, c])
    np.testing.assert_array_equal(km, km.T)
    assert not km.diagonal().any() and (km >= 0).all() and (km <= HALF_ROUND).all()
    assert km[0, 2] <= km[0, 1] + km[1, 2] + METER
    assert haversine_km(*a, *b) == pytest.approx(haversine_km(*b, *a), rel=1e-12, abs=1e-9)
    assert haversine_km(*a, *c) <= haversine_km(*a, *b) + haversine_km(*b, *c) + METER
    # the way to b and on to its antipode is half round
    antipode = pairwise_km([a, (-b[0], b[1] - 180)])[0, 1]
    assert haversine_km(*a, *b) + antipode == pytest.approx(HALF_ROUND, abs=METER)


@repeatable
@given(points, points)
def test_a_geodesic_is_near_the_great_circle(a: Any, b: Any) -> None:
    assert geodesic_km(*a, *b) == pytest.approx(geodesic_km(*b, *a), abs=1e-6)
    assert geodesic_km(*a, *b) == pytest.approx(haversine_km(*a, *b), rel=0.006, abs=1e-6)


def test_pairwise_is_haversine() -> None:
    lat_lon = np.stack(some_points(3 * 4 * 40, 5), axis=-1).reshape(3, 4, 40, 2)
    lat_lon[..., 1, :] = lat_lon[..., 0, :] * [-1, 1] + [0, 180]  # antipodes of the first
    lat_lon[..., 2, :] = lat_lon[..., 0, :] + 1e-6  # 0.1 m away
    lat, lon = lat_lon[..., 0], lat_lon[..., 1]
    expected = haversine_km(lat[..., :, None], lon[..., :, None], lat[..., None, :], lon[..., None, :])
    km = pairwise_km(lat_lon)
    assert km.shape == (3, 4, 40, 40)
    np.testing.assert_allclose(km, expected, rtol=0, atol=0.5 * METER)
    np.testing.assert_allclose(km[..., 0, 2], expected[..., 0, 2], rtol=0, atol=1e-9)
    assert pairwise_km(np.empty((2, 0, 2))).shape == (2, 0, 0)
    assert pairwise_km([[10.0, 20.0]]).tolist() == [[0.0]]


def test_broadcasting_and_types() -> None:
    for distance in (haversine_km, geodesic_km):
        assert distance(np.zeros((3, 1)), 0, 0, np.zeros(4)).shape == (3, 4)
        assert distance([], [], [], []).shape == (0,)
        single = distance(np.float32(0), 0, np.float32(1), 0)
        assert np.shape(single) == () and single.dtype == np.float64
        assert np.isnan(distance([0, math.nan], 0, 1, 1)).tolist() == [False, True]


def test_unit_vectors() -> None:
    np.testing.assert_allclose(to_unit([0, 0, 90], [0, 90, 0]), np.eye(3), atol=1e-15)
    lat, lon = some_points(1000, 6)
    np.testing.assert_allclose(np.linalg.norm(to_unit(lat, lon), axis=-1), 1, rtol=1e-15)
    back_lat, back_lon = from_unit(5 * to_unit(lat, lon).reshape(10, 100, 3))
    np.testing.assert_allclose(back_lat.ravel(), lat, atol=1e-12)
    off = (back_lon.ravel() - lon + 180) % 360 - 180
    np.testing.assert_allclose(off * np.cos(np.radians(lat)), 0, atol=1e-12)
    with pytest.raises(GeoError, match="length zero"):
        from_unit([[1, 0, 0], [0, 0, 0]])


@repeatable
@given(points, st.floats(0, 360), st.floats(0, 20_000))
def test_destination_is_that_far(start: Any, bearing: float, km: float) -> None:
    lat1, lon1 = start
    lat, lon = destination(lat1, lon1, bearing, km)
    assert -90 <= lat <= 90 and -180 <= lon <= 180
    assert haversine_km(lat1, lon1, lat, lon) == pytest.approx(km, abs=METER)


def test_directions_by_hand() -> None:
    lat, lon = destination([0, 0, 0, 90], [0, 0, 179, 30], [0, 90, 90, 180], 10 * 111.194927)
    np.testing.assert_allclose(lat, [10, 0, 0, 80], atol=1e-6)
    np.testing.assert_allclose(lon, [0, 10, -171, 30], atol=1e-6)


def test_check_returns_float64_in_the_shapes_given() -> None:
    lat, lon = check_lat_lon([90, -90], np.float32(-180))
    assert lat.dtype == lon.dtype == np.float64
    assert lat.shape == (2,) and lon.shape == ()


@pytest.mark.parametrize(
    ("lat", "lon", "message"),
    [
        ([0, 1, 2, 91, 92], 0, r"latitude 91\.0 at position 3 is outside -90\.\.90"),
        (-90.5, 0, r"latitude -90\.5 is outside"),
        ([[0, 1], [2, 200]], 0, r"latitude 200\.0 at position \[1, 1\]"),
        ([0, math.nan], 0, "latitude nan at position 1 is not a finite number"),
        (0, [math.inf], "longitude inf at position 0 is not a finite number"),
        (0, [10, 359.5], r"longitude 359\.5 at position 1 is outside -180\.\.180 degrees: add or subtract 360"),
        (None, 0, "latitude nan"),
        ("north", 0, "latitude is not a number"),
        ([1, 2], [1, 2, 3], "one of each"),
    ],
)
def test_check_names_the_first_bad_value(lat: Any, lon: Any, message: str) -> None:
    with pytest.raises(GeoError, match=message) as caught:
        check_lat_lon(lat, lon)
    assert "\n" not in str(caught.value)
