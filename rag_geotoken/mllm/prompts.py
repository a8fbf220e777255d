"""These functions render prompts to multimodal models from the Jinja files in prompts/, with pictures in them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rag_geotoken.errors import GeoError
from rag_geotoken.storage.files import shipped

MARK = "\x00"  # around a picture's name in a rendered prompt; no text that is put in can hold it


def render(name: str, pictures: Mapping[str, bytes], **variables: Any) -> tuple[str | bytes, ...]:
    """Render ``prompts/NAME.j2`` to the parts of one message in order: text, or a picture's bytes.

    A prompt places a picture by ``{{ picture("photo") }}``. Raises GeoError for a prompt that is missing, and for a
    variable or picture that it names and is not given.
    """

    def picture(name: str) -> str:
        if name not in pictures:
            raise GeoError(f"the prompt shows a picture {name!r}, given are: {', '.join(pictures)}")
        return f"{MARK}{name}{MARK}"

    try:
        text = _environment().get_template(f"{name}.j2").render(**_clean(variables), picture=picture)
    except TemplateError as error:
        raise GeoError(f"prompts/{name}.j2 cannot be used: {error}") from None
    parts = text.strip().split(MARK)
    return tuple(pictures[part] if i % 2 else part for i, part in enumerate(parts) if i % 2 or part)


def prompts_sha256() -> str:
    """Return the SHA-256 of all prompt files, as 64 hexadecimal digits."""
    texts = [path.name.encode() + b"\0" + path.read_bytes() for path in sorted(shipped("prompts").glob("*.j2"))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(shipped("prompts")), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _clean(value: Any) -> Any:
    """Remove control characters and what special tokens are made of: nobody has vetted a place's name."""
    if isinstance(value, str):
        return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029<>|]+", " ", value)[:200]
    if isinstance(value, Mapping):
        return {key: _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list | tuple) else value
