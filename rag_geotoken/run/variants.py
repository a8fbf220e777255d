"""These classes and functions read an ablation's recipe and cross its lists of options into variants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from rag_geotoken.errors import GeoError
from rag_geotoken.options import Options, parse_option
from rag_geotoken.run.road import ASKING

Name = Annotated[str, Field(pattern=r"^[^/.][^/]*$")]  # may be a part of a file's name


@dataclass(frozen=True)
class Variant:
    """This class holds one combination of options and the splits that it is run on, all if none is named."""

    name: str
    options: Options
    splits: tuple[str, ...] = ()

    @property
    def unverified(self) -> Options:
        """Return the options without verification, against which the gain is measured."""
        sources = tuple(name for name in self.options.sources if name not in ("visual", "mllm"))
        defaults = {name: getattr(Options, name) for name in (*ASKING[1:], "select")}
        return replace(self.options, sources=sources, verify=(), **defaults)


class Block(BaseModel, extra="allow", strict=True):
    """This class is a table of ``[[variants]]``: besides name and splits, options whose values are crossed."""

    name: Name | None = None
    photos: list[str] = []


class Recipe(BaseModel, extra="forbid", strict=True):
    """This class is an ablation's recipe: photos by split, common options, variants, and the report's words."""

    photos: dict[Name, str] = Field(min_length=1)
    blocks: list[Block] = Field(min_length=1, alias="variants")
    options: dict[str, Any] = {}
    gallery: str | None = None
    best: str | None = None
    about: str = ""
    notes: list[str] = []
    seed: int = Field(0, ge=0)
    examples: Literal["errors", "mended"] = "errors"

    @cached_property
    def variants(self) -> list[Variant]:
        """Return all combinations of each block's values."""
        return [variant for block in self.blocks for variant in _crossed(block, self.options)]


def read_variants(recipe: Mapping[str, Any], photos: str | None = None) -> Recipe:
    """Check a recipe as read from TOML, and raise GeoError for what does not fit.

    photos: a source in the place of the recipe's own, on which every variant is run.
    """
    try:
        plan = Recipe.model_validate(recipe)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise GeoError(f"the recipe's {where} does not fit: {first['msg']}") from None
    if photos is not None:
        plan.photos = {"photos": photos}
        for block in plan.blocks:
            block.photos = []
    count = Counter(variant.name for variant in plan.variants)
    if not count:
        raise GeoError("the recipe's variants have no values: give every option at least one")
    if twice := [name for name in count if count[name] > 1]:
        raise GeoError(f"two variants are called {twice[0]}: name them apart")
    if plan.best not in (None, *count):
        raise GeoError(f"best = {plan.best!r} is none of the variants")
    if "index" in plan.photos:
        raise GeoError("photos cannot be called index: the index is in the folder of that name")
    for variant in plan.variants:
        if missing := [split for split in variant.splits if split not in plan.photos]:
            raise GeoError(f"the variant {variant.name} is for the photos {missing[0]}, which the recipe has not")
    for split in plan.photos:
        if all(variant.splits and split not in variant.splits for variant in plan.variants):
            raise GeoError(f"no variant is for the photos {split}")
    return plan


def _crossed(block: Block, common: Mapping[str, Any]) -> Iterator[Variant]:
    """Yield all combinations of a block's values: lists of values, or tables of values by the names shown."""
    crossed = block.model_extra or {}
    names, labeled = {item.name for item in fields(Options)}, list[Mapping[str, Any]]()
    for key, values in crossed.items():
        if key not in names:
            raise GeoError(f"a variant has no {key!r}: give options of locate, and name or photos")
        values = values if isinstance(values, list | dict) else [values]
        labeled.append(values if isinstance(values, dict) else {_shown(key, value): value for value in values})
    for combination in product(*(values.items() for values in labeled)):
        given = dict(common) | {key: value for key, (_, value) in zip(crossed, combination, strict=True)}
        label = block.name or " ".join(label for label, _ in combination)
        if not label or "/" in label or label.startswith("."):
            raise GeoError(f"a variant's name {label!r} is none: it is a part of files' names")
        try:
            options = Options(**{key: parse_option(key, value) for key, value in given.items()})
        except TypeError as error:
            raise GeoError(f"the variant {label} does not fit: {error}") from None
        yield Variant(label, options, tuple(block.photos))


def _shown(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return key if value else f"no-{key}"
    return str(value) if key in ("sources", "verify", "select", "mllm_mode", "propose") else f"{key}={value}"
