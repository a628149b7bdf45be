"""A picture of the layers that kept their caches: a row for each sequence, a column for each layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from depthkv.report.generation_reading import SequenceFigures
from depthkv.report.maps import layer_ticks
from depthkv.report.svg import LETTER, WIDTH, cut, drawing, short, text

MOST_NAMED = 24
"""Rows up to which each has its words above it."""
MOST_ROWS = 240
"""That are drawn."""
_MOST_SAID = 12
"""Layers given up that a row's words name."""


def prompt_name(number: int, found: SequenceFigures) -> str:
    """The sequence's number, from 1, and its prompt in one line, up to a length."""
    return f"{number}. {' '.join(found.prompt[:400].split())}"


def kept_words(found: SequenceFigures) -> str:
    """ "15 of 30", or with those that it had in the end."""
    first, layers = len(found.plan.leaders), found.plan.num_layers
    return f"{first} of {layers}" + (f", then {found.left}" if found.given_up else "")


def kept_map(sequences: Sequence[SequenceFigures], *, title: str) -> Markup:
    """Filled where the layer kept its cache right after the prompt, half filled where it was given up later.

    With more than `MOST_NAMED` sequences rows are low and without words, and what was given up has its own colour
    alone; those after `MOST_ROWS` are left out.
    """
    return _named(sequences, title) if len(sequences) <= MOST_NAMED else _low(sequences[:MOST_ROWS], title)


def _named(sequences: Sequence[SequenceFigures], title: str) -> Markup:
    num_layers = sequences[0].plan.num_layers
    left, pitch, high, several = 8.0, 40.0, 14.0, len(sequences) > 6
    room = WIDTH - 2 * left
    cell = room / num_layers
    top = 20.0 if several else 2.0
    parts = _axis(num_layers, left, cell, 13.0, words=False) if several else []
    wide = f"{0.84 * cell:.2f}"

    def cells(layers: Iterable[int], y: float, tall: float) -> str:
        return "".join(f"M{left + (i + 0.08) * cell:.2f} {short(y)}h{wide}v{short(tall)}h-{wide}z" for i in layers)

    for number, found in enumerate(sequences, 1):
        words, name = kept_words(found), prompt_name(number, found)
        parts.append(text(left, top + 12, cut(name, room - LETTER * len(words) - 14), "name", whole=name))
        parts.append(text(WIDTH - left, top + 12, words, "value end"))
        y = top + 18
        kept = [layer for layer in found.plan.leaders if layer not in found.given_up]
        row = [
            Markup('<path class="blank" d="{}"/>').format(cells(range(num_layers), y, high)),
            Markup('<path class="bar c1" d="{}"/>').format(cells(kept, y, high)),
        ]
        for layer, tokens in found.given_up.items():
            path = '<path class="bar c2" d="{}"><title>layer {}, given up for token {}</title></path>'
            row.append(Markup(path).format(cells([layer], y + high / 2, high / 2), layer, f"{tokens:,}"))
        parts.append(Markup("<g><title>{}</title>{}</g>").format(_said(number, found), Markup("").join(row)))
        top += pitch
    parts += _axis(num_layers, left, cell, top + 9, words=True)
    return drawing(parts, top + 34, title)


def _low(sequences: Sequence[SequenceFigures], title: str) -> Markup:
    num_layers, rows = sequences[0].plan.num_layers, len(sequences)
    left, right, top = 46.0, 6.0, 42.0
    room = WIDTH - left - right
    cell, pitch = room / num_layers, min(10.0, max(400.0 / rows, 2.0))
    inside = [Markup('<path class="blank" d="M0 0h{}v{}H0z"/>').format(num_layers, rows)]
    kept, gone, hits = [], [], []
    for i, found in enumerate(sequences):
        kept.append(_runs([layer for layer in found.plan.leaders if layer not in found.given_up], i))
        gone.append(_runs(sorted(found.given_up), i))
        path = Markup('<path d="M0 {}h{}v1H0z"><title>{}</title></path>')
        hits.append(path.format(i, num_layers, _said(i + 1, found)))
    inside.append(
        Markup('<path class="bar c1" d="{}"/><path class="bar c2" d="{}"/>').format("".join(kept), "".join(gone))
    )
    inside.append(Markup('<g class="hits">{}</g>').format(Markup("").join(hits)))
    place = Markup('<g class="cells" transform="translate({} {}) scale({} {})">{}</g>')
    scales = f"{cell:.4f}", f"{pitch:.4f}"
    parts = [text(4, 14, "sequence", "axis"), place.format(short(left), short(top), *scales, Markup("").join(inside))]
    marks = layer_ticks(rows + 1, pitch, 16)
    # rows are counted from 1
    for number in [1, *(number for number in marks if number > 1 and (number - 1) * pitch >= 14)]:
        parts.append(text(left - 6, top + (number - 0.5) * pitch + 4, str(number), "tick end"))
    parts += _axis(num_layers, left, cell, top - 6, words=False)
    parts += _axis(num_layers, left, cell, top + rows * pitch + 14, words=True)
    return drawing(parts, top + rows * pitch + 40, title)


def _runs(layers: Sequence[int], row: int) -> str:
    """Boxes of one high over layers that ascend, neighbours in one."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer:
            runs[-1][1] += 1
        else:
            runs.append([layer, layer + 1])
    return "".join(f"M{first} {row}h{last - first}v1H{first}z" for first, last in runs)


def _axis(num_layers: int, left: float, cell: float, y: float, *, words: bool) -> list[Markup]:
    parts = [
        text(left + (layer + 0.5) * cell, y, str(layer), "tick middle") for layer in layer_ticks(num_layers, cell, 24)
    ]
    if words:
        parts.append(text(left + num_layers * cell / 2, y + 18, "layer", "axis middle"))
    return parts


def _said(number: int, found: SequenceFigures) -> str:
    """For the pointer."""
    gone = [str(layer) for layer in found.given_up]
    if len(gone) > _MOST_SAID:
        gone = [*gone[:_MOST_SAID], f"{len(gone) - _MOST_SAID} more"]
    later = f"; given up later: {', '.join(gone)}" if gone else ""
    return f"{cut(prompt_name(number, found), 60 * LETTER)}: {kept_words(found)} layers{later}"
