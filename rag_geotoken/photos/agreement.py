"""These functions estimate where a photo was taken from its registration with pictures whose places are known.

A registration says where the middle of a neighbor's picture lies in the photo. Rotated by the photo's own turn and
scaled by its own width, both unknown, that is the offset from the photo to the neighbor's place. So every neighbor
votes for a place, and the turn and width under which most of the votes meet in one point are the photo's own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rag_geotoken.geo.sphere import EARTH_RADIUS_KM, Floats, from_unit, to_unit
from rag_geotoken.photos.registration import Registration

# Prior spreads of a view's turn and of the log of its width over the usual one, for photo and neighbors.
TURN_SPREAD, WIDTH_SPREAD = 0.3, 0.2
TURNS, WIDTHS = np.linspace(-0.84, 0.84, 17), np.linspace(-0.5, 0.5, 9)
# Distance at which places agree: first on a grid of turns and widths, then ever smaller in the steps of the fit.
GRID_KM, FIT_KM = 30.0, (30.0, 30.0, 30.0, 10.0, 10.0, 4.0, 4.0, 4.0)
ERROR_KM = 0.5  # of a neighbor's place, against the spreads above
CHUNK = 64  # photos at a time


@torch.inference_mode()
def moved_places(registration: Registration, places: Floats, width_km: float) -> Floats:
    """Return for each neighbor's place (B, K, 2) in degrees where that neighbor says the photo was taken (B, K, 2).

    width_km: The median width of a view, the scale of a photo that agrees with one neighbor only. The photo is a plane
    that touches the sphere (gnomonic projection), rotated against north by what the neighbors agree on.
    """
    result = np.empty_like(places)
    for start in range(0, len(places), CHUNK):
        rows = slice(start, start + CHUNK)
        part = Registration(*(values[rows] for values in vars(registration).values()))
        neighbors = torch.from_numpy(to_unit(places[rows, :, 0], places[rows, :, 1]))
        offsets = _offsets(part.middle, _fit(part, neighbors, width_km)[:, None])
        # The offsets are east and north at the photo, not at the neighbor: a fixed point.
        moved = _move(neighbors, -offsets)
        for _ in range(3):
            moved = _move(moved, _project(moved, neighbors)[0] - offsets)
        result[rows] = np.stack(from_unit(moved.numpy()), axis=-1)
    return result


def _vote(registration: Registration, neighbors: Tensor, width_km: float) -> tuple[Tensor, Tensor]:
    """Return the photo's place (B, 3) and pose (B, 2) that are best on a grid of turns and widths.

    Every neighbor's estimate of the photo's place is a candidate; the other neighbors vote for it by their similarity,
    less so where their estimates lie elsewhere or their own turn or width would be implausible.
    """
    turns, widths = (torch.from_numpy(values).flatten() for values in np.meshgrid(TURNS, WIDTHS))
    poses = _pose(widths, turns, width_km)
    moved = _move(neighbors[:, None], -_offsets(registration.middle[:, None], poses[:, None]))  # (B, M, K, 3)
    square = (2 - 2 * moved @ moved.mT).clamp_min(0) * (EARTH_RADIUS_KM / GRID_KM) ** 2
    penalty = ((turns[:, None] - registration.turn[:, None]) / TURN_SPREAD) ** 2
    penalty = penalty + ((widths[:, None] - registration.ratio[:, None]) / WIDTH_SPREAD) ** 2
    votes = (torch.exp(-0.5 * square) @ (registration.alike[:, None] * torch.exp(-0.5 * penalty))[..., None])[..., 0]
    votes = votes * torch.exp(-0.5 * ((turns / TURN_SPREAD) ** 2 + (widths / WIDTH_SPREAD) ** 2))[:, None]
    best = votes.flatten(1).argmax(dim=1)
    way, neighbor = best // neighbors.shape[1], best % neighbors.shape[1]
    return moved[torch.arange(len(neighbors)), way, neighbor], poses[way]


def _fit(registration: Registration, neighbors: Tensor, width_km: float) -> Tensor:
    """Return the photo's pose (B, 2) by weighted least squares over the neighbors that agree, ever fewer."""
    place, pose = _vote(registration, neighbors, width_km)
    right, down = registration.middle.unbind(-1)
    one, zero = torch.ones_like(right), torch.zeros_like(right)
    # east = p right - q down + shift, north = -q right - p down + shift
    terms = torch.stack([torch.stack([right, -down, one, zero], -1), torch.stack([-down, -right, zero, one], -1)], -2)
    for km in FIT_KM:
        projected, near = _project(place[:, None], neighbors)
        square = (projected - _offsets(registration.middle, pose[:, None])).square().sum(-1)
        weight = registration.alike * torch.exp(-0.5 * square / km**2) * near
        total = weight.sum(1) + 1.0
        log_width, turn = ((weight * values).sum(1) / total for values in (registration.ratio, registration.turn))
        prior_weight = (ERROR_KM / (width_km * WIDTH_SPREAD)) ** 2 * total
        matrix = (terms.mT @ (terms * weight[..., None, None])).sum(1)
        vector = (terms.mT @ (projected * weight[..., None])[..., None]).sum(1)[..., 0]
        matrix[:, [0, 1], [0, 1]] += prior_weight[:, None]
        vector[:, :2] += prior_weight[:, None] * _pose(log_width, turn, width_km)
        solved = torch.linalg.solve(matrix + 1e-9 * torch.eye(4, dtype=torch.float64), vector)
        pose, place = solved[:, :2], _move(place, solved[:, 2:])
    return pose


def _pose(log_width: Tensor, turn: Tensor, width_km: float) -> Tensor:
    """Return (..., 2): a photo's width in km as a complex number, its turn clockwise from north as the angle."""
    return width_km * log_width.exp()[..., None] * torch.stack([turn.cos(), turn.sin()], -1)


def _offsets(middle: Tensor, pose: Tensor) -> Tensor:
    """Return km east and north (..., 2) of points right and down (..., 2) in widths of a photo of a pose (..., 2)."""
    (right, down), (p, q) = middle.unbind(-1), pose.unbind(-1)
    return torch.stack([p * right - q * down, -q * right - p * down], -1)


def _axes(place: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unit vectors east and north at unit vectors (..., 3)."""
    east = torch.stack([-place[..., 1], place[..., 0], torch.zeros_like(place[..., 0])], -1)
    east = east / east.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return east, torch.linalg.cross(place, east)


def _move(place: Tensor, km: Tensor) -> Tensor:
    """Move unit vectors (..., 3) by kilometers east and north (..., 2) in their tangent planes."""
    east, north = _axes(place)
    moved = place + (km[..., :1] * east + km[..., 1:] * north) / EARTH_RADIUS_KM
    unit: Tensor = moved / moved.norm(dim=-1, keepdim=True)
    return unit


def _project(place: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Project points (..., K, 3) onto the tangent plane of a place: km (..., K, 2), and a mask of those near it."""
    east, north = _axes(place)
    cosine = (points * place).sum(-1)
    km = torch.stack([(points * east).sum(-1), (points * north).sum(-1)], -1) * EARTH_RADIUS_KM
    return km / cosine.clamp_min(0.2)[..., None], cosine > 0.9
