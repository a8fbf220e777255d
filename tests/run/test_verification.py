"""Verification by a real tiny model in this process: its table, failures, resuming; locate; an ablation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny import OPTIONS, OneLine

from rag_geotoken.cli.app import main
from rag_geotoken.evaluation.report import table_text
from rag_geotoken.mllm import open_client
from rag_geotoken.mllm.request import Client, Reply, Request
from rag_geotoken.mllm.session import JOURNAL, MllmSession
from rag_geotoken.models import Models
from rag_geotoken.options import Options
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.run.ablate import ablate, walk_variants
from rag_geotoken.run.variants import Variant, read_variants
from rag_geotoken.run.walk import RunFolder
from rag_geotoken.storage.files import shipped
from rag_geotoken.storage.parquet import read_table
from rag_geotoken.types import MLLM, Answers, MllmVerdict, Pool

COLUMNS = [
    "id",
    "status",
    "scores",
    "lat",
    "lon",
    "confidence",
    "raw",
    "requests",
    "prompt_tokens",
    "output_tokens",
]
ASKED = replace(OPTIONS, verify=("mllm",))
VERDICTS = "verdicts-mllm-pool"
BOTH = {"retrieved+generated": "neighbor+gps+greedy+beam+sample", "generated": "greedy+beam+sample"}
SEEN = {"retrieved+generated": BOTH["retrieved+generated"] + "+visual"}
RECIPE: dict[str, Any] = {
    "gallery": "blue-marble:gallery,n=200",
    "photos": {"test": "blue-marble:test,n=10"},
    "examples": "mended",
    "variants": [
        {"sources": BOTH, "verify": ["none", "alignment", "mllm"]},
        {"sources": BOTH, "verify": "mllm", "evidence": False},
        {"sources": BOTH, "verify": "mllm", "mllm_mode": "free"},
        {"sources": SEEN, "verify": "visual+mllm", "near_pictures": True},
    ],
}


@pytest.fixture(scope="session")
def client(llava: Path) -> Client:
    return open_client(str(llava))


class Down:
    """A model that answers so many requests and is gone then."""

    def __init__(self, client: Client, answers: int) -> None:
        self.client, self.model, self.left, self.asked = client, client.model, answers, 0

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        self.asked += len(requests)
        kept = requests[: self.left]
        self.left -= len(kept)
        yield from self.client.ask(kept)
        yield from ((i, Reply(error="the server does not answer")) for i in range(len(kept), len(requests)))


class Watched(Down):
    """A model whose requests are kept."""

    def __init__(self, client: Client) -> None:
        super().__init__(client, 10**6)
        self.seen: list[Request] = []

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        self.seen.extend(requests)
        return super().ask(requests)

    @property
    def said(self) -> list[str]:
        """The words of every request."""
        return ["".join(part for part in request.parts if isinstance(part, str)) for request in self.seen]


@pytest.fixture
def run(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


def folder_of(run: Path, models: Models, client: Client, resume: bool = False) -> RunFolder:
    """A run as a new process meets it."""
    return RunFolder(run, models.replace(mllm=MllmSession(client, resume)))


def rows(run: Path, name: str = VERDICTS) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_table(run / f"{name}.parquet").to_pylist()
    return found


def test_variants_that_ask_for_places_of_the_models_own_differ_by_the_size_of_the_picture(
    run: Path, geolocator: Geolocator, client: Client
) -> None:
    options = replace(OPTIONS, verify=(), mllm_mode="diversify", answers=1)
    variants = [Variant(str(size), replace(options, picture_size=size)) for size in (32, 64)]
    watched = Watched(client)
    made = walk_variants(folder_of(run, geolocator, watched), variants)
    assert made["32"]["verdicts-mllm-diversify"] != made["64"]["verdicts-mllm-diversify"]
    sizes = {
        max(Image.open(BytesIO(part)).size)
        for request in watched.seen
        for part in request.parts
        if isinstance(part, bytes)
    }
    assert sizes == {32, 64}


def test_a_line_a_photo_with_its_scores_and_cost(run: Path, geolocator: Geolocator, client: Client) -> None:
    options = replace(OPTIONS, verify=("mllm", "visual"))
    files = folder_of(run, geolocator, client).walk(options)
    assert files[VERDICTS] == VERDICTS and files["predictions"] == "predictions-mllm+visual"
    path = run / f"{VERDICTS}.parquet"
    assert pq.read_schema(path).names == COLUMNS
    table, pool = rows(run), Pool.from_table(read_table(run / f"{files['pool']}.parquet"))
    assert [len(row["scores"]) for row in table] == pool.mask.sum(axis=1).tolist()
    for row in table:
        assert row["status"] == "ok" and 1 <= row["output_tokens"] == row["requests"] <= 4 and row["prompt_tokens"] > 50
        assert all(score < 0 for score in row["scores"]) and not row["lat"]
    before, gone = path.read_bytes(), Down(client, 0)
    (run / JOURNAL).unlink()
    again = folder_of(run, geolocator, gone)
    again.walk(options)
    assert path.read_bytes() == before and gone.asked == 0 and VERDICTS in again.reused  # nothing is asked again


def test_the_prompt_says_what_is_asked_for(run: Path, geolocator: Geolocator, client: Client) -> None:
    def asked(**changes: Any) -> Watched:
        (run / JOURNAL).unlink(missing_ok=True)
        watched = Watched(client)
        folder_of(run, geolocator, watched).walk(replace(ASKED, **changes), until=VERDICTS)
        return watched

    plain, known, matched = asked(evidence=False), asked(), asked(verify=("mllm", "visual"))
    assert plain.said and all("neighbours" not in text for text in plain.said)
    assert all("neighbours" in text and "match" not in text for text in known.said)
    assert all("match" in text and "agreeing" in text for text in matched.said)
    shown = asked(near_pictures=True)
    assert any("seen nearby" in text for text in shown.said)
    for request, text in zip(shown.seen, shown.said, strict=True):
        assert len(request.pictures) == 1 + text.count("seen nearby")
    for each in (plain, known, matched, shown):
        assert all("blue-marble" not in text and ".png" not in text for text in each.said)
        for request in each.seen:
            for picture in request.pictures:
                assert picture.startswith(b"\x89PNG") and b"eXIf" not in picture


def test_killed_in_the_middle_the_rest_falls_back_and_a_resumed_run_is_the_same(
    run: Path, geolocator: Geolocator, client: Client, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    folder_of(whole, geolocator, client).walk(ASKED)
    total = sum(row["requests"] for row in rows(whole))
    half = folder_of(run, geolocator, Down(client, total - 20))
    files = half.walk(ASKED)
    failed = ~half.result(files[VERDICTS], MllmVerdict).answered
    assert 0 < failed.sum() < len(failed)
    assert {row["status"] for row in rows(run)} == {"ok", "the server does not answer"}
    decided: Answers = half.result(files["predictions"], Answers)[half.readable]
    plain: Answers = half.result(half.walk(replace(ASKED, verify=()))["predictions"], Answers)[half.readable]
    assert (decided.lat_lon[failed] == plain.lat_lon[failed]).all()
    assert (decided.confidence[failed] == plain.confidence[failed]).all()
    assert (decided.confidence[~failed] != plain.confidence[~failed]).any()
    assert (decided.verified == ~failed).all()
    # Without --resume the failures stay as they are; with it only they are asked.
    untouched = Down(client, 10**6)
    folder_of(run, geolocator, untouched).walk(ASKED)
    assert untouched.asked == 0
    again = Down(client, 10**6)
    folder_of(run, geolocator, again, resume=True).walk(ASKED)
    assert 0 < again.asked <= 20
    for name in (VERDICTS, "predictions-mllm"):
        assert (run / f"{name}.parquet").read_bytes() == (whole / f"{name}.parquet").read_bytes()


def test_free_and_diverse_places(run: Path, geolocator: Geolocator, client: Client) -> None:
    class Says(Down):
        """The tiny model knows no places: its answers are counted, and these are read instead."""

        def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
            for i, request in enumerate(requests):
                place = json.dumps({"latitude": 10 + i % 7, "longitude": 20, "confidence": 60})
                yield i, Reply((place,) * request.n if i % 3 else ("I cannot say.",) * request.n, (), 9, 9, 0.1)

    folder_of(run, geolocator, Says(client, 0)).walk(replace(ASKED, mllm_mode="free"))
    free = rows(run, "verdicts-mllm-free")
    assert {row["status"] for row in free} == {"ok", "refused"} and all(row["raw"] for row in free)
    diverse = folder_of(run, geolocator, Says(client, 0))
    files = diverse.walk(replace(OPTIONS, verify=(), mllm_mode="diversify", answers=2), until="pool")
    own = diverse.result(files["verdicts-mllm-diversify"], MllmVerdict).lat_lon
    assert own.shape[1] > 2 and np.isfinite(own[:, 0]).any()
    joined: Pool = diverse.result(files["pool"], Pool)
    assert ((joined.source == MLLM) & joined.mask).sum() == np.isfinite(own[..., 0]).sum()
    np.testing.assert_allclose(np.exp(joined.log_weight).sum(axis=1), 1, atol=1e-5)


def test_locate_with_a_model(index_folder: Path, weights: Path, llava: Path, tmp_path: Path) -> None:
    common = ["locate", "blue-marble:test,n=4", "--index", str(index_folder), "--weights", str(weights)]
    common += ["--samples", "4", "--beam-width", "2", "--mllm", str(llava)]
    for how in (["--verify", "visual,mllm"], ["--verify", "mllm", "--mllm-mode", "free", "--no-evidence"],
                ["--verify", "alignment", "--mllm-mode", "diversify"]):  # fmt: skip
        out = tmp_path / "answers.csv"
        with pytest.raises(SystemExit) as stopped:
            main([*common, *how, "--out", str(out)])
        assert stopped.value.code == 0 and len(out.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--verify", "mllm"], "which multimodal model"),
        (["--mllm", "LLAVA"], "verifies nothing"),
        (["--verify", "mllm", "--mllm", "LLAVA", "--mllm-mode", "guess"], "mllm-mode 'guess' is not known"),
        (["--verify", "mllm", "--mllm", "http://127.0.0.1:9/v1"], "127.0.0.1:9"),
        (["--verify", "mllm", "--mllm", "no/such/folder"], "no/such/folder"),
    ],
)
def test_what_cannot_be_asked_is_said_before_any_work(
    given: list[str], words: str, index_folder: Path, llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(llava) if word == "LLAVA" else word for word in given]
    with pytest.raises(SystemExit) as stopped:
        main(["locate", "blue-marble:test,n=4", "--index", str(index_folder), "--out", str(tmp_path / "a.csv"), *given])
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and words in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_crossing(weights: Path, llava: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    opened = partial(MllmSession.open, str(llava))
    metrics = ablate(RECIPE, tmp_path, lines.append, weights=weights, mllm=opened)
    variants = {row["name"]: row for row in metrics["variants"]}
    assert variants.pop("oracle-20")["n"] == 10
    assert len(variants) == 6 + 5  # visual needs what is retrieved
    for name, row in variants.items():
        pool, verify = name.split(" ")[:2]
        assert row["n"] == 10 and row["oracle"]["200"] >= row["acc"]["200"]
        if verify == "none":
            assert not {"gain", "cost", "mended"} & row.keys()
            continue
        assert ("requests" in row["cost"]) == ("mllm" in verify)
        assert row["gain"]["200"] == pytest.approx(row["acc"]["200"] - variants[f"{pool} none"]["acc"]["200"])
        assert row["gain"]["200"] == pytest.approx(10 * (row["mended"] - row["broken"]))
    assert not lines and metrics["model"].startswith(llava.name)
    page = (tmp_path / "report.html").read_text()
    assert len(page) > 10_000
    assert "What verification gains" in page and "retrieved+generated visual+mllm near_pictures" in page
    assert all(name in table_text(metrics) for name in variants)
    tables = {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet") if path.name != "predictions.parquet"
    }
    again = ablate(RECIPE, tmp_path, lines.append, weights=weights, mllm=opened)
    assert lines == [
        f"{sum(path.parent.name == 'test' for path in tables) - 1} tables reused, as an earlier run left them"
    ]
    assert all(path.stat().st_mtime_ns == made for path, made in tables.items())
    assert again["variants"] == metrics["variants"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variants": [{"sources": "everything"}]}, "sources 'everything' is not known"),
        ({"variants": [{"sources": "frontier+greedy"}]}, "frontier stands alone"),
        ({"variants": [{"sources": "greedy+mllm", "verify": "mllm"}]}, "nothing finds such places"),
        ({"variants": [{"verify": ["none", "nonsense"]}]}, "verify 'nonsense' is not known"),
        ({"variants": [{"verify": "mllm", "loud": True}]}, "has no 'loud'"),
        ({"variants": [{"verify": "mllm", "mllm_mode": "guess"}]}, "mllm-mode 'guess' is not known"),
        ({"variants": [{"verify": "mllm", "evidence": "no"}]}, "evidence"),
        ({"variants": [{"neighbors": 2.5}]}, "neighbors"),
        ({"variants": [{"neighbors": "many"}]}, "does not fit"),
        ({"variants": [{"verify": 3}]}, "does not fit"),
        ({"variants": []}, "variants"),
        ({"variants": ["none"]}, "variants"),
        ({"variants": [{"verify": "none", "photos": ["test", "unseen"]}]}, "is for the photos unseen"),
        ({"photos": 3}, "photos does not fit"),
        ({"photos": {}}, "photos does not fit"),
        ({"photos": {"test": 3}}, "photos"),
        ({"more": 1}, "more does not fit: Extra inputs"),
        ({"best": "none"}, "is none of the variants"),
    ],
)
def test_a_recipe_that_does_not_fit(changes: dict[str, Any], words: str, tmp_path: Path, one_line: OneLine) -> None:
    with one_line(words):
        ablate(RECIPE | changes, tmp_path, print, mllm=lambda: pytest.fail("nothing is asked"))
    assert not list(tmp_path.iterdir())


def test_names_of_variants_are_told_apart(run: Path, geolocator: Geolocator, client: Client, one_line: OneLine) -> None:
    verify = ["none", "mllm", "visual+mllm", "alignment+mllm"]
    blocks = [{"verify": verify}, {"verify": "mllm", "evidence": False}]
    variants = [Variant(v.name, v.options) for v in read_variants(RECIPE | {"variants": blocks}).variants]
    assert [variant.name for variant in variants] == [*verify, "mllm no-evidence"]
    with one_line("two variants are called mllm: name them apart"):
        read_variants(RECIPE | {"variants": [*blocks, {"verify": "mllm"}]})
    small = {name: getattr(OPTIONS, name) for name in ("neighbors", "beam_width", "samples", "openings")}
    variants = [replace(variant, options=replace(variant.options, **small)) for variant in variants]
    watched = Watched(client)
    made = walk_variants(folder_of(run, geolocator, watched), variants)
    told = {name: files[VERDICTS] for name, files in made.items() if name != "none"}
    assert told["mllm"] == told["alignment+mllm"]  # it is asked the same
    assert len(set(told.values())) == 3 and len({files["predictions"] for files in made.values()}) == len(variants)
    assert VERDICTS not in made["none"]


def test_neighbors_pictures_that_are_gone_are_left_out(run: Path, geolocator: Geolocator, client: Client) -> None:
    options, index = replace(ASKED, near_pictures=True), geolocator.index
    found = RunFolder(run, geolocator)
    near = found.tables(OPTIONS, found.walk(OPTIONS, until="neighbors")).neighbors
    images = index.rows["image"].to_pylist()
    for row in np.unique(near.rows).tolist():
        images[row] = "gone.png"
    column = index.rows.column_names.index("image")
    bare = replace(index, rows=index.rows.set_column(column, "image", [images]))
    without_pictures = Models(geolocator.alignment, geolocator.tokens, bare, geolocator.tuning)
    watched = Watched(client)
    folder_of(run, without_pictures, watched).walk(options, until=VERDICTS)
    assert {row["status"] for row in rows(run)} == {"ok"}
    assert all(len(request.pictures) == 1 for request in watched.seen)


def test_the_recipe_that_ships_is_the_one_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read whole, its variants checked, and stopped at a model that is not there, before any work."""
    with pytest.raises(SystemExit) as stopped:
        main(["ablate", "--out", str(tmp_path / "run"), "--mllm", "http://127.0.0.1:9/v1"])
    assert stopped.value.code == 1 and "no server answers" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*")) and shipped("eval/verification.toml").is_file()


def test_other_words_are_other_verdicts(run: Path, geolocator: Geolocator, client: Client) -> None:
    """The evidence in words follows from the tuning too, and without words nothing does."""
    sharper = geolocator.replace(tuning=replace(geolocator.tuning, alignment_scale=5000.0))
    for evidence in (True, False):
        options: Options = replace(ASKED, evidence=evidence)
        folder_of(run, geolocator, client).walk(options, until=VERDICTS)
        counted = Down(client, 10**6)
        folder_of(run, sharper, counted).walk(options, until=VERDICTS)
        assert (counted.asked > 0) == evidence
