"""A plan as a picture: a box for each layer, and a bracket from each leader to the layers that read it."""

from __future__ import annotations

import math

from markupsafe import Markup

from depthkv.plan import SharingPlan
from depthkv.report.charts import COLOURS
from depthkv.report.svg import WIDTH, drawing, short, text

_MOST_COLUMNS = 16
_BOX = 22.0
_PITCH = 12.0
"""Between brackets that pass below each other, so that the names of their leaders do, too."""
_MARGIN = 58.0
"""For the names of leaders of a row above."""


def plan_diagram(plan: SharingPlan, *, title: str) -> Markup:
    """Rows of at most 16 layers. Followers may read any earlier leader: brackets that overlap run below each other."""
    rows = math.ceil(plan.num_layers / _MOST_COLUMNS)
    columns = math.ceil(plan.num_layers / rows)
    colours = {leader: i % COLOURS + 1 for i, leader in enumerate(plan.leaders)}
    lanes = [_lanes(plan, range(i * columns, min((i + 1) * columns, plan.num_layers))) for i in range(rows)]
    # a row whose layers read a leader of a row above needs room for its name
    margin = 2.0 if all(leader // columns == i for i, lane in enumerate(lanes) for leader in lane) else _MARGIN
    pitch = min((WIDTH - margin - 2) / columns, 40.0)
    parts: list[Markup] = []
    top = 2.0
    for i, lane in enumerate(lanes):
        row = range(i * columns, min((i + 1) * columns, plan.num_layers))
        middle = {layer: margin + (layer - row[0] + 0.5) * pitch for layer in row}
        for leader, level in lane.items():
            y = top + _BOX + 9 + level * _PITCH
            bracket = _bracket(plan, leader, middle, y, top + _BOX, margin)
            parts.append(Markup('<g class="c{}">{}</g>').format(colours[leader], bracket))
        for layer in row:
            parts.append(_box(plan, layer, middle[layer], top, min(pitch - 3, 30.0), colours))
        top += _BOX + 14 + _PITCH * (1 + max(lane.values(), default=0))
    return drawing(parts, top - 6, title)


def _box(plan: SharingPlan, layer: int, middle: float, top: float, wide: float, colours: dict[int, int]) -> Markup:
    source = plan.kv_source_layers[layer]
    leads = source == layer
    words = f"layer {layer} keeps its cache" if leads else f"layer {layer} reads layer {source}"
    box = '<rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="3"/>'
    numbers = map(short, (middle - wide / 2, top, wide, _BOX))
    return Markup('<g class="c{}"><title>{}</title>{}{}</g>').format(
        colours[source],
        words,
        Markup(box).format("keeps" if leads else "reads", *numbers),
        text(middle, top + _BOX / 2 + 4.5, str(layer), f"inside middle{' on' * leads}"),
    )


def _bracket(
    plan: SharingPlan, leader: int, middle: dict[int, float], y: float, bottom: float, margin: float
) -> Markup:
    """From a leader down, along, and up into each layer of this row that reads it."""
    readers = [layer for layer in plan.readers(leader) if layer in middle and layer != leader]
    start = (
        f"M{short(middle[leader])} {short(bottom)}V{short(y)}" if leader in middle else f"M{margin - 4:g} {short(y)}"
    )
    path = f"{start}H{short(middle[readers[-1]])}"
    path += "".join(f"M{short(middle[layer])} {short(y)}V{short(bottom + 3)}" for layer in readers)
    heads = "".join(f"M{short(middle[layer])} {short(bottom)}l3 5h-6z" for layer in readers)
    name = Markup("") if leader in middle else text(margin - 8, y + 4, f"from {leader}", "from end")
    return name + Markup('<path class="bracket" d="{}"/><path class="head" d="{}"/>').format(path, heads)


def _lanes(plan: SharingPlan, row: range) -> dict[int, int]:
    """For each leader that layers of this row read, how deep its bracket runs, so that no two overlap."""
    ends: list[float] = []
    lanes: dict[int, int] = {}
    outside = -1.0
    for leader in plan.leaders:
        readers = [layer for layer in plan.readers(leader) if layer in row and layer != leader]
        if not readers:
            continue
        start = float(leader) if leader in row else outside + row[0]
        depth = next((i for i, end in enumerate(ends) if end < start), len(ends))
        ends[depth : depth + 1] = [float(readers[-1])]
        lanes[leader] = depth
    return lanes
