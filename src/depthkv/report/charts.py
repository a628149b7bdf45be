"""Charts as SVG that takes its colours from the page's style sheet, so that one serves light and dark.

They are drawn for a width of 400 pixels, so that letters can be read on a phone and are not too large on a desk. The
same figures give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from depthkv.report.parts import fixed
from depthkv.report.svg import LETTER, WIDTH, cut, drawing, short, stroke, text

COLOURS = 6
"""In the style sheet, as classes c1 to c6."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Of a line."""

    x: float
    y: float
    low: float = math.nan
    """End of its interval, NaN where there is none."""
    high: float = math.nan
    words: str
    """What is shown when the pointer rests on it."""
    aside: bool = False
    """Shown beside the line, which does not go through it."""
    mark: str = ""
    """Words beside it, with a ring around it."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points of one label."""

    label: str
    points: tuple[Point, ...]
    connected: bool = True
    dense: bool = False
    """So many points that each is a dot."""
    bare: bool = False
    """A line without points, and intervals as a band behind it."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One bar or dot of a list of them, or a heading over those below."""

    label: str
    value: float | None = None
    """None makes it a heading."""
    low: float = math.nan
    high: float = math.nan
    text: str = ""
    """The figure in words, to the right."""
    style: int = 0
    beside: tuple[tuple[float, int, str], ...] = ()
    """More marks of a list of dots, on the same line: value, style and words."""


def line_chart(
    lines: Sequence[Line],
    ticks: Sequence[tuple[float, str]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    digits: int = 2,
    log_x: bool = False,
    labelled: bool = False,
    zero: bool = False,
    styles: Sequence[int] | None = None,
    level: tuple[float, str] | None = None,
    shifted: bool = True,
    height: float = 290.0,
) -> Markup:
    """Lines with intervals.

    Args:
        lines: at least one point in all.
        ticks: of the x axis, with their words; a line break parts two lines.
        title: for those who cannot see it.
        x_label: below the axis.
        y_label: above the chart.
        digits: of the figures beside points.
        log_x: a factor of two is as wide everywhere.
        labelled: figures beside the highest and lowest point of each x.
        zero: the y axis shows 0, as a line of its own.
        styles: number of each line's colour and marker, as for `swatch`; None counts from 0.
        level: a value to compare with, as a line across, and its words.
        shifted: lines are a little beside each other, so that their intervals can be told apart; bare ones a little
            above each other, so that equal ones can be seen.
        height: of the whole, in pixels.
    """
    numbers = list(range(len(lines))) if styles is None else list(styles)
    left, right, top = 46.0, 16.0, 34.0
    bottom = 44.0 + 14.0 * max((label.count("\n") for _, label in ticks), default=0)
    points = [point for line in lines for point in line.points]
    place = _scale([x for x, _ in ticks] + [point.x for point in points], left + 22, WIDTH - right - 22, log=log_x)
    values = _finite([value for point in points for value in (point.y, point.low, point.high)] + [0.0] * zero)
    values += [level[0]] if level is not None else []
    y_ticks, least, most = _ticks(
        min(values), max(values), 5, padding=0.09 if labelled or any(point.mark for point in points) else 0.04
    )

    def up(value: float) -> float:
        return top + (height - top - bottom) * (1 - (value - least) / (most - least))

    parts = [text(4, 14, y_label, "axis")]
    for value, words in y_ticks:
        kind = "zero" if zero and value == 0 else "grid"
        parts.append(stroke(left, up(value), WIDTH - right, up(value), kind))
        parts.append(text(left - 6, up(value) + 4, words, "tick end"))
    if level is not None:
        parts.append(stroke(left, up(level[0]), WIDTH - right, up(level[0]), "zero"))
        parts.append(text(left + 6, up(level[0]) - 6, level[1], "tick"))
    for x, label in _apart(ticks, place):
        parts.append(stroke(place(x), height - bottom, place(x), height - bottom + 4, "grid"))
        for i, words in enumerate(label.split("\n")):
            parts.append(text(place(x), height - bottom + 17 + 14 * i, words, "tick middle"))
    parts.append(text((left + WIDTH - right) / 2, height - 5, x_label, "axis middle"))
    for order, (number, line) in enumerate(zip(numbers, lines, strict=True)):
        shift = 4.0 * (order - (len(lines) - 1) / 2) if shifted and len(lines) <= COLOURS else 0.0
        if line.bare:
            parts.append(_bare(number, line, place, up, -0.7 * shift))
            continue
        at = [(place(point.x) + shift, up(point.y)) for point in line.points]
        drawn = []
        through = [place for place, point in zip(at, line.points, strict=True) if not point.aside]
        if line.connected and len(through) > 1:
            path = " ".join(f"{short(x)},{short(y)}" for x, y in through)
            drawn.append(Markup('<polyline class="line{}" points="{}"/>').format(_dash(number), path))
        for (x, y), point in zip(at, line.points, strict=True):
            whisker = _whisker(x, up(point.low), x, up(point.high)) if point.low == point.low else Markup("")
            marker = _dot(x, y) if line.dense and not point.mark else _marker(x, y, number)
            drawn.append(Markup("<g><title>{}</title>{}{}</g>").format(point.words, whisker, marker))
        parts.append(Markup('<g class="c{}">{}</g>').format(number % COLOURS + 1, Markup("").join(drawn)))
        parts += [_ring(*place, point.mark) for place, point in zip(at, line.points, strict=True) if point.mark]
    if labelled:
        parts += _point_labels(list(zip(numbers, lines, strict=True)), place, up, digits)
    return drawing(parts, height, title)


def item_chart(
    items: Sequence[Item], *, title: str, bars: bool = False, reference: float | None = None, x_label: str = ""
) -> Markup:
    """Dots or bars below each other, each with its words above it, so that long names have room.

    Args:
        items: at least one with a value.
        title: for those who cannot see it.
        bars: from zero; dots otherwise.
        reference: a line to compare with.
        x_label: below the axis.
    """
    left, right, pitch = 8.0, 14.0, 37.0 if bars else 34.0
    values = _finite([v for item in items if item.value is not None for v in (item.value, item.low, item.high)])
    values += [value for item in items for value, _, _ in item.beside]
    values += [0.0] if bars else []
    values += [reference] if reference is not None else []
    x_ticks, least, most = _ticks(min(values), max(values), 5, padding=0.0 if bars else 0.05)

    def along(value: float) -> float:
        return left + (WIDTH - left - right) * (value - least) / (most - least)

    top, parts = 4.0, []
    for item in items:
        if item.value is None:
            top += 8
            parts.append(text(left, top + 12, cut(item.label, WIDTH - left - right), "head", whole=item.label))
            top += 22
            continue
        room = WIDTH - left - right - LETTER * len(item.text) - 10
        parts.append(text(left, top + 12, cut(item.label, room), "name", whole=item.label))
        parts.append(text(WIDTH - right, top + 12, item.text, "value end"))
        middle = top + (24 if bars else 23)
        mark: list[Markup] = []
        if bars:
            box = '<rect class="bar" x="{}" y="{}" width="{}" height="11" rx="2"/>'
            width = max(1.0, along(item.value) - along(0))
            mark.append(Markup(box).format(short(along(0)), short(middle - 5.5), short(width)))
        if item.low == item.low and item.low != item.high:
            mark.append(_whisker(along(item.low), middle, along(item.high), middle, "over" if bars else ""))
        for value, style, words in item.beside:
            dot = _marker(along(value), middle, style)
            parts.append(Markup('<g class="c{}"><title>{}</title>{}</g>').format(style % COLOURS + 1, words, dot))
        if not bars:
            mark.append(_marker(along(item.value), middle, item.style))
        parts.append(
            Markup('<g class="c{}"><title>{}: {}</title>{}</g>').format(
                item.style % COLOURS + 1, item.label, item.text, Markup("").join(mark)
            )
        )
        top += pitch
    height = top + (38 if x_label else 22)
    grid = []
    for value, words in x_ticks:
        grid.append(stroke(along(value), 2, along(value), top, "grid"))
        kind = "start" if along(value) < 20 else "end" if along(value) > WIDTH - 30 else "middle"
        grid.append(text(along(value), top + 15, words, f"tick {kind}"))
    if reference is not None:
        grid.append(stroke(along(reference), 2, along(reference), top, "zero"))
    if x_label:
        grid.append(text(WIDTH / 2, height - 5, x_label, "axis middle"))
    return drawing([*grid, *parts], height, title)


def swatch(number: int, *, connected: bool = True, bare: bool = False) -> Markup:
    """A short line and the marker of the line with this number, for a legend."""
    line = Markup('<line class="line{}" x1="1" y1="7" x2="29" y2="7"/>').format(_dash(number)) if connected else ""
    return Markup('<svg class="swatch c{}" viewBox="0 0 30 14" aria-hidden="true">{}{}</svg>').format(
        number % COLOURS + 1, line, "" if bare else _marker(15, 7, number)
    )


def _bare(
    number: int, line: Line, place: Callable[[float], float], up: Callable[[float], float], shift: float
) -> Markup:
    def path(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{short(place(x))},{short(up(y) + shift)}" for x, y in points)

    drawn = [Markup("<title>{}</title>").format(line.label)]
    around = [point for point in line.points if point.low == point.low]
    if around:
        ends = [(point.x, point.high) for point in around] + [(point.x, point.low) for point in reversed(around)]
        drawn.append(Markup('<polygon class="band" points="{}"/>').format(path(ends)))
    points = path([(point.x, point.y) for point in line.points])
    drawn.append(Markup('<polyline class="line{}" points="{}"/>').format(_dash(number), points))
    return Markup('<g class="c{}">{}</g>').format(number % COLOURS + 1, Markup("").join(drawn))


def _point_labels(
    lines: Sequence[tuple[int, Line]], place: Callable[[float], float], up: Callable[[float], float], digits: int
) -> list[Markup]:
    """At each x the highest connected point's figure above it and the lowest one's below, unless others are there."""
    columns: dict[float, list[tuple[float, int, Point]]] = {}
    for number, line in lines:
        for point in line.points:
            if line.connected and not point.aside:
                columns.setdefault(point.x, []).append((point.y, number, point))
    found: list[Markup] = []
    taken: list[tuple[float, float, float]] = []
    for x, column in sorted(columns.items()):
        column.sort(key=lambda entry: entry[:2])
        chosen = [(column[-1], True), (column[0], False)] if len(column) > 1 else [(column[0], True)]
        for (_, number, point), above in chosen:
            ends = _finite([point.y, point.high if above else point.low])
            y = up(max(ends)) - 9 if above else up(min(ends)) + 18
            words = fixed(point.y, digits)
            half = LETTER * len(words) / 2 + 3
            if any(abs(place(x) - at) < half + other and abs(y - height) < 13 for at, height, other in taken):
                continue
            taken.append((place(x), y, half))
            found.append(text(place(x), y, words, f"mark middle c{number % COLOURS + 1}"))
    return found


def _scale(values: Sequence[float], start: float, end: float, *, log: bool) -> Callable[[float], float]:
    """From a value to its place between `start` and `end`."""
    low, high = min(values), max(values)
    if low == high:
        return lambda value: (start + end) / 2
    if log:
        return lambda value: start + (end - start) * math.log(value / low) / math.log(high / low)
    return lambda value: start + (end - start) * (value - low) / (high - low)


def _ticks(low: float, high: float, wanted: int, *, padding: float) -> tuple[list[tuple[float, str]], float, float]:
    """Round values with their words, and the ends of an axis that holds all from `low` to `high` with some room."""
    span = high - low
    if span <= 1e-9 * max(abs(low), abs(high), 1e-9):
        span = max(abs(high), 1.0) * 0.2
        low, high = low - span / 2, high + span / 2
    least, most = low - padding * span, high + padding * span
    rough = (most - least) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) + (1 if round(step / power, 6) == 2.5 else 0)
    first, last = math.ceil(least / step - 1e-9), math.floor(most / step + 1e-9)
    return [(i * step, fixed(i * step, digits)) for i in range(first, last + 1)], least, most


def _apart(ticks: Sequence[tuple[float, str]], place: Callable[[float], float]) -> list[tuple[float, str]]:
    """Without those that would print over their right neighbour."""
    kept: list[tuple[float, str]] = []
    for x, label in sorted(ticks, reverse=True):
        width = LETTER * max(map(len, label.split("\n"))) + 6
        if not kept or place(kept[-1][0]) - place(x) >= width:
            kept.append((x, label))
    return kept[::-1]


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _dash(number: int) -> str:
    """Lines that have the colour of an earlier one are dashed."""
    return " dashed" if number // COLOURS % 2 else ""


def _whisker(x1: float, y1: float, x2: float, y2: float, kind: str = "") -> Markup:
    """A line with a short stroke across each end."""
    across = (0.0, 3.5) if y1 == y2 else (3.5, 0.0)
    strokes = [(x1, y1, x2, y2)]
    strokes += [(x - across[0], y - across[1], x + across[0], y + across[1]) for x, y in ((x1, y1), (x2, y2))]
    path = "".join(f"M{short(a)} {short(b)}L{short(c)} {short(d)}" for a, b, c, d in strokes)
    return Markup('<path class="{}" d="{}"/>').format(f"whisker {kind}".strip(), path)


def _marker(x: float, y: float, number: int) -> Markup:
    """Circle, square, diamond, triangle in turn: colours alone do not tell lines apart for everyone."""
    shapes = (
        [(x - 4, y - 4), (x + 4, y - 4), (x + 4, y + 4), (x - 4, y + 4)],
        [(x, y - 5.8), (x + 5.8, y), (x, y + 5.8), (x - 5.8, y)],
        [(x, y - 5.5), (x + 5.2, y + 4), (x - 5.2, y + 4)],
    )
    if number % 4 == 0:
        return Markup('<circle class="point" cx="{}" cy="{}" r="4.5"/>').format(short(x), short(y))
    corners = " ".join(f"{short(a)},{short(b)}" for a, b in shapes[number % 4 - 1])
    return Markup('<polygon class="point" points="{}"/>').format(corners)


def _dot(x: float, y: float) -> Markup:
    return Markup('<circle class="point" cx="{}" cy="{}" r="2.4"/>').format(short(x), short(y))


def _ring(x: float, y: float, words: str) -> Markup:
    """Around a point, with its words above: to the right, where curves that fall leave room, if they fit."""
    ring = Markup('<circle class="ring" cx="{}" cy="{}" r="8"/>').format(short(x), short(y))
    fits = x + 8 + LETTER * len(words) <= WIDTH
    return ring + text(x + 8 if fits else x + 4, y - 11, words, "head" if fits else "head end")
