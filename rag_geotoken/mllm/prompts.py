"""The words said to a multimodal model: Jinja files in prompts/, strict about variables, with places for pictures."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rag_geotoken.errors import GeoError
from rag_geotoken.storage.files import shipped

if TYPE_CHECKING:
    from jinja2 import Environment

MARK = "\x00"  # around a picture's name in a rendered prompt; no text that is put in can hold it


def render(name: str, pictures: Mapping[str, bytes], **variables: Any) -> tuple[str | bytes, ...]:
    """``prompts/NAME.j2`` with its variables -> the parts of one message in order: text, or a picture's bytes.

    A prompt places a picture by ``{{ picture("photo") }}``. Raises GeoError for a prompt that is not there, a variable
    or picture that it names and is not given.
    """
    from jinja2 import TemplateError

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
    """SHA-256 of all prompt files: what was said."""
    texts = [path.name.encode() + b"\0" + path.read_bytes() for path in sorted(shipped("prompts").glob("*.j2"))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import FileSystemLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(shipped("prompts")), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _clean(value: Any) -> Any:
    """Texts without control characters and what special tokens are made of: nobody has vetted a place's name."""
    if isinstance(value, str):
        return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029<>|]+", " ", value)[:200]
    if isinstance(value, Mapping):
        return {key: _clean(each) for key, each in value.items()}
    return [_clean(each) for each in value] if isinstance(value, list | tuple) else value
