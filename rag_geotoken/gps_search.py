"""GeoCLIP's retrieval without a list of places: the S2 cells most like a photo's GPS embedding, coarse to fine."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from rag_geotoken.alignment import GeoAlignment
from rag_geotoken.cells import cell_centers, cell_ids
from rag_geotoken.posterior import descendants
from rag_geotoken.types import Places

REGION, COARSE, FINE = 4, 8, 9  # S2 levels: cells of about 580, 36 and 18 km
KEPT = 32  # coarse cells a photo whose parts are looked at


class GpsSearch:
    """Places in every region that has a gallery photo, embedded once: all are compared, then the best ones' parts."""

    def __init__(self, alignment: GeoAlignment, gallery: NDArray[np.float64]) -> None:
        """Gallery (rows, 2) degrees: where nothing is known of a region, no place is sought."""
        self.alignment = alignment
        regions = np.unique(cell_ids(gallery[:, 0], gallery[:, 1], REGION))
        self.cells = descendants(regions, REGION, COARSE).ravel()
        self.vectors = torch.from_numpy(alignment.embed_places(np.stack(cell_centers(self.cells), axis=-1)))

    @torch.inference_mode()
    def __call__(self, gps: NDArray[np.float32], n: int) -> Places:
        """GPS embeddings (B, dim) of photos -> the centres and cosines of the ``n`` best cells, best first."""
        best = (torch.from_numpy(gps) @ self.vectors.T).topk(min(max(KEPT, n), len(self.cells))).indices.numpy()
        parts = descendants(self.cells[best.ravel()], COARSE, FINE).reshape(len(gps), -1)
        centers = np.stack(cell_centers(parts), axis=-1)
        vectors = self.alignment.embed_places(centers.reshape(-1, 2)).reshape(*parts.shape, -1)
        scores, order = torch.from_numpy(np.einsum("bd,bpd->bp", gps, vectors)).topk(min(n, parts.shape[1]))
        return Places(np.take_along_axis(centers, order.numpy()[..., None], axis=1), scores.numpy())
