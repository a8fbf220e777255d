"""Verification by a real tiny model in this process: its table, failures, resuming; locate; an ablation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import OPTIONS, OneLine

from rag_geotoken.cli.app import main
from rag_geotoken.decision.pool import without
from rag_geotoken.errors import GeoError
from rag_geotoken.files import shipped
from rag_geotoken.mllm import open_client
from rag_geotoken.mllm.request import Client, Reply, Request
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.run import stages
from rag_geotoken.run.mllm_stage import Asked, Asking, ask_model, decide_told, read_told
from rag_geotoken.run.tables import read_embeddings, read_matches, read_neighbors, read_own_places, read_pool
from rag_geotoken.run.verification import Variant, ablate
from rag_geotoken.tables import read_table
from rag_geotoken.types import MLLM, VISUAL

COLUMNS = [
    "id",
    "verifier",
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
RECIPE: dict[str, Any] = {
    "gallery": "blue-marble:gallery,n=200",
    "photos": "blue-marble:test,n=10",
    "pools": ["retrieved+generated", "generated"],
    "verify": ["none", "alignment", "mllm-pool", "mllm-pool:plain", "mllm-free", "visual+mllm-pool:pictures"],
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


@pytest.fixture
def run(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_table(run / f"verdicts-{name}.parquet").to_pylist()
    return found


def test_a_line_a_photo_with_its_scores_and_cost(run: Path, geolocator: Geolocator, client: Client) -> None:
    pool = read_pool(run)
    path = ask_model(run, "mllm-pool", geolocator, Asked(client, Asking()), pool, read_matches(run))
    assert pq.read_schema(path).names == COLUMNS
    table = rows(run, "mllm-pool")
    assert [len(row["scores"]) for row in table] == pool.mask.sum(axis=1).tolist()
    for row in table:
        assert row["status"] == "ok" and 1 <= row["output_tokens"] == row["requests"] <= 4 and row["prompt_tokens"] > 50
        assert all(score < 0 for score in row["scores"]) and not row["lat"]
    before = path.read_bytes()
    ask_model(run, "mllm-pool", geolocator, Asked(Down(client, 0), Asking()), pool, read_matches(run))
    assert path.read_bytes() == before  # nothing is asked again


def test_the_prompt_says_what_is_asked_for(run: Path, geolocator: Geolocator, client: Client) -> None:
    seen: list[Request] = []

    class Watched(Down):
        def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
            seen.extend(requests)
            return super().ask(requests)

    def said(asking: Asking, matches: bool) -> list[str]:
        seen.clear()
        name = f"watched-{len(list(run.iterdir()))}"
        pool = read_pool(run) if matches else without(read_pool(run), VISUAL)
        (run / "mllm-journal.jsonl").unlink(missing_ok=True)
        found = read_matches(run) if matches else None
        ask_model(run, name, geolocator, Asked(Watched(client, 10**6), asking), pool, found)
        return ["".join(part for part in request.parts if isinstance(part, str)) for request in seen]

    plain, known, matched = said(Asking(evidence=False), False), said(Asking(), False), said(Asking(), True)
    assert all("neighbours" not in text for text in plain)
    assert all("neighbours" in text and "match" not in text for text in known)
    assert all("match" in text and "agreeing" in text for text in matched)
    assert all("blue-marble" not in text and ".png" not in text for text in (*plain, *known, *matched))
    shown = said(Asking(pictures=True), False)
    assert any("seen nearby" in text for text in shown)
    assert all(
        len(request.pictures) == 1 + text.count("seen nearby") for request, text in zip(seen, shown, strict=True)
    )
    for request in seen:
        for picture in request.pictures:
            assert picture.startswith(b"\x89PNG") and b"eXIf" not in picture


def test_killed_in_the_middle_the_rest_falls_back_and_a_resumed_run_is_the_same(
    run: Path, geolocator: Geolocator, client: Client, tmp_path: Path
) -> None:
    pool, scores = read_pool(run), {}
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    ask_model(whole, "mllm-pool", geolocator, Asked(client, Asking()), pool)
    total = sum(row["requests"] for row in rows(whole, "mllm-pool"))
    ask_model(run, "mllm-pool", geolocator, Asked(Down(client, total - 20), Asking()), pool)
    told = read_told(run, "mllm-pool", pool)
    failed = ~told.answered
    assert 0 < failed.sum() < len(failed)
    assert {row["status"] for row in rows(run, "mllm-pool")} == {"ok", "the server does not answer"}
    photo = read_embeddings(run)[1]
    decided = decide_told(geolocator, photo, pool, scores, told, "pool")
    plain = decide_told(geolocator, photo, pool, scores, replace(told, answered=np.zeros_like(failed)), "pool")
    assert (decided.lat_lon[failed] == plain.lat_lon[failed]).all()
    assert (decided.confidence[failed] == plain.confidence[failed]).all()
    path = stages.write_decision(
        run, "half", geolocator, ["pool", "verdicts-mllm-pool"], lambda: decided, verified=told.answered
    )
    table = read_table(path)
    readable = np.array([error is None for error in table["error"].to_pylist()])
    assert (table["verified"].to_numpy(zero_copy_only=False)[readable] == told.answered).all()
    # Without --resume the failures stay as they are; with it only they are asked.
    untouched = Down(client, 10**6)
    ask_model(run, "mllm-pool", geolocator, Asked(untouched, Asking()), pool)
    assert untouched.asked == 0
    again = Down(client, 10**6)
    ask_model(run, "mllm-pool", geolocator, Asked(again, Asking(), resume=True), pool)
    assert 0 < again.asked <= 20
    name = "verdicts-mllm-pool.parquet"
    assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_free_and_diverse_places(run: Path, geolocator: Geolocator, client: Client) -> None:
    class Says(Down):
        """The tiny model knows no places: its answers are counted, and these are read instead."""

        def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
            for i, request in enumerate(requests):
                place = json.dumps({"latitude": 10 + i % 7, "longitude": 20, "confidence": 60})
                yield i, Reply((place,) * request.n if i % 3 else ("I cannot say.",) * request.n, (), 9, 9, 0.1)

    pool = read_pool(run)
    ask_model(run, "mllm-free", geolocator, Asked(Says(client, 0), Asking("free")), pool)
    statuses = [row["status"] for row in rows(run, "mllm-free")]
    assert set(statuses) == {"ok", "refused"} and all(row["raw"] for row in rows(run, "mllm-free"))
    ask_model(run, "mllm-diversify", geolocator, Asked(Says(client, 0), Asking("diversify", answers=2)))
    own = read_own_places(run, "mllm-diversify")
    assert own.shape[1] > 2 and np.isfinite(own[:, 0]).any()
    stages.pool(run, geolocator, OPTIONS, diversify=True)
    joined = read_pool(run)
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
        (["--verify", "mllm", "--mllm", "LLAVA", "--mllm-mode", "guess"], "not asked in the mode 'guess'"),
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
    metrics = ablate(RECIPE, tmp_path, (str(llava), None, None), False, lines.append, weights)
    variants = {(row["split"], row["name"]): row for row in metrics["variants"]}
    assert len(variants) == 6 + 5  # visual needs what is retrieved
    for (pool, name), row in variants.items():
        assert row["n"] == 10 and row["oracle"]["200"] >= row["acc"]["200"]
        assert ("requests" in row["cost"]) == ("mllm" in name)
        assert row["gain"]["200"] == pytest.approx(row["acc"]["200"] - variants[pool, "none"]["acc"]["200"])
    assert variants["generated", "none"]["mended"] == [] and not lines
    assert (tmp_path / "report.html").stat().st_size > 10_000
    page = (tmp_path / "report.html").read_text()
    assert "What verification gains" in page and "visual+mllm-pool:pictures" in page
    again = ablate(RECIPE, tmp_path, (str(llava), None, None), False, lines.append, weights)
    assert len(lines) == 1 and "matches" in lines[0] and "index" in lines[0] and "mllm-pool" in lines[0]
    assert again["variants"] == metrics["variants"]


@pytest.mark.parametrize(
    "changes",
    [
        {"pools": ["everything"]},
        {"verify": ["none", "nonsense"]},
        {"verify": ["alignment"]},
        {"verify": ["none", "mllm-pool:loud"]},
        {"verify": ["none", "mllm-guess"]},
        {"photos": 3},
        {"more": 1},
    ],
)
def test_a_recipe_that_does_not_fit(changes: dict[str, Any], tmp_path: Path, one_line: OneLine) -> None:
    with one_line("[a-z]"):
        ablate(RECIPE | changes, tmp_path, ("nowhere", None, None), False, print)
    assert not list(tmp_path.iterdir())


def test_names_of_variants_are_told_apart() -> None:
    names = ["none", "mllm-pool", "mllm-pool:plain", "visual+mllm-pool", "alignment+mllm-pool"]
    variants = [Variant("retrieved", name) for name in names]
    assert len({variant.name for variant in variants}) == len(names)
    assert variants[1].told == variants[4].told != variants[3].told  # it is asked the same
    with pytest.raises(GeoError, match="retrieved pictures"):
        Variant("generated", "visual")


def test_neighbours_pictures_that_are_gone_are_left_out(run: Path, geolocator: Geolocator, client: Client) -> None:
    index = geolocator.index
    images = index.rows["image"].to_pylist()
    for row in np.unique(read_neighbors(run).rows).tolist():
        images[row] = "gone.png"
    column = index.rows.column_names.index("image")
    bare = replace(index, rows=index.rows.set_column(column, "image", [images]))
    without_pictures = Geolocator(geolocator.alignment, geolocator.tokens, bare, geolocator.tuning)
    asked = Asked(client, Asking(pictures=True))
    ask_model(run, "mllm-gone", without_pictures, asked, read_pool(run))
    assert {row["status"] for row in rows(run, "mllm-gone")} == {"ok"}


def test_the_recipe_that_ships_is_the_one_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read whole, its variants checked, and stopped at a model that is not there, before any work."""
    with pytest.raises(SystemExit) as stopped:
        main(["ablate", "--out", str(tmp_path / "run"), "--mllm", "http://127.0.0.1:9/v1"])
    assert stopped.value.code == 1 and "no server answers" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*")) and shipped("eval/verification.toml").is_file()


def test_other_words_are_other_verdicts(run: Path, geolocator: Geolocator, client: Client) -> None:
    """The evidence in words follows from the tuning too, and without words nothing does."""
    pool, tuning = read_pool(run), geolocator.tuning
    sharper = Geolocator(
        geolocator.alignment, geolocator.tokens, geolocator.index, replace(tuning, alignment_scale=5000.0)
    )
    for name, asking, again in (("mllm-told", Asking(), True), ("mllm-plain", Asking(evidence=False), False)):
        ask_model(run, name, geolocator, Asked(client, asking), pool)
        counted = Down(client, 10**6)
        ask_model(run, name, sharper, Asked(counted, asking), pool)
        assert (counted.asked > 0) == again
