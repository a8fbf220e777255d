"""This module holds the few numbers of pool, decision and confidence that are chosen on validation photos."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from rag_geotoken.errors import GeoError
from rag_geotoken.storage.files import read_json
from rag_geotoken.types import RADII_KM, SEARCH_WEIGHTS


@dataclass(frozen=True)
class Tuning:
    """This class holds the numbers that `rag-geotoken train tuning` chooses.

    search_weights: of the image, GPS and text part of an embedding in the search.
    neighbor_share, gps_share: the weight of the neighbors in the pool and of the places found by GPS embedding, the
    latter shared out evenly; the generated entries have the rest. mllm_share, visual_share: the weight of places that
    a multimodal model names or to which neighbors' pictures move the photo, in a pool that has them.
    neighbor_scale, match_scale: how sharply the score of a neighbor or match counts in the pool, in nats per unit;
    alignment_scale, reward_scale, look_scale, mllm_scale, visual_scale: the same for a verifier in a decision.
    view_km: the usual width of a picture from above. visual_km: how near to a moved place an entry is supported by it.
    visual_spread_km, visual_confidence_scale, visual_confidence_km: in place of the three below where pictures were
    compared, which tell places closer. look_beta, look_semantic, look_spatial: see :meth:`.RangeBank.of`.
    spread_km: spread of the places behind one pool entry, for the utility of a decision.
    confidence_scale: all weights of a pool are raised to this power where a confidence is stated, since sharp weights
    decide best and are far too confident; confidence_km is the spread that goes with it.
    calibration: by the verifiers in use, an intercept and a slope for each radius (see :mod:`.confidence`).
    router: weights of :func:`.router.features` in the log odds that a multimodal model's own place is the better one.
    density_scale, density_km: sharpness and Gaussian kernel of the density baseline, chosen for it alone.
    """

    search_weights: tuple[float, ...] = SEARCH_WEIGHTS
    neighbor_share: float = 0.1
    gps_share: float = 0.02
    neighbor_scale: float = 10.0
    alignment_scale: float = 100.0
    reward_scale: float = 1.0
    look_scale: float = 160.0
    mllm_scale: float = 1.0
    mllm_share: float = 0.1
    visual_scale: float = 2.0
    visual_share: float = 0.9
    match_scale: float = 20.0
    visual_km: float = 10.0
    visual_spread_km: float = 2.0
    visual_confidence_scale: float = 0.4
    visual_confidence_km: float = 2.0
    view_km: float = 300.0
    look_beta: float = 0.5
    look_semantic: float = 12.0
    look_spatial: float = 10000.0
    spread_km: float = 25.0
    confidence_scale: float = 0.3
    confidence_km: float = 15.0
    calibration: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    router: tuple[float, ...] = (-1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    density_scale: float = 10.0
    density_km: float = 50.0

    def with_pictures(self) -> Tuning:
        """Return the tuning of a decision where pictures were compared, which locates photos more precisely."""
        closer = {name: getattr(self, f"visual_{name}") for name in ("spread_km", "confidence_scale", "confidence_km")}
        return replace(self, **closer)


def load_tuning(weights: Path) -> Tuning:
    """Read ``tuning.json`` of a weights folder. Raises GeoError when it is missing or not what it should be."""
    values = read_json(weights / "tuning.json")
    try:
        image, gps, text = values.pop("search_weights")
        pairs = {
            name: tuple((_number(a), _number(b)) for _, (a, b) in zip(RADII_KM, rows, strict=True))
            for name, rows in values.pop("calibration").items()
        }
        router = tuple(_number(value) for value in values.pop("router", Tuning.router))
        if len(router) != len(Tuning.router):
            raise ValueError(f"router has {len(router)} weights, not {len(Tuning.router)}")
        numbers = {name: _number(value) for name, value in values.items()}
        return Tuning((_number(image), _number(gps), _number(text)), calibration=pairs, router=router, **numbers)
    except (TypeError, KeyError, ValueError, OverflowError, AttributeError) as error:
        raise GeoError(f"tuning.json in {weights.name} is not a tuning: {error}") from None


def _number(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is no finite number")
    return float(value)
