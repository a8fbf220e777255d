"""Street photos against each other: matched keypoints of EfficientLoFTR or LightGlue, as far as a plane explains them.

The models are transformers' (LightGlue brings its SuperPoint), from a folder or a hub, never from pickles. How far from
a neighbor a photo was taken cannot be told without the cameras' calibration: a neighbor keeps its own place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from rag_geotoken.errors import GeoError
from rag_geotoken.storage.model_folder import FILES, WEIGHTS, brief, find_folder, model_identity, quiet
from rag_geotoken.types import Places

SIDE = 480  # px of a square picture, a multiple of the models' strides
PAIRS = 4  # in one pass of the model
GRAY = (0.2989, 0.5870, 0.1140)
MOST = 512  # matches of a pair, the surest
SAMPLES, SEED = 256, 0  # of four matches each
OFF = 0.015  # of the side: how far a match may lie from where the plane puts it
CHANCE = 8  # inliers that unlike pictures have now and then
HALF = 24  # inliers beyond these at which a pair is believed as likely as not


class KeypointMatcher:
    """Loaded once; asked with squares of any size."""

    size, photos = SIDE, 4

    def __init__(self, model: Any, identity: str) -> None:
        """model: transformers' for keypoint matching. identity: which weights the scores follow from."""
        self.model, self.identity = model, identity
        # EfficientLoFTR's matched points stand at the same place of both lists, the others' name each other by index.
        self._paired = model.config.model_type == "efficientloftr"

    @classmethod
    def from_pretrained(cls, name: str | Path) -> KeypointMatcher:
        """A folder or a hub's name, such as zju-community/efficientloftr. Raises GeoError when it is no such model."""
        from transformers import AutoModelForKeypointMatching

        folder = find_folder(str(name), FILES, [WEIGHTS], "--matcher DIR")
        if not any(folder.glob(WEIGHTS)):
            raise GeoError(f"{folder} has no {WEIGHTS.replace('*', '')}: weights are read from safetensors only")
        try:
            with quiet():
                model, told = AutoModelForKeypointMatching.from_pretrained(
                    folder, use_safetensors=True, local_files_only=True, output_loading_info=True
                )
        except Exception as error:  # whatever a folder of another kind makes transformers raise
            raise GeoError(f"{folder} holds no keypoint matcher: {brief(error)}") from None
        if missing := sorted(told["missing_keys"]):
            raise GeoError(f"{folder} lacks weights of a keypoint matcher, such as {missing[0]}: get it again")
        return cls(model.eval(), model_identity(folder))

    @torch.inference_mode()
    def match(self, pixels: NDArray[np.uint8], near: NDArray[np.uint8], places: NDArray[np.float64]) -> Places:
        """Every neighbor puts the photo where it was itself taken, with a score of 0..1.

        Inliers beyond chance by themselves and ``HALF``: not a probability before it is calibrated. 0 for a picture of
        one color, such as the zeros of one that could not be read.
        """
        count, k = near.shape[:2]
        one, other = _gray(pixels).repeat_interleave(k, 0), _gray(near.reshape(-1, *near.shape[2:]))
        inliers = torch.zeros(count * k)
        there = ((one.amax((1, 2)) > one.amin((1, 2))) & (other.amax((1, 2)) > other.amin((1, 2)))).nonzero()[:, 0]
        for rows in torch.split(there, PAIRS):
            inliers[rows] = planar_inliers(*self._matches(one[rows], other[rows])).float()
        beyond = (inliers - CHANCE).clamp_min(0)
        return Places(places, (beyond / (beyond + HALF)).view(count, k).numpy())

    def _matches(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Grey pictures (P, side, side) each -> matched points (P, N, 2) of either, 0..1; which are there (P, N)."""
        pixels = torch.stack([one, other], 1)[:, :, None].expand(-1, -1, 3, -1, -1)
        found = self.model(pixel_values=pixels)
        first, second = found.matches.unbind(1)
        there = (first >= 0) & (second >= 0) if self._paired else first >= 0
        score, order = torch.where(there, found.matching_scores[:, 0], -1.0).sort(dim=1, descending=True, stable=True)
        order, there = order[:, :MOST], (score >= 0)[:, :MOST]
        partner = order if self._paired else first.long().clamp_min(0).gather(1, order)
        points = [
            keypoints.gather(1, at[..., None].expand(-1, -1, 2))
            for keypoints, at in zip(found.keypoints.unbind(1), (order, partner), strict=True)
        ]
        return points[0], points[1], there & torch.isfinite(score)[:, :MOST]


def planar_inliers(one: Tensor, other: Tensor, there: Tensor) -> Tensor:
    """Matched points (P, N, 2), 0..1, and which there are (P, N) -> how many one homography explains (P,).

    RANSAC (Fischler and Bolles, CACM 24, 1981), all pairs and samples at once: ``SAMPLES`` homographies through four
    matches each, drawn by ``SEED``; that of the most matches within ``OFF`` counts, one match for each spot of a grid,
    or a repeated pattern would count for much. A mirror image is no view.
    """
    pairs, count = there.shape
    if count < 4:
        return torch.zeros(pairs, dtype=torch.long)
    generator = torch.Generator().manual_seed(SEED)
    weight = there.float()[:, None].expand(-1, SAMPLES, -1) + 1e-9
    four = torch.multinomial(weight.reshape(-1, count), 4, generator=generator).view(pairs, SAMPLES, 4)
    pick = torch.arange(pairs)[:, None, None]
    planes = homographies(one[pick, four].double(), other[pick, four].double())
    ones = torch.ones(pairs, count, 1, dtype=torch.float64)
    moved = torch.cat([one.double(), ones], -1)[:, None] @ planes.mT  # (P, S, N, 3)
    depth = moved[..., 2:]
    away = (moved[..., :2] / torch.where(depth.abs() < 1e-9, 1e-9, depth) - other[:, None]).norm(dim=-1)
    # The same side of the plane is seen: the determinant and the depth keep their signs.
    inside = (away < OFF) & (depth[..., 0] > 0) & there[:, None] & (torch.linalg.det(planes) > 0)[..., None]
    best = inside.sum(-1).argmax(1)
    chosen = inside[torch.arange(pairs), best]
    return torch.stack([_spots(points, chosen) for points in (one, other)]).amin(0)


def homographies(one: Tensor, other: Tensor) -> Tensor:
    """Four points (..., 4, 2) onto four others -> (..., 3, 3), the last number 1; zeros where there is none."""
    x, y, zero, unit = one[..., 0], one[..., 1], torch.zeros_like(one[..., 0]), torch.ones_like(one[..., 0])
    u, v = other[..., 0], other[..., 1]
    first = torch.stack([x, y, unit, zero, zero, zero, -u * x, -u * y], -1)
    second = torch.stack([zero, zero, zero, x, y, unit, -v * x, -v * y], -1)
    solved, failed = torch.linalg.solve_ex(torch.cat([first, second], -2), torch.cat([u, v], -1)[..., None])
    bad = (failed != 0) | ~torch.isfinite(solved[..., 0]).all(-1)
    planes = torch.cat([solved[..., 0], torch.ones_like(solved[..., 0, :1])], -1)
    planes = planes.view(*planes.shape[:-1], 3, 3)
    return torch.where(bad[..., None, None], 0.0, planes)


def _spots(points: Tensor, chosen: Tensor) -> Tensor:
    """How many cells of a grid of ``1 / OFF`` a side hold a chosen point (P,)."""
    side = int(1 / OFF)
    cells = (points.clamp(0, 1 - 1e-6) * side).long()
    held = torch.zeros(len(points), side * side + 1, dtype=torch.long)
    held.scatter_(1, torch.where(chosen, cells[..., 1] * side + cells[..., 0], side * side), 1)
    return held[:, :-1].sum(1)


def _gray(pictures: NDArray[np.uint8]) -> Tensor:
    """(N, S, S, 3) uint8 -> (N, side, side) of 0..1."""
    values = torch.from_numpy(np.ascontiguousarray(pictures)).float() @ torch.tensor(GRAY) / 255
    if values.shape[-1] == SIDE:
        return values
    return interpolate(values[:, None], (SIDE, SIDE), mode="bilinear", antialias=True)[:, 0]
