"""S2 cells as tokens: latitude and longitude to nested cell ids, to short token rows, and back.

A cell id is 64 bits: `face << 61 | position << (61 - 2 * level) | 1 << (60 - 2 * level)`, where the position holds two
Hilbert-curve bits a level. Everything is bit for bit what `s2sphere` 0.2 computes, on whole arrays. The geometry is
that of the S2 library (https://s2geometry.io/devguide/s2cell_hierarchy): the sphere onto a cube, each face bent by
the quadratic projection, 2**30 by 2**30 leaves a face visited along a Hilbert curve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rag_geotoken.errors import GeoError
from rag_geotoken.geo.sphere import Floats, check_lat_lon

Ints = NDArray[np.int64]
Ids = NDArray[np.uint64]

MAX_LEVEL = 30
LEAVES = 1 << MAX_LEVEL  # leaf cells along one edge of a face
CHUNK = 8192  # points at a time: the working arrays stay in the second-level cache
RADIAN = math.pi / 180

# Sines and cosines of the multiples of STEP degrees; every angle is one of these and a rest of at most STEP / 2.
STEP = 90 / 512
SINES, COSINES = np.sin(np.arange(2048) * STEP * RADIAN), np.cos(np.arange(2048) * STEP * RADIAN)

# The quick sines and cosines are right to 8e-16, so i and j move by less than 4e-6 leaves. Whatever lies nearer than
# this to an edge between two cells is done again with libm's, which s2sphere uses.
NEAR = 2.0**-16

# Numerators of u and of v on each face as rows of (x, y, z, -x, -y); the denominator is what the face looks along.
NUMERATORS = np.array([[1, 3, 3, 2, 2, 4], [2, 2, 4, 1, 3, 3]])

# The four quadrants (2 * i + j) in the order the curve visits them, for each orientation (bit 0: i and j swapped,
# bit 1: both inverted), and what each visit does to the orientation.
VISITS = np.array([[0, 1, 3, 2], [0, 2, 3, 1], [3, 2, 0, 1], [3, 1, 0, 2]])
TURNS = np.array([1, 0, 0, 3])

libm_sin, libm_cos = (np.vectorize(function, otypes=[np.float64]) for function in (math.sin, math.cos))


@dataclass(frozen=True)
class S2Tokenizer:
    """A point as a face token (6 values) and the digits of its S2 cell, `group` levels a token (4**group values).

    With group 2, token t is 4 * digit + next digit, so level 20 takes 11 tokens. When `level` is no multiple of
    `group` the last token holds the levels that remain. A prefix of a row is the row of a cell that contains it.

    By hand: (0, 0) touches four cells of face 0; its level-2 row is [0, 8], digits 2 and 0 of the curve.
    """

    level: int = 20
    group: int = 2

    def __post_init__(self) -> None:
        """Refuse levels that S2 does not have."""
        _check_level(self.level)
        if self.group not in range(1, MAX_LEVEL + 1):
            raise GeoError(f"group {self.group} is outside 1..{MAX_LEVEL}: give the number of S2 levels in one token")

    @property
    def levels(self) -> tuple[int, ...]:
        """S2 level reached after each token: (0, group, 2 * group, ..., level)."""
        return (*range(0, self.level, self.group), self.level)

    @property
    def length(self) -> int:
        """T, the number of tokens in a row."""
        return len(self.levels)

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """How many values each of the T tokens can take: (6, 4**group, ...)."""
        return (6, *(4 ** (end - start) for start, end in zip(self.levels, self.levels[1:], strict=False)))

    def encode(self, lat: ArrayLike, lon: ArrayLike) -> Ints:
        """Degrees (N,), (N,) to tokens (N, T); GeoError for a coordinate that is not on the Earth."""
        return self._split(self.cell_ids(lat, lon))

    def decode(self, tokens: ArrayLike) -> tuple[Floats, Floats]:
        """Tokens (N, t), 1 <= t <= T, to the center of their cell: lat (N,), lon (N,) in degrees."""
        return _centers(self.tokens_to_ids(tokens))

    def cell_ids(self, lat: ArrayLike, lon: ArrayLike) -> Ids:
        """Degrees (N,), (N,) to the ids (N,) of the level-`level` cells; see `cell_ids`."""
        return cell_ids(lat, lon, self.level)

    def ids_to_tokens(self, ids: ArrayLike) -> Ints:
        """Cell ids (N,) at this level or finer to tokens (N, T); GeoError for coarser or invalid ids."""
        return self._split(parent_ids(ids, self.level))

    def tokens_to_ids(self, tokens: ArrayLike) -> Ids:
        """Tokens (N, t), 1 <= t <= T, to cell ids (N,) at level `levels[t - 1]`.

        Raises GeoError for another width, for anything but integers, and for the first value outside its range.
        """
        rows = np.asarray(tokens)
        width = rows.shape[-1] if rows.ndim else 0
        if not 1 <= width <= self.length or (rows.size and not np.issubdtype(rows.dtype, np.integer)):
            raise GeoError(f"tokens are {rows.dtype} {rows.shape}: give integers, 1 to {self.length} on the last axis")
        ids = np.full(rows.shape[:-1], 1 << (60 - 2 * self.levels[width - 1]), np.uint64)
        for column, (level, size) in enumerate(zip(self.levels[:width], self.vocab_sizes, strict=False)):
            values = rows[..., column]
            if values.size and (values.min() < 0 or values.max() >= size):
                bad = np.extract((values < 0) | (values >= size), values)[0]
                raise GeoError(f"token {bad} in column {column} is outside 0..{size - 1}: made by another tokenizer?")
            ids |= values.astype(np.uint64) << np.uint64(61 - 2 * level)
        return ids

    def _split(self, ids: Ids) -> Ints:
        flat = ids.ravel()
        shifts = np.array([61 - 2 * level for level in self.levels], np.uint64)[:, None]
        masks = np.array([7, *(size - 1 for size in self.vocab_sizes[1:])], np.uint64)[:, None]
        tokens = np.empty((flat.size, self.length), np.int64)
        for start in range(0, flat.size, CHUNK):
            part = slice(start, start + CHUNK)
            tokens[part] = ((flat[part] >> shifts) & masks).T
        return tokens.reshape(*ids.shape, self.length)


def cell_ids(lat: ArrayLike, lon: ArrayLike, level: int = MAX_LEVEL) -> Ids:
    """Degrees to the ids (uint64) of the S2 cells that hold the points, equal to s2sphere's bit for bit.

    The shapes of lat and lon (-180..180) broadcast. Level 0 is a face of the cube, 20 about 10 m, 30 about 1 cm.
    Raises GeoError for a coordinate not finite or out of range, shapes that do not broadcast, or a level S2 lacks.
    """
    _check_level(level)
    lats, lons = np.broadcast_arrays(*check_lat_lon(lat, lon))
    flat_lat, flat_lon = lats.ravel(), lons.ravel()
    ids = np.empty(lats.size, np.uint64)
    near = np.empty(lats.size, np.bool_)
    for start in range(0, ids.size, CHUNK):
        part = slice(start, start + CHUNK)
        leaves, near[part] = _leaf_ids(*_sin_cos(np.stack([flat_lat[part], flat_lon[part]])))
        ids[part] = _parents(leaves, level)
    edge = np.flatnonzero(near)
    for start in range(0, edge.size, CHUNK):
        at = edge[start : start + CHUNK]
        radians = np.stack([flat_lat[at], flat_lon[at]]) * RADIAN
        leaves, _ = _leaf_ids(libm_sin(radians), libm_cos(radians))
        ids[at] = _parents(leaves, level)
    return ids.reshape(lats.shape)


def cell_centers(ids: ArrayLike) -> tuple[Floats, Floats]:
    """Cells of any level to their centers: uint64 ids (...) to lat (...), lon (...); GeoError for an invalid id."""
    return _centers(_check_ids(ids))


def cell_level(ids: ArrayLike) -> Ints:
    """S2 level (0 to 30) of each cell id; GeoError for an invalid id."""
    return MAX_LEVEL - _log2_size(_check_ids(ids))


def parent_ids(ids: ArrayLike, level: ArrayLike) -> Ids:
    """Ids (...) of the cells at `level` (one for all, one each: they broadcast) that contain the given cells.

    Raises GeoError where a cell is coarser than that, and for a level or an id that S2 lacks.
    """
    _check_level(level)
    checked, levels = np.broadcast_arrays(_check_ids(ids), level)
    low = _log2_size(checked) > MAX_LEVEL - levels
    if low.any():
        coarse, wanted = checked[low][0], levels[low][0]
        raise GeoError(f"cell id {coarse} is of level {cell_level(coarse)}: it has no parent of level {wanted}")
    return _parents(checked, level)


def _check_level(level: ArrayLike) -> None:
    levels = np.asarray(level)
    bad = levels[(levels < 0) | (levels > MAX_LEVEL) | (levels != np.rint(levels))]
    if bad.size:
        raise GeoError(f"S2 level {bad[0]} is outside 0..{MAX_LEVEL}: give a whole number in that range")


def _check_ids(ids: ArrayLike) -> Ids:
    given = np.asarray(ids)
    if given.size and (not np.issubdtype(given.dtype, np.integer) or (given.dtype != np.uint64 and given.min() < 0)):
        raise GeoError(f"cell ids are {given.dtype}: give an array of dtype uint64")
    checked = given.astype(np.uint64, copy=False)
    # The lowest set bit must stand at an even place, and there are six faces.
    flat = checked.ravel()
    bad = np.flatnonzero((_low_bit(flat) & np.uint64(0x1555555555555555) == 0) | (flat >> np.uint64(61) > 5))
    if bad.size:
        raise GeoError(f"{flat[bad[0]]} at position {bad[0]} is not an S2 cell id: leave it out")
    return checked


def _low_bit(ids: Ids) -> Ids:
    return ids & (~ids + np.uint64(1))


def _log2_size(ids: Ids) -> Ints:
    # An edge of 2**k leaves leaves 2 * k zeros below the lowest set bit.
    zeros: Ints = np.bitwise_count(_low_bit(ids) - np.uint64(1)).astype(np.int64)
    return zeros // 2


def _parents(ids: Ids, level: ArrayLike) -> Ids:
    low = np.uint64(1) << (2 * (MAX_LEVEL - np.asarray(level))).astype(np.uint64)
    parents: Ids = (ids & (~low + np.uint64(1))) | low
    return parents


def _sin_cos(degrees: Floats) -> tuple[Floats, Floats]:
    """Sine and cosine of angles in -180..180, to 8e-16: a table and the series of the rest, faster than numpy."""
    step = np.rint(degrees * (1 / STEP))
    rest = (degrees - step * STEP) * RADIAN
    at = step.astype(np.int64) & 2047  # once round the circle
    sin, cos = SINES.take(at), COSINES.take(at)
    square = rest * rest
    sin_rest = rest - rest * square * (1 / 6)
    cos_rest = square * (square * (1 / 24) - 0.5)  # less 1
    return sin + (sin * cos_rest + cos * sin_rest), cos + (cos * cos_rest - sin * sin_rest)


def _leaf_ids(sin: Floats, cos: Floats) -> tuple[Ids, NDArray[np.bool_]]:
    """Sines and cosines of latitude and longitude (2, n) to leaf ids (n,), and which are too near an edge to tell."""
    n = sin.shape[1]
    x, y, z = cos[1] * cos[0], sin[1] * cos[0], sin[0]
    flat, column = np.concatenate([x, y, z, -x, -y]), np.arange(n)
    ax, ay, az = np.abs(flat[: 3 * n]).reshape(3, n)
    # The face looks along the largest coordinate; a tie goes to the later one.
    axis = 2 - ((np.maximum(ax, ay) > az).astype(np.int64) << (ax > ay))
    along = flat.take(axis * n + column)
    face = axis + 3 * (along < 0)
    uv = flat.take((NUMERATORS * n).take(face, axis=1) + column) / along
    # s is 0.5 * sqrt(1 + 3 * u), and 1 less that of -u where u < 0; powers of two scale it to leaves without rounding.
    ij = np.abs((uv < 0) * LEAVES - np.sqrt(2.0**58 + (3 * 2.0**58) * np.abs(uv)))
    whole = ij.astype(np.int64)
    # A near tie between two faces puts i or j beside 0 or LEAVES, so it is seen here as well.
    near = np.abs(ij - whole - 0.5) > 0.5 - NEAR
    return _hilbert(face, *np.minimum(whole, LEAVES - 1)), near[0] | near[1]


def _hilbert(face: Ints, i: Ints, j: Ints) -> Ids:
    """Face and leaf coordinates (n,) to leaf ids (n,), eight levels a look-up (30 levels and two leading zeros)."""
    position = face << 60
    turned = (face & 1) << 16
    for shift in (24, 16, 8, 0):
        found = TO_POSITION.take(turned | ((i >> shift) & 255) << 8 | ((j >> shift) & 255))
        position |= (found & 0xFFFF) << (2 * shift)
        turned = found & 0x30000
    ids: Ids = position.view(np.uint64) << np.uint64(1) | np.uint64(1)
    return ids


def _centers(ids: Ids) -> tuple[Floats, Floats]:
    """Valid ids (...) to lat (...), lon (...) in degrees."""
    k = _log2_size(ids)
    face = (ids >> np.uint64(61)).astype(np.int64)
    first = ids - _low_bit(ids)  # leaf in the cell, without the lowest bit
    position = (first.astype(np.int64) >> 1) & ((1 << 60) - 1)
    turned = (face & 1) << 16
    i = j = np.zeros_like(face)
    for shift in (24, 16, 8, 0):
        found = TO_IJ.take(turned | (position >> (2 * shift)) & 0xFFFF)
        i = i << 8 | (found >> 8) & 255
        j = j << 8 | found & 255
        turned = found & 0x30000
    # The first leaf is in one corner: round down to the low corner, go half an edge up, in half leaves.
    s = (((np.stack([i, j]) >> k << 1) | 1) << k) / (2 * LEAVES)
    far = 0.5 + np.abs(s - 0.5)  # the projection is odd about the middle of the face
    u, v = np.copysign((4 * far * far - 1) / 3, s - 0.5)
    one = np.ones_like(u)
    x = np.choose(face, [one, -u, -u, -one, v, v])
    y = np.choose(face, [u, one, -v, -v, -one, u])
    z = np.choose(face, [v, v, one, -u, -u, -one])
    return np.degrees(np.arctan2(z, np.sqrt(x * x + y * y))), np.degrees(np.arctan2(y, x))


def _curve_tables() -> tuple[Ints, Ints]:
    """Eight levels of the curve at once, for each of four orientations: (262144,) each way.

    `orientation << 16 | i << 8 | j` looks up `next orientation << 16 | position` in the first, and
    `orientation << 16 | position` looks up `next orientation << 16 | i << 8 | j` in the second.
    """
    start, position = np.divmod(np.arange(4 << 16), 1 << 16)
    orientation, i, j = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for shift in range(14, -1, -2):
        visit = (position >> shift) & 3
        quadrant = VISITS[orientation, visit]
        i = i << 1 | quadrant >> 1
        j = j << 1 | quadrant & 1
        orientation ^= TURNS[visit]
    to_ij = orientation << 16 | i << 8 | j
    to_position = np.empty_like(to_ij)
    to_position[start << 16 | i << 8 | j] = orientation << 16 | position
    return to_position, to_ij


TO_POSITION, TO_IJ = _curve_tables()


def descendants(cells: NDArray[np.uint64], level: int, deeper: int) -> NDArray[np.uint64]:
    """Cells (N,) of one level -> (N, 4**(deeper - level)), their parts at a deeper one."""
    first = parent_ids(cells - (cells & (~cells + np.uint64(1))) + np.uint64(1), deeper)
    steps = np.arange(4 ** (deeper - level), dtype=np.uint64) << np.uint64(61 - 2 * deeper)
    return first[:, None] + steps
