"""Where a photo was taken, by how it lies to pictures whose places are known: the places must agree.

A registration says where the middle of a neighbor's picture lies in the photo. Turned by the photo's own turn and
scaled by its own width, which nobody tells, that is the way from the photo to the neighbor's place. So every neighbor
moves the photo somewhere, and the turn and width under which most of them move it to one spot are the photo's own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rag_geotoken.geo.sphere import EARTH_RADIUS_KM, Floats, from_unit, to_unit
from rag_geotoken.photos.registration import Registration

# A view's turn, and the logarithm of its width over the usual one, spread so: what is believed of photo and neighbors.
TURN_SPREAD, WIDTH_SPREAD = 0.3, 0.2
TURNS, WIDTHS = np.linspace(-0.84, 0.84, 17), np.linspace(-0.5, 0.5, 9)
# Places agree within so many km, at first on a grid of turns and widths, then ever closer as the fit goes on.
GRID_KM, FIT_KM = 30.0, (30.0, 30.0, 30.0, 10.0, 10.0, 4.0, 4.0, 4.0)
ERROR_KM = 0.5  # of a neighbor's place, against the spreads above
CHUNK = 64  # photos at a time


@torch.inference_mode()
def moved_places(found: Registration, places: Floats, width_km: float) -> Floats:
    """Neighbors' places (B, K, 2) in degrees -> where each says the photo was taken (B, K, 2).

    width_km: of a view in the middle, by which a photo that agrees with one neighbor alone is scaled. On a sphere, the
    photo as a plane that touches it (gnomonic), turned against north by what the neighbors agree on.
    """
    result = np.empty_like(places)
    for start in range(0, len(places), CHUNK):
        at = slice(start, start + CHUNK)
        part = Registration(*(values[at] for values in vars(found).values()))
        spots = torch.from_numpy(to_unit(places[at, :, 0], places[at, :, 1]))
        _, pose = _fit(part, spots, *_vote(part, spots, width_km), width_km)
        result[at] = np.stack(from_unit(_taken_from(spots, _ways(part.middle, pose[:, None])).numpy()), axis=-1)
    return result


def _vote(found: Registration, spots: Tensor, width_km: float) -> tuple[Tensor, Tensor]:
    """The best of a grid of turns and widths -> the photo's place (B, 3), and its pose (B, 2): see :func:`_ways`.

    Every neighbor's view of the photo's place is a candidate; the others vote for it by their likeness, less so where
    they lie elsewhere or would themselves be turned or scaled beyond belief.
    """
    widths, turns = (torch.from_numpy(v).flatten() for v in np.meshgrid(WIDTHS, TURNS, indexing="ij"))
    poses = _pose(widths, turns, width_km)
    moved = _step(spots[:, None], -_ways(found.middle[:, None], poses[:, None]))  # (B, M, K, 3)
    square = (2 - 2 * moved @ moved.mT).clamp_min(0) * (EARTH_RADIUS_KM / GRID_KM) ** 2
    odd = ((turns[:, None] - found.turn[:, None]) / TURN_SPREAD) ** 2
    odd = odd + ((widths[:, None] - found.ratio[:, None]) / WIDTH_SPREAD) ** 2
    votes = (torch.exp(-0.5 * square) @ (found.alike[:, None] * torch.exp(-0.5 * odd))[..., None])[..., 0]
    votes = votes * torch.exp(-0.5 * ((turns / TURN_SPREAD) ** 2 + (widths / WIDTH_SPREAD) ** 2))[:, None]
    best = votes.flatten(1).argmax(dim=1)
    way, every = best // spots.shape[1], torch.arange(len(spots))
    return moved[every, way, best % spots.shape[1]], poses[way]


def _fit(found: Registration, spots: Tensor, place: Tensor, pose: Tensor, width_km: float) -> tuple[Tensor, Tensor]:
    """Place (B, 3) and pose (B, 2) by weighted least squares over the neighbors that agree, ever fewer."""
    right, down = found.middle.unbind(-1)
    one, zero = torch.ones_like(right), torch.zeros_like(right)
    # east = p right - q down + shift, north = -q right - p down + shift
    terms = torch.stack([torch.stack([right, -down, one, zero], -1), torch.stack([-down, -right, zero, one], -1)], -2)
    for km in FIT_KM:
        seen, near = _seen_from(place, spots)
        away = (seen - _ways(found.middle, pose[:, None])).square().sum(-1)
        weight = found.alike * torch.exp(-0.5 * away / km**2) * near
        total = weight.sum(1) + 1.0
        believed = _pose((weight * found.ratio).sum(1) / total, (weight * found.turn).sum(1) / total, width_km)
        sure = (ERROR_KM / (width_km * WIDTH_SPREAD)) ** 2 * total
        normal = (terms.mT @ (terms * weight[..., None, None])).sum(1)
        wanted = (terms.mT @ (seen * weight[..., None])[..., None]).sum(1)[..., 0]
        normal[:, [0, 1], [0, 1]] += sure[:, None]
        wanted[:, :2] += sure[:, None] * believed
        solved = torch.linalg.solve(normal + 1e-9 * torch.eye(4, dtype=torch.float64), wanted)
        pose, place = solved[:, :2], _step(place, solved[:, 2:])
    return place, pose


def _pose(log_width: Tensor, turn: Tensor, width_km: float) -> Tensor:
    """(..., 2): the kilometers of a photo's width as a complex number, its turn clockwise from north as the angle."""
    return width_km * log_width.exp()[..., None] * torch.stack([turn.cos(), turn.sin()], -1)


def _ways(middle: Tensor, pose: Tensor) -> Tensor:
    """Right and down (..., 2) in a photo's widths, under its pose (..., 2) -> kilometers east and north."""
    (right, down), (p, q) = middle.unbind(-1), pose.unbind(-1)
    return torch.stack([p * right - q * down, -q * right - p * down], -1)


def _axes(place: Tensor) -> tuple[Tensor, Tensor]:
    """East and north at unit vectors (..., 3)."""
    east = torch.stack([-place[..., 1], place[..., 0], torch.zeros_like(place[..., 0])], -1)
    east = east / east.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return east, torch.linalg.cross(place, east)


def _step(place: Tensor, km: Tensor) -> Tensor:
    """From unit vectors (..., 3) kilometers east and north (..., 2) in the tangent plane -> unit vectors."""
    east, north = _axes(place)
    there = place + (km[..., :1] * east + km[..., 1:] * north) / EARTH_RADIUS_KM
    unit: Tensor = there / there.norm(dim=-1, keepdim=True)
    return unit


def _seen_from(place: Tensor, spots: Tensor) -> tuple[Tensor, Tensor]:
    """Spots (..., K, 3) in the tangent plane of a place (..., 3) or (..., K, 3): km (..., K, 2), and which are near."""
    place = place if place.dim() == spots.dim() else place[..., None, :]
    east, north = _axes(place)
    cosine = (spots * place).sum(-1)
    km = torch.stack([(spots * east).sum(-1), (spots * north).sum(-1)], -1) * EARTH_RADIUS_KM
    return km / cosine.clamp_min(0.2)[..., None], cosine > 0.9


def _taken_from(spots: Tensor, ways: Tensor) -> Tensor:
    """The places (B, K, 3) from which each spot lies the given way, km east and north there (not at the spot)."""
    place = _step(spots, -ways)
    for _ in range(3):
        place = _step(place, _seen_from(place, spots)[0] - ways)
    return place
