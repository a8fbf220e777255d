"""This module describes the manifest of an index folder in plain text."""

from __future__ import annotations

from typing import Any


def describe(manifest: dict[str, Any]) -> str:
    """Return lines of a name and its value from the checked manifest of an index, also naming what was not recorded."""
    exact = manifest["factory"] == "Flat"
    recall, effort = ("1, every row is compared", "every row") if exact else _recall_and_effort(manifest)
    parts = ", ".join(manifest.get("parts", [])) or "not recorded"
    lines = {
        "format": manifest["format"],
        "factory": manifest["factory"] + (" (exact)" if exact else ""),
        "rows": f"{manifest['rows']:,}",
        "dim": f"{manifest['dim']} numbers a part, of {parts}",
        "metric": manifest.get("metric", "not recorded"),
        "encoder": manifest["encoder"],
        "recall@20": recall,
        "effort": effort,
        "memory": f"{manifest.get('memory_bytes', manifest['bytes']['index.faiss']):,} bytes when searched",
        "pictures": f"kept here, {manifest['thumbnails']} px" if manifest.get("thumbnails") else "in their source",
        "left out": _left_out(manifest),
        "built": _built(manifest),
    }
    for name, size in manifest["bytes"].items():
        lines[name] = f"{size:,} bytes, SHA-256 {manifest['sha256'][name]}"
    width = max(map(len, lines))
    return "\n".join(f"{name:>{width}}  {text}" for name, text in lines.items())


def _recall_and_effort(manifest: dict[str, Any]) -> tuple[str, str]:
    recall = "not measured, too few rows"
    if manifest.get("queries"):
        target = manifest["made_from"].get("plan", {}).get("recall")
        recall = f"{manifest['recall@20']:.4f} on {manifest['queries']} photos held out"
        recall += f", {target:g} was asked for" if target else ""
    name = manifest.get("effort_name")
    visited = f"{name} {manifest['effort']}" if name else "every code"
    return recall, f"{visited}, then {manifest['refine']} times the rows wanted are compared exactly by all three parts"


def _left_out(manifest: dict[str, Any]) -> str:
    if "left_out_why" not in manifest:
        return f"{manifest.get('left_out', 'not recorded')}"
    why, source = (
        ", ".join(f"{count:,} {reason}" for reason, count in manifest[name].items())
        for name in ("left_out_why", "source_left_out")
    )
    return f"{manifest['left_out']:,}" + (f" ({why})" if why else "") + (f"; by the source: {source}" if source else "")


def _built(manifest: dict[str, Any]) -> str:
    if "build_seconds" not in manifest:
        return "from whole tables, nothing to train"
    trained = f", trained on {manifest['trained_on']:,} rows" if "trained_on" in manifest else ""
    times = ", ".join(
        f"{manifest[f'{step}_seconds']:g} s {step}ing" for step in ("train", "add") if f"{step}_seconds" in manifest
    )
    return f"in {manifest['build_seconds']:g} s{trained}" + (f" ({times})" if times else "")
