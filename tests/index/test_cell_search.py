"""Places by GPS embedding: the coarse-to-fine search agrees with a comparison of all cells."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.geo.cells import cell_centers, cell_ids, cell_level, descendants, parent_ids
from rag_geotoken.index.cell_search import COARSE, FINE, REGION, GpsSearch
from rag_geotoken.index.geo_index import GeoIndex

GALLERY = np.array([[48.2, 16.4], [48.3, 16.5], [-33.0, 18.0]])


def index_of(places: NDArray[np.float64]) -> GeoIndex:
    """An index that holds only the places of its photos."""
    return GeoIndex(None, pa.table({"lat": places[:, 0], "lon": places[:, 1]}), {})


def photos(count: int) -> NDArray[np.float32]:
    vectors = np.random.default_rng(0).normal(size=(count, 32)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_search_covers_the_regions_that_have_a_photo(alignment: GeoAlignment) -> None:
    search = GpsSearch(alignment, index_of(GALLERY))
    regions = np.unique(cell_ids(GALLERY[:, 0], GALLERY[:, 1], REGION))
    assert len(regions) == 2 and set(cell_level(search.cells)) == {COARSE}
    assert len(np.unique(search.cells)) == 2 * 4 ** (COARSE - REGION)
    assert set(parent_ids(search.cells, REGION)) == set(regions)


def test_the_best_places_are_those_of_all_cells(alignment: GeoAlignment) -> None:
    search, gps = GpsSearch(alignment, index_of(GALLERY)), photos(5)
    places = search(gps, 12)
    assert places.lat_lon.shape == (5, 12, 2) and (np.diff(places.scores, axis=1) <= 0).all()
    centers = np.stack(cell_centers(descendants(search.cells, COARSE, FINE).ravel()), axis=-1)
    scores = gps @ alignment.embed_places(centers).T
    best = np.sort(scores, axis=1)[:, ::-1][:, :12]
    # The fine cells of the best coarse ones hold nearly all of the best.
    np.testing.assert_allclose(places.scores[:, 0], best[:, 0], atol=2e-3)
    np.testing.assert_allclose(places.scores, best, atol=2e-2)
    for b in range(5):
        score_of = dict(zip(map(tuple, centers.tolist()), scores[b], strict=True))
        returned = list(map(tuple, places.lat_lon[b].tolist()))
        np.testing.assert_allclose(places.scores[b], [score_of[place] for place in returned], atol=1e-5)
        assert len(set(returned)) == 12


def test_more_places_than_there_are(alignment: GeoAlignment) -> None:
    search = GpsSearch(alignment, index_of(GALLERY[:1]))
    assert search(photos(2), 10_000).scores.shape == (2, 4 ** (FINE - REGION))


def test_cells_that_an_index_keeps_are_those_it_would_make(alignment: GeoAlignment, gallery: GeoIndex) -> None:
    kept, made = (GpsSearch(alignment, index) for index in (gallery, replace(gallery, cell_vectors=None)))
    assert gallery.cell_vectors is not None and kept.vectors.equal(made.vectors)
    np.testing.assert_array_equal(kept(photos(3), 20).lat_lon, made(photos(3), 20).lat_lon)
    # The search uses the embeddings that the index keeps.
    empty = GpsSearch(alignment, replace(gallery, cell_vectors=np.zeros_like(gallery.cell_vectors)))
    assert not empty.vectors.any()
