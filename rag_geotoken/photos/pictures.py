"""Pictures from files nobody has vetted: bounded in bytes and pixels, and a broken one costs one row, never the run."""

from __future__ import annotations

import math
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from rag_geotoken.errors import GeoError
from rag_geotoken.photos import tar
from rag_geotoken.photos.sources import source_module
from rag_geotoken.types import Picture

BYTE_CAP = 50_000_000
PIXEL_CAP = 100_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # MPO opens as the JPEG that it begins with
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".mpo")
# How a picture becomes a square: its middle, as CLIP has it; the same with an odd margin halved to the even pixel, as
# torchvision has it; all of it, out of shape.
Fit = Literal["crop", "crop-even", "squash"]
Interpolation = Literal["bicubic", "bilinear"]
NEEDLE = 16  # times as long as wide
THREADS = min(4, os.cpu_count() or 1)  # a picture at the cap takes 400 MB while it is decoded

# EXIF orientation -> what brings the picture upright (CIPA DC-008, tag 0x0112).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A file's name may hold line ends, terminal codes or bytes that are no text.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
_one_batch = threading.Lock()
Used = TypeVar("Used")


def load_pictures(
    references: Sequence[Picture], size: int, fit: Fit = "crop", interpolation: Interpolation = "bicubic"
) -> tuple[NDArray[np.uint8], list[str | None]]:
    """Loads pictures upright, in color on white, as squares: the middle, resized (bicubic, antialiased) as CLIP's.

    Args:
        references: N paths of picture files, `tar:` references to files in a tar, references that a source draws, the
            bytes of files, or pictures in memory.
        size: Side of the square in pixels.
        fit: What becomes of a picture that is no square. What a source draws always is one.
        interpolation: Of picture files.

    Returns:
        Pixels (N, size, size, 3), rows from the top, red-green-blue; and for each photo None, or one line that says
        why it could not be loaded. Its pixels are zeros then.

    Raises:
        GeoError: what a source draws from is not there. A bad picture file raises nothing.
    """
    pixels = np.zeros((len(references), size, size, 3), np.uint8)
    errors: list[str | None] = [None] * len(references)
    resampling = Image.Resampling[interpolation.upper()]
    drawn = draw(references, size)
    squares = read_pictures(references, lambda image: _square(image, size, fit, resampling), drawn)
    for i, square in enumerate(squares):
        if isinstance(square, str):
            errors[i] = square
        else:
            pixels[i] = square
    return pixels, errors


def draw(references: Sequence[Picture], size: int | None = None, at_most: bool = False) -> dict[int, NDArray[np.uint8]]:
    """The references that a source draws itself: position -> pixels (size, size, 3).

    size: the source's own unless given; at_most: no larger than that. Raises GeoError as the source does.
    """
    by_source: dict[Any, list[int]] = {}
    for i, reference in enumerate(references):
        module = source_module(reference) if isinstance(reference, str) else None
        if hasattr(module, "draw"):
            by_source.setdefault(module, []).append(i)
    drawn: dict[int, NDArray[np.uint8]] = {}
    for module, at in by_source.items():
        side = module.PIXELS if size is None else min(size, module.PIXELS) if at_most else size
        drawn |= zip(at, module.draw([references[i] for i in at], side), strict=True)
    return drawn


def read_pictures(
    references: Sequence[Picture], use: Callable[[Image.Image], Used], drawn: Mapping[int, Used]
) -> Iterator[Used | str]:
    """Opens picture files and files in tars, several at a time, and yields in turn what `use` makes of each.

    In the place of one that could not be read stands one line that says why; what ``drawn`` has for a position is
    taken as it is. `use` runs while others are decoded.
    """
    files = [reference for i, reference in enumerate(references) if i not in drawn]
    with _strict_pillow(), ThreadPoolExecutor(THREADS) as pool:
        made = pool.map(lambda reference: _load(reference, use), files)
        for i in range(len(references)):
            yield drawn[i] if i in drawn else next(made)


def upright(image: Image.Image) -> Image.Image:
    """The whole picture in color on white, turned as its EXIF says, without EXIF."""
    orientation = _orientation(image)
    picture = _rgb(image)
    return picture.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else picture


def middle(image: Image.Image) -> Image.Image:
    """The picture, or the middle of one over 16 times as long as wide: enlarged by the short side it would be huge."""
    cut = (max(image.size) - NEEDLE * min(image.size)) // 2
    if cut <= 0:
        return image
    left, top = (cut, 0) if image.width > image.height else (0, cut)
    return image.crop((left, top, image.width - left, image.height - top))


def list_pictures(path: Path | str) -> list[str]:
    """The picture files under a folder, at any depth, sorted, hidden ones left out; or the one file itself.

    Raises:
        GeoError: the path is missing, or the folder holds no picture.
    """
    path = Path(path)
    if path.is_file():
        return [str(path)]
    if not path.is_dir():
        raise GeoError(f"there is no picture or folder {path}")
    found = []
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    pictures = sorted(file for file in found if file.suffix.lower() in ENDINGS and file.is_file())
    if not pictures:
        raise GeoError(f"folder {path} holds no picture: accepted endings are {' '.join(ENDINGS)}")
    return [str(picture) for picture in pictures]


def exif_lat_lon(path: Path | str) -> tuple[float, float] | None:
    """Latitude and longitude in degrees from a picture's GPS tags; None where they are missing, broken or unset."""
    try:
        with _strict_pillow(), _open(path) as image:
            gps = image.getexif().get_ifd(ExifTags.IFD.GPSInfo)
    except Exception:  # as in _load: whatever a broken file makes the decoder raise
        return None
    lat = _degrees(gps.get(ExifTags.GPS.GPSLatitude), gps.get(ExifTags.GPS.GPSLatitudeRef), "N", "S", 90.0)
    lon = _degrees(gps.get(ExifTags.GPS.GPSLongitude), gps.get(ExifTags.GPS.GPSLongitudeRef), "E", "W", 180.0)
    if lat is None or lon is None:
        return None
    # Cameras without a fix write 0, 0; the only other thing there is open sea.
    return None if lat == 0.0 == lon else (lat, lon)


def _degrees(values: Any, ref: Any, positive: str, negative: str, limit: float) -> float | None:
    """Degrees, minutes, seconds -> signed degrees. A zero denominator reads as NaN: no degrees, or no minutes."""
    if isinstance(ref, bytes):
        ref = ref.decode("latin-1")
    sign = {positive: 1.0, negative: -1.0}.get(ref.strip(" \0").upper()[:1]) if isinstance(ref, str) else None
    try:
        parts = [float(value) for value in (values if isinstance(values, tuple) else (values,))][:3]
    except (TypeError, ValueError, ArithmeticError):
        return None
    if sign is None or not parts or not math.isfinite(parts[0]):
        return None
    parts = [part if math.isfinite(part) else 0.0 for part in parts]
    degrees = sum(part / 60.0**power for power, part in enumerate(parts))
    return sign * degrees if min(parts) >= 0.0 and degrees <= limit else None


@contextmanager
def _strict_pillow() -> Iterator[None]:
    # Warning filters belong to the whole process, so one batch at a time; the batch's threads share them.
    with _one_batch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _load(reference: Picture, use: Callable[[Image.Image], Used]) -> Used | str:
    """What `use` makes of the picture, or one line that says what is wrong: what `_open` raises, or `use`."""
    try:
        with _open(reference) as image:
            return use(image)
    except GeoError as error:
        reason = str(error)
    except Exception:  # a decoder given broken bytes raises nearly anything: struct.error, IndexError, MemoryError
        reason = "the picture is broken or cut short"
    name = UNPRINTABLE.sub(" ", reference) if isinstance(reference, str) else "the picture"
    return f"{name}: {reason}"


def _open(path: Path | Picture) -> Image.Image:
    """Opens a picture, of a file or of a file in a tar, without decoding it; the caps are checked first."""
    cap = min(PIXEL_CAP, Image.MAX_IMAGE_PIXELS or PIXEL_CAP)
    too_large = f"more than {cap // 1_000_000} megapixels"
    try:
        if isinstance(path, Image.Image | np.ndarray):
            image = path.copy() if isinstance(path, Image.Image) else _of_pixels(path)
        elif isinstance(path, bytes):
            image = Image.open(BytesIO(path), formats=FORMATS)
        elif str(path).startswith(tar.SCHEME):
            image = Image.open(BytesIO(tar.read_member(str(path), BYTE_CAP)), formats=FORMATS)
        else:
            _check_file(path)
            image = Image.open(path, formats=FORMATS)
    except (FileNotFoundError, NotADirectoryError):
        raise GeoError("there is no such file") from None
    except PermissionError:
        raise GeoError("the file may not be read") from None
    except UnidentifiedImageError:
        raise GeoError(f"not a picture that is read here ({', '.join(FORMATS)})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise GeoError(too_large) from None
    if image.width * image.height > cap:
        image.close()
        raise GeoError(too_large)
    return image


def _of_pixels(pixels: NDArray[np.uint8]) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise GeoError(f"an array of shape {pixels.shape}, {pixels.dtype}: give (height, width, 3), uint8, RGB")
    return Image.fromarray(pixels)


def _check_file(path: Path | str) -> None:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device never end
        raise GeoError("not a file")
    if status.st_size == 0:
        raise GeoError("the file is empty")
    if status.st_size > BYTE_CAP:
        raise GeoError(f"larger than {BYTE_CAP // 1_000_000} MB")


def _square(image: Image.Image, size: int, fit: Fit, resampling: Image.Resampling) -> NDArray[np.uint8]:
    """The shorter side to ``size`` pixels, the longer one to a whole number, then the middle; or both sides to it."""
    orientation = _orientation(image)
    picture = _rgb(image if fit == "squash" else middle(image))
    short = min(picture.size)
    width, height = (size if fit == "squash" else size * side // short for side in picture.size)
    picture = picture.resize((width, height), resampling)
    if orientation in UPRIGHT:
        picture = picture.transpose(UPRIGHT[orientation])
    margins = picture.width - size, picture.height - size
    left, top = (round(margin / 2) if fit == "crop-even" else margin // 2 for margin in margins)
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def _orientation(image: Image.Image) -> int:
    """The picture's EXIF orientation, once it is decoded: Pillow brings TIFF upright as it decodes it."""
    image.load()
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF around good pixels is common: the picture is taken as it lies
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion would cut everything above 255 to white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise GeoError("32-bit gray values have no agreed white: save the picture with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
