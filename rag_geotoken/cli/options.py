"""These declarations are options that several commands take; those of a run are made from :class:`.Options`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from rag_geotoken.options import CHOICES, Options, parse_option

Weights = Annotated[Path | None, typer.Option(help="Folder of model weights; the embedded Earth models unless given.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many photos, the first of each source.")]
Backbone = Annotated[
    str | None,
    typer.Option(help="CLIP below the weights: a folder, a hub name or open_clip:NAME; else what they name."),
]
Matcher = Annotated[
    str | None, typer.Option(help="Street photos, --verify visual: EfficientLoFTR or LightGlue, folder or hub.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Mllm = Annotated[
    str | None,
    typer.Option(help="Multimodal model: http://HOST:PORT/v1, vllm:DIR, a folder, a hub name, or embedded."),
]
MllmModel = Annotated[str | None, typer.Option(help="The model's name on a server that has several.")]
MllmConcurrent = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Requests to a server at a time, 16 unless given.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Ask the multimodal model again where it failed before.")]


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter ``options: Options`` by an option for each of its fields."""
    parameters = dict(inspect.signature(command, eval_str=True).parameters)
    del parameters["options"]

    def run(**given: Any) -> None:
        chosen = {item.name: parse_option(item.name, given.pop(item.name)) for item in fields(Options)}
        command(**given, options=Options(**chosen))

    plain = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters.values()]
    run.__signature__ = inspect.Signature([*plain, *map(_parameter, fields(Options))])  # type: ignore[attr-defined]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def _parameter(item: Any) -> inspect.Parameter:
    """Return a field of ``Options`` as a parameter that typer reads."""
    value, limits = item.default, item.metadata
    flag = limits["flag"] or "--" + item.name.replace("_", "-")
    help_ = limits["help"].format(", ".join(CHOICES.get(item.name, ())))
    kind: Any = limits["kind"]
    if isinstance(value, tuple):
        value = ",".join(value) or "none"
    numbers = {"min": limits["low"], "max": limits["high"]} if kind in (int, float) else {}
    if kind is float:
        numbers["callback"] = _finite
    names = [f"{flag}/--no-{flag[2:]}"] if value is True else [flag]
    kind = kind if value is not None else kind | None
    annotation = Annotated[kind, typer.Option(*names, help=help_, show_default=value is not None, **numbers)]
    return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=annotation)


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter("give a finite number")
    return value
