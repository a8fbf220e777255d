"""These functions convert points to S2 cell ids and short token rows, and back.

A cell id is 64 bits: `face << 61 | position << (61 - 2 * level) | 1 << (60 - 2 * level)`, where the position holds two
Hilbert-curve bits per level. Results equal those of `s2sphere` 0.2 bit for bit, on whole arrays. The geometry is that
of the S2 library (https://s2geometry.io/devguide/s2cell_hierarchy): the sphere is projected onto a cube, each face
with the quadratic projection; its 2**30 by 2**30 leaf cells are numbered along a Hilbert curve.
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

# Sines and cosines of the multiples of STEP degrees; every angle is one of these and a remainder of at most STEP / 2.
STEP = 90 / 512
SINES, COSINES = np.sin(np.arange(2048) * STEP * RADIAN), np.cos(np.arange(2048) * STEP * RADIAN)

# The fast sines and cosines are exact to 8e-16, so i and j move by less than 4e-6 leaves. Points nearer than this to
# an edge between two cells are computed again with libm's, which s2sphere uses.
NEAR = 2.0**-16

# Numerators of u and of v on each face as rows of (x, y, z, -x, -y); the denominator is the axis of the face.
NUMERATORS = np.array([[1, 3, 3, 2, 2, 4], [2, 2, 4, 1, 3, 3]])

# The four quadrants (2 * i + j) in the order the curve visits them, for each orientation (bit 0: i and j swapped,
# bit 1: both inverted), and how each visit changes the orientation.
VISITS = np.array([[0, 1, 3, 2], [0, 2, 3, 1], [3, 2, 0, 1], [3, 1, 0, 2]])
TURNS = np.array([1, 0, 0, 3])

libm_sin, libm_cos = (np.vectorize(function, otypes=[np.float64]) for function in (math.sin, math.cos))


@dataclass(frozen=True)
class S2Tokenizer:
    """This class encodes a point as a face token (6 values) and tokens of `group` S2 levels (4**group values) each.

    With group 2, token t is 4 * digit + next digit, so level 20 takes 11 tokens. When `level` is no multiple of
    `group` the last token holds the remaining levels. A prefix of a row is the row of a cell that contains it.
    Example: (0, 0) touches four cells of face 0; its level-2 row is [0, 8], digits 2 and 0 of the curve.
    """

    level: int = 20
    group: int = 2

    def __post_init__(self) -> None:
        """Raise GeoError for a level that S2 does not have or a group outside 1..30."""
        _check_level(self.level)
        if self.group not in range(1, MAX_LEVEL + 1):
            raise GeoError(f"group {self.group} is outside 1..{MAX_LEVEL}: give the number of S2 levels in one token")

    @property
    def levels(self) -> tuple[int, ...]:
        """Return the S2 level reached after each token: (0, group, 2 * group, ..., level)."""
        return (*range(0, self.level, self.group), self.level)

    @property
    def length(self) -> int:
        """Return T, the number of tokens in a row."""
        return len(self.levels)

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """Return how many values each of the T tokens can take: (6, 4**group, ...)."""
        return (6, *(4 ** (end - start) for start, end in zip(self.levels, self.levels[1:], strict=False)))

    def encode(self, lat: ArrayLike, lon: ArrayLike) -> Ints:
        """Return the tokens (N, T) of points in degrees (N,), (N,); raise GeoError for a coordinate out of range."""
        return self._split(self.cell_ids(lat, lon))

    def decode(self, tokens: ArrayLike) -> tuple[Floats, Floats]:
        """Return the cell centers lat (N,), lon (N,) in degrees of tokens (N, t), 1 <= t <= T."""
        return cell_centers(self.tokens_to_ids(tokens))

    def cell_ids(self, lat: ArrayLike, lon: ArrayLike) -> Ids:
        """Return the ids (N,) of the cells of this level that hold points (N,), (N,); see `cell_ids`."""
        return cell_ids(lat, lon, self.level)

    def ids_to_tokens(self, ids: ArrayLike) -> Ints:
        """Return the tokens (N, T) of cells (N,) at this level or finer; raise GeoError for other ids."""
        return self._split(parent_ids(ids, self.level))

    def tokens_to_ids(self, tokens: ArrayLike) -> Ids:
        """Return the ids (N,) of the cells at level `levels[t - 1]` of tokens (N, t), 1 <= t <= T.

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
        for start in range(0, flat.size, CHUNK):  # what stays in the cache takes half the time
            part = slice(start, start + CHUNK)
            tokens[part] = ((flat[part] >> shifts) & masks).T
        return tokens.reshape(*ids.shape, self.length)


def cell_ids(lat: ArrayLike, lon: ArrayLike, level: int = MAX_LEVEL) -> Ids:
    """Return the ids (uint64) of the S2 cells that hold points in degrees, equal to those of s2sphere bit for bit.

    The shapes of lat and lon (-180..180) broadcast. Level 0 is a face of the cube, 20 about 10 m, 30 about 1 cm.
    Raises GeoError for a coordinate not finite or out of range, shapes that do not broadcast, or a level S2 lacks.
    """
    _check_level(level)
    points = np.stack(np.broadcast_arrays(*check_lat_lon(lat, lon)))
    degrees = points.reshape(2, -1)
    ids = np.empty(degrees.shape[1], np.uint64)
    for start in range(0, ids.size, CHUNK):
        part = degrees[:, start : start + CHUNK]
        leaves, near_edge = _leaf_ids(*_sin_cos(part))
        if near_edge.any():
            radians = part[:, near_edge] * RADIAN
            leaves[near_edge], _ = _leaf_ids(libm_sin(radians), libm_cos(radians))
        ids[start : start + CHUNK] = _parents(leaves, level)
    return ids.reshape(points.shape[1:])


def cell_centers(ids: ArrayLike) -> tuple[Floats, Floats]:
    """Return the centers lat (...), lon (...) of cells (...) of any level; raise GeoError for an invalid id."""
    checked = _check_ids(ids)
    k = _log2_size(checked)
    face = (checked >> np.uint64(61)).astype(np.int64)
    first = checked - _low_bit(checked)  # leaf in the cell, without the lowest bit
    position = (first.astype(np.int64) >> 1) & ((1 << 60) - 1)
    orientation = (face & 1) << 16
    i = j = np.zeros_like(face)
    for shift in (24, 16, 8, 0):
        entry = TO_IJ.take(orientation | (position >> (2 * shift)) & 0xFFFF)
        i = i << 8 | (entry >> 8) & 255
        j = j << 8 | entry & 255
        orientation = entry & 0x30000
    # The first leaf is in one corner: round down to the low corner, go half an edge up, in half leaves.
    s = (((np.stack([i, j]) >> k << 1) | 1) << k) / (2 * LEAVES)
    upper = 0.5 + np.abs(s - 0.5)  # the projection is odd about the middle of the face
    u, v = np.copysign((4 * upper * upper - 1) / 3, s - 0.5)
    one = np.ones_like(u)
    x = np.choose(face, [one, -u, -u, -one, v, v])
    y = np.choose(face, [u, one, -v, -v, -one, u])
    z = np.choose(face, [v, v, one, -u, -u, -one])
    return np.degrees(np.arctan2(z, np.sqrt(x * x + y * y))), np.degrees(np.arctan2(y, x))


def cell_level(ids: ArrayLike) -> Ints:
    """Return the S2 level (0 to 30) of each cell id; raise GeoError for an invalid id."""
    return MAX_LEVEL - _log2_size(_check_ids(ids))


def parent_ids(ids: ArrayLike, level: ArrayLike) -> Ids:
    """Return the ids (...) of the cells at `level` that contain the given cells; ids and levels broadcast.

    Raises GeoError where a cell is coarser than that, and for a level or an id that S2 lacks.
    """
    _check_level(level)
    checked, levels = np.broadcast_arrays(_check_ids(ids), level)
    too_coarse = _log2_size(checked) > MAX_LEVEL - levels
    if too_coarse.any():
        cell, parent_level = checked[too_coarse][0], levels[too_coarse][0]
        raise GeoError(f"cell id {cell} is of level {cell_level(cell)}: it has no parent of level {parent_level}")
    return _parents(checked, level)


def descendants(cells: Ids, level: int, deeper: int) -> Ids:
    """Return the parts (N, 4**(deeper - level)) at a deeper level of cells (N,) that are all of one level."""
    first = parent_ids(cells - _low_bit(cells) + np.uint64(1), deeper)
    steps = np.arange(4 ** (deeper - level), dtype=np.uint64) << np.uint64(61 - 2 * deeper)
    return first[:, None] + steps


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
    # The lowest set bit of an id is at an even place, and there are six faces.
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
    """Return sine and cosine of angles in -180..180 to 8e-16: a table and a Taylor series, faster than numpy."""
    step = np.rint(degrees * (1 / STEP))
    remainder = (degrees - step * STEP) * RADIAN
    row = step.astype(np.int64) & 2047  # the table covers the circle once
    sin, cos = SINES.take(row), COSINES.take(row)
    square = remainder * remainder
    small_sin = remainder - remainder * square * (1 / 6)
    small_cos = square * (square * (1 / 24) - 0.5)  # the cosine minus 1
    return sin + (sin * small_cos + cos * small_sin), cos + (cos * small_cos - sin * small_sin)


def _leaf_ids(sin: Floats, cos: Floats) -> tuple[Ids, NDArray[np.bool_]]:
    """Return leaf ids (n,) of sines and cosines of lat and lon (2, n), and a mask of those too near an edge to tell."""
    n = sin.shape[1]
    x, y, z = cos[1] * cos[0], sin[1] * cos[0], sin[0]
    flat, column = np.concatenate([x, y, z, -x, -y]), np.arange(n)
    ax, ay, az = np.abs(flat[: 3 * n]).reshape(3, n)
    # The axis of the face is the largest coordinate; a tie goes to the later one.
    axis = 2 - ((np.maximum(ax, ay) > az).astype(np.int64) << (ax > ay))
    along = flat.take(axis * n + column)
    face = axis + 3 * (along < 0)
    uv = flat.take((NUMERATORS * n).take(face, axis=1) + column) / along
    # s is 0.5 * sqrt(1 + 3 * u), 1 minus that of -u where u < 0; powers of two scale it to leaves without rounding.
    ij = np.abs((uv < 0) * LEAVES - np.sqrt(2.0**58 + (3 * 2.0**58) * np.abs(uv)))
    whole = ij.astype(np.int64)
    # A near tie between two faces puts i or j beside 0 or LEAVES, so this detects it too.
    near = np.abs(ij - whole - 0.5) > 0.5 - NEAR
    return _hilbert(face, *np.minimum(whole, LEAVES - 1)), near[0] | near[1]


def _hilbert(face: Ints, i: Ints, j: Ints) -> Ids:
    """Return leaf ids (n,) of leaf coordinates (n,), eight levels per look-up (30 levels and two leading zeros)."""
    position = face << 60
    orientation = (face & 1) << 16
    for shift in (24, 16, 8, 0):
        entry = TO_POSITION.take(orientation | ((i >> shift) & 255) << 8 | ((j >> shift) & 255))
        position |= (entry & 0xFFFF) << (2 * shift)
        orientation = entry & 0x30000
    ids: Ids = position.view(np.uint64) << np.uint64(1) | np.uint64(1)
    return ids


def _curve_tables() -> tuple[Ints, Ints]:
    """Return tables (262144,) of eight levels of the curve for each of four orientations, one in each direction.

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
