"""These functions compare street photos by keypoints that EfficientLoFTR or LightGlue matches and a plane explains.

The models are those of transformers (LightGlue includes SuperPoint), from a folder or a hub, never from pickles. The
distance between photo and neighbor is unknown without the cameras' calibration, so a neighbor keeps its own place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, pad

from rag_geotoken.errors import GeoError
from rag_geotoken.storage.model_folder import FILES, WEIGHTS, brief, find_folder, model_identity, quiet
from rag_geotoken.types import Places

SIDE = 480  # px of a square picture, a multiple of the models' strides
BATCH = 4  # pairs in one pass of the model
GRAY = (0.2989, 0.5870, 0.1140)
MAX_MATCHES = 512  # of a pair, those of the best scores
SAMPLES, SEED = 256, 0  # of four matches each
TOLERANCE = 0.015  # of the side: distance of an inlier from where the plane puts it
CHANCE = 8  # inliers that pictures of different places may have
HALF = 24  # inliers beyond these at which the score is 0.5


class KeypointMatcher:
    """This class scores pairs of square pictures of any size with a keypoint model of transformers.

    model: Of transformers, for keypoint matching. identity: Names the weights, which the scores depend on.
    """

    size, photos = SIDE, 4

    def __init__(self, model: Any, identity: str) -> None:
        self.model, self.identity = model, identity
        # EfficientLoFTR's matched points have the same position in both lists; other models give the partner's index.
        self._paired = model.config.model_type == "efficientloftr"

    @classmethod
    def from_pretrained(cls, name: str | Path) -> KeypointMatcher:
        """Load a folder or a hub's name such as zju-community/efficientloftr; raise GeoError for any other model."""
        from transformers import AutoModelForKeypointMatching

        folder = find_folder(str(name), FILES, [WEIGHTS], "--matcher DIR")
        if not any(folder.glob(WEIGHTS)):
            raise GeoError(f"{folder} has no {WEIGHTS.replace('*', '')}: weights are read from safetensors only")
        try:
            with quiet():
                model, info = AutoModelForKeypointMatching.from_pretrained(
                    folder, use_safetensors=True, local_files_only=True, output_loading_info=True
                )
        except Exception as error:  # transformers raises nearly anything for another kind of model
            raise GeoError(f"{folder} holds no keypoint matcher: {brief(error)}") from None
        if missing := sorted(info["missing_keys"]):
            raise GeoError(f"{folder} lacks weights of a keypoint matcher, such as {missing[0]}: get it again")
        return cls(model.eval(), model_identity(folder))

    @torch.inference_mode()
    def match(self, pixels: NDArray[np.uint8], near: NDArray[np.uint8], places: NDArray[np.float64]) -> Places:
        """Return each neighbor's own place with a score of 0..1 for each pair.

        The score is n / (n + ``HALF``) for n inliers beyond ``CHANCE``, not yet a calibrated probability. 0 for a
        picture of one color, such as the zeros of one that could not be read.
        """
        count, k = near.shape[:2]
        first, second = _gray(pixels).repeat_interleave(k, 0), _gray(near.reshape(-1, *near.shape[2:]))
        varied = [pictures.flatten(1).amax(1) > pictures.flatten(1).amin(1) for pictures in (first, second)]
        inliers = torch.zeros(count * k)
        for rows in torch.split((varied[0] & varied[1]).nonzero()[:, 0], BATCH):
            inliers[rows] = planar_inliers(*self._matches(first[rows], second[rows])).float()
        beyond = (inliers - CHANCE).clamp_min(0)
        return Places(places, (beyond / (beyond + HALF)).view(count, k).numpy())

    def _matches(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the matched points (P, N, 2), 0..1, of gray pictures (P, side, side) each, and their mask (P, N)."""
        output = self.model(pixel_values=torch.stack([first, second], 1)[:, :, None].expand(-1, -1, 3, -1, -1))
        partners, back = output.matches.unbind(1)
        matched = (partners >= 0) & (back >= 0) if self._paired else partners >= 0
        scores = torch.where(matched, output.matching_scores[:, 0], -1.0)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        scores, order = scores[:, :MAX_MATCHES], order[:, :MAX_MATCHES, None].expand(-1, -1, 2)
        partner = order if self._paired else partners.long().clamp_min(0)[..., None].expand(-1, -1, 2).gather(1, order)
        first_points, second_points = output.keypoints.unbind(1)
        mask = (scores >= 0) & torch.isfinite(scores)
        return first_points.gather(1, order), second_points.gather(1, partner), mask


def planar_inliers(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """Count how many of the matched points (P, N, 2), 0..1, that a mask (P, N) selects one homography explains (P,).

    RANSAC (Fischler and Bolles, CACM 24, 1981), all pairs and samples at once: ``SAMPLES`` homographies through four
    matches each, drawn by ``SEED``. The one with the most matches within ``TOLERANCE`` counts, with one match per cell
    of a grid, or a repeated pattern would count too much. A mirror image is not a view.
    """
    pairs, count = mask.shape
    if count < 4:
        return torch.zeros(pairs, dtype=torch.long)
    generator = torch.Generator().manual_seed(SEED)
    weight = mask.float()[:, None].expand(-1, SAMPLES, -1) + 1e-9
    four = torch.multinomial(weight.reshape(-1, count), 4, generator=generator).view(pairs, SAMPLES, 4)
    pick = torch.arange(pairs)[:, None, None]
    planes = homographies(first[pick, four].double(), second[pick, four].double())
    moved = pad(first.double(), (0, 1), value=1.0)[:, None] @ planes.mT  # (P, S, N, 3)
    depth = moved[..., 2:]
    distance = (moved[..., :2] / torch.where(depth.abs() < 1e-9, 1e-9, depth) - second[:, None]).norm(dim=-1)
    # Both views show the same side of the plane: the determinant and the depth keep their signs.
    inside = (distance < TOLERANCE) & (depth[..., 0] > 0) & mask[:, None] & (torch.linalg.det(planes) > 0)[..., None]
    inliers = inside[torch.arange(pairs), inside.sum(-1).argmax(1)]
    return torch.minimum(_occupied(first, inliers), _occupied(second, inliers))


def homographies(first: Tensor, second: Tensor) -> Tensor:
    """Return the homographies (..., 3, 3) of four points (..., 4, 2) to four others, last entry 1; zeros if none."""
    (x, y), (u, v) = first.unbind(-1), second.unbind(-1)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    rows_u = torch.stack([x, y, one, zero, zero, zero, -u * x, -u * y], -1)
    rows_v = torch.stack([zero, zero, zero, x, y, one, -v * x, -v * y], -1)
    solved, failed = torch.linalg.solve_ex(torch.cat([rows_u, rows_v], -2), torch.cat([u, v], -1))
    bad = (failed != 0) | ~torch.isfinite(solved).all(-1)
    return torch.where(bad[..., None, None], 0.0, pad(solved, (0, 1), value=1.0).view(*bad.shape, 3, 3))


def _occupied(points: Tensor, mask: Tensor) -> Tensor:
    """Count the cells of a grid of ``1 / TOLERANCE`` a side that hold a selected point (P,)."""
    side = int(1 / TOLERANCE)
    column, row = (points.clamp(0, 1 - 1e-6) * side).long().unbind(-1)
    occupied = torch.zeros(len(points), side * side + 1, dtype=torch.long)
    occupied.scatter_(1, torch.where(mask, row * side + column, side * side), 1)
    return occupied[:, :-1].sum(1)


def _gray(pictures: NDArray[np.uint8]) -> Tensor:
    """Return pictures (N, S, S, 3) as gray values (N, side, side) of 0..1."""
    values = torch.from_numpy(np.ascontiguousarray(pictures)).float() @ torch.tensor(GRAY) / 255
    if values.shape[-1] == SIDE:
        return values
    return interpolate(values[:, None], (SIDE, SIDE), mode="bilinear", antialias=True)[:, 0]
