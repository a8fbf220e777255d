"""This module opens and searches the index of a gallery; :mod:`.index.build` writes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.errors import GeoError
from rag_geotoken.geo.sphere import haversine_km
from rag_geotoken.index.approximate import EXACT_ROWS, effort, open_index
from rag_geotoken.index.exact import Numbers, Ranking, Vectors, scan, top_k
from rag_geotoken.index.exclusion import UNKNOWN, number_authors, own_rows
from rag_geotoken.index.files import CELLS, FORMATS, PROJECTIONS, ROWS, VECTORS, check_manifest
from rag_geotoken.photos.pictures import load_pictures
from rag_geotoken.photos.thumbnails import Thumbnails
from rag_geotoken.storage.parquet import read_table
from rag_geotoken.types import Neighbors

if TYPE_CHECKING:
    import pyarrow as pa

ROW_COLUMNS = ("id", "image", "lat", "lon", "place", "author", "digest")
BLOCK = 16_384  # rows in memory at a time
SPARE = 3  # times k more rows are retrieved where those of the query's author are excluded
KEPT_BYTES = 2**29  # of pictures in memory, per size
COPIES = 8  # of one photo in a gallery, as a search within a region allows for
Heads = Callable[[Vectors], Vectors]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class GeoIndex:
    """This class holds a gallery to be searched; as in G3, a photo is [image | gps | text], each part of length one.

    faiss_index: inner product, exact over 3 * dim, or approximate over the image part alone. An approximate index has
    memory-mapped projections (rows, dim) float16, of which heads make the three parts (N, 3, dim) that its candidates
    are compared by. rows: one line per photo (``ROW_COLUMNS``). cell_vectors: see :func:`.cell_search.cell_vectors`,
    None where the index keeps none.
    """

    faiss_index: Any
    rows: pa.Table
    manifest: dict[str, Any]
    projections: NDArray[np.float16] | None = None
    heads: Heads | None = None
    thumbnails: Thumbnails | None = None
    cell_vectors: NDArray[np.float16] | None = None
    # Pictures (size, size, 3) by size and row.
    _pictures: dict[int, dict[int, NDArray[np.uint8]]] = field(init=False, repr=False, default_factory=dict)

    @property
    def identity(self) -> Any:
        """Return the digests of all files, which determine every result."""
        return self.manifest["sha256"]

    @cached_property
    def lat_lon(self) -> NDArray[np.float64]:
        """Return the places (rows, 2) in degrees."""
        return np.column_stack([self.rows["lat"].to_numpy(), self.rows["lon"].to_numpy()])

    def vectors(self, rows: Numbers) -> Vectors:
        """Return the embeddings, rows.shape + (3, dim), of rows of any shape: image, gps and text.

        Raises GeoError when the index holds projections and was opened without heads.
        """
        if self.projections is None:
            vectors: Vectors = self.faiss_index.reconstruct_batch(np.ascontiguousarray(rows.ravel()))
        elif self.heads is None:
            raise GeoError("this index holds projections only: open it with the model it was built with")
        else:
            unique, inverse = np.unique(rows, return_inverse=True)
            vectors = self.heads(self.projections[unique].astype(np.float32))[inverse.ravel()]
        return vectors.reshape(*rows.shape, 3, -1)

    def image_parts(self, rows: Numbers) -> Vectors:
        """Return the image part (N, dim) of rows (N,)."""
        return self.vectors(rows)[:, 0] if self.projections is None else unit(self.projections[rows])

    def pictures(self, rows: Numbers, size: int) -> NDArray[np.uint8]:
        """Return the pictures, rows.shape + (size, size, 3), of rows of any shape; zeros for an unreadable one.

        They are cached for the next photos, whose neighbors are often the same, up to ``KEPT_BYTES``.
        """
        unique, inverse = np.unique(rows, return_inverse=True)
        cache, wanted = self._pictures.setdefault(size, {}), unique.tolist()
        pictures = {row: picture for row in wanted if (picture := cache.get(row)) is not None}
        missing = [row for row in wanted if row not in pictures]
        if (len(cache) + len(missing)) * 3 * size**2 > KEPT_BYTES:
            cache.clear()  # another thread holds the pictures that it needs itself
        pixels, _ = load_pictures(self.picture_files(np.array(missing, np.int64)), size)
        pictures |= zip(missing, pixels, strict=True)
        cache |= pictures
        return np.stack([pictures[row] for row in wanted])[inverse.reshape(rows.shape)]

    def picture_files(self, rows: Numbers) -> Sequence[str | bytes]:
        """Return what ``load_pictures`` reads for rows (N,): the index's own thumbnails, else source references."""
        if self.thumbnails is not None:
            return [self.thumbnails[row] for row in rows.tolist()]
        return list(self.rows["image"].take(rows).to_pylist())

    def mask(
        self, within: tuple[float, float, float] | None = None, not_author: str | None = None, at_least: int = 0
    ) -> Mask | None:
        """Return a mask (rows,) of the photos within (lat, lon, km) and not of an author; None where all are.

        at_least: where fewer rows lie inside, that many rows nearest to the place.
        """
        keep = np.ones(len(self.rows), bool)
        if not_author is not None:
            authors, number_of = self._authors
            keep &= authors != number_of.get(not_author, UNKNOWN)
        if within is not None:
            lat, lon, radius = within
            distance = np.where(keep, haversine_km(self.lat_lon[:, 0], self.lat_lon[:, 1], lat, lon), np.inf)
            if fewest := min(at_least, int(keep.sum())):
                radius = max(radius, np.partition(distance, fewest - 1)[fewest - 1])
            keep &= distance <= radius
        return None if keep.all() else keep

    def search(
        self,
        queries: Vectors,
        k: int,
        weights: tuple[float, ...],
        digests: list[str] | None = None,
        keep: Mask | None = None,
        *,
        dissimilar: bool = False,
        exact: bool = False,
        authors: list[str | None] | None = None,
    ) -> Neighbors:
        """Return the k nearest rows of each query (B, 3, dim) by the weighted sum of the three inner products.

        Rows with a query's own digest (the same pixels) or author are excluded. keep: mask (rows,) of those that may be
        returned. dissimilar: return the k least similar rows, the least first. exact: compare every row, also in an
        approximate index. Raises GeoError when fewer than k other photos are left or the dimensions differ.
        """
        if queries.shape[1:] != (3, self.manifest["dim"]):
            raise GeoError(f"queries of {queries.shape[1:]} do not fit an index of (3, {self.manifest['dim']})")
        own = own_rows(self.rows, digests) if digests else np.full((len(queries), 0), -1)
        wanted, available = k + own.shape[1], len(self.rows) if keep is None else int(keep.sum())
        if wanted > available:
            where = "the index holds" if keep is None else "the filter lets through"
            raise GeoError(f"{where} {available} photos: ask for fewer than k={k} neighbors")
        wanted = min(available, wanted + (SPARE * k if authors else 0))
        weighted = (-queries if dissimilar else queries) * np.asarray(weights, np.float32)[:, None]
        scores, rows = self._nearest(weighted, wanted, keep=keep, exact=exact or dissimilar)
        excluded = (rows[:, :, None] == own[:, None, :]).any(axis=2)
        if authors:
            author_of_row, number_of = self._authors
            query_authors = np.array([number_of.get(name, UNKNOWN) for name in authors])
            excluded |= author_of_row[rows] == query_authors[:, None]
        scores, rows = top_k(np.where(excluded, -np.inf, scores), rows, k)
        result = Neighbors(rows, self.lat_lon[rows], -scores if dissimilar else scores)
        for i in np.flatnonzero((~excluded).sum(axis=1) < k):
            # An author of many similar photos: search all photos of other authors, for this query alone.
            allowed = (author_of_row != query_authors[i]) & (True if keep is None else keep)
            digest = digests and [digests[i]]
            one = self.search(queries[[i]], k, weights, digest, keep=allowed, dissimilar=dissimilar, exact=exact)
            result.rows[i], result.lat_lon[i], result.scores[i] = one.rows[0], one.lat_lon[0], one.scores[0]
        return result

    def _nearest(self, queries: Vectors, k: int, *, keep: Mask | None, exact: bool) -> Ranking:
        """Rank the rows by weighted queries (B, 3, dim)."""
        flat = queries.reshape(len(queries), -1)
        if self.projections is None:
            return self._faiss_search(flat, k, keep)
        if exact or (keep is not None and keep.sum() <= EXACT_ROWS):
            # The image part alone retrieves candidates that are near, but not those that are far.
            return scan(flat, self._blocks(keep, lambda rows: self.vectors(rows).reshape(len(rows), -1)), k)
        rows = self._candidates(queries[:, 0], k, keep)
        scores, step = np.empty(rows.shape, np.float32), max(1, BLOCK // rows.shape[1])
        for start in range(0, len(rows), step):
            at = slice(start, start + step)
            scores[at] = np.einsum("bpd,bmpd->bm", queries[at], self.vectors(np.maximum(rows[at], 0)), optimize=True)
        scores[rows < 0] = -np.inf
        return top_k(scores, rows, k)

    def _candidates(self, image: Vectors, k: int, keep: Mask | None) -> Numbers:
        """More rows (B, M) than wanted, nearest by the image part (B, dim) alone; -1 where there are none."""
        available = len(self.rows) if keep is None else int(keep.sum())
        count = min(available, k * self.manifest["refine"])
        # A filter spreads the remaining neighbors: visit lists or nodes in proportion to the rows it excludes.
        value = self.manifest["effort"] * len(self.rows) // available
        if hasattr(self.faiss_index, "hnsw"):
            value = max(value, count)
        rows = self._faiss_search(image, count, keep, value)[1]
        short = (rows[:, k - 1] < 0).nonzero()[0]
        if len(short):
            rows[short] = scan(image[short], self._blocks(keep, self.image_parts), count)[1]
        return rows

    def _faiss_search(self, queries: Vectors, k: int, keep: Mask | None, value: int = 0) -> Ranking:
        """Rank the rows by FAISS, -1 where there are none; ``value``: nprobe or efSearch."""
        index = self._searcher if keep is None else self.faiss_index
        scores, rows = index.search(queries, k, params=effort(index, value, keep))
        return scores, rows

    def _blocks(self, keep: Mask | None, vectors: Callable[[Numbers], Vectors]) -> Iterator[tuple[Numbers, Vectors]]:
        """Numbers and vectors of the rows that may be returned, block by block."""
        rows = np.arange(len(self.rows)) if keep is None else np.flatnonzero(keep)
        return ((block, vectors(block)) for block in np.split(rows, range(BLOCK, len(rows), BLOCK)))

    @cached_property
    def _searcher(self) -> Any:
        """The FAISS index on all GPUs, where faiss-gpu is installed and supports its kind."""
        import faiss

        on_cpu = not hasattr(faiss, "StandardGpuResources") or hasattr(self.faiss_index, "hnsw")
        return self.faiss_index if on_cpu else faiss.index_cpu_to_all_gpus(self.faiss_index)

    @cached_property
    def _authors(self) -> tuple[NDArray[np.int32], dict[str | None, int]]:
        return number_authors(self.rows["author"])

    def check_encoder(self, encoder: str) -> None:
        """Raise GeoError when the index was built with another encoder."""
        if self.manifest["encoder"] != encoder:
            raise GeoError(
                f"the index was built with encoder {self.manifest['encoder']}, the model is {encoder}: "
                "build the index again with this model, or give --weights the index's own"
            )

    @classmethod
    def load(cls, folder: str | Path, heads: Heads | None = None) -> GeoIndex:
        """Open an index folder, every file checked against the manifest before use; large ones are memory-mapped.

        heads: ``GeoAlignment.heads`` of the model, which an approximate index needs to be searched. Raises GeoError for
        a missing, truncated or exchanged file.
        """
        folder = Path(folder)
        manifest = check_manifest(folder)
        mismatch = GeoError(f"the index in {folder} does not match its manifest: build it again")
        count, dim, approximate = manifest["rows"], manifest["dim"], PROJECTIONS in FORMATS[manifest["format"]]
        index = open_index(folder / VECTORS, manifest["bytes"][VECTORS], manifest["factory"])
        rows = read_table(folder / ROWS)
        # 0 is FAISS' name for the inner product.
        expected = (dim if approximate else 3 * dim, count, count, 0)
        if (index.d, index.ntotal, len(rows), index.metric_type) != expected:
            raise mismatch

        def memory_map(name: str, length: int) -> NDArray[np.float16] | None:
            try:
                array = np.load(folder / name, mmap_mode="r", allow_pickle=False) if length else None
            except (OSError, ValueError):
                raise mismatch from None
            if array is not None and (array.shape, array.dtype) != ((length, dim), np.float16):
                raise mismatch
            return array

        return cls(
            index,
            rows,
            manifest,
            projections=memory_map(PROJECTIONS, count * approximate),
            heads=heads if approximate else None,
            thumbnails=Thumbnails.load(folder, count) if manifest.get("thumbnails") else None,
            cell_vectors=memory_map(CELLS, manifest.get("cells", 0)),
        )


def unit(projections: NDArray[np.float16]) -> Vectors:
    """Return the image parts of projections (N, dim): the same directions, of length one."""
    vectors = projections.astype(np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors
