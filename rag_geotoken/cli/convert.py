"""These functions are the commands of ``rag-geotoken convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

convert_app = typer.Typer(help="Turn weights of peers, once, into safetensors that load here.", no_args_is_help=True)


@convert_app.command("geotoken", epilog="Example: rag-geotoken convert geotoken model.pth --out runs/geotoken")
def convert_geotoken(
    path: Annotated[Path, typer.Argument(help="Checkpoint: .pth, .pt or .safetensors.")],
    out: Annotated[Path, typer.Option(help="Folder for tokens.json and tokens.safetensors.")],
    heads: Annotated[int, typer.Option(min=1, max=1024, help="Attention heads it was trained with.")] = 8,
    neighbors: Annotated[int, typer.Option(min=1, max=1000, help="Neighbors it was trained with.")] = 15,
) -> None:
    """Read a checkpoint of GeoToken's released code; its tensors stay as they are, in full precision.

    Shapes tell all sizes but heads and neighbors, whose defaults are the paper's:
    a wrong number of heads loads and predicts nonsense. Pickled code is refused.

    Load the result with TokenModel.from_pretrained(OUT).
    """
    from rag_geotoken.peers import convert

    config = convert.convert_geotoken(path, out, heads, neighbors)
    layers = f"{config.encoder_layers} + {config.decoder_layers} layers of width {config.d_model}"
    typer.echo(f"token model in {out}: S2 level {config.level}, {layers}, {config.heads} heads, {neighbors} neighbors")


@convert_app.command("geoclip", epilog="Example: rag-geotoken convert geoclip GEOCLIP/model/weights --out runs/geoclip")
def convert_geoclip(
    path: Annotated[Path, typer.Argument(help="Folder of the installed package geoclip, or its model/weights.")],
    out: Annotated[Path, typer.Option(help="Folder for weights, gallery and the gallery's embeddings (250 MB).")],
) -> None:
    """Read GeoCLIP's weights and its gallery of 100,000 places, and encode the gallery, once (about half a minute).

    Then: rag-geotoken locate PHOTOS --preset geoclip --weights OUT --out answers.geojson.
    From Python: GeoCLIP.from_pretrained(OUT), LocationEncoder.from_pretrained(OUT).
    """
    from rag_geotoken.peers import convert

    places = convert.convert_geoclip(path, out)
    typer.echo(f"GeoCLIP in {out}: {places:,} places")


@convert_app.command("g3", epilog="Example: rag-geotoken convert g3 g3.pth --out runs/g3")
def convert_g3(
    path: Annotated[Path, typer.Argument(help="State dict: .pth, .pt or .safetensors.")],
    out: Annotated[Path, typer.Option(help="Folder for alignment.json and alignment.safetensors.")],
) -> None:
    """Read G3's heads and location encoder; the frozen CLIP inside is left out, pickled code is refused.

    Then: rag-geotoken index build SOURCE --weights OUT, with the CLIP from its hub or a folder (--backbone).
    """
    from rag_geotoken.peers import convert

    convert.convert_g3(path, out)
    typer.echo(f"G3's heads and location encoder in {out}")


@convert_app.command("open-clip", epilog="Example: rag-geotoken convert open-clip DFN2B-CLIP-ViT-L-14 --out runs/dfn2b")
def convert_open_clip(
    path: Annotated[Path, typer.Argument(help="Folder with open_clip_config.json and a .bin, as the hub has it.")],
    out: Annotated[Path, typer.Option(help="Folder for the same model in safetensors.")],
) -> None:
    """Read a model of open_clip that its hub has only as a pickle, of which nothing but tensors is read.

    Fetch the folder with: hf download OWNER/NAME --local-dir DIR. Name the result open_clip:OUT.
    """
    from rag_geotoken.peers import convert

    convert.convert_open_clip(path, out)
    typer.echo(f"open_clip model in {out}")
