"""This module declares each option of a run once; the command line is made from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from rag_geotoken.errors import GeoError

# Verifiers, as `--verify` names them, and their modules in :mod:`.verifiers`.
VERIFIERS = {"alignment": "alignment", "reward": "reward", "visual": "visual", "look": "range_plus", "mllm": "mllm"}
# Strategies: the function of that name in :mod:`.decision.strategies`, written with underscores.
STRATEGIES = (
    "bayes-risk", "bayes-risk-25", "bayes-risk-200", "log-probability", "medoid", "density", "mean-shift", "highest",
    "snap",
)  # fmt: skip
PROPOSERS = ("greedy", "beam", "sample")
CHOICES = {
    "propose": PROPOSERS,
    "sources": ("neighbor", *PROPOSERS, "frontier", "gps", "visual", "mllm"),
    "verify": VERIFIERS,
    "select": STRATEGIES,
    "mllm_mode": ("pool", "free", "zero-shot", "diversify"),
}


def option(default: Any, help: str, *limits: float, flag: str | None = None, kind: type | None = None) -> Any:
    """Declare a field of :class:`Options`: its help, its least and greatest value, its flag where that is not its name.

    kind: the type of a value on the command line, that of the default unless given; names are a text there.
    """
    low, high = (*limits, None, None)[:2]
    kind = kind or (str if isinstance(default, tuple) else type(default))
    return field(default=default, metadata={"help": help, "low": low, "high": high, "flag": flag, "kind": kind})


@dataclass(frozen=True)
class Options:
    """This class holds the options of a run: retrieval, generation of cells, verification and choice of the answer.

    Raises GeoError, before any work, for an unknown name or a number out of range.
    """

    neighbors: int = option(20, "Gallery photos retrieved a photo.", 1, 1000)
    exact: bool = option(False, "Compare all gallery photos, whatever the index.")
    other_authors: bool = option(False, "No neighbor by the photo's own author, where a source names it.")
    within: tuple[float, float, float] | None = option(
        None, "LAT,LON,KM: only places within so many km of there.", kind=str
    )
    gps_places: int = option(32, "Places found by GPS embedding a photo.", 0, 1000)
    propose: tuple[str, ...] = option(PROPOSERS, "How cells are generated: some of {}, or none.")
    beam_width: int = option(10, "Cells kept by the beam search.", 1, 1000)
    samples: int = option(40, "Cells sampled a photo.", 1, 1000)
    temperature: float = option(1.0, "Of the samples.", 0.01, 10.0)
    top_p: float = option(1.0, "Sample the likeliest tokens up to this.", 0.01, 1.0)
    epsilon: float = option(0.0, "Sample no token less likely.", 0.0, 0.99)
    seed: int = option(0, "Of the samples.", 0)
    openings: int = option(32, "Prefixes that the frontier search opens a photo.", 0, 10_000)
    sources: tuple[str, ...] = option((), "Which places may be the answer: some of {}; none for all there are.")
    verify: tuple[str, ...] = option(("alignment",), "Who verifies: some of {}, or none.")
    select: str = option("bayes-risk", "How one place of the pool is chosen: {}.")
    mllm_mode: str = option("pool", "What the multimodal model is asked: {}.")
    evidence: bool = option(True, "Tell it what is known of each candidate.")
    near_pictures: bool = option(False, "Show it a neighbor's picture beside each candidate.")
    answers: int = option(2, "Its answers to each prompt of diversify.", 1, 100)
    picture_size: int = option(512, "Longer side of the pictures that it is shown, in pixels.", 16, 4096)
    area: bool = option(False, "State over what area the token model's belief is spread.")
    max_area_km2: float | None = option(
        None, "Abstain where the posterior is spread over more km2.", 0.0, flag="--max-area", kind=float
    )
    least_confidence: float = option(
        0.0, "Abstain where the chance to be within 200 km is lower.", 0.0, 1.0, flag="--abstain-below"
    )

    def __post_init__(self) -> None:
        """Check every name and number."""
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            for choice in (value,) if isinstance(value, str) else value:
                if choice not in choices:
                    raise GeoError(f"{name.replace('_', '-')} {choice!r} is not known: choose of {', '.join(choices)}")
        for item in fields(self):
            name, value = item.name.replace("_", "-"), getattr(self, item.name)
            low, high, kind = (item.metadata[key] for key in ("low", "high", "kind"))
            if value is None and item.default is None:
                continue
            if kind in (bool, int, float) and type(value) not in ((int, float) if kind is float else (kind,)):
                raise GeoError(f"{name} {value!r} does not fit: give {kind.__name__}")
            if low is not None and (not math.isfinite(value) or value < low or (high is not None and value > high)):
                most = "" if high is None else f" and at most {high:g}"
                raise GeoError(f"{name} {value} is out of range: give at least {low:g}{most}")
        if self.within is not None:
            check_within(*self.within)
        enabled = {"gps": self.gps_places > 0, "mllm": self.diverse}
        enabled |= {name: name in self.propose for name in PROPOSERS}
        for name in self.sources:
            if not enabled.get(name, True):
                raise GeoError(f"sources {name}: nothing finds such places; change propose, gps-places or mllm-mode")
        if ("frontier" in self.sources and len(self.sources) > 1) or self.sources == ("mllm",):
            raise GeoError(f"sources {'+'.join(self.sources)}: frontier stands alone, and mllm never does")

    @property
    def visual(self) -> bool:
        """Return whether pictures are compared, which adds the places that they move the photo to."""
        return "visual" in self.verify or "visual" in self.sources

    @property
    def frontier(self) -> bool:
        """Return whether the posterior is computed."""
        return self.area or self.max_area_km2 is not None or "frontier" in self.sources

    @property
    def diverse(self) -> bool:
        """Return whether a multimodal model names places that join the pool."""
        return self.mllm_mode == "diversify"

    @property
    def asks_mllm(self) -> bool:
        """Return whether a multimodal model is needed."""
        return "mllm" in self.verify or self.diverse

    @property
    def pooled(self) -> tuple[str, ...]:
        """Return the sources of the pool that is decided on."""
        enabled = {"gps": self.gps_places > 0, "visual": self.visual, "mllm": self.diverse}
        return self.sources or ("neighbor", *self.propose, *(name for name in enabled if enabled[name]))

    @property
    def label(self) -> str:
        """Return a short name: the verifiers in alphabetical order, and the strategy unless the usual one."""
        return verified_by(self.verify) + (f"-{self.select}" if self.select != Options.select else "")


def check_within(lat: float, lon: float, km: float) -> None:
    """Raise GeoError for a place that is none or a distance out of range."""
    if not (-90 <= lat <= 90 and -180 <= lon <= 180):
        raise GeoError(f"within {lat},{lon},{km}: give LAT,LON,KM, latitude -90 to 90, longitude -180 to 180")
    if not 0 < km <= 20_040:
        raise GeoError(f"within {lat},{lon},{km}: the distance is {km:g} km: give one above 0, at most 20040")


def verified_by(verifiers: Any) -> str:
    """Join the verifiers' names: alignment+reward, or none."""
    return "+".join(sorted(verifiers)) or "none"


def parse_option(name: str, text: Any) -> Any:
    """Parse an option as a user writes it, ``visual+alignment`` or ``47.1,8.5,300``. Raises GeoError."""
    if name == "within" and isinstance(text, str):
        try:
            lat, lon, km = map(float, text.split(","))
            return lat, lon, km
        except ValueError:
            raise GeoError(f"within {text}: give LAT,LON,KM, such as 48.2,16.4,100") from None
    if name in ("propose", "sources", "verify"):
        names = text.replace("+", ",").split(",") if isinstance(text, str) else text
        return () if text == "none" else tuple(names)
    return text
