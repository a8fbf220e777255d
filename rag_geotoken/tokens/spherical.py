"""These functions give attention spherical rotary positions: scores depend on how two places lie, not on an order.

After Unlu's geotransformers (arXiv 2310.04454, 2403.15940): as rotary encoding rotates pairs of numbers by an angle
that grows with the position, each block of three numbers of a query and a key is rotated by what takes a fixed frame to
the place. A score then depends on the relative rotation of two places alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def place_rotations(places: Tensor) -> Tensor:
    """Return the rotations (..., 3, 3) that take a fixed frame to places (..., 2), latitude and longitude in degrees.

    R = Rz(lon) Ry(-lat): its first column is the place as a unit vector, (0, 0) gives the identity.
    """
    lat, lon = places.double().deg2rad().unbind(-1)
    sin_lat, cos_lat, sin_lon, cos_lon = lat.sin(), lat.cos(), lon.sin(), lon.cos()
    elements = [cos_lat * cos_lon, -sin_lon, -sin_lat * cos_lon]
    elements += [cos_lat * sin_lon, cos_lon, -sin_lat * sin_lon]
    elements += [sin_lat, torch.zeros_like(lat), cos_lat]
    return torch.stack(elements, dim=-1).view(*lat.shape, 3, 3).float()


def rotate(heads: Tensor, rotations: Tensor) -> Tensor:
    """Rotate every block of three numbers of queries or keys (B, H, S, D) by rotations (B, S, 3, 3).

    One or two numbers may be left over. By hand: with the place (0, 90), the block (1, 0, 0) becomes (0, 1, 0).
    """
    whole = heads.shape[-1] // 3 * 3
    blocks = heads[..., :whole].reshape(*heads.shape[:-1], whole // 3, 3)
    rotated = torch.einsum("bsij,bhsnj->bhsni", rotations.to(heads.dtype), blocks)
    return torch.cat([rotated.flatten(-2), heads[..., whole:]], dim=-1)
