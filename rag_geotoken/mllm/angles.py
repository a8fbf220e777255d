"""Latitudes and longitudes as people and models write them: decimal, in minutes and seconds, in several languages."""

# ruff: noqa: RUF001, SIM905 (letters of several alphabets; lists of words)

from __future__ import annotations

import math
import re
from dataclasses import dataclass

LAT = set("lat latitude latitud latitudine breite breitengrad enlem широта 纬度 緯度 위도".split())
LON = set("lon lng long longitude longitud longitudine länge längengrad boylam долгота 经度 經度 経度 경도".split())
SURE = set("confidence conf certainty probability konfidenz sicherheit confiance confianza 置信度".split())

# "O" is east in German and west in Spanish and French: nobody can tell, so it is no hemisphere here.
_SIDES = {
    ("lat", 1): "n|north|northern|nord|norte|noord|nördlich|северной|с. ш.|с.ш.|北纬|北緯|북위",
    ("lat", -1): "s|south|southern|süd|sud|sur|sul|zuid|südlich|южной|ю. ш.|ю.ш.|南纬|南緯|남위",
    ("lon", 1): "e|east|eastern|ost|est|este|leste|oost|östlich|восточной|в. д.|в.д.|东经|東經|東経|동경",
    ("lon", -1): "w|west|western|ouest|oeste|ovest|westlich|западной|з. д.|з.д.|西经|西經|西経|서경",
}
_SIDE = {word: side for side, words in _SIDES.items() for word in words.split("|")}


def _any(words: set[str]) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=lambda word: (-len(word), word)))


_NUMBER = r"\d{1,9}(?:[.,]\d{1,25})?(?:e[+-]?\d{1,4}(?!\w))?(?!\d|\.\d)"
_SIDE_WORDS = _any(set(_SIDE))
# Every repetition is bounded, so a search takes a bounded number of steps from each character.
_ANGLE = re.compile(
    rf"""
    (?:(?<![^\W_])(?:(?P<lat>{_any(LAT)})|(?P<lon>{_any(LON)})|(?P<sure>{_any(SURE)}))(?![^\W\d_])
       (?:[^\w+\-.]|\.(?!\d)){{0,12}}
       (?:(?:is|of|ist|est|es|è|é|about|approximately|approx|around|roughly|circa|ca|between|level|score|degrees)\b
          [^\w+\-]{{0,4}}){{0,3}})?
    (?:(?<![^\W\d_])(?P<before>{_SIDE_WORDS})(?![^\W\d_])[\s.:]{{0,3}}(?P<insign>[+-])?
       |(?<![\w.])(?P<sign>[+-])\s?|(?<![\w.+\-]))
    (?P<degrees>{_NUMBER})
    (?:\s{{0,2}}(?P<unit>°|deg(?:rees?)?\b|grad\b|度|도|d\b|%))?
    (?:\s{{0,2}}(?:-|to\b|and\b|bis\b|\.\.\.?|…|~)\s{{0,2}}(?P<upto>[+-]?{_NUMBER})\s{{0,2}}°?)?
    (?:\s{{0,2}}(?P<minutes>\d{{1,3}}(?:[.,]\d{{1,15}})?)\s{{0,2}}(?:\\?'(?!')|m\b|min\b|分|분)
       (?:\s{{0,2}}(?P<seconds>\d{{1,3}}(?:[.,]\d{{1,15}})?)\s{{0,2}}(?:\\?"|''|s\b|sec\b|秒|초))?)?
    (?(before)|(?:\s{{0,2}}[(]?(?P<after>{_SIDE_WORDS})(?![^\W\d_]))?)
    """,
    re.VERBOSE | re.IGNORECASE,
)
# "lat/lon: 48.2, 16.4" labels a pair, not its first number.
_AND = r"\b[\s,/&|_-]{0,4}(?:and|und|et|y|e)?\s{0,2}\b"
_LAT_LON = re.compile(rf"\b(?:{_any(LAT)}){_AND}(?:{_any(LON)})\b", re.IGNORECASE)
_LON_LAT = re.compile(rf"\b(?:{_any(LON)}){_AND}(?:{_any(LAT)})\b", re.IGNORECASE)
# One look for many: signs that keyboards lack, and full-width forms.
_SAME = str.maketrans("−–—‒′’‘ʹ″”“º˚：，；（）．＋－０１２３４５６７８９", "----''''\"\"\"°°:,;().+-0123456789")


@dataclass(frozen=True)
class Angle:
    """A number in a text, from ``start`` to ``end``.

    axis: lat, lon, sure (a confidence) or None where nothing tells. degrees: NaN where it contradicts itself.
    decimal: Whether it was written with decimals. written: As it stands there, without sign and unit.
    """

    axis: str | None
    degrees: float
    start: int
    end: int
    decimal: bool
    percent: bool
    written: str


def plain(text: str) -> str:
    """A text with one look for signs that have many."""
    return _LON_LAT.sub("lonlat", _LAT_LON.sub("latlon", text.translate(_SAME)))


def angles(text: str) -> list[Angle]:
    """All numbers in a text that ``plain`` gave, in order."""
    found: list[Angle] = []
    while match := _ANGLE.search(text, found[-1].end if found else 0):
        found.append(_angle(match))
    return found


def _angle(match: re.Match[str]) -> Angle:
    told = match.groupdict()
    axis = next((name for name in ("lat", "lon", "sure") if told[name]), None)
    size = _float(told["degrees"])
    for divisor, part in ((60, told["minutes"]), (3600, told["seconds"])):
        if part:
            size = size + _float(part) / divisor if _float(part) < 60 else math.nan
    sign = -1.0 if "-" in (told["sign"], told["insign"]) else 1.0
    side = _side(told["before"] or told["after"], told["unit"] is not None)
    degrees, end, text = sign * size, match.end(), match.string
    if told["upto"]:
        if side is None and axis in (None, "sure"):  # "48.2 and 16.4" is a pair, "48.2-16.4" is anything
            end = match.end("unit" if told["unit"] else "degrees")
            degrees = math.nan if "-" in text[end : match.start("upto")] else degrees
        else:
            degrees = _middle(degrees, _float(told["upto"]))
    if side is not None:
        if axis not in (None, side[0]) or (sign < 0 < side[1]):
            degrees = math.nan  # such as a latitude east, or -33.9 north
        axis, degrees = axis or side[0], abs(degrees) * side[1]
    decimal = "." in told["degrees"] or "," in told["degrees"] or told["minutes"] is not None
    return Angle(axis, degrees, match.start(), end, decimal, told["unit"] == "%", told["degrees"])


def _side(word: str | None, unit: bool) -> tuple[str, int] | None:
    """The axis and sign of a hemisphere. A small letter counts only after a degree sign: "12.5 e 41.9" is Italian."""
    if word is None or (len(word) == 1 and word.islower() and not unit):
        return None
    return _SIDE.get(word.lower())


def _middle(low: float, high: float) -> float:
    if abs(low - high) > 180:  # across the date line
        middle = (low + high + 360) / 2
        return middle - 360 if middle > 180 else middle
    return (low + high) / 2


def _float(written: str) -> float:
    return float(written.replace(",", "."))
