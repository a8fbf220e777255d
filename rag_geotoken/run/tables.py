"""The tables of a run read back as arrays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.errors import GeoError
from rag_geotoken.metrics import RADII_KM
from rag_geotoken.posterior import Posterior
from rag_geotoken.tables import read_table, to_numpy
from rag_geotoken.types import SOURCES, Candidates, Matches, Neighbors, Places, Pool

if TYPE_CHECKING:
    import pyarrow as pa

Floats = NDArray[np.float64]


def read_embeddings(folder: Path) -> tuple[list[str], NDArray[np.float32], list[str]]:
    """The readable photos of a run -> ids, (N, 3, dim) embeddings, digests. Raises GeoError when there is none."""
    table = read_table(folder / "embeddings.parquet")
    good = table.filter(table["error"].is_null())
    if not len(good):
        raise GeoError(f"none of the {len(table)} pictures can be read; the first: {table['error'][0].as_py()}")
    vectors = np.stack([to_numpy(good[name]) for name in ("image", "gps", "text")], axis=1)
    return good["id"].to_pylist(), vectors, good["digest"].to_pylist()


def read_neighbors(folder: Path) -> Neighbors:
    """The neighbours of a run as arrays (N, K)."""
    table = read_table(folder / "neighbours.parquet", ["rank", "row", "lat", "lon", "score"])
    k = int(table["rank"].to_numpy().max())
    rows, lat, lon, score = (table[name].to_numpy().reshape(-1, k) for name in ("row", "lat", "lon", "score"))
    return Neighbors(rows, np.stack([lat, lon], axis=-1), score)


def read_places(folder: Path) -> Places:
    """The places of a run found by GPS embedding, as arrays (N, K)."""
    table = read_table(folder / "places.parquet", ["rank", "lat", "lon", "score"])
    k = int(table["rank"].to_numpy().max())
    lat, lon, score = (table[name].to_numpy().reshape(-1, k) for name in ("lat", "lon", "score"))
    return Places(np.stack([lat, lon], axis=-1), score)


def read_matches(folder: Path) -> Matches:
    """Where the neighbours' pictures put the photos of a run, as arrays (N, K)."""
    table = read_table(folder / "matches.parquet", ["rank", "lat", "lon", "score"])
    k = int(table["rank"].to_numpy().max())
    lat, lon, score = (table[name].to_numpy().reshape(-1, k) for name in ("lat", "lon", "score"))
    return Matches(np.stack([lat, lon], axis=-1), score)


def read_candidates(folder: Path) -> Candidates:
    """The candidates of a run as arrays (N, M)."""
    table = read_table(folder / "candidates.parquet", ["id", "tokens", "log_prob", "source"])
    photos = len(table["id"].unique())
    tokens = to_numpy(table["tokens"]).astype(np.int64)
    return Candidates(
        tokens.reshape(photos, -1, tokens.shape[-1]),
        table["log_prob"].to_numpy().reshape(photos, -1),
        _source_numbers(table["source"]).reshape(photos, -1),
    )


def read_pool(folder: Path) -> Pool:
    """The pool of a run as padded arrays (N, C)."""
    table = read_table(folder / "pool.parquet")
    mask = _mask(table["id"])
    lat_lon, weight = np.zeros((*mask.shape, 2)), np.full(mask.shape, -np.inf, np.float32)
    lat_lon[mask] = np.column_stack([table["lat"].to_numpy(), table["lon"].to_numpy()])
    weight[mask] = table["log_weight"].to_numpy()
    source = np.zeros(mask.shape, np.int8)
    source[mask] = _source_numbers(table["source"])
    return Pool(lat_lon, weight, source, mask)


def read_posterior(folder: Path) -> Posterior:
    """The posterior of a run as padded arrays (N, M)."""
    table = read_table(folder / "posterior.parquet", ["id", "cell", "mass"])
    kept = _mask(table["id"])
    mass = np.zeros(kept.shape, np.float32)
    mass[kept] = table["mass"].to_numpy()
    cells = np.full(kept.shape, table["cell"][0].as_py(), np.uint64)  # what fills up has no mass, any cell will do
    cells[kept] = table["cell"].to_numpy()
    return Posterior(cells, mass)


def read_verdicts(folder: Path, entries: Pool, verifier: str) -> NDArray[np.float32]:
    """The scores of a verifier over a run's pool (N, C)."""
    table = read_table(folder / f"verdicts-{verifier}.parquet", ["scores"])
    scores = np.zeros(entries.mask.shape, np.float32)
    scores[entries.mask] = table["scores"].combine_chunks().flatten().to_numpy()
    return scores


def read_own_places(folder: Path, name: str) -> Floats:
    """``verdicts-NAME`` of a multimodal model -> the places of its own (N, M, 2), NaN where there are no more."""
    table = read_table(folder / f"verdicts-{name}.parquet", ["lat", "lon"])
    return np.stack([padded(table[axis]) for axis in ("lat", "lon")], axis=-1)


def padded(lists: pa.ChunkedArray) -> Floats:
    """A column of N lists of numbers -> (N, M), NaN behind each; M at least 1."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(lists).to_numpy()
    there = np.arange(max(1, lengths.max(initial=0))) < lengths[:, None]
    values = np.full(there.shape, np.nan)
    values[there] = pc.list_flatten(lists).to_numpy()
    return values


def read_truth(folder: Path) -> tuple[Floats, NDArray[np.bool_]]:
    """Of every photo of a run: its true place (N, 2), NaN where unknown, and whether it could be read (N,)."""
    photos = read_table(folder / "photos.parquet", ["lat", "lon"])
    good = read_table(folder / "embeddings.parquet", ["error"])["error"].is_null().to_numpy()
    return np.column_stack([photos["lat"].to_numpy(), photos["lon"].to_numpy()]), good


def read_predictions(path: Path) -> tuple[Floats, Floats, Floats]:
    """A predictions table -> true places (N, 2), answers (N, 2), confidences (N, R); NaN where there is none."""
    table = read_table(path)

    def columns(*names: str) -> Floats:
        return np.column_stack([table[name].to_numpy(zero_copy_only=False).astype(float) for name in names])

    return columns("true_lat", "true_lon"), columns("lat", "lon"), columns(*(f"confidence_{r}" for r in RADII_KM))


def _mask(ids: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Ids in runs -> (N, longest run) true for as many places a row as the run is long."""
    codes = ids.combine_chunks().dictionary_encode().indices.to_numpy()
    counts = np.bincount(codes)
    mask: NDArray[np.bool_] = np.arange(counts.max()) < counts[:, None]
    return mask


def _source_numbers(column: pa.ChunkedArray) -> NDArray[np.int8]:
    import pyarrow as pa
    import pyarrow.compute as pc

    numbers: NDArray[np.int8] = pc.index_in(column, pa.array(SOURCES)).to_numpy().astype(np.int8)
    return numbers
