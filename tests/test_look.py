"""What a place looks like, against RANGE's formula written out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from rag_geotoken.geo import to_unit
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.training.tuning import _looks
from rag_geotoken.types import Pool
from rag_geotoken.verifiers.range_plus import Look

DIM = 6


def drawn(count: int, seed: int) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).normal(size=(count, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def places(count: int, seed: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.uniform(-80, 80, count), rng.uniform(-180, 180, count)])


BANK = Look(places(40, 0), drawn(40, 1), drawn(40, 2))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_it_is_the_formula(beta: float) -> None:
    lat_lon, embedded = places(7, 3), drawn(7, 4)
    expected = []
    for place, vector in zip(lat_lon, embedded, strict=True):
        near = np.exp(40.0 * (to_unit(*BANK.lat_lon.T) @ to_unit(*place)))
        alike = np.exp(12.0 * (BANK.place @ vector))
        weight = beta * alike / alike.sum() + (1 - beta) * near / near.sum()
        expected.append(weight @ BANK.image)
    looks = BANK.of(lat_lon, embedded, beta, batch=3)
    np.testing.assert_allclose(looks, expected, atol=1e-5)
    np.testing.assert_allclose(looks, BANK.of(lat_lon, embedded, beta), atol=1e-6)


def test_a_sharp_look_is_that_of_the_nearest_photo() -> None:
    """Also 1 km apart, where single precision sees no angle."""
    bank = Look(np.array([[10.0, 20.0], [10.0, 20.009]]), drawn(2, 5), drawn(2, 6))
    looks = bank.of(np.array([[10.0, 20.008]]), drawn(1, 7), beta=0.0, spatial=1e10)
    np.testing.assert_allclose(looks[0], bank.image[1], atol=1e-5)


def test_the_index_knows_how_its_places_look(geolocator: Geolocator) -> None:
    index, spots = geolocator.index, geolocator.index.lat_lon[[3, 50]]
    embed = geolocator.alignment.embed_places
    image = index.vectors(np.arange(len(index.rows)))[:, 0]
    expected = Look(index.lat_lon, embed(index.lat_lon), image).of(spots, embed(spots), 0.7)
    np.testing.assert_allclose(index.look_of(spots, embed, 0.7), expected, atol=1e-6)


def test_look_verifies_every_entry(geolocator: Geolocator, pool: Pool) -> None:
    photo = geolocator.index.vectors(np.arange(len(pool.mask)))
    neighbors = geolocator.search(photo, 6)
    scores = geolocator.verify("look", photo, neighbors, pool)
    assert (scores[~pool.mask] == 0).all() and (~pool.mask).any()
    spots, embed = pool.lat_lon[1][pool.mask[1]], geolocator.alignment.embed_places
    looks = geolocator.index.look_of(spots, embed, 0.5, 12.0, 10000.0)
    cosine = looks @ photo[1, 0] / np.linalg.norm(looks, axis=1)
    np.testing.assert_allclose(scores[1][pool.mask[1]], cosine, atol=1e-5)
    assert geolocator.verifier_id("look") != geolocator.verifier_id("alignment")


def test_the_tuning_says_how_a_look_is_estimated(geolocator: Geolocator, pool: Pool) -> None:
    photo = geolocator.index.vectors(np.arange(len(pool.mask)))
    neighbors = geolocator.search(photo, 6)
    scores = _looks(geolocator, photo, pool)
    same = (0.5, 12.0, 10000.0)  # as a tuning has it that says nothing
    assert same in scores and len(scores) > 20
    for mix in (same, (0.25, 48.0, 4000.0), (1.0, 24.0, 40.0), (0.0, 12.0, 10000.0)):
        chosen = dict(zip(("look_beta", "look_semantic", "look_spatial"), mix, strict=True))
        parts = geolocator.alignment, geolocator.tokens, geolocator.index
        tuned = Geolocator(*parts, replace(geolocator.tuning, **chosen))  # type: ignore[arg-type]
        np.testing.assert_allclose(scores[mix], tuned.verify("look", photo, neighbors, pool), atol=1e-5)
        assert (tuned.verifier_id("look") == geolocator.verifier_id("look")) == (mix == same)
