"""What passes between the stages of the road: arrays in memory, a table's columns on disk.

B photos, K neighbors, N candidates, C entries of a pool, M places of a multimodal model, R radii. Every type of a
stage's result has ``to_table(ids)`` and ``from_table(table)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rag_geotoken.errors import GeoError
from rag_geotoken.geo.sphere import Floats
from rag_geotoken.storage.parquet import fixed_list, pad_lists, spread, to_numpy

if TYPE_CHECKING:
    import pyarrow as pa

RADII_KM = (1, 25, 200, 750, 2500)  # street, city, region, country and continent, since IM2GPS
SOURCES = ("neighbor", "greedy", "beam", "sample", "frontier", "gps", "visual", "mllm", "gallery")
NEIGHBOR, GREEDY, BEAM, SAMPLE, FRONTIER, GPS, VISUAL, MLLM, GALLERY = range(9)
Picture = str | bytes | NDArray[np.uint8] | Image.Image
"""A path or reference, the bytes of a file, pixels (H, W, 3), or a picture of Pillow."""
SEARCH_WEIGHTS = (0.5, 1.0, 0.5)  # of the image, GPS and text part in a search, unless tuned
At = slice | NDArray[np.bool_] | NDArray[np.int64]

# The columns that a field makes in a table, where they are not one of the field's name.
COLUMNS: dict[str, tuple[str, ...]] = {
    "lat_lon": ("lat", "lon"),
    "true_lat_lon": ("true_lat", "true_lon"),
    "vectors": ("image", "gps", "text"),
    "confidence": tuple(f"confidence_{r}" for r in RADII_KM),
}
COLUMNS |= {name: (name[:-1],) for name in ("ids", "images", "authors", "digests", "errors", "rows", "scores", "cells")}


class Rows:
    """Fields that all have a line a photo: sliced, chosen, joined together and read from a table."""

    def __getitem__(self, at: At) -> Self:
        """The same of some of the photos."""
        return type(self)(*(_some(value, at) for value in vars(self).values()))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The parts' photos one after the other."""
        return cls(*(_joined([getattr(part, f.name) for part in parts]) for f in fields(cls)))  # type: ignore[arg-type]

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """Read back what ``to_table`` made."""
        return cls(*(_read(table, f.name) for f in fields(cls)))  # type: ignore[arg-type]


class Lines(Rows):
    """Several places a photo, fields (B, N, ...): in a table a line each, the photo's id and then ``columns``.

    fill: what fields hold where a photo has fewer places than others; any place where it is not said.
    """

    columns: ClassVar[tuple[str, ...]]
    fill: ClassVar[dict[str, float]] = {}

    def there(self) -> NDArray[np.bool_]:
        """(B, N) true where there is a place."""
        return np.ones(getattr(self, self.columns[-1]).shape, bool)  # the last column is a number

    def to_table(self, ids: Sequence[str]) -> pa.Table:
        """A line a place that is there, the photos in order, ``rank`` from 1."""
        there = self.there()
        values = vars(self) | {"rank": np.cumsum(there, axis=1, dtype=np.int32)}
        lines = {name: values[name][there] for name in self.columns}
        return _table({"ids": np.repeat(ids, there.sum(axis=1))} | lines)

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """Read back what :meth:`to_table` made."""
        mask = _runs(table["id"])
        found = {name: spread(_read(table, name), mask, cls.fill.get(name)) for name in cls.columns} | {"mask": mask}
        return cls(**{f.name: found[f.name] for f in fields(cls)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Photos(Rows):
    """What a source says of B photos: ids, pictures, authors (None where unknown) and lat_lon (B, 2), NaN likewise."""

    ids: list[str]
    images: list[Picture]
    authors: list[str | None]
    lat_lon: Floats

    def __len__(self) -> int:
        """B."""
        return len(self.ids)

    @classmethod
    def of(cls, pictures: Sequence[Picture], ids: Sequence[str], authors: Sequence[str | None] = ()) -> Photos:
        """Pictures of unknown places."""
        unknown = list(authors) or [None] * len(pictures)
        return cls(list(ids), list(pictures), unknown, np.full((len(pictures), 2), np.nan))


@dataclass(frozen=True)
class Embeddings(Rows):
    """Photos as the encoder sees them: vectors (B, 3, dim), the image, GPS and text part, each of length one.

    digests: names of the pixels, 32 hexadecimal digits. errors: why a picture could not be read, else None.
    """

    vectors: NDArray[np.float32]
    digests: list[str]
    errors: list[str | None]

    @property
    def image(self) -> NDArray[np.float32]:
        """(B, dim), to be compared with pictures."""
        return self.vectors[:, 0]

    @property
    def gps(self) -> NDArray[np.float32]:
        """(B, dim), to be compared with places."""
        return self.vectors[:, 1]

    @property
    def readable(self) -> NDArray[np.bool_]:
        """(B,) true where there is a picture."""
        return np.array([error is None for error in self.errors], bool)

    @property
    def keys(self) -> list[int]:
        """What names the random stream of each photo: its pixels, never its place in a batch or its file's name."""
        return [int(digest[:15], 16) for digest in self.digests]

    def to_table(self, ids: Sequence[str]) -> pa.Table:
        """Columns id, image, gps, text, digest, error."""
        return _table({"ids": ids} | vars(self))


@dataclass(frozen=True)
class Places(Lines):
    """Scored places of each photo: lat_lon (B, N, 2) degrees, scores (B, N) float32.

    As ``places``, those most like the photo's GPS embedding, best first, with their cosines. As ``matches``, where each
    neighbor's picture, compared with the photo, puts it, and from 0 to 1 how well the two fit.
    """

    lat_lon: Floats
    scores: NDArray[np.float32]

    columns: ClassVar = ("rank", "lat_lon", "scores")


@dataclass(frozen=True)
class Neighbors(Lines):
    """Gallery photos near each query, best first.

    rows (B, K) int64 into the index, lat_lon (B, K, 2) degrees, scores (B, K) float32 weighted inner products.
    """

    rows: NDArray[np.int64]
    lat_lon: Floats
    scores: NDArray[np.float32]

    columns: ClassVar = ("rank", "rows", "lat_lon", "scores")


@dataclass(frozen=True)
class Candidates(Lines):
    """Generated cells of each photo, best first.

    tokens (B, N, T) int64, log_prob (B, N) float32 untempered, source (B, N) int8 into ``SOURCES``, lat_lon (B, N, 2)
    the cells' centers.
    """

    tokens: NDArray[np.int64]
    log_prob: NDArray[np.float32]
    source: NDArray[np.int8]
    lat_lon: Floats

    columns: ClassVar = ("lat_lon", "tokens", "log_prob", "source")


@dataclass(frozen=True)
class Posterior(Lines):
    """Disjoint S2 cells of each photo: cells (B, M) uint64 ids, mass (B, M) adding up to 1, largest first.

    Photos with fewer cells are filled up with any at a mass of zero.
    """

    cells: NDArray[np.uint64]
    mass: NDArray[np.float32]

    columns: ClassVar = ("cells", "mass")
    fill: ClassVar = {"mass": 0.0}

    def there(self) -> NDArray[np.bool_]:
        """(B, M) true where there is a cell."""
        return self.mass > 0


@dataclass(frozen=True)
class Pool(Lines):
    """Places one of which will be the answer, generated and retrieved together, one entry a cell.

    lat_lon (B, C, 2) degrees, log_weight (B, C) float32 normalized over a photo's entries, source (B, C) int8 into
    ``SOURCES``, mask (B, C) true where there is an entry.
    """

    lat_lon: Floats
    log_weight: NDArray[np.float32]
    source: NDArray[np.int8]
    mask: NDArray[np.bool_]

    columns: ClassVar = ("lat_lon", "log_weight", "source")
    fill: ClassVar = {"log_weight": -np.inf}

    @property
    def weight(self) -> Floats:
        """(B, C), zero where there is no entry."""
        return np.exp(self.log_weight.astype(np.float64))

    def there(self) -> NDArray[np.bool_]:
        """``mask``."""
        return self.mask


@dataclass(frozen=True)
class Verdict(Rows):
    """A verifier's score of every entry of the pools: scores (B, C) float32, mask (B, C) true where there is one."""

    scores: NDArray[np.float32]
    mask: NDArray[np.bool_]

    def over(self, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
        """The scores (B, C) laid out over a mask (B, C) of as many entries a photo, zero elsewhere."""
        return spread(self.scores[self.mask], mask, 0.0)

    def to_table(self, ids: Sequence[str]) -> pa.Table:
        """Columns id, status (ok), scores, a list over the photo's pool entries in their order."""
        import pyarrow as pa

        return pa.table({"id": ids, "status": ["ok"] * len(ids), "scores": _lists(self.scores, self.mask)})

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """Read back what :meth:`to_table` made."""
        return cls(*pad_lists(table["scores"], 0.0))


@dataclass(frozen=True)
class MllmVerdict(Verdict):
    """What a multimodal model said of B photos: a verdict, zeros where it gave none, and more.

    status: "ok" for each photo, or why there is no answer. lat_lon (B, M, 2) and confidence (B, M) from 0 to 1: places
    of the model's own, NaN where there are no more. raw: its answers as they came. requests, prompt_tokens,
    output_tokens (B,): what it cost.
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
        """(B,) true where the model gave a usable answer."""
        return np.array([status == "ok" for status in self.status], bool)

    def to_table(self, ids: Sequence[str]) -> pa.Table:
        """Columns id, status, scores, lat, lon, confidence (lists), raw, requests, prompt_tokens, output_tokens."""
        import pyarrow as pa

        lat, lon = np.moveaxis(self.lat_lon, 2, 0)
        columns = {"id": ids, "status": self.status, "scores": _lists(self.scores, self.mask)}
        for name, values in (("lat", lat), ("lon", lon), ("confidence", self.confidence)):
            columns[name] = _lists(values, np.isfinite(lat))
        columns["raw"] = pa.array(self.raw, pa.list_(pa.string()))
        return pa.table(columns | {name: getattr(self, name) for name in self.COSTS})

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """Read back what :meth:`to_table` made."""
        lat, lon, confidence = (pad_lists(table[name])[0] for name in ("lat", "lon", "confidence"))
        status, *others = (_read(table, name) for name in ("status", "raw", *cls.COSTS))
        return cls(*pad_lists(table["scores"], 0.0), status, np.stack([lat, lon], axis=-1), confidence, *others)


@dataclass(frozen=True)
class Predictions(Rows):
    """The decision on each photo.

    lat_lon (B, 2) degrees, confidence (B, R) the believed chance to lie within each of the R radii,
    source (B,) int8 into ``SOURCES``.
    """

    lat_lon: Floats
    confidence: Floats
    source: NDArray[np.int8]


@dataclass(frozen=True)
class Answers(Predictions):
    """Decisions as users get them: NaN and a reason in ``errors`` where a photo has no answer.

    area_km2 (B,): the effective area of the posterior, NaN where it was not computed. verified (B,): whether a verifier
    answered. ids, and true_lat_lon (B, 2), NaN where a source does not know the truth.
    """

    area_km2: Floats
    verified: NDArray[np.bool_]
    errors: list[str | None]
    ids: list[str]
    true_lat_lon: Floats

    def to_table(self) -> pa.Table:
        """Columns id, true_lat, true_lon, lat, lon, source, confidence_1 (to 2500), area_km2, verified, error.

        Null where a number is not known or there is no answer.
        """
        silent = np.array([error is not None for error in self.errors], bool)
        answered = {
            "lat_lon": np.where(silent[:, None], np.nan, self.lat_lon),
            "source": np.where(silent, -1, self.source),
            "confidence": np.where(silent[:, None], np.nan, self.confidence),
        }
        checked = {"area_km2": self.area_km2, "verified": self.verified & ~silent, "errors": self.errors}
        return _table({"ids": self.ids, "true_lat_lon": self.true_lat_lon, **answered, **checked})

    @classmethod
    def of(cls, photos: Photos, errors: Sequence[str | None]) -> Answers:
        """No answer for any photo, or none yet, and why."""
        count = len(photos)
        decided = np.full((count, 2), np.nan), np.full((count, len(RADII_KM)), np.nan), np.zeros(count, np.int8)
        spread, verified = np.full(count, np.nan), np.zeros(count, bool)
        return cls(*decided, spread, verified, list(errors), photos.ids, photos.lat_lon)

    def rows(self) -> list[Prediction]:
        """One :class:`Prediction` a photo."""
        answers = []
        for row in self.to_table().drop_columns(COLUMNS["true_lat_lon"]).to_pylist():
            sure = tuple(row.pop(name) for name in COLUMNS["confidence"])
            answers.append(Prediction(**row, confidence=sure if row["error"] is None else None))
        return answers


@dataclass(frozen=True)
class Prediction:
    """The answer for one photo: degrees, and the believed chance to lie within 1, 25, 200, 750 and 2500 km of it.

    source: the kind of the pool's entry that was chosen. area_km2: over what area the token model's belief is spread,
    where that was asked. A photo without an answer has ``error`` and no coordinates.
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
    """What the road has made so far of B readable photos, each field the result of the stage of that name."""

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
        """Keep the result of a stage."""
        kind, _, name = stage.partition("-")
        if name == "mllm-diversify":
            self.diverse = result
        elif kind == "verdicts":
            self.verdicts[name.partition("-")[0]] = result
        else:
            setattr(self, kind, result)

    def __getitem__(self, at: At) -> Tables:
        """The same of some of the photos."""
        some = Tables(self.photos[at], {name: verdict[at] for name, verdict in self.verdicts.items()})
        for name in vars(self).keys() - {"photos", "verdicts"}:
            setattr(some, name, getattr(self, name)[at])
        return some


def _some(values: Any, at: At) -> Any:
    if isinstance(values, np.ndarray) or isinstance(at, slice):
        return values[at]
    return [values[i] for i in np.arange(len(values))[at]]


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return [value for part in parts for value in part]


def _table(values: Mapping[str, Any]) -> pa.Table:
    """Fields with as many lines each -> their columns, by the names in :data:`COLUMNS`."""
    import pyarrow as pa

    columns = dict[str, pa.Array]()
    for name, lines in values.items():
        names = COLUMNS.get(name, (name,))
        parts = [lines] if len(names) == 1 else np.moveaxis(lines, 1, 0)
        columns |= {column: _column(column, part) for column, part in zip(names, parts, strict=True)}
    return pa.table(columns)


def _column(name: str, values: Any) -> pa.Array:
    """Numbers (null for NaN), vectors as lists of fixed size, texts (null for None), sources by their names."""
    import pyarrow as pa

    if name == "source":
        return pa.DictionaryArray.from_arrays(pa.array(values, mask=values < 0), pa.array(SOURCES)).cast(pa.string())
    if not isinstance(values, np.ndarray):
        return pa.array(values, pa.string())
    if name == "tokens":
        values = values.astype(np.int16)
    return fixed_list(values) if values.ndim > 1 else pa.array(values, from_pandas=True)


def _read(table: pa.Table, name: str) -> Any:
    """The field whose columns :func:`_table` made."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = [table[column] for column in COLUMNS.get(name, (name,))]
    if name == "source":
        return pc.index_in(columns[0], pa.array(SOURCES)).fill_null(0).to_numpy().astype(np.int8)
    if pa.types.is_string(columns[0].type) or pa.types.is_list(columns[0].type):
        return columns[0].to_pylist()
    arrays = [to_numpy(column) for column in columns]
    values = arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=1)
    return values.astype(np.int64) if name == "tokens" else values


def _lists(values: NDArray[Any], kept: NDArray[np.bool_]) -> pa.Array:
    """What is kept of the numbers (B, N), a list a photo."""
    import pyarrow as pa

    lists = [row[there] for row, there in zip(values, kept, strict=True)]
    return pa.array(lists, pa.list_(pa.from_numpy_dtype(values.dtype)))


def _runs(ids: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Ids in runs -> (B, longest run) true for as many places a row as the run is long."""
    codes = ids.combine_chunks().dictionary_encode().indices.to_numpy()
    counts = np.bincount(codes)
    if (np.diff(codes) < 0).any():
        raise GeoError("a table's photos are out of order: delete it and run its stage again")
    mask: NDArray[np.bool_] = np.arange(counts.max()) < counts[:, None]
    return mask
