"""Locate a user's own photos: from paths to a file of answers, stage tables kept beside it."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.decision import strategies as selection
from rag_geotoken.errors import GeoError
from rag_geotoken.exclusion import copies
from rag_geotoken.files import check_writable
from rag_geotoken.geo import check_lat_lon
from rag_geotoken.options import Options
from rag_geotoken.pictures import list_pictures
from rag_geotoken.pipeline import Geolocator, digests
from rag_geotoken.posterior import effective_area_km2
from rag_geotoken.run import retrieval, stages
from rag_geotoken.run.export import check_format, write_predictions
from rag_geotoken.run.mllm_stage import Asked, ask_model, decide_told, read_told
from rag_geotoken.run.tables import read_embeddings, read_matches, read_pool, read_posterior, read_verdicts
from rag_geotoken.sources import is_source, limited, read_source
from rag_geotoken.sources.photos import read_left_out
from rag_geotoken.tables import read_table, write_table
from rag_geotoken.types import Predictions

if TYPE_CHECKING:
    import pyarrow as pa


def locate_photos(
    photos: list[str],
    index: Path,
    out: Path,
    options: Options,
    weights: Path,
    run: Path,
    limit: int | None = None,
    backbone: str | None = None,
    asked: Asked | None = None,
    matcher: str | None = None,
) -> tuple[int, list[str]]:
    """Locate pictures, folders, CSVs and sources, write ``out`` -> how many have an answer, errors of the others.

    asked: the multimodal model, where one verifies or names places. matcher: of street photos' keypoints. Raises
    GeoError when nothing can be located, a file cannot be written, or index and weights do not fit.
    """
    check_format(out)
    check_writable(out.parent)
    table = read_photos(photos, limit)
    geolocator = Geolocator.from_pretrained(index, weights, backbone, matcher)
    write_table(run / "photos.parquet", table)
    retrieval.encode(run, geolocator.alignment)
    search = options.within, options.other_authors, options.exact
    retrieval.search(run, geolocator.index, options.neighbors, geolocator.tuning.search_weights, *search)
    if options.propose:
        stages.propose(run, geolocator, options)
    inputs, area = ["pool"], None
    if options.max_area_km2 is not None:
        stages.posterior(run, geolocator, options)
        inputs, area = ["pool", "posterior"], effective_area_km2(read_posterior(run))
    if options.gps_places:
        stages.places(run, geolocator, options)
    if "visual" in options.verify:
        stages.matches(run, geolocator)
    diversify = asked is not None and asked.asking.mode == "diversify"
    if asked and diversify:
        ask_model(run, "mllm-diversify", geolocator, asked)
    stages.pool(run, geolocator, options, diversify)
    decide, answered, verdicts = _verified(run, geolocator, options, asked)
    name, limits = selection.verified_by(options.verify), (options.max_area_km2, options.least_confidence)
    path = stages.write_decision(run, name, geolocator, [*inputs, *verdicts], decide, area, *limits, answered)
    predictions = read_table(path)
    write_predictions(out, predictions)
    failed = [error for error in predictions["error"].to_pylist() if error]
    return len(predictions) - len(failed), failed


def _verified(
    run: Path, geolocator: Geolocator, options: Options, asked: Asked | None
) -> tuple[Callable[[], Predictions], NDArray[np.bool_] | None, list[str]]:
    """What decides on a run's pool, where a multimodal model answered, and the verdicts' tables."""
    entries, scores = read_pool(run), {}
    for verifier in options.verify:
        if verifier != "mllm":
            stages.verify(run, geolocator, verifier)
            scores[verifier] = read_verdicts(run, entries, verifier)
    files = [f"verdicts-{verifier}" for verifier in scores]
    if asked is None or "mllm" not in options.verify:
        return partial(selection.decide, entries, scores, geolocator.tuning), None, files
    mode = "pool" if asked.asking.mode == "diversify" else asked.asking.mode
    asked, name = replace(asked, asking=replace(asked.asking, mode=mode)), f"mllm-{mode}"
    matches = read_matches(run) if "visual" in options.verify else None
    ask_model(run, name, geolocator, asked, entries, matches)
    told = read_told(run, name, entries)
    decide = partial(decide_told, geolocator, read_embeddings(run)[1], entries, scores, told, mode)
    if failures := int((~told.answered).sum()):
        print(f"the model gave no answer on {failures} photos: add --resume to ask again", file=sys.stderr)
    return decide, told.answered, [*files, f"verdicts-{name}"]


def parse_within(text: str | None) -> tuple[float, float, float] | None:
    """``LAT,LON,KM`` -> numbers. Raises GeoError for anything else."""
    if text is None:
        return None
    try:
        lat, lon, km = (float(part) for part in text.split(","))
        check_lat_lon([lat], [lon])
    except ValueError as error:
        raise GeoError(f"--within {text}: give LAT,LON,KM, such as 48.2,16.4,100 ({error})") from None
    if not 0 < km <= 20_040:
        raise GeoError(f"--within {text}: the distance is {km:g} km: give one above 0, at most 20040")
    return lat, lon, km


def read_photos(photos: list[str], limit: int | None = None) -> pa.Table:
    """Pictures, folders, CSVs with a column ``image`` and sources -> one photos table, each photo once.

    Coordinates of a source are kept as the truth to compare with; those in EXIF are not read. At most ``limit`` photos
    in all, the first. Raises GeoError for an empty folder, a missing file or a CSV without the column.
    """
    import pyarrow as pa

    tables, paths = [], list[str]()
    for photo in photos:
        if is_source(photo):
            tables.append(read_source(limited(photo, limit)))
            if line := read_left_out(tables[-1]).line():
                print(f"{photo}: {line}", file=sys.stderr)
        elif photo.lower().endswith(".csv"):
            paths += _csv_images(Path(photo))
        else:
            paths += list_pictures(photo)
    unique = list(dict.fromkeys(paths))
    for path in unique:
        if not _is_utf8(path):
            raise GeoError(f"the file name {path!r} is not UTF-8: rename the file")
    if unique:
        kinds = {"lat": pa.float64(), "lon": pa.float64(), "place": pa.string(), "author": pa.string()}
        unknown = {name: pa.nulls(len(unique), kind) for name, kind in kinds.items()}
        tables.append(pa.table({"id": unique, "image": unique} | unknown))
    return pa.concat_tables(tables).slice(0, limit)


def neighbors_of(
    index: Path,
    photo: Path,
    k: int,
    weights: Path,
    within: tuple[float, float, float] | None = None,
    not_author: str | None = None,
    dissimilar: bool = False,
    backbone: str | None = None,
) -> list[dict[str, Any]]:
    """The k rows of an index most, or least, like a picture: rank, score, id, lat, lon, place. Raises GeoError.

    within and not_author leave rows out before the search; where fewer than k are left, there are fewer.
    """
    geolocator = Geolocator.from_pretrained(index, weights, backbone)
    pixels, errors = geolocator.alignment.load([str(photo)])
    if errors[0]:
        raise GeoError(errors[0])
    gallery, own = geolocator.index, digests(pixels)
    keep = gallery.mask(within, not_author)
    if keep is not None:
        keep[copies(gallery.rows, own)] = False
        k, own = min(k, int(keep.sum())), []
        if k == 0:
            raise GeoError("the filter lets no photo of the index through: allow a wider region or another author")
    found = gallery.search(geolocator.encode(pixels), k, geolocator.tuning.search_weights, own, keep, dissimilar)
    rows = gallery.rows.take(found.rows[0]).select(["id", "lat", "lon", "place"]).to_pylist()
    scores = found.scores[0].tolist()
    return [{"rank": i + 1, "score": score, **row} for i, (row, score) in enumerate(zip(rows, scores, strict=True))]


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv_images(path: Path) -> list[str]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if "image" not in (reader.fieldnames or []):
                raise GeoError(f"{path} has no column 'image': name the pictures' paths in one")
            return [str(path.parent / row["image"]) for row in reader if row["image"]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise GeoError(f"cannot read {path}: {error}") from None
