"""These functions compute distances and directions on the Earth, on arrays that broadcast.

Degrees go in, latitude first; kilometers come out. Great circles are on a sphere of 6371 km, as in the benchmarks of
image geolocalization; geodesics are on WGS84. The formulas take any longitude and pass NaN on; `check_lat_lon`
validates input.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rag_geotoken.errors import GeoError

Floats = NDArray[np.float64]

EARTH_RADIUS_KM = 6371.0


def check_lat_lon(lat: ArrayLike, lon: ArrayLike) -> tuple[Floats, Floats]:
    """Return latitudes (-90..90) and longitudes (-180..180), ends included, as float64 in their own shapes.

    Raises GeoError for the first value not a number, not finite or out of range, and for shapes that do not broadcast.
    """
    lats = _check(lat, "latitude", 90, "is it swapped with the longitude?")
    lons = _check(lon, "longitude", 180, "add or subtract 360")
    try:
        np.broadcast_shapes(lats.shape, lons.shape)
    except ValueError:
        raise GeoError(f"{lats.shape} latitudes and {lons.shape} longitudes: give one of each a point") from None
    return lats, lons


def _check(values: ArrayLike, name: str, limit: int, hint: str) -> Floats:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise GeoError(f"a {name} is not a number ({error}): give degrees") from None
    if array.size == 0 or (array.min() >= -limit and array.max() <= limit):  # false when there is a NaN
        return array
    position = np.argwhere(~(np.abs(array) <= limit))[0].tolist()
    value = array[tuple(position)]
    where = f" at position {position[0] if len(position) == 1 else position}" if position else ""
    if not np.isfinite(value):
        raise GeoError(f"{name} {value}{where} is not a finite number: drop the row or give degrees")
    raise GeoError(f"{name} {value}{where} is outside -{limit}..{limit} degrees: {hint}")


def haversine_km(lat1: ArrayLike, lon1: ArrayLike, lat2: ArrayLike, lon2: ArrayLike) -> Floats:
    """Return the great-circle distance by the haversine formula (Sinnott, Sky and Telescope 68, 1984).

    Exact to rounding at short distance, to 0.3 m near the antipode. Example: one degree of latitude is
    6371 * pi / 180 = 111.1949 km.
    """
    phi1, lambda1, phi2, lambda2 = _radians(lat1, lon1, lat2, lon2)
    half_lat, half_lon = np.sin((phi2 - phi1) / 2), np.sin((lambda2 - lambda1) / 2)
    a = half_lat**2 + np.cos(phi1) * np.cos(phi2) * half_lon**2
    km: Floats = 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.minimum(a, 1)))
    return km


def geodesic_km(lat1: ArrayLike, lon1: ArrayLike, lat2: ArrayLike, lon2: ArrayLike) -> Floats:
    """Return the shortest distance on the WGS84 ellipsoid (Karney, J. Geodesy 87, 2013, through PROJ).

    Example: a degree of longitude on the equator is 6378.137 * pi / 180 = 111.3195 km.
    """
    from pyproj import Geod

    points = np.broadcast_arrays(*(np.asarray(a, np.float64) for a in (lon1, lat1, lon2, lat2)))
    x1, y1, x2, y2 = (values.ravel() for values in points)
    _, _, meters = Geod(ellps="WGS84").inv(x1, y1, x2, y2)
    km: Floats = np.asarray(meters).reshape(points[0].shape) / 1000
    return km


def to_unit(lat: ArrayLike, lon: ArrayLike) -> Floats:
    """Return points (...) as unit vectors (..., 3): x through (0, 0), y through (0, 90), z through the north pole."""
    phi, theta = _radians(lat, lon)
    xyz = np.cos(phi) * np.cos(theta), np.cos(phi) * np.sin(theta), np.sin(phi)
    return np.stack(np.broadcast_arrays(*xyz), axis=-1)


def from_unit(xyz: ArrayLike) -> tuple[Floats, Floats]:
    """Return lat (...) in -90..90 and lon (...) in -180..180 of vectors (..., 3) of any length but zero.

    Raises GeoError for a zero vector, which has no direction (such as the mean of two antipodes).
    """
    vectors = np.asarray(xyz, np.float64)
    if not vectors.any(axis=-1).all():
        raise GeoError("a vector of length zero points nowhere on the Earth: leave it out")
    x, y, z = np.moveaxis(vectors, -1, 0)
    return np.degrees(np.arctan2(z, np.hypot(x, y))), np.degrees(np.arctan2(y, x))


def pairwise_km(lat_lon: ArrayLike) -> Floats:
    """Return the great-circle distances (..., C, C) within each set of points (..., C, 2).

    Symmetric, zero on the diagonal. The differences of unit vectors give the chords without cancellation between near
    points: exact to a micrometer at short distance and to 0.3 m near the antipode.
    """
    points = np.asarray(lat_lon, np.float64)
    xyz = to_unit(points[..., 0], points[..., 1])
    squared = np.zeros((*xyz.shape[:-1], xyz.shape[-2]))
    for axis in range(3):
        gap = xyz[..., :, None, axis] - xyz[..., None, :, axis]
        gap *= gap
        squared += gap
    half_chord = np.minimum(np.sqrt(squared, out=squared) / 2, 1)
    km: Floats = 2 * EARTH_RADIUS_KM * np.arcsin(half_chord)
    return km


def destination(
    lat: ArrayLike, lon: ArrayLike, bearing_deg: ArrayLike, distance_km: ArrayLike
) -> tuple[Floats, Floats]:
    """Return lat and lon of the point at a distance along the great circle that leaves a start at a bearing.

    The bearing is clockwise from north, at a pole from the meridian `lon`. Example: 111.1949 km north of (0, 0) is
    (1, 0).
    """
    phi, theta, bearing = _radians(lat, lon, bearing_deg)
    angle = np.asarray(distance_km, np.float64) / EARTH_RADIUS_KM
    # North and east parts of the unit vector at the start towards the bearing; `outward` is away from the Earth's axis.
    north, east = np.cos(bearing) * np.sin(angle), np.sin(bearing) * np.sin(angle)
    outward = np.cos(phi) * np.cos(angle) - np.sin(phi) * north
    x = outward * np.cos(theta) - east * np.sin(theta)
    y = outward * np.sin(theta) + east * np.cos(theta)
    z = np.sin(phi) * np.cos(angle) + np.cos(phi) * north
    return from_unit(np.stack(np.broadcast_arrays(x, y, z), axis=-1))


def _radians(*degrees: ArrayLike) -> tuple[Floats, ...]:
    return tuple(np.radians(np.asarray(values, np.float64)) for values in degrees)
