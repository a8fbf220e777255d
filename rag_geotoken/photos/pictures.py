"""These functions load untrusted pictures, bounded in bytes and pixels.

A broken picture costs its own row, never the run.
"""

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
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.Image import Transpose

from rag_geotoken.errors import GeoError
from rag_geotoken.photos import tar
from rag_geotoken.photos.sources import source_module
from rag_geotoken.types import Picture

BYTE_CAP = 50_000_000
PIXEL_CAP = 100_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # MPO opens as the JPEG that it begins with
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".mpo")
# How a picture becomes a square: cropped to its middle as in CLIP; cropped, an odd margin halved to the even pixel,
# as in torchvision; or resized without keeping its aspect ratio.
Fit = Literal["crop", "crop-even", "squash"]
Interpolation = Literal["bicubic", "bilinear"]
MAX_ASPECT = 16  # longer side over shorter side
THREADS = min(4, os.cpu_count() or 1)  # a picture at the cap takes 400 MB while it is decoded

# The transposition that brings a picture of an EXIF orientation upright (CIPA DC-008, tag 0x0112).
UPRIGHT = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE}
UPRIGHT |= {6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}
# A file's name may hold line ends, terminal codes or bytes that are not text.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
_filters_lock = threading.Lock()
Result = TypeVar("Result")


def load_pictures(
    references: Sequence[Picture], size: int, fit: Fit = "crop", interpolation: Interpolation = "bicubic"
) -> tuple[NDArray[np.uint8], list[str | None]]:
    """Load pictures upright, as RGB on white, cut to squares and resized (antialiased) as in CLIP.

    Args:
        references: N paths of picture files, `tar:` references to files in a tar, references that a source draws, the
            bytes of files, or pictures in memory.
        size: Side of the square in pixels.
        fit: How a picture file becomes a square. What a source draws is one already.
        interpolation: For picture files.

    Returns:
        Pixels (N, size, size, 3), rows from the top, RGB; and for each photo None, or one line that says why it could
        not be loaded. Its pixels are zeros then.

    Raises:
        GeoError: The data that a source draws from is missing. A bad picture file raises nothing.
    """
    pixels = np.zeros((len(references), size, size, 3), np.uint8)
    errors: list[str | None] = [None] * len(references)
    to_square = partial(_square, size=size, fit=fit, resampling=Image.Resampling[interpolation.upper()])
    for i, square in enumerate(read_pictures(references, to_square, draw(references, size))):
        if isinstance(square, str):
            errors[i] = square
        else:
            pixels[i] = square
    return pixels, errors


def draw(references: Sequence[Picture], size: int | None = None, at_most: bool = False) -> dict[int, NDArray[np.uint8]]:
    """Return the pixels (size, size, 3) of those references that a source draws itself, by their position.

    size: The source's own unless given. at_most: Take the source's own size if it is smaller. Raises GeoError as the
    source does.
    """
    by_source: dict[Any, list[int]] = {}
    for i, reference in enumerate(references):
        module = source_module(reference) if isinstance(reference, str) else None
        if hasattr(module, "draw"):
            by_source.setdefault(module, []).append(i)
    drawn: dict[int, NDArray[np.uint8]] = {}
    for module, positions in by_source.items():
        side = module.PIXELS if size is None else min(size, module.PIXELS) if at_most else size
        drawn |= zip(positions, module.draw([references[i] for i in positions], side), strict=True)
    return drawn


def read_pictures(
    references: Sequence[Picture], convert: Callable[[Image.Image], Result], drawn: Mapping[int, Result]
) -> Iterator[Result | str]:
    """Yield in order the results of ``convert`` for pictures, several of which are decoded at a time.

    A picture that cannot be read yields one line that says why; a position in ``drawn`` yields what that holds.
    """
    files = [reference for i, reference in enumerate(references) if i not in drawn]
    with _strict_pillow(), ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(lambda reference: _load(reference, convert), files)
        for i in range(len(references)):
            yield drawn[i] if i in drawn else next(results)


def upright(image: Image.Image) -> Image.Image:
    """Return the whole picture as RGB on white, turned as its EXIF says, without EXIF."""
    orientation = _orientation(image)
    return _turn(_rgb(image), orientation)


def middle(image: Image.Image) -> Image.Image:
    """Crop a picture over 16 times as long as wide to its middle: resized by its shorter side it would be huge."""
    margin = (max(image.size) - MAX_ASPECT * min(image.size)) // 2
    return ImageOps.crop(image, (margin, 0) if image.width > image.height else (0, margin)) if margin > 0 else image


def list_pictures(path: Path | str) -> list[str]:
    """List the picture files in a folder at any depth, sorted and without hidden ones; or the one file itself.

    Raises GeoError when the path is missing or the folder holds no picture.
    """
    path = Path(path)
    if path.is_file():
        return [str(path)]
    if not path.is_dir():
        raise GeoError(f"there is no picture or folder {path}")
    pictures = []
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = (Path(folder, name) for name in files if not name.startswith("."))
        pictures += [file for file in visible if file.suffix.lower() in ENDINGS and file.is_file()]
    if not pictures:
        raise GeoError(f"folder {path} holds no picture: accepted endings are {' '.join(ENDINGS)}")
    return [str(picture) for picture in sorted(pictures)]


def exif_lat_lon(path: Path | str) -> tuple[float, float] | None:
    """Return latitude and longitude in degrees from a picture's GPS tags; None if missing, broken or unset."""
    try:
        with _strict_pillow(), _open(path) as image:
            gps = image.getexif().get_ifd(ExifTags.IFD.GPSInfo)
    except Exception:  # as in _load: whatever a broken file makes the decoder raise
        return None
    tags = ExifTags.GPS
    lat = _degrees(gps.get(tags.GPSLatitude), gps.get(tags.GPSLatitudeRef), signs={"N": 1.0, "S": -1.0}, limit=90.0)
    lon = _degrees(gps.get(tags.GPSLongitude), gps.get(tags.GPSLongitudeRef), signs={"E": 1.0, "W": -1.0}, limit=180.0)
    # Cameras without a fix write 0, 0, which is open sea.
    return None if lat is None or lon is None or lat == 0.0 == lon else (lat, lon)


def _degrees(values: Any, ref: Any, *, signs: dict[str, float], limit: float) -> float | None:
    """Return signed degrees from degrees, minutes and seconds; a zero denominator reads as NaN, which is none."""
    if isinstance(ref, bytes):
        ref = ref.decode("latin-1")
    sign = signs.get(ref.strip(" \0").upper()[:1]) if isinstance(ref, str) else None
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
    with _filters_lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _load(reference: Picture, convert: Callable[[Image.Image], Result]) -> Result | str:
    """Return the converted picture, or one line that says what is wrong with it."""
    try:
        with _open(reference) as image:
            return convert(image)
    except GeoError as error:
        reason = str(error)
    except Exception:  # a decoder given broken bytes raises nearly anything: struct.error, IndexError, MemoryError
        reason = "the picture is broken or cut short"
    name = UNPRINTABLE.sub(" ", reference) if isinstance(reference, str) else "the picture"
    return f"{name}: {reason}"


def _open(path: Path | Picture) -> Image.Image:
    """Open a picture without decoding it, after a check of the caps."""
    cap = min(PIXEL_CAP, Image.MAX_IMAGE_PIXELS or PIXEL_CAP)
    too_large = f"more than {cap // 1_000_000} megapixels"
    try:
        if isinstance(path, Image.Image):
            image = path.copy()
        elif isinstance(path, np.ndarray):
            if path.dtype != np.uint8 or path.ndim != 3 or path.shape[2] != 3 or 0 in path.shape:
                raise GeoError(f"an array of shape {path.shape}, {path.dtype}: give (height, width, 3), uint8, RGB")
            image = Image.fromarray(path)
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


def _check_file(path: Path | str) -> None:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device never end
        raise GeoError("not a file")
    if status.st_size == 0:
        raise GeoError("the file is empty")
    if status.st_size > BYTE_CAP:
        raise GeoError(f"larger than {BYTE_CAP // 1_000_000} MB")


def _square(image: Image.Image, *, size: int, fit: Fit, resampling: Image.Resampling) -> NDArray[np.uint8]:
    """Resize the shorter side (for "squash" both sides) to ``size`` pixels and crop the middle."""
    orientation = _orientation(image)
    picture = _rgb(image if fit == "squash" else middle(image))
    short = min(picture.size)
    width, height = (size if fit == "squash" else size * side // short for side in picture.size)
    picture = _turn(picture.resize((width, height), resampling), orientation)
    margins = picture.width - size, picture.height - size
    left, top = (round(margin / 2) if fit == "crop-even" else margin // 2 for margin in margins)
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def _orientation(image: Image.Image) -> int:
    """Decode a picture and return its EXIF orientation."""
    image.load()  # Pillow turns TIFF upright as it decodes it
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF around good pixels is common: the picture is taken as stored
        return 1


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion would clip everything above 255 to white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise GeoError("32-bit gray values have no agreed white: save the picture with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
