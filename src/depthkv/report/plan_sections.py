"""Sections of the page about how a plan was chosen, from files of `depthkv plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from depthkv.memory import format_bytes
from depthkv.planner.explain import EVEN
from depthkv.report.charts import Line, Point, line_chart, swatch
from depthkv.report.maps import box_swatch, figure, layer_bars, layer_map, scale_of, staircase
from depthkv.report.parts import (
    Cell,
    Chart,
    Facts,
    Grid,
    PlanPart,
    Row,
    Section,
    Table,
    change_words,
    fixed,
    headings,
    interval,
    per_cent,
    signed,
)
from depthkv.report.plan_diagram import plan_diagram
from depthkv.report.plan_reading import NestedPlan, PlanFigures
from depthkv.report.plan_rules import rule_section

Plans = Mapping[str, PlanFigures]
"""Files of `depthkv plan` by their labels."""

_MAPS = {
    "key_cka": "Keys, CKA",
    "key_cosine": "Keys, cosine",
    "key_r2": "Keys, R\u00b2",
    "kv_distance": "Keys and values, distance",
    "value_cka": "Values, CKA",
    "value_cosine": "Values, cosine",
    "value_r2": "Values, R\u00b2",
    "output_cosine": "Outputs, cosine",
    "output_error": "Outputs, error",
}
_LEADS = ((box_swatch("bar"), "leads in the chosen plan"), (box_swatch("rest"), "reads another there"))


def plan_sections(plans: Plans) -> list[Section]:
    """How each plan was chosen, one file after the other."""
    sections = []
    for number, (label, found) in enumerate(plans.items(), 1):
        made = [maker(found) for maker in (_plan, _sizes, rule_section, _costs, _similarity, _order)]
        for section in made:
            if section is None:
                continue
            several = len(plans) > 1
            sections.append(
                Section(
                    anchor=f"{section.anchor}-{number}" if several else section.anchor,
                    title=f"{section.title}: {label}" if several else section.title,
                    intro=section.intro,
                    parts=section.parts,
                )
            )
    return sections


def plan_words(plans: Plans) -> list[str]:
    """For the verdict: what each plan costs, and how it compares with the evenly spaced one."""
    clauses = []
    for label, found in plans.items():
        own = found.rules[0]
        whose = "" if len(plans) == 1 else f" ({label})"
        change = change_words(own.loss, found.held_out_full, 2, " nats", " per token")
        kept = f"with the caches of {len(found.plan.leaders)} of {found.num_layers} layers{whose}"
        clauses.append(f"{kept}, held-out loss {change}{_even_words(found)}")
    return clauses


def _even_words(found: PlanFigures) -> str:
    own, even = found.rules[0], found.even
    if own.against_even is None or even is None:
        return ""
    name = f"the evenly spaced plan{' of equal bytes' * (even.bytes_per_token == own.bytes_per_token)}"
    value, low, high = own.against_even.value, own.against_even.low, own.against_even.high
    if low is not None and not own.against_even.is_clear:
        return f", {signed(value, 2)} nats {interval(low, high, 2, sign=True)} from {name}, maybe by chance"
    if value < 0 and low is not None and high is not None:
        low, high = -high, -low
    amount = f"{fixed(abs(value), 2)} nats {interval(low, high, 2)}".rstrip()
    return f", {amount} {'below' if value < 0 else 'above'} {name}"


def _plan(found: PlanFigures) -> Section:
    leaders = len(found.plan.leaders)
    diagram = plan_diagram(found.plan, title=f"The plan: {found.plan.diagram()}")
    parts = [Chart(svg=diagram, caption=f"{leaders} of {found.num_layers} layers keep a cache.")]
    again = ""
    if found.certainty is not None:
        label = "share of the resamples in which the layer leads"
        bars = layer_bars(found.certainty.leader_share, found.plan, title=f"For each layer: {label}", y_label=label)
        parts.append(Chart(svg=bars, caption="How sure each layer's part is.", legend=_LEADS))
        again = (
            f" The choice was made again {found.certainty.resamples:,} times, on calibration documents drawn anew with "
            "replacement. Where many plans are nearly as good, another is chosen often and costs little."
        )
    return Section(
        anchor="plan",
        title="The plan",
        intro="Filled: a layer that keeps its cache. Outlined: one that keeps none and reads that of the layer at the "
        f"other end of its bracket.{again}",
        parts=(Facts(entries=_entries(found)), Grid(parts=tuple(parts))),
    )


def _entries(found: PlanFigures) -> tuple[tuple[str, str, str], ...]:
    own = found.rules[0]
    share = found.bytes_per_token / found.full_bytes_per_token
    full = format_bytes(found.full_bytes_per_token)
    off = found.held_out_adapter_off
    beside = f"; full cache {fixed(found.held_out_full.value, 3)}"
    if off is not None:
        beside += f" with the adapter on, {fixed(off.value, 3)} with it off, as without a plan"
    entries = [
        ("Layers with a cache", f"{len(found.plan.leaders)} of {found.num_layers}", f"asked for: {found.budget}"),
        ("Cache per token", format_bytes(found.bytes_per_token), f"{share:.3g}x of {full}"),
        (
            "Loss on the calibration text",
            fixed(found.measured, 3),
            f"{fixed(found.predicted, 3)} was predicted; full cache {fixed(found.full_loss, 3)}",
        ),
        (
            "Held-out loss",
            fixed(own.loss.value, 3),
            f"{interval(own.loss.low, own.loss.high, 3)}{beside}".lstrip("; "),
        ),
    ]
    if own.against_even is not None:
        around = interval(own.against_even.low, own.against_even.high, 3, sign=True)
        entries.append(("Against evenly spaced", signed(own.against_even.value, 3), f"{around} held out".strip()))
    if found.certainty is not None:
        often = found.certainty.better_than_even
        words = "of the resamples"
        if often is not None:
            better = per_cent(often).replace(" ", "\u00a0")
            words += f"; in {better} better than evenly spaced"
        entries.append(("The same plan again", per_cent(found.certainty.same_plan), words))
    else:
        entries.append(("How sure", "unknown", "the losses are of one document; more --cost-blocks tell"))
    return tuple(entries)


def _sizes(found: PlanFigures) -> Section:
    return Section(
        anchor="plan-sizes",
        title="Loss against the size of the cache",
        intro="On the calibration text, which the plan was chosen on: it was not held out. Lower is better. "
        "Predictions come from plans of about the chosen size, and are guesses far from it.",
        parts=(Grid(parts=tuple(_curves(found))),),
    )


def _curves(found: PlanFigures) -> list[Chart]:
    """Loss at every size, and a closer look where sizes far below the chosen one flatten the rest."""
    lines = _curve_lines(found)
    charts = [_curve(found, lines, "Every size of the cache.")]
    values = [point.y for line in lines for point in line.points] + [found.full_loss]
    rise = max(found.predicted, found.measured) - found.full_loss
    limit = found.full_loss + 2.5 * rise
    if rise > 0 and max(values) - found.full_loss > 5 * rise:
        near = [
            Line(
                label=line.label,
                points=tuple(point for point in line.points if point.y <= limit),
                connected=line.connected,
                dense=line.dense,
            )
            for line in lines
        ]
        charts.append(_curve(found, near, f"The same, closer: losses up to {fixed(limit, 2)}."))
    return charts


def _curve_lines(found: PlanFigures) -> list[Line]:
    predicted, measured = [], []
    for size in found.nested:
        place = f"{len(size.leaders)} layers, {format_bytes(size.bytes_per_token)}"
        mark = "chosen" if size.chosen and size.measured is None else ""
        words = f"{place}: {fixed(size.predicted, 3)} predicted"
        predicted.append(Point(x=size.bytes_per_token, y=size.predicted, words=words, mark=mark))
        if size.measured is not None:
            mark = f"chosen: {fixed(size.measured, 2)}" if size.chosen else ""
            words = f"{place}: {fixed(size.measured, 3)} measured"
            measured.append(Point(x=size.bytes_per_token, y=size.measured, words=words, mark=mark))
    if not any(size.chosen for size in found.nested):
        words = f"the plan, {format_bytes(found.bytes_per_token)}: {fixed(found.measured, 3)} measured"
        mark = f"chosen: {fixed(found.measured, 2)}"
        measured.append(Point(x=found.bytes_per_token, y=found.measured, words=words, mark=mark, aside=True))
    dense = len(predicted) > 12
    lines = [
        Line(label="nested plans, predicted", points=tuple(predicted), dense=dense),
        Line(label="measured", points=tuple(measured), dense=len(measured) > 12),
    ]
    for label, rules in (
        ("evenly spaced, measured", [rule for rule in found.rules[1:] if rule.label == EVEN]),
        ("other rules, measured", [rule for rule in found.rules[1:] if rule.label != EVEN]),
    ):
        points = tuple(
            Point(x=rule.bytes_per_token, y=rule.measured, words=f"{rule.label}: {fixed(rule.measured, 3)} measured")
            for rule in rules
        )
        lines.append(Line(label=label, points=points, connected=False))
    return lines


def _curve(found: PlanFigures, lines: Sequence[Line], caption: str) -> Chart:
    shown = [(style, line) for style, line in enumerate(lines) if line.points]
    sizes = sorted(found.nested, key=lambda size: size.bytes_per_token)
    most = sizes[-1].bytes_per_token
    xs = [point.x for _, line in shown for point in line.points]
    sizes = [size for size in sizes if min(xs) <= size.bytes_per_token <= max(xs)] or sizes
    wanted = [most * i / 8 for i in (1, 2, 3, 4, 5, 6, 7, 8)]
    ticks: dict[float, str] = {}
    for size in [min(sizes, key=lambda size: abs(size.bytes_per_token - x)) for x in wanted]:
        ticks[size.bytes_per_token] = f"{len(size.leaders)}\n{_short_bytes(size.bytes_per_token)}"
    svg = line_chart(
        [line for _, line in reversed(shown)],  # what comes last lies on top
        list(ticks.items()),
        title=f"{caption} {', '.join(line.label for _, line in shown)}",
        x_label="layers that keep a cache, and what a token costs in it",
        y_label="loss (nats per token)",
        styles=[style for style, _ in reversed(shown)],
        level=(found.full_loss, f"full cache {fixed(found.full_loss, 2)}"),
        shifted=False,
    )
    legend = tuple((swatch(style, connected=line.connected), line.label) for style, line in shown)
    return Chart(svg=svg, caption=caption, legend=legend)


def _costs(found: PlanFigures) -> Section | None:
    scale = scale_of(found.cost, log=True, falling=True)
    if scale is None:
        return None
    title = f"Rise of the loss when one layer reads another, from {figure(scale.low)} to {figure(scale.high)} nats"
    chart = Chart(
        svg=layer_map(found.cost, scale, title=title, plan=found.plan),
        caption="Rise of the loss (nats per token) if that layer alone reads the other; bright is cheap.",
        legend=(
            (box_swatch("outlined"), "source of a follower"),
            (box_swatch("leads"), "keeps its cache"),
            (box_swatch("blank"), "not measured, or of another kind"),
        ),
    )
    return Section(
        anchor="plan-costs",
        title="What each pair costs",
        intro="Measured on the calibration text: a row for the layer that reads, a column for the one that is read. "
        "Figures of zero and below have the brightest colour.",
        parts=(Grid(parts=(chart,)),),
    )


def _similarity(found: PlanFigures) -> Section | None:
    maps = []
    for key, values in found.similarity.items():
        # a distance is small where layers are alike, and alike is bright everywhere
        scale = scale_of(values, falling=key in ("kv_distance", "output_error"))
        if scale is not None:
            title = f"{_MAPS[key]}: from {figure(scale.low)} to {figure(scale.high)}"
            maps.append(Chart(svg=layer_map(values, scale, title=title, small=True), caption=_MAPS[key]))
    return (
        Section(
            anchor="plan-similarity",
            title="How alike layers are",
            intro="For each pair of layers, the later one from top to bottom and the earlier one from left to right. "
            "Bright is alike. R\u00b2 is that of a linear map between them; outputs are those of attention. Each map "
            "has its own scale, on which the diagonal does not count.",
            parts=(Grid(parts=tuple(maps), small=True),),
        )
        if maps
        else None
    )


def _order(found: PlanFigures) -> Section | None:
    if len(found.nested) < 2:
        return None
    chosen = next((i for i, size in enumerate(found.nested) if size.chosen), None)
    caption = "Layers that keep a cache at each size; the frame is the chosen size."
    sizes = [size.leaders for size in found.nested]
    stairs = staircase(sizes, chosen, found.num_layers, title=caption, kept=found.plan.leaders)
    rows = [
        Row(heading=f"{len(size.leaders)} layers", cells=_size_cells(size, before))
        for size, before in zip(found.nested, (None, *found.nested), strict=False)
    ]
    names = (
        "size",
        "given up",
        "cache per token",
        "predicted",
        "measured",
        "free choice, predicted",
        "price of nesting",
    )
    table = Table(caption="Figures: every size", headings=headings(*names), rows=tuple(rows), folded=True)
    strip = PlanPart(
        labels="First to last",
        summary="filled layers lead in the chosen plan, outlined ones read the layer at the arrow",
        layers=tuple((layer, found.plan.kv_source_layers[layer], 1) for layer in found.order),
    )
    return Section(
        anchor="plan-order",
        title="The order of giving up",
        intro="Each size leads with layers of the size before, so that one order gives every plan. Its price is how "
        "much lower the loss is predicted where each size may choose anew.",
        parts=(strip, Grid(parts=(Chart(svg=stairs, caption=caption, legend=_LEADS), _price(found))), table),
    )


def _price(found: PlanFigures) -> Chart:
    points = []
    for size in found.nested:
        price = size.predicted - size.free
        words = f"{len(size.leaders)} layers: {signed(price, 4)} nats"
        mark = f"chosen: {signed(price, 3)}" if size.chosen else ""
        points.append(Point(x=len(size.leaders), y=price, words=words, mark=mark))
    line = Line(label="price of nesting", points=tuple(points), dense=len(points) > 12)
    counts = sorted({point.x for point in points})
    step = max(1, round(len(counts) / 8))
    svg = line_chart(
        [line],
        [(count, f"{count:.0f}") for count in counts[::-step]],
        title="Price of nesting at each size",
        x_label="layers that keep a cache",
        y_label="predicted loss above free choice (nats per token)",
        zero=True,
    )
    return Chart(svg=svg, caption="The price of nesting.")


def _size_cells(size: NestedPlan, before: NestedPlan | None) -> tuple[Cell, ...]:
    gone = [] if before is None else [layer for layer in before.leaders if layer not in size.leaders]
    return (
        Cell(text=", ".join(map(str, gone)) + (" (chosen)" if size.chosen else "")),
        Cell(text=format_bytes(size.bytes_per_token)),
        Cell(text=fixed(size.predicted, 3)),
        Cell(text="" if size.measured is None else fixed(size.measured, 3)),
        Cell(text=fixed(size.free, 3)),
        Cell(text=signed(size.predicted - size.free, 3)),
    )


def _short_bytes(num_bytes: float) -> str:
    words, _, unit = format_bytes(num_bytes).partition(" ")
    return f"{float(words):.3g} {unit}"
