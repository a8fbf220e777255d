"""These classes are GeoToken's reward head: how far the truth may be from a cell, by the decoder's state after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from rag_geotoken.storage.weights import Pretrained
from rag_geotoken.types import RADII_KM


@dataclass(frozen=True)
class RewardConfig:
    """This class holds the widths of a :class:`RewardHead`: the token model's, and of the layer between."""

    d_model: int = 192
    hidden: int = 128


class RewardHead(Pretrained):
    """This head has two layers over the state after a cell's last token: a bin of error a radius, and one beyond.

    The released code has two bins, parted at 200 km; here all five radii part them, which an expected utility needs.
    """

    file, config_type = "reward", RewardConfig
    config: RewardConfig

    def __init__(self, config: RewardConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or RewardConfig()
        self.fc1, self.head = nn.Linear(config.d_model, config.hidden), nn.Linear(config.hidden, len(RADII_KM) + 1)

    def forward(self, states: Tensor) -> Tensor:
        """Return logits (..., 6) of the error's bin, up to 1, 25, 200, 750, 2500 km and beyond, of states (..., d)."""
        logits: Tensor = self.head(relu(self.fc1(states)))
        return logits

    @torch.inference_mode()
    def scores(self, states: Tensor) -> Tensor:
        """Return the log (...) of the expected utility, the mean chance to lie within the radii, of states (..., d)."""
        return self.forward(states).softmax(-1).cumsum(-1)[..., :-1].mean(dim=-1).log()
