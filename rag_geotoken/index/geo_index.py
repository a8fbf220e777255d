"""GeoIndex is a gallery to be searched: vectors, a Parquet table of its rows, and a JSON manifest."""

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
from rag_geotoken.index.approximate import EXACT_ROWS, effort, on_gpu, open_index
from rag_geotoken.index.exact import Vectors, scan
from rag_geotoken.index.exclusion import Authors, own_rows
from rag_geotoken.index.files import CELLS, FORMATS, PROJECTIONS, ROWS, VECTORS, check_manifest
from rag_geotoken.photos.pictures import load_pictures
from rag_geotoken.photos.thumbnails import Thumbnails
from rag_geotoken.storage.parquet import read_table
from rag_geotoken.types import Neighbors

if TYPE_CHECKING:
    import pyarrow as pa

ROW_COLUMNS = ("id", "image", "lat", "lon", "place", "author", "digest")
BLOCK = 16_384  # rows in memory at a time
SPARE = 3  # times as many rows are looked at where those of the query's author are passed over
KEPT_BYTES = 2**29  # of pictures in memory, a size
COPIES = 8  # of one photo in a gallery, as a search within a region allows for
Heads = Callable[[Vectors], Vectors]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class GeoIndex:
    """This is a gallery that can be searched: after G3, a photo is [image | gps | text], each part of length one.

    faiss_index: inner product, exact over 3 * dim, or approximate over the image part alone. Of the latter kind,
    projections (rows, dim) float16 are memory-mapped, and heads make the three parts (N, 3, dim) of them, by which what
    the approximate search brings is compared exactly. rows: one line a photo (``ROW_COLUMNS``). manifest: what ``info``
    prints. cell_vectors: see :func:`.gps_search.cell_vectors`, None where the index keeps none.
    """

    faiss_index: Any
    rows: pa.Table
    manifest: dict[str, Any]
    projections: NDArray[np.float16] | None = None
    heads: Heads | None = None
    thumbnails: Thumbnails | None = None
    cell_vectors: NDArray[np.float16] | None = None
    # Pictures (size, size, 3) by size and row.
    _kept: dict[int, dict[int, NDArray[np.uint8]]] = field(init=False, repr=False, default_factory=dict)

    @property
    def identity(self) -> Any:
        """Return what results follow from: the digest of every file."""
        return self.manifest["sha256"]

    @cached_property
    def lat_lon(self) -> NDArray[np.float64]:
        """Return the places (rows, 2) in degrees."""
        return np.column_stack([self.rows["lat"].to_numpy(), self.rows["lon"].to_numpy()])

    def vectors(self, rows: NDArray[np.int64]) -> Vectors:
        """Return the embeddings of rows of any shape as rows.shape + (3, dim): image, GPS and text.

        Raises GeoError when the index holds projections and was opened without heads.
        """
        if self.projections is None:
            result: Vectors = self.faiss_index.reconstruct_batch(np.ascontiguousarray(rows.ravel()))
        else:
            if self.heads is None:
                raise GeoError("this index holds projections only: open it with the model it was built with")
            unique, back = np.unique(rows, return_inverse=True)
            result = self.heads(self.projections[unique].astype(np.float32))[back.ravel()]
        return result.reshape(*rows.shape, 3, -1)

    def pictures(self, rows: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
        """Return the pictures of rows of any shape as rows.shape + (size, size, 3), zeros where one cannot be read.

        They are kept for the next photos, whose neighbors are often the same, up to ``KEPT_BYTES``.
        """
        unique, back = np.unique(rows, return_inverse=True)
        kept, wanted = self._kept.setdefault(size, {}), unique.tolist()
        found = {row: picture for row in wanted if (picture := kept.get(row)) is not None}
        new = [row for row in wanted if row not in found]
        if (len(kept) + len(new)) * 3 * size**2 > KEPT_BYTES:
            kept.clear()  # another thread has its own of what it needs
        read = dict(zip(new, load_pictures(self.picture_files(np.array(new, np.int64)), size)[0], strict=True))
        kept |= read
        found |= read
        return np.stack([found[row] for row in wanted])[back.reshape(rows.shape)]

    def picture_files(self, rows: NDArray[np.int64]) -> Sequence[str | bytes]:
        """Return what ``load_pictures`` reads for rows (N,): the index's own thumbnails, else references."""
        if self.thumbnails is not None:
            return [self.thumbnails[row] for row in rows.tolist()]
        return list(self.rows["image"].take(rows).to_pylist())

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
        """Return the k nearest rows of each query (B, 3, dim), the three inner products added with the given weights.

        A row with a query's own digest (the same pixels) is passed over: a photo never finds itself. keep: a mask
        (rows,) of those that may be found. dissimilar: the k rows least like the query, the least first. exact: every
        row is compared, also by an approximate index. Raises GeoError when the index holds fewer than k other photos or
        the queries have another dimension.
        """
        if queries.shape[1:] != (3, self.manifest["dim"]):
            raise GeoError(f"queries of {queries.shape[1:]} do not fit an index of (3, {self.manifest['dim']})")
        own = own_rows(self.rows, digests) if digests else np.full((len(queries), 0), -1)
        wanted, there = k + own.shape[1], len(self.rows) if keep is None else int(keep.sum())
        if wanted > there:
            where = "the index holds" if keep is None else "the filter lets through"
            raise GeoError(f"{where} {there} photos: ask for fewer than k={k} neighbors")
        wanted = min(there, wanted + (SPARE * k if authors else 0))
        weighted = (-queries if dissimilar else queries) * np.asarray(weights, np.float32)[:, None]
        scores, rows = self._best(weighted, wanted, keep, exact or dissimilar)
        passed = (rows[:, :, None] == own[:, None, :]).any(axis=2)
        if authors:
            names = self._authors.named(authors)
            passed |= self._authors.numbers[rows] == names[:, None]
        order = np.argsort(passed, axis=1, kind="stable")[:, :k]
        rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        found = Neighbors(rows, self.lat_lon[rows], -scores if dissimilar else scores)
        for i in np.flatnonzero((~passed).sum(axis=1) < k):
            # An author of many photos like this one: then all others are searched, for this query alone.
            others = self._authors.numbers != names[i]
            others = others if keep is None else keep & others
            again = self.search(
                queries[i : i + 1], k, weights, digests and [digests[i]], others, dissimilar=dissimilar, exact=exact
            )
            found.rows[i], found.lat_lon[i], found.scores[i] = again.rows[0], again.lat_lon[0], again.scores[0]
        return found

    def _best(self, queries: Vectors, k: int, keep: Mask | None, exact: bool) -> tuple[Vectors, NDArray[np.int64]]:
        """Scores and rows (B, k) of weighted queries (B, 3, dim), best first."""
        if self.projections is None:
            return self._faiss_search(queries.reshape(len(queries), -1), k, keep)
        if exact or (keep is not None and keep.sum() <= EXACT_ROWS):
            # The image part tells who may be near, but not who is far.
            return scan(queries.reshape(len(queries), -1), self._blocks(keep, parts=True), k)
        return self._refine(queries, self._shortlist(queries, k, keep), k)

    def mask(
        self, within: tuple[float, float, float] | None = None, not_author: str | None = None, at_least: int = 0
    ) -> Mask | None:
        """Return a mask (rows,) of those within (lat, lon, km) and not of an author, or None for all.

        at_least: where fewer rows lie inside, as many as that, the nearest to the place.
        """
        keep = np.ones(len(self.rows), bool)
        if not_author is not None:
            keep &= self._authors.numbers != self._authors.named([not_author])
        if within is not None:
            away = np.where(keep, haversine_km(self.lat_lon[:, 0], self.lat_lon[:, 1], within[0], within[1]), np.inf)
            fewest = min(at_least, int(keep.sum()))
            nearest = float(np.partition(away, fewest - 1)[fewest - 1]) if fewest else 0.0
            keep &= away <= max(within[2], nearest)
        return None if keep.all() else keep

    def _faiss_search(
        self, queries: Vectors, k: int, keep: Mask | None, value: int = 0
    ) -> tuple[Vectors, NDArray[np.int64]]:
        """Scores and rows (B, k) by FAISS, -1 where there are none; ``value``: lists or nodes that it looks at."""
        index, only = (self._searcher, None) if keep is None else (self.faiss_index, _selector(keep))
        scores, rows = index.search(queries, k, params=effort(index, value, only))
        return scores, rows

    def _shortlist(self, queries: Vectors, k: int, keep: Mask | None) -> NDArray[np.int64]:
        """By the image part alone, more rows than wanted -> (B, M), -1 where there are none."""
        image, count = queries[:, 0], len(self.rows)
        there = count if keep is None else int(keep.sum())
        most = min(there, k * self.manifest["refine"])
        # A filter leaves a region's neighbors further apart: it takes as many more lists or nodes to find as many.
        value = self.manifest["effort"] * count // there
        value = max(value, most) if hasattr(self.faiss_index, "hnsw") else value
        found = self._faiss_search(image, most, keep, value)[1]
        short = (found[:, k - 1] < 0).nonzero()[0]
        if len(short):
            found[short] = scan(image[short], self._blocks(keep), most)[1]
        return found

    def _refine(self, queries: Vectors, rows: NDArray[np.int64], k: int) -> tuple[Vectors, NDArray[np.int64]]:
        """The best k of the rows (B, M) by all three parts -> scores and rows (B, k)."""
        scores = np.empty(rows.shape, np.float32)
        step = max(1, BLOCK // rows.shape[1])
        for start in range(0, len(rows), step):
            at = slice(start, start + step)
            scores[at] = np.einsum("bpd,bmpd->bm", queries[at], self.vectors(np.maximum(rows[at], 0)), optimize=True)
        scores[rows < 0] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    def _blocks(self, keep: Mask | None, parts: bool = False) -> Iterator[tuple[NDArray[np.int64], Vectors]]:
        """Row numbers and image parts (R, dim), or all three (R, 3 * dim), of the rows that may be found."""
        rows = np.arange(len(self.rows)) if keep is None else np.flatnonzero(keep)
        for start in range(0, len(rows), BLOCK):
            some = rows[start : start + BLOCK]
            yield some, self.vectors(some).reshape(len(some), -1) if parts else self.image_parts(some)

    def image_parts(self, rows: NDArray[np.int64]) -> Vectors:
        """Return the image part (N, dim) of rows (N,)."""
        return self.vectors(rows)[:, 0] if self.projections is None else unit(self.projections[rows])

    @cached_property
    def _searcher(self) -> Any:
        return on_gpu(self.faiss_index)

    @cached_property
    def _authors(self) -> Authors:
        return Authors(self.rows["author"])

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
        wrong = GeoError(f"the index in {folder} does not match its manifest: build it again")
        count, dim, kept = manifest["rows"], manifest["dim"], PROJECTIONS in FORMATS[manifest["format"]]
        index = open_index(folder / VECTORS, manifest["bytes"][VECTORS], manifest["factory"])
        rows = read_table(folder / ROWS)
        # 0 is FAISS' name for the inner product.
        if (index.d, index.ntotal, len(rows), index.metric_type) != (dim if kept else 3 * dim, count, count, 0):
            raise wrong
        small = Thumbnails.load(folder, count) if manifest.get("thumbnails") else None

        def halves(name: str, length: int) -> NDArray[np.float16] | None:
            try:
                array = np.load(folder / name, mmap_mode="r", allow_pickle=False) if length else None
            except (OSError, ValueError):
                raise wrong from None
            if array is not None and (array.shape, array.dtype) != ((length, dim), np.float16):
                raise wrong
            return array

        projections, cells = halves(PROJECTIONS, count * kept), halves(CELLS, manifest.get("cells", 0))
        return cls(index, rows, manifest, projections, heads if kept else None, small, cells)


def unit(projections: NDArray[np.float16]) -> Vectors:
    """Return the image parts of projections (N, dim): the same directions, of length one."""
    vectors = projections.astype(np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


def _selector(keep: Mask) -> Any:
    import faiss

    selector: Any = faiss.IDSelectorBitmap  # whose Python side takes the bits alone
    return selector(np.packbits(keep, bitorder="little"))
