"""The road on disk from the neighbours on: each stage a function from tables to a table, resumable, done once.

    photos -> embeddings -> neighbours -> candidates -> pool -> verdicts -> predictions
                         -> places     -> posterior
                                       -> matches

A photo that cannot be read has an error in ``embeddings``; it is missing from the tables between and stands again, with
its error and without coordinates, in ``predictions``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.metrics import RADII_KM
from rag_geotoken.pictures import load_pictures
from rag_geotoken.run.retrieval import run_stage
from rag_geotoken.run.tables import (
    read_candidates,
    read_embeddings,
    read_matches,
    read_neighbors,
    read_own_places,
    read_places,
    read_pool,
)
from rag_geotoken.tables import fixed_list, read_table, stage
from rag_geotoken.types import SOURCES, Predictions
from rag_geotoken.weights import fingerprint

if TYPE_CHECKING:
    import pyarrow as pa

    from rag_geotoken.options import Options
    from rag_geotoken.pipeline import Geolocator

Floats = NDArray[np.float64]


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

    return run_stage(folder, "candidates", recipe, ["embeddings", "neighbours"], ids, work)


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
    return run_stage(folder, "places", recipe, ["embeddings"], ids, work)


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
    return run_stage(folder, "posterior", recipe, ["embeddings", "neighbours"], ids, work)


def matches(folder: Path, geolocator: Geolocator) -> Path:
    """Photos' and neighbours' pictures -> matches: id, rank, row, lat, lon, score, in the neighbours' order."""
    import pyarrow as pa

    ids, _, _ = read_embeddings(folder)
    neighbors = read_neighbors(folder)
    photos = read_table(folder / "photos.parquet", ["id", "image"])
    reference = dict(zip(photos["id"].to_pylist(), photos["image"].to_pylist(), strict=True))

    def work(at: slice) -> pa.Table:
        pixels, _ = load_pictures([reference[name] for name in ids[at]], geolocator.matcher.size)
        near = neighbors[at]
        found = geolocator.match(pixels, near)
        k = found.scores.shape[1]
        return pa.table(
            {
                "id": pa.array(np.repeat(ids[at], k), pa.string()),
                "rank": np.tile(np.arange(1, k + 1, dtype=np.int32), len(found.scores)),
                "row": near.rows.ravel(),
                "lat": found.lat_lon[..., 0].ravel(),
                "lon": found.lat_lon[..., 1].ravel(),
                "score": found.scores.ravel(),
            }
        )

    recipe = {"index": geolocator.index.manifest["sha256"], "matcher": geolocator.matcher.identity}
    return run_stage(folder, "matches", recipe, ["photos", "embeddings", "neighbours"], ids, work)


def pool(folder: Path, geolocator: Geolocator, options: Options, diversify: bool = False) -> Path:
    """Neighbours, candidates and places -> pool: id, lat, lon, log_weight, source, one entry a cell.

    Where pictures are compared, the places that the matches move each photo to come last, each an entry of its own.
    diversify: then a multimodal model's answers to G3's prompts, of ``verdicts-mllm-diversify``.
    """
    import pyarrow as pa

    ids, _, _ = read_embeddings(folder)
    inputs = ["neighbours"] + ["candidates"] * bool(options.propose) + ["places"] * bool(options.gps_places)
    neighbors, candidates = read_neighbors(folder), read_candidates(folder) if options.propose else None
    found = read_places(folder) if options.gps_places else None
    visual = read_matches(folder) if "visual" in options.verify else None
    inputs += ["matches"] * (visual is not None) + ["verdicts-mllm-diversify"] * diversify
    own = read_own_places(folder, "mllm-diversify") if diversify else None

    def work(at: slice) -> pa.Table:
        made = geolocator.pool(
            neighbors[at], candidates and candidates[at], found and found[at], options.within, visual and visual[at],
            None if own is None else own[at],
        )  # fmt: skip
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
    if visual is not None:
        recipe |= {name: getattr(tuning, name) for name in ("visual_share", "match_scale")}
    if own is not None:
        recipe["mllm_share"] = tuning.mllm_share
    return run_stage(folder, "pool", recipe, inputs, ids, work)


def verify(folder: Path, geolocator: Geolocator, verifier: str) -> Path:
    """Pool -> verdicts-VERIFIER: id, verifier, status, and the scores over the photo's pool entries in their order."""
    import pyarrow as pa

    ids, photo, _ = read_embeddings(folder)
    neighbors, entries = read_neighbors(folder), read_pool(folder)
    found = read_matches(folder) if verifier == "visual" else None

    def work(at: slice) -> pa.Table:
        part = entries[at]
        scores = geolocator.verify(verifier, photo[at], neighbors[at], part, found and found[at])
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
    return run_stage(
        folder,
        f"verdicts-{verifier}",
        recipe,
        ["embeddings", "neighbours", "pool"] + ["matches"] * (found is not None),
        ids,
        work,
    )


def write_decision(
    folder: Path,
    variant: str,
    geolocator: Geolocator,
    inputs: list[str],
    decide: Callable[[], Predictions],
    area: Floats | None = None,
    max_area_km2: float | None = None,
    least_confidence: float = 0.0,
    verified: NDArray[np.bool_] | None = None,
) -> Path:
    """A decision on every readable photo, made unless it is there -> ``predictions-VARIANT`` of all photos.

    Columns: id, true_lat, true_lon (where the source knows them), lat, lon, source, confidence_1 ... confidence_2500,
    area_km2 (the posterior's effective area (N,), where it was computed), verified, error. A photo whose area is above
    ``max_area_km2``, or that is less sure than ``least_confidence`` to be within 200 km, gets no answer, and says so in
    error. verified (N,): whether a verifier that can fail answered.
    """
    import pyarrow as pa

    photos = read_table(folder / "photos.parquet", ["id", "lat", "lon"])
    errors = read_table(folder / "embeddings.parquet", ["error"])["error"]
    good = np.flatnonzero(errors.is_null().to_numpy())
    place = np.full(len(photos), -1)
    place[good] = np.arange(len(good))
    ids = photos["id"].to_pylist()

    @cache
    def decided() -> tuple[Predictions, list[str | None]]:
        decision, reasons = decide(), errors.to_pylist()
        wide = np.zeros(len(good), bool) if area is None or max_area_km2 is None else area > max_area_km2
        for i in good[wide].tolist():
            reasons[i] = f"abstained: the posterior is spread over more than {max_area_km2:g} km2"
        for i in good[decision.confidence[:, RADII_KM.index(200)] < least_confidence].tolist():
            reasons[i] = f"abstained: the chance to be within 200 km is below {least_confidence:g}"
        return decision, reasons

    anybody = any(name.startswith("verdicts") for name in inputs)
    checked = np.full(len(good), anybody) if verified is None else verified

    def work(at: slice) -> pa.Table:
        rows, (decision, reasons) = place[at], decided()
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
        columns["verified"] = pa.array(known & checked[np.where(rows >= 0, rows, 0)])
        columns["error"] = pa.array(reasons[at], pa.string())
        return pa.table(columns)

    recipe = {"variant": variant, "tuning": asdict(geolocator.tuning), "max_area_km2": max_area_km2}
    recipe |= {"least_confidence": least_confidence} if least_confidence else {}
    files = [folder / f"{name}.parquet" for name in ["photos", "embeddings", *inputs]]
    return stage(folder, f"predictions-{variant}", recipe, files, ids, work)
