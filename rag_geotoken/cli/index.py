"""These functions are the commands of ``rag-geotoken index``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rag_geotoken.cli.options import Backbone, Json, Limit, Weights

index_app = typer.Typer(help="Build an index of photos, look at one, search one.", no_args_is_help=True)


@index_app.command("build")
def index_build(
    source: Annotated[str, typer.Argument(help="A recipe (indexes/NAME.toml) or a source, SCHEME:REST.")],
    out: Annotated[Path, typer.Option(help="Folder of the index.")],
    *,
    limit: Limit = None,
    factory: Annotated[str | None, typer.Option(help="FAISS factory, such as IVF4096,SQfp16; else chosen.")] = None,
    memory_gib: Annotated[float, typer.Option(help="Memory that the index may take when searched.")] = 16.0,
    recall: Annotated[float, typer.Option(help="Share of the 20 true neighbors that a search should find.")] = 0.95,
    thumbnails: Annotated[
        int | None, typer.Option(min=16, max=2048, help="Keep the pictures too, their longer side so many pixels.")
    ] = None,
    weights: Weights = None,
    backbone: Backbone = None,
) -> None:
    """Read, encode and index photos with known places; a stopped build resumes where it was.

    Sources: folder:DIR (places from photos.csv or EXIF), mp16-pro:DIR (CSV and tar as downloaded), im2gps3k:DIR,
    yfcc4k:DIR, hub:NAME (or hub:FOLDER) and the embedded satellite views of indexes/.
    Behind a source, ,limit=N takes its first photos, ,limit=N,seed=S a random subset.
    """
    from rag_geotoken.encoders.alignment import GeoAlignment
    from rag_geotoken.index.build import Plan
    from rag_geotoken.photos.sources import limited
    from rag_geotoken.run.build_index import make_index
    from rag_geotoken.storage.recipes import index_source
    from rag_geotoken.storage.weights import EARTH

    source = limited(index_source(source), limit)
    alignment, plan = GeoAlignment.from_pretrained(weights or EARTH, backbone), Plan(factory, memory_gib, recall)
    manifest = make_index(out, source, alignment, plan=plan, thumbnails=thumbnails)
    typer.echo(f"{manifest['rows']} photos indexed in {out}, {manifest['left_out']} left out")


@index_app.command("info")
def index_info(folder: Annotated[Path, typer.Argument(help="Folder of an index.")], as_json: Json = False) -> None:
    """Check an index's files against its manifest and print what it holds."""
    from rag_geotoken.index.describe import describe
    from rag_geotoken.index.geo_index import GeoIndex

    manifest = GeoIndex.load(folder).manifest
    typer.echo(json.dumps(manifest, indent=2) if as_json else describe(manifest))


@index_app.command("search")
def index_search(
    folder: Annotated[Path, typer.Argument(help="Folder of an index.")],
    photo: Annotated[Path, typer.Argument(help="A picture file.")],
    *,
    k: Annotated[int, typer.Option(min=1, help="Neighbors to show.")] = 10,
    within: Annotated[str | None, typer.Option(help="LAT,LON,KM: only photos within so many km of there.")] = None,
    not_author: Annotated[str | None, typer.Option(help="Leave the photos of this author out.")] = None,
    dissimilar: Annotated[bool, typer.Option("--dissimilar", help="The photos least like it instead.")] = False,
    weights: Weights = None,
    backbone: Backbone = None,
    as_json: Json = False,
) -> None:
    """Show the k gallery photos most like a picture, with their places and scores; a photo never finds itself."""
    from rag_geotoken.options import Options, parse_option
    from rag_geotoken.run.locate import neighbors_of
    from rag_geotoken.storage.weights import EARTH

    only, weights = Options(within=parse_option("within", within)).within, weights or EARTH
    rows = neighbors_of(
        folder, photo, k, weights=weights, backbone=backbone, within=only, not_author=not_author, dissimilar=dissimilar
    )
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    for row in rows:
        place = f"{row['lat']:9.4f} {row['lon']:10.4f}  {row['id']}  {row['place'] or ''}"
        typer.echo(f"{row['rank']:>4}  {row['score']:.4f}  {place}")
