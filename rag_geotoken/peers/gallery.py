"""This module searches a gallery of places, embedded once: which of them a photo or a text is most like.

In a folder: ``gallery.parquet`` (lat, lon), ``gallery.npy`` (embeddings) and ``gallery.json`` (what they follow from).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from rag_geotoken.encoders.location import LocationEncoder, embed_places
from rag_geotoken.errors import GeoError
from rag_geotoken.geo.sphere import EARTH_RADIUS_KM, Floats, check_lat_lon, to_unit
from rag_geotoken.storage.files import file_sha256, read_json, write_json, write_whole
from rag_geotoken.storage.parquet import read_table, write_table
from rag_geotoken.storage.progress import progress_bar
from rag_geotoken.storage.weights import fingerprint
from rag_geotoken.types import RADII_KM

PLACES, VECTORS, MANIFEST = "gallery.parquet", "gallery.npy", "gallery.json"
BLOCK = 64  # queries at once: each has a number a place


@dataclass(frozen=True)
class Matches:
    """This class holds the likeliest gallery places of each query, best first.

    rows (B, k) int64 into the gallery, lat_lon (B, k, 2) degrees, probability (B, k) of these among the whole gallery,
    confidence (B, R) the probability that lies within each of the radii around the best place; uncalibrated.
    """

    rows: NDArray[np.int64]
    lat_lon: Floats
    probability: Floats
    confidence: Floats


@dataclass(frozen=True)
class Gallery:
    """This class holds places (N, 2) in degrees and their embeddings (N, dim) of length one."""

    lat_lon: Floats
    vectors: NDArray[np.float32]
    made_from: dict[str, str]

    @torch.inference_mode()
    def search(self, queries: Tensor, scale: float, k: int) -> Matches:
        """Return the k likeliest places of embeddings (B, dim) of length one, by softmax of ``scale`` * cosine.

        Raises GeoError when the gallery has fewer than k places.
        """
        if k > len(self.lat_lon):
            raise GeoError(f"the gallery has {len(self.lat_lon)} places: ask for no more than that")
        parts = []
        for block in torch.split(queries, BLOCK):
            logits = scale * (block @ torch.from_numpy(self.vectors).T)
            rows = logits.topk(k, dim=1).indices
            probability = logits.double().softmax(dim=1)
            cosine = self._unit[rows[:, 0]] @ self._unit.T  # of the angle between the best place and each place
            limits = np.cos(np.array(RADII_KM) / EARTH_RADIUS_KM).tolist()
            mass = [torch.where(cosine >= limit, probability, 0.0).sum(dim=1) for limit in limits]
            parts.append((rows, probability.gather(1, rows), torch.stack(mass, dim=1)))
        best, shares, confidence = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
        return Matches(best, self.lat_lon[best], shares, confidence)

    @cached_property
    def _unit(self) -> Tensor:
        return torch.from_numpy(to_unit(*self.lat_lon.T))


def open_gallery(folder: Path, location: LocationEncoder) -> Gallery:
    """Open a folder's gallery, its embeddings mapped from ``gallery.npy``.

    They are encoded and written first where the file is missing, changed, or made from other weights or places. Raises
    GeoError when the gallery has no places, or the file cannot be written.
    """
    table = read_table(folder / PLACES, ["lat", "lon"])
    if not len(table) or any(column.null_count for column in table.columns):
        raise GeoError(f"{folder / PLACES} is no list of places: convert the weights again")
    lat_lon = np.column_stack(check_lat_lon(*(column.to_numpy() for column in table.columns)))
    made_from = {"location": fingerprint(location), "places": file_sha256(folder / PLACES)}
    vectors = _map_vectors(folder, made_from)
    if vectors is None or len(vectors) != len(lat_lon):
        with progress_bar(len(lat_lon), "encoding the gallery, once") as advance:
            vectors = encoded = embed_places(location, lat_lon, batch=2048, advance=advance)
        write_whole(folder / VECTORS, lambda path: np.save(path, encoded, allow_pickle=False))
        write_json(folder / MANIFEST, {"made_from": made_from, "sha256": file_sha256(folder / VECTORS)})
    return Gallery(lat_lon, vectors, made_from)


def _map_vectors(folder: Path, made_from: dict[str, str]) -> NDArray[np.float32] | None:
    try:
        if read_json(folder / MANIFEST) != {"made_from": made_from, "sha256": file_sha256(folder / VECTORS)}:
            return None
        # Copied on writing, since torch wants what can be written.
        vectors = np.load(folder / VECTORS, mmap_mode="c", allow_pickle=False)
    except (GeoError, OSError, ValueError, EOFError):
        return None
    return vectors if vectors.dtype == np.float32 and vectors.ndim == 2 else None


def write_places(folder: Path, lat_lon: Floats) -> None:
    """Write the places (N, 2) of a folder's gallery."""
    write_table(folder / PLACES, pa.table({"lat": lat_lon[:, 0], "lon": lat_lon[:, 1]}))


def read_places_csv(path: Path) -> Floats:
    """Read places (N, 2) in degrees from a CSV with columns LAT and LON.

    Raises GeoError for another file or a wrong place.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            places = [(float(row["LAT"]), float(row["LON"])) for row in csv.DictReader(file)]
    except OSError as error:
        raise GeoError(f"cannot read {path}: {(error.strerror or type(error).__name__).lower()}") from None
    except KeyError:
        raise GeoError(f"{path} has no columns LAT and LON: give the gallery of the package geoclip") from None
    except (csv.Error, TypeError, ValueError) as error:
        raise GeoError(f"{path} is no list of places ({error}): give the gallery of the package geoclip") from None
    if not places:
        raise GeoError(f"{path} holds no place: give the gallery of the package geoclip")
    return np.column_stack(check_lat_lon(*np.array(places).T))
