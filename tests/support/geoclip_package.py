"""The package geoclip, where it is installed: peers are only run in tests and benchmarks, never by rag_geotoken."""

from __future__ import annotations

from typing import Any


def import_geoclip() -> Any:
    """The package's class GeoCLIP."""
    from geoclip import GeoCLIP

    return GeoCLIP
