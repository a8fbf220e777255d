"""How the code is written: short functions, plain first sentences, few positional parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import rag_geotoken

PACKAGE = Path(rag_geotoken.__file__).parent
Function = ast.FunctionDef | ast.AsyncFunctionDef


def definitions() -> Iterator[tuple[str, ast.AST]]:
    """Every module, class and function of the package with where it stands."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | Function):
                yield f"{path.relative_to(PACKAGE)}:{getattr(node, 'name', '')}", node


def test_no_function_has_more_than_60_lines_or_8_positional_parameters() -> None:
    long, wide = [], []
    for where, node in definitions():
        if isinstance(node, Function):
            assert node.end_lineno is not None
            long += [where] if node.end_lineno - node.lineno >= 60 else []
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
            wide += [where] if len([name for name in names if name not in ("self", "cls")]) > 8 else []
    assert not long and not wide


def test_a_docstring_begins_with_a_sentence_on_one_line() -> None:
    wrong = []
    for where, node in definitions():
        assert isinstance(node, ast.Module | ast.ClassDef | Function)
        text = ast.get_docstring(node)
        if text is None or getattr(node, "name", "").startswith("_"):
            continue
        first = text.splitlines()[0]
        if not first.endswith((".", "?", ":")) or "->" in first or len(first.split()) < 3:
            wrong.append(f"{where}: {first}")
    assert not wrong, "\n".join(wrong)


def test_the_package_shows_its_public_names_alone() -> None:
    shown = [name for name in dir(rag_geotoken) if not name.startswith("_")]
    assert shown == sorted(rag_geotoken.__all__) and len(shown) == 10
    rooms = [path for path in PACKAGE.iterdir() if path.is_file() or any(path.rglob("*.py"))]
    assert len(rooms) <= 22
