"""These tests check the pixels of good picture files and the messages for bad ones."""

from __future__ import annotations

import os
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, TiffImagePlugin

from rag_geotoken.errors import GeoError
from rag_geotoken.photos import pictures
from rag_geotoken.photos.pictures import exif_lat_lon, list_pictures, load_pictures

# Four quarters: red, green over blue, gray.
QUARTERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [90, 90, 90]]], np.uint8)
SAMPLE = np.repeat(np.repeat(QUARTERS, 16, 0), 16, 1)


def save(path: Path, picture: Any = SAMPLE, **options: Any) -> str:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(path, **options)
    return str(path)


def load(path: Path | str, size: int = 32) -> np.ndarray:
    pixels, errors = load_pictures([str(path)], size)
    assert errors == [None]
    return pixels[0]


def error_of(path: Path | str) -> str:
    pixels, errors = load_pictures([str(path)], 8)
    assert not pixels.any() and errors[0] is not None and len(errors[0].splitlines()) == 1
    assert errors[0].startswith(f"{path}: ")
    return errors[0].removeprefix(f"{path}: ")


def corners(pixels: np.ndarray) -> np.ndarray:
    return pixels[[4, 4, -5, -5], [4, -5, 4, -5]].reshape(2, 2, 3)


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "webp", "jpg", "gif", "mpo"])
def test_every_format_gives_the_same_picture(tmp_path: Path, ending: str) -> None:
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(ending, {})
    pixels = load(save(tmp_path / f"a.{ending}", **options))
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    lossy = 24 if ending in ("jpg", "mpo") else 0
    np.testing.assert_allclose(corners(pixels).astype(int), QUARTERS, atol=lossy)


def clip_square(picture: Image.Image, size: int) -> np.ndarray:
    """Return the output of CLIP's own processor without its normalization."""
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    except ImportError:  # transformers 4
        from transformers import CLIPImageProcessor as Processor
    processor = Processor(size={"shortest_edge": size}, crop_size=size, do_rescale=False, do_normalize=False)
    values = processor(images=picture.convert("RGB"), return_tensors="np")["pixel_values"][0]
    return np.moveaxis(np.asarray(values), 0, -1)


@pytest.mark.parametrize("shape", [(301, 450), (450, 301), (97, 96), (40, 500), (20, 33), (41, 100), (224, 224)])
@pytest.mark.parametrize("size", [64, 224])
def test_the_square_is_clips_own_to_the_bit(tmp_path: Path, shape: tuple[int, int], size: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    pixels = load(save(tmp_path / "a.png", noise), size)
    np.testing.assert_array_equal(pixels, clip_square(Image.fromarray(noise), size))


def test_a_very_long_picture_is_cropped_to_its_middle(tmp_path: Path) -> None:
    needle = np.zeros((2, 1000, 3), np.uint8)
    needle[:, 498:502] = 200
    for picture in (needle, needle.swapaxes(0, 1)):
        assert load(save(tmp_path / "a.png", picture), 16).min() > 150
    assert load(save(tmp_path / "b.png", np.full((1, 60_000, 3), 7, np.uint8)), 64).max() == 7


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    checkered = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    assert abs(load(save(tmp_path / "a.png", checkered), 8).astype(int) - 127).max() <= 2


@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_brings_it_upright(tmp_path: Path, orientation: int, ending: str) -> None:
    # What the camera stored, had the scene been SAMPLE: the inverse of bringing it upright.
    turns = {2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1)}
    turns |= {6: np.rot90, 7: lambda a: np.rot90(a.swapaxes(0, 1), 2), 8: lambda a: np.rot90(a, -1)}
    stored = np.ascontiguousarray(turns.get(orientation, np.asarray)(SAMPLE))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if ending == "webp" else {}
    pixels = load(save(tmp_path / f"a.{ending}", stored, exif=exif, **options))
    np.testing.assert_array_equal(corners(pixels), QUARTERS)


def test_broken_exif_leaves_the_picture_as_stored(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", quality=100, exif=b"Exif\0\0II*\0" + b"\xff" * 40)
    np.testing.assert_allclose(corners(load(path)).astype(int), QUARTERS, atol=60)
    assert exif_lat_lon(path) is None


def test_transparency_becomes_white(tmp_path: Path) -> None:
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([0] * 48)
    for picture, white, options in (
        (Image.new("RGBA", (8, 8), 0), 255, {}),
        (Image.new("LA", (8, 8), (0, 128)), 127, {}),
        (palette, 255, {"transparency": 3}),
        (Image.new("RGB", (8, 8), (9, 8, 7)), 255, {"transparency": (9, 8, 7)}),
    ):
        pixels = load(save(tmp_path / "a.png", picture, **options), 8)
        assert (pixels == white).all()


def test_gray_of_all_depths_and_cmyk(tmp_path: Path) -> None:
    assert (load(save(tmp_path / "a.png", np.full((8, 8), 30_000, np.uint16))) == 30_000 // 256).all()
    assert (load(save(tmp_path / "b.png", Image.new("1", (8, 8), 1))) == 255).all()
    assert (load(save(tmp_path / "c.tif", Image.new("CMYK", (8, 8), (0, 255, 255, 0)))) == [255, 0, 0]).all()
    assert error_of(save(tmp_path / "d.tif", Image.new("F", (8, 8), 0.5))).endswith("with 8 or 16 bits")


def test_bad_files_give_a_reason_each_and_spoil_no_other(tmp_path: Path) -> None:
    good = save(tmp_path / "good.jpg")
    whole = Path(good).read_bytes()
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "head.jpg").write_bytes(whole[:20])
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    expected = {
        "none.jpg": "no such file",
        "good.jpg/none.jpg": "no such file",
        "empty.jpg": "is empty",
        "text.jpg": "not a picture",
        "script.eps": "not a picture",
        "cut.jpg": "broken or cut short",
        "head.jpg": "not a picture",
        "folder.jpg": "not a file",
        "pipe.jpg": "not a file",
        "\0.jpg": "broken",
        "a" * 9999: "broken",
    }
    references = [str(tmp_path / name) for name in expected]
    pixels, errors = load_pictures([good, *references, good], 32)
    assert errors[0] is None and errors[-1] is None and not pixels[1:-1].any()
    np.testing.assert_array_equal(pixels[0], pixels[-1])
    for reason, error in zip(expected.values(), errors[1:-1], strict=True):
        assert error is not None and reason in error and len(error.splitlines()) == 1


def test_damaged_bytes_never_raise(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for ending in ("jpg", "png", "tif", "webp", "gif", "bmp"):
        whole = np.frombuffer(Path(save(tmp_path / f"a.{ending}")).read_bytes(), np.uint8)
        references = []
        for number in range(40):
            damaged = whole.copy()
            damaged[rng.integers(0, len(whole), 8)] = rng.integers(0, 256, 8)
            references.append(str(tmp_path / f"{number}.{ending}"))
            Path(references[-1]).write_bytes(damaged.tobytes())
        pixels, errors = load_pictures(references, 8)
        assert all(not rows.any() for rows, error in zip(pixels, errors, strict=True) if error)
        for reference in references:
            exif_lat_lon(reference)


def test_a_name_with_line_ends_gives_one_line(tmp_path: Path) -> None:
    _, errors = load_pictures(["no\nsuch\x1b[31m\udcff.jpg"], 8)
    assert errors == ["no such [31m .jpg: there is no such file"]


def test_caps_on_bytes_and_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heavy = tmp_path / "heavy.jpg"
    with heavy.open("wb") as file:
        file.truncate(pictures.BYTE_CAP + 1)
    assert error_of(heavy) == "larger than 50 MB"
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        warns = save(tmp_path / "warns.png", Image.new("1", (9_500, 9_500)))
        assert error_of(warns) == "more than 89 megapixels" and exif_lat_lon(warns) is None
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000_000)
        assert error_of(warns) == "more than 40 megapixels"
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        assert load(warns, 8).shape == (8, 8, 3)
        assert error_of(save(tmp_path / "b.png", Image.new("1", (10_001, 10_000)))) == "more than 100 megapixels"
    assert not shown  # the photo's own line is all the user sees


def test_batches_from_several_threads_leave_the_warnings_alone(tmp_path: Path) -> None:
    path, before = save(tmp_path / "a.png"), list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load_pictures, [[path] * 8] * 8, [8] * 8))
    assert list(warnings.filters) == before


def test_blue_marble_references_go_to_their_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(references: list[str], size: int) -> np.ndarray:
        values = np.array([int(reference[-1]) for reference in references], np.uint8)
        return np.broadcast_to(values[:, None, None, None], (len(values), size, size, 3))

    stand_in = types.ModuleType("blue_marble")
    stand_in.draw, stand_in.PIXELS = drawn, 4  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rag_geotoken.photos.blue_marble", stand_in)
    gray = save(tmp_path / "a.png", np.full((8, 8), 7, np.uint8))
    pixels, errors = load_pictures(["blue-marble:1", gray, "blue-marble:3", "none.png"], 4)
    assert pixels.max((1, 2, 3)).tolist() == [1, 7, 3, 0]
    assert errors[:3] == [None] * 3 and errors[3] == "none.png: there is no such file"


def test_no_references() -> None:
    pixels, errors = load_pictures([], 16)
    assert pixels.shape == (0, 16, 16, 3) and errors == []


# listing


def test_listing_is_sorted_and_skips_hidden_and_other_files(tmp_path: Path) -> None:
    shown = ["a/10.webp", "a/2.png", "a.b/x.gif", "b.JPG"]
    for name in (*shown, ".hidden/x.jpg", "a/.x.jpg", "photos.csv", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    assert list_pictures(tmp_path) == [str(tmp_path / name) for name in shown]
    assert list_pictures(tmp_path / "photos.csv") == [str(tmp_path / "photos.csv")]


def test_listing_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GeoError, match=rf"folder {tmp_path} holds no picture: accepted endings are \.jpg \.jpeg"):
        list_pictures(tmp_path)
    with pytest.raises(GeoError, match="there is no picture or folder"):
        list_pictures(tmp_path / "none")


# GPS tags


def gps_exif(lat: Any, lat_ref: Any, lon: Any, lon_ref: Any) -> Image.Exif:
    exif = Image.Exif()
    values = {1: lat_ref, 2: lat, 3: lon_ref, 4: lon}
    exif[ExifTags.IFD.GPSInfo] = {tag: value for tag, value in values.items() if value is not None}
    read = Image.Exif()
    read.load(exif.tobytes())  # Pillow writes GPS tags into TIFF only from EXIF that it has read
    return read


def rational(*values: int | str | Fraction) -> tuple[TiffImagePlugin.IFDRational, ...]:
    pairs = [tuple(map(int, v.split("/"))) if isinstance(v, str) else Fraction(v).as_integer_ratio() for v in values]
    return tuple(TiffImagePlugin.IFDRational(*pair) for pair in pairs)


RIO = rational(22, 57, "1260/100"), rational(43, 12, 36)
RIO_DEGREES = 22 + 57 / 60 + 12.6 / 3600, 43 + 12 / 60 + 36 / 3600


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize(("refs", "signs"), [("NE", (1, 1)), ("SW", (-1, -1)), ("Nw", (1, -1)), ("sE", (-1, 1))])
def test_gps_tags_give_signed_degrees(tmp_path: Path, ending: str, refs: str, signs: tuple[int, int]) -> None:
    path = save(tmp_path / f"a.{ending}", exif=gps_exif(RIO[0], refs[0], RIO[1], refs[1]))
    assert exif_lat_lon(path) == pytest.approx((signs[0] * RIO_DEGREES[0], signs[1] * RIO_DEGREES[1]), abs=1e-9)


@pytest.mark.parametrize(
    ("lat", "lat_ref", "lon", "lon_ref", "expected"),
    [
        (rational("45/1", "30/1", "0/0"), "N", rational(7, 0, 0), "E", (45.5, 7.0)),
        (rational("455/10", "0/0", "0/0"), "N", rational(7), "E", (45.5, 7.0)),
        (rational("0/0", "30/1", 0), "N", rational(7, 0, 0), "E", None),
        (rational("1/0", "30/1", 0), "N", rational(7, 0, 0), "E", None),
        (rational(91, 0, 0), "N", rational(7, 0, 0), "E", None),
        (rational(89, 61, 0), "N", rational(7, 0, 0), "E", None),
        (rational(45, 0, 0), "N", rational(180, 0, 1), "W", None),
        (rational(90, 0, 0), "S", rational(180, 0, 0), "W", (-90.0, -180.0)),
        (rational(0, 0, 0), "N", rational(0, 0, 0), "E", None),
        (rational(0, 0, 0), "N", rational(7, 0, 0), "E", (0.0, 7.0)),
        (rational(45, 0, 0), None, rational(7, 0, 0), "E", None),
        (rational(45, 0, 0), "\0", rational(7, 0, 0), "E", None),
        (rational(45, 0, 0), "N", None, "E", None),
        (rational(45, 0, 0), "North ", rational(7, 0, 0), "E", (45.0, 7.0)),
    ],
)
def test_odd_gps_tags(
    tmp_path: Path, lat: Any, lat_ref: Any, lon: Any, lon_ref: Any, expected: tuple[float, float] | None
) -> None:
    assert exif_lat_lon(save(tmp_path / "a.jpg", exif=gps_exif(lat, lat_ref, lon, lon_ref))) == expected


def test_no_gps_tags_and_no_picture(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a picture")
    assert exif_lat_lon(save(tmp_path / "a.jpg")) is None
    assert exif_lat_lon(tmp_path / "text.jpg") is None
    assert exif_lat_lon(tmp_path / "none.jpg") is None


@pytest.mark.parametrize("shape", [(100, 40), (40, 100), (41, 100)])
def test_the_central_square_is_taken(tmp_path: Path, shape: tuple[int, int]) -> None:
    picture = np.zeros((*shape, 3), np.uint8)
    top, left = (shape[0] - 40) // 2, (shape[1] - 40) // 2
    picture[top : top + 40, left : left + 40] = 200
    assert load(save(tmp_path / "a.png", picture), 16)[1:-1, 1:-1].min() == 200
