"""Pictures over layers: maps of a figure for each pair, bars for each layer, and which layers lead at each size.

A map is an image of one pixel for each pair inside an SVG with its axes, so that one of 80 layers takes few bytes. Its
colours are viridis' (bright is better), which can be told apart on light and on dark. The same figures give the same
bytes.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from depthkv.plan import SharingPlan
from depthkv.report.checked import Matrix
from depthkv.report.parts import fixed
from depthkv.report.svg import WIDTH, drawing, short, stroke, text

_VIRIDIS = ("440154", "482878", "3e4a89", "31688e", "26828e", "1f9e89", "35b779", "6dcd59", "b4de2c", "fde725")
_MOST_TITLES = 40
"""Layers up to which each pair of a map says its figure when the pointer rests on it."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """From figures to colours."""

    low: float
    high: float
    log: bool = False
    falling: bool = False
    """The smallest figure is the brightest."""

    def share(self, value: float) -> float:
        """0 is the darkest colour and 1 the brightest; figures beyond an end have its colour."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low))
        share = 0.5 if low == high else min(1.0, max(0.0, (value - low) / (high - low)))
        return 1 - share if self.falling else share

    def marks(self) -> list[tuple[float, str]]:
        """Figures for its legend: both ends, or the powers of ten between them where there are at least two."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            if last > first:
                powers = [10.0**power for power in range(first, last + 1, 1 + (last - first) // 5)]
                return [(power, f"{power:g}") for power in powers]
            return [(value, figure(value)) for value in (self.low, self.high)]
        span = self.high - self.low
        return [(value, fixed(value, 0 if span >= 10 else 1 if span >= 2 else 2)) for value in (self.low, self.high)]


def scale_of(values: Matrix, *, log: bool = False, falling: bool = False) -> Scale | None:
    """Over all figures below the diagonal (of those above zero if `log`); None where there are none."""
    found = [value for i, row in enumerate(values) for value in row[:i] if value is not None and (value > 0 or not log)]
    return Scale(low=min(found), high=max(found), log=log, falling=falling) if found else None


def layer_map(
    values: Matrix, scale: Scale, *, title: str, plan: SharingPlan | None = None, small: bool = False
) -> Markup:
    """A row for each layer and a column for each earlier one, coloured; the legend is in the half that stays empty.

    Args:
        values: on and below the diagonal; None is left blank. With a plan the diagonal is, too.
        scale: of the colours.
        title: for those who cannot see it.
        plan: its leaders are marked on the diagonal, the sources of its followers outlined.
        small: for many beside each other, with fewer words.
    """
    size = len(values)
    width, left, top = (180.0, 22.0, 9.0) if small else (WIDTH, 46.0, 9.0)
    room = width - left - 6
    cell = room / size
    height = top + room + (18 if small else 40)
    below = 0 if plan is None else 1
    inside = [Markup('<path class="blank" d="M0 {}{}H0z"/>').format(below, "h1v1" * (size - below))]
    shares = [
        [None if value is None or (plan is not None and i == j) else scale.share(value) for j, value in enumerate(row)]
        for i, row in enumerate(values)
    ]
    inside.append(_image(shares, 0, 0, size, size))
    if plan is not None:
        pairs = [(source, layer) for layer, source in enumerate(plan.kv_source_layers) if source != layer]
        outline = "".join(f"M{source} {layer}h1v1h-1z" for source, layer in pairs)
        dots = "".join(f"M{leader + 0.2:.1f} {leader + 0.2:.1f}h.6v.6h-.6z" for leader in plan.leaders)
        inside.append(Markup('<path class="leads" d="{}"/>').format(dots))
        wide = min(3.0, max(2.0, 0.3 * cell)) / cell
        both = (
            '<path class="under" stroke-width="{1:.3f}" d="{0}"/><path class="chosen" stroke-width="{2:.3f}" d="{0}"/>'
        )
        inside.append(Markup(both).format(outline, wide, wide / 2.2))
    if size <= _MOST_TITLES:
        shown = [
            Markup('<path d="M{} {}h1v1h-1z"><title>{} \u2190 {}: {}</title></path>').format(j, i, i, j, figure(value))
            for i, row in enumerate(values)
            for j, value in enumerate(row)
            if value is not None and shares[i][j] is not None
        ]
        inside.append(Markup('<g class="hits">{}</g>').format(Markup("").join(shown)))
    place = Markup('<g transform="translate({} {}) scale({})">{}</g>')
    parts = [place.format(left, top, f"{cell:.4f}", Markup("").join(inside))]
    for layer in layer_ticks(size, cell, 24 if small else 20):
        parts.append(text(left - 5, top + (layer + 0.5) * cell + 4, str(layer), "tick end"))
        parts.append(text(left + (layer + 0.5) * cell, top + room + 14, str(layer), "tick middle"))
    if not small:
        parts.append(text(left + room / 2, height - 5, "reads this layer's keys and values", "axis middle"))
        turned = '<text class="axis middle" transform="translate(13 {}) rotate(-90)">{}</text>'
        parts.append(Markup(turned).format(short(top + room / 2), "layer"))
    parts += _legend(scale, left + room * (0.52 if small else 0.5), width - (6 if small else 20), top, small)
    return drawing(parts, height, title, width)


def layer_bars(shares: Sequence[float], plan: SharingPlan | None, *, title: str, y_label: str) -> Markup:
    """An upright bar for each layer, from 0 to 100 %, the plan's leaders in colour, or all of them."""
    size = len(shares)
    left, top, tall = 46.0, 28.0, 130.0
    room = WIDTH - left - 10
    cell = room / size
    parts = [text(4, 14, y_label, "axis")]
    for share in (0.0, 0.5, 1.0):
        y = top + tall * (1 - share)
        parts.append(stroke(left, y, left + room, y, "grid"))
        parts.append(text(left - 6, y + 4, f"{100 * share:.0f} %", "tick end"))
    box = '<rect class="{}" x="{}" y="{}" width="{}" height="{}"><title>layer {}: {} %</title></rect>'
    for layer, share in enumerate(shares):
        leads = plan is None or plan.kv_source_layers[layer] == layer
        high = max(tall * share, 1.0)
        x, y = left + (layer + 0.1) * cell, top + tall - high
        numbers = (short(x), short(y), f"{0.8 * cell:.2f}", short(high))
        parts.append(Markup(box).format("bar c1" if leads else "rest", *numbers, layer, fixed(100 * share, 0)))
    for layer in layer_ticks(size, cell, 20):
        parts.append(text(left + (layer + 0.5) * cell, top + tall + 15, str(layer), "tick middle"))
    parts.append(text(left + room / 2, top + tall + 33, "layer", "axis middle"))
    return drawing(parts, top + tall + 40, title)


def staircase(
    sizes: Sequence[Sequence[int]], chosen: int | None, num_layers: int, *, title: str, kept: Sequence[int]
) -> Markup:
    """A column for each layer, filled at the sizes at which it leads.

    Args:
        sizes: the leaders of each, from the most to the fewest.
        chosen: which size is marked, None for none.
        num_layers: of the model.
        title: for those who cannot see it.
        kept: leaders in colour.
    """
    left, top = 46.0, 28.0
    room, rows = WIDTH - left - 10, len(sizes)
    cell = room / num_layers
    pitch = min(20.0, max(240.0 / rows, 2.0))
    parts = [text(4, 14, "layers that keep a cache", "axis")]
    for layer in range(num_layers):
        runs: list[list[int]] = []
        for i, leaders in enumerate(sizes):
            if layer not in leaders:
                continue
            if runs and runs[-1][1] == i:
                runs[-1][1] = i + 1
            else:
                runs.append([i, i + 1])
        x, wide = short(left + (layer + 0.1) * cell), f"{0.8 * cell:.2f}"
        path = "".join(f"M{x} {short(top + a * pitch)}h{wide}V{short(top + b * pitch)}h-{wide}z" for a, b in runs)
        last = min((len(sizes[i]) for i in range(rows) if layer in sizes[i]), default=0)
        words = f"layer {layer} keeps its cache down to {last} layers"
        style = "bar c1" if layer in kept else "rest"
        parts.append(Markup('<path class="{}" d="{}"><title>{}</title></path>').format(style, path, words))
    marks = dict.fromkeys([*([] if chosen is None else [chosen]), 0, rows - 1, rows // 4, rows // 2, 3 * rows // 4])
    shown: list[float] = []
    for i in marks:
        y = top + (i + 0.5) * pitch
        if all(abs(y - other) >= 13 for other in shown):
            shown.append(y)
            kind = "head" if i == chosen else "tick"
            parts.append(text(left - 6, y + 4, str(len(sizes[i])), f"{kind} end"))
    if chosen is not None:
        frame = '<rect class="frame" x="{}" y="{}" width="{}" height="{}"/>'
        parts.append(Markup(frame).format(left, short(top + chosen * pitch), short(room), short(pitch)))
    bottom = top + rows * pitch
    for layer in layer_ticks(num_layers, cell, 20):
        parts.append(text(left + (layer + 0.5) * cell, bottom + 15, str(layer), "tick middle"))
    parts.append(text(left + room / 2, bottom + 33, "layer", "axis middle"))
    return drawing(parts, bottom + 40, title)


def box_swatch(kind: str) -> Markup:
    """A filled box, for a legend."""
    box = '<svg class="swatch box" viewBox="0 0 14 14" aria-hidden="true">{}</svg>'
    shape = {
        "outlined": '<rect class="under" stroke-width="3" x="2" y="2" width="10" height="10"/>'
        '<rect class="chosen" stroke-width="1.4" x="2" y="2" width="10" height="10"/>',
        "leads": '<rect class="leads" x="3" y="3" width="8" height="8"/>',
        "blank": '<rect class="blank" x="1" y="1" width="12" height="12"/>',
        "rest": '<rect class="rest" x="1" y="1" width="12" height="12"/>',
        "bar": '<rect class="bar c1" x="1" y="1" width="12" height="12"/>',
        "half": '<rect class="blank" x="1" y="1" width="12" height="12"/>'
        '<rect class="bar c2" x="1" y="7" width="12" height="6"/>',
        "gone": '<rect class="bar c2" x="1" y="1" width="12" height="12"/>',
        "band": '<rect class="band c1" x="1" y="1" width="12" height="12"/>',
    }[kind]
    return Markup(box).format(Markup(shape))


def figure(value: float) -> str:
    """Three digits, or four after the point where it is small."""
    if value == 0:
        return "0"
    return fixed(value, 0 if abs(value) >= 1000 else max(0, min(4, 2 - math.floor(math.log10(abs(value))))))


def _legend(scale: Scale, left: float, right: float, top: float, small: bool) -> list[Markup]:
    """A bar of all colours, from dark to bright, with figures below it."""
    steps = [i / 127 for i in range(128)]
    parts = [_image([steps], left, top, right - left, 8 if small else 12)]
    y = top + (22 if small else 27)
    for value, words in scale.marks():
        x = left + (right - left) * scale.share(value)
        kind = "start" if x - left <= 12 else "end" if right - x <= 12 else "middle"
        parts.append(text(min(max(x, left), right), y, words, f"tick {kind}"))
    return parts


def _image(shares: Sequence[Sequence[float | None]], x: float, y: float, width: float, height: float) -> Markup:
    """Colours of `shares`, one pixel each; None is transparent."""
    address = base64.b64encode(_png(shares)).decode("ascii")
    image = (
        '<image class="pixels" x="{}" y="{}" width="{}" height="{}" preserveAspectRatio="none" '
        'href="data:image/png;base64,{}"/>'
    )
    return Markup(image).format(*map(short, (x, y, width, height)), address)


def _png(shares: Sequence[Sequence[float | None]]) -> bytes:
    """A picture with a palette: 0 is transparent, 1 to 255 the colours from dark to bright."""
    lines = b"".join(b"\0" + bytes(0 if share is None else 1 + round(254 * share) for share in row) for row in shares)
    palette = b"\0\0\0" + b"".join(_colour(i / 254) for i in range(255))
    header = struct.pack(">IIBBBBB", len(shares[0]), len(shares), 8, 3, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", palette),
        (b"tRNS", b"\0"),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    )
    made = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        made += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return made


def _colour(share: float) -> bytes:
    """Between the two nearest of viridis' ten."""
    place = share * (len(_VIRIDIS) - 1)
    first = min(int(place), len(_VIRIDIS) - 2)
    ends = [bytes.fromhex(colour) for colour in _VIRIDIS[first : first + 2]]
    return bytes(round(a + (b - a) * (place - first)) for a, b in zip(*ends, strict=True))


def layer_ticks(size: int, cell: float, room: float) -> range:
    """Layers with a figure, at least `room` apart."""
    step = next((step for step in (1, 2, 5, 10, 20, 50, 100) if step * cell >= room), max(size, 1))
    return range(0, size, step)
