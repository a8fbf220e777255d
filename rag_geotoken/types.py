"""What passes between stages in memory: dataclasses of arrays. B photos, K neighbours, N candidates, C pool places."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SOURCES = ("neighbour", "greedy", "beam", "sample", "frontier", "gps", "visual", "mllm")
NEIGHBOUR, GREEDY, BEAM, SAMPLE, FRONTIER, GPS, VISUAL, MLLM = range(8)


@dataclass(frozen=True)
class Neighbors:
    """Gallery photos near each query, best first.

    rows (B, K) int64 into the index, lat_lon (B, K, 2) degrees, scores (B, K) float32 weighted inner products.
    """

    rows: NDArray[np.int64]
    lat_lon: NDArray[np.float64]
    scores: NDArray[np.float32]

    def __getitem__(self, at: slice) -> Neighbors:
        """The neighbours of some of the photos."""
        return Neighbors(self.rows[at], self.lat_lon[at], self.scores[at])


@dataclass(frozen=True)
class Places:
    """Places most like each photo's GPS embedding, best first: lat_lon (B, N, 2) degrees, scores (B, N) cosines."""

    lat_lon: NDArray[np.float64]
    scores: NDArray[np.float32]

    def __getitem__(self, at: slice) -> Places:
        """The places of some of the photos."""
        return Places(self.lat_lon[at], self.scores[at])


@dataclass(frozen=True)
class Matches:
    """Where each neighbour's picture, compared with the photo, puts it.

    lat_lon (B, K, 2) degrees, scores (B, K) float32 from 0 to 1, how well the two fit.
    """

    lat_lon: NDArray[np.float64]
    scores: NDArray[np.float32]

    def __getitem__(self, at: slice) -> Matches:
        """The matches of some of the photos."""
        return Matches(self.lat_lon[at], self.scores[at])


@dataclass(frozen=True)
class Candidates:
    """Generated cells of each photo, best first.

    tokens (B, N, T) int64, log_prob (B, N) float32 untempered, source (B, N) int8 into ``SOURCES``.
    """

    tokens: NDArray[np.int64]
    log_prob: NDArray[np.float32]
    source: NDArray[np.int8]

    def __getitem__(self, at: slice) -> Candidates:
        """The candidates of some of the photos."""
        return Candidates(self.tokens[at], self.log_prob[at], self.source[at])


@dataclass(frozen=True)
class Pool:
    """Places one of which will be the answer, generated and retrieved together, one entry a cell.

    lat_lon (B, C, 2) degrees, log_weight (B, C) float32 normalised over a photo's entries, source (B, C) int8 into
    ``SOURCES``, mask (B, C) true where there is an entry.
    """

    lat_lon: NDArray[np.float64]
    log_weight: NDArray[np.float32]
    source: NDArray[np.int8]
    mask: NDArray[np.bool_]

    def __getitem__(self, at: slice) -> Pool:
        """The pools of some of the photos."""
        return Pool(self.lat_lon[at], self.log_weight[at], self.source[at], self.mask[at])


@dataclass(frozen=True)
class Predictions:
    """The decision on each photo.

    lat_lon (B, 2) degrees, confidence (B, R) the believed chance to lie within each of the R radii,
    source (B,) int8 into ``SOURCES``.
    """

    lat_lon: NDArray[np.float64]
    confidence: NDArray[np.float64]
    source: NDArray[np.int8]

    def rows(self, ids: list[str]) -> list[Prediction]:
        """One :class:`Prediction` a photo, with the given ids."""
        columns = zip(ids, self.lat_lon.tolist(), self.confidence.tolist(), self.source.tolist(), strict=True)
        return [Prediction(i, lat, lon, tuple(sure), SOURCES[source]) for i, (lat, lon), sure, source in columns]


@dataclass(frozen=True)
class Prediction:
    """The answer for one photo: degrees, and the believed chance to lie within 1, 25, 200, 750 and 2500 km of it.

    A photo without an answer has ``error`` and no coordinates.
    """

    id: str
    lat: float | None = None
    lon: float | None = None
    confidence: tuple[float, ...] | None = None
    source: str | None = None
    error: str | None = None
