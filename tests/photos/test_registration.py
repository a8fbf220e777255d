"""These tests register views from above whose true places are known, and check the stages that use the matches."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from tiny import OPTIONS, TUNING

from rag_geotoken.decision.pool import extend, without
from rag_geotoken.geo.sphere import destination, haversine_km
from rag_geotoken.options import Options
from rag_geotoken.photos.agreement import moved_places
from rag_geotoken.photos.blue_marble import cut
from rag_geotoken.photos.registration import Registration, register
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.run import stages
from rag_geotoken.run.road import road
from rag_geotoken.run.walk import RunFolder
from rag_geotoken.types import VISUAL, Neighbors, Photos, Places, Pool, Tables
from rag_geotoken.verifiers import load_verifier
from rag_geotoken.verifiers.visual import NO_MATCH, support

Floats = NDArray[np.float64]
PLACES = np.array([[46.5, 10.0], [-33.0, -70.2], [36.2, 138.0], [68.0, 15.5], [9.9, -84.2], [-43.9, 170.0]])
PHOTOS, K = len(PLACES), 7


def around(places: Floats, k: int, km: float, seed: int) -> Floats:
    """Return k places (N, k, 2) up to a distance from each place."""
    rng = np.random.default_rng(seed)
    distance, bearing = km * np.sqrt(rng.uniform(0.05, 1, (len(places), k))), rng.uniform(0, 360, (len(places), k))
    return np.stack(destination(places[:, :1], places[:, 1:], bearing, distance), axis=-1)


def views(places: Floats, seed: int) -> Floats:
    """Return views (..., 6) of places (..., 2) as the source draws them."""
    rng = np.random.default_rng(seed)
    shape = places.shape[:-1]
    drawn = 300 * np.exp(rng.normal(0, 0.15, shape)), rng.uniform(-25, 25, shape), *rng.uniform(0.9, 1.1, (2, *shape))
    return np.concatenate([places, np.stack(drawn, axis=-1)], axis=-1)


def cut_all(rows: Floats) -> NDArray[np.uint8]:
    return cut(rows.reshape(-1, 6)).reshape(*rows.shape[:-1], 64, 64, 3)


def true_registration(photos: Floats, near: Floats) -> Registration:
    """Return the exact registration of views (N, 6) and (N, K, 6), by spherical trigonometry."""
    lat, lon = np.radians(photos[:, :2]).T[..., None]
    near_lat, near_lon = np.radians(np.moveaxis(near[..., :2], -1, 0))
    cosine = np.sin(lat) * np.sin(near_lat) + np.cos(lat) * np.cos(near_lat) * np.cos(near_lon - lon)
    east = 6371 * np.cos(near_lat) * np.sin(near_lon - lon) / cosine
    up = np.cos(lat) * np.sin(near_lat) - np.sin(lat) * np.cos(near_lat) * np.cos(near_lon - lon)
    north, turn = 6371 * up / cosine, np.radians(photos[:, None, 3])
    right, down = east * np.cos(turn) - north * np.sin(turn), -east * np.sin(turn) - north * np.cos(turn)
    middle = np.stack([right, down], axis=-1) / photos[:, None, 2:3]
    # North at the neighbor is not parallel to north at the photo.
    between = np.arctan2(np.sin(near_lon - lon) * np.sin((lat + near_lat) / 2), np.cos(near_lon - lon))
    measured = middle, np.log(photos[:, None, 2] / near[..., 2]), turn - np.radians(near[..., 3]) + between
    return Registration(*(torch.from_numpy(values) for values in measured), torch.ones(near.shape[:2]))


@pytest.fixture(scope="module")
def photos() -> Floats:
    return views(PLACES, 0)


@pytest.fixture(scope="module")
def near() -> Floats:
    return views(around(PLACES, K, 90.0, 1), 2)


@pytest.fixture(scope="module")
def registered(photos: Floats, near: Floats) -> Registration:
    return register(cut_all(photos), cut_all(near))


def test_a_shift_turn_and_scale_are_measured_to_a_part_of_a_pixel(
    photos: Floats, near: Floats, registered: Registration
) -> None:
    expected, sure = true_registration(photos, near), registered.alike > 0.5
    assert sure.float().mean() > 0.9
    assert (registered.middle - expected.middle).abs()[sure].max() < 0.25 / 64
    assert (registered.ratio - expected.ratio).abs()[sure].max() < 0.01
    assert (registered.turn - expected.turn).abs()[sure].rad2deg().max() < 0.5


def test_the_order_and_number_of_photos_do_not_matter(photos: Floats, near: Floats, registered: Registration) -> None:
    back = register(cut_all(photos)[::-1][:2], cut_all(near)[::-1][:2])
    np.testing.assert_allclose(back.middle, registered.middle.flip(0)[:2], atol=1e-4)
    np.testing.assert_allclose(back.alike, registered.alike.flip(0)[:2], atol=1e-4)


def test_other_places_and_pictures_of_nothing_are_no_match(photos: Floats, near: Floats) -> None:
    wrong = cut_all(near)[[1, 2, 3, 4, 5, 0]]
    wrong[0], wrong[1] = 0, 200
    alike = register(cut_all(photos), wrong).alike.numpy()
    assert np.isfinite(alike).all() and alike[:2].max() == 0 and np.median(alike[2:]) < 0.1
    blank = register(np.zeros((1, 64, 64, 3), np.uint8), cut_all(near)[:1])
    assert all(values.isfinite().all() for values in vars(blank).values()) and blank.alike.max() == 0


def test_pictures_of_any_size_are_compared(photos: Floats, near: Floats, registered: Registration) -> None:
    large = cut_all(near)[:2].repeat(2, axis=2).repeat(2, axis=3)
    same = register(cut_all(photos)[:2], large)
    np.testing.assert_allclose(same.middle, registered.middle[:2], atol=1e-4)


def test_moved_places_meet_where_the_photo_was_taken(photos: Floats, near: Floats, registered: Registration) -> None:
    moved, sure = moved_places(registered, near[..., :2], 300.0), registered.alike.numpy() > 0.5
    km = haversine_km(moved[..., 0], moved[..., 1], PLACES[:, :1], PLACES[:, 1:])
    assert np.median(km[sure]) < 0.5 and km[sure].max() < 5


@pytest.mark.parametrize("place", [(12.0, 179.9), (76.0, 40.0), (-60.0, -179.9), (0.0, 0.0)])
def test_the_geometry_is_exact_everywhere(place: tuple[float, float]) -> None:
    """Even at the date line and far north, at a width far from the usual one, with two wrong neighbors."""
    photo = np.array([[*place, 420.0, -28.0, 1.0, 1.0]])
    around_it = views(around(photo[:, :2], 9, 120.0, 3), 4)
    around_it[..., 3] = 0
    exact = true_registration(photo, around_it)
    middle, places = exact.middle.clone(), around_it[..., :2].copy()
    middle[0, 2] += 0.2
    places[0, 5] = -10, 100
    moved = moved_places(replace(exact, middle=middle), places, 300.0)
    km = haversine_km(moved[0, :, 0], moved[0, :, 1], *place)
    right = np.delete(np.arange(9), [2, 5])
    assert km[right].max() < 1.5 and km[2] > 50 and km[5] > 5000


def test_one_neighbor_alone_has_the_usual_view() -> None:
    """With north up and 300 km wide, a quarter of the width to the left is 75 km to the west."""
    none = torch.zeros(1, 1, dtype=torch.float64)
    alone = Registration(torch.tensor([[[0.25, 0.0]]], dtype=torch.float64), none, none, torch.ones(1, 1))
    moved = moved_places(alone, np.array([[[0.0, 30.0]]]), 300.0)
    assert moved[0, 0] == pytest.approx([0.0, 30.0 - 75 / 111.195], abs=0.01)


def test_a_pool_is_extended_and_the_extension_undone(pool: Pool) -> None:
    rng = np.random.default_rng(0)
    count = len(pool.mask)
    matches = Places(rng.uniform(-50, 50, (count, 4, 2)), rng.uniform(0, 1, (count, 4)).astype(np.float32))
    longer = extend(pool, matches, TUNING)
    assert np.exp(longer.log_weight).sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert (longer.source[:, -4:] == VISUAL).all() and longer.mask[:, -4:].all()
    share = np.exp(longer.log_weight[:, -4:])
    assert share.sum(axis=1) == pytest.approx(TUNING.visual_share, abs=1e-5)
    assert np.log(share[:, 1] / share[:, 0]) == pytest.approx(
        TUNING.match_scale * (matches.scores[:, 1] - matches.scores[:, 0]), abs=1e-4
    )
    back = without(longer, VISUAL)
    assert (back.mask[:, :-4] == pool.mask).all() and not back.mask[:, -4:].any()
    np.testing.assert_allclose(back.log_weight[:, :-4], pool.log_weight, atol=1e-5)


def test_support_is_the_formula(pool: Pool) -> None:
    rng = np.random.default_rng(1)
    count = len(pool.mask)
    places = pool.lat_lon[:, :3] + rng.normal(0, 0.1, (count, 3, 2))
    matches = Places(places, rng.uniform(0, 1, (count, 3)).astype(np.float32))
    given = support(pool, matches, 12.0)
    photo, entry = 2, int(np.flatnonzero(pool.mask[2])[1])
    km = haversine_km(*pool.lat_lon[photo, entry], *matches.lat_lon[photo].T)
    expected = np.log(NO_MATCH + (matches.scores[photo] * np.exp(-0.5 * (km / 12) ** 2)).sum())
    assert given[photo, entry] == pytest.approx(expected, abs=1e-5)
    assert not given[~pool.mask].any()


def test_matches_are_a_stage_that_goes_on(run_folder: Path, geolocator: Geolocator, tmp_path: Path) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    whole = (tmp_path / "run/matches.parquet").read_bytes()
    (tmp_path / "run/matches.json").unlink()
    options, run = replace(OPTIONS, verify=("visual",)), RunFolder(tmp_path / "run", geolocator)
    files = run.walk(options, until="pool")
    assert files["matches"] == "matches" and "matches" not in run.reused
    assert {"embeddings", "neighbors"} <= set(run.reused)
    assert (tmp_path / "run/matches.parquet").read_bytes() == whole
    tables = run.tables(options, files)
    scores, entries = tables.matches.scores, tables.pool
    assert scores.shape == tables.neighbors.scores.shape and (scores >= 0).all() and (scores <= 1).all()
    assert (entries.source[entries.mask] == VISUAL).sum() == len(run.readable) * OPTIONS.neighbors


def test_a_neighbor_without_its_picture_costs_a_match(geolocator: Geolocator, near: Floats, photos: Floats) -> None:
    """The remaining neighbors still locate the photo."""
    rows = np.arange(K)[None]
    images = [f"blue-marble:bmng/{','.join(f'{value:.6f}' for value in view)}" for view in near[0]]
    images[3] = "missing.jpg"
    table = geolocator.index.rows.slice(0, K)
    table = table.set_column(table.column_names.index("image"), "image", pa.array(images))
    locator = Geolocator(geolocator.alignment, None, replace(geolocator.index, rows=table), TUNING)
    tables = Tables(Photos.of(list(cut_all(photos[:1])), ["it"]))
    tables.put("neighbors", Neighbors(rows, near[:1, :, :2], np.ones((1, K), np.float32)))
    matches = stages.match(locator, OPTIONS, tables)
    assert matches.scores[0, 3] == 0 and (np.delete(matches.scores[0], 3) > 0.5).sum() >= K - 2
    best = matches.lat_lon[0, matches.scores[0].argmax()]
    assert haversine_km(*best, *PLACES[0]) < 5


@pytest.mark.parametrize(
    ("sources", "verify"), [(Options().sources, ("visual",)), (("visual",), ()), (("gps",), ("visual",))]
)
def test_the_road_has_matches_where_visual_is_a_source_or_verifier(
    sources: tuple[str, ...], verify: tuple[str, ...]
) -> None:
    """They come before the stages that read them."""
    options = Options(sources=sources, verify=verify)
    names = [stage.name for stage in road(options)]
    readers = [stage for stage in road(options) if "matches" in stage.reads]
    assert readers and all(names.index("matches") < names.index(stage.name) for stage in readers)
    assert ("verdicts-visual" in names) == ("verdicts-visual" in [stage.name for stage in readers])
    assert not any("matches" in (stage.name, *stage.reads) for stage in road(Options()))


def test_visual_verdicts_are_the_support_of_the_matches(geolocator: Geolocator, pool: Pool) -> None:
    rng, count = np.random.default_rng(2), len(pool.mask)
    matches = Places(pool.lat_lon[:, :3], rng.uniform(0, 1, (count, 3)).astype(np.float32))
    tables = Tables(Photos.of(["it"] * count, ["it"] * count))
    tables.put("matches", matches)
    verdict = load_verifier("visual").scores(geolocator, Options(), tables, pool)
    np.testing.assert_array_equal(verdict.scores, support(pool, matches, geolocator.tuning.visual_km))
    np.testing.assert_array_equal(verdict.mask, pool.mask)
