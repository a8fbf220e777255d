"""Small copies of a gallery's pictures, kept in its index: neighbors can be looked at when the gallery is gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.errors import GeoError
from rag_geotoken.photos.pictures import draw, read_pictures, upright
from rag_geotoken.storage.files import write_whole
from rag_geotoken.types import Picture

if TYPE_CHECKING:
    from PIL import Image

BYTES, OFFSETS = "thumbnails.bin", "thumbnails.npy"
QUALITY = 90  # of WebP
BLOCK = 4_096  # rows in memory at a time


@dataclass(frozen=True)
class Thumbnails:
    """Pictures of an index's rows as WebP: the bytes of row i are data[offsets[i]:offsets[i + 1]], none where empty."""

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    def __getitem__(self, row: int) -> bytes:
        """The bytes of a row's picture."""
        return self.data[self.offsets[row] : self.offsets[row + 1]].tobytes()

    @classmethod
    def load(cls, folder: Path, rows: int) -> Thumbnails:
        """Memory-map the two files of an index. Raises GeoError when they do not fit each other or the index."""
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
    """Pictures behind references, whole and upright, their longer side at most ``size`` px, as WebP without metadata.

    Empty for one that cannot be read. Raises GeoError when what a source draws from is not there.
    """
    from PIL import Image

    small = draw(references, size, at_most=True)
    drawn = {i: _encode(Image.fromarray(pixels), size) for i, pixels in small.items()}
    made = read_pictures(references, lambda image: _encode(upright(image), size), drawn)
    return [picture if isinstance(picture, bytes) else b"" for picture in made]


def write_thumbnails(folder: Path, table: Path, orders: Sequence[NDArray[np.bool_]]) -> None:
    """The pictures of a stage table that each mask (N,) lets through, mask after mask, as the index's files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lengths: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]

    def write(beside: Path) -> None:
        with beside.open("wb") as out, pq.ParquetFile(table) as file:
            for keep in (mask for mask in orders if mask.any()):
                done = 0
                for batch in file.iter_batches(BLOCK, columns=["picture"]):
                    pictures = batch["picture"].filter(pa.array(keep[done : done + len(batch)])).to_pylist()
                    out.writelines(pictures)
                    lengths.append(np.array([len(picture) for picture in pictures], np.int64))
                    done += len(batch)

    write_whole(folder / BYTES, write)
    offsets = np.cumsum(np.concatenate(lengths))
    write_whole(folder / OFFSETS, lambda beside: np.save(beside, offsets, allow_pickle=False))


def _encode(picture: Image.Image, size: int) -> bytes:
    rgb = picture.convert("RGB")
    rgb.thumbnail((size, size))
    file = BytesIO()
    rgb.save(file, "WEBP", quality=QUALITY, exif=b"", icc_profile=b"", xmp=b"")  # else what the file had goes along
    return file.getvalue()
