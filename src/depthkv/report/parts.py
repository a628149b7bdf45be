"""What the page is made of: tables and charts with their words, before they are HTML, and how numbers are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from depthkv.evaluate.intervals import Score

MINUS = "\u2212"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Of a table."""

    text: str
    notes: tuple[str, ...] = ()
    """Small lines below it."""
    faint: bool = False
    """The notes say nothing for sure."""
    heat: float | None = None
    """0 to 1, for a coloured background."""


@dataclass(frozen=True, kw_only=True)
class Heading:
    """Of one or more columns."""

    text: str
    span: int = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """Of a table: a heading to the left and cells, or a heading alone over the rows below."""

    heading: str
    note: str = ""
    cells: tuple[Cell, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Table:
    """One or two lines of headings, the first of each for the rows' headings."""

    caption: str
    headings: tuple[tuple[Heading, ...], ...]
    rows: tuple[Row, ...]
    kind: str = "table"
    """"table", or "heat" where cells have colours and the caption stands above."""
    folded: bool = False
    """Shown on demand: the figures of a chart."""

    @property
    def width(self) -> int:
        """Columns."""
        return sum(heading.span for heading in self.headings[-1])


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture in SVG."""

    svg: str
    """Made by `charts`, with all text in it escaped."""
    caption: str
    legend: tuple[tuple[str, str], ...] = ()
    """Swatches in SVG and their words."""
    kind: str = "chart"


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What arms wrote after one prompt, side by side."""

    prompt: str
    columns: tuple[tuple[str, str], ...]
    """Headings and texts."""
    kind: str = "texts"


@dataclass(frozen=True, kw_only=True)
class PlanPart:
    """Which layer reads which."""

    labels: str
    """The arms that have it."""
    summary: str
    layers: tuple[tuple[int, int, int], ...]
    """Layer, source, colour of its group from 1."""
    kind: str = "plan"


@dataclass(frozen=True, kw_only=True)
class Code:
    """Commands."""

    caption: str
    text: str
    kind: str = "code"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Figures in large letters."""

    entries: tuple[tuple[str, str, str], ...]
    """Name, figure, and what stands below it."""
    kind: str = "facts"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Parts beside each other where there is room."""

    parts: tuple[Table | Chart, ...]
    small: bool = False
    """Two fit beside each other on a phone."""
    kind: str = "grid"


AnyPart = Table | Chart | Texts | PlanPart | Code | Facts | Grid
"""What a section holds; the page's template tells them apart by `kind`."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Of the page."""

    anchor: str
    title: str
    intro: str
    parts: tuple[AnyPart, ...]


def fixed(value: float, digits: int) -> str:
    """`-0.5` as "\u22120.50", zero without a sign, thousands apart."""
    text = f"{value:,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def signed(value: float, digits: int) -> str:
    """With a sign, except for zero."""
    text = fixed(value, digits)
    return text if text.startswith(MINUS) or float(text.replace(",", "")) == 0 else f"+{text}"


def interval(low: float | None, high: float | None, digits: int, *, sign: bool = False) -> str:
    """ "[1.0, 2.0]", or nothing where there is none."""
    if low is None or high is None or low != low or high != high:
        return ""
    shape = signed if sign else fixed
    return f"[{shape(low, digits)}, {shape(high, digits)}]"


def is_clear(score: Score) -> bool:
    """Whether the interval of the difference leaves out zero."""
    low, high = score.difference_low, score.difference_high
    return low is not None and high is not None and (low > 0 or high < 0)


def score_cell(score: Score | None, digits: int, unit: str = "") -> Cell:
    """The value, its interval, and the difference from the full cache with its own."""
    if score is None:
        return Cell(text="")
    notes = [interval(score.low, score.high, digits)]
    if score.difference is not None:
        around = interval(score.difference_low, score.difference_high, digits, sign=True)
        notes.append(f"{signed(score.difference, digits)} {around}".strip())
    return Cell(
        text=fixed(score.value, digits) + unit,
        notes=tuple(note for note in notes if note),
        faint=score.difference is not None and not is_clear(score),
    )


def change_words(found: Score, full: Score, digits: int, unit: str, per: str = "", whose: str = "") -> str:
    """Such as "rises by 0.12 nats [0.10, 0.14] per token, from 3.40 to 3.52"."""
    difference = found.difference or 0.0
    low, high = found.difference_low, found.difference_high
    ends = f"from {fixed(full.value, digits)} to {fixed(found.value, digits)}"
    ends += f" ({whose})" if whose else ""
    around = interval(low, high, digits, sign=True)
    if around and not is_clear(found):
        return f"changes by {signed(difference, digits)}{unit} {around}{per}, {ends}, maybe by chance"
    way = "rises" if difference > 0 else "falls"
    if difference < 0 and low is not None and high is not None:
        low, high = -high, -low
    return f"{way} by {fixed(abs(difference), digits)}{unit} {interval(low, high, digits)}".rstrip() + f"{per}, {ends}"


def per_cent(share: float) -> str:
    """`0.333` as "33 %"."""
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.2g} %"


def headings(*names: str) -> tuple[tuple[Heading, ...], ...]:
    """One line of headings."""
    return (tuple(Heading(text=name) for name in names),)


def listed(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
