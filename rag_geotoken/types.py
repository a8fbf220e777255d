"""These types pass between the stages of the pipeline: arrays in memory, the columns of a table on disk.

B photos, K neighbors, N candidates, C entries of a pool, M places of a multimodal model, R radii. Every type of a
stage's result has ``to_table(ids)`` and ``from_table(table)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from rag_geotoken.errors import GeoError
from rag_geotoken.geo.sphere import Floats
from rag_geotoken.storage.parquet import fixed_list, pad_lists, spread, to_numpy

RADII_KM = (1, 25, 200, 750, 2500)  # street, city, region, country and continent, since IM2GPS
SOURCES = ("neighbor", "greedy", "beam", "sample", "frontier", "gps", "visual", "mllm", "gallery")
NEIGHBOR, GREEDY, BEAM, SAMPLE, FRONTIER, GPS, VISUAL, MLLM, GALLERY = range(9)
Picture = str | bytes | NDArray[np.uint8] | Image.Image
"""A path or reference, the bytes of a file, pixels (H, W, 3), or a picture of Pillow."""
SEARCH_WEIGHTS = (0.5, 1.0, 0.5)  # of the image, GPS and text part in a search, unless tuned
At = slice | NDArray[np.bool_] | NDArray[np.int64]

# The columns of a field in a table, where they are not a single one of the field's name.
COLUMNS: dict[str, tuple[str, ...]] = {
    "lat_lon": ("lat", "lon"),
    "true_lat_lon": ("true_lat", "true_lon"),
    "vectors": ("image", "gps", "text"),
    "confidence": tuple(f"confidence_{r}" for r in RADII_KM),
}
COLUMNS |= {name: (name[:-1],) for name in ("ids", "images", "authors", "digests", "errors", "rows", "scores", "cells")}


class Rows:
    """This base class holds fields with one row per photo, which are sliced, joined and read from a table together."""

    def __getitem__(self, at: At) -> Self:
        """Select some of the photos."""
        values = vars(self).values()
        rows = np.arange(len(next(iter(values))))[at]
        return type(self)(*(v[at] if isinstance(v, np.ndarray) else [v[row] for row in rows] for v in values))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Concatenate the photos of several parts."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(np.concatenate(c) if isinstance(c[0], np.ndarray) else list(chain(*c)) for c in columns))

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """Read back the table that ``to_table`` made."""
        return cls(*(_read(table, f.name) for f in fields(cls)))  # type: ignore[arg-type]


class Lines(Rows):
    """This base class holds several places per photo, fields (B, N, ...), which are one table row each.

    columns: the fields in a table's order, behind the photo's id. fill: the value of a field where a photo has fewer
    places than others; the first place's value if not named.
    """

    columns: ClassVar[tuple[str, ...]]
    fill: ClassVar[dict[str, float]] = {}

    def present(self) -> NDArray[np.bool_]:
        """Return a mask (B, N), true where there is a place."""
        return np.ones(getattr(self, self.columns[-1]).shape, bool)  # the last column is a number

    def to_table(self, ids: Sequence[str]) -> pa.Table:
        """Make a table with one row per place that is present, the photos in order, ``rank`` from 1."""
        mask = self.present()
        values = vars(self) | {"rank": np.cumsum(mask, axis=1, dtype=np.int32)}
        return _table({"ids": np.repeat(ids, mask.sum(axis=1))} | {name: values[name][mask] for name in self.columns})

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """Read back the table that :meth:`to_table` made."""
        codes = table["id"].combine_chunks().dictionary_encode().indices.to_numpy()
        if (np.diff(codes) < 0).any():
            raise GeoError("a table's photos are out of order: delete it and run its stage again")
        counts = np.bincount(codes)
        mask = np.arange(counts.max()) < counts[:, None]
        values = {name: spread(_read(table, name), mask, cls.fill.get(name)) for name in cls.columns} | {"mask": mask}
        return cls(**{f.name: values[f.name] for f in fields(cls)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Photos(Rows):
    """This class holds B photos of a source: ids, images, authors (None where unknown) and lat_lon (B, 2), else NaN."""

    ids: list[str]
    images: list[Picture]
    authors: list[str | None]
    lat_lon: Floats

    def __len__(self) -> int:
        """Return the number of photos."""
        return len(self.ids)

    @classmethod
    def of(cls, pictures: Sequence[Picture], ids: Sequence[str], authors: Sequence[str | None] = ()) -> Photos:
        """Make photos of unknown places."""
        count = len(pictures)
        return cls(list(ids), list(pictures), list(authors) or [None] * count, np.full((count, 2), np.nan))


@dataclass(frozen=True)
class Embeddings(Rows):
    """This class holds the embeddings of photos: vectors (B, 3, dim), an image, GPS and text part, each of length one.

    digests: hashes of the pixels, 32 hexadecimal digits. errors: why a picture could not be read, else None.
    """

    vectors: NDArray[np.float32]
    digests: list[str]
    errors: list[str | None]

    @property
    def image(self) -> NDArray[np.float32]:
        """Return the image parts (B, dim), to be compared with pictures."""
        return self.vectors[:, 0]

    @property
    def gps(self) -> NDArray[np.float32]:
        """Return the GPS parts (B, dim), to be compared with places."""
        return self.vectors[:, 1]

    @property
    def readable(self) -> NDArray[np.bool_]:
        """Return a mask (B,), true where the picture could be read."""
        return np.array([error is None for error in self.errors], bool)

    @property
    def keys(self) -> list[int]:
        """Return the random seed of each photo: by its pixels, never its position in a batch or its file's name."""
        return [int(digest[:15], 16) for digest in self.digests]

    def to_table(self, ids: Sequence[str]) -> pa.Table:
        """Make a table with the columns id, image, gps, text, digest and error."""
        return _table({"ids": ids} | vars(self))


@dataclass(frozen=True)
class Places(Lines):
    """This class holds scored places of each photo: lat_lon (B, N, 2) degrees, scores (B, N) float32.

    As ``places``, those most similar to the photo's GPS embedding, best first, with cosines. As ``matches``, where
    each neighbor's picture, compared with the photo, puts it, and from 0 to 1 how well the two fit.
    """

    lat_lon: Floats
    scores: NDArray[np.float32]

    columns: ClassVar = ("rank", "lat_lon", "scores")


@dataclass(frozen=True)
class Neighbors(Lines):
    """This class holds the gallery photos that are nearest to each query, best first.

    rows (B, K) int64 into the index, lat_lon (B, K, 2) degrees, scores (B, K) float32 weighted inner products.
    """

    rows: NDArray[np.int64]
    lat_lon: Floats
    scores: NDArray[np.float32]

    columns: ClassVar = ("rank", "rows", "lat_lon", "scores")


@dataclass(frozen=True)
class Candidates(Lines):
    """This class holds the generated cells of each photo, best first.

    tokens (B, N, T) int64, log_prob (B, N) float32 at temperature 1, source (B, N) int8 into ``SOURCES``, lat_lon
    (B, N, 2) the cells' centers.
    """

    tokens: NDArray[np.int64]
    log_prob: NDArray[np.float32]
    source: NDArray[np.int8]
    lat_lon: Floats

    columns: ClassVar = ("lat_lon", "tokens", "log_prob", "source")


@dataclass(frozen=True)
class Posterior(Lines):
    """This class holds disjoint S2 cells of each photo: cells (B, M) uint64 ids, mass (B, M) with sum 1, largest first.

    Photos with fewer cells are filled up with any at a mass of zero.
    """

    cells: NDArray[np.uint64]
    mass: NDArray[np.float32]

    columns: ClassVar = ("cells", "mass")
    fill: ClassVar = {"mass": 0.0}

    def present(self) -> NDArray[np.bool_]:
        """Return a mask (B, M), true where there is a cell."""
        return self.mass > 0


@dataclass(frozen=True)
class Pool(Lines):
    """This class holds the places one of which will be the answer, generated and retrieved, one entry per cell.

    lat_lon (B, C, 2) degrees, log_weight (B, C) float32 normalized over a photo's entries, source (B, C) int8 into
    ``SOURCES``, mask (B, C) true where there is an entry.
    """

    lat_lon: Floats
    log_weight: NDArray[np.floating]
    source: NDArray[np.int8]
    mask: NDArray[np.bool_]

    columns: ClassVar = ("lat_lon", "log_weight", "source")
    fill: ClassVar = {"log_weight": -np.inf}

    @property
    def weight(self) -> Floats:
        """Return the weights (B, C), zero where there is no entry."""
        return np.exp(self.log_weight.astype(np.float64))

    def present(self) -> NDArray[np.bool_]:
        """Return the mask (B, C)."""
        return self.mask


@dataclass(frozen=True)
class Verdict(Rows):
    """This class holds a verifier's scores (B, C) float32 of the pools' entries, and a mask (B, C) of the entries."""

    scores: NDArray[np.float32]
    mask: NDArray[np.bool_]

    def over(self, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Lay the scores out over a mask (B, C) of as many entries per photo, zero elsewhere."""
        return spread(self.scores[self.mask], mask, 0.0)

    def to_table(self, ids: Sequence[str]) -> pa.Table:
        """Make a table with the columns id, status (ok) and scores, a list over the photo's pool entries in order."""
        return pa.table({"id": ids, "status": ["ok"] * len(ids), "scores": _lists(self.scores, self.mask)})

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """Read back the table that :meth:`to_table` made."""
        return cls(*pad_lists(table["scores"], 0.0))


@dataclass(frozen=True)
class MllmVerdict(Verdict):
    """This class holds a multimodal model's answers on B photos: a verdict, zeros where it gave none, and more.

    status: "ok" for each photo, or why there is no answer. lat_lon (B, M, 2) and confidence (B, M) from 0 to 1: places
    that the model named itself, NaN where there are no more. raw: the unparsed answers. requests, prompt_tokens,
    output_tokens (B,): the costs.
    """

    status: list[str]
    lat_lon: Floats
    confidence: Floats
    raw: list[list[str]]
    requests: NDArray[np.int64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]

    COSTS: ClassVar = ("requests", "prompt_tokens", "output_tokens")

    @property
    def answered(self) -> NDArray[np.bool_]:
        """Return a mask (B,), true where the model gave a usable answer."""
        return np.array([status == "ok" for status in self.status], bool)

    def to_table(self, ids: Sequence[str]) -> pa.Table:
        """Make a table with the columns id, status, scores, lat, lon, confidence (lists), raw and the costs."""
        lat, lon = np.moveaxis(self.lat_lon, 2, 0)
        places = {"lat": lat, "lon": lon, "confidence": self.confidence}
        columns = {"id": ids, "status": self.status, "scores": _lists(self.scores, self.mask)}
        columns |= {name: _lists(values, np.isfinite(lat)) for name, values in places.items()}
        columns["raw"] = pa.array(self.raw, pa.list_(pa.string()))
        return pa.table(columns | {name: getattr(self, name) for name in self.COSTS})

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """Read back the table that :meth:`to_table` made."""
        lat, lon, confidence = (pad_lists(table[name])[0] for name in ("lat", "lon", "confidence"))
        status, *rest = (_read(table, name) for name in ("status", "raw", *cls.COSTS))
        return cls(*pad_lists(table["scores"], 0.0), status, np.stack([lat, lon], axis=-1), confidence, *rest)


@dataclass(frozen=True)
class Predictions(Rows):
    """This class holds the decision on each photo.

    lat_lon (B, 2) degrees, confidence (B, R) the estimated probability to lie within each of the R radii,
    source (B,) int8 into ``SOURCES``.
    """

    lat_lon: Floats
    confidence: Floats
    source: NDArray[np.int8]


@dataclass(frozen=True)
class Answers(Predictions):
    """This class holds the decisions that users get, and a reason in ``errors`` where a photo has no answer.

    area_km2 (B,): the effective area of the posterior, NaN where it was not computed. verified (B,): whether a verifier
    answered. true_lat_lon (B, 2): NaN where a source does not know the truth.
    """

    area_km2: Floats
    verified: NDArray[np.bool_]
    errors: list[str | None]
    ids: list[str]
    true_lat_lon: Floats

    def to_table(self) -> pa.Table:
        """Make a table with id, true_lat, true_lon, lat, lon, source, confidence_1 ..., area_km2, verified and error.

        Null where a number is not known or there is no answer.
        """
        silent = np.array([error is not None for error in self.errors], bool)
        names = ("ids", "true_lat_lon", "lat_lon", "source", "confidence", "area_km2", "verified", "errors")
        columns = {name: getattr(self, name) for name in names}
        for name in ("lat_lon", "confidence"):
            columns[name] = np.where(silent[:, None], np.nan, columns[name])
        columns |= {"source": np.where(silent, -1, self.source), "verified": self.verified & ~silent}
        return _table(columns)

    @classmethod
    def of(cls, photos: Photos, errors: Sequence[str | None]) -> Answers:
        """Make answers without a place for any photo, with the reasons."""
        count = len(photos)
        return cls(
            lat_lon=np.full((count, 2), np.nan),
            confidence=np.full((count, len(RADII_KM)), np.nan),
            source=np.zeros(count, np.int8),
            area_km2=np.full(count, np.nan),
            verified=np.zeros(count, bool),
            errors=list(errors),
            ids=photos.ids,
            true_lat_lon=photos.lat_lon,
        )

    @classmethod
    def complete(cls, photos: Photos, errors: Sequence[str | None], decided: Answers | None) -> Answers:
        """Return the answers of all photos: decisions of the readable ones, the errors of the others."""
        answers = cls.of(photos, errors)
        readable = np.flatnonzero([error is None for error in errors])
        if decided is not None:
            for name in ("lat_lon", "confidence", "source", "area_km2", "verified"):
                getattr(answers, name)[readable] = getattr(decided, name)
            for i, error in zip(readable.tolist(), decided.errors, strict=True):
                answers.errors[i] = error
        return answers

    def rows(self) -> list[Prediction]:
        """Return one :class:`Prediction` per photo."""
        answers = []
        for row in self.to_table().drop_columns(COLUMNS["true_lat_lon"]).to_pylist():
            chances = tuple(row.pop(name) for name in COLUMNS["confidence"])
            answers.append(Prediction(**row, confidence=chances if row["error"] is None else None))
        return answers


@dataclass(frozen=True)
class Prediction:
    """This class holds the answer for one photo: degrees, and the probability to lie within 1 to 2500 km of it.

    source: the kind of the pool's entry that was chosen. area_km2: the effective area of the token model's posterior,
    where it was computed. A photo without an answer has ``error`` and no coordinates.
    """

    id: str
    lat: float | None = None
    lon: float | None = None
    confidence: tuple[float, ...] | None = None
    source: str | None = None
    area_km2: float | None = None
    verified: bool = False
    error: str | None = None


@dataclass
class Tables:
    """This class holds the results so far of B readable photos, each field that of the stage of its name."""

    photos: Photos
    embeddings: Embeddings = field(init=False)
    neighbors: Neighbors = field(init=False)
    candidates: Candidates = field(init=False)
    places: Places = field(init=False)
    matches: Places = field(init=False)
    posterior: Posterior = field(init=False)
    diverse: MllmVerdict = field(init=False)
    pool: Pool = field(init=False)
    verdicts: dict[str, Verdict] = field(default_factory=dict)  # by verifier

    def put(self, stage: str, result: Any) -> None:
        """Store the result of a stage."""
        kind, _, name = stage.partition("-")
        if name == "mllm-diversify":
            self.diverse = result
        elif kind == "verdicts":
            self.verdicts[name.partition("-")[0]] = result
        else:
            setattr(self, kind, result)

    def __getitem__(self, at: At) -> Tables:
        """Select some of the photos."""
        some = Tables(self.photos[at], {name: verdict[at] for name, verdict in self.verdicts.items()})
        for name in vars(self).keys() - {"photos", "verdicts"}:
            setattr(some, name, getattr(self, name)[at])
        return some


def _table(values: Mapping[str, Any]) -> pa.Table:
    """Make a table of fields with as many rows each, by the column names in :data:`COLUMNS`."""
    columns = dict[str, pa.Array]()
    for name, rows in values.items():
        names = COLUMNS.get(name, (name,))
        parts = [rows] if len(names) == 1 else np.moveaxis(rows, 1, 0)
        columns |= {column: _column(column, part) for column, part in zip(names, parts, strict=True)}
    return pa.table(columns)


def _column(name: str, values: Any) -> pa.Array:
    """Make a column: numbers (null for NaN), vectors as fixed-size lists, texts (null for None), sources by name."""
    if name == "source":
        return pa.DictionaryArray.from_arrays(pa.array(values, mask=values < 0), pa.array(SOURCES)).cast(pa.string())
    if not isinstance(values, np.ndarray):
        return pa.array(values, pa.string())
    if name == "tokens":
        values = values.astype(np.int16)
    return fixed_list(values) if values.ndim > 1 else pa.array(values, from_pandas=True)


def _read(table: pa.Table, name: str) -> Any:
    """Read the field whose columns :func:`_table` made."""
    columns = [table[column] for column in COLUMNS.get(name, (name,))]
    if name == "source":
        return pc.index_in(columns[0], pa.array(SOURCES)).fill_null(0).to_numpy().astype(np.int8)
    if pa.types.is_string(columns[0].type) or pa.types.is_list(columns[0].type):
        return columns[0].to_pylist()
    arrays = [to_numpy(column) for column in columns]
    values = arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=1)
    return values.astype(np.int64) if name == "tokens" else values


def _lists(values: NDArray[Any], mask: NDArray[np.bool_]) -> pa.Array:
    """Make a column of one list per photo, the numbers (B, N) where a mask is true."""
    lists = [row[kept] for row, kept in zip(values, mask, strict=True)]
    return pa.array(lists, pa.list_(pa.from_numpy_dtype(values.dtype)))
