"""These functions are the commands of ``rag-geotoken train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rag_geotoken.cli.options import Mllm, MllmConcurrent, MllmModel

train_app = typer.Typer(
    help="Train the embedded models again, or heads of your own, from a seed.", no_args_is_help=True
)

Recipe = Annotated[Path | None, typer.Argument(help="TOML recipe; the embedded models' own unless given.")]
Out = Annotated[Path, typer.Option(help="Folder of the weights.")]
Index = Annotated[
    Path | None, typer.Option(help="Gallery to train with; else one of the recipe's gallery, kept in OUT-index.")
]


@train_app.command("alignment")
def train_alignment(recipe: Recipe = None, out: Out = Path("runs/weights")) -> None:
    """Train the embedded image, location and text encoder on satellite views (about 40 minutes on 2 cores)."""
    _train("alignment", recipe, out)


@train_app.command("heads", epilog="Example: rag-geotoken train heads my-photos.toml --out runs/my-weights")
def train_heads(recipe: Recipe = None, out: Out = Path("runs/weights")) -> None:
    """Train G3's heads and location encoder on a frozen CLIP, with photos of your own or MP16-Pro.

    Pictures and place texts go through the CLIP once, into OUT-index/stages, where
    rag-geotoken index build SOURCE --out OUT-index --weights OUT finds them.
    Without RECIPE: G3's own settings, on mp16-pro:data/mp16-pro. Several processes: torchrun or accelerate launch.
    """
    _train("heads", recipe, out)


def _add_command(name: str, help: str) -> None:
    def command(recipe: Recipe = None, out: Out = Path("runs/weights"), index: Index = None) -> None:
        _train(name, recipe, out, index=index)

    train_app.command(name, help=help)(command)


_add_command("tokens", "Train the token model on the alignment in OUT (about 15 minutes on 2 cores).")
_add_command("reward", "Train the reward head on pools of gallery photos, for the models in OUT (a few minutes).")
_add_command("tuning", "Choose the pool's weights and scales on validation photos, for the models in OUT.")
_add_command(
    "verifier",
    "Train the small multimodal model that verifies pools, for the models in OUT (about half an hour on 2 cores).\n\n"
    "It is written into OUT-verifier, which transformers loads and vLLM serves.",
)


@train_app.command("mllm")
def train_mllm(
    recipe: Recipe = None,
    out: Out = Path("runs/weights"),
    mllm: Mllm = None,
    mllm_model: MllmModel = None,
    mllm_concurrent: MllmConcurrent = None,
    index: Index = None,
) -> None:
    """Choose the weight of a multimodal model's verdicts on validation photos, for the models in OUT.

    Without --mllm: the verifier that was trained beside OUT.
    """
    _train("mllm", recipe, out, index=index, where=mllm, model=mllm_model, concurrent=mllm_concurrent)


def _train(name: str, recipe: Path | None, out: Path, **more: Any) -> None:
    from rag_geotoken.storage.recipes import training_recipe
    from rag_geotoken.training.run import train

    train(name, training_recipe(recipe, "g3" if name == "heads" else "earth"), out, **more)
