"""Variants of an ablation: a recipe's lists of options crossed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from rag_geotoken.errors import GeoError
from rag_geotoken.options import Options, parse_option
from rag_geotoken.run.road import ASKING

OPTIONAL = {"gallery": str, "options": dict, "best": str, "about": str, "notes": list, "seed": int, "examples": str}


@dataclass(frozen=True)
class Variant:
    """One cell of the crossing: options of the road and of the decision, the splits it is run on (all for none)."""

    name: str
    options: Options
    splits: tuple[str, ...] = ()

    @property
    def unverified(self) -> Options:
        """The same without verification: what its gain is measured against."""
        sources = tuple(name for name in self.options.sources if name not in ("visual", "mllm"))
        plain = {name: getattr(Options, name) for name in (*ASKING[1:], "select")}
        return replace(self.options, sources=sources, verify=(), **plain)


@dataclass(frozen=True)
class Recipe:
    """An ablation: splits of photos by name, the variants, and what the report says."""

    photos: dict[str, str]
    variants: list[Variant]
    gallery: str | None = None
    best: str | None = None
    about: str = ""
    notes: tuple[str, ...] = ()
    seed: int = 0
    examples: str = "errors"


def read_variants(recipe: Mapping[str, Any]) -> Recipe:
    """A recipe as TOML gives it -> the same checked, its lists crossed. Raises GeoError for what does not fit."""
    known = {"photos", "variants", *OPTIONAL}
    if unknown := [name for name in recipe if name not in known]:
        raise GeoError(f"a recipe has no {unknown[0]}: it has photos and variants, and may have {', '.join(OPTIONAL)}")
    for name, kind in ({"photos": dict, "variants": list} | OPTIONAL).items():
        if name in recipe and not isinstance(recipe[name], kind):
            raise GeoError(f"the recipe's {name} is no {kind.__name__}")
    if not recipe.get("photos") or not recipe.get("variants"):
        raise GeoError("a recipe needs photos (a table of sources by name) and variants (a list of tables)")
    if not all(isinstance(source, str) for source in recipe["photos"].values()):
        raise GeoError("the recipe's photos are no table of sources by name")
    if not all(isinstance(block, dict) for block in recipe["variants"]):
        raise GeoError("the recipe's variants are no list of tables: write [[variants]]")
    variants = [variant for block in recipe["variants"] for variant in _crossed(block, recipe.get("options", {}))]
    if not variants:
        raise GeoError("the recipe's variants have no values: give every option at least one")
    for split in recipe["photos"]:
        if not is_name(split) or split == "index":
            raise GeoError(f"photos cannot be called {split!r}: it is a folder's name, and index is taken")
    if recipe.get("examples", "errors") not in ("errors", "mended"):
        raise GeoError("the recipe's examples are errors or mended")
    if recipe.get("seed", 0) < 0:
        raise GeoError("the recipe's seed is below zero")
    if not all(isinstance(note, str) for note in recipe.get("notes", ())):
        raise GeoError("the recipe's notes are no list of texts")
    for i, variant in enumerate(variants):
        if variant.name in [other.name for other in variants[:i]]:
            raise GeoError(f"two variants are called {variant.name}: name them apart")
        if missing := [split for split in variant.splits if split not in recipe["photos"]]:
            raise GeoError(f"the variant {variant.name} is for the photos {missing[0]}, which the recipe has not")
    for split in recipe["photos"]:
        if not any(not variant.splits or split in variant.splits for variant in variants):
            raise GeoError(f"no variant is for the photos {split}")
    said = {name: recipe[name] for name in ("gallery", "best", "about", "seed", "examples") if name in recipe}
    if "best" in said and said["best"] not in [variant.name for variant in variants]:
        raise GeoError(f"best = {said['best']!r} is none of the variants")
    return Recipe(dict(recipe["photos"]), variants, notes=tuple(recipe.get("notes", ())), **said)


def _crossed(block: Mapping[str, Any], common: Mapping[str, Any]) -> Iterator[Variant]:
    """Every combination of a block's values: lists of values, or tables of values by the names shown."""
    names = {item.name for item in fields(Options)}
    lists: list[list[tuple[str, str, Any]]] = []
    splits = block.get("photos", [])
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise GeoError(f"a variant's photos {splits!r} are no list of names")
    for key, value in block.items():
        if key in ("name", "photos"):
            continue
        if key not in names:
            raise GeoError(f"a variant has no {key!r}: give options of locate, and name or photos")
        named = value if isinstance(value, dict) else {_shown(key, one): one for one in _as_list(value)}
        lists.append([(label, key, one) for label, one in named.items()])
    for combination in product(*lists):
        given = dict(common) | {key: one for _, key, one in combination}
        label = block.get("name") or " ".join(label for label, *_ in combination)
        if not isinstance(label, str) or not is_name(label):
            raise GeoError(f"a variant's name {label!r} is none: it is a part of files' names")
        try:
            options = Options(**{key: parse_option(key, value) for key, value in given.items()})
        except TypeError as error:
            raise GeoError(f"the variant {label} does not fit: {error}") from None
        yield Variant(label, options, tuple(block.get("photos", ())))


def is_name(text: str) -> bool:
    """Whether a text may be a part of a file's name, in its own folder."""
    return bool(text) and "/" not in text and not text.startswith(".")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _shown(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return key if value else f"no-{key}"
    return str(value) if key in ("sources", "verify", "select", "mllm_mode", "propose") else f"{key}={value}"
