"""These functions keep small copies of a gallery's pictures in its index.

Neighbors can then be shown and compared when the gallery is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rag_geotoken.errors import GeoError
from rag_geotoken.photos.pictures import draw, read_pictures, upright
from rag_geotoken.storage.files import write_whole
from rag_geotoken.types import Picture

BYTES, OFFSETS = "thumbnails.bin", "thumbnails.npy"
QUALITY = 90  # of WebP
BLOCK = 4_096  # rows in memory at a time


@dataclass(frozen=True)
class Thumbnails:
    """This class holds the pictures of an index's rows as WebP.

    The bytes of row i are data[offsets[i]:offsets[i + 1]], none where it has no picture.
    """

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    def __getitem__(self, row: int) -> bytes:
        """Return the bytes of a row's picture."""
        return self.data[self.offsets[row] : self.offsets[row + 1]].tobytes()

    @classmethod
    def load(cls, folder: Path, rows: int) -> Thumbnails:
        """Memory-map the two files of an index; raise GeoError when they do not fit each other or the index."""
        wrong = GeoError(f"the thumbnails in {folder} do not fit the index: build it again")
        try:
            offsets = np.load(folder / OFFSETS, mmap_mode="r", allow_pickle=False)
            size = (folder / BYTES).stat().st_size
            data = np.memmap(folder / BYTES, np.uint8, "r") if size else np.zeros(0, np.uint8)
        except (OSError, ValueError):
            raise wrong from None
        fits = (offsets.shape, offsets.dtype) == ((rows + 1,), np.int64) and offsets[0] == 0 and offsets[-1] == size
        if not fits or (np.diff(offsets) < 0).any():
            raise wrong
        return cls(data, offsets)


def make_thumbnails(references: Sequence[Picture], size: int) -> list[bytes]:
    """Return whole upright pictures, their longer side at most ``size`` px, as WebP without metadata.

    Empty for one that cannot be read. Raises GeoError when the data that a source draws from is missing.
    """
    small = draw(references, size, at_most=True)
    drawn = {i: _encode(Image.fromarray(pixels), size) for i, pixels in small.items()}
    encoded = read_pictures(references, lambda image: _encode(upright(image), size), drawn)
    return [picture if isinstance(picture, bytes) else b"" for picture in encoded]


def write_thumbnails(folder: Path, table: Path, orders: Sequence[NDArray[np.bool_]]) -> None:
    """Write the index's files: the pictures of a stage table that each mask (N,) selects, mask after mask."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    lengths: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]

    def write(beside: Path) -> None:
        with beside.open("wb") as out, pq.ParquetFile(table) as file:
            for mask in orders:
                start = 0
                for batch in file.iter_batches(BLOCK, columns=["picture"]) if mask.any() else ():
                    pictures = batch["picture"].filter(pa.array(mask[start : start + len(batch)]))
                    out.writelines(pictures.to_pylist())
                    lengths.append(pc.binary_length(pictures).to_numpy(zero_copy_only=False))
                    start += len(batch)

    write_whole(folder / BYTES, write)
    offsets = np.cumsum(np.concatenate(lengths))
    write_whole(folder / OFFSETS, lambda beside: np.save(beside, offsets, allow_pickle=False))


def _encode(picture: Image.Image, size: int) -> bytes:
    rgb = picture.convert("RGB")
    rgb.thumbnail((size, size))
    file = BytesIO()
    rgb.save(file, "WEBP", quality=QUALITY, exif=b"", icc_profile=b"", xmp=b"")  # else they are copied from the file
    return file.getvalue()
