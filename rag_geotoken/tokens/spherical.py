"""Spherical rotary positions: attention whose scores depend on how two places lie to each other, not on an order.

After Unlu's geotransformers (arXiv 2310.04454, 2403.15940): as rotary encoding turns pairs of numbers by an angle that
grows with the position, each block of three numbers of a query and a key is turned by the rotation that takes a fixed
frame to the place. A score then sees the relative rotation of two places alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotations(places: Tensor) -> Tensor:
    """Places (..., 2) latitude and longitude in degrees -> rotations (..., 3, 3).

    R = Rz(lon) Ry(-lat): its first column is the place as a unit vector, (0, 0) gives the identity.
    """
    lat, lon = places.double().deg2rad().unbind(-1)
    sin_lat, cos_lat, sin_lon, cos_lon = lat.sin(), lat.cos(), lon.sin(), lon.cos()
    zero = torch.zeros_like(lat)
    rows = [
        torch.stack([cos_lat * cos_lon, -sin_lon, -sin_lat * cos_lon], dim=-1),
        torch.stack([cos_lat * sin_lon, cos_lon, -sin_lat * sin_lon], dim=-1),
        torch.stack([sin_lat, zero, cos_lat], dim=-1),
    ]
    return torch.stack(rows, dim=-2).float()


def rotate(heads: Tensor, turns: Tensor) -> Tensor:
    """Queries or keys (B, H, S, D) turned by (B, S, 3, 3): every block of three of D; one or two numbers may be left.

    By hand: with the place (0, 90), the block (1, 0, 0) becomes (0, 1, 0).
    """
    whole = heads.shape[-1] // 3 * 3
    blocks = heads[..., :whole].reshape(*heads.shape[:-1], whole // 3, 3)
    turned = torch.einsum("bsij,bhsnj->bhsni", turns.to(heads.dtype), blocks)
    return torch.cat([turned.flatten(-2), heads[..., whole:]], dim=-1)
