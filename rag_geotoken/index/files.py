"""These functions check and write the manifest of an index folder, which lists its files with their SHA-256s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rag_geotoken.errors import GeoError
from rag_geotoken.photos.thumbnails import BYTES, OFFSETS
from rag_geotoken.storage.files import file_sha256, read_json, write_json

VECTORS, ROWS, MANIFEST, PROJECTIONS = "index.faiss", "rows.parquet", "manifest.json", "projections.npy"
CELLS = "cells.npy"  # embeddings of the cells around the gallery, where they are kept
# The files of an index by its format: exact over all three parts, or approximate over the image part.
FORMATS = {"rag-geotoken-index/1": (VECTORS, ROWS), "rag-geotoken-index/2": (VECTORS, ROWS, PROJECTIONS)}


def check_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of an index folder after checking the sizes and SHA-256s of its files.

    Raises GeoError for a missing or malformed manifest, and for a missing or changed file.
    """
    if not (folder / MANIFEST).is_file():
        raise GeoError(f"no index in {folder}: build one with rag-geotoken index build")
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    try:
        names = files_of(manifest)
        files = {name: (manifest["bytes"][name], manifest["sha256"][name]) for name in names}
        complete = {"encoder", "dim", "rows", "made_from", "factory"} <= manifest.keys()
        if PROJECTIONS in names:
            complete = complete and int(manifest["refine"]) > 0 and int(manifest["effort"]) >= 0
    except (TypeError, KeyError, ValueError, AttributeError):
        complete = False
    if not complete:
        raise GeoError(f"{MANIFEST} in {folder} is not that of a {' or '.join(FORMATS)} index: build it again")
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            raise GeoError(f"{name} is missing in {folder}: build the index again")
        if path.stat().st_size != size or file_sha256(path) != sha256:
            raise GeoError(f"{name} in {folder} is truncated or changed: build the index again")
    return manifest


def files_of(manifest: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the files that an index with this manifest consists of."""
    thumbnails = (BYTES, OFFSETS) if manifest.get("thumbnails") else ()
    return FORMATS[manifest["format"]] + thumbnails + ((CELLS,) if manifest.get("cells") else ())


def write_manifest(folder: Path, facts: dict[str, Any], made_from: dict[str, Any]) -> dict[str, Any]:
    """Write and return the manifest of an index whose files are all written; remove files of another kind of index."""
    names = files_of(facts)
    for stray in {PROJECTIONS, BYTES, OFFSETS, CELLS} - set(names):
        (folder / stray).unlink(missing_ok=True)
    manifest = facts | {
        "made_from": made_from,
        "bytes": {name: (folder / name).stat().st_size for name in names},
        "sha256": {name: file_sha256(folder / name) for name in names},
    }
    write_json(folder / MANIFEST, manifest)
    return manifest
