"""GeoCLIP's retrieval works here without a list of places: over S2 cells, coarse to fine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.geo.cells import cell_centers, cell_ids, descendants
from rag_geotoken.geo.sphere import Floats
from rag_geotoken.index.geo_index import GeoIndex
from rag_geotoken.types import Places

REGION, COARSE, FINE = 4, 8, 9  # S2 levels: cells of about 580, 36 and 18 km
KEPT = 32  # coarse cells a photo whose parts are looked at


def coarse_cells(gallery: Floats) -> NDArray[np.uint64]:
    """Return the coarse cells of every region that has one of the places (N, 2): elsewhere no place is sought."""
    regions = np.unique(cell_ids(gallery[:, 0], gallery[:, 1], REGION))
    return descendants(regions, REGION, COARSE).ravel()


def cell_vectors(gallery: Floats, embed: Callable[[Floats], NDArray[np.float32]]) -> NDArray[np.float16]:
    """Embed the centers of :func:`coarse_cells` as (cells, dim) in half precision: an index keeps them."""
    return embed(np.stack(cell_centers(coarse_cells(gallery)), axis=-1)).astype(np.float16)


class GpsSearch:
    """This search compares a photo with all cells around the gallery, then with the parts of the best ones."""

    def __init__(self, alignment: GeoAlignment, index: GeoIndex) -> None:
        """Take the cells' embeddings that the index keeps, or make them now, which takes seconds."""
        self.alignment, self.cells = alignment, coarse_cells(index.lat_lon)
        kept = index.cell_vectors
        vectors = cell_vectors(index.lat_lon, alignment.embed_places) if kept is None else kept
        self.vectors = torch.from_numpy(vectors.astype(np.float32))

    @torch.inference_mode()
    def __call__(self, gps: NDArray[np.float32], n: int) -> Places:
        """GPS embeddings (B, dim) of photos -> the centers and cosines of the ``n`` best cells, best first."""
        best = (torch.from_numpy(gps) @ self.vectors.T).topk(min(max(KEPT, n), len(self.cells))).indices.numpy()
        parts = descendants(self.cells[best.ravel()], COARSE, FINE).reshape(len(gps), -1)
        centers = np.stack(cell_centers(parts), axis=-1)
        vectors = self.alignment.embed_places(centers.reshape(-1, 2)).reshape(*parts.shape, -1)
        scores, order = torch.from_numpy(np.einsum("bd,bpd->bp", gps, vectors)).topk(min(n, parts.shape[1]))
        return Places(np.take_along_axis(centers, order.numpy()[..., None], axis=1), scores.numpy())
