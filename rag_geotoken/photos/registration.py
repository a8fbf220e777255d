"""Registration of pictures seen from straight above: how a photo lies in the picture of each of its neighbors.

First every turn and scale of a grid at a quarter of the resolution, by masked normalized cross-correlation through the
Fourier transform (Padfield, IEEE Transactions on Image Processing 21, 2012); then the best of them refined to a small
part of a pixel by Gauss-Newton steps in the inverse compositional manner (Baker and Matthews, IJCV 56, 2004), at a
quarter, then at half the resolution. No learning, nothing but pixels: neither width nor turn of a view is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, grid_sample, pad

PIXELS = 64  # of a picture's side, as stages read it: half of them show all that these views hold
SIDE = PIXELS // 2
TURNS = range(-55, 56, 11)  # degrees, of the photo against a neighbor: up to twice a view's own, and a little less
SCALES = tuple(math.exp(0.15 * step) for step in range(-3, 4))  # the photo's width by the neighbor's
RADIUS, REACH = 5, 8  # of the disc that is sought and of where its middle is sought, in quarter pixels
KEPT, STEPS = 2, (4, 4)  # turns and scales that are refined, Gauss-Newton steps at either resolution
NOISE = 2e-5  # variance that a pixel (0..1) has without showing anything
LEAST_COVER, ENOUGH_COVER = 0.2, 0.4  # of the photo by the neighbor's picture
WIDEST = 2.0  # of the ratios that a refined match may have
# Power of the correlation in a score: of right matches it is 0.96 and more, of wrong ones mostly below 0.85.
SHARP = 12.0
CHUNK = 4  # photos at a time: their planes stay in the processor's cache


@dataclass(frozen=True)
class Registration:
    """Where each neighbor's picture lies in the photo (B, K), in double precision but for the last.

    middle (B, K, 2): the middle of the neighbor's picture as seen from the photo's, right and down, in photo widths.
    ratio (B, K): log of the photo's width over the neighbor's, in kilometers. turn (B, K) radians: the photo's less
    the neighbor's, clockwise from north. alike (B, K) 0..1: how far the two show the same ground.
    """

    middle: Tensor
    ratio: Tensor
    turn: Tensor
    alike: Tensor


@torch.inference_mode()
def register(photos: NDArray[np.uint8], near: NDArray[np.uint8]) -> Registration:
    """Photos (B, S, S, 3) against their neighbors' pictures (B, K, S', S', 3), red-green-blue, rows from the top.

    A picture of one color, such as the zeros of one that could not be read, is like nothing.
    """
    parts = []
    for start in range(0, len(photos), CHUNK):
        # Always so many photos, or the same photo would be rounded otherwise alone than among others.
        at = np.minimum(np.arange(start, start + CHUNK), len(photos) - 1)
        photo, other = _planes(photos[at]), _planes(near[at])
        parts.append(_measure(*_refine(photo, other, _search(photo, other))))
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Registration(*(torch.cat(column)[: len(photos)] for column in columns))


def _planes(pictures: NDArray[np.uint8]) -> Tensor:
    """(..., size, size, 3) uint8 -> (..., 3, 32, 32) of 0..1."""
    values = torch.from_numpy(np.ascontiguousarray(pictures)).flatten(0, -4).permute(0, 3, 1, 2).float().div_(255)
    half = adaptive_avg_pool2d(values, SIDE)
    return half.view(*pictures.shape[:-3], *half.shape[1:])


def _measure(warp: Tensor, correlation: Tensor, cover: Tensor) -> Registration:
    a, b, x, y = warp
    square = a**2 + b**2
    right = -(a * x + b * y) / square
    down = -(a * y - b * x) / square
    known = (cover > LEAST_COVER) & (square > WIDEST**-2) & (square < WIDEST**2)
    alike = correlation.clamp(0, 1) ** SHARP * (cover / ENOUGH_COVER).clamp_max(1) * known
    middle = torch.stack([right, down], -1) / SIDE
    return Registration(middle.double(), square.sqrt().log().double(), torch.atan2(b, a).double(), alike)


def _refine(photo: Tensor, near: Tensor, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first guesses (4, B, K * KEPT) refined at a quarter of the resolution, the best (4, B, K) of each at half."""
    count, k = near.shape[:2]
    small = avg_pool2d(near.flatten(0, 1), 2).view(count, k, 1, 3, SIDE // 2, SIDE // 2)
    small = small.expand(-1, -1, KEPT, -1, -1, -1).flatten(1, 2)
    tried, correlation, cover = _gauss_newton(avg_pool2d(photo, 2), small, found, STEPS[0])
    worth = torch.where(cover > LEAST_COVER, correlation * cover.clamp_max(0.5), -1.0)
    best = worth.view(count, k, KEPT).argmax(-1, keepdim=True)
    a, b, x, y = tried.view(4, count, k, KEPT).take_along_dim(best[None], -1)[..., 0]
    return _gauss_newton(photo, near, torch.stack([a, b, 2 * x, 2 * y]), STEPS[1])


def _search(photo: Tensor, near: Tensor) -> Tensor:
    """Photos (B, 3, 32, 32) and pictures (B, K, 3, 32, 32) -> the best warps (4, B, K * KEPT), in quarter pixels.

    A warp (a, b, x, y) takes photo pixels p to neighbor pixels [a -b, b a] p + (x, y), both from the middle.
    A disc of the photo, turned and scaled (M ways), is sought in the picture. The sums under the disc that a masked
    correlation needs depend on either the photo or the neighbor, so only the products are K * M planes.
    """
    count, k = near.shape[:2]
    photo, near = avg_pool2d(photo, 2), avg_pool2d(near.flatten(0, 1), 2).view(count, k, 3, SIDE // 2, SIDE // 2)
    side, edge = photo.shape[-1], (photo.shape[-1] - 1) / 2
    turns = torch.deg2rad(torch.tensor(TURNS, dtype=torch.float32))
    scale, turn = (values.flatten() for values in torch.meshgrid(torch.tensor(SCALES), turns, indexing="ij"))
    down, right = torch.meshgrid(*[torch.arange(-RADIUS, RADIUS + 1.0)] * 2, indexing="ij")
    disc = (right**2 + down**2 <= (RADIUS + 0.5) ** 2).float()
    cos, sin = (turn.cos() / scale)[:, None, None], (turn.sin() / scale)[:, None, None]
    spots = torch.stack([cos * right + sin * down, cos * down - sin * right], -1)
    discs = _sample(photo - photo.mean((-1, -2), keepdim=True), spots.view(1, -1, 2).expand(count, -1, -1))
    discs = discs.view(count, 3, len(turn), *disc.shape).transpose(1, 2) * disc
    near = near - near.mean((-1, -2), keepdim=True)

    # The picture begins where the disc's first place is 0; what wraps around meets only zeros.
    before, places = REACH + RADIUS - math.floor(edge), 2 * REACH + 1
    size = side + before

    def forward(values: Tensor) -> Tensor:
        result: Tensor = torch.fft.rfft2(values, s=(size, size))
        return result

    def back(values: Tensor) -> Tensor:
        planes: Tensor = torch.fft.irfft2(values, s=(size, size))
        return planes[..., :places, :places]

    whole = pad(torch.ones(side, side), (before, 0, before, 0))
    near = pad(near, (before, 0, before, 0))
    everywhere, under, shapes = forward(whole), forward(disc).conj(), forward(discs).conj()
    seen = back(everywhere * under).clamp_min(1.0)  # pixels of the disc inside the picture
    sums = back(forward(near) * under)
    spread = back(forward(near.square().sum(2)) * under) - sums.square().sum(2) / seen + NOISE * disc.sum()
    disc_sums = back(everywhere * shapes)
    disc_spread = back(everywhere * forward(discs.square().sum(2)).conj()) - disc_sums.square().sum(2) / seen
    product = back(torch.einsum("bkcuv,bmcuv->bkmuv", forward(near), shapes))
    product -= torch.einsum("bkcuv,bmcuv->bkmuv", sums, disc_sums / seen)
    product *= spread.rsqrt()[:, :, None]
    product *= (disc_spread + NOISE * disc.sum()).rsqrt()[:, None]
    peaks, at = product.masked_fill_(seen < 0.45 * disc.sum(), -1.0).flatten(-2).max(-1)
    _, ways = peaks.topk(KEPT, -1)
    at, ways = at.gather(2, ways).flatten(1), ways.flatten(1)
    shift = torch.arange(places) - (REACH + edge - math.floor(edge))
    a, b = scale[ways] * turn[ways].cos(), scale[ways] * turn[ways].sin()
    return torch.stack([a, b, shift[at % places], shift[at // places]])


def _sample(planes: Tensor, spots: Tensor) -> Tensor:
    """Planes (N, C, side, side) at spots (N, S, 2), pixels right and down of the middle -> (N, C, S), bilinear."""
    grid = (spots * (2 / planes.shape[-1]))[:, None]
    return grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, :, 0]


def _gauss_newton(photo: Tensor, near: Tensor, warp: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Photos (B, 3, side, side) to pictures (B, N, 3, side, side), from warps (4, B, N) -> warps, likeness and cover.

    Of the squared differences over what both show, gain and a bias a color taken out. The derivatives are the photo's
    and stay as they are, so every sum a step needs is a product of matrices.
    """
    count, n, _, side, _ = near.shape
    edge, flat = (side - 1) / 2, near.flatten(0, 1)
    axis = torch.arange(side) - edge
    down, right = (grid.flatten() for grid in torch.meshgrid(axis, axis, indexing="ij"))
    slope_x = pad((photo[..., 2:] - photo[..., :-2]) / 2, (1, 1)).flatten(2)
    slope_y = pad((photo[..., 2:, :] - photo[..., :-2, :]) / 2, (0, 0, 1, 1)).flatten(2)
    # By scale, turn and shift, (B, 3, S, 4); then laid out for the sums over pixels.
    slopes = torch.stack([slope_x * right + slope_y * down, slope_y * right - slope_x * down, slope_x, slope_y], -1)
    curvature = torch.einsum("bcsi,bcsj->bsij", slopes, slopes).flatten(2)
    by_pixel, by_value = slopes.transpose(1, 2).flatten(2), slopes.flatten(1, 2)
    values = photo.flatten(2)
    powers = torch.cat([values, values.square().sum(1, keepdim=True)], 1).transpose(1, 2)
    inner = ((right.abs() < edge - 0.4) & (down.abs() < edge - 0.4)).float()  # the slope at the rim is not known
    damping, limit = 1e-5 * torch.eye(4), torch.tensor([0.2, 0.2, side / 12, side / 12])
    for step in range(steps + 1):
        a, b, x, y = warp
        across = a[..., None] * right - b[..., None] * down + x[..., None]
        along = b[..., None] * right + a[..., None] * down + y[..., None]
        spots = torch.stack([across, along], -1)
        both = (spots.abs().amax(-1) <= edge) * inner
        seen = both.sum(-1).clamp_min(1.0)
        other = _sample(flat, spots.flatten(0, 1)).view(count, n, 3, -1) * both[:, :, None]
        sums, other_sums, other_flat = both @ powers, other.sum(-1), other.flatten(2)
        spread = sums[..., 3] - sums[..., :3].square().sum(-1) / seen
        other_spread = other_flat.square().sum(-1) - other_sums.square().sum(-1) / seen
        shared = (other_flat @ values.flatten(1)[..., None])[..., 0] - (other_sums * sums[..., :3]).sum(-1) / seen
        if step == steps:
            floor = NOISE * seen
            correlation = shared / ((spread.clamp_min(0) + floor) * (other_spread.clamp_min(0) + floor)).sqrt()
            return warp, correlation, seen / inner.sum()
        gain = (shared / other_spread.clamp_min(1e-4)).clamp(0.4, 2.5)[..., None]
        bias = (sums[..., :3] - gain * other_sums) / seen[..., None]
        error = both[:, :, None] * (values[:, None] - bias[..., None]) - gain[..., None] * other
        means = (both @ by_pixel).view(count, n, 3, 4)
        hessian = (both @ curvature).view(count, n, 4, 4) - means.mT @ means / seen[..., None, None]
        hessian = hessian + 1e-2 * torch.diag_embed(hessian.diagonal(dim1=-2, dim2=-1)) + damping
        change = torch.linalg.solve(hessian, error.flatten(2) @ by_value).clamp(-limit, limit)
        warp = _compose(warp, change)
    raise AssertionError("the last step returns")


def _compose(warp: Tensor, change: Tensor) -> Tensor:
    """Warps (4, B, N) after the inverse of a change (B, N, 4) of the photo's pixels, of which the opposite is given."""
    (a, b, x, y), (scale, turn, right, down) = warp, change.unbind(-1)
    scale, turn, right, down = 1 - scale, -turn, -right, -down
    square = scale**2 + turn**2
    scale, turn = scale / square, -turn / square
    right, down = turn * down - scale * right, -turn * right - scale * down
    return torch.stack([a * scale - b * turn, a * turn + b * scale, a * right - b * down + x, b * right + a * down + y])
