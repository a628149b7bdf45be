"""JSON objects whose values are checked when they are taken, and that say where they are when one is wrong."""

from __future__ import annotations

import json
import math
from typing import Any

from depthkv.errors import DepthKVError, PlanError
from depthkv.evaluate.intervals import Score
from depthkv.plan import SharingPlan

Matrix = tuple[tuple[float | None, ...], ...]
"""A row for each layer and a column for each earlier one; None where there is no figure."""


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

    def share(self, key: str) -> float:
        """A number from 0 to 1."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise self.wrong(key, "a number from 0 to 1")
        return float(value)

    def shares(self, key: str, count: int) -> tuple[float, ...]:
        """As many numbers from 0 to 1."""
        found = CheckedObject({f"{key}[{i}]": value for i, value in enumerate(self.sequence(key))}, self.place)
        if len(found.values) != count:
            raise DepthKVError(f"expected {self.path(key)} to be a list of {count} numbers, got {len(found.values)}")
        return tuple(map(found.share, found.values))

    def wholes(self, key: str, count: int) -> tuple[int, ...]:
        """As many whole numbers from 0."""
        found = CheckedObject({f"{key}[{i}]": value for i, value in enumerate(self.sequence(key))}, self.place)
        if len(found.values) != count:
            raise DepthKVError(f"expected {self.path(key)} to be a list of {count} numbers, got {len(found.values)}")
        return tuple(map(found.whole, found.values))

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts."""
        found = CheckedObject({f"{key}[{i}]": value for i, value in enumerate(self.sequence(key))}, self.place)
        return tuple(map(found.text, found.values))

    def layers(self, key: str, num_layers: int) -> tuple[int, ...]:
        """Different layers of a model with `num_layers`, in the file's order."""
        layers: dict[int, None] = {}
        for i, layer in enumerate(self.sequence(key)):
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < num_layers or layer in layers:
                expected = f"a layer from 0 to {num_layers - 1} that is not in the list yet"
                raise DepthKVError(f"expected {self.path(key)}[{i}] to be {expected}, got {kind(layer)}")
            layers[layer] = None
        return tuple(layers)

    def plan(self, key: str, num_layers: int) -> SharingPlan:
        """One source for each layer."""
        try:
            plan = SharingPlan(self.sequence(key))
        except PlanError as error:
            raise DepthKVError(f"{self.path(key)}: {error}") from error
        if plan.num_layers != num_layers:
            raise self.wrong(key, f"a list of {num_layers} layers")
        return plan

    def led_plan(self, num_layers: int) -> SharingPlan:
        """`kv_source_layers`, with the `leaders` beside them checked."""
        plan = self.plan("kv_source_layers", num_layers)
        if self.layers("leaders", num_layers) != plan.leaders:
            expected = f"the layers that read themselves, {list(plan.leaders)}"
            raise DepthKVError(f"expected {self.path('leaders')} to be {expected}, got {self.values['leaders']}")
        return plan

    def matrix(self, key: str, size: int) -> Matrix:
        """Numbers or null on and below the diagonal, null above it."""
        rows = self.sequence(key)
        if len(rows) != size:
            raise DepthKVError(f"expected {self.path(key)} to be a list of {size} rows, got {len(rows)}")
        found: list[tuple[float | None, ...]] = []
        for i, row in enumerate(rows):
            if not isinstance(row, list) or len(row) != size:
                got = f"one of {len(row)}" if isinstance(row, list) else kind(row)
                raise DepthKVError(f"expected {self.path(key)}[{i}] to be a list of {size} numbers or null, got {got}")
            entries = CheckedObject({f"{key}[{i}][{j}]": value for j, value in enumerate(row)}, self.place)
            for name in list(entries.values)[i + 1 :]:
                if name in entries:
                    raise entries.wrong(name, "null, since a layer reads no later one")
            found.append(tuple(map(entries.maybe_number, entries.values)))
        return tuple(found)

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
