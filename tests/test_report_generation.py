"""The page of generated text shows which layers were kept for which prompt and the memory over time."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from depthkv.cli import generate, main
from depthkv.errors import DepthKVError
from depthkv.memory import format_bytes
from depthkv.report import generation_reading
from depthkv.report.generation_map import kept_map
from depthkv.report.generation_reading import GenerationFigures
from depthkv.report.reading import read_figures
from depthkv.report.svg import cut
from figures import bench, evaluation
from generation_figures import PROMPTS, generation_file
from plan_figures import plan_file
from test_docs import documented, keys_of
from test_report import corners as corners_of
from test_report_html import EVIL, Tree, charts_of, page_of, poison, shapes
from test_report_plan import drop, put
from tiny import tiny_checkpoint

SECTIONS = ["kept-layers", "memory-over-time", "written-texts"]
ABOUT = ["environment", "commands"]


def figures_of(tmp_path: Path, found: dict[str, Any]) -> GenerationFigures:
    path = tmp_path / "g.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    figures = read_figures(path)
    assert isinstance(figures, GenerationFigures)
    return figures


def gone_of(found: dict[str, Any]) -> list[tuple[int, int]]:
    return [(row, layer) for step in found["steps"] for row, layer in step["given_up"]]


def chart(html: str, words: str) -> str:
    return next(svg for svg in charts_of(html) if words in svg)


class TestPage:
    def test_everything_is_there(self, tmp_path: Path) -> None:
        found = generation_file()
        page = page_of(tmp_path, found)
        tree = Tree(page.html)
        assert tree.sections == SECTIONS + ABOUT
        assert page.verdict == (
            "With 15.2 of 30 layers' caches on average, 12 in the end, the cache took 9.92 MiB instead of 24.50 MiB."
        )
        assert {"for each prompt", "15.2 of 30", "9.92 MiB", "24.50 MiB", "9.93 MiB", "no"} < set(tree.texts["dd"])
        assert any("by SimilarityRouter in builtin:smollm2-135m" in text for text in tree.texts["dd"])
        assert any("2.47 times as much" in text for text in tree.texts["dd"])
        assert tree.texts["blockquote"] == list(PROMPTS)
        assert all(any(text["text"].strip()[:80] in p for p in tree.texts["p"]) for text in found["sequences"])
        cells = [text.strip() for text in tree.texts["td"]]
        assert ", ".join(map(str, found["leaders"])) in cells and "24 + 200" in cells
        commands = tree.texts["pre"][0].splitlines()
        assert commands == [found["command"], "depthkv report f0.json --out report.html"]

    def test_one_plan_without_a_budget(self, tmp_path: Path) -> None:
        page = page_of(tmp_path, generation_file(3, num_steps=0, budget=None, router=None))
        assert Tree(page.html).sections == [SECTIONS[0], SECTIONS[2], *ABOUT]
        assert page.verdict == "With 16 of 30 layers' caches, the cache took 3.06 MiB instead of 5.73 MiB."
        assert "one plan for all prompts" in page.html and "given up" not in page.html

    def test_full_cache(self, tmp_path: Path) -> None:
        found = generation_file(1, 4, 0, budget=None, router=None)
        found["sequences"][0] |= {"kv_source_layers": [0, 1, 2, 3], "leaders": [0, 1, 2, 3]}
        found |= {"retention": 1, "peak_cache_bytes": found["full_cache_bytes"]}
        size = format_bytes(found["full_cache_bytes"])
        assert page_of(tmp_path, found).verdict == f"With all 4 layers' caches, the cache took {size}."

    def test_ended_by_the_budget(self, tmp_path: Path) -> None:
        found = generation_file(2, 4, 9)
        assert 'class="warning"' not in page_of(tmp_path, found).html
        found["ended_by_budget"] = True
        assert "Writing ended early: the KV budget has no room" in page_of(tmp_path, found).html
        html = page_of(tmp_path, found, found, labels=["a", "b"]).html
        assert "Writing ended early (a, b): the KV budget" in html

    def test_several_files(self, tmp_path: Path) -> None:
        files = [generation_file(), generation_file(budget=0.5, seed=1), generation_file(num_steps=0, budget=None)]
        page = page_of(tmp_path, *files, labels=["loose", "tight", "none"])
        tree = Tree(page.html)
        assert tree.sections == SECTIONS + ABOUT
        assert "caches on average (tight), " in page.verdict and page.verdict.count("instead of") == 3
        captions = tree.texts["figcaption"]
        assert [text for text in captions if "kept a cache" in text] == [
            f"Layers that kept a cache ({label})." for label in ("loose", "tight", "none")
        ]
        assert [text for text in captions if "Bytes" in text] == [
            "Bytes of the cache (loose).",
            "Bytes of the cache (tight).",
        ]
        assert len(tree.texts["blockquote"]) == len(PROMPTS)  # the same prompts, their texts beside each other
        assert [text.split(":")[0] for text in tree.texts["h4"][:3]] == ["loose", "tight", "none"]
        ids = [attrs["id"] for _, attrs in tree.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        with pytest.raises(DepthKVError, match="'same' twice"):
            page_of(tmp_path, *files[:2], labels=["same", "same"])

    def test_beside_other_files(self, tmp_path: Path) -> None:
        page = page_of(tmp_path, bench(), generation_file(), evaluation(), plan_file())
        sections = Tree(page.html).sections
        at = sections.index(SECTIONS[0])
        assert sections[at : at + 4] == [*SECTIONS, "speed"] and sections[0] == "plan" and "results" in sections
        assert "; with 15.2 of 30 layers' caches on average, 12 in the end, the cache took" in page.verdict
        assert '<th scope="col">builtin:smollm2-135m (text)</th>' in page.html
        assert '<th scope="col">builtin:smollm2-135m (plan)</th>' in page.html

    def test_long_texts_are_shortened(self, tmp_path: Path) -> None:
        found = generation_file(20, 4, 3)
        found["sequences"][0] |= {"prompt": f"START {'x' * 9000} END", "text": f"FIRST {'y' * 9000} LAST"}
        tree = Tree(page_of(tmp_path, found).html)
        assert len(tree.texts["blockquote"]) == 12 and "The first 12 of 20 prompts." in " ".join(tree.texts["p"])
        shown = tree.texts["blockquote"][0]
        assert shown.startswith("\u2026x") and shown.endswith(" END") and len(shown) == 400
        text = next(text for text in tree.texts["p"] if text.startswith("FIRST"))
        assert text.endswith("y\u2026") and len(text) == 1200

    def test_needs_nothing_from_outside(self, tmp_path: Path) -> None:
        html = page_of(tmp_path, generation_file(), generation_file(40, 80)).html
        tree = Tree(html)
        assert not {"script", "img", "iframe", "object", "base", "form", "image"} & {tag for tag, _ in tree.tags}
        assert not re.search(r"https?:|//|@import|url\(|\bsrc=", html)
        assert not re.search(r'(fill|stroke)="#', html)  # a colour of its own would not turn dark
        charts = [attrs for attrs in tree.all("svg") if attrs["class"] == "chart"]
        assert len(charts) == 7 and all(chart["role"] == "img" and chart["aria-label"] for chart in charts)

    @pytest.mark.parametrize("number", [2, 30])
    def test_markup_in_the_file_stays_text(self, number: int, tmp_path: Path) -> None:
        files = [poison(generation_file(number, 6, 20)), poison(generation_file(number, 6, 20, seed=1))]
        for found in files:
            for sequence in found["sequences"]:
                sequence["prompt"] = EVIL + sequence["prompt"]
        html = page_of(tmp_path, *files, labels=[EVIL, f"{EVIL}2"]).html
        tree = Tree(html)
        assert "script" not in {tag for tag, _ in tree.tags} and "<script" not in html.lower()
        assert not any(name.startswith("on") for _, attrs in tree.tags for name in attrs)
        for tag in ("title", "h1", "h4", "blockquote", "th", "td", "pre", "p", "figcaption", "summary"):
            assert any(EVIL in text for text in tree.texts[tag]), tag
        assert any(EVIL in (attrs.get("aria-label") or "") for attrs in tree.all("svg"))

    def test_same_bytes(self, tmp_path: Path) -> None:
        found = generation_file(30)
        assert page_of(tmp_path, found).html == page_of(tmp_path, copy.deepcopy(found)).html
        other = copy.deepcopy(found)
        other["steps"][20]["cache_bytes"] -= 100_000
        assert page_of(tmp_path, found).html != page_of(tmp_path, other).html

    @pytest.mark.parametrize(
        ("number", "layers", "steps", "most"), [(5, 30, 200, 50), (100, 80, 300, 200), (600, 130, 50, 600)]
    )
    def test_size(self, number: int, layers: int, steps: int, most: int, tmp_path: Path) -> None:
        html = page_of(tmp_path, generation_file(number, layers, steps)).html
        assert len(html) < 1024 * most and "nan" not in html
        assert ("The first 240 of 600 sequences." in html) == (number == 600)

    @pytest.mark.parametrize("layers", [1, 2, 5])
    @pytest.mark.parametrize("steps", [0, 1, 2])
    def test_small_ones(self, layers: int, steps: int, tmp_path: Path) -> None:
        page = page_of(tmp_path, generation_file(1, layers, steps))
        assert "nan" not in page.html and Tree(page.html).sections[0] == SECTIONS[0]


class TestPictures:
    def boxes(self, path: str) -> list[tuple[float, float]]:
        """The left edge and height of each."""
        return [(float(x), float(high)) for x, high in re.findall(r"M([\d.]+) [\d.]+h[\d.]+v([\d.]+)", path)]

    def test_a_row_for_each_sequence(self, tmp_path: Path) -> None:
        found = generation_file(3, 12, 60)
        svg = kept_map(figures_of(tmp_path, found).sequences, title="t")
        kept, gone = re.findall(r'<path class="bar c1" d="([^"]*)"', svg), gone_of(found)
        assert len(kept) == 3 and gone
        for row, (sequence, path) in enumerate(zip(found["sequences"], kept, strict=True)):
            layers = [round((x - 8) * 12 / 384 - 0.08) for x, _ in self.boxes(path)]
            assert layers == [layer for layer in sequence["leaders"] if (row, layer) not in gone]
            assert {high for _, high in self.boxes(path)} == {14}
        half = re.findall(r'<path class="bar c2" d="([^"]*)"><title>layer (\d+), given up for token (\d+)<', svg)
        assert [self.boxes(path)[0][1] for path, *_ in half] == [7] * len(gone)
        assert sorted(int(layer) for _, layer, _ in half) == sorted(layer for _, layer in gone)
        first = next(step["num_tokens"] for step in found["steps"] if step["given_up"])
        assert min(int(tokens) for *_, tokens in half) == first

    def test_words(self, tmp_path: Path) -> None:
        found = generation_file(2, 12, 60)
        found["sequences"][0]["prompt"] = f"a\n\n  b {'long ' * 40}"
        svg = kept_map(figures_of(tmp_path, found).sequences, title="t")
        left = len(found["leaders"]) - sum(row == 0 for row, _ in gone_of(found))
        assert f">{len(found['leaders'])} of 12, then {left}</text>" in svg
        assert "1. a b long" in svg and "\u2026" in svg

    def test_many_rows(self, tmp_path: Path) -> None:
        found = generation_file(300, 40, 60)
        html = page_of(tmp_path, found).html
        svg = chart(html, "The first 240 of 300 sequences")
        (width, height) = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
        assert width == 400 and height < 600
        cells = set()
        for kind in ("c1", "c2"):
            (path,) = re.findall(rf'<path class="bar {kind}" d="([^"]*)"', svg)
            for first, row, wide in re.findall(r"M(\d+) (\d+)h(\d+)v1", path):
                cells |= {(int(row), layer) for layer in range(int(first), int(first) + int(wide))}
        assert cells == {(i, layer) for i, own in enumerate(found["sequences"][:240]) for layer in own["leaders"]}
        bars = chart(html, "share of the sequences in which the layer keeps its cache")
        count = sum(7 in sequence["leaders"] for sequence in found["sequences"])
        assert f"<title>layer 7: {count / 3:.0f} %</title>" in bars and "layer 0: 100 %" in bars

    def test_memory(self, tmp_path: Path) -> None:
        """In proportion, with the budget across and a mark where layers were given up."""
        found = generation_file(2, 12, 60)
        svg = chart(page_of(tmp_path, found).html, "Bytes of the cache")
        (line,) = corners_of(svg)
        sizes = {step["num_tokens"]: step["cache_bytes"] for step in found["steps"]}
        zero, budget = [float(y) for y in re.findall(r'class="zero" x1="\S+" y1="([\d.]+)"', svg)]
        share = (zero - line[0][1]) / (zero - budget)
        assert share == pytest.approx(sizes[24] / found["kv_budget"], abs=0.01)
        assert (zero - line[-1][1]) / (zero - budget) == pytest.approx(sizes[83] / found["kv_budget"], abs=0.01)
        assert f"budget {format_bytes(found['kv_budget'])}" in svg
        assert svg.count("given up, ") == sum(bool(step["given_up"]) for step in found["steps"])

    def test_budget_far_above(self, tmp_path: Path) -> None:
        found = generation_file(2, 12, 60, budget=9)
        svg = chart(page_of(tmp_path, found).html, "Bytes of the cache")
        assert "is far above." in svg and svg.count('class="zero"') == 1

    def test_leaders(self, tmp_path: Path) -> None:
        few = chart(page_of(tmp_path, generation_file(3, 12, 60)).html, "Layers that keep a cache.")
        assert few.count("<polyline") == 3 and "band" not in few
        flat = generation_file(2, 12, 60, budget=None, router=None)
        lines = corners_of(chart(page_of(tmp_path, flat).html, "Layers that keep a cache."))
        assert [len(line) for line in lines] == [2, 2] and lines[0] != lines[1]  # equal ones can both be seen
        many = chart(page_of(tmp_path, generation_file(5, 12, 60)).html, "Layers that keep a cache.")
        assert many.count("<polyline") == 1 and many.count('class="band"') == 1 and "all 12" in many

    def test_long_runs_take_few_points(self, tmp_path: Path) -> None:
        found = generation_file(1, 4, 5000, budget=None)
        for i, step in enumerate(found["steps"]):
            step["cache_bytes"] -= 7 * (i % 3) * (i != 4000)
        found["steps"][3333]["cache_bytes"] = 1
        (line,) = corners_of(chart(page_of(tmp_path, found).html, "Bytes of the cache"))
        zero = max(y for _, y in line)
        assert len(line) <= 402 and [x for x, _ in line] == sorted(x for x, _ in line)
        assert sum(y == zero for _, y in line) == 1  # the one that stands out is kept

    def test_wide_letters(self) -> None:
        assert cut("ab" * 20, 69) == "ababababa\u2026" and cut("\u5b57" * 20, 69) == "\u5b57" * 4 + "\u2026"
        assert cut("\u5b57" * 5, 69) == "\u5b57" * 5


class TestReading:
    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (put(2, "version"), "version to be 1, got 2"),
            (drop("command"), "command to be text, got no such key"),
            (put(0, "num_layers"), "num_layers to be a whole number of at least 1, got 0"),
            (put([], "sequences"), "sequences to be a list of at least one object, got an empty list"),
            (put(7, "sequences", 1), r"sequences\[1\] to be an object, got 7"),
            (put(None, "sequences", 0, "prompt"), r"sequences\[0\]\.prompt to be text, got null"),
            (put(-1, "sequences", 0, "new_tokens"), r"sequences\[0\]\.new_tokens to be a whole number of at least 0"),
            (put([0, 0], "sequences", 1, "kv_source_layers"), r"kv_source_layers to be a list of 6 layers"),
            (put([0, 2] * 3, "sequences", 1, "kv_source_layers"), r"\[1\]\.kv_source_layers: expected layer 1 to read"),
            (put([0, 9], "sequences", 0, "leaders"), r"leaders\[1\] to be a layer from 0 to 5 .*, got 9"),
            (put([0], "sequences", 0, "leaders"), r"leaders to be the layers that read themselves, \[0, .*, got \[0\]"),
            (put(0.9, "retention"), r"retention to be 0\.\d+, the mean share of the sequences' leaders, got 0\.9"),
            (put(1.5, "retention"), r"retention to be a number from 0 to 1, got 1\.5"),
            (put(True, "router"), "router to be text, got true"),
            (put(0, "kv_budget"), "kv_budget to be a whole number of at least 1, got 0"),
            (put(None, "ended_by_budget"), "ended_by_budget to be true or false, got null"),
            (put(1e999, "peak_cache_bytes"), "peak_cache_bytes to be a whole number of at least 1, got null"),
            (put(-1, "full_cache_bytes"), "full_cache_bytes to be a whole number of at least 1, got -1"),
            (drop("steps"), "steps to be a list, got no such key"),
            (put(24, "steps", 1, "num_tokens"), r"steps\[1\]\.num_tokens to be a whole number of at least 25, got 24"),
            (put(-4, "steps", 1, "cache_bytes"), r"steps\[1\]\.cache_bytes to be a whole number of at least 0, got -4"),
            (put(10**9, "steps", 1, "cache_bytes"), r"cache_bytes to be at most peak_cache_bytes, \d+, got 1"),
            (put([1], "steps", 0, "leaders"), r"steps\[0\]\.leaders to be a list of 3 numbers, got 1"),
            (put("x", "steps", 0, "leaders", 2), r"steps\[0\]\.leaders\[2\] to be a whole number of at least 0, got"),
            (put(1, "steps", 5, "leaders", 1), r"steps\[5\]\.leaders\[1\] to be \d, the leaders that the .*, got 1"),
            (put([[0]], "steps", 0, "given_up"), r"\[0\] to be a list of a sequence and a layer, got a list of 1"),
            (put(["x"], "steps", 0, "given_up"), r'given_up\[0\] to be a list of a sequence and a layer, got "x"'),
            (put([[3, 0]], "steps", 0, "given_up"), r"given_up\[0\] to be of a sequence from 0 to 2, got 3"),
            (put([[-1, 0]], "steps", 0, "given_up"), r"given_up\[0\] to be of a sequence from 0 to 2, got -1"),
            (put([[0, 6]], "steps", 0, "given_up"), r"\[0\] to be of a layer that sequence 0 still keeps, got 6"),
            (put([[0, 0], [0, 0]], "steps", 0, "given_up"), r"\[1\] to be of a layer that sequence 0 still keeps"),
            (put([[0, []]], "steps", 0, "given_up"), r"steps\[0\]\.given_up\[0\] to be of a layer .*, got a list"),
        ],
    )  # fmt: skip
    def test_wrong_keys_are_named(self, change: Callable[[Any], None], expected: str, tmp_path: Path) -> None:
        found = generation_file(3, 6, 20)
        change(found)
        with pytest.raises(DepthKVError, match=rf"g\.json: (expected |sequences).*{expected}"):
            figures_of(tmp_path, found)

    def test_no_key_may_be_dropped_or_be_something_else(self, tmp_path: Path) -> None:
        """Whatever is taken out or replaced, the answer is a page or an error that names the file, never a crash."""
        figures = generation_file(2, 4, 3)
        figures["steps"][1]["given_up"], figures["steps"][1]["leaders"] = [], figures["steps"][0]["leaders"]
        refused = 0
        for path in shapes(figures):
            for value in ("drop", None, [], {}, "text", -1, 1e999, 10**400, True):
                wrong = copy.deepcopy(figures)
                put(value, *path, drop=value == "drop")(wrong)
                try:
                    page_of(tmp_path, wrong)
                except DepthKVError as error:
                    refused += 1
                    assert re.search(r"f0\.json: .*expected .*, got ", str(error)), str(error)
        assert refused > 200

    def test_unknown_keys_are_left(self, tmp_path: Path) -> None:
        found = generation_file(2, 4, 9)
        expected = figures_of(tmp_path, found)
        assert figures_of(tmp_path, found | {"of tomorrow": 1}) == expected


def test_of_a_real_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `generate` writes today is what the report reads, and what the documentation names."""
    assert (generate.FORMAT, generate.VERSION) == (generation_reading.FORMAT, generation_reading.VERSION)
    model, out = tiny_checkpoint(tmp_path / "m"), tmp_path / "r.html"
    prompts = ["--prompt", "w1 w2 w3 w4 w5", "--prompt", "w5 w6"]
    budget = ["--retention", "1", "--kv-budget", "3000B"]
    for name, options in (("a.json", budget), ("b.json", ["--retention", ".5"])):
        arguments = [*prompts, *options, "--max-new-tokens", "20", "--json", str(tmp_path / name)]
        assert main(["generate", str(model), *arguments]) == 0
    written = json.loads((tmp_path / "a.json").read_text())
    assert gone_of(written) and documented("generate") == {"steps[]"} | keys_of(written, whole=("environment",))
    assert keys_of(written, whole=("environment",)) == keys_of(generation_file(), whole=("environment",))
    capsys.readouterr()
    labels = ["--label", "budget", "--label", "half"]
    assert main(["report", str(tmp_path / "a.json"), str(tmp_path / "b.json"), *labels, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("With all 4 layers' caches (budget), ") and "with 2 of 4 layers' caches (half)" in shown
    assert Tree(out.read_text(encoding="utf-8")).sections == SECTIONS + ABOUT
