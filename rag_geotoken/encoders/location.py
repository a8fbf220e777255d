"""These location encoders embed places, given in degrees, latitude first.

:class:`LocationEncoder` is GeoCLIP's and G3's, on a map projection; :class:`HarmonicEncoder` is SatCLIP's, on spherical
harmonics; :class:`UnitVectorEncoder` takes random Fourier features of the unit vector. On a projection a pole is a line
and the date line an edge; the other two have neither seam nor pole.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from rag_geotoken.encoders.dense import in_blocks
from rag_geotoken.errors import GeoError
from rag_geotoken.storage.weights import Pretrained

WEB_MERCATOR_RADIUS, WEB_MERCATOR_EDGE = 6378137.0, 20037508.3427892  # meters (EPSG:3857)


def equal_earth(lat_lon: Tensor) -> Tensor:
    """Project places (N, 2) to x, y (N, 2) of Equal Earth, times 66.50336 / 180 as GeoCLIP has it.

    Polynomial of Savric, Patterson and Jenny (IJGIS 33, 2019). By hand: the equator at the date line is x = 1.0000.
    """
    # In single precision, as the released weights were trained: their finest frequencies tell the difference.
    phi, lam = torch.deg2rad(lat_lon.float()).unbind(-1)
    a1, a2, a3, a4 = 1.340264, -0.081106, 0.000893, 0.003796
    theta = torch.asin(math.sqrt(3.0) / 2.0 * torch.sin(phi))
    slope = 9.0 * a4 * theta**8 + 7.0 * a3 * theta**6 + 3.0 * a2 * theta**2 + a1
    x = 2.0 * math.sqrt(3.0) * lam * torch.cos(theta) / (3.0 * slope)
    y = a4 * theta**9 + a3 * theta**7 + a2 * theta**3 + a1 * theta
    return torch.stack([x, y], dim=-1) * 66.50336 / 180.0


def mercator(lat_lon: Tensor) -> Tensor:
    """Project places (N, 2) to y, x (N, 2) of Web Mercator in units of half its width, in G3's order.

    By hand: (0, 180) is (0, 1), and 85.0511 degrees north is y = 1. A pole, which lies at infinity, comes out at 12.1.
    """
    phi, lam = torch.deg2rad(lat_lon.double()).unbind(-1)
    meters = WEB_MERCATOR_RADIUS * torch.stack([torch.asinh(torch.tan(phi)), lam], dim=-1)
    return meters.float() / WEB_MERCATOR_EDGE


PROJECTIONS: dict[str, Callable[[Tensor], Tensor]] = {"equal_earth": equal_earth, "mercator": mercator}


@torch.no_grad()
def spherical_harmonics(lat_lon: Tensor, degrees: int) -> Tensor:
    """Return real orthonormal harmonics (N, degrees^2) float64, of degrees 0 to ``degrees - 1``, at places (N, 2).

    Degree by degree, orders -l to l (sine for negative ones), without the Condon-Shortley sign; angles are counted from
    the south pole and the date line, as SatCLIP counts them. The normalized Legendre functions come by the recurrence
    in the degree (Holmes and Featherstone, J. Geodesy 76, 2002, eq. 11), which neither overflows nor cancels.
    """
    phi, lam = torch.deg2rad(lat_lon.double()).unbind(-1)
    x, s, angle = -phi.sin(), phi.cos(), lam + math.pi
    order = torch.arange(degrees, dtype=torch.float64, device=x.device)[:, None]
    cosine, sine = math.sqrt(2.0) * torch.cos(order * angle), math.sqrt(2.0) * torch.sin(order * angle)
    cosine[:1] = 1.0
    # Of this degree and the one before, orders 0 to l.
    previous, legendre = torch.zeros_like(x[None]), torch.full_like(x[None], math.sqrt(0.25 / math.pi))
    rows = [legendre]
    for n in range(1, degrees):
        m, last = order[: n - 1], legendre[-1:]
        a, b = ((4 * n**2 - 1) / (n**2 - m**2)).sqrt(), (((n - 1) ** 2 - m**2) / (4 * (n - 1) ** 2 - 1)).abs().sqrt()
        inner = a * (x * legendre[: n - 1] - b * previous[: n - 1])
        ends = math.sqrt(2 * n + 1) * x * last, math.sqrt((2 * n + 1) / (2 * n)) * s * last
        previous, legendre = legendre, torch.cat([inner, *ends])
        rows += [(legendre[1:] * sine[1 : n + 1]).flip(0), legendre * cosine[: n + 1]]
    return torch.cat(rows).T


@dataclass(frozen=True)
class LocationConfig:
    """This class holds the sizes of a :class:`LocationEncoder`, by default GeoCLIP's; with ``mercator`` G3's."""

    projection: str = "equal_earth"
    sigmas: tuple[float, ...] = (1.0, 16.0, 256.0)
    frequencies: int = 256
    hidden: int = 1024
    dim: int = 512


class LocationEncoder(Pretrained):
    """This encoder is GeoCLIP's (Vivanco Cepeda et al., NeurIPS 2023): its embeddings are of any length.

    Projected coordinates go through one network for each spread ``sigma`` of their random Fourier features, coarse to
    fine, and the results are summed. Parameters bear the names of the released state dicts.
    """

    file, config_type = "location", LocationConfig
    config: LocationConfig

    def __init__(self, config: LocationConfig | None = None) -> None:
        super().__init__()
        self.config = config or LocationConfig()
        if self.config.projection not in PROJECTIONS:
            raise GeoError(f"no projection {self.config.projection!r}: choose {' or '.join(PROJECTIONS)}")
        frequencies, hidden, dim = self.config.frequencies, self.config.hidden, self.config.dim
        for i, sigma in enumerate(self.config.sigmas):
            features = _Frequencies(sigma, frequencies)
            capsule = [features, *mlp(2 * frequencies, hidden, hidden, hidden, between=nn.ReLU), nn.ReLU()]
            head = nn.Sequential(nn.Linear(hidden, dim))
            self.add_module(f"LocEnc{i}", nn.Sequential(OrderedDict(capsule=nn.Sequential(*capsule), head=head)))

    def forward(self, lat_lon: Tensor) -> Tensor:
        """Return the embeddings (N, dim) of places (N, 2) in degrees."""
        projected = PROJECTIONS[self.config.projection](lat_lon)
        return torch.stack([scale(projected) for scale in self.children()]).sum(dim=0)


class _Frequencies(nn.Module):
    """Cosines and sines (N, 2 * count) of random frequencies of points (N, 2) (Tancik et al., NeurIPS 2020)."""

    b: Tensor

    def __init__(self, sigma: float, count: int) -> None:
        super().__init__()
        self.register_buffer("b", torch.randn(count, 2) * sigma)  # fixed, so not a parameter

    def forward(self, projected: Tensor) -> Tensor:
        with _full_precision(projected):
            phase = 2.0 * math.pi * projected @ self.b.T
        return torch.cat([phase.cos(), phase.sin()], dim=-1)


class UnitVectorEncoder(nn.Module):
    """This encoder takes random Fourier features of the unit vector: poles and the date line are ordinary places.

    A frequency of spread sigma resolves about 6371 / sigma km.
    """

    frequencies: Tensor

    def __init__(self, dim: int, sigmas: tuple[float, ...], frequencies: int, hidden: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draws = torch.randn(len(sigmas), frequencies, 3, generator=generator)
        self.register_buffer("frequencies", (draws * torch.tensor(sigmas)[:, None, None]).flatten(0, 1))
        self.layers = mlp(2 * len(self.frequencies), hidden, hidden, dim)

    def forward(self, lat_lon: Tensor) -> Tensor:
        """Return the embeddings (N, dim) of places (N, 2) in degrees."""
        lat, lon = torch.deg2rad(lat_lon.double()).unbind(-1)
        unit = torch.stack([lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()], dim=-1).float()
        with _full_precision(unit):
            phase = unit @ self.frequencies.T
        embedding: Tensor = self.layers(torch.cat([phase.sin(), phase.cos()], dim=-1))
        return embedding


class HarmonicEncoder(nn.Module):
    """This encoder is SatCLIP's (Klemmer et al., AAAI 2025), on spherical harmonics.

    Harmonics of so many degrees (SatCLIP's L), then sine layers (SIREN; Sitzmann et al., NeurIPS 2020), the
    first of frequency 30. Details of less than about 20,000 / degrees km are left to the network. Parameters bear
    SatCLIP's names.
    """

    def __init__(self, degrees: int = 40, hidden: int = 256, layers: int = 2, dim: int = 256) -> None:
        super().__init__()
        self.degrees, widths = degrees, [degrees**2, *[hidden] * layers]
        sines = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.nnet = nn.ModuleDict({"layers": sines, "last_layer": nn.Linear(hidden, dim)})
        for i, layer in enumerate(self._layers()):
            # SIREN's bounds: phases of the first layer spread over many turns, those of the others over about one.
            bound = 1.0 / degrees**2 if i == 0 else math.sqrt(6.0 / hidden)
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, lat_lon: Tensor) -> Tensor:
        """Return the embeddings (N, dim) of places (N, 2) in degrees."""
        *sines, last = self._layers()
        values = spherical_harmonics(lat_lon, self.degrees).to(last.weight.dtype)
        with _full_precision(values):
            for i, layer in enumerate(sines):
                values = torch.sin((30.0 if i == 0 else 1.0) * layer(values))
            embedding: Tensor = last(values)
        return embedding

    def _layers(self) -> list[nn.Linear]:
        return [module for module in self.nnet.modules() if isinstance(module, nn.Linear)]


@torch.inference_mode()
def embed_places(
    encoder: nn.Module, lat_lon: ArrayLike, batch: int = 512, advance: Callable[[int], object] = lambda n: None
) -> NDArray[np.float32]:
    """Embed places (N, 2) in degrees as (N, dim) of length one, in blocks of ``batch``: see :func:`.in_blocks`."""
    places = torch.from_numpy(np.asarray(lat_lon, np.float64).reshape(-1, 2))
    device = next(encoder.parameters()).device

    def embed(block: Tensor) -> Tensor:
        return normalize(encoder(block.to(device)).float(), dim=-1).cpu()

    return in_blocks(embed, places, size=batch, advance=advance).numpy()


def _full_precision(values: Tensor) -> torch.autocast:
    """Turn autocast off, since a phase of hundreds of radians does not survive bfloat16."""
    return torch.autocast(values.device.type, enabled=False)


def mlp(*widths: int, between: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """Return linear layers of the given widths with a nonlinearity between them."""
    layers = [layer for before, after in pairwise(widths) for layer in (nn.Linear(before, after), between())]
    return nn.Sequential(*layers[:-1])
