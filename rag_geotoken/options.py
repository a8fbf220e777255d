"""What a run may change."""

from __future__ import annotations

from dataclasses import dataclass

from rag_geotoken.errors import GeoError

PROPOSERS = ("greedy", "beam", "sample")
VERIFIERS = ("alignment", "reward", "visual")  # and "look", which the ablation leaves out


@dataclass(frozen=True)
class Options:
    """What a run may change: what is retrieved, how cells are proposed, and who verifies the pool.

    exact: compare every gallery photo, whatever the index. other_authors: no neighbour by the photo's own author, where
    a source knows it. gps_places: places found by the photo's GPS embedding, none for 0.
    within: a place and a distance, (lat, lon, km): only cells and neighbours inside count. openings: prefixes that the
    frontier search opens a photo. max_area_km2: a photo whose posterior is spread over more gets no answer, nor does
    one whose chance to be within 200 km is below least_confidence.
    """

    neighbors: int = 20
    exact: bool = False
    other_authors: bool = False
    gps_places: int = 32
    propose: tuple[str, ...] = ("greedy", "beam", "sample")
    beam_width: int = 10
    samples: int = 40
    temperature: float = 1.0
    top_p: float = 1.0
    epsilon: float = 0.0
    seed: int = 0
    within: tuple[float, float, float] | None = None
    verify: tuple[str, ...] = ("alignment",)
    openings: int = 32
    max_area_km2: float | None = None
    least_confidence: float = 0.0

    def __post_init__(self) -> None:
        """Raises GeoError for an unknown way to propose or to verify, before any work."""
        for name in self.propose:
            if name not in PROPOSERS:
                raise GeoError(f"cells cannot be proposed by {name!r}: choose {', '.join(PROPOSERS)}")
        for name in self.verify:
            check_verifier(name)


def check_verifier(name: str) -> None:
    """Raises GeoError for a verifier that there is not."""
    if name not in (*VERIFIERS, "look", "mllm"):
        raise GeoError(f"nothing verifies by the name {name!r}: choose of {', '.join(VERIFIERS)}, look, mllm")
