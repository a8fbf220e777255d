"""What passes between the stages of the road: arrays in memory, a table's columns on disk.

B photos, K neighbours, N candidates, C entries of a pool, M places of a multimodal model, R radii. Every type of a
stage's result has ``to_table(ids)`` and ``from_table(table)`` beside its fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.errors import GeoError
from rag_geotoken.geo import Floats
from rag_geotoken.tables import fixed_list, pad_lists, to_numpy

if TYPE_CHECKING:
    import pyarrow as pa

    from rag_geotoken.pictures import Picture

RADII_KM = (1, 25, 200, 750, 2500)  # street, city, region, country and continent, since IM2GPS
SOURCES = ("neighbour", "greedy", "beam", "sample", "frontier", "gps", "visual", "mllm", "gallery")
NEIGHBOUR, GREEDY, BEAM, SAMPLE, FRONTIER, GPS, VISUAL, MLLM, GALLERY = range(9)
At = slice | NDArray[np.bool_] | NDArray[np.int64]


class Rows:
    """Fields that all have a line a photo: sliced, chosen and joined together."""

    def __getitem__(self, at: At) -> Self:
        """The same of some of the photos."""
        return type(self)(*(_some(value, at) for value in vars(self).values()))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The parts' photos one after the other."""
        return cls(*(_joined([getattr(part, f.name) for part in parts]) for f in fields(cls)))  # type: ignore[arg-type]


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

    @classmethod
    def from_table(cls, table: pa.Table) -> Photos:
        """Read a photos table, which :mod:`rag_geotoken.sources` makes."""
        names, images, authors = (table[name].to_pylist() for name in ("id", "image", "author"))
        return cls(names, images, authors, _columns(table, "lat", "lon"))


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
        import pyarrow as pa

        parts = {name: fixed_list(self.vectors[:, i]) for i, name in enumerate(("image", "gps", "text"))}
        names = {"id": pa.array(ids, pa.string())}
        return pa.table(names | parts | {"digest": self.digests, "error": pa.array(self.errors, pa.string())})

    @classmethod
    def from_table(cls, table: pa.Table) -> Embeddings:
        """Read back what :meth:`to_table` made."""
        vectors = np.stack([to_numpy(table[name]) for name in ("image", "gps", "text")], axis=1)
        return cls(vectors, table["digest"].to_pylist(), table["error"].to_pylist())


@dataclass(frozen=True)
class Places(Rows):
    """Scored places of each photo: lat_lon (B, N, 2) degrees, scores (B, N) float32.

    As ``places``, those most like the photo's GPS embedding, best first, with their cosines. As ``matches``, where each
    neighbour's picture, compared with the photo, puts it, and from 0 to 1 how well the two fit.
    """

    lat_lon: Floats
    scores: NDArray[np.float32]

    def to_table(self, ids: Sequence[str]) -> pa.Table:
        """Columns id, rank, lat, lon, score."""
        return _ranked(ids, self.lat_lon, {"score": self.scores})

    @classmethod
    def from_table(cls, table: pa.Table) -> Places:
        """Read back what :meth:`to_table` made."""
        k = int(table["rank"].to_numpy().max())
        return cls(_columns(table, "lat", "lon").reshape(-1, k, 2), table["score"].to_numpy().reshape(-1, k))


@dataclass(frozen=True)
class Neighbors(Rows):
    """Gallery photos near each query, best first.

    rows (B, K) int64 into the index, lat_lon (B, K, 2) degrees, scores (B, K) float32 weighted inner products.
    """

    rows: NDArray[np.int64]
    lat_lon: Floats
    scores: NDArray[np.float32]

    def to_table(self, ids: Sequence[str]) -> pa.Table:
        """Columns id, rank, row, lat, lon, score."""
        return _ranked(ids, self.lat_lon, {"score": self.scores}, {"row": self.rows})

    @classmethod
    def from_table(cls, table: pa.Table) -> Neighbors:
        """Read back what :meth:`to_table` made."""
        near = Places.from_table(table)
        return cls(table["row"].to_numpy().reshape(near.scores.shape), near.lat_lon, near.scores)


@dataclass(frozen=True)
class Candidates(Rows):
    """Generated cells of each photo, best first.

    tokens (B, N, T) int64, log_prob (B, N) float32 untempered, source (B, N) int8 into ``SOURCES``, lat_lon (B, N, 2)
    the cells' centres.
    """

    tokens: NDArray[np.int64]
    log_prob: NDArray[np.float32]
    source: NDArray[np.int8]
    lat_lon: Floats

    def to_table(self, ids: Sequence[str]) -> pa.Table:
        """Columns id, lat, lon, tokens, log_prob, source."""
        import pyarrow as pa

        tokens = self.tokens.reshape(-1, self.tokens.shape[-1]).astype(np.int16)
        columns = {"id": pa.array(np.repeat(ids, self.log_prob.shape[1]), pa.string())}
        columns |= {"lat": self.lat_lon[..., 0].ravel(), "lon": self.lat_lon[..., 1].ravel()}
        columns |= {"tokens": fixed_list(tokens), "log_prob": self.log_prob.ravel(), "source": _names(self.source)}
        return pa.table(columns)

    @classmethod
    def from_table(cls, table: pa.Table) -> Candidates:
        """Read back what :meth:`to_table` made."""
        photos, tokens = len(table["id"].unique()), to_numpy(table["tokens"]).astype(np.int64)
        return cls(
            tokens.reshape(photos, -1, tokens.shape[-1]),
            table["log_prob"].to_numpy().reshape(photos, -1),
            _numbers(table["source"]).reshape(photos, -1),
            _columns(table, "lat", "lon").reshape(photos, -1, 2),
        )


@dataclass(frozen=True)
class Posterior(Rows):
    """Disjoint S2 cells of each photo: cells (B, M) uint64 ids, mass (B, M) adding up to 1, largest first.

    Photos with fewer cells are filled up with any at a mass of zero.
    """

    cells: NDArray[np.uint64]
    mass: NDArray[np.float32]

    def to_table(self, ids: Sequence[str]) -> pa.Table:
        """Columns id, cell (S2 id of any level), mass, the heaviest first."""
        import pyarrow as pa

        kept = self.mass > 0
        names = pa.array(np.repeat(ids, kept.sum(axis=1)), pa.string())
        return pa.table({"id": names, "cell": self.cells[kept], "mass": self.mass[kept]})

    @classmethod
    def from_table(cls, table: pa.Table) -> Posterior:
        """Read back what :meth:`to_table` made."""
        kept = _runs(table["id"])
        mass = np.zeros(kept.shape, np.float32)
        mass[kept] = table["mass"].to_numpy()
        cells = np.full(kept.shape, table["cell"][0].as_py(), np.uint64)
        cells[kept] = table["cell"].to_numpy()
        return cls(cells, mass)


@dataclass(frozen=True)
class Pool(Rows):
    """Places one of which will be the answer, generated and retrieved together, one entry a cell.

    lat_lon (B, C, 2) degrees, log_weight (B, C) float32 normalised over a photo's entries, source (B, C) int8 into
    ``SOURCES``, mask (B, C) true where there is an entry.
    """

    lat_lon: Floats
    log_weight: NDArray[np.float32]
    source: NDArray[np.int8]
    mask: NDArray[np.bool_]

    @property
    def weight(self) -> Floats:
        """(B, C), zero where there is no entry."""
        return np.exp(self.log_weight.astype(np.float64))

    def to_table(self, ids: Sequence[str]) -> pa.Table:
        """Columns id, lat, lon, log_weight, source, a line an entry."""
        import pyarrow as pa

        lat, lon = self.lat_lon[self.mask].T
        names = pa.array(np.repeat(ids, self.mask.sum(axis=1)), pa.string())
        columns = {"lat": lat, "lon": lon, "log_weight": self.log_weight[self.mask]}
        return pa.table({"id": names} | columns | {"source": _names(self.source[self.mask])})

    @classmethod
    def from_table(cls, table: pa.Table) -> Pool:
        """Read back what :meth:`to_table` made."""
        mask = _runs(table["id"])
        lat_lon, weight = np.zeros((*mask.shape, 2)), np.full(mask.shape, -np.inf, np.float32)
        lat_lon[mask], weight[mask] = _columns(table, "lat", "lon"), table["log_weight"].to_numpy()
        source = np.zeros(mask.shape, np.int8)
        source[mask] = _numbers(table["source"])
        return cls(lat_lon, weight, source, mask)


@dataclass(frozen=True)
class Verdict(Rows):
    """A verifier's score of every entry of the pools: scores (B, C) float32, mask (B, C) true where there is one."""

    scores: NDArray[np.float32]
    mask: NDArray[np.bool_]

    def over(self, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
        """The scores (B, C) laid out over a mask (B, C) of as many entries a photo, zero elsewhere."""
        scores = np.zeros(mask.shape, np.float32)
        scores[mask] = self.scores[self.mask]
        return scores

    def to_table(self, ids: Sequence[str]) -> pa.Table:
        """Columns id, status (ok), scores, a list over the photo's pool entries in their order."""
        import pyarrow as pa

        lists = pa.array([row[kept] for row, kept in zip(self.scores, self.mask, strict=True)], pa.list_(pa.float32()))
        return pa.table({"id": pa.array(ids, pa.string()), "status": ["ok"] * len(ids), "scores": lists})

    @classmethod
    def from_table(cls, table: pa.Table) -> Verdict:
        """Read back what :meth:`to_table` made."""
        scores, mask = pad_lists(table["scores"])
        return cls(scores.astype(np.float32), mask)


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

        table, doubles = super().to_table(ids), pa.list_(pa.float64())
        named = [np.isfinite(places[:, 0]) for places in self.lat_lon]
        columns = {"lat": self.lat_lon[..., 0], "lon": self.lat_lon[..., 1], "confidence": self.confidence}
        table = table.set_column(1, "status", pa.array(self.status, pa.string()))
        for name, values in columns.items():
            lists = [row[known] for row, known in zip(values, named, strict=True)]
            table = table.append_column(name, pa.array(lists, doubles))
        table = table.append_column("raw", pa.array(self.raw, pa.list_(pa.string())))
        for name in self.COSTS:
            table = table.append_column(name, pa.array(getattr(self, name), pa.int64()))
        return table

    @classmethod
    def from_table(cls, table: pa.Table) -> MllmVerdict:
        """Read back what :meth:`to_table` made."""
        scores, lat, lon, confidence = (pad_lists(table[name]) for name in ("scores", "lat", "lon", "confidence"))
        costs = (table[name].to_numpy() for name in cls.COSTS)
        places = np.stack([lat[0], lon[0]], axis=-1)
        status, raw = table["status"].to_pylist(), table["raw"].to_pylist()
        values = np.nan_to_num(scores[0]).astype(np.float32)
        return cls(values, scores[1], status, places, confidence[0], raw, *costs)


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
        import pyarrow as pa

        silent = np.array([error is not None for error in self.errors], bool)

        def column(values: NDArray[Any], unknown: NDArray[np.bool_] | None = None) -> pa.Array:
            return pa.array(values, pa.float64(), mask=np.isnan(values) if unknown is None else unknown)

        columns = {"id": pa.array(self.ids, pa.string())}
        columns |= {f"true_{axis}": column(self.true_lat_lon[:, i]) for i, axis in enumerate(("lat", "lon"))}
        columns |= {axis: column(self.lat_lon[:, i], silent) for i, axis in enumerate(("lat", "lon"))}
        columns["source"] = pa.array(_names(self.source), pa.string(), mask=silent)
        sure = {f"confidence_{r}": column(self.confidence[:, i], silent) for i, r in enumerate(RADII_KM)}
        columns |= sure | {"area_km2": column(self.area_km2), "verified": pa.array(self.verified & ~silent)}
        return pa.table(columns | {"error": pa.array(self.errors, pa.string())})

    @classmethod
    def from_table(cls, table: pa.Table) -> Answers:
        """Read back what :meth:`to_table` made."""
        decided = _columns(table, "lat", "lon"), _columns(table, *(f"confidence_{r}" for r in RADII_KM))
        area, verified = _columns(table, "area_km2")[:, 0], table["verified"].to_numpy(zero_copy_only=False)
        errors, names = table["error"].to_pylist(), table["id"].to_pylist()
        source, truth = _numbers(table["source"].fill_null(SOURCES[0])), _columns(table, "true_lat", "true_lon")
        return cls(*decided, source, area, verified, errors, names, truth)

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
        for i, error in enumerate(self.errors):
            area = None if np.isnan(self.area_km2[i]) else float(self.area_km2[i])
            if error is not None:
                answers.append(Prediction(self.ids[i], area_km2=area, error=error))
                continue
            lat, lon = self.lat_lon[i].tolist()
            sure, source = tuple(self.confidence[i].tolist()), SOURCES[self.source[i]]
            answers.append(Prediction(self.ids[i], lat, lon, sure, source, area, bool(self.verified[i])))
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
    neighbours: Neighbors = field(init=False)
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
        some = Tables(self.photos[at])
        for name, value in vars(self).items():
            if name != "photos":
                cut = {key: verdict[at] for key, verdict in value.items()} if name == "verdicts" else value[at]
                setattr(some, name, cut)
        return some


def _some(values: Any, at: At) -> Any:
    if isinstance(values, np.ndarray) or isinstance(at, slice):
        return values[at]
    return [values[i] for i in np.arange(len(values))[at]]


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return [value for part in parts for value in part]


def _ranked(
    ids: Sequence[str], lat_lon: Floats, last: dict[str, NDArray[Any]], first: dict[str, NDArray[Any]] | None = None
) -> pa.Table:
    """Places (B, N, 2) a line each: id, rank from 1, ``first``, lat, lon, ``last``; those are (B, N)."""
    import pyarrow as pa

    count, n = lat_lon.shape[:2]
    columns = {
        "id": pa.array(np.repeat(ids, n), pa.string()),
        "rank": np.tile(np.arange(1, n + 1, dtype=np.int32), count),
    }
    columns |= (first and {name: values.ravel() for name, values in first.items()}) or {}
    columns |= {"lat": lat_lon[..., 0].ravel(), "lon": lat_lon[..., 1].ravel()}
    return pa.table(columns | {name: values.ravel() for name, values in last.items()})


def _columns(table: pa.Table, *names: str) -> Floats:
    """Columns of numbers as one array (N, columns), NaN for null."""
    return np.column_stack([table[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in names])


def _runs(ids: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Ids in runs -> (N, longest run) true for as many places a row as the run is long."""
    codes = ids.combine_chunks().dictionary_encode().indices.to_numpy()
    counts = np.bincount(codes)
    if (np.diff(codes) < 0).any():
        raise GeoError("a table's photos are out of order: delete it and run its stage again")
    mask: NDArray[np.bool_] = np.arange(counts.max()) < counts[:, None]
    return mask


def _names(numbers: NDArray[np.int8]) -> NDArray[np.str_]:
    return np.array(SOURCES)[numbers.ravel()]


def _numbers(names: pa.ChunkedArray) -> NDArray[np.int8]:
    import pyarrow as pa
    import pyarrow.compute as pc

    numbers: NDArray[np.int8] = pc.index_in(names, pa.array(SOURCES)).to_numpy().astype(np.int8)
    return numbers
