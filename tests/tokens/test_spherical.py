"""Spherical rotary positions: a score depends on the relative rotation of two places and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rag_geotoken.geo.sphere import to_unit
from rag_geotoken.tokens.model import attention
from rag_geotoken.tokens.spherical import place_rotations, rotate

# Poles, date line and the middle of the map, whole and a little beside.
EDGES = [(90, 0), (90, 123), (-90, -45), (0, 0), (0, 180), (0, -180), (89.999999, 180), (-12, -179.999999), (90, 180)]


def places(count: int, seed: int = 0) -> Tensor:
    """Places (count, 2) in degrees, even on the sphere."""
    generator = torch.Generator().manual_seed(seed)
    z, share = torch.rand(2, count, generator=generator, dtype=torch.float64) * 2 - 1
    return torch.stack([z.asin().rad2deg(), share * 180], dim=-1)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def any_rotation(seed: int) -> Tensor:
    """A rotation (3, 3) about any axis by any angle."""
    rotation: Tensor = torch.linalg.qr(numbers(3, 3, seed=seed).double())[0]
    return (rotation * rotation.det()).float()


def scores(query: Tensor, key: Tensor, query_turns: Tensor, key_turns: Tensor) -> Tensor:
    return rotate(query, query_turns) @ rotate(key, key_turns).transpose(-1, -2)


def close(given: Tensor, wanted: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(given, wanted, rtol=0, atol=atol)


def test_rotations_are_orthonormal_and_keep_the_hand() -> None:
    rotations = place_rotations(torch.cat([places(1000), torch.tensor(EDGES)]))
    assert rotations.shape == (1000 + len(EDGES), 3, 3) and rotations.dtype == torch.float32
    close(rotations @ rotations.transpose(-1, -2), torch.eye(3).expand_as(rotations), 1e-6)
    close(rotations.det(), torch.ones(len(rotations)), 1e-6)


def test_the_columns_are_the_place_east_and_north() -> None:
    where = torch.cat([places(1000), torch.tensor(EDGES)])
    frames = place_rotations(where)
    wanted = to_unit(where[:, 0].numpy(), where[:, 1].numpy())
    np.testing.assert_allclose(frames[..., 0].numpy(), wanted, rtol=0, atol=1e-7)
    lat, lon = where.deg2rad().unbind(-1)
    east = torch.stack([-lon.sin(), lon.cos(), 0 * lon], dim=-1)
    north = torch.stack([-lat.sin() * lon.cos(), -lat.sin() * lon.sin(), lat.cos()], dim=-1)
    close(frames[..., 1], east.float(), 1e-6)
    close(frames[..., 2], north.float(), 1e-6)


def test_by_hand() -> None:
    assert torch.equal(place_rotations(torch.zeros(2)), torch.eye(3))
    block = torch.tensor([1.0, 0.0, 0.0]).view(1, 1, 1, 3)
    close(rotate(block, place_rotations(torch.tensor([[[0.0, 90.0]]]))).flatten(), torch.tensor([0.0, 1.0, 0.0]), 1e-7)
    close(rotate(block, place_rotations(torch.tensor([[[90.0, 0.0]]]))).flatten(), torch.tensor([0.0, 0.0, 1.0]), 1e-7)


def test_poles_and_date_line() -> None:
    assert place_rotations(torch.tensor(EDGES)).isfinite().all()
    lat = torch.linspace(-90, 90, 37)
    west, east = (place_rotations(torch.stack([lat, torch.full_like(lat, lon)], dim=-1)) for lon in (-180.0, 180.0))
    close(west, east, 1e-7)
    # A step over the date line is a small step.
    close(place_rotations(torch.tensor([10.0, 179.9999])), place_rotations(torch.tensor([10.0, -179.9999])))
    poles = place_rotations(torch.tensor([(90.0, lon) for lon in range(-180, 181, 30)]))[..., 0]
    close(poles, torch.tensor([0.0, 0.0, 1.0]).expand_as(poles), 1e-7)


def test_a_meter_is_distinguished() -> None:
    """Single precision would lose it in the degrees, not in the rotation."""
    near = torch.tensor([[48.85837, 2.294481], [48.85837 + 1e-5, 2.294481]], dtype=torch.float64)
    assert torch.dist(*place_rotations(near)) > 1e-7


@pytest.mark.parametrize("size", [12, 64, 7])
def test_scores_are_those_of_the_relative_rotation(size: int) -> None:
    query, key = numbers(50, 2, 1, size) / size**0.5, numbers(50, 2, 1, size, seed=1)
    first, second = place_rotations(places(50)[:, None]), place_rotations(places(50, seed=1)[:, None])
    identity = torch.eye(3).expand_as(first)
    wanted = scores(query, key, first, second)
    close(scores(query, key, identity, first.transpose(-1, -2) @ second), wanted)
    close(scores(query, key, first, first), query @ key.transpose(-1, -2))
    assert (query @ key.transpose(-1, -2) - wanted).abs().max() > 0.1
    for seed in range(20):
        common = any_rotation(seed)
        close(scores(query, key, common @ first, common @ second), wanted)
    # On one side alone it counts.
    assert (scores(query, key, common @ first, second) - wanted).abs().max() > 0.1


@pytest.mark.parametrize("size", [2, 3, 4, 5, 64])
def test_numbers_left_over_stay(size: int) -> None:
    heads, rotations = numbers(2, 3, 5, size), place_rotations(places(10).view(2, 5, 2))
    turned, whole = rotate(heads, rotations), size // 3 * 3
    assert turned.shape == heads.shape
    assert torch.equal(turned[..., whole:], heads[..., whole:])
    close(turned.norm(dim=-1), heads.norm(dim=-1))
    for start in range(0, whole, 3):
        wanted = (rotations[:, None] @ heads[..., start : start + 3, None])[..., 0]
        close(turned[..., start : start + 3], wanted, 1e-6)


def test_half_precision_stays_half() -> None:
    turned = rotate(numbers(1, 1, 2, 6).bfloat16(), place_rotations(places(2)[None]))
    assert turned.dtype == torch.bfloat16 and turned.isfinite().all()


def test_attention_among_neighbors_does_not_see_where_greenwich_lies() -> None:
    """Turning the Earth about its axis moves every place by one rotation; squeezing it does not."""
    batch, k, each, heads, size = 3, 5, 6, 4, 16
    query, key, value = (numbers(batch, k * each, heads * size, seed=seed) for seed in range(3))
    where = places(batch * k).view(batch, k, 2)

    def attended(around: Tensor) -> Tensor:
        rotations = place_rotations(around).repeat_interleave(each, dim=1)
        return attention(query, key, value, heads=heads, rotations=rotations)

    before = attended(where)
    for longitude in (0.5, 90.0, -137.0, 180.0, 360.0):
        close(attended(where + torch.tensor([0.0, longitude])), before)
    assert (attended(where * torch.tensor([0.5, 1.0])) - before).abs().max() > 0.1
    assert (attention(query, key, value, heads=heads) - before).abs().max() > 0.1
