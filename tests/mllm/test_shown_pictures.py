"""Pictures as models get them: small, upright, and nothing but pixels."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from rag_geotoken.mllm.pictures import TINY, decode_picture, encode_picture, encode_pictures, media_type
from rag_geotoken.photos.sources import read_source

HALVES = np.zeros((300, 400, 3), np.uint8)
HALVES[:, :200] = (255, 0, 0)  # red left, blue right
HALVES[:, 200:] = (0, 0, 255)


def noise(*shape: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize(
    ("shape", "size", "expected"), [((300, 400), 512, (400, 300)), ((3000, 1000), 512, (171, 512))]
)
def test_size(shape: tuple[int, int], size: int, expected: tuple[int, int]) -> None:
    encoded = encode_picture(Image.new("RGB", shape[::-1]), size)
    assert media_type(encoded) == "image/jpeg" and decode_picture(encoded).size == expected


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK", "I;16", "YCbCr", "RGB"])
def test_every_mode(mode: str) -> None:
    assert decode_picture(encode_picture(Image.new(mode, (200, 100)), 512)).mode == "RGB"


def test_tiny_ones_lose_nothing() -> None:
    tiny = noise(TINY, TINY, 3)
    encoded = encode_picture(tiny, 512)
    assert media_type(encoded) == "image/png"
    np.testing.assert_array_equal(np.asarray(decode_picture(encoded)), np.asarray(tiny))


@pytest.mark.parametrize("limit", [200_000, 20_000, 2_000, 700])
def test_bytes(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rag_geotoken.mllm.pictures.BYTES", limit)
    encoded = encode_picture(noise(512, 512, 3), 512)
    assert len(encoded) <= limit and max(decode_picture(encoded).size) >= 8


def test_needles_stay_small() -> None:
    picture = decode_picture(encode_picture(Image.new("RGB", (30_000, 2)), 512))
    assert picture.size == (32, 2)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_no_metadata_and_upright(tmp_path: Path, ending: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    exif[ExifTags.Base.Make] = "secretcamera"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 12.0, 0.0)
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "secretcomment")
    options = {"pnginfo": info} if ending == "png" else {"comment": b"secretcomment"} if ending == "jpg" else {}
    path = tmp_path / f"secretname.{ending}"
    Image.fromarray(HALVES).save(path, exif=exif, dpi=(77, 77), **options)
    encoded, errors = encode_pictures([str(path)], 512)
    assert errors == [None] and encoded[0] is not None
    assert b"secret" not in encoded[0] and b"Exif" not in encoded[0]
    with Image.open(BytesIO(encoded[0])) as opened:
        assert not opened.getexif() and set(opened.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    pixels = np.asarray(decode_picture(encoded[0])).astype(int)
    np.testing.assert_allclose(pixels[150, 100], (0, 0, 255), atol=24)  # turned by 180 degrees
    np.testing.assert_allclose(pixels[150, 300], (255, 0, 0), atol=24)


def test_bad_files_and_crops_of_the_earth(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    crop = read_source("blue-marble:test,n=1")["image"][0].as_py()
    encoded, errors = encode_pictures([str(tmp_path / "broken.jpg"), crop, str(tmp_path / "none.jpg")], 512)
    assert encoded[0] is None is encoded[2] and errors[1] is None
    assert all(error is not None and len(error.splitlines()) == 1 for error in (errors[0], errors[2]))
    assert encoded[1] is not None and decode_picture(encoded[1]).size == (64, 64)
    assert media_type(encoded[1]) == "image/png"
