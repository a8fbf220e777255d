"""The road on disk: each stage a function from tables to a table in a run folder, resumable, done once.

    photos -> embeddings -> neighbours -> candidates -> pool -> verdicts -> predictions
                         -> places     -> posterior

A photo that cannot be read has an error in ``embeddings``; it is missing from the tables between and stands again, with
its error and without coordinates, in ``predictions``.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.files import write_json
from rag_geotoken.index import COPIES
from rag_geotoken.metrics import RADII_KM
from rag_geotoken.progress import progress_bar
from rag_geotoken.run_tables import read_candidates, read_embeddings, read_neighbors, read_places, read_pool
from rag_geotoken.tables import fixed_list, read_table, stage, table_sha256
from rag_geotoken.types import SOURCES, Predictions
from rag_geotoken.weights import fingerprint

if TYPE_CHECKING:
    import pyarrow as pa

    from rag_geotoken.alignment import GeoAlignment
    from rag_geotoken.index import GeoIndex
    from rag_geotoken.pipeline import Geolocator, Options

BLOCK, LARGE_BLOCK, MANY = 256, 2048, 65_536  # photos a file while a stage runs, and of how many it has large ones
Floats = NDArray[np.float64]


def write_photos(folder: Path, source: str) -> Path:
    """The photos table of a source: id, image, lat, lon, place, author.

    The source is read each time and known by what it holds, since a folder can change under the same name. What it left
    out stands by reason in ``left_out.json``, and in one line on standard error.
    """
    from rag_geotoken.sources import read_source
    from rag_geotoken.sources.photos import read_left_out

    table = read_source(source)
    left_out = read_left_out(table)
    if line := left_out.line():
        print(f"{source}: {line}", file=sys.stderr)
    recipe = {"source": source, "content": table_sha256(table)}

    def work(_: slice) -> pa.Table:
        write_json(folder / "left_out.json", {"photos": len(table), **vars(left_out)})
        return table

    return stage(folder, "photos", recipe, [], ["all"], work)


def encode(folder: Path, alignment: GeoAlignment, projections: bool = False) -> Path:
    """Photos -> embeddings: id, image, gps and text (dim), digest of the pixels, error.

    projections: instead of the three parts the one projection that they follow from, in half precision: a sixth of the
    bytes, as ``projections``.
    """
    import pyarrow as pa

    from rag_geotoken.pipeline import digests

    photos = read_table(folder / "photos.parquet", ["id", "image"])
    ids, images = photos["id"].to_pylist(), photos["image"]

    def work(at: slice) -> pa.Table:
        pixels, errors = alignment.load(images[at.start : at.stop].to_pylist())
        if projections:
            vectors: dict[str, NDArray[Any]] = {"projection": alignment.project(pixels).astype(np.float16)}
        else:
            parts = alignment.embed(pixels)
            vectors = {name: parts[:, i] for i, name in enumerate(("image", "gps", "text"))}
        bad = [error is not None for error in errors]
        columns = {"id": pa.array(ids[at], pa.string())}
        for name, values in vectors.items():
            values[bad] = 0.0
            columns[name] = fixed_list(values)
        columns |= {"digest": pa.array(digests(pixels)), "error": pa.array(errors, pa.string())}
        return pa.table(columns)

    name = "projections" if projections else "embeddings"
    block = LARGE_BLOCK if len(ids) > MANY else BLOCK
    encoder = alignment.encoder_identity if projections else alignment.identity
    return _run(folder, name, {"encoder": encoder}, ["photos"], ids, work, block)


def search(
    folder: Path,
    index: GeoIndex,
    k: int,
    weights: tuple[float, ...],
    within: tuple[float, float, float] | None = None,
    other_authors: bool = False,
    exact: bool = False,
) -> Path:
    """Embeddings -> neighbours: id, rank, row, lat, lon, score; a photo never finds itself.

    within: only photos no further than (lat, lon, km) from a place; where fewer are, the nearest to it. other_authors:
    none by the photo's own author. exact: every row is compared, whatever the index.
    """
    import pyarrow as pa

    ids, photo, digest = read_embeddings(folder)
    recipe = {"k": k, "weights": list(weights), "index": index.manifest["sha256"]}
    chosen = {"within": within, "other_authors": other_authors, "exact": exact}
    recipe |= {name: value for name, value in chosen.items() if value}
    keep = index.mask(within, at_least=k + COPIES)
    names = read_table(folder / "photos.parquet", ["id", "author"])
    author_of = dict(zip(names["id"].to_pylist(), names["author"].to_pylist(), strict=True)) if other_authors else {}
    authors = [author_of.get(name) for name in ids]

    def work(at: slice) -> pa.Table:
        theirs = authors[at] if other_authors else None
        found = index.search(photo[at], k, weights, digest[at], keep, exact=exact, authors=theirs)
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


def propose(folder: Path, geolocator: Geolocator, options: Options) -> Path:
    """Embeddings and neighbours -> candidates: id, lat, lon, tokens, log_prob (untempered), source."""
    import pyarrow as pa

    ids, photo, _ = read_embeddings(folder)
    neighbors = read_neighbors(folder)
    # A photo's random stream follows from its id, so no block or batch changes its samples.
    keys = [zlib.crc32(name.encode()) for name in ids]
    names = ("propose", "beam_width", "samples", "temperature", "top_p", "epsilon", "within", "seed")
    recipe: dict[str, Any] = {name: value for name, value in asdict(options).items() if name in names}
    recipe |= {"weights": fingerprint(geolocator.tokens), "propose": list(options.propose)}

    def work(at: slice) -> pa.Table:
        found = geolocator.propose(photo[at], neighbors[at], options, keys[at])
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


def places(folder: Path, geolocator: Geolocator, options: Options) -> Path:
    """Embeddings -> places: id, rank, lat, lon, score, those most like the photo's GPS embedding."""
    import pyarrow as pa

    ids, photo, _ = read_embeddings(folder)

    def work(at: slice) -> pa.Table:
        found = geolocator.places(photo[at], options.gps_places)
        n = found.scores.shape[1]
        return pa.table(
            {
                "id": pa.array(np.repeat(ids[at], n), pa.string()),
                "rank": np.tile(np.arange(1, n + 1, dtype=np.int32), len(found.scores)),
                "lat": found.lat_lon[..., 0].ravel(),
                "lon": found.lat_lon[..., 1].ravel(),
                "score": found.scores.ravel(),
            }
        )

    recipe = {"encoder": geolocator.alignment.identity, "gps_places": options.gps_places}
    return _run(folder, "places", recipe, ["embeddings"], ids, work)


def posterior(folder: Path, geolocator: Geolocator, options: Options) -> Path:
    """Embeddings and neighbours -> posterior: id, cell (S2 id of any level), mass, the heaviest first."""
    import pyarrow as pa

    ids, photo, _ = read_embeddings(folder)
    neighbors = read_neighbors(folder)

    def work(at: slice) -> pa.Table:
        found = geolocator.posterior(photo[at], neighbors[at], options)
        kept = found.mass > 0
        return pa.table(
            {
                "id": pa.array(np.repeat(ids[at], kept.sum(axis=1)), pa.string()),
                "cell": found.cells[kept],
                "mass": found.mass[kept],
            }
        )

    recipe = {"weights": fingerprint(geolocator.tokens), "openings": options.openings}
    return _run(folder, "posterior", recipe, ["embeddings", "neighbours"], ids, work)


def pool(folder: Path, geolocator: Geolocator, options: Options) -> Path:
    """Neighbours, candidates and places -> pool: id, lat, lon, log_weight, source, one entry a cell."""
    import pyarrow as pa

    ids, _, _ = read_embeddings(folder)
    inputs = ["neighbours"] + ["candidates"] * bool(options.propose) + ["places"] * bool(options.gps_places)
    neighbors, candidates = read_neighbors(folder), read_candidates(folder) if options.propose else None
    found = read_places(folder) if options.gps_places else None

    def work(at: slice) -> pa.Table:
        made = geolocator.pool(neighbors[at], candidates and candidates[at], found and found[at], options.within)
        return pa.table(
            {
                "id": pa.array(np.repeat(ids[at], made.mask.sum(axis=1)), pa.string()),
                "lat": made.lat_lon[made.mask][:, 0],
                "lon": made.lat_lon[made.mask][:, 1],
                "log_weight": made.log_weight[made.mask],
                "source": np.array(SOURCES)[made.source[made.mask]],
            }
        )

    tuning = geolocator.tuning
    recipe: dict[str, Any] = {"level": geolocator.tokenizer.level, "within": options.within}
    recipe |= {name: getattr(tuning, name) for name in ("neighbor_share", "neighbor_scale", "gps_share")}
    return _run(folder, "pool", recipe, inputs, ids, work)


def verify(folder: Path, geolocator: Geolocator, verifier: str) -> Path:
    """Pool -> verdicts-VERIFIER: id, verifier, status, and the scores over the photo's pool entries in their order."""
    import pyarrow as pa

    ids, photo, _ = read_embeddings(folder)
    neighbors, entries = read_neighbors(folder), read_pool(folder)

    def work(at: slice) -> pa.Table:
        part = entries[at]
        scores = geolocator.verify(verifier, photo[at], neighbors[at], part)
        lists = [row[kept] for row, kept in zip(scores, part.mask, strict=True)]
        count = len(lists)
        return pa.table(
            {
                "id": pa.array(ids[at], pa.string()),
                "verifier": [verifier] * count,
                "status": ["ok"] * count,
                "scores": pa.array(lists, pa.list_(pa.float32())),
            }
        )

    recipe = {"verifier": verifier, "weights": geolocator.verifier_id(verifier)}
    return _run(folder, f"verdicts-{verifier}", recipe, ["embeddings", "neighbours", "pool"], ids, work)


def write_decision(
    folder: Path,
    variant: str,
    geolocator: Geolocator,
    inputs: list[str],
    decision: Predictions,
    area: Floats | None = None,
    max_area_km2: float | None = None,
) -> Path:
    """A decision on every readable photo -> ``predictions-VARIANT`` of all photos.

    Columns: id, true_lat, true_lon (where the source knows them), lat, lon, source, confidence_1 ... confidence_2500,
    area_km2 (the posterior's effective area (N,), where it was computed), verified, error. A photo whose area is above
    ``max_area_km2`` gets no answer, and says so in error.
    """
    import pyarrow as pa

    photos = read_table(folder / "photos.parquet", ["id", "lat", "lon"])
    errors = read_table(folder / "embeddings.parquet", ["error"])["error"]
    good = np.flatnonzero(errors.is_null().to_numpy())
    place = np.full(len(photos), -1)
    place[good] = np.arange(len(good))
    ids, reasons = photos["id"].to_pylist(), errors.to_pylist()
    wide = np.zeros(len(good), bool) if area is None or max_area_km2 is None else area > max_area_km2
    for i in good[wide].tolist():
        reasons[i] = f"abstained: the posterior is spread over more than {max_area_km2:g} km2"

    def work(at: slice) -> pa.Table:
        rows = place[at]
        known = np.array([reason is None for reason in reasons[at]])

        def column(values: NDArray[Any], kind: pa.DataType, known: NDArray[np.bool_] = known) -> pa.Array:
            return pa.array(values[np.where(rows >= 0, rows, 0)], kind, mask=~known)

        columns = {"id": pa.array(ids[at], pa.string())}
        columns |= {f"true_{axis}": photos[axis].combine_chunks()[at.start : at.stop] for axis in ("lat", "lon")}
        columns |= {axis: column(decision.lat_lon[:, i], pa.float64()) for i, axis in enumerate(("lat", "lon"))}
        columns["source"] = column(np.array(SOURCES)[decision.source], pa.string())
        columns |= {f"confidence_{r}": column(decision.confidence[:, i], pa.float64()) for i, r in enumerate(RADII_KM)}
        spread = np.full(len(good), np.nan) if area is None else area
        columns["area_km2"] = column(spread, pa.float64(), (rows >= 0) & (area is not None))
        columns["verified"] = pa.array(known & any(name.startswith("verdicts") for name in inputs))
        columns["error"] = pa.array(reasons[at], pa.string())
        return pa.table(columns)

    recipe = {"variant": variant, "tuning": asdict(geolocator.tuning), "max_area_km2": max_area_km2}
    files = [folder / f"{name}.parquet" for name in ["photos", "embeddings", *inputs]]
    return stage(folder, f"predictions-{variant}", recipe, files, ids, work)


def _run(
    folder: Path,
    name: str,
    recipe: dict[str, Any],
    inputs: list[str],
    ids: list[str],
    work: Callable[[slice], pa.Table],
    block: int | None = None,
) -> Path:
    files = [folder / f"{file}.parquet" for file in inputs]
    with progress_bar(len(ids), f"{folder.name}: {name}") as advance:
        return stage(folder, name, recipe, files, ids, work, block=block or BLOCK, progress=advance)
