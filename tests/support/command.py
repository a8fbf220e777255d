"""The command line, called in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rag_geotoken.cli.app import main


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return int(end.value.code or 0)


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that exits with 1."""
    capsys.readouterr()
    assert call(*arguments) == 1
    shown = capsys.readouterr().err.strip()
    assert shown.startswith("rag-geotoken: ") and "\n" not in shown and "Traceback" not in shown
    return shown


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]
