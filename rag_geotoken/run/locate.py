"""These functions locate a user's own photos, and find the gallery photos most similar to one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_geotoken.errors import GeoError
from rag_geotoken.index.exclusion import copies
from rag_geotoken.models import Models
from rag_geotoken.options import Options
from rag_geotoken.run.export import write_predictions
from rag_geotoken.run.walk import RunFolder, embedded
from rag_geotoken.storage.parquet import read_table, write_table
from rag_geotoken.types import Photos

if TYPE_CHECKING:
    import pyarrow as pa


def locate_photos(table: pa.Table, models: Models, options: Options, out: Path, run: Path) -> tuple[int, list[str]]:
    """Locate the photos of a table, write ``out``, and return how many have an answer and the errors of the others.

    Every stage's table is kept in ``run``. Raises GeoError when nothing can be located or a file cannot be written:
    call :func:`.check_output` before models are opened.
    """
    write_table(run / "photos.parquet", table)
    predictions = read_table(run / f"{RunFolder(run, models).walk(options)['predictions']}.parquet")
    write_predictions(out, predictions)
    if "mllm" in options.verify:
        answered = predictions.filter(predictions["error"].is_null())
        if failures := len(answered) - sum(answered["verified"].to_pylist()):
            print(f"the model gave no answer on {failures} photos: add --resume to ask again", file=sys.stderr)
    failed = [error for error in predictions["error"].to_pylist() if error]
    return len(predictions) - len(failed), failed


def neighbors_of(
    index: Path,
    photo: Path,
    k: int,
    *,
    weights: Path,
    within: tuple[float, float, float] | None = None,
    not_author: str | None = None,
    dissimilar: bool = False,
    backbone: str | None = None,
) -> list[dict[str, Any]]:
    """Return the k rows of an index most, or least, similar to a picture: rank, score, id, lat, lon, place.

    within and not_author leave rows out before the search; where fewer than k are left, there are fewer. Raises
    GeoError for a picture that cannot be read, or where no row is left.
    """
    models = Models.from_pretrained(index, weights, backbone)
    embeddings = embedded(models, Options(), Photos.of([str(photo)], [str(photo)])).embeddings
    if embeddings.errors[0]:
        raise GeoError(embeddings.errors[0])
    gallery, weights_of_parts = models.index, models.tuning.search_weights
    excluded: dict[str, Any] = {"digests": embeddings.digests}
    keep = gallery.mask(within, not_author)
    if keep is not None:
        keep[copies(gallery.rows, embeddings.digests)] = False
        k, excluded = min(k, int(keep.sum())), {"keep": keep}
        if k == 0:
            raise GeoError("the filter lets no photo of the index through: allow a wider region or another author")
    neighbors = gallery.search(embeddings.vectors, k, weights_of_parts, dissimilar=dissimilar, **excluded)
    rows = gallery.rows.take(neighbors.rows[0]).select(["id", "lat", "lon", "place"]).to_pylist()
    scored = zip(neighbors.scores[0].tolist(), rows, strict=True)
    return [{"rank": rank, "score": score, **row} for rank, (score, row) in enumerate(scored, 1)]
