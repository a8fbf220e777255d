"""This module holds the small Earth encoder: a residual convolutional network for 64 x 64 satellite views."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class EarthEncoder(nn.Module):
    """This network encodes views (N, 64, 64, 3) uint8 RGB as features (N, dim) float32.

    The last 4 x 4 feature map is flattened, not averaged: where in the view a coast runs says where the view lies.
    """

    def __init__(self, dim: int = 256, widths: tuple[int, ...] = (32, 64, 128, 256)) -> None:
        super().__init__()
        stages: list[nn.Module] = [_conv(6, widths[0], stride=2)]
        for before, after in pairwise(widths):
            stages += [_conv(before, after, stride=2), Residual(after)]
        self.stages = nn.Sequential(*stages)
        self.narrow = _conv(widths[-1], 96, size=1)
        self.project = nn.Linear(96 * (64 >> len(widths)) ** 2, dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features (N, dim) of pixels (N, 64, 64, 3) uint8."""
        maps = self.narrow(self.stages(_channels(pixels)))
        features: Tensor = self.project(maps.permute(0, 2, 3, 1).flatten(1))
        return features


class Residual(nn.Module):
    """This layer has two 3 x 3 convolutions around a skip (He et al., CVPR 2016)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _conv(width, width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, maps: Tensor) -> Tensor:
        """Return feature maps (N, C, H, W) for maps of that shape."""
        return torch.relu(maps + self.norm(self.second(self.first(maps))))


def _conv(before: int, after: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(before, after, size, stride=stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True))


def _channels(pixels: Tensor) -> Tensor:
    """Return (N, 6, H, W): the colors, and the colors with the view's own mean and contrast removed.

    The second three show the faint structure of deserts and forests whatever the light.
    """
    colors = pixels.permute(0, 3, 1, 2).float() / 255.0 - 0.4
    centered = colors - colors.mean(dim=(2, 3), keepdim=True)
    contrast = centered.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() + 0.01
    return torch.cat([colors * 4.0, centered / contrast], dim=1).contiguous(memory_format=torch.channels_last)
