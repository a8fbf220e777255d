"""Pictures on their way to a model: small, upright, and nothing but pixels."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image

from rag_geotoken.photos.pictures import draw, middle, read_pictures, upright
from rag_geotoken.types import Picture

BYTES = 200_000
TINY = 128  # px: up to here PNG is small enough, and loses nothing
QUALITIES = (90, 75, 60, 40)


def encode_picture(picture: Image.Image, size: int) -> bytes:
    """A picture's pixels as PNG where it is tiny, else as JPEG: at most `size` px and ``BYTES`` bytes, no metadata.

    JPEG's quality is lowered, then the picture is halved, until it fits.

    Args:
        picture: In any mode. It is never enlarged; of one more than 16 times as long as wide the middle is taken.
        size: The longest that its longer side may be, in pixels.
    """
    pixels = Image.fromarray(np.asarray(picture.convert("RGB")))  # what a file brings along besides stays behind
    picture = middle(pixels)  # many a model's own processor enlarges by the shorter side
    longer = max(picture.size)
    if longer > size:
        width, height = (max(1, round(side * size / longer)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    while True:
        if max(picture.size) <= TINY and len(encoded := _encode(picture, "PNG")) <= BYTES:
            return encoded
        for quality in QUALITIES:
            if len(encoded := _encode(picture, "JPEG", quality=quality)) <= BYTES:
                return encoded
        if max(picture.size) == 1:
            return encoded  # nothing smaller exists
        width, height = (max(1, side // 2) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)


def encode_pictures(references: Sequence[Picture], size: int) -> tuple[list[bytes | None], list[str | None]]:
    """Pictures behind references, whole (not cut to a square), as ``encode_picture`` makes them.

    Args:
        references: N pictures, as ``load_pictures`` takes them.
        size: The longest that a longer side may be, in pixels; what a source draws has its own.

    Returns:
        For each the bytes, or None; and None, or one line that says why it could not be loaded.

    Raises:
        GeoError: what a source draws from is not there. A bad picture file raises nothing.
    """
    drawn = {i: encode_picture(Image.fromarray(pixels), size) for i, pixels in draw(references).items()}
    made = list(read_pictures(references, lambda image: encode_picture(upright(image), size), drawn))
    encoded = [picture if isinstance(picture, bytes) else None for picture in made]
    return encoded, [error if isinstance(error, str) else None for error in made]


def decode_picture(encoded: bytes) -> Image.Image:
    """The picture in bytes that ``encode_picture`` made."""
    picture = Image.open(BytesIO(encoded), formats=("JPEG", "PNG"))
    return picture.convert("RGB")


def media_type(encoded: bytes) -> str:
    """``image/png`` or ``image/jpeg``."""
    return "image/png" if encoded.startswith(b"\x89PNG") else "image/jpeg"


def _encode(picture: Image.Image, kind: str, **options: int) -> bytes:
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()
