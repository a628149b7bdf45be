"""Sections of the page about speed and memory, from files of `depthkv bench`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from depthkv.memory import format_bytes
from depthkv.report.charts import Item, item_chart
from depthkv.report.parts import Cell, Chart, Grid, Row, Section, Table, fixed, headings, per_cent
from depthkv.report.reading import BenchCell, BenchFigures, Spread

Benches = Mapping[str, BenchFigures]
"""Files of `depthkv bench` by their labels."""

_FIELDS: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("ttft_s", "time to first token", "lower is better", lambda value: f"{value:.3g} s"),
    ("itl_s", "between tokens", "lower is better", lambda value: f"{value * 1000:.3g} ms"),
    ("decode_tokens_per_s", "decoding", "higher is better", lambda value: f"{value:,.4g} tok/s"),
    ("cache_bytes", "cache at the end", "lower is better", format_bytes),
    ("peak_bytes", "peak memory", "lower is better", format_bytes),
    ("peak_above_start_bytes", "peak above the start", "lower is better", format_bytes),
)
"""Key of `SPEEDS`, heading, which way is better, and how it is written."""


def speed_sections(benches: Benches) -> list[Section]:
    """Speed and memory beside the full cache's; none without files."""
    if not benches:
        return []
    charts = [_chart(benches, *field[:3], field[3]) for field in _FIELDS]
    found = tuple(chart for chart in charts if chart is not None)
    tables: list[Table] = [_table(benches)]
    if (roofline := _roofline(benches)) is not None:
        tables.append(roofline)
    intro = (
        "The full and the shared cache took turns in one run. Bars are medians as a multiple of the full cache's, "
        "whiskers the smallest and the largest run. The ratio beside a figure is the median over pairs of runs."
    )
    return [
        Section(
            anchor="speed",
            title="Speed and memory",
            intro=intro,
            parts=(*([Grid(parts=found)] if found else []), *tables),
        )
    ]


def _chart(benches: Benches, field: str, name: str, better: str, shown: Callable[[float], str]) -> Chart | None:
    items: list[Item] = []
    for label, bench in benches.items():
        for cell in bench.cells:
            full = cell.arms["full"].get(field)
            if full is None or full.value <= 0:
                continue
            items.append(Item(label=_place(benches, label, bench, cell)))
            for number, (arm, fields) in enumerate(cell.arms.items()):
                if field not in fields:
                    continue
                found = fields[field]
                ratio = "" if arm == "full" else f", {_ratio(cell, arm, field)}"
                items.append(
                    Item(
                        label=_arm(cell, arm),
                        value=found.value / full.value,
                        low=found.low / full.value,
                        high=found.high / full.value,
                        text=f"{shown(found.value)}{ratio}",
                        style=number,
                    )
                )
    if not items:
        return None
    svg = item_chart(items, title=f"{name}, {better}", bars=True, reference=1.0, x_label="multiple of the full cache's")
    return Chart(svg=svg, caption=f"{name[0].upper()}{name[1:]}; {better}.")


def _table(benches: Benches) -> Table:
    arms = [fields for bench in benches.values() for cell in bench.cells for fields in cell.arms.values()]
    columns = [field for field in _FIELDS if any(field[0] in fields for fields in arms)]
    rows: list[Row] = []
    for label, bench in benches.items():
        for cell in bench.cells:
            rows.append(Row(heading=_place(benches, label, bench, cell)))
            for arm, fields in cell.arms.items():
                cells = []
                for field, _, _, shown in columns:
                    if field not in fields:
                        cells.append(Cell(text="out of memory" if arm in cell.out_of_memory else "not measured"))
                        continue
                    notes = [_range(fields[field], shown)]
                    notes += [] if arm == "full" else [_ratio(cell, arm, field)]
                    cells.append(Cell(text=shown(fields[field].value), notes=tuple(note for note in notes if note)))
                rows.append(Row(heading=_arm(cell, arm), cells=tuple(cells)))
    names = headings("arm", *(name for _, name, _, _ in columns))
    return Table(caption="Medians, ranges and ratios", headings=names, rows=tuple(rows))


def _roofline(benches: Benches) -> Table | None:
    """Whatever figures of the roofline the files have, by their keys."""
    cells = [(_place(benches, label, bench, cell), cell) for label, bench in benches.items() for cell in bench.cells]
    keys = list(dict.fromkeys(key for _, cell in cells for figures in cell.roofline.values() for key in figures))
    if not keys:
        return None
    rows: list[Row] = []
    for place, cell in cells:
        if cell.roofline:
            rows.append(Row(heading=place))
        for arm, figures in cell.roofline.items():
            shown = tuple(Cell(text=_figure(key, figures[key]) if key in figures else "") for key in keys)
            rows.append(Row(heading=_arm(cell, arm), cells=shown))
    names = headings("arm", *(key.replace("_", " ") for key in keys))
    return Table(caption="Beside what the hardware allows (roofline)", headings=names, rows=tuple(rows))


def _place(benches: Benches, label: str, bench: BenchFigures, cell: BenchCell) -> str:
    """What was measured there, with the file's label where there are several."""
    sequences = "1 sequence" if cell.batch_size == 1 else f"{cell.batch_size:,} sequences"
    where = f"{cell.prompt_tokens:,} + {cell.new_tokens:,} tokens, {sequences}"
    return where if len(benches) == 1 else f"{label}: {where}"


def _arm(cell: BenchCell, arm: str) -> str:
    if arm == "full":
        return "full cache"
    if arm == "shared" and cell.recipe:
        return f"shared: {cell.recipe}"
    return f"shared, {per_cent(cell.retention)} of layers" if arm == "shared" and cell.retention is not None else arm


def _ratio(cell: BenchCell, arm: str, field: str) -> str:
    ratio = cell.ratios.get(field) if len(cell.arms) == 2 else None
    if ratio is None:
        full = cell.arms["full"].get(field)
        if full is None or full.value <= 0:
            return ""
        ratio = cell.arms[arm][field].value / full.value
    return f"{ratio:.2f}x"


def _range(found: Spread, shown: Callable[[float], str]) -> str:
    low, high = shown(found.low), shown(found.high)
    return "" if low == high else f"{low} to {high}"


def _figure(key: str, value: float) -> str:
    if key.endswith(("share", "fraction", "utilization", "utilisation")):
        return per_cent(value)
    if key.endswith("bytes"):
        return format_bytes(value)
    return fixed(value, 0) if abs(value) >= 1000 else f"{value:.3g}"


def bench_words(benches: Benches) -> Sequence[str]:
    """For the verdict: what the first shared arm buys, where it and the full cache ran."""
    for cell in (cell for bench in benches.values() for cell in bench.cells):
        arm = next(name for name in cell.arms if name != "full")
        if not cell.arms["full"] or not cell.arms[arm]:
            continue
        parts = []
        for field, words in (
            ("cache_bytes", "the cache takes {} the bytes"),
            ("ttft_s", "the first token {} the time"),
            ("decode_tokens_per_s", "decoding runs at {} the speed"),
        ):
            if field in cell.arms[arm] and (ratio := _ratio(cell, arm, field)):
                parts.append(words.format(ratio.replace("x", " times")))
        return parts
    return []
