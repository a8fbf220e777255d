"""These functions run GeoCLIP on a user's photos and texts: stage tables, then answers; no index is needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from rag_geotoken.errors import GeoError
from rag_geotoken.peers.gallery import Matches
from rag_geotoken.peers.geoclip import GeoCLIP, answers
from rag_geotoken.photos.inputs import read_photos
from rag_geotoken.run.export import check_output, write_predictions
from rag_geotoken.run.resumable import run_stage
from rag_geotoken.storage.parquet import fixed_list, read_table, to_numpy, write_table
from rag_geotoken.storage.weights import fingerprint
from rag_geotoken.types import Photos

BLOCK = 64  # a large CLIP takes about a second a picture on a CPU
PLACE = ("lat", "lon", "probability")


def locate_by_gallery(
    photos: list[str], out: Path, weights: Path, backbone: str | None, k: int, run: Path, limit: int | None = None
) -> tuple[int, list[str]]:
    """Locate pictures, folders, CSVs and sources and write ``out``; return the number of answers and all errors.

    Raises GeoError when nothing can be located, a file cannot be written, or weights and backbone do not fit.
    """
    check_output(out)
    table = read_photos(photos, limit)
    geoclip = GeoCLIP.from_pretrained(weights, backbone)
    write_table(run / "photos.parquet", table)
    encode(run, geoclip)
    predictions = read_table(predict(run, geoclip, k))
    write_predictions(out, predictions)
    failed = [error for error in predictions["error"].to_pylist() if error]
    return len(predictions) - len(failed), failed


def places_of(texts: list[str], weights: Path, backbone: str | None, k: int) -> dict[str, list[dict[str, float]]]:
    """Return for each text the k gallery places most like it, best first: lat, lon, probability. Raises GeoError."""
    geoclip = GeoCLIP.from_pretrained(weights, backbone)
    return dict(zip(texts, _places(geoclip.search(geoclip.embed_texts(texts), k)), strict=True))


def encode(folder: Path, geoclip: GeoCLIP) -> Path:
    """Write the stage table embeddings-geoclip of a run's photos: id, geoclip (dim), error."""
    photos = read_table(folder / "photos.parquet", ["id", "image"])
    ids, references = photos["id"].to_pylist(), photos["image"].to_pylist()

    def work(block: slice) -> pa.Table:
        pixels, errors = geoclip.backbone.load(references[block])
        vectors = geoclip.embed(pixels).numpy()
        vectors[[error is not None for error in errors]] = 0.0
        columns = {"id": pa.array(ids[block], pa.string()), "geoclip": fixed_list(vectors)}
        return pa.table(columns | {"error": pa.array(errors, pa.string())})

    recipe = {"backbone": geoclip.backbone.identity(), "head": fingerprint(geoclip.head)}
    return run_stage(folder, "embeddings-geoclip", recipe, ["photos"], ids, work, block=BLOCK)


def predict(folder: Path, geoclip: GeoCLIP, k: int) -> Path:
    """Write the stage table predictions-geoclip: as every decision's, and ``places``, the k likeliest.

    Raises GeoError when no picture could be read.
    """
    photos = Photos.from_table(read_table(folder / "photos.parquet"))
    embeddings = read_table(folder / "embeddings-geoclip.parquet")
    vectors, errors = to_numpy(embeddings["geoclip"]), embeddings["error"].to_pylist()
    if all(errors):
        raise GeoError(f"none of the {len(errors)} pictures can be read; the first: {errors[0]}")
    places_type = pa.list_(pa.struct([(name, pa.float64()) for name in PLACE]))

    def work(block: slice) -> pa.Table:
        matches = geoclip.search(torch.from_numpy(vectors[block].copy()), k)
        places = [None if error else places for error, places in zip(errors[block], _places(matches), strict=True)]
        table = answers(photos[block], errors[block], matches).to_table()
        return table.append_column("places", pa.array(places, places_type))

    recipe = {"k": k, "head": fingerprint(geoclip.head), "gallery": geoclip.gallery.made_from}
    inputs = ["photos", "embeddings-geoclip"]
    return run_stage(folder, "predictions-geoclip", recipe, inputs, photos.ids, work, block=512)


def _places(matches: Matches) -> list[list[dict[str, float]]]:
    rows = np.dstack([matches.lat_lon, matches.probability]).tolist()
    return [[dict(zip(PLACE, place, strict=True)) for place in places] for places in rows]
