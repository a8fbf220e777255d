"""These functions write files that appear whole or not at all, and read and check them."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rag_geotoken.errors import GeoError


def write_whole(path: Path | str, write: Callable[[Path], object]) -> None:
    """Call `write` with a hidden sibling of `path`, then replace `path` by that file in one step.

    Missing folders are made. Whatever goes wrong, `path` stays as it was and the sibling is removed. Raises GeoError
    when the folder cannot be made or written.
    """
    path = Path(path)
    # The ending is kept, since some writers choose the format by it.
    beside = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        # What a killed process left behind. A second writer at the same time fails loudly instead of half-writing.
        for stray in path.parent.glob(f".{glob.escape(path.stem)}.{'[0-9a-f]' * 8}{glob.escape(path.suffix)}"):
            remove(stray)
    except OSError as error:
        raise GeoError(f"cannot write {path}: {_reason(error)}; choose a folder that can be written") from error
    finally:
        remove(beside)


def check_writable(folder: Path | str) -> None:
    """Make a folder where it is missing and try to write in it, so that an error (GeoError) comes before the work."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise GeoError(f"cannot write into {folder}: {_reason(error)}; choose a folder that can be written") from error


def shipped(name: str) -> Path:
    """Return a file or folder that ships with the package: inside it in a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / name
    return inside if inside.exists() else package.parent / name


def cache_folder() -> Path:
    """Return the folder of what can be made again: ``$XDG_CACHE_HOME/rag-geotoken``, or under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rag-geotoken"


def remove(path: Path) -> None:
    """Remove a file if it exists and can be removed."""
    # Where a folder is read-only or no folder, the file was never written, and the first error says why.
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _reason(error: OSError) -> str:
    if isinstance(error, FileExistsError | NotADirectoryError):
        return "a file stands where a folder is needed"
    return (error.strerror or " ".join(str(error).split()) or type(error).__name__).lower()


def write_text(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    write_whole(path, lambda beside: beside.write_bytes(text.encode()))


def write_json(path: Path | str, obj: object) -> None:
    """Write `obj` as indented JSON in the order given; NaN and infinity are refused, since JSON has none."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file; GeoError when it is missing or is not JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise GeoError(f"there is no {path}: run the command that writes it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise GeoError(f"{path} is not readable JSON: delete it and write it again") from error


def file_sha256(path: Path | str) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits; GeoError when it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise GeoError(f"cannot read {path}: {_reason(error)}") from error
