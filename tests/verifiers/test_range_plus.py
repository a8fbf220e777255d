"""What a place looks like, against RANGE's formula written out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rag_geotoken.geo.sphere import to_unit
from rag_geotoken.options import Options
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.run.road import road
from rag_geotoken.storage.files import shipped
from rag_geotoken.storage.recipes import read_recipe
from rag_geotoken.training.tuning import _looks
from rag_geotoken.types import Embeddings, Photos, Pool, Tables
from rag_geotoken.verifiers import load_verifier
from rag_geotoken.verifiers.range_plus import RangeBank, bank

DIM = 6


def drawn(count: int, seed: int) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).normal(size=(count, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def places(count: int, seed: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.uniform(-80, 80, count), rng.uniform(-180, 180, count)])


BANK = RangeBank(places(40, 0), drawn(40, 1), drawn(40, 2))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_it_is_the_formula(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    lat_lon, embedded = places(7, 3), drawn(7, 4)
    expected = []
    for place, vector in zip(lat_lon, embedded, strict=True):
        near = np.exp(40.0 * (to_unit(*BANK.lat_lon.T) @ to_unit(*place)))
        alike = np.exp(12.0 * (BANK.place @ vector))
        weight = beta * alike / alike.sum() + (1 - beta) * near / near.sum()
        expected.append(weight @ BANK.image)
    looks = BANK.of(lat_lon, embedded, beta)
    np.testing.assert_allclose(looks, expected, atol=1e-5)
    monkeypatch.setattr("rag_geotoken.verifiers.range_plus.BATCH", 3)
    np.testing.assert_allclose(BANK.of(lat_lon, embedded, beta), looks, atol=1e-6)


def test_a_sharp_look_is_that_of_the_nearest_photo() -> None:
    """Also 1 km apart, where single precision sees no angle."""
    bank = RangeBank(np.array([[10.0, 20.0], [10.0, 20.009]]), drawn(2, 5), drawn(2, 6))
    looks = bank.of(np.array([[10.0, 20.008]]), drawn(1, 7), beta=0.0, spatial=1e10)
    np.testing.assert_allclose(looks[0], bank.image[1], atol=1e-5)


def test_the_index_knows_how_its_places_look(geolocator: Geolocator) -> None:
    index, spots = geolocator.index, geolocator.index.lat_lon[[3, 50]]
    embed = geolocator.alignment.embed_places
    image = index.vectors(np.arange(len(index.rows)))[:, 0]
    expected = RangeBank(index.lat_lon, embed(index.lat_lon), image).of(spots, embed(spots), 0.7)
    np.testing.assert_allclose(bank(geolocator).of(spots, embed(spots), 0.7), expected, atol=1e-6)


def test_a_large_gallery_is_a_bank_by_a_draw(geolocator: Geolocator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rag_geotoken.verifiers.range_plus.BANK", 50)
    index = geolocator.index
    one, other = (bank(geolocator.replace(_cache={})) for _ in range(2))
    assert one.lat_lon.shape == (50, 2) and one.place.shape == one.image.shape == (50, 32)
    rows = [index.lat_lon.tolist().index(place) for place in one.lat_lon.tolist()]
    np.testing.assert_array_equal(one.image, index.vectors(np.array(rows))[:, 0])
    np.testing.assert_array_equal(one.lat_lon, other.lat_lon)


def tables_of(geolocator: Geolocator, pool: Pool) -> Tables:
    """Gallery photos, one for each photo of the pool."""
    rows = np.arange(len(pool.mask))
    names = [str(row) for row in rows]
    tables = Tables(Photos.of(names, names))
    digests: list[str] = geolocator.index.rows["digest"].take(rows).to_pylist()
    tables.put("embeddings", Embeddings(geolocator.index.vectors(rows), digests, [None] * len(rows)))
    tables.put("pool", pool)
    return tables


def looks_of(geolocator: Geolocator, tables: Tables) -> NDArray[np.float32]:
    """The verifier's scores of the pool."""
    return load_verifier("look").scores(geolocator, Options(), tables, tables.pool).scores


def follows_from(geolocator: Geolocator, verifier: str) -> dict[str, Any]:
    """What the verdict's stage is known by."""
    options = Options(verify=(verifier,))
    stage = next(stage for stage in road(options) if stage.name == f"verdicts-{verifier}")
    return stage.settings(geolocator, options)


def test_look_verifies_every_entry(geolocator: Geolocator, pool: Pool) -> None:
    tables = tables_of(geolocator, pool)
    scores, photo = looks_of(geolocator, tables), tables.embeddings.image
    assert (scores[~pool.mask] == 0).all() and (~pool.mask).any()
    spots, embed = pool.lat_lon[1][pool.mask[1]], geolocator.alignment.embed_places
    looks = bank(geolocator).of(spots, embed(spots), 0.5, 12.0, 10000.0)
    cosine = looks @ photo[1] / np.linalg.norm(looks, axis=1)
    np.testing.assert_allclose(scores[1][pool.mask[1]], cosine, atol=1e-5)
    assert follows_from(geolocator, "look") != follows_from(geolocator, "alignment")


def test_the_tuning_says_how_a_look_is_estimated(geolocator: Geolocator, pool: Pool) -> None:
    tables, grid = tables_of(geolocator, pool), read_recipe(shipped("training/earth.toml"))["tuning"]["grid"]["look"]
    scores = _looks(geolocator, tables, grid)
    same = (0.5, 12.0, 10000.0)  # as a tuning has it that says nothing
    assert same in scores and len(scores) > 20
    for mix in (same, (0.25, 48.0, 4000.0), (1.0, 24.0, 40.0), (0.0, 12.0, 10000.0)):
        chosen = dict(zip(("look_beta", "look_semantic", "look_spatial"), mix, strict=True))
        tuned = geolocator.replace(tuning=replace(geolocator.tuning, **chosen))  # type: ignore[arg-type]
        np.testing.assert_allclose(scores[mix], looks_of(tuned, tables), atol=1e-5)
        assert (follows_from(tuned, "look") == follows_from(geolocator, "look")) == (mix == same)
