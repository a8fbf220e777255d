"""This module finds the S2 cells most similar to a photo's GPS embedding: GeoCLIP's retrieval without a gallery."""

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
KEPT = 32  # coarse cells of a photo whose children are compared


def coarse_cells(gallery: Floats) -> NDArray[np.uint64]:
    """Return the coarse cells of every region that contains one of the places (N, 2), the only ones searched."""
    regions = np.unique(cell_ids(gallery[:, 0], gallery[:, 1], REGION))
    return descendants(regions, REGION, COARSE).ravel()


def cell_vectors(gallery: Floats, embed: Callable[[Floats], NDArray[np.float32]]) -> NDArray[np.float16]:
    """Return embeddings (cells, dim) of the centers of :func:`coarse_cells`, in half precision, for an index."""
    return embed(np.stack(cell_centers(coarse_cells(gallery)), axis=-1)).astype(np.float16)


class GpsSearch:
    """This class compares photos with all coarse cells around the gallery, then with children of the best cells."""

    def __init__(self, alignment: GeoAlignment, index: GeoIndex) -> None:
        """Take the cells' embeddings from the index, or compute them, which takes seconds."""
        self.alignment, self.cells = alignment, coarse_cells(index.lat_lon)
        vectors = index.cell_vectors
        if vectors is None:
            vectors = cell_vectors(index.lat_lon, alignment.embed_places)
        self.vectors = torch.from_numpy(vectors.astype(np.float32))

    @torch.inference_mode()
    def __call__(self, gps: NDArray[np.float32], n: int) -> Places:
        """Return centers and cosines of the ``n`` cells most similar to GPS embeddings (B, dim), best first."""
        best = (torch.from_numpy(gps) @ self.vectors.T).topk(min(max(KEPT, n), len(self.cells))).indices.numpy()
        children = descendants(self.cells[best.ravel()], COARSE, FINE).reshape(len(gps), -1)
        centers = np.stack(cell_centers(children), axis=-1)
        vectors = self.alignment.embed_places(centers.reshape(-1, 2)).reshape(*children.shape, -1)
        scores, order = torch.from_numpy(np.einsum("bd,bpd->bp", gps, vectors)).topk(min(n, children.shape[1]))
        return Places(np.take_along_axis(centers, order.numpy()[..., None], axis=1), scores.numpy())
