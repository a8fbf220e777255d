"""A build that is killed outright goes on where it was and ends in the same bytes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.index.build import Plan
from rag_geotoken.index.geo_index import GeoIndex
from rag_geotoken.run.build_index import make_index
from rag_geotoken.storage.parquet import read_table

SOURCE, PLAN = "blue-marble:gallery,n=700", Plan("IVF8,SQfp16")
FILES = ("rows.parquet", "projections.npy", "index.faiss", "stages/projections.parquet")
BUILD = f"""
import sys
from pathlib import Path
from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.run.build_index import make_index
from rag_geotoken.index.build import Plan
out, weights = map(Path, sys.argv[1:])
make_index(out, {SOURCE!r}, GeoAlignment.from_pretrained(weights), Plan({PLAN.factory!r}))
"""


def test_killed_while_it_encodes(tmp_path: Path, alignment: GeoAlignment, weights: Path) -> None:
    out, parts = tmp_path / "killed", tmp_path / "killed" / "stages" / ".projections.parts"
    process = subprocess.Popen([sys.executable, "-c", BUILD, str(out), str(weights)], stderr=subprocess.DEVNULL)
    try:
        begun = time.monotonic()
        while not list(parts.glob("[!.]*.parquet")):
            assert process.poll() is None and time.monotonic() - begun < 120
            time.sleep(0.005)
    finally:
        process.kill()  # SIGKILL: nothing in the process can tidy up
        process.wait()
    done = {path: path.stat().st_mtime_ns for path in parts.glob("[!.]*.parquet")}
    assert 1 <= len(done) < 3 and not (out / "manifest.json").exists()
    seen: list[int] = []
    project = alignment.project
    alignment.project = lambda pixels, batch=256: (seen.append(len(pixels)), project(pixels, batch))[1]  # type: ignore[method-assign]
    try:
        make_index(out, SOURCE, alignment, PLAN)
    finally:
        del alignment.project
    # The last part may have been half-written when it was killed; whole ones are not encoded again.
    assert sum(seen) == 700 - 256 * len(done)
    make_index(tmp_path / "whole", SOURCE, alignment, PLAN)
    for name in FILES:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    ids = GeoIndex.load(out).rows["id"].to_pylist()
    assert sorted(ids) == sorted(read_table(out / "stages" / "photos.parquet")["id"].to_pylist())
    assert not [path for path in out.rglob(".*") if path.is_file()]
