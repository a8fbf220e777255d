"""Choose the few numbers of the selection on validation photos."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.decision import strategies
from rag_geotoken.decision.confidence import calibrated, fit_calibration
from rag_geotoken.decision.pool import extend, make_pool, scored_pool
from rag_geotoken.decision.strategies import Given
from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.errors import GeoError
from rag_geotoken.geo.sphere import haversine_km
from rag_geotoken.models import Models
from rag_geotoken.options import Options, verified_by
from rag_geotoken.photos.sources import read_source
from rag_geotoken.run.resumable import BLOCK
from rag_geotoken.run.walk import answered, embedded
from rag_geotoken.storage.files import write_json
from rag_geotoken.tokens.reward import RewardHead
from rag_geotoken.training.loop import Log
from rag_geotoken.training.setup import Setup
from rag_geotoken.types import NEIGHBOR, RADII_KM, Photos, Predictions, Tables
from rag_geotoken.verifiers.range_plus import bank, likeness
from rag_geotoken.verifiers.visual import support

MODES: tuple[tuple[str, ...], ...] = (
    (),
    ("alignment",),
    ("reward",),
    ("alignment", "reward"),
    ("look",),
    ("alignment", "look"),
    ("visual",),
    ("alignment", "visual"),
)
GROUPS = ("decision", "reward", "look", "visual", "confidence", "visual_confidence", "density")
MIX = ("look_beta", "look_semantic", "look_spatial")
Grid = Mapping[str, list[float]]
Mix = tuple[float, float, float]  # beta, semantic, spatial
Scores = dict[str | Mix, NDArray[np.float32]]  # of a verifier, or of the look by how it is mixed


def train(setup: Setup) -> None:
    """Choose the tuning with a recipe's settings, for the models in its folder."""
    models = setup.models(Tuning(), reward=RewardHead.from_pretrained(setup.out))
    write_json(setup.out / "tuning.json", asdict(tune(models, **setup.settings, log=setup.log)))


def tune(models: Models, source: str, grid: Mapping[str, Grid], log: Log) -> Tuning:
    """Coordinate search on a source of validation photos -> the tuning that did best on them.

    grid: for each of ``GROUPS`` the values that some numbers of a :class:`.Tuning` may take. Within a group one number
    after the other takes its best value, twice around: what leaves the fewest photos outside 25, 200, 750 and 2500 km,
    and 1 km too where pictures are compared. The mean of the shares' logarithms is compared, or 25 km would decide
    alone. For the confidence it is the mean squared error of the calibrated chances (Brier), the decision standing
    still.

    The decision is tuned as verified by alignment, then the reward head's scale beside it, then the look as the only
    verifier, then the comparison of pictures beside the alignment, then the confidence, with a calibration for every
    set of verifiers. The density baseline gets its best kernel too, to be an honest opponent. Photos without a place
    are left out. Raises GeoError when none has one or a picture cannot be read.
    """
    _check_grid(grid)
    photos = read_source(source)
    photos = photos.filter(photos["lat"].is_valid())
    if not len(photos):
        raise GeoError(f"{source} has no photo with a place: tuning needs the truth")
    truth = np.column_stack([photos["lat"].to_numpy(), photos["lon"].to_numpy()])
    parts = _propose(models, Photos.from_table(photos), grid["look"], log)
    modes = [mode for mode in MODES if "reward" not in mode or models.reward is not None]

    def decide(tuning: Tuning, mode: tuple[str, ...]) -> Predictions:
        found = []
        mix = tuning.look_beta, tuning.look_semantic, tuning.look_spatial
        for tables, scores in parts:
            pool = make_pool(tables.neighbors, tables.candidates, models.tokenizer, tuning, tables.places)
            pool = extend(pool, tables.matches, tuning) if "visual" in mode else pool
            chosen = {name: scores[mix if name == "look" else name] for name in mode if name != "visual"}
            chosen = {name: values[:, : pool.mask.shape[1]] for name, values in chosen.items()}
            if "visual" in mode:
                chosen["visual"] = support(pool, tables.matches, tuning.visual_km)
            found.append(strategies.decide(pool, Given(chosen, tuning)))
        return Predictions.join(found)

    def density(tuning: Tuning) -> Predictions:
        pools = (scored_pool(tables.neighbors, tuning.density_scale, NEIGHBOR) for tables, _ in parts)
        return Predictions.join([strategies.decide(pool, Given({}, tuning), "density") for pool in pools])

    def brier(tuning: Tuning, mode: tuple[str, ...], first: int = 1) -> float:
        decided = decide(tuning, mode)
        right = hits(decided, truth)
        sure = calibrated(decided.confidence, fit_calibration(decided.confidence, right))
        return -float(np.mean((sure - right)[:, first:] ** 2))

    best = Tuning(search_weights=models.tuning.search_weights)
    best = _search(best, grid["decision"], lambda tuning: inside(decide(tuning, ("alignment",)), truth), log)
    if models.reward is not None:
        best = _search(best, grid["reward"], lambda tuning: inside(decide(tuning, ("alignment", "reward")), truth), log)
    # RANGE is estimated for the grid's mixtures alone.
    best = replace(best, **{n: grid["look"][n][0] for n in MIX if getattr(best, n) not in grid["look"][n]})  # type: ignore[arg-type]
    best = _search(best, grid["look"], lambda tuning: inside(decide(tuning, ("look",)), truth), log)
    best = _search(best, grid["visual"], lambda tuning: inside(decide(tuning, ("alignment", "visual")), truth, 0), log)
    best = _search(best, grid["confidence"], lambda tuning: brier(tuning, ("alignment",)), log)
    best = _search(best, grid["visual_confidence"], lambda tuning: brier(tuning, ("alignment", "visual"), 0), log)
    best = _search(best, grid["density"], lambda tuning: inside(density(tuning), truth), log)
    decided = {mode: decide(best, mode) for mode in modes}
    for mode, predictions in decided.items():
        shares = " ".join(f"{share:.2f}" for share in 100 * hits(predictions, truth).mean(axis=0))
        log(f"verified by {verified_by(mode)}: {shares} % within 1, 25, 200, 750, 2500 km")
    pairs = {mode: fit_calibration(found.confidence, hits(found, truth)) for mode, found in decided.items()}
    return replace(best, calibration={verified_by(mode): each for mode, each in pairs.items()})


def _check_grid(grid: Mapping[str, Grid]) -> None:
    """Raises GeoError for a grid that lacks a group or has values of no number of a tuning."""
    if tuple(grid) != GROUPS or not all(isinstance(values, dict) for values in grid.values()):
        raise GeoError(f"the recipe's [tuning.grid] has {', '.join(grid)}: give tables {', '.join(GROUPS)}, in order")
    for group, values in grid.items():
        for name, choices in values.items():
            fits = isinstance(choices, list) and choices and all(type(x) in (int, float) for x in choices)
            if not isinstance(getattr(Tuning, name, None), float) or not fits:
                raise GeoError(f"the recipe's [tuning.grid.{group}] {name} does not fit: give a list of numbers")
    if missing := [name for name in MIX if name not in grid["look"]]:
        raise GeoError(f"the recipe's [tuning.grid.look] lacks {missing[0]}: RANGE's mixtures are made of all three")


def _propose(models: Models, photos: Photos, look: Grid, log: Log) -> list[tuple[Tables, Scores]]:
    """Photos in blocks, up to their pools with moved places, and verifiers' scores: what no setting changes."""
    verify = ("alignment", "visual") if models.reward is None else ("alignment", "reward", "visual")
    options, parts = Options(verify=verify), []
    for start in range(0, len(photos), BLOCK):
        tables = embedded(models, options, photos[start : start + BLOCK])
        if error := next(filter(None, tables.embeddings.errors), None):
            raise GeoError(f"tuning needs pictures that can be read: {error}")
        answered(models, options, tables, until="verdicts-visual")
        scores: Scores = {name: tables.verdicts[name].scores for name in verify[:-1]}
        parts.append((tables, scores | _looks(models, tables, look)))
    log(f"pools of {len(photos)} validation photos")
    return parts


def _looks(models: Models, tables: Tables, grid: Grid) -> Scores:
    """RANGE's scores (B, C) for every mixture of the grid; the two parts of an estimate are made once."""
    pool = tables.pool
    spots, photo = pool.lat_lon[pool.mask], tables.embeddings.image[np.nonzero(pool.mask)[0]]
    places, gallery, result = models.alignment.embed_places(spots), bank(models), Scores()
    semantic = {sharp: gallery.of(spots, places, beta=1.0, semantic=sharp) for sharp in grid["look_semantic"]}
    spatial = {sharp: gallery.of(spots, places, beta=0.0, spatial=sharp) for sharp in grid["look_spatial"]}
    for beta, alike, near in product(grid["look_beta"], semantic, spatial):
        scores = np.zeros(pool.mask.shape, np.float32)
        scores[pool.mask] = likeness(photo, beta * semantic[alike] + (1 - beta) * spatial[near])
        result[beta, alike, near] = scores
    return result


def _search(best: Tuning, grid: Grid, value: Callable[[Tuning], float], log: Log) -> Tuning:
    """Coordinate search: every setting's best value with the others as they are, twice around."""
    for _ in range(2 if len(grid) > 1 else 1):
        for name, choices in grid.items():
            tried = [replace(best, **{name: choice}) for choice in choices]  # type: ignore[arg-type]
            values = [value(tuning) for tuning in tried]
            best = tried[int(np.argmax(values))]
            log(f"{name} {getattr(best, name)}: " + " ".join(f"{v:.4f}" for v in values))
    return best


def inside(decided: Predictions, truth: NDArray[np.float64], first: int = 1) -> float:
    """Minus the mean logarithm of the shares outside 25, 200, 750 and 2500 km; half a photo is always outside.

    first: 0 for 1 km too.
    """
    outside = (~hits(decided, truth)[:, first:]).sum(axis=0) + 0.5
    return -float(np.log(outside / len(truth)).mean())


def hits(decided: Predictions, truth: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the radii (B, R) each answer lies within."""
    km = haversine_km(*truth.T, *decided.lat_lon.T)
    hits: NDArray[np.bool_] = km[:, None] <= np.array(RADII_KM)
    return hits
