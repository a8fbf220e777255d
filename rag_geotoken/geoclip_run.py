"""GeoCLIP on a user's photos and texts: stage tables, then a file of answers; no index is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.errors import GeoError
from rag_geotoken.gallery import Found
from rag_geotoken.geoclip import GeoCLIP
from rag_geotoken.run.export import check_output, write_predictions
from rag_geotoken.run.locate import read_photos
from rag_geotoken.run.resumable import run_stage
from rag_geotoken.tables import fixed_list, read_table, to_numpy, write_table
from rag_geotoken.types import RADII_KM
from rag_geotoken.weights import fingerprint

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK = 64  # a large CLIP takes about a second a picture on a CPU


def locate_by_gallery(
    photos: list[str], out: Path, weights: Path, backbone: str | None, k: int, run: Path, limit: int | None = None
) -> tuple[int, list[str]]:
    """Locate pictures, folders, CSVs and sources, write ``out`` -> how many have an answer, errors of the others.

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
    """For each text the k gallery places most like it, best first: lat, lon, probability. Raises GeoError."""
    geoclip = GeoCLIP.from_pretrained(weights, backbone)
    found = geoclip.search(geoclip.embed_texts(texts), k)
    return dict(zip(texts, _places(found, np.ones(len(texts), bool)).to_pylist(), strict=True))


def encode(folder: Path, geoclip: GeoCLIP) -> Path:
    """Photos -> embeddings-geoclip: id, geoclip (dim), error."""
    import pyarrow as pa

    photos = read_table(folder / "photos.parquet", ["id", "image"])
    ids, references = photos["id"].to_pylist(), photos["image"].to_pylist()

    def work(at: slice) -> pa.Table:
        pixels, errors = geoclip.backbone.load(references[at])
        vectors = geoclip.embed(pixels).numpy()
        vectors[[error is not None for error in errors]] = 0.0
        columns = {"id": pa.array(ids[at], pa.string()), "geoclip": fixed_list(vectors)}
        return pa.table(columns | {"error": pa.array(errors, pa.string())})

    recipe = {"backbone": geoclip.backbone.identity(), "head": fingerprint(geoclip.head)}
    return run_stage(folder, "embeddings-geoclip", recipe, ["photos"], ids, work, block=BLOCK)


def predict(folder: Path, geoclip: GeoCLIP, k: int) -> Path:
    """Embeddings-geoclip -> predictions-geoclip, as every decision's table, and ``places``: the k likeliest.

    Raises GeoError when no picture could be read.
    """
    import pyarrow as pa
    import torch

    photos = read_table(folder / "photos.parquet", ["id", "lat", "lon"])
    embeddings = read_table(folder / "embeddings-geoclip.parquet")
    if not embeddings["error"].null_count:
        raise GeoError(
            f"none of the {len(embeddings)} pictures can be read; the first: {embeddings['error'][0].as_py()}"
        )
    ids, vectors = photos["id"].to_pylist(), to_numpy(embeddings["geoclip"])

    def work(at: slice) -> pa.Table:
        part, errors = photos[at], embeddings["error"][at]
        known = errors.is_null().to_numpy(zero_copy_only=False)
        found = geoclip.search(torch.from_numpy(vectors[at].copy()), k)

        def column(values: NDArray[Any]) -> pa.Array:
            return pa.array(values, mask=~known)

        columns = {"id": part["id"], "true_lat": part["lat"], "true_lon": part["lon"]}
        columns |= {"lat": column(found.lat_lon[:, 0, 0]), "lon": column(found.lat_lon[:, 0, 1])}
        columns["source"] = column(np.full(len(known), "gallery", object))
        columns |= {f"confidence_{r}": column(found.confidence[:, i]) for i, r in enumerate(RADII_KM)}
        columns["area_km2"] = pa.nulls(len(known), pa.float64())
        columns |= {"verified": pa.array(np.zeros(len(known), bool)), "error": errors}
        return pa.table(columns | {"places": _places(found, known)})

    recipe = {"k": k, "head": fingerprint(geoclip.head), "gallery": geoclip.gallery.made_from}
    inputs = ["photos", "embeddings-geoclip"]
    return run_stage(folder, "predictions-geoclip", recipe, inputs, ids, work, block=512)


def _places(found: Found, known: NDArray[np.bool_]) -> pa.Array:
    """The places of each query as one list of structs, null where the query is not ``known``."""
    import pyarrow as pa

    values = found.lat_lon[..., 0], found.lat_lon[..., 1], found.probability
    structs = pa.StructArray.from_arrays([pa.array(v[known].ravel()) for v in values], ["lat", "lon", "probability"])
    counts = np.where(known, found.rows.shape[1], 0)
    offsets = pa.array(np.append(0, np.cumsum(counts)), pa.int32(), mask=np.append(~known, False))
    return pa.ListArray.from_arrays(offsets, structs)
