"""These are the photos that the heads are trained on: a frozen backbone's embeddings of pictures and place texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.errors import GeoError
from rag_geotoken.run.build_index import project
from rag_geotoken.run.resumable import run_stage
from rag_geotoken.run.walk import write_photos
from rag_geotoken.storage.parquet import fixed_list, read_table, to_numpy

STREET_VIEW = "A street view photo taken in {}"  # G3's text of a place
BLOCK = 4096


@dataclass(frozen=True)
class Examples:
    """This class holds N photos out of M, on the CPU.

    rows (N,) int64: which of the M. features (M, dim) half, of the backbone; lat_lon (M, 2) degrees float64; texts
    (T, dim) half, of the backbone's text tower; text_of (M,) int64 rows of texts, -1 for a photo without a place name.
    """

    rows: Tensor
    features: Tensor
    lat_lon: Tensor
    texts: Tensor
    text_of: Tensor

    def batch(self, drawn: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """Return features (B, dim), lat_lon (B, 2), texts (B, dim) and text_of (B,) of the photos drawn (B,) of N."""
        rows = self.rows[drawn]
        text_of = self.text_of[rows]
        tensors = self.features[rows].float(), self.lat_lon[rows], self.texts[text_of.clamp(min=0)].float(), text_of
        return tuple(tensor.to(device) for tensor in tensors)


def write_examples(folder: Path, source: str, alignment: GeoAlignment) -> None:
    """Write a source's stage tables photos, projections and texts; an index is made from the first two."""
    photos = write_photos(folder, source)
    project(folder, alignment)
    names = read_table(photos, ["place"])["place"].unique().drop_null().to_pylist() or [""]

    def work(block: slice) -> pa.Table:
        vectors = alignment.backbone.texts([STREET_VIEW.format(name) for name in names[block]])
        return pa.table({"place": names[block], "text": fixed_list(vectors.numpy().astype(np.float16))})

    recipe = {"encoder": alignment.encoder_identity, "words": STREET_VIEW}
    run_stage(folder, "texts", recipe, ["photos"], names, work, block=BLOCK)


def read_examples(folder: Path, held_out: int, seed: int) -> tuple[Examples, Examples]:
    """Read the photos to train on and ``held_out`` random ones to validate by, whose pixels are not trained on.

    Raises GeoError when nothing is left to train on.
    """
    photos = read_table(folder / "photos.parquet", ["lat", "lon", "place"])
    projections, texts = read_table(folder / "projections.parquet"), read_table(folder / "texts.parquet")
    lat_lon = np.column_stack([photos["lat"], photos["lon"]])
    text_of = pa.compute.index_in(photos["place"], value_set=texts["place"].combine_chunks()).fill_null(-1)
    usable = np.flatnonzero(projections["error"].is_null().to_numpy() & np.isfinite(lat_lon).all(axis=1))
    validation = np.random.default_rng([seed, held_out]).permutation(usable)[:held_out]
    digests = projections["digest"].take(validation)
    copies = pa.compute.is_in(projections["digest"], value_set=digests.combine_chunks()).to_numpy()
    train = usable[~copies[usable]]
    if not len(train):
        raise GeoError(f"{folder.name} has no photo with a place that is not held out: hold out fewer than {held_out}")
    arrays = to_numpy(projections["projection"]), lat_lon, to_numpy(texts["text"]), text_of.to_numpy().astype(np.int64)
    shared = [torch.from_numpy(array) for array in arrays]
    return Examples(torch.from_numpy(train), *shared), Examples(torch.from_numpy(validation), *shared)
