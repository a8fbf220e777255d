"""Our GeoCLIP against the package, with its released weights and the same small CLIP; skipped where it is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_index import geoclip_folder
from geoclip_package import import_geoclip
from PIL import Image
from tiny_clip import save_pictures

from rag_geotoken.peers.convert import convert_geoclip
from rag_geotoken.peers.geoclip import GeoCLIP
from rag_geotoken.photos.pictures import load_pictures

PACKAGE = geoclip_folder()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(PACKAGE is None, reason="needs the package geoclip")]
PHOTOS, TOP = 100, 10


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> GeoCLIP:
    assert PACKAGE is not None
    folder = tmp_path_factory.mktemp("geoclip")
    assert convert_geoclip(PACKAGE, folder) == 100_000
    return GeoCLIP.from_pretrained(folder, clip_folder)


@pytest.fixture(scope="module")
def theirs(clip_folder: Path) -> Any:
    return import_geoclip()(clip_path=str(clip_folder)).eval()


def test_the_same_places_in_the_same_order(ours: GeoCLIP, theirs: Any, tmp_path: Path) -> None:
    pixels, _ = load_pictures(save_pictures(tmp_path, PHOTOS), ours.backbone.size)
    pictures = ours.backbone.normalized(pixels)
    with torch.no_grad():
        logits = theirs(pictures, theirs.gps_gallery)  # encodes the whole gallery
        best = logits.softmax(dim=-1).topk(TOP, dim=1)
        found = ours.search(ours.embed(pixels), TOP)
    places = theirs.gps_gallery[best.indices].numpy()
    np.testing.assert_array_equal(found.lat_lon.astype(np.float32), places)
    np.testing.assert_allclose(found.probability, best.values.numpy(), rtol=1e-4)
    assert len(np.unique(places[:, 0], axis=0)) > 3, "the pictures of this test differ in their places"


def test_the_same_pictures(ours: GeoCLIP, theirs: Any, tmp_path: Path) -> None:
    # Its processor resizes with torchvision where that is there, which rounds otherwise than Pillow, as CLIP did.
    for path in save_pictures(tmp_path, 6):
        wanted = theirs.image_encoder.preprocess_image(Image.open(path))
        found = ours.backbone.normalized(load_pictures([path], ours.backbone.size)[0])
        assert found.shape == wanted.shape and (found - wanted).abs().max() < 3 / 255 / 0.26
