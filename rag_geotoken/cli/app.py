"""These functions are the commands of ``rag-geotoken``; each imports what it needs, so that help comes at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rag_geotoken.cli.convert import convert_app
from rag_geotoken.cli.index import index_app
from rag_geotoken.cli.options import (
    Backbone,
    Json,
    Limit,
    Matcher,
    Mllm,
    MllmConcurrent,
    MllmModel,
    Resume,
    Weights,
    takes_options,
)
from rag_geotoken.cli.train import train_app
from rag_geotoken.errors import GeoError
from rag_geotoken.options import Options

app = typer.Typer(
    help="Where on Earth was a photo taken? Retrieve, propose, verify, decide.",
    epilog="Start with: rag-geotoken demo --out runs/demo    Exit status: 0 done, 1 failed, 2 wrong usage.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(index_app, name="index")
app.add_typer(train_app, name="train")
app.add_typer(convert_app, name="convert")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo writes.")] = Path("runs/demo"),
    test_n: Annotated[int, typer.Option(min=1, max=1_000_000, help="Test photos to draw.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws fresh test photos.")] = 0,
    weights: Weights = None,
    mllm: Annotated[str, typer.Option(help="Multimodal model that verifies too: embedded, none, or as in locate.")] = (
        "embedded"
    ),
    vllm_python: Annotated[
        Path | None, typer.Option(help="Serve the embedded one by vLLM with this interpreter, and ask the server.")
    ] = None,
) -> None:
    """Run the main job on satellite views of the Earth: index, locate, verify, ablate, report.

    Writes predictions.parquet, metrics.json and report.html. Run again, it goes on where it was stopped.
    """
    from contextlib import nullcontext

    from rag_geotoken.evaluation.report import table_text
    from rag_geotoken.mllm import EMBEDDED_FOLDER
    from rag_geotoken.mllm.start import VllmServer
    from rag_geotoken.run.demo import run_demo

    serving = VllmServer(EMBEDDED_FOLDER, vllm_python, out / "vllm.log") if vllm_python else nullcontext()
    with serving as server:
        where = server.url if server else None if mllm == "none" else mllm
        metrics = run_demo(out, test_n=test_n, seed=seed, weights=weights, mllm=where, log=typer.echo)
    typer.echo(table_text(metrics))
    typer.echo(f"{metrics['seconds']:.0f} s of work in all; look at {out / 'report.html'}")


@app.command()
@takes_options
def locate(
    context: typer.Context,
    photos: Annotated[list[str], typer.Argument(help="Pictures, folders, a CSV with a column 'image', or a source.")],
    out: Annotated[Path, typer.Option(help="File: .parquet, .csv, .jsonl, .geojson or .kml.")],
    options: Options,
    *,
    index: Annotated[Path | None, typer.Option(help="Folder of an index; needed without --preset.")] = None,
    weights: Weights = None,
    backbone: Backbone = None,
    matcher: Matcher = None,
    mllm: Mllm = None,
    mllm_model: MllmModel = None,
    mllm_concurrent: MllmConcurrent = None,
    resume: Resume = False,
    limit: Limit = None,
    run: Annotated[Path | None, typer.Option(help="Folder of the stage tables; else OUT with ending .run.")] = None,
    preset: Annotated[str | None, typer.Option(help="geoclip: street photos by its gallery, no index.")] = None,
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="Places a photo in the answer, with --preset.")] = 5,
) -> None:
    """Say where photos were taken. Stage tables are kept beside the answer, so a stopped run goes on.

    A photo that cannot be read gets a line with its error and no place. EXIF places are never used as evidence.

    With --preset geoclip: --weights DIR (of rag-geotoken convert geoclip), --backbone, --top-k, --out and --run.
    """
    if (preset is None) == (index is None) or preset not in (None, "geoclip"):
        raise typer.BadParameter("give either --index DIR or --preset geoclip")
    _check_given(context, preset)
    run = run or out.with_suffix(".run")
    if index is None:
        from rag_geotoken.peers.locate import locate_by_gallery

        if weights is None:
            raise typer.BadParameter("--preset geoclip needs --weights DIR, made by rag-geotoken convert geoclip")
        _print_located(out, *locate_by_gallery(photos, out, weights, backbone, k=top_k, run=run, limit=limit))
        return
    from rag_geotoken.mllm.session import MllmSession
    from rag_geotoken.models import Models
    from rag_geotoken.photos.inputs import read_photos
    from rag_geotoken.run.export import check_output
    from rag_geotoken.run.locate import locate_photos
    from rag_geotoken.storage.weights import EARTH

    if matcher is not None and not options.visual:
        raise typer.BadParameter("--matcher compares pictures: add --verify visual")
    if mllm is None and (mllm_model or resume or options.mllm_mode != "pool" or options.asks_mllm):
        raise GeoError("which multimodal model? Give --mllm http://HOST:PORT/v1, a folder, a hub's name or embedded")
    if mllm is not None and not options.asks_mllm:
        raise GeoError("--mllm is given and verifies nothing: add --verify mllm, or --mllm-mode diversify")
    check_output(out)
    session = None if mllm is None else MllmSession.open(mllm, mllm_model, mllm_concurrent, resume=resume)
    table = read_photos(photos, limit)
    models = Models.from_pretrained(index, weights or EARTH, backbone, matcher=matcher, mllm=session)
    _print_located(out, *locate_photos(table, models, options, out=out, run=run))


def _check_given(context: typer.Context, preset: str | None) -> None:
    """Refuse options that go only with --preset where there is none, and the other way round."""
    of_preset, of_both = {"preset", "top_k"}, {"photos", "out", "run", "weights", "backbone", "limit"}
    for name in context.params.keys() - of_both:
        source = context.get_parameter_source(name)
        if source and source.name == "COMMANDLINE" and (name in of_preset) != (preset is not None):
            given = "--preset" if preset else "--index"
            raise typer.BadParameter(f"--{name.replace('_', '-')} does not go with {given}")


def _print_located(out: Path, done: int, failed: list[str]) -> None:
    typer.echo(f"{done} photos located in {out}" + (f", {len(failed)} without an answer" if failed else ""))
    for line in failed[:10]:
        typer.echo(f"  {line}", err=True)


@app.command(epilog="Example: rag-geotoken where 'a fjord with red houses' --weights runs/geoclip")
def where(
    texts: Annotated[list[str], typer.Argument(help="Descriptions of places, in English.")],
    weights: Annotated[Path, typer.Option(help="Folder made by rag-geotoken convert geoclip.")],
    backbone: Backbone = None,
    k: Annotated[int, typer.Option(min=1, max=1000, help="Places to show a text.")] = 10,
    as_json: Json = False,
) -> None:
    """Show the places most like a text, among GeoCLIP's gallery, with their probabilities."""
    from rag_geotoken.peers.locate import places_of

    by_text = places_of(texts, weights, backbone, k=k)
    if as_json:
        answers = [{"text": text, "places": places} for text, places in by_text.items()]
        typer.echo(json.dumps(answers, ensure_ascii=False, indent=2))
        return
    for text, places in by_text.items():
        typer.echo(text)
        for place in places:
            typer.echo(f"  {place['probability']:.5f}  {place['lat']:9.4f} {place['lon']:10.4f}")


@app.command(epilog="Example: rag-geotoken ablate --out runs/verification --mllm embedded")
def ablate(
    out: Annotated[Path, typer.Option(help="Folder of the tables, metrics.json and report.html.")],
    recipe: Annotated[
        Path | None, typer.Argument(help="TOML: photos, variants and more; eval/verification.toml unless given.")
    ] = None,
    *,
    photos: Annotated[str | None, typer.Option(help="A source in the place of the recipe's photos.")] = None,
    index: Annotated[Path | None, typer.Option(help="An index in the place of the recipe's gallery.")] = None,
    weights: Weights = None,
    backbone: Backbone = None,
    matcher: Matcher = None,
    mllm: Mllm = "embedded",
    mllm_model: MllmModel = None,
    mllm_concurrent: MllmConcurrent = None,
    resume: Resume = False,
) -> None:
    """Cross options of the road and compare: accuracy of every variant, gains with intervals, and what they cost.

    A recipe lists values for any option of locate; every combination is a variant. What variants have in common is
    computed once; run again, it goes on where it was stopped.
    """
    from functools import partial

    from rag_geotoken.evaluation.report import table_text
    from rag_geotoken.mllm.session import MllmSession
    from rag_geotoken.run.ablate import ablate
    from rag_geotoken.storage.files import shipped
    from rag_geotoken.storage.recipes import read_recipe

    contents = read_recipe(recipe or shipped("eval/verification.toml"))
    open_mllm = partial(MllmSession.open, mllm, mllm_model, mllm_concurrent, resume=resume) if mllm else None
    models: dict[str, Any] = {"index": index, "weights": weights, "backbone": backbone, "matcher": matcher}
    metrics = ablate(contents, out, typer.echo, photos=photos, mllm=open_mllm, **models)
    typer.echo(table_text(metrics))


@app.command()
def evaluate(
    predictions: Annotated[
        Path, typer.Argument(help="CSV with true_lat,true_lon,pred_lat,pred_lon, or a predictions table.")
    ],
    truth: Annotated[
        Path | None, typer.Option(help="CSV with id,lat,lon, where the predictions lack the truth.")
    ] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this JSON file.")] = None,
    geodesic: Annotated[bool, typer.Option(help="Distances on the WGS84 ellipsoid instead of the sphere.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
) -> None:
    """Print the shares of ALL photos within 1, 25, 200, 750 and 2500 km, median, GeoScore, 95 % intervals.

    A photo without an answer stays in the denominator and counts as wrong.
    """
    from rag_geotoken.evaluation.predictions import evaluate_csv, format_evaluation
    from rag_geotoken.storage.files import write_json

    result = evaluate_csv(predictions, geodesic, truth=truth, seed=seed)
    if as_json:
        write_json(as_json, result)
    typer.echo(format_evaluation(result))


def main(arguments: list[str] | None = None) -> None:
    """Run a command; a GeoError becomes one line and exit status 1."""
    try:
        app(arguments)
    except GeoError as error:
        print(f"rag-geotoken: {error}", file=sys.stderr)
        sys.exit(1)
