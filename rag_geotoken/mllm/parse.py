"""These functions read a place out of a model's free answer, or say why it has none.

Nothing in an answer is evaluated, and the time is linear in its length.
"""

# ruff: noqa: SIM905 (lists of words)

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from rag_geotoken.mllm.angles import CONFIDENCE, LAT, LON, Angle, find_angles, normalize

OK, UNPARSABLE, OUT_OF_RANGE, REFUSED = "ok", "unparsable", "out of range", "refused"
LONGEST = 100_000  # characters; of a longer answer the end is read, where conclusions stand

_PAIR = set("coordinates coordinate coords coord gps location position point place answer".split())
_PAIR |= set("latlon latlng latlong lonlat lnglat koordinaten coordenadas coordonnées координаты 坐标".split())
# What a key's word says of its value; where a key has several such words, the last kind in this order counts.
_KINDS = ((_PAIR, "pair"), ({"lonlat", "lnglat"}, "lonlat"), (CONFIDENCE, "confidence"), (LON, "lon"), (LAT, "lat"))
_KIND = {word: kind for words, kind in _KINDS for word in words}
_PRIORITY = [kind for _, kind in _KINDS]
_NOTHING = set("null none nil unknown unsure n/a na n.a. - ? undefined unbekannt inconnu desconocido".split())
_NOTHING |= set("desconhecido sconosciuto неизвестно 未知 不明".split()) | {""}
_REFUSAL = re.compile(
    r"\b(?:can(?:no|')?t|can not|could(?:n't| not)|unable|not able|won't|refuse|decline|sorry|apologi[sz]e|impossible"
    r"|unknown|not possible|no idea|(?:do not|don't) know|not (?:enough|sufficient)|insufficient|null|none"
    r"|indeterminate|kann (?:ich |es )?(?:\w{1,20} ){0,6}nicht|leider|unmöglich|nicht möglich|unbekannt"
    r"|weiß (?:es |ich )?nicht"
    r"|ne (?:peux|puis|sais)|désolée?|inconnue?|no puedo|lo siento|imposible|desconocid[oa]|no sé"
    r"|não (?:posso|consigo|sei)|desculpe|non (?:posso|so)|mi dispiace|impossibile|nie mogę|przepraszam|helaas|kan niet"
    r"|üzgünüm|bilmiyorum|не могу|извините|невозможно|не знаю|неизвестно)\b"
    r"|无法|無法|抱歉|对不起|不能|未知|できません|申し訳|わかりません|죄송|할 수 없|لا أستطيع|عذر|آسف|क्षमा|नहीं",
    re.IGNORECASE,
)
_BETWEEN = re.compile(r"[\s°)]{0,3}(?:[,;/|&]|and|und|et|y|e|und)?[\s(]{0,4}", re.IGNORECASE)
_LON_FIRST = re.compile(r"(?:lonlat\W{0,6}|point\s?\()$", re.IGNORECASE)  # the latter is well-known text, ISO 19125
_MEASURE = re.compile(r"\s?(?:k?m|mi|miles?|kilomet|met(?:er|re)s?|feet|ft|C|F|kg|hours?|years?|percent)\b|\s?[%€$£]")
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,9})?)\s?%\s{0,2}(?:confiden|sure|certain|sicher|probab)", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """This is what a text says: ``status`` is ok, unparsable, out of range or refused.

    lat, lon in degrees where it is ok, else None. confidence from 0 to 1, None where none is stated.
    """

    status: str
    lat: float | None = None
    lon: float | None = None
    confidence: float | None = None


def parse_place(text: str) -> Answer:
    """Read latitude, longitude and confidence out of an answer: JSON, JSON with prose around it, or prose.

    Of several answers one after another the last counts, of a JSON list of answers the surest. A confidence is in
    percent, unless it is written with a decimal point and at most 1. A range of degrees stands for its middle. Numbers
    are never swapped, wrapped or clipped; 0, 0 without confidence is what fills in for an answer, and so a refusal.
    """
    text = text[-LONGEST:].rpartition("</think>")[2]
    for value in reversed(list(_json_values(text))):
        with suppress(RecursionError):
            if answer := _from_json(value):
                return answer
    text = normalize(text)
    return _from_prose(text) or Answer(REFUSED if _REFUSAL.search(text) else UNPARSABLE)


def _json_values(text: str) -> Iterator[Any]:
    """Yield the outermost JSON objects and lists of a text; a bracket that is never closed hides what follows."""
    depth, begin, quoted = 0, 0, False
    for match in re.finditer(r'\\.|["{}\[\]]', text, re.DOTALL):
        char = match.group()
        if char == '"':
            quoted = depth > 0 and not quoted
        elif not quoted and char in "{[":
            begin = match.start() if depth == 0 else begin
            depth += 1
        elif not quoted and char in "}]" and depth:
            depth -= 1
            if depth == 0:
                with suppress(ValueError, RecursionError):
                    yield json.loads(text[begin : match.end()], strict=False, parse_int=_integer)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 20 else float(digits)  # infinite rather than an overflow later


def _from_json(value: Any) -> Answer | None:
    """Return the place in a JSON value; None where it has none."""
    if isinstance(value, list):
        if len(value) == 2 and all(map(_is_number, value)):
            return _answer(*value)
        answers = [answer for item in value if (answer := _from_json(item))]
        located = [answer for answer in answers if answer.status == OK]
        return max(located or answers, key=lambda answer: answer.confidence or 0.0, default=None)
    if not isinstance(value, dict):
        return None
    fields = {_kind(key): field for key, field in value.items()}
    confidence = _confidence(fields.get("confidence"))
    if "lat" in fields and "lon" in fields:
        return _answer(_degrees(fields["lat"], "lat"), _degrees(fields["lon"], "lon"), confidence)
    pair = fields.get("pair", fields.get("lonlat"))
    if isinstance(pair, list) and len(pair) >= 2 and not isinstance(pair[0], dict | list):
        lon_first = "lonlat" in fields or value.get("type") == "Point"  # GeoJSON, RFC 7946: longitude first
        lat, lon = reversed(pair[:2]) if lon_first else pair[:2]
        return _answer(_degrees(lat, "lat"), _degrees(lon, "lon"), confidence)
    prose = [_from_prose(normalize(pair))] if isinstance(pair, str) else []
    answer = next(filter(None, chain(prose, map(_from_json, value.values()))), None)
    if answer and answer.status == OK and answer.confidence is None:
        return replace(answer, confidence=confidence)
    return answer


def _kind(key: str) -> str:
    """Return what a key names, such as "lat" or "pair"; a key that is none of these stands for itself."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", key).lower())
    kinds = [_KIND[word] for word in words if word in _KIND]
    if "lat" in kinds and "lon" in kinds:
        return "pair" if kinds.index("lat") < kinds.index("lon") else "lonlat"
    return max(kinds, key=_PRIORITY.index, default=key)


def _degrees(value: Any, axis: str) -> float | None:
    """Return the degrees that a JSON value gives; None for a refusal, NaN for what cannot be read."""
    if value is None or (isinstance(value, str) and value.strip().lower() in _NOTHING):
        return None
    if isinstance(value, str):
        text = normalize(value)
        for angle in find_angles(f"{axis}: {text}"):
            if angle.axis in (axis, None) and not angle.percent:
                return angle.degrees
        return None if _REFUSAL.search(text) else math.nan
    if isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)):
        return float(sum(value)) / 2
    if isinstance(value, dict):
        if _is_number(value.get("value")):
            return float(value["value"])
        degrees, *parts = (value.get(name) for name in ("degrees", "minutes", "seconds"))
        if _is_number(degrees):
            total = degrees + sum(part / 60**power for power, part in enumerate(parts, 1) if _is_number(part))
            side = str(value.get("direction", value.get("hemisphere", "")))[:1].upper()
            return float(-total if side in ("S", "W") else total)
    return float(value) if _is_number(value) else math.nan


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _confidence(value: Any) -> float | None:
    """Return a confidence from 0 to 1 of a JSON value or a number's text; None where it is none."""
    match = re.fullmatch(r"\s*(\d{1,3}(?:[.,]\d+)?(?:e-\d+)?)\s*(%?)\s*", str(value))
    if not match:
        return None
    number = float(match[1].replace(",", "."))
    is_fraction = number <= 1 and not match[2] and not match[1].isdigit()
    confidence = number if is_fraction else number / 100
    return confidence if confidence <= 1 else None


def _from_prose(text: str) -> Answer | None:
    """Return the last pair of angles in a text; None where there is none."""
    angles = find_angles(text)
    if angles and angles[-1].end == len(text.rstrip()) and text.count("{") > text.count("}"):
        angles.pop()  # cut off, perhaps in the middle of a number
    pair: tuple[Angle, Angle] | None = None
    last: dict[str | None, Angle] = {}  # by axis
    percent = _PERCENT.search(text)
    stated = f"{percent[1]}%" if percent else None
    for angle in angles:
        if angle.axis == "confidence":
            stated = f"{angle.written}{'%' * angle.percent}"
        elif angle.axis is not None:
            last.pop(None, None)
            last[angle.axis] = angle
            if "lat" in last and "lon" in last:
                pair, last = (last["lat"], last["lon"]), {}
        elif angle.percent or not angle.decimal or _MEASURE.match(text, angle.end):
            last.pop(None, None)
        elif None in last and _is_separator(text, last[None], angle):
            first = last[None]
            lon_first = _LON_FIRST.search(text[max(0, first.start - 12) : first.start])
            pair, last = (angle, first) if lon_first else (first, angle), {}
        else:
            last = {None: angle}
    return _answer(pair[0].degrees, pair[1].degrees, _confidence(stated)) if pair else None


def _is_separator(text: str, first: Angle, second: Angle) -> bool:
    """Tell whether only a separator stands between two angles; a mere comma is none between decimal commas."""
    between = text[first.end : second.start]
    return bool(between and _BETWEEN.fullmatch(between)) and not (between == "," and "," in first.written)


def _answer(lat: float | None, lon: float | None, confidence: float | None = None) -> Answer:
    """Make the answer of two numbers, where None stands for a refusal and NaN for what cannot be read."""
    if lat is None or lon is None:
        return Answer(REFUSED)
    if math.isnan(lat) or math.isnan(lon):
        return Answer(UNPARSABLE)
    if abs(lat) > 90 or abs(lon) > 180:
        return Answer(OUT_OF_RANGE)
    if lat == lon == 0 and not confidence:
        return Answer(REFUSED)
    return Answer(OK, float(lat), float(lon), confidence)
