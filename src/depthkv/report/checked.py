"""JSON objects whose values are checked when they are taken, and that say where they are when one is wrong."""

from __future__ import annotations

import json
import math
from typing import Any

from depthkv.errors import DepthKVError
from depthkv.evaluate.intervals import Score


class CheckedObject:
    """One object. Every method raises DepthKVError where the key holds something else, with its path and what it is."""

    def __init__(self, values: dict[str, Any], place: str) -> None:
        self.values, self.place = values, place

    def __contains__(self, key: str) -> bool:
        """Null counts as not there: our own commands write it for what they could not measure."""
        return self.values.get(key) is not None

    def path(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def wrong(self, key: str, expected: str) -> DepthKVError:
        got = kind(self.values[key]) if key in self.values else "no such key"
        return DepthKVError(f"expected {self.path(key)} to be {expected}, got {got}")

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str):
            raise self.wrong(key, "text")
        return value

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def number(self, key: str) -> float:
        value = self.values.get(key)
        try:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError
            return float(value)
        except (ValueError, OverflowError):
            raise self.wrong(key, "a number") from None

    def maybe_number(self, key: str) -> float | None:
        return self.number(key) if key in self else None

    def whole(self, key: str, least: int = 0) -> int:
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
            raise self.wrong(key, f"a whole number of at least {least}")
        return value

    def object(self, key: str) -> CheckedObject:
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return CheckedObject(value, self.path(key))

    def sequence(self, key: str) -> list[Any]:
        value = self.values.get(key)
        if not isinstance(value, list):
            raise self.wrong(key, "a list")
        return value

    def objects(self, key: str) -> list[CheckedObject]:
        found = []
        for i, value in enumerate(self.sequence(key)):
            if not isinstance(value, dict):
                raise DepthKVError(f"expected {self.path(key)}[{i}] to be an object, got {kind(value)}")
            found.append(CheckedObject(value, f"{self.path(key)}[{i}]"))
        return found

    def score(self, key: str) -> Score:
        found = self.object(key)
        low, high = found.maybe_number("low"), found.maybe_number("high")
        if (low is None) != (high is None):
            raise found.wrong("high" if high is None else "low", "a number like the interval's other end")
        return Score(
            value=found.number("value"),
            low=math.nan if low is None else low,
            high=math.nan if high is None else high,
            difference=found.maybe_number("difference"),
            difference_low=found.maybe_number("difference_low"),
            difference_high=found.maybe_number("difference_high"),
            count=found.whole("count"),
        )

    def shown(self) -> dict[str, str]:
        """All entries as text for the page, nested ones by their path."""
        entries: dict[str, str] = {}
        for key, value in self.values.items():
            if isinstance(value, dict):
                inner = CheckedObject(value, self.path(key)).shown()
                entries |= {f"{key}: {name}": text for name, text in inner.items()}
            elif value is not None and value != "":
                entries[key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return entries


def kind(value: object) -> str:
    """For errors: what was found, in a few words."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
