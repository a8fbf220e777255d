"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Weights = Annotated[Path | None, typer.Option(help="Folder of model weights; the embedded Earth models unless given.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many photos, the first of each source.")]
Backbone = Annotated[
    str | None,
    typer.Option(help="CLIP below the weights: a folder, a hub name or open_clip:NAME; else what they name."),
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
