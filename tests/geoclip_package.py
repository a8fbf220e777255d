"""The package geoclip, where it is installed: peers are only run in tests and benchmarks, never by rag_geotoken."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


def geoclip_folder() -> Path | None:
    """Where the package lies, found without importing it; None where it is not installed."""
    spec = importlib.util.find_spec("geoclip")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def import_geoclip() -> Any:
    """The package's class GeoCLIP."""
    from geoclip import GeoCLIP

    return GeoCLIP
