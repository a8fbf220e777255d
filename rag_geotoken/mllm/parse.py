"""A model's free answer -> a place, or why there is none. Nothing is evaluated; the time is linear in the length."""

# ruff: noqa: SIM905 (lists of words)

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rag_geotoken.mllm.angles import LAT, LON, SURE, Angle, angles, plain

OK, UNPARSABLE, OUT_OF_RANGE, REFUSED = "ok", "unparsable", "out of range", "refused"
LONGEST = 100_000  # characters; of a longer answer the end is read, where conclusions stand

_PAIR = set("coordinates coordinate coords coord gps location position point place answer".split())
_PAIR |= set("latlon latlng latlong lonlat lnglat koordinaten coordenadas coordonnées координаты 坐标".split())
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
    """What a text says: ``status`` is ok, unparsable, out of range or refused.

    lat, lon in degrees where it is ok, else None. confidence from 0 to 1, None where none is stated.
    """

    status: str
    lat: float | None = None
    lon: float | None = None
    confidence: float | None = None


def parse_place(text: str) -> Answer:
    """Reads latitude, longitude and confidence out of an answer: JSON, JSON with prose around it, or prose.

    Of several answers one after another the last counts, of a JSON list of answers the surest. A confidence is in
    percent, unless it is written with a decimal point and at most 1. A range of degrees stands for its middle. Numbers
    are never swapped, wrapped or clipped; 0, 0 without confidence is what fills in for an answer, and so a refusal.
    """
    text = text[-LONGEST:].rpartition("</think>")[2]
    for value in reversed(list(_json_values(text))):
        try:
            answer = _from_json(value)
        except RecursionError:
            continue
        if answer is not None:
            return answer
    text = plain(text)
    return _from_prose(text) or Answer(REFUSED if _REFUSAL.search(text) else UNPARSABLE)


def _json_values(text: str) -> Iterator[Any]:
    """The outermost JSON objects and lists in a text, in order; a bracket that is never closed hides what follows."""
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
                try:
                    yield json.loads(text[begin : match.end()], strict=False)
                except (ValueError, RecursionError):
                    continue


def _from_json(value: Any) -> Answer | None:
    """The place in a JSON value; None where it has none."""
    if isinstance(value, dict):
        return _from_object(value)
    if isinstance(value, list):
        if len(value) == 2 and all(_is_number(each) for each in value):
            return _judge(_number(value[0]), _number(value[1]), None)
        answers = [answer for each in value if (answer := _from_json(each))]
        placed = [answer for answer in answers if answer.status == OK]
        return max(placed or answers, key=lambda answer: answer.confidence or 0.0, default=None)
    return None


def _from_object(told: dict[str, Any]) -> Answer | None:
    kinds = {_kind(key): value for key, value in told.items()}
    sure = _confidence(kinds.get("sure"))
    if "lat" in kinds and "lon" in kinds:
        return _judge(_degrees(kinds["lat"], "lat"), _degrees(kinds["lon"], "lon"), sure)
    pair = kinds.get("pair", kinds.get("lonlat"))
    turned = "lonlat" in kinds or told.get("type") == "Point"  # GeoJSON, RFC 7946: longitude first
    if isinstance(pair, list) and len(pair) >= 2 and not isinstance(pair[0], dict | list):
        lat, lon = reversed(pair[:2]) if turned else pair[:2]
        return _judge(_degrees(lat, "lat"), _degrees(lon, "lon"), sure)
    if isinstance(pair, str) and (answer := _from_prose(plain(pair))):
        return _judge(answer.lat, answer.lon, sure) if answer.status == OK else answer
    for value in told.values():
        if answer := _from_json(value):
            if answer.status == OK and answer.confidence is None:
                return _judge(answer.lat, answer.lon, sure)
            return answer
    return None


def _kind(key: str) -> str:
    words = set(re.findall(r"[^\W\d_]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", key).lower()))
    if words & LAT and words & LON:
        return "pair" if key.lower().find("lat") < key.lower().find("l", key.lower().find("lat") + 1) else "lonlat"
    for kind, names in (("lat", LAT), ("lon", LON), ("sure", SURE), ("lonlat", {"lonlat", "lnglat"}), ("pair", _PAIR)):
        if words & names:
            return kind
    return key


def _degrees(value: Any, axis: str) -> float | str:
    """Degrees, or the status that explains why there are none."""
    if value is None or (isinstance(value, str) and value.strip().lower() in _NOTHING):
        return REFUSED
    if _is_number(value):
        return _number(value)
    if isinstance(value, str):
        found = [
            angle for angle in angles(plain(f"{axis}: {value}")) if angle.axis in (axis, None) and not angle.percent
        ]
        if not found:
            return REFUSED if _REFUSAL.search(plain(value)) else UNPARSABLE
        return found[0].degrees
    if isinstance(value, list) and len(value) == 2 and all(_is_number(each) for each in value):
        return sum(map(_number, value)) / 2
    if isinstance(value, dict):
        parts = [value.get(name) for name in ("value", "degrees", "minutes", "seconds")]
        if _is_number(parts[0]):
            return _number(parts[0])
        if _is_number(parts[1]):
            total: float = sum(_number(part) / 60**power for power, part in enumerate(parts[1:]) if _is_number(part))
            side = str(value.get("direction", value.get("hemisphere", "")))[:1].upper()
            return -total if side in ("S", "W") else total
    return UNPARSABLE


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _confidence(value: Any) -> float | None:
    """From 0 to 1; None where it is none."""
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d{1,3}(?:[.,]\d{1,9})?)\s*(%?)\s*", value)
        if not found:
            return None
        number = float(found[1].replace(",", "."))
        fraction = not found[2] and not found[1].isdigit() and number <= 1
    elif _is_number(value):
        number, fraction = _number(value), isinstance(value, float) and value <= 1
    else:
        return None
    chance = number if fraction else number / 100
    return chance if 0 <= chance <= 1 else None


def _from_prose(text: str) -> Answer | None:
    """The last pair of angles in a text; None where there is none."""
    found = angles(text)
    end = len(text.rstrip())
    if found and found[-1].end == end and text.count("{") > text.count("}"):
        found.pop()  # cut off, perhaps in the middle of a number
    pair: tuple[Angle, Angle] | None = None
    last: dict[str | None, Angle] = {}
    sure = None
    for angle in found:
        if angle.axis == "sure":
            sure = angle
            continue
        if angle.axis is None:
            before = last.get(None)
            if angle.percent or not angle.decimal or _MEASURE.match(text, angle.end):
                last.pop(None, None)
            elif before and _beside(text, before, angle):
                turned = _LON_FIRST.search(text[max(0, before.start - 12) : before.start])
                pair, last = (angle, before) if turned else (before, angle), {}
            else:
                last = {None: angle}
            continue
        last.pop(None, None)
        last[angle.axis] = angle
        if "lat" in last and "lon" in last:
            pair, last = (last["lat"], last["lon"]), {}
    if pair is None:
        return None
    percent = _PERCENT.search(text)
    stated = f"{sure.written}{'%' * sure.percent}" if sure else percent and f"{percent[1]}%"
    return _judge(pair[0].degrees, pair[1].degrees, _confidence(stated or None))


def _beside(text: str, first: Angle, second: Angle) -> bool:
    """Whether nothing but a separator stands between; a mere comma is none between decimal commas."""
    between = text[first.end : second.start]
    return bool(between and _BETWEEN.fullmatch(between)) and not (between == "," and "," in first.written)


def _judge(lat: float | str | None, lon: float | str | None, sure: float | None) -> Answer:
    """The answer that two numbers make, or two reasons for there being none."""
    for status in (REFUSED, UNPARSABLE):
        if status in (lat, lon):
            return Answer(status)
    if not isinstance(lat, float) or not isinstance(lon, float) or math.isnan(lat) or math.isnan(lon):
        return Answer(UNPARSABLE)
    if abs(lat) > 90 or abs(lon) > 180:
        return Answer(OUT_OF_RANGE)
    if lat == lon == 0 and not sure:
        return Answer(REFUSED)
    return Answer(OK, lat, lon, sure)
