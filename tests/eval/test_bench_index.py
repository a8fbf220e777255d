"""The benchmark of the index on little data: its figures are whole, and its page and plan follow from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bench_build
import bench_index
import numpy as np
import pytest
import torch
from bench_table import table

from rag_geotoken.encoders.location import LocationConfig, LocationEncoder
from rag_geotoken.index.describe import describe

ROWS, DIM = 3000, 16


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    return bench_build.build(ROWS, DIM)


def test_the_build_has_a_peak_of_its_own(built: dict[str, Any]) -> None:
    assert (built["rows"], built["factory"], built["data_bytes"]) == (ROWS, "IVF256,SQfp16", ROWS * DIM * 2)
    assert built["peak_bytes"] > built["peak_bytes_before"] > 10**7
    assert built["above_data_bytes"] == built["peak_bytes"] - built["data_bytes"] and built["met"]
    assert built["recall@20"] >= 0.9 and built["queries_per_second_of_faiss"] >= built["queries_per_second"] * 0.5


def test_a_plan_grows_with_its_rows(built: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_build, "PILOT", 4096)
    data = np.random.default_rng(0).standard_normal((4096, DIM)).astype(np.float32)
    one = bench_build.plan(built, data, 100_000, 16.0)
    ten = bench_build.plan(built, data, 1_000_000, 16.0)
    small = bench_build.plan(built, data, 1_000_000, 0.02)
    assert one["factory"].endswith("SQfp16") and small["factory"].endswith("PQ8")
    assert ten["index_gb"] == pytest.approx(1_000_000 * (2 * DIM + 8) / 1e9, abs=0.1)
    assert ten["queries_per_second"] < one["queries_per_second"]
    assert ten["disk_gb"] > ten["index_gb"] >= small["index_gb"]


def test_flat_and_the_lists_are_measured_on_queries_held_out() -> None:
    vectors = np.random.default_rng(0).standard_normal((6000, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    said: list[str] = []
    figures = bench_index.compare(vectors, 0.9, 1000.0, said.append)
    assert figures["rows"] == 4500 and figures["recall@20"] >= 0.85 and not figures["met"]
    assert figures["factory"] in said[-1] and "learns from" in said[0]


def test_an_encoded_gallery_answers_as_one_encoded_afresh(built: dict[str, Any]) -> None:
    torch.manual_seed(0)
    encoder = LocationEncoder(LocationConfig(frequencies=8, hidden=16, dim=8))
    places = np.random.default_rng(0).uniform((-80, -180), (80, 180), (400, 2))
    gallery = bench_index.against_encoding(encoder, places, lambda _: None)
    assert gallery["same_places"] and gallery["places"] == 400
    result = {"command": "x", "seed": 0, "threads": 2, "versions": {"python": "3"}, "geoclip_gallery": gallery}
    page = table(result | {"build": built, "plans": []})
    assert page.count("\n| ") == 4 and "| 100 times |" in page and "GB above its data" in page


def test_info_says_why_photos_were_left_out() -> None:
    manifest = {
        "format": "rag-geotoken-index/2", "factory": "IVF8,SQfp16", "rows": 1200, "dim": 8, "encoder": "e",
        "metric": "inner product", "parts": ["projection"], "made_from": {"plan": {"recall": 0.95}},
        "recall@20": 0.961, "queries": 120, "effort_name": "nprobe", "effort": 3, "refine": 2, "memory_bytes": 5000,
        "left_out": 3, "left_out_why": {"without coordinates": 3}, "source_left_out": {"of 5 KB or less": 4},
        "trained_on": 900, "train_seconds": 1.5, "add_seconds": 0.5, "build_seconds": 9.0,
        "bytes": {"index.faiss": 5000}, "sha256": {"index.faiss": "ab" * 32},
    }  # fmt: skip
    text = describe(manifest)
    for part in (
        "3 (3 without coordinates); by the source: 4 of 5 KB or less",
        "0.9610 on 120 photos",
        "0.95 was asked",
    ):
        assert part in text
    for part in ("nprobe 3", "2 times", "5,000 bytes", "ab" * 32, "inner product", "1,200", "trained on 900"):
        assert part in text
    old = {
        name: manifest[name] for name in ("format", "factory", "rows", "dim", "encoder", "bytes", "sha256", "refine")
    }
    assert "not recorded" in describe(old | {"made_from": {}, "effort": 64})


def test_the_page_lies_beside_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_index, "geoclip_folder", lambda: None)
    vectors = np.eye(2000, 32, dtype=np.float32) + np.float32(0.1)
    monkeypatch.setattr(bench_index, "view_embeddings", lambda weights, views: vectors)
    bench_index.run_bench(tmp_path / "index.json", tmp_path, 2000, 0, lambda _: None)
    assert "views: 500 x 32" in (tmp_path / "index.md").read_text() and (tmp_path / "index.json").is_file()
