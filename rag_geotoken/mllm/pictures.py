"""These functions encode pictures for a model: small, upright, and nothing but pixels."""

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
    """Encode a picture as PNG where it is tiny, else as JPEG: at most ``size`` px and ``BYTES`` bytes, no metadata.

    ``size`` limits the longer side. JPEG's quality is lowered, then the picture is halved, until it fits. A picture in
    any mode is taken, and never enlarged; of one more than 16 times as long as wide the middle is taken.
    """
    pixels = Image.fromarray(np.asarray(picture.convert("RGB")))  # drops all metadata
    picture = middle(pixels)  # many a model's own processor enlarges by the shorter side
    longer = max(size, *picture.size)
    width, height = (max(1, round(side * size / longer)) for side in picture.size)
    while True:
        if (width, height) != picture.size:
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        if max(picture.size) <= TINY and len(encoded := _encode(picture, "PNG")) <= BYTES:
            return encoded
        for quality in QUALITIES:
            if len(encoded := _encode(picture, "JPEG", quality=quality)) <= BYTES:
                return encoded
        if max(picture.size) == 1:
            return encoded  # nothing smaller exists
        width, height = (max(1, side // 2) for side in picture.size)


def encode_pictures(references: Sequence[Picture], size: int) -> tuple[list[bytes | None], list[str | None]]:
    """Encode the N pictures behind references, whole (not cut to a square), as ``encode_picture`` does.

    references: As ``load_pictures`` takes them. size: The longest side in pixels; what a source draws has its own.
    Returns for each picture its bytes, or None; and None, or one line that says why it could not be loaded. Raises
    GeoError when what a source draws from is missing. A bad picture file raises nothing.
    """
    drawn = {i: encode_picture(Image.fromarray(pixels), size) for i, pixels in draw(references).items()}
    results = list(read_pictures(references, lambda image: encode_picture(upright(image), size), drawn))
    encoded = [result if isinstance(result, bytes) else None for result in results]
    return encoded, [result if isinstance(result, str) else None for result in results]


def decode_picture(encoded: bytes) -> Image.Image:
    """Decode the bytes that ``encode_picture`` made to an RGB picture."""
    return Image.open(BytesIO(encoded), formats=("JPEG", "PNG")).convert("RGB")


def media_type(encoded: bytes) -> str:
    """Return ``image/png`` or ``image/jpeg``, whichever the bytes are."""
    return "image/png" if encoded.startswith(b"\x89PNG") else "image/jpeg"


def _encode(picture: Image.Image, kind: str, **options: int) -> bytes:
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()
