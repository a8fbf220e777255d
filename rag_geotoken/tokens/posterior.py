"""These functions describe the posterior of a photo: S2 cells of any level that share out a mass of one.

Cells of a level differ in area by up to a factor of 2.1; the mean of the level is used throughout.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from rag_geotoken.geo.cells import cell_centers, cell_level, descendants
from rag_geotoken.geo.sphere import EARTH_RADIUS_KM, Floats
from rag_geotoken.types import Posterior

EARTH_KM2 = 4 * np.pi * EARTH_RADIUS_KM**2


def area_km2(cells: ArrayLike) -> Floats:
    """Return for each cell the mean area of the cells of its level."""
    return np.asarray(EARTH_KM2 / (6.0 * 4.0 ** cell_level(cells)), np.float64)


def effective_area_km2(posterior: Posterior) -> Floats:
    """Return exp(spatial entropy) (B,): the area over which an even spread would be as uncertain.

    Spatial entropy is -sum m ln(m / area). By hand: all mass in one cell gives that cell's area, half in each of two
    equal cells gives twice that.
    """
    mass = posterior.mass.astype(np.float64)
    terms = mass * np.log(np.maximum(mass, 1e-30) / area_km2(posterior.cells))
    return np.asarray(np.exp(-terms.sum(axis=1)))


def heat_map(posterior: Posterior, row: int, height: int = 180, detail: int = 7) -> Floats:
    """Return one photo's mass on a map (height, 2 * height), north up, from 180 W: the mass in each pixel, in all 1.

    Cells coarser than S2 level ``detail`` are spread over their descendants of that level.
    """
    heat = np.zeros((height, 2 * height))
    cells, mass = posterior.cells[row], posterior.mass[row].astype(np.float64)
    levels = cell_level(cells)
    for level in np.unique(levels):
        at_level = levels == level
        spread = descendants(cells[at_level], int(level), max(int(level), detail))
        lat, lon = cell_centers(spread)
        rows = np.clip(((90.0 - lat) / 180.0 * height).astype(int), 0, height - 1)
        columns = np.clip(((lon + 180.0) / 180.0 * height).astype(int), 0, 2 * height - 1)
        np.add.at(heat, (rows, columns), mass[at_level][:, None] / spread.shape[1])
    return heat
