"""This room holds the image encoders, one file a backbone."""

from __future__ import annotations

from rag_geotoken.encoders.shared import Backbone as Backbone

OPEN_CLIP = "open_clip:"


def load_backbone(name: str) -> Backbone:
    """Open ``open_clip:REST``, a model of open_clip, or else a CLIP of transformers: a folder or a hub's name.

    REST is a folder, ``hf-hub:OWNER/NAME`` or ``MODEL/TAG``. Raises GeoError, in one line, when it cannot be had.
    """
    if name.startswith(OPEN_CLIP):
        from rag_geotoken.encoders.open_clip import OpenClipEncoder

        return OpenClipEncoder.from_pretrained(name.removeprefix(OPEN_CLIP))
    from rag_geotoken.encoders.clip import ClipEncoder

    return ClipEncoder.from_pretrained(name)
