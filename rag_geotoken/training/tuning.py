"""These functions choose the numbers of the decision on validation photos."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.decision import strategies
from rag_geotoken.decision.confidence import calibrated, fit_calibration
from rag_geotoken.decision.pool import extend, make_pool, scored_pool
from rag_geotoken.decision.strategies import Given
from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.errors import GeoError
from rag_geotoken.evaluation.metrics import hits, inside
from rag_geotoken.geo.cells import S2Tokenizer
from rag_geotoken.geo.sphere import Floats
from rag_geotoken.models import Models
from rag_geotoken.options import Options, verified_by
from rag_geotoken.photos.sources import read_source
from rag_geotoken.run.resumable import BLOCK
from rag_geotoken.run.walk import answered, embedded
from rag_geotoken.storage.files import write_json
from rag_geotoken.tokens.reward import RewardHead
from rag_geotoken.training.loop import Log
from rag_geotoken.training.setup import Setup
from rag_geotoken.types import NEIGHBOR, Photos, Predictions, Tables
from rag_geotoken.verifiers.range_plus import bank, likeness
from rag_geotoken.verifiers.visual import support

Verifiers = tuple[str, ...]
Grid = Mapping[str, list[float]]
Mix = tuple[float, float, float]  # beta, semantic, spatial
Scores = dict[str | Mix, NDArray[np.float32]]  # of a verifier, or of RANGE by its mixture
# Sets of verifiers: each of these three or none, with or without the alignment.
CALIBRATED = [
    (*first, *second) for second in ((), ("reward",), ("look",), ("visual",)) for first in ((), ("alignment",))
]
# The groups of a grid, in the order in which they are tuned, and the verifiers of the decision meanwhile.
GROUPS: dict[str, Verifiers] = {
    "decision": ("alignment",),
    "reward": ("alignment", "reward"),
    "look": ("look",),
    "visual": ("alignment", "visual"),
    "confidence": ("alignment",),
    "visual_confidence": ("alignment", "visual"),
    "density": (),
}
MIX = ("look_beta", "look_semantic", "look_spatial")


def train(setup: Setup) -> None:
    """Choose the tuning with a recipe's settings, for the models in its folder."""
    models = setup.models(Tuning(), reward=RewardHead.from_pretrained(setup.out))
    write_json(setup.out / "tuning.json", asdict(tune(models, **setup.settings, log=setup.log)))


def tune(models: Models, source: str, grid: Mapping[str, Grid], log: Log) -> Tuning:
    """Return the tuning that does best on a source of validation photos, by coordinate search.

    Within a group one number after the other takes its best value, in two rounds: the one that leaves the fewest photos
    outside 25, 200, 750 and 2500 km, and 1 km too where pictures are compared. The mean of the shares' logarithms is
    compared, or 25 km would decide alone. The confidence, which changes no answer, is tuned by the mean squared error
    of the calibrated chances (Brier). ``GROUPS`` gives the order; RANGE ("look") is tuned as the only verifier, and
    every set of verifiers has a calibration. The density baseline gets its best kernel too, for a fair comparison.

    grid: for each of ``GROUPS`` the values that some numbers of a :class:`.Tuning` may take. Photos without a place are
    left out. Raises GeoError for a grid that does not fit, or when no photo has a place or a picture cannot be read.
    """
    _check_grid(grid)
    table = read_source(source)
    photos = Photos.from_table(table.filter(table["lat"].is_valid()))
    if not len(photos):
        raise GeoError(f"{source} has no photo with a place: tuning needs the truth")
    validation = _validation(models, photos, grid["look"], log)
    best = Tuning(search_weights=models.tuning.search_weights)
    # RANGE is estimated for the grid's mixtures alone.
    best = replace(best, **{n: grid["look"][n][0] for n in MIX if getattr(best, n) not in grid["look"][n]})  # type: ignore[arg-type]
    for group, verifiers in GROUPS.items():
        if "reward" not in verifiers or models.reward is not None:
            best = _search(best, grid[group], partial(validation.value, group), log)
    calibration = {}
    for verifiers in CALIBRATED:
        if "reward" not in verifiers or models.reward is not None:
            decided, name = validation.decide(best, verifiers), verified_by(verifiers)
            within = hits(decided, photos.lat_lon)
            shares = " ".join(f"{share:.2f}" for share in 100 * within.mean(axis=0))
            log(f"verified by {name}: {shares} % within 1, 25, 200, 750, 2500 km")
            calibration[name] = fit_calibration(decided.confidence, within)
    return replace(best, calibration=calibration)


@dataclass(frozen=True)
class _Validation:
    """This class decides on validation photos by one tuning or another.

    blocks: the photos' tables up to the pool, and verifiers' scores (B, C), which do not depend on the tuning. lat_lon
    (N, 2): where the photos were taken.
    """

    tokenizer: S2Tokenizer
    blocks: list[tuple[Tables, Scores]]
    lat_lon: Floats

    def value(self, group: str, tuning: Tuning) -> float:
        """Return how good a tuning is for its numbers of a group; higher is better."""
        verifiers = GROUPS[group]
        first = 0 if "visual" in verifiers else 1
        decided = self.density(tuning) if group == "density" else self.decide(tuning, verifiers)
        if not group.endswith("confidence"):
            return inside(decided, self.lat_lon, first)
        within = hits(decided, self.lat_lon)
        confidence = calibrated(decided.confidence, fit_calibration(decided.confidence, within))
        return -float(np.mean((confidence - within)[:, first:] ** 2))

    def decide(self, tuning: Tuning, verifiers: Verifiers) -> Predictions:
        decided = []
        mix = tuning.look_beta, tuning.look_semantic, tuning.look_spatial
        for tables, scores in self.blocks:
            pool = make_pool(tables.neighbors, tables.candidates, self.tokenizer, tuning, tables.places)
            pool = extend(pool, tables.matches, tuning) if "visual" in verifiers else pool
            chosen = {name: scores[mix if name == "look" else name] for name in verifiers if name != "visual"}
            chosen = {name: values[:, : pool.mask.shape[1]] for name, values in chosen.items()}
            if "visual" in verifiers:
                chosen["visual"] = support(pool, tables.matches, tuning.visual_km)
            decided.append(strategies.decide(pool, Given(chosen, tuning)))
        return Predictions.join(decided)

    def density(self, tuning: Tuning) -> Predictions:
        pools = (scored_pool(tables.neighbors, tuning.density_scale, NEIGHBOR) for tables, _ in self.blocks)
        return Predictions.join([strategies.decide(pool, Given({}, tuning), "density") for pool in pools])


def _validation(models: Models, photos: Photos, look_grid: Grid, log: Log) -> _Validation:
    verify = ("alignment", "visual") if models.reward is None else ("alignment", "reward", "visual")
    options, blocks = Options(verify=verify), []
    for start in range(0, len(photos), BLOCK):
        tables = embedded(models, options, photos[start : start + BLOCK])
        if error := next(filter(None, tables.embeddings.errors), None):
            raise GeoError(f"tuning needs pictures that can be read: {error}")
        answered(models, options, tables, until="verdicts-visual")
        scores: Scores = {name: tables.verdicts[name].scores for name in verify[:-1]}
        blocks.append((tables, scores | _looks(models, tables, look_grid)))
    log(f"pools of {len(photos)} validation photos")
    return _Validation(models.tokenizer, blocks, photos.lat_lon)


def _looks(models: Models, tables: Tables, grid: Grid) -> Scores:
    """Return RANGE's scores (B, C) for every mixture of the grid; the two parts of an estimate are made once."""
    pool = tables.pool
    lat_lon, image = pool.lat_lon[pool.mask], tables.embeddings.image[np.nonzero(pool.mask)[0]]
    places, gallery, result = models.alignment.embed_places(lat_lon), bank(models), Scores()
    semantic = {scale: gallery.of(lat_lon, places, beta=1.0, semantic=scale) for scale in grid["look_semantic"]}
    spatial = {scale: gallery.of(lat_lon, places, beta=0.0, spatial=scale) for scale in grid["look_spatial"]}
    for mix in product(grid["look_beta"], semantic, spatial):
        beta, scores = mix[0], np.zeros(pool.mask.shape, np.float32)
        scores[pool.mask] = likeness(image, beta * semantic[mix[1]] + (1 - beta) * spatial[mix[2]])
        result[mix] = scores
    return result


def _search(best: Tuning, grid: Grid, value: Callable[[Tuning], float], log: Log) -> Tuning:
    """Return the tuning after each number took its best value with the rest as it is, in two rounds."""
    for _ in range(2 if len(grid) > 1 else 1):
        for name, choices in grid.items():
            tried = [replace(best, **{name: choice}) for choice in choices]  # type: ignore[arg-type]
            values = [value(tuning) for tuning in tried]
            best = tried[int(np.argmax(values))]
            log(f"{name} {getattr(best, name)}: " + " ".join(f"{v:.4f}" for v in values))
    return best


def _check_grid(grid: Mapping[str, Grid]) -> None:
    if tuple(grid) != tuple(GROUPS) or not all(isinstance(values, dict) for values in grid.values()):
        raise GeoError(f"the recipe's [tuning.grid] has {', '.join(grid)}: give tables {', '.join(GROUPS)}, in order")
    for group, values in grid.items():
        for name, choices in values.items():
            fits = isinstance(choices, list) and choices and all(type(x) in (int, float) for x in choices)
            if not isinstance(getattr(Tuning, name, None), float) or not fits:
                raise GeoError(f"the recipe's [tuning.grid.{group}] {name} does not fit: give a list of numbers")
    if missing := [name for name in MIX if name not in grid["look"]]:
        raise GeoError(f"the recipe's [tuning.grid.look] lacks {missing[0]}: RANGE's mixtures are made of all three")
