"""Sections of the page about text that was written: the layers that were kept, memory over time, from `generate`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from depthkv.memory import format_bytes
from depthkv.report.charts import Line, Point, line_chart, swatch
from depthkv.report.generation_map import MOST_NAMED, MOST_ROWS, kept_map, kept_words, prompt_name
from depthkv.report.generation_reading import GenerationFigures, SequenceFigures, StepFigures
from depthkv.report.maps import box_swatch, layer_bars
from depthkv.report.parts import Cell, Chart, Facts, Grid, Row, Section, Table, Texts, fixed, headings, per_cent
from depthkv.report.svg import LETTER, cut

Generations = Mapping[str, GenerationFigures]
"""Files of `depthkv generate` by their labels."""

_MOST_LINES = 4
"""Sequences up to which each has a line of its own."""
_MOST_POINTS = 400
"""Of a line."""
_MOST_MARKS = 60
"""Beside each other, so that they do not cover each other."""
_MOST_ROWS = 100
"""Of a table of steps."""
_MOST_TEXTS = 12
"""Prompts whose texts are shown."""
_PROMPT, _TEXT = 400, 1200
"""Letters of a prompt's end and of a text's start that are shown."""


def generation_sections(generations: Generations) -> list[Section]:
    """The layers that were kept, memory over time and texts, files beside each other; none without files."""
    if not generations:
        return []
    return [_kept(generations), *_memory(generations), _texts(generations)]


def generation_words(generations: Generations) -> list[str]:
    """For the verdict: how many layers kept a cache, and what it took."""
    clauses = []
    for label, found in generations.items():
        whose = "" if len(generations) == 1 else f" ({label})"
        mean, left = found.mean_leaders, found.mean_left
        share = f"{_mean(mean)} of {found.num_layers} layers' caches"
        if mean == found.num_layers:
            share = f"all {found.num_layers} layers' caches"
        elif len({len(sequence.plan.leaders) for sequence in found.sequences}) > 1:
            share += " on average"
        later = f", {_mean(left)} in the end" if left != mean else ""
        took = f"the cache took {format_bytes(found.peak_bytes)}"
        if found.peak_bytes != found.full_bytes:
            took += f" instead of {format_bytes(found.full_bytes)}"
        clauses.append(f"with {share}{whose}{later}, {took}")
    return clauses


def generation_warnings(generations: Generations) -> list[str]:
    """What ended early."""
    ended = [label for label, found in generations.items() if found.ended_by_budget]
    whose = f" ({', '.join(ended)})" if ended and len(generations) > 1 else ""
    words = f"Writing ended early{whose}: the KV budget has no room for another token, whatever is given up."
    return [words] if ended else []


def _kept(generations: Generations) -> Section:
    several = len(generations) > 1
    charts: list[Chart] = []
    tables = []
    for label, found in generations.items():
        whose = f" ({label})" if several else ""
        charts += _kept_charts(found, whose)
        names = ["sequence", "tokens", "layers with a cache", "which, after the prompt"]
        if any(sequence.given_up for sequence in found.sequences):
            names.append("given up later")
        width = len(names) - 1
        rows = tuple(_sequence_row(i, sequence, width) for i, sequence in enumerate(found.sequences[:MOST_ROWS], 1))
        caption = f"Figures: every sequence{whose}"
        tables.append(Table(caption=caption, headings=headings(*names), rows=rows, kind="words", folded=True))
    gone = any(sequence.given_up for found in generations.values() for sequence in found.sequences)
    intro = (
        "A row for each sequence, a column for each layer. A layer that keeps no cache reads that of an earlier one."
    )
    if gone:
        intro += (
            " What a sequence gave up, it gave up while it grew: the whole cache would have been larger than the KV "
            "budget otherwise."
        )
    return Section(
        anchor="kept-layers",
        title="Which layers were kept for which input",
        intro=intro,
        parts=(_facts(generations), Grid(parts=tuple(charts)), *tables),
    )


def _kept_charts(found: GenerationFigures, whose: str) -> list[Chart]:
    """Every sequence, and how often each layer was kept where rows are too many to be looked at."""
    number = len(found.sequences)
    many = number > MOST_NAMED
    rows = f" The first {MOST_ROWS} of {number:,} sequences." if number > MOST_ROWS else ""
    caption = f"Layers that kept a cache{whose}.{rows}"
    legend = [(box_swatch("bar"), "kept its cache"), (box_swatch("blank"), "kept none")]
    if any(sequence.given_up for sequence in found.sequences):
        legend.insert(1, (box_swatch("gone" if many else "half"), "kept it at first, given up later"))
    charts = [Chart(svg=kept_map(found.sequences, title=caption), caption=caption, legend=tuple(legend))]
    if many:
        leaders = [set(sequence.plan.leaders) for sequence in found.sequences]
        shares = [sum(layer in kept for kept in leaders) / number for layer in range(found.num_layers)]
        label = "share of the sequences in which the layer keeps its cache"
        bars = layer_bars(shares, None, title=f"For each layer: {label}, after the prompt", y_label=label)
        charts.append(Chart(svg=bars, caption=f"How often each layer was kept, right after the prompt{whose}."))
    return charts


def _sequence_row(number: int, found: SequenceFigures, width: int) -> Row:
    gone = [f"{layer} (token {tokens:,})" for layer, tokens in found.given_up.items()]
    texts = (
        f"{found.prompt_tokens:,} + {found.new_tokens:,}",
        kept_words(found),
        ", ".join(map(str, found.plan.leaders)),
        ", ".join(gone),
    )
    return Row(
        heading=cut(prompt_name(number, found), 60 * LETTER),
        cells=tuple(Cell(text=words) for words in texts[:width]),
    )


def _facts(generations: Generations) -> Facts | Table:
    """In large letters, or a column for each of several files."""
    columns = {label: _entries(found) for label, found in generations.items()}
    if len(columns) == 1:
        return Facts(entries=next(iter(columns.values())))
    rows = [
        Row(
            heading=entries[0][0],
            cells=tuple(Cell(text=text, notes=(words,) if words else ()) for _, text, words in entries),
        )
        for entries in zip(*columns.values(), strict=True)
    ]
    return Table(caption="How it was written", headings=headings("", *columns), rows=tuple(rows), kind="words")


def _entries(found: GenerationFigures) -> tuple[tuple[str, str, str], ...]:
    counts = [len(sequence.plan.leaders) for sequence in found.sequences]
    gone = sum(len(sequence.given_up) for sequence in found.sequences)
    spread = f", from {min(counts)} to {max(counts)}" if len(set(counts)) > 1 else ""
    number = len(found.sequences)
    share = per_cent(found.mean_leaders / found.num_layers)
    times = found.full_bytes / found.peak_bytes
    budget, used = "none", ""
    if found.budget is not None:
        budget = format_bytes(found.budget)
        used = f"{per_cent(found.peak_bytes / found.budget)} of it was used".replace(" %", "\u00a0%")
        caches = "nothing" if gone == 0 else "1 layer's cache" if gone == 1 else f"{gone:,} layers' caches"
        used += f"; {caches} given up for it"
    chosen = ("Layers chosen", "for each prompt", f"by {found.router} in {found.model}")
    if found.router is None:
        chosen = ("Layers chosen", "once", f"one plan for all prompts, in {found.model}")
    return (
        chosen,
        (
            "Layers with a cache",
            f"{_mean(found.mean_leaders)} of {found.num_layers}",
            f"{share} on average{spread}" + (f"; {_mean(found.mean_left)} in the end" if gone else ""),
        ),
        ("Largest cache", format_bytes(found.peak_bytes), f"{number:,} sequence{'s' * (number != 1)}"),
        ("Every layer's cache", format_bytes(found.full_bytes), f"{times:.2f} times as much, for as many tokens"),
        ("KV budget", budget, used),
        (
            "Ended by the budget",
            "yes" if found.ended_by_budget else "no",
            "no room for another token" if found.ended_by_budget else "",
        ),
    )


def _memory(generations: Generations) -> list[Section]:
    """None where no file has steps."""
    charts: list[Chart] = []
    tables = []
    for label, found in generations.items():
        if not found.steps:
            continue
        whose = f" ({label})" if len(generations) > 1 else ""
        charts += [_bytes_chart(found, whose), _leaders_chart(found, whose)]
        given = [step for step in found.steps if step.given_up]
        if given:
            rows = tuple(map(_step_row, given[:_MOST_ROWS]))
            names = headings("token", "sequence: layers", "cache", "layers with a cache, mean")
            most = f", the first {_MOST_ROWS} of {len(given):,} times" if len(given) > _MOST_ROWS else ""
            caption = f"Figures: what was given up when{most}{whose}"
            tables.append(Table(caption=caption, headings=names, rows=rows, kind="words", folded=True))
    if not charts:
        return []
    return [
        Section(
            anchor="memory-over-time",
            title="Memory over time",
            intro="After each token, of all sequences together. Tokens are those of the longest sequence: shorter ones "
            "are padded.",
            parts=(Grid(parts=tuple(charts)), *tables),
        )
    ]


def _step_row(step: StepFigures) -> Row:
    by_sequence: dict[int, list[int]] = {}
    for row, layer in step.given_up:
        by_sequence.setdefault(row, []).append(layer)
    words = "; ".join(f"{row + 1}: {', '.join(map(str, layers))}" for row, layers in by_sequence.items())
    mean = fixed(sum(step.leaders) / len(step.leaders), 1)
    cells = (Cell(text=words), Cell(text=format_bytes(step.cache_bytes)), Cell(text=mean))
    return Row(heading=f"{step.num_tokens:,}", cells=cells)


def _bytes_chart(found: GenerationFigures, whose: str) -> Chart:
    most = max(step.cache_bytes for step in found.steps)
    # a budget far above the cache would flatten it
    near = found.budget is not None and found.budget <= 4 * most
    divisor, unit = _unit(max(most, found.budget or 0) if near else most)
    points = [
        Point(x=step.num_tokens, y=step.cache_bytes / divisor, words=f"{step.num_tokens:,}: {_size(step)}")
        for step in found.steps
    ]
    given: list[Point] = []
    apart = (found.steps[-1].num_tokens - found.steps[0].num_tokens) / _MOST_MARKS
    for step in found.steps:
        if step.given_up and (not given or step.num_tokens - given[-1].x >= apart):
            words = f"token {step.num_tokens:,}: {len(step.given_up)} given up, {_size(step)} then"
            given.append(Point(x=step.num_tokens, y=step.cache_bytes / divisor, words=words))
    lines = [Line(label="cache", points=tuple(_corners(points)), bare=len(points) > 1)]
    legend = [(swatch(0, bare=len(points) > 1), "cache")]
    if given:
        lines.append(
            Line(label="after layers were given up", points=tuple(given), connected=False, dense=len(given) > 20)
        )
        legend.append((swatch(1, connected=False), "after layers were given up"))
    budget = None if found.budget is None else format_bytes(found.budget)
    far = f" The budget of {budget} is far above." if budget is not None and not near else ""
    caption = f"Bytes of the cache{whose}.{far}"
    svg = line_chart(
        lines,
        _token_ticks(found.steps),
        title=f"{caption} From {_size(found.steps[0])} to {format_bytes(most)} at most",
        x_label="tokens of each sequence",
        y_label=f"cache ({unit})",
        zero=True,
        level=(found.budget / divisor, f"budget {budget}") if near and found.budget is not None else None,
        shifted=False,
    )
    return Chart(svg=svg, caption=caption, legend=tuple(legend))


def _leaders_chart(found: GenerationFigures, whose: str) -> Chart:
    number = len(found.sequences)
    bare = len(found.steps) > 1
    if number <= _MOST_LINES:
        lines = [
            Line(
                label=cut(prompt_name(i + 1, sequence), 34 * LETTER),
                points=tuple(_corners([Point(x=step.num_tokens, y=step.leaders[i], words="") for step in found.steps])),
                bare=bare,
            )
            for i, sequence in enumerate(found.sequences)
        ]
        legend = tuple((swatch(i, bare=bare), line.label) for i, line in enumerate(lines))
    else:
        points = [
            Point(
                x=step.num_tokens,
                y=sum(step.leaders) / number,
                low=min(step.leaders),
                high=max(step.leaders),
                words="",
            )
            for step in found.steps
        ]
        label = f"mean of {number:,} sequences"
        lines = [Line(label=label, points=tuple(_corners(points)), bare=bare)]
        legend = ((swatch(0, bare=bare), label), (box_swatch("band"), "from the fewest to the most"))
    caption = f"Layers that keep a cache{whose}."
    svg = line_chart(
        lines,
        _token_ticks(found.steps),
        title=f"{caption} {', '.join(line.label for line in lines)}",
        x_label="tokens of each sequence",
        y_label="layers that keep a cache",
        zero=True,
        level=(found.num_layers, f"all {found.num_layers}"),
        height=210.0,
    )
    return Chart(svg=svg, caption=caption, legend=legend)


def _corners(points: Sequence[Point]) -> list[Point]:
    """Those at which a line changes its direction; of too many, the lowest and the highest of each part."""
    kept = [
        point
        for i, point in enumerate(points)
        if i in (0, len(points) - 1) or not _straight(points[i - 1], point, points[i + 1])
    ]
    if len(kept) <= _MOST_POINTS:
        return kept
    size = -(-2 * len(kept) // _MOST_POINTS)
    found = [kept[0]]
    for first in range(1, len(kept) - 1, size):
        part = kept[first : min(first + size, len(kept) - 1)]
        ends = {id(end): end for end in (min(part, key=lambda p: p.y), max(part, key=lambda p: p.y))}
        found += sorted(ends.values(), key=lambda point: point.x)
    return [*found, kept[-1]]


def _straight(before: Point, here: Point, after: Point) -> bool:
    def straight(a: float, b: float, c: float) -> bool:
        # NaN, where there is no interval, is like no other number
        return b != b or math.isclose((b - a) * (after.x - here.x), (c - b) * (here.x - before.x), abs_tol=1e-12)

    return all(straight(*ends) for ends in zip(*((p.y, p.low, p.high) for p in (before, here, after)), strict=True))


def _texts(generations: Generations) -> Section:
    columns: dict[str, list[tuple[str, str]]] = {}
    for label, found in generations.items():
        for i, sequence in enumerate(found.sequences, 1):
            name = f"{i}. {kept_words(sequence)} layers"
            name = f"{label}: {name}" if len(generations) > 1 else name
            columns.setdefault(sequence.prompt, []).append((name, _start(sequence.text.strip())))
    shown = list(columns.items())[:_MOST_TEXTS]
    intro = "What was written after each prompt, by number and layers with a cache."
    if len(columns) > len(shown):
        intro += f" The first {len(shown)} of {len(columns):,} prompts."
    parts = tuple(Texts(prompt=_end(prompt), columns=tuple(found[:_MOST_TEXTS])) for prompt, found in shown)
    return Section(anchor="written-texts", title="Prompts and what was written", intro=intro, parts=parts)


def _end(words: str) -> str:
    """Of a prompt, since the text goes on from there."""
    return words if len(words) <= _PROMPT else f"\u2026{words[1 - _PROMPT :].lstrip()}"


def _start(words: str) -> str:
    return words if len(words) <= _TEXT else f"{words[: _TEXT - 1].rstrip()}\u2026"


def _token_ticks(steps: Sequence[StepFigures]) -> list[tuple[float, str]]:
    """Round numbers of tokens, about five."""
    first, last = steps[0].num_tokens, steps[-1].num_tokens
    rough = max(last - first, 1) / 5
    power = 10 ** (len(str(int(max(rough, 1)))) - 1)
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [(x, f"{x:,}") for x in range(-(-first // step) * step, last + 1, step)] or [(first, f"{first:,}")]


def _unit(num_bytes: float) -> tuple[int, str]:
    """What bytes are divided by, as `format_bytes` does."""
    unit = format_bytes(num_bytes).split()[1]
    return 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(unit), unit


def _size(step: StepFigures) -> str:
    return format_bytes(step.cache_bytes)


def _mean(value: float) -> str:
    """ "15", or "14.6"."""
    return fixed(value, 1).removesuffix(".0")
