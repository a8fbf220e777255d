"""This function runs the demo: an ablation on embedded data, whose recipe ships with the package."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rag_geotoken.mllm.session import MllmSession
from rag_geotoken.run.ablate import Log, ablate
from rag_geotoken.storage.files import shipped
from rag_geotoken.storage.recipes import read_recipe

RECIPE = "eval/demo.toml"


def run_demo(
    out: Path,
    *,
    test_n: int = 2000,
    seed: int = 0,
    weights: Path | None = None,
    gallery: int = 24_000,
    mllm: str | None = None,
    log: Log = print,
) -> dict[str, Any]:
    """Run the demo's recipe into the folder ``out``, resume it where it was stopped, and return its metrics.

    test_n, seed: how many test photos are drawn, and which; half as many, 1,000 at most, of the other splits. gallery:
    photos in the index. mllm: a multimodal model that verifies too, as :meth:`.MllmSession.open` takes it; without one,
    its variants are left out. Raises GeoError for a folder that cannot be written or broken weights.
    """
    recipe = read_recipe(shipped(RECIPE))
    few = max(1, min(1000, test_n // 2))
    sizes = {split: test_n if i == 0 else few for i, split in enumerate(recipe["photos"])}
    recipe["photos"] = {split: f"{source},n={sizes[split]},seed={seed}" for split, source in recipe["photos"].items()}
    recipe |= {"gallery": f"{recipe['gallery']},n={gallery}", "seed": seed}
    if mllm is None:
        recipe["variants"] = [block for block in recipe["variants"] if "mllm" not in block.get("verify", "")]
    opened = partial(MllmSession.open, mllm, resume=True) if mllm else None
    return ablate(recipe, out, log, weights=weights, mllm=opened)
