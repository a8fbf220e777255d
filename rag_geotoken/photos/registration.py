"""These functions register pictures from straight above: how a photo lies in the picture of each of its neighbors.

First every rotation and scale of a grid is tried at a quarter of the resolution, by masked normalized cross-correlation
through the Fourier transform (Padfield, IEEE Transactions on Image Processing 21, 2012). The best are refined to a
small part of a pixel by Gauss-Newton steps in the inverse compositional manner (Baker and Matthews, IJCV 56, 2004), at
a quarter, then at half the resolution. Nothing is learned, and neither the width nor the rotation of a view is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, grid_sample, pad

PIXELS = 64  # side of a picture as stages read it: half of them show all that these views hold
SIDE = PIXELS // 2
TURNS = range(-55, 56, 11)  # degrees, of the photo against a neighbor: up to nearly twice a view's own
SCALES = tuple(math.exp(0.15 * step) for step in range(-3, 4))  # the photo's width over the neighbor's
RADIUS, REACH = 5, 8  # of the template disc and of the search for its center, in quarter pixels
KEPT, STEPS = 2, (4, 4)  # rotations and scales that are refined, Gauss-Newton steps at either resolution
NOISE = 2e-5  # variance of a pixel (0..1) that shows nothing
LEAST_COVER, ENOUGH_COVER = 0.2, 0.4  # of the photo by the neighbor's picture
WIDEST = 2.0  # largest scale of a refined match
# Exponent of the correlation in a score: right matches have a correlation of 0.96 and more, most wrong ones below 0.85.
SHARP = 12.0
CHUNK = 4  # photos at a time: their planes stay in the processor's cache


@dataclass(frozen=True)
class Registration:
    """This class holds where the picture of each neighbor lies in the photo (B, K), as float64 except ``alike``.

    middle (B, K, 2): The middle of the neighbor's picture relative to the photo's, right and down, in photo widths.
    ratio (B, K): Log of the photo's width over the neighbor's, in kilometers. turn (B, K): The photo's rotation minus
    the neighbor's in radians, clockwise from north. alike (B, K), 0..1: How far the two show the same ground.
    """

    middle: Tensor
    ratio: Tensor
    turn: Tensor
    alike: Tensor


@torch.inference_mode()
def register(photos: NDArray[np.uint8], near: NDArray[np.uint8]) -> Registration:
    """Register photos (B, S, S, 3) with their neighbors' pictures (B, K, S', S', 3), RGB, rows from the top.

    A picture of one color, such as the zeros of one that could not be read, is like none.
    """
    parts = []
    for start in range(0, len(photos), CHUNK):
        # Batches of equal size round a photo in the same way whether it is alone or among others.
        rows = np.minimum(np.arange(start, start + CHUNK), len(photos) - 1)
        parts.append(_align(_planes(photos[rows]), _planes(near[rows])))
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Registration(*(torch.cat(column)[: len(photos)] for column in columns))


def _planes(pictures: NDArray[np.uint8]) -> Tensor:
    """Return pictures (..., size, size, 3) as planes (..., 3, 32, 32) of 0..1."""
    values = torch.from_numpy(np.ascontiguousarray(pictures)).flatten(0, -4).permute(0, 3, 1, 2).float().div_(255)
    half = adaptive_avg_pool2d(values, SIDE)
    return half.view(*pictures.shape[:-3], *half.shape[1:])


def _align(photo: Tensor, near: Tensor) -> Registration:
    """Search and refine warps of photos (B, 3, 32, 32) to pictures (B, K, 3, 32, 32).

    A warp (a, b, x, y) takes photo pixels p to neighbor pixels [a -b, b a] p + (x, y), both from the middle.
    """
    quarter_photo = avg_pool2d(photo, 2)
    quarter_near = avg_pool2d(near.flatten(0, 1), 2).view(*near.shape[:3], SIDE // 2, SIDE // 2)
    guesses = _search(quarter_photo, quarter_near)
    repeated = quarter_near.repeat_interleave(KEPT, 1)
    warps, correlation, cover = _gauss_newton(quarter_photo, repeated, guesses, steps=STEPS[0])
    quality = torch.where(cover > LEAST_COVER, correlation * cover.clamp_max(0.5), -1.0)
    best = quality.view(len(photo), -1, KEPT).argmax(-1, keepdim=True)
    a, b, x, y = warps.view(4, len(photo), -1, KEPT).take_along_dim(best[None], -1)[..., 0]
    warp, correlation, cover = _gauss_newton(photo, near, torch.stack([a, b, 2 * x, 2 * y]), steps=STEPS[1])

    a, b, x, y = warp
    square = a**2 + b**2
    middle = torch.stack([-(a * x + b * y) / square, -(a * y - b * x) / square], -1) / SIDE
    valid = (cover > LEAST_COVER) & (square > WIDEST**-2) & (square < WIDEST**2)
    alike = correlation.clamp(0, 1) ** SHARP * (cover / ENOUGH_COVER).clamp_max(1) * valid
    return Registration(middle.double(), square.sqrt().log().double(), torch.atan2(b, a).double(), alike)


def _search(photo: Tensor, near: Tensor) -> Tensor:
    """Return the best warps (4, B, K * KEPT) of photos (B, 3, 16, 16) to pictures (B, K, 3, 16, 16).

    A disc of the photo, rotated and scaled (M ways), is the template. The sums under the disc that a masked correlation
    needs depend on either the photo or the neighbor, so only the products are K * M planes.
    """
    side, edge = photo.shape[-1], (photo.shape[-1] - 1) / 2
    turns = torch.deg2rad(torch.tensor(TURNS, dtype=torch.float32))
    turn, scale = (values.flatten() for values in torch.meshgrid(turns, torch.tensor(SCALES), indexing="xy"))
    right, down = torch.meshgrid(*[torch.arange(-RADIUS, RADIUS + 1.0)] * 2, indexing="xy")
    disc = (right**2 + down**2 <= (RADIUS + 0.5) ** 2).float()
    cos, sin = (turn.cos() / scale)[:, None, None], (turn.sin() / scale)[:, None, None]
    points = torch.stack([cos * right + sin * down, cos * down - sin * right], -1)
    points = points.view(1, -1, 2).expand(len(photo), -1, -1)
    templates = _sample(photo - photo.mean((-1, -2), keepdim=True), points)
    templates = templates.view(len(photo), 3, len(turn), *disc.shape).transpose(1, 2) * disc

    # The picture begins where the disc's first place is 0; what wraps around meets only zeros.
    before, places = REACH + RADIUS - math.floor(edge), 2 * REACH + 1
    size = side + before

    def forward(values: Tensor) -> Tensor:
        spectrum: Tensor = torch.fft.rfft2(values, s=(size, size))
        return spectrum

    def back(spectrum: Tensor) -> Tensor:
        planes: Tensor = torch.fft.irfft2(spectrum, s=(size, size))
        return planes[..., :places, :places]

    near = pad(near - near.mean((-1, -2), keepdim=True), (before, 0, before, 0))
    mask = forward(pad(torch.ones(side, side), (before, 0, before, 0)))
    disc_mask, spectra = forward(disc).conj(), forward(templates).conj()
    count = back(mask * disc_mask).clamp_min(1.0)  # pixels of the disc inside the picture
    sums, template_sums = back(forward(near) * disc_mask), back(mask * spectra)
    noise = NOISE * disc.sum()
    spread = back(forward(near.square().sum(2)) * disc_mask) - sums.square().sum(2) / count + noise
    template_squares = back(mask * forward(templates.square().sum(2)).conj())
    template_spread = template_squares - template_sums.square().sum(2) / count
    product = back(torch.einsum("bkcuv,bmcuv->bkmuv", forward(near), spectra))
    product -= torch.einsum("bkcuv,bmcuv->bkmuv", sums, template_sums / count)
    product *= spread.rsqrt()[:, :, None]
    product *= (template_spread + noise).rsqrt()[:, None]
    peaks, position = product.masked_fill_(count < 0.45 * disc.sum(), -1.0).flatten(-2).max(-1)
    _, ways = peaks.topk(KEPT, -1)
    position, ways = position.gather(2, ways).flatten(1), ways.flatten(1)
    shift = torch.arange(places) - (REACH + edge - math.floor(edge))
    a, b = scale[ways] * turn[ways].cos(), scale[ways] * turn[ways].sin()
    return torch.stack([a, b, shift[position % places], shift[position // places]])


def _sample(planes: Tensor, points: Tensor) -> Tensor:
    """Sample planes (N, C, side, side) bilinearly at points (N, S, 2), pixels right and down of the middle."""
    grid = (points * (2 / planes.shape[-1]))[:, None]
    return grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, :, 0]


def _gauss_newton(photo: Tensor, near: Tensor, warp: Tensor, *, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Refine warps (4, B, N) of photos (B, 3, side, side) to pictures (B, N, 3, side, side).

    Returns the warps, correlations and covers. The error is the squared difference where both are known, without a
    gain and a bias of each color. The derivatives are the photo's and stay fixed, so all sums of a step are products of
    matrices.
    """
    count, side = near.shape[1], near.shape[-1]
    edge, flat = (side - 1) / 2, near.flatten(0, 1)
    axis = torch.arange(side) - edge
    right, down = (grid.flatten() for grid in torch.meshgrid(axis, axis, indexing="xy"))
    slope_x = pad((photo[..., 2:] - photo[..., :-2]) / 2, (1, 1)).flatten(2)
    slope_y = pad((photo[..., 2:, :] - photo[..., :-2, :]) / 2, (0, 0, 1, 1)).flatten(2)
    # By scale, rotation and shift, (B, 3, S, 4); then laid out for the sums over pixels.
    slopes = torch.stack([slope_x * right + slope_y * down, slope_y * right - slope_x * down, slope_x, slope_y], -1)
    curvature = torch.einsum("bcsi,bcsj->bsij", slopes, slopes).flatten(2)
    by_pixel, by_value = slopes.transpose(1, 2).flatten(2), slopes.flatten(1, 2)
    values = photo.flatten(2)
    powers = torch.cat([values, values.square().sum(1, keepdim=True)], 1).transpose(1, 2)
    inner = ((right.abs() < edge - 0.4) & (down.abs() < edge - 0.4)).float()  # the slope at the rim is not known
    damping, limit = 1e-5 * torch.eye(4), torch.tensor([0.2, 0.2, side / 12, side / 12])
    while True:
        a, b, x, y = warp[..., None]
        points = torch.stack([a * right - b * down + x, b * right + a * down + y], -1)
        mask = (points.abs().amax(-1) <= edge) * inner
        area = mask.sum(-1).clamp_min(1.0)
        neighbor = _sample(flat, points.flatten(0, 1)).view(-1, count, 3, side * side) * mask[:, :, None]
        sums, near_sums, near_values = mask @ powers, neighbor.sum(-1), neighbor.flatten(2)
        spread = sums[..., 3] - sums[..., :3].square().sum(-1) / area
        near_spread = near_values.square().sum(-1) - near_sums.square().sum(-1) / area
        shared = (near_values @ values.flatten(1)[..., None])[..., 0] - (near_sums * sums[..., :3]).sum(-1) / area
        if steps == 0:
            noise = NOISE * area
            correlation = shared / ((spread.clamp_min(0) + noise) * (near_spread.clamp_min(0) + noise)).sqrt()
            return warp, correlation, area / inner.sum()
        steps -= 1
        gain = (shared / near_spread.clamp_min(1e-4)).clamp(0.4, 2.5)[..., None]
        bias = (sums[..., :3] - gain * near_sums) / area[..., None]
        error = mask[:, :, None] * (values[:, None] - bias[..., None]) - gain[..., None] * neighbor
        means = (mask @ by_pixel).view(-1, count, 3, 4)
        hessian = (mask @ curvature).view(-1, count, 4, 4) - means.mT @ means / area[..., None, None]
        hessian = hessian + 1e-2 * torch.diag_embed(hessian.diagonal(dim1=-2, dim2=-1)) + damping
        change = torch.linalg.solve(hessian, error.flatten(2) @ by_value).clamp(-limit, limit)
        warp = _compose(warp, change)


def _compose(warp: Tensor, change: Tensor) -> Tensor:
    """Compose warps (4, B, N) with the inverse of the opposite of a change (B, N, 4) of the photo's pixels."""
    (a, b, x, y), (scale, turn, right, down) = warp, change.unbind(-1)
    scale, turn, right, down = 1 - scale, -turn, -right, -down
    square = scale**2 + turn**2
    scale, turn = scale / square, -turn / square
    right, down = turn * down - scale * right, -turn * right - scale * down
    return torch.stack([a * scale - b * turn, a * turn + b * scale, a * right - b * down + x, b * right + a * down + y])
