"""These functions read angles as people write them: decimal, in minutes and seconds, in several languages."""

# ruff: noqa: RUF001, SIM905 (letters of several alphabets; lists of words)

from __future__ import annotations

import math
import re
from dataclasses import dataclass

LAT = set("lat latitude latitud latitudine breite breitengrad enlem широта 纬度 緯度 위도".split())
LON = set("lon lng long longitude longitud longitudine länge längengrad boylam долгота 经度 經度 経度 경도".split())
CONFIDENCE = set("confidence conf certainty probability konfidenz sicherheit confiance confianza 置信度".split())

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
    (?:(?<![^\W_])(?:(?P<lat>{_any(LAT)})|(?P<lon>{_any(LON)})|(?P<confidence>{_any(CONFIDENCE)}))(?![^\W\d_])
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
# One character for many that look alike: signs that keyboards lack, and full-width forms.
_SAME = str.maketrans("−–—‒′’‘ʹ″”“º˚：，；（）．＋－０１２３４５６７８９", "----''''\"\"\"°°:,;().+-0123456789")


@dataclass(frozen=True)
class Angle:
    """This is a number in a text, from ``start`` to ``end``.

    axis: lat, lon, confidence or None where nothing tells. degrees: NaN where it contradicts itself.
    decimal: Whether it was written with decimals. written: As it stands in the text, without sign and unit.
    """

    axis: str | None
    degrees: float
    start: int
    end: int
    decimal: bool
    percent: bool
    written: str


def normalize(text: str) -> str:
    """Replace characters that look alike by one of them, and labels of pairs by "latlon" or "lonlat"."""
    return _LON_LAT.sub("lonlat", _LAT_LON.sub("latlon", text.translate(_SAME)))


def find_angles(text: str) -> list[Angle]:
    """Return all numbers in a text that ``normalize`` gave, in order."""
    angles: list[Angle] = []
    while match := _ANGLE.search(text, angles[-1].end if angles else 0):
        angles.append(_angle(match))
    return angles


def _angle(match: re.Match[str]) -> Angle:
    groups = match.groupdict()
    axis = next((name for name in ("lat", "lon", "confidence") if groups[name]), None)
    degrees, end, text = _float(groups["degrees"]), match.end(), match.string
    for divisor, name in ((60, "minutes"), (3600, "seconds")):
        if groups[name]:
            part = _float(groups[name])
            degrees += part / divisor if part < 60 else math.nan
    negative = "-" in (groups["sign"], groups["insign"])
    degrees = -degrees if negative else degrees
    word, side = groups["before"] or groups["after"], None
    # A small letter is a hemisphere only after a degree sign: "12.5 e 41.9" is Italian.
    if word and (len(word) > 1 or word.isupper() or groups["unit"]):
        side = _SIDE.get(word.lower())
    if groups["upto"]:
        if side is None and axis in (None, "confidence"):  # "48.2 and 16.4" is a pair, "48.2-16.4" is anything
            end = match.end("unit" if groups["unit"] else "degrees")
            degrees = math.nan if "-" in text[end : match.start("upto")] else degrees
        else:
            degrees = _middle(degrees, _float(groups["upto"]))
    if side is not None:
        if axis not in (None, side[0]) or (negative and side[1] > 0):
            degrees = math.nan  # such as a latitude east, or -33.9 north
        axis, degrees = axis or side[0], abs(degrees) * side[1]
    return Angle(
        axis,
        degrees,
        start=match.start(),
        end=end,
        decimal=groups["minutes"] is not None or "." in groups["degrees"] or "," in groups["degrees"],
        percent=groups["unit"] == "%",
        written=groups["degrees"],
    )


def _middle(low: float, high: float) -> float:
    middle = (low + high) / 2
    if abs(low - high) > 180:  # across the date line
        return middle - 180 if middle > 0 else middle + 180
    return middle


def _float(written: str) -> float:
    return float(written.replace(",", "."))
