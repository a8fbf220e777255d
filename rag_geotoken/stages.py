"""The road on disk: each stage a function from tables to a table in a run folder, resumable, done once.

    photos -> embeddings -> neighbours -> candidates -> pool -> verdicts -> predictions

A photo that cannot be read has an error in ``embeddings``; it is missing from the tables between and stands again, with
its error and without coordinates, in ``predictions``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.errors import GeoError
from rag_geotoken.metrics import RADII_KM
from rag_geotoken.pictures import load_pictures
from rag_geotoken.progress import progress_bar
from rag_geotoken.tables import fixed_list, read_table, stage, table_sha256, to_numpy
from rag_geotoken.types import SOURCES, Candidates, Neighbors, Pool, Predictions

if TYPE_CHECKING:
    import pyarrow as pa

    from rag_geotoken.alignment import GeoAlignment
    from rag_geotoken.index import GeoIndex
    from rag_geotoken.pipeline import Geolocator, Options

BLOCK = 256
Floats = NDArray[np.float64]


def write_photos(folder: Path, source: str) -> Path:
    """The photos table of a source: id, image, lat, lon, place, author.

    The source is read each time and known by what it holds, since a folder can change under the same name.
    """
    from rag_geotoken.sources import read_source

    table = read_source(source)
    recipe = {"source": source, "content": table_sha256(table)}
    return stage(folder, "photos", recipe, [], ["all"], lambda _: table)


def encode(folder: Path, alignment: GeoAlignment, encoder: str) -> Path:
    """Photos -> embeddings: id, image, gps and text (dim), digest of the pixels, error."""
    import pyarrow as pa

    from rag_geotoken.pipeline import digests

    photos = read_table(folder / "photos.parquet", ["id", "image"])
    ids, references = photos["id"].to_pylist(), photos["image"].to_pylist()

    def work(at: slice) -> pa.Table:
        pixels, errors = load_pictures(references[at], 64)
        vectors = alignment.embed(pixels)
        bad = [error is not None for error in errors]
        vectors[bad] = 0.0
        columns = {"id": pa.array(ids[at], pa.string())}
        columns |= {name: fixed_list(vectors[:, i]) for i, name in enumerate(("image", "gps", "text"))}
        columns |= {"digest": pa.array(digests(pixels)), "error": pa.array(errors, pa.string())}
        return pa.table(columns)

    return _run(folder, "embeddings", {"encoder": encoder}, ["photos"], ids, work)


def search(folder: Path, index: GeoIndex, k: int, weights: tuple[float, ...]) -> Path:
    """Embeddings -> neighbours: id, rank, row, lat, lon, score; a photo never finds itself."""
    import pyarrow as pa

    ids, photo, digest = read_embeddings(folder)
    recipe = {"k": k, "weights": list(weights), "index": index.manifest["sha256"]}

    def work(at: slice) -> pa.Table:
        found = index.search(photo[at], k, weights, digest[at])
        return pa.table(
            {
                "id": pa.array(np.repeat(ids[at], k), pa.string()),
                "rank": np.tile(np.arange(1, k + 1, dtype=np.int32), len(found.rows)),
                "row": found.rows.ravel(),
                "lat": found.lat_lon[..., 0].ravel(),
                "lon": found.lat_lon[..., 1].ravel(),
                "score": found.scores.ravel(),
            }
        )

    return _run(folder, "neighbours", recipe, ["embeddings"], ids, work)


def propose(folder: Path, geolocator: Geolocator, options: Options, weights: str) -> Path:
    """Embeddings and neighbours -> candidates: id, lat, lon, tokens, log_prob (untempered), source."""
    import pyarrow as pa

    ids, photo, _ = read_embeddings(folder)
    neighbors = read_neighbors(folder)
    # A photo's random stream follows from its id, so no block or batch changes its samples.
    keys = [zlib.crc32(name.encode()) for name in ids]
    names = ("propose", "beam_width", "samples", "temperature", "seed")
    recipe = {"weights": weights} | {name: value for name, value in asdict(options).items() if name in names}
    recipe["propose"] = list(options.propose)

    def work(at: slice) -> pa.Table:
        near = Neighbors(neighbors.rows[at], neighbors.lat_lon[at], neighbors.scores[at])
        found = geolocator.propose(photo[at], near, options, keys[at])
        tokens = found.tokens.reshape(-1, found.tokens.shape[-1])
        lat, lon = geolocator.tokenizer.decode(tokens)
        return pa.table(
            {
                "id": pa.array(np.repeat(ids[at], found.log_prob.shape[1]), pa.string()),
                "lat": lat,
                "lon": lon,
                "tokens": fixed_list(tokens.astype(np.int16)),
                "log_prob": found.log_prob.ravel(),
                "source": np.array(SOURCES)[found.source.ravel()],
            }
        )

    return _run(folder, "candidates", recipe, ["embeddings", "neighbours"], ids, work)


def pool(folder: Path, geolocator: Geolocator, generated: bool = True) -> Path:
    """Neighbours, and candidates if there are any -> pool: id, lat, lon, log_weight, source, one entry a cell."""
    import pyarrow as pa

    ids, _, _ = read_embeddings(folder)
    inputs = ["neighbours", "candidates"] if generated else ["neighbours"]
    neighbors, candidates = read_neighbors(folder), read_candidates(folder) if generated else None

    def work(at: slice) -> pa.Table:
        near = Neighbors(neighbors.rows[at], neighbors.lat_lon[at], neighbors.scores[at])
        cells = candidates and Candidates(candidates.tokens[at], candidates.log_prob[at], candidates.source[at])
        made = geolocator.pool(near, cells)
        return pa.table(
            {
                "id": pa.array(np.repeat(ids[at], made.mask.sum(axis=1)), pa.string()),
                "lat": made.lat_lon[made.mask][:, 0],
                "lon": made.lat_lon[made.mask][:, 1],
                "log_weight": made.log_weight[made.mask],
                "source": np.array(SOURCES)[made.source[made.mask]],
            }
        )

    recipe = {"tuning": asdict(geolocator.tuning), "level": geolocator.tokenizer.level}
    return _run(folder, "pool", recipe, inputs, ids, work)


def verify(folder: Path, geolocator: Geolocator) -> Path:
    """Pool -> verdicts: id, verifier, status, and the scores over the photo's pool entries in their order."""
    import pyarrow as pa

    ids, photo, _ = read_embeddings(folder)
    entries = read_pool(folder)

    def work(at: slice) -> pa.Table:
        part = Pool(entries.lat_lon[at], entries.log_weight[at], entries.source[at], entries.mask[at])
        scores = geolocator.verify(photo[at], part)
        lists = [row[kept] for row, kept in zip(scores, part.mask, strict=True)]
        count = len(lists)
        return pa.table(
            {
                "id": pa.array(ids[at], pa.string()),
                "verifier": ["alignment"] * count,
                "status": ["ok"] * count,
                "scores": pa.array(lists, pa.list_(pa.float32())),
            }
        )

    return _run(folder, "verdicts", {"verifier": "alignment"}, ["embeddings", "pool"], ids, work)


def write_decision(
    folder: Path, variant: str, geolocator: Geolocator, inputs: list[str], decision: Predictions
) -> Path:
    """A decision on every readable photo -> ``predictions-VARIANT`` of all photos.

    Columns: id, true_lat, true_lon (where the source knows them), lat, lon, source, confidence_1 ... confidence_2500,
    verified, error.
    """
    import pyarrow as pa

    photos = read_table(folder / "photos.parquet", ["id", "lat", "lon"])
    errors = read_table(folder / "embeddings.parquet", ["error"])["error"]
    good = np.flatnonzero(errors.is_null().to_numpy())
    place = np.full(len(photos), -1)
    place[good] = np.arange(len(good))
    ids = photos["id"].to_pylist()

    def work(at: slice) -> pa.Table:
        rows = place[at]
        known = rows >= 0

        def column(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
            return pa.array(values[np.where(known, rows, 0)], kind, mask=~known)

        columns = {"id": pa.array(ids[at], pa.string())}
        columns |= {f"true_{axis}": photos[axis].combine_chunks()[at.start : at.stop] for axis in ("lat", "lon")}
        columns |= {axis: column(decision.lat_lon[:, i], pa.float64()) for i, axis in enumerate(("lat", "lon"))}
        columns["source"] = column(np.array(SOURCES)[decision.source], pa.string())
        columns |= {f"confidence_{r}": column(decision.confidence[:, i], pa.float64()) for i, r in enumerate(RADII_KM)}
        columns["verified"] = pa.array(known & ("verdicts" in inputs))
        columns["error"] = errors.combine_chunks()[at.start : at.stop]
        return pa.table(columns)

    recipe = {"variant": variant, "tuning": asdict(geolocator.tuning)}
    files = [folder / f"{name}.parquet" for name in ["photos", "embeddings", *inputs]]
    return stage(folder, f"predictions-{variant}", recipe, files, ids, work)


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


def read_verdicts(folder: Path, entries: Pool) -> NDArray[np.float32]:
    """The scores of a run's verdicts over its pool (N, C)."""
    table = read_table(folder / "verdicts.parquet", ["scores"])
    scores = np.zeros(entries.mask.shape, np.float32)
    scores[entries.mask] = table["scores"].combine_chunks().flatten().to_numpy()
    return scores


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


def _run(
    folder: Path,
    name: str,
    recipe: dict[str, Any],
    inputs: list[str],
    ids: list[str],
    work: Callable[[slice], pa.Table],
) -> Path:
    files = [folder / f"{file}.parquet" for file in inputs]
    with progress_bar(len(ids), f"{folder.name}: {name}") as advance:
        return stage(folder, name, recipe, files, ids, work, block=BLOCK, progress=advance)
