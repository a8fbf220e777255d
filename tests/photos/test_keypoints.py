"""These tests count matches of known planes and load tiny random models of both kinds for street photos."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import OneLine
from torch import Tensor
from typer.testing import CliRunner

from rag_geotoken.cli.app import app
from rag_geotoken.options import Options
from rag_geotoken.photos.keypoints import CHANCE, HALF, SIDE, KeypointMatcher, homographies, planar_inliers
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.run import stages
from rag_geotoken.run.road import road
from rag_geotoken.storage.model_folder import quiet
from rag_geotoken.storage.parquet import read_table
from rag_geotoken.types import Neighbors, Photos, Places, Tables


def project(points: Tensor, plane: Tensor) -> Tensor:
    """Map points (..., N, 2) by a homography."""
    moved = torch.cat([points, torch.ones_like(points[..., :1])], -1) @ plane.T
    return moved[..., :2] / moved[..., 2:]


PLANE = torch.tensor([[0.8, -0.2, 0.15], [0.25, 0.9, -0.05], [0.2, -0.1, 1.0]], dtype=torch.float64)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_four_points_make_the_plane() -> None:
    first = drawn(5, 4, 2)
    planes = homographies(first, project(first, PLANE))
    torch.testing.assert_close(planes, PLANE.expand(5, 3, 3), atol=1e-6, rtol=1e-6)
    line = torch.linspace(0, 1, 4, dtype=torch.float64)[:, None].expand(4, 2)[None]
    assert torch.isfinite(homographies(line, line)).all()


def test_only_matches_of_one_plane_are_counted() -> None:
    first = drawn(4, 120, 2)
    second = project(first, PLANE)
    second[0, 50:] = drawn(70, 2, seed=1)  # wrong ones
    second[2] = drawn(120, 2, seed=2)  # all wrong
    second[3] = first[3] * torch.tensor([-1.0, 1.0]) + torch.tensor([1.0, 0.0])  # a mirror image
    mask = torch.ones(4, 120, dtype=torch.bool)
    mask[1, 30:] = False
    counts = planar_inliers(first.float(), second.float(), mask).tolist()
    assert 45 <= counts[0] <= 54 and 27 <= counts[1] <= 30 and counts[2] <= CHANCE + 2 and counts[3] <= CHANCE + 2
    assert planar_inliers(first.float(), second.float(), mask).tolist() == counts  # seeded


def test_a_pattern_in_one_spot_counts_once_and_few_matches_not_at_all() -> None:
    spot = 0.5 + 0.001 * drawn(1, 60, 2)
    assert planar_inliers(spot.float(), spot.float(), torch.ones(1, 60, dtype=torch.bool)).item() <= 2
    three = drawn(1, 3, 2).float()
    assert planar_inliers(three, three, torch.ones(1, 3, dtype=torch.bool)).item() == 0
    none = drawn(2, 9, 2).float()
    assert planar_inliers(none, none, torch.zeros(2, 9, dtype=torch.bool)).tolist() == [0, 0]


@pytest.fixture(scope="module", params=["efficientloftr", "lightglue"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny random model as transformers does."""
    import transformers as hf

    out = tmp_path_factory.mktemp("matcher") / request.param
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        if request.param == "efficientloftr":
            widths = {"out_features": [16, 16, 16, 32], "hidden_size": 32, "num_attention_heads": 8}
            small = {"stage_num_blocks": [1, 1, 1, 1], "num_attention_layers": 1, "coarse_matching_threshold": 0.0}
            model = hf.EfficientLoFTRForKeypointMatching(hf.EfficientLoFTRConfig(**widths, **small))
        else:
            widths = {"encoder_hidden_sizes": [8, 8, 16, 16], "decoder_hidden_size": 32, "descriptor_decoder_dim": 32}
            detector = hf.SuperPointConfig(**widths, max_keypoints=64)
            small = {"descriptor_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "filter_threshold": 0.0}
            config = hf.LightGlueConfig(keypoint_detector_config=detector, **small)
            model = hf.LightGlueForKeypointMatching(config)
        model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def matcher(folder: Path) -> KeypointMatcher:
    return KeypointMatcher.from_pretrained(folder)


def pictures(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 60, 60, 3), np.uint8)


def test_a_model_of_a_folder_scores_pairs(matcher: KeypointMatcher) -> None:
    photos, near = pictures(2), pictures(6, 1).reshape(2, 3, 60, 60, 3)
    near[1, 2] = 0
    places = np.zeros((2, 3, 2))
    matches = matcher.match(photos, near, places)
    scores = matches.scores
    assert scores.shape == (2, 3) and scores.dtype == np.float32 and np.isfinite(scores).all()
    assert (scores >= 0).all() and (scores < 1).all() and scores[1, 2] == 0
    np.testing.assert_array_equal(matcher.match(photos[1:], near[1:], places[1:]).scores, scores[1:])
    np.testing.assert_array_equal(matches.lat_lon, places)


def test_the_matches_of_a_model_are_read_in_its_format(matcher: KeypointMatcher, folder: Path) -> None:
    """A stand-in gives known matches: partners by index for LightGlue, by position for EfficientLoFTR."""
    first = drawn(1, 40, 2).float()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    paired = folder.name == "efficientloftr"
    second = project(first.double(), PLANE).float()
    matches = torch.arange(40) if paired else torch.argsort(order)
    matches = torch.where(torch.arange(40) < 36, matches, -1)

    class StandIn:
        config = matcher.model.config

        def __call__(self, pixel_values: Tensor) -> object:
            assert pixel_values.shape == (1, 2, 3, SIDE, SIDE)
            points = second if paired else second[:, order]
            scores = torch.linspace(1, 0.1, 40).expand(1, 2, 40)
            keypoints = torch.stack([first, points], 1)
            return SimpleNamespace(keypoints=keypoints, matches=matches.expand(1, 2, 40), matching_scores=scores)

    count = planar_inliers(first[:, :36], second[:, :36], torch.ones(1, 36, dtype=torch.bool)).item()
    scores = KeypointMatcher(StandIn(), "stand-in").match(pictures(1), pictures(1, 1)[None], np.zeros((1, 1, 2))).scores
    assert 30 <= count <= 36 and scores[0, 0] == pytest.approx((count - CHANCE) / (count - CHANCE + HALF), abs=0.03)


def test_folders_of_another_kind_are_named(folder: Path, clip_folder: Path, tmp_path: Path, one_line: OneLine) -> None:
    with one_line("holds no keypoint matcher"):
        KeypointMatcher.from_pretrained(clip_folder)
    (tmp_path / "empty").mkdir()
    with one_line("has no model.safetensors"):
        KeypointMatcher.from_pretrained(tmp_path / "empty")
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"no weights")
    with one_line("holds no keypoint matcher"):
        KeypointMatcher.from_pretrained(broken)


def test_a_geolocator_runs_it_in_batches(
    matcher: KeypointMatcher, geolocator: Geolocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = geolocator.alignment, geolocator.tokens, geolocator.index, geolocator.tuning
    street = Geolocator(*parts, matcher=matcher)
    shapes = []

    def match(photos: NDArray[np.uint8], near: NDArray[np.uint8], places: NDArray[np.float64]) -> Places:
        shapes.append((photos.shape[:2], near.shape[:3]))
        return Places(places, np.full(near.shape[:2], 0.7, np.float32))

    monkeypatch.setattr(matcher, "match", match)
    rows = np.arange(10).reshape(5, 2)
    near = Neighbors(rows, geolocator.index.lat_lon[rows], np.ones((5, 2), np.float32))
    tables = Tables(Photos.of(list(pictures(5)), list("abcde")))
    tables.put("neighbors", near)
    options = Options(verify=("visual",))
    matches = stages.match(street, options, tables)
    np.testing.assert_array_equal(matches.lat_lon, near.lat_lon)
    assert (matches.scores == np.float32(0.7)).all()
    assert shapes == [((4, SIDE), (4, 2, SIDE)), ((1, SIDE), (1, 2, SIDE))]
    stage = next(stage for stage in road(options) if stage.name == "matches")
    assert stage.settings(street, options)["matcher"] == matcher.identity
    assert stage.settings(street, options) != stage.settings(geolocator, options)
    assert "matches" in next(stage for stage in road(options) if stage.name == "verdicts-visual").reads


def test_locate_takes_a_matcher(
    folder: Path, weights: Path, index_folder: Path, tmp_path: Path, one_line: OneLine
) -> None:
    given = ["locate", "blue-marble:test,n=2,seed=1", "--index", str(index_folder), "--weights", str(weights)]
    given += ["--out", str(tmp_path / "found.csv"), "--neighbors", "3", "--samples", "2", "--matcher", str(folder)]
    refused = CliRunner().invoke(app, given)
    assert refused.exit_code == 2 and "--verify visual" in refused.output
    assert CliRunner().invoke(app, [*given, "--verify", "visual"]).exit_code == 0
    run = tmp_path / "found.run"
    matches = Places.from_table(read_table(run / "matches.parquet"))
    np.testing.assert_array_equal(matches.lat_lon, Neighbors.from_table(read_table(run / "neighbors.parquet")).lat_lon)
