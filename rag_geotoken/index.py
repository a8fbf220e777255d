"""GeoIndex: a FAISS index of image, GPS and text embeddings, a Parquet table of its rows, and a JSON manifest."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.errors import GeoError
from rag_geotoken.files import file_sha256, read_json, write_json, write_whole
from rag_geotoken.tables import read_table, to_numpy, write_table
from rag_geotoken.types import Neighbors

if TYPE_CHECKING:
    import pyarrow as pa

VECTORS, ROWS, MANIFEST = "index.faiss", "rows.parquet", "manifest.json"
FORMAT = "rag-geotoken-index/1"
ROW_COLUMNS = ("id", "image", "lat", "lon", "place", "author", "digest")


@dataclass(frozen=True)
class GeoIndex:
    """A gallery that can be searched: after G3, a row is [image | gps | text], each part of length one.

    faiss_index: inner product over 3 * dim. rows: one line a photo (``ROW_COLUMNS``). manifest: what ``info`` prints.
    """

    faiss_index: Any
    rows: pa.Table
    manifest: dict[str, Any]

    @cached_property
    def lat_lon(self) -> NDArray[np.float64]:
        """(rows, 2) degrees."""
        return np.column_stack([self.rows["lat"].to_numpy(), self.rows["lon"].to_numpy()])

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings of the given rows, any shape -> rows.shape + (3, dim): image, gps and text."""
        flat = self.faiss_index.reconstruct_batch(np.ascontiguousarray(rows.ravel()))
        result: NDArray[np.float32] = flat.reshape(*rows.shape, 3, -1)
        return result

    def search(
        self, queries: NDArray[np.float32], k: int, weights: tuple[float, ...], digests: list[str] | None = None
    ) -> Neighbors:
        """The k nearest rows of each query (B, 3, dim), the three inner products added with the given weights.

        A row with a query's own digest (the same pixels) is passed over: a photo never finds itself. Raises GeoError
        when the index holds fewer than k other photos or the queries have another dimension.
        """
        if queries.shape[1:] != (3, self.faiss_index.d // 3):
            raise GeoError(f"queries of {queries.shape[1:]} do not fit an index of (3, {self.faiss_index.d // 3})")
        flat = (queries * np.asarray(weights, np.float32)[:, None]).reshape(len(queries), -1)
        own = self._own_rows(digests) if digests else np.full((len(queries), 0), -1)
        wanted = k + own.shape[1]
        if wanted > self.faiss_index.ntotal:
            raise GeoError(f"the index holds {self.faiss_index.ntotal} photos: ask for fewer than k={k} neighbours")
        scores, rows = self.faiss_index.search(np.ascontiguousarray(flat), wanted)
        keep = ~(rows[:, :, None] == own[:, None, :]).any(axis=2)
        order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
        rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        return Neighbors(rows, self.lat_lon[rows], scores)

    def _own_rows(self, digests: list[str]) -> NDArray[np.int64]:
        """Rows with each digest -> (B, most found), padded with -1."""
        found = [self._rows_of.get(digest, []) for digest in digests]
        width = max(map(len, found), default=0)
        return np.array([rows + [-1] * (width - len(rows)) for rows in found], np.int64).reshape(len(digests), width)

    @cached_property
    def _rows_of(self) -> dict[str, list[int]]:
        """The rows of each digest: mostly one, more where the gallery holds a picture twice."""
        rows: dict[str, list[int]] = {}
        for row, digest in enumerate(self.rows["digest"].to_pylist()):
            rows.setdefault(digest, []).append(row)
        return rows

    def check_encoder(self, encoder: str) -> None:
        """Raises GeoError when the index was built with another encoder."""
        if self.manifest["encoder"] != encoder:
            raise GeoError(
                f"the index was built with encoder {self.manifest['encoder']}, the model is {encoder}: "
                "build the index again with this model, or give --weights the index's own"
            )

    @classmethod
    def load(cls, folder: str | Path) -> GeoIndex:
        """Open an index folder, every file checked against the manifest before use.

        Raises GeoError for a missing, truncated or exchanged file.
        """
        import faiss

        folder = Path(folder)
        manifest = check_manifest(folder)
        faiss.set_deserialization_vector_byte_limit(manifest["bytes"][VECTORS] + 1)
        try:
            index = faiss.read_index(str(folder / VECTORS))
        except RuntimeError as error:
            raise GeoError(f"{VECTORS} in {folder} cannot be read: {str(error).splitlines()[0]}") from None
        rows = read_table(folder / ROWS)
        facts = index.d, index.ntotal, len(rows), index.metric_type
        if facts != (3 * manifest["dim"], manifest["rows"], manifest["rows"], faiss.METRIC_INNER_PRODUCT):
            raise GeoError(f"the index in {folder} does not match its manifest: build it again")
        return cls(index, rows, manifest)


def check_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index folder, sizes and SHA-256s of its files verified. Raises GeoError."""
    if not (folder / MANIFEST).is_file():
        raise GeoError(f"no index in {folder}: build one with rag-geotoken index build")
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    try:
        files = {name: (manifest["bytes"][name], manifest["sha256"][name]) for name in (VECTORS, ROWS)}
        known = manifest["format"] == FORMAT and {"encoder", "dim", "rows", "made_from"} <= manifest.keys()
    except (TypeError, KeyError):
        known = False
    if not known:
        raise GeoError(f"{MANIFEST} in {folder} is not that of a {FORMAT} index: build it again")
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            raise GeoError(f"{name} is missing in {folder}: build the index again")
        if path.stat().st_size != size or file_sha256(path) != sha256:
            raise GeoError(f"{name} in {folder} is truncated or changed: build the index again")
    return manifest


def build_index(folder: Path, photos_file: Path, embeddings_file: Path, encoder: str) -> dict[str, Any]:
    """Write an index of the photos that have an embedding and a place -> its manifest.

    The files are stage tables, row for row. The manifest is written last, so a folder without one is no index; one
    made from the same tables is left as it is. Raises GeoError when no photo can be used.
    """
    import faiss
    import pyarrow.compute as pc

    made_from = {"photos": file_sha256(photos_file), "embeddings": file_sha256(embeddings_file), "encoder": encoder}
    with suppress(GeoError):
        manifest = check_manifest(folder)
        if manifest["made_from"] == made_from:
            return manifest
    photos, embeddings = read_table(photos_file), read_table(embeddings_file)
    if not photos["id"].equals(embeddings["id"]):
        raise GeoError(f"{embeddings_file.name} is not of the photos in {photos_file.name}: run encode again")
    usable = pc.and_(pc.is_null(embeddings["error"]), pc.is_valid(photos["lat"])).to_numpy(zero_copy_only=False)
    if not usable.any():
        raise GeoError("no photo has both a readable picture and coordinates: nothing to index")
    kept = embeddings.filter(usable)
    parts = [to_numpy(kept[name]) for name in ("image", "gps", "text")]
    index = faiss.IndexFlatIP(sum(part.shape[1] for part in parts))
    index.add(np.concatenate(parts, axis=1))
    rows = photos.append_column("digest", embeddings["digest"]).filter(usable).select(ROW_COLUMNS)
    with suppress(OSError):  # where this cannot be done, the next line says why
        (folder / MANIFEST).unlink(missing_ok=True)
    write_whole(folder / VECTORS, partial(_write_vectors, index))
    write_table(folder / ROWS, rows)
    manifest = {
        "format": FORMAT,
        "encoder": encoder,
        "dim": parts[0].shape[1],
        "parts": ["image", "gps", "text"],
        "metric": "inner product",
        "factory": "Flat",
        "rows": len(rows),
        "left_out": int((~usable).sum()),
        "made_from": made_from,
        "bytes": {name: (folder / name).stat().st_size for name in (VECTORS, ROWS)},
        "sha256": {name: file_sha256(folder / name) for name in (VECTORS, ROWS)},
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def _write_vectors(index: Any, path: Path) -> None:
    import faiss

    try:
        faiss.write_index(index, str(path))
    except RuntimeError:  # what FAISS makes of a full disk or a folder that may not be written
        raise OSError("the disk is full or the folder is read-only") from None
