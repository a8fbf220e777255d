"""This package says where on Earth a photo was taken, by retrieval-augmented geolocalization."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rag_geotoken.encoders.alignment import GeoAlignment as GeoAlignment
    from rag_geotoken.encoders.location import LocationEncoder as LocationEncoder
    from rag_geotoken.errors import GeoError as GeoError
    from rag_geotoken.geo.cells import S2Tokenizer as S2Tokenizer
    from rag_geotoken.geo.sphere import haversine_km as haversine_km
    from rag_geotoken.index.geo_index import GeoIndex as GeoIndex
    from rag_geotoken.options import Options as Options
    from rag_geotoken.pipeline import Geolocator as Geolocator
    from rag_geotoken.tokens.model import TokenModel as TokenModel
    from rag_geotoken.types import Prediction as Prediction

# Idle OpenMP threads give their core away soon: beside a busy process, spinning ones make everything several times as
# slow. Read when torch is loaded, so it counts only where this package is imported first; what a user set stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

_PUBLIC = {
    "GeoAlignment": "encoders.alignment",
    "GeoError": "errors",
    "GeoIndex": "index.geo_index",
    "Geolocator": "pipeline",
    "LocationEncoder": "encoders.location",
    "Options": "options",
    "Prediction": "types",
    "S2Tokenizer": "geo.cells",
    "TokenModel": "tokens.model",
    "haversine_km": "geo.sphere",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> object:
    # Imported on first use, so that `rag-geotoken --help` does not wait for torch.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rag_geotoken' has no attribute {name!r}")
    return getattr(import_module(f"rag_geotoken.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
