"""The page says what the files say, escapes what they hold, needs nothing from outside, and refuses wrong files."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from depthkv.cli import main
from depthkv.errors import DepthKVError
from depthkv.report.html import build_page
from depthkv.report.reading import EvaluationFigures, read_figures
from figures import PROMPTS, bench, evaluation, peers, score
from tiny import tiny_checkpoint, tiny_text

VOID = {"meta", "link", "br", "hr", "img", "input"}
EVIL = "</style></title><script>alert('x')</script>\"&'"


class Tree(HTMLParser):
    """Tags with their attributes, the text of each kind of tag, and whether every tag is closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == name]

    @property
    def sections(self) -> list[str | None]:
        return [attrs["id"] for attrs in self.all("section")]


def charts_of(html: str) -> list[str]:
    return re.findall(r'<svg class="chart".*?</svg>', html, re.DOTALL)


def page_of(tmp_path: Path, *files: dict[str, Any], labels: list[str] | None = None) -> Any:
    read = []
    for i, figures in enumerate(files):
        path = tmp_path / f"f{i}.json"
        path.write_text(json.dumps(figures), encoding="utf-8")
        read.append(read_figures(path))
    return build_page(read, labels)


class TestPage:
    def test_everything_is_there(self, tmp_path: Path) -> None:
        page = page_of(tmp_path, evaluation(), bench())
        tree = Tree(page.html)
        assert tree.sections == [
            "curve", "results", "positions", "kinds", "agreement", "answers", "retrieval", "health", "samples", "plans",
            "speed", "provenance", "environment", "commands",
        ]  # fmt: skip
        assert page.verdict.startswith(
            "At 50 % of the cache, loss rises by 0.12 nats [0.11, 0.14] per token, from 3.40"
        )
        assert page.verdict in tree.texts["p"]
        assert "the cache takes 0.50 times the bytes" in page.verdict and page.verdict.count(".") > 4
        cells = [text.strip() for text in tree.texts["td"]]
        assert "3.521[3.471, 3.576]+0.121 [+0.105, +0.137]" in cells  # value, interval, paired difference
        assert "11.25 KiB0.5x" in cells and "15 of 30" in cells
        assert len([text for text in tree.texts["figure"] if "depth \\ tokens" in text]) == 4
        assert all(sum(prompt in text for text in tree.texts["blockquote"]) == 1 for prompt in PROMPTS)
        commands = tree.texts["pre"][0].splitlines()
        assert commands == [evaluation()["command"], "depthkv report f0.json f1.json --out report.html"]

    def test_what_is_absent_is_left_out(self, tmp_path: Path) -> None:
        found = evaluation()
        del found["provenance"]
        for row in found["rows"]:
            for key in ("agreement", "generation", "qa", "retrieval"):
                del row[key]
            del row["texts"][1]
        assert Tree(page_of(tmp_path, found).html).sections == [
            "curve", "results", "positions", "plans", "environment", "commands",
        ]  # fmt: skip
        assert Tree(page_of(tmp_path, bench(1)).html).sections == ["speed", "environment", "commands"]

    def test_other_suites_alone(self, tmp_path: Path) -> None:
        found = evaluation()
        for row in found["rows"]:
            for key in ("loss", "perplexity", "loss_score", "texts", "generation", "qa", "retrieval"):
                del row[key]
        page = page_of(tmp_path, found)
        assert Tree(page.html).sections == ["results", "agreement", "plans", "provenance", "environment", "commands"]
        assert page.verdict.startswith("At 50 % of the cache, divergence from the full cache rises by 0.145 nats [")

    def test_several_files_side_by_side(self, tmp_path: Path) -> None:
        files = [evaluation("plain", harm=20.0), evaluation("trained"), peers()]
        page = page_of(tmp_path, *files)
        tree = Tree(page.html)
        groups = [
            text for text, attrs in zip(tree.texts["th"], tree.all("th"), strict=True) if attrs["scope"] == "rowgroup"
        ]
        assert groups[:3] == ["plain", "trained", "peers: builtin:smollm2-135m"]
        assert "5.82 (plain), +0.12 [+0.11, +0.14] to 3.52 (trained), " in page.verdict
        assert "best of 5: quantised to 8 bits, 50%)" in page.verdict
        # both models wrote after the same prompt: eight columns and those of the other methods below each
        assert tree.texts["h4"][:5] == [f"plain: {row['label']}" for row in files[0]["rows"]] + ["trained: full cache"]
        # one curve for each model, none through methods of the same size; a closer look at the better curve
        charts = [
            text for text in re.findall(r"<svg class=\"chart\".*?</svg>", page.html, re.S) if "size of the" in text
        ]
        assert [chart.count("<polyline") for chart in charts] == [2, 1]
        # other methods have no plan to draw, except the one that shares layers
        captions = [text for text in tree.texts["figcaption"] if "layers keep a cache" in text]
        assert len(captions) == 3 and "peers: builtin:smollm2-135m: KVSharer, threshold given up, 50%" in captions[0]

    def test_labels(self, tmp_path: Path) -> None:
        html = page_of(tmp_path, evaluation(), evaluation(), labels=["before", "after"]).html
        assert "<span>before</span>" in html and "--label before --label after" in html
        assert "<span>builtin:smollm2-135m-depthkv (f1)</span>" in page_of(tmp_path, evaluation(), evaluation()).html
        with pytest.raises(DepthKVError, match="'same' twice"):
            page_of(tmp_path, evaluation(), evaluation(), labels=["same", "same"])
        with pytest.raises(DepthKVError, match="each of 2 files, got 1"):
            page_of(tmp_path, evaluation(), bench(), labels=["one"])
        with pytest.raises(DepthKVError, match="at least one file"):
            build_page([])

    def test_files_that_were_measured_otherwise(self, tmp_path: Path) -> None:
        alike = page_of(tmp_path, evaluation("a"), evaluation("b")).html
        assert 'class="warning"' not in alike and "32 blocks of 512 tokens" in alike
        found = page_of(tmp_path, evaluation("a"), dict(evaluation("b"), blocks=8, held_out=False)).html
        assert (
            "they differ in held out from training, blocks of each text" in found
            and "Measured on all of the text" in found
        )

    def test_needs_nothing_from_outside(self, tmp_path: Path) -> None:
        html = page_of(tmp_path, evaluation(), peers(), bench()).html
        tree = Tree(html)
        assert not {"script", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in tree.tags}
        assert not re.search(r"https?:|//|@import|url\(|\bsrc=", html)
        links = [attrs["href"] or "" for _, attrs in tree.tags if "href" in attrs]
        assert links.pop(0) == "data:," and links == [f"#{name}" for name in tree.sections]
        assert "default-src 'none'" in str(tree.all("meta"))
        assert "prefers-color-scheme: dark" in html
        assert not re.search(r'(fill|stroke)="#', html)  # a colour of its own would not turn dark

    def test_for_those_who_cannot_see_it(self, tmp_path: Path) -> None:
        tree = Tree(page_of(tmp_path, evaluation(), peers(), bench()).html)
        charts = [attrs for attrs in tree.all("svg") if attrs["class"] == "chart"]
        assert len(charts) > 10 and all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
        assert all(attrs["scope"] in ("col", "colgroup", "row", "rowgroup") for attrs in tree.all("th"))
        assert len(tree.all("h1")) == 1 and len(tree.all("h2")) == len(tree.sections)
        ids = [attrs["id"] for _, attrs in tree.tags if "id" in attrs]
        assert len(ids) == len(set(ids))

    def test_same_bytes(self, tmp_path: Path) -> None:
        files = [evaluation(), peers(), bench()]
        assert page_of(tmp_path, *files).html == page_of(tmp_path, *copy.deepcopy(files)).html
        other = evaluation()
        other["rows"][1]["loss_score"]["value"] += 0.01
        assert page_of(tmp_path, *files).html != page_of(tmp_path, other, *files[1:]).html


def poison(value: Any, key: str = "") -> Any:
    """With markup in every text and in every key that is free to choose."""
    if isinstance(value, dict):
        free = key in ("environment", "provenance")
        return {f"{name}{EVIL}" if free else name: poison(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [poison(item, key) for item in value]
    return f"{value}{EVIL}" if isinstance(value, str) and key != "format" else value


def test_markup_in_the_files_stays_text(tmp_path: Path) -> None:
    speeds = poison(bench())
    speeds["cells"][0]["arms"][EVIL] = speeds["cells"][0]["arms"]["shared"]
    figures = [poison(evaluation()), poison(peers()), speeds]
    html = page_of(tmp_path, *figures, labels=[f"{EVIL}1", f"{EVIL}2", EVIL]).html
    tree = Tree(html)
    assert "script" not in {tag for tag, _ in tree.tags} and "<script" not in html.lower()
    assert not any(name.startswith("on") for _, attrs in tree.tags for name in attrs)
    for tag in ("title", "h1", "h4", "blockquote", "th", "td", "pre", "figcaption", "li", "p", "text"):
        assert any(EVIL in text for text in tree.texts[tag]), tag
    assert any(EVIL in (attrs.get("aria-label") or "") for attrs in tree.all("svg"))


def test_text_that_utf8_does_not_have(tmp_path: Path) -> None:
    found = evaluation()
    found["rows"][1]["generation"]["samples"][0]["text"] = "half a pair: \ud83d"
    page = page_of(tmp_path, found, bench(1), evaluation(), labels=["\udcff", "speed", "other"])
    assert "half a pair: ?" in page.html and "(?)" in page.verdict


class TestVerdict:
    @pytest.mark.parametrize(
        ("loss", "expected"),
        [
            (score(3.3, 0.05, 3.4, 0.2), "loss falls by 0.10 nats [0.09, 0.11] per token, from 3.40 to 3.30"),
            (
                score(3.41, 0.1, 3.4, 0.2),
                "changes by +0.01 nats [\u22120.01, +0.03] per token, from 3.40 to 3.41, maybe",
            ),
        ],
    )
    def test_direction(self, loss: dict[str, Any], expected: str, tmp_path: Path) -> None:
        found = evaluation()
        found["rows"][1]["loss_score"] = loss
        assert expected in page_of(tmp_path, found).verdict

    def test_better_than_the_full_cache_is_explained(self, tmp_path: Path) -> None:
        found = evaluation()
        assert "comes from training on such text" not in page_of(tmp_path, found).html
        found["rows"][1]["loss_score"] |= {"difference": -0.2, "difference_low": -0.3, "difference_high": -0.1}
        assert "comes from training on such text" in page_of(tmp_path, found).html

    def test_nothing_but_the_full_cache(self, tmp_path: Path) -> None:
        found = evaluation()
        del found["rows"][1:]
        page = page_of(tmp_path, found)
        assert page.verdict == "The files hold the full cache's figures alone."
        assert "plans" not in Tree(page.html).sections

    def test_full_cache_that_does_not_fit_at_first(self, tmp_path: Path) -> None:
        found = bench(2)
        found["cells"][0]["arms"]["full"] = dict.fromkeys(found["cells"][0]["arms"]["full"]) | {"out_of_memory": True}
        page = page_of(tmp_path, found)
        assert page.verdict.startswith("The cache takes 0.50 times the bytes")
        assert "out of memory" in [text.strip() for text in Tree(page.html).texts["td"]]

    def test_speed_alone(self, tmp_path: Path) -> None:
        assert page_of(tmp_path, bench()).verdict == (
            "The cache takes 0.50 times the bytes, the first token 0.55 times the time, "
            "decoding runs at 1.06 times the speed."
        )


def small(found: dict[str, Any]) -> dict[str, Any]:
    """Two arms, and one entry of each list that is not a map of layers."""
    del found["rows"][2:]
    for row in found["rows"]:
        for part, key in ((row, "texts"), (row["texts"][0], "positions"), (row["generation"], "samples")):
            del part[key][1:]
        del row["retrieval"]["tasks"][1:], row["retrieval"]["depths"][1:]
    return found


def shapes(value: Any, start: tuple[Any, ...] = ()) -> Any:
    """The path to every key, and to the first two entries of lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in items:
        yield (*start, key)
        yield from shapes(item, (*start, key))


class TestReading:
    def test_full_cache_anywhere(self, tmp_path: Path) -> None:
        """It comes first, wherever `evaluate` put it."""
        found = evaluation()
        expected = page_of(tmp_path, found).html
        found["rows"].append(found["rows"].pop(0))
        assert page_of(tmp_path, found).html == expected
        found["full_cache"] = found["rows"].pop()
        assert page_of(tmp_path, found).html == expected

    def test_one_document_has_no_intervals(self, tmp_path: Path) -> None:
        def without(value: Any) -> Any:
            if isinstance(value, dict):
                ends = ("low", "high", "difference_low", "difference_high")
                return {key: None if key in ends else without(item) for key, item in value.items()}
            return [without(item) for item in value] if isinstance(value, list) else value

        page = page_of(tmp_path, without(evaluation()))
        assert page.verdict == (
            "At 50 % of the cache, loss rises by 0.12 nats per token, from 3.40 to 3.52; "
            "F1 falls by 5.0 points, from 41.3 to 36.3; retrieval falls by 7.3 points, from 60.0 to 52.7."
        )
        text = re.sub("nancy|provenance", "", page.html.lower())
        assert "there was one document alone" in text and "nan" not in text

    def test_size_of_the_cache(self, tmp_path: Path) -> None:
        path = tmp_path / "f.json"
        found = peers()
        found["rows"][2]["cache_fraction"] = 0.37
        path.write_text(json.dumps(found), encoding="utf-8")
        figures = read_figures(path)
        assert isinstance(figures, EvaluationFigures)
        assert [arm.cache_share for arm in figures.arms[:3]] == [1.0, 0.5, 0.37]
        found = evaluation()
        found["rows"][1]["kv_bytes_per_token"] = 768 * 12  # layers need not be of one size
        path.write_text(json.dumps(found), encoding="utf-8")
        figures = read_figures(path)
        assert isinstance(figures, EvaluationFigures)
        assert figures.arms[1].cache_share == 0.4

    @pytest.mark.parametrize("figures", [small(evaluation()), bench(1)], ids=["evaluation", "bench"])
    def test_no_key_may_be_dropped_or_be_something_else(self, figures: dict[str, Any], tmp_path: Path) -> None:
        """Whatever is taken out or replaced, the answer is a page or an error that names the file, never a crash."""
        refused = 0
        changes = ("drop", None, [], {}, "text", -1, 1e999, 10**400, True)
        for path in shapes(figures):
            for change in changes:
                wrong = copy.deepcopy(figures)
                place = wrong
                for key in path[:-1]:
                    place = place[key]
                if change == "drop":
                    del place[path[-1]]
                else:
                    place[path[-1]] = change
                try:
                    page_of(tmp_path, wrong)
                except DepthKVError as error:
                    refused += 1
                    assert re.search(r"f0\.json: .*expected .*, got ", str(error)), str(error)
        assert refused > 100

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda f: f["rows"][2]["loss_score"].pop("value"), r"rows\[2\]\.loss_score\.value to be a number, got no"),
            (lambda f: f["rows"][1].update(loss_score=None), r"rows\[1\]\.loss_score to be an object beside the loss"),
            (lambda f: f["rows"][1]["qa"].update(f1=3), r"rows\[1\]\.qa\.f1 to be an object, got 3"),
            (
                lambda f: f["rows"][0]["texts"][1]["positions"][2].update(first="a"),
                r"positions\[2\]\.first to be a",
            ),
            (
                lambda f: f["rows"][1].update(kv_source_layers=[0, 2] * 15),
                r"rows\[1\]\.kv_source_layers: expected",
            ),
            (lambda f: f["rows"][1].update(kv_source_layers=[0, 0]), r"kv_source_layers to be a list of 30 layers"),
            (lambda f: f["rows"][1].update(label="full cache"), "label of their own each, got 2 of 'full cache'"),
            (lambda f: f["rows"].pop(0), "rows to be a list with the full cache"),
            (lambda f: f.update(version=2), "version to be 1, got 2"),
            (
                lambda f: f.update(format="depthkv-plan"),
                "plan or generate writes, got the format 'depthkv-plan'",
            ),
            (lambda f: f.pop("format"), "writes, got the keys version, model"),
            (lambda f: f.pop("command"), "command to be text, got no such key"),
        ],
    )
    def test_wrong_keys_are_named(self, change: Callable[[Any], Any], expected: str, tmp_path: Path) -> None:
        found = evaluation()
        change(found)
        with pytest.raises(DepthKVError, match=rf"f0\.json: expected .*{expected}|f0\.json: .*{expected}"):
            page_of(tmp_path, found)

    @pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "[" * 100_000, '{"format": NaN}', "\ufeff{}"])
    def test_no_json(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "f.json"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DepthKVError, match=r"f\.json: expected "):
            read_figures(path)
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(DepthKVError, match=r"f\.json: expected JSON"):
            read_figures(path)
        with pytest.raises(DepthKVError, match=r"a JSON file at .*none\.json, got No such file"):
            read_figures(tmp_path / "none.json")


class TestFigures:
    """What charts show is in proportion."""

    def test_bars(self, tmp_path: Path) -> None:
        html = page_of(tmp_path, bench(1)).html
        chart = next(chart for chart in charts_of(html) if "cache at the end" in chart)
        full, shared = [float(width) for width in re.findall(r'<rect class="bar".*?width="([\d.]+)"', chart)]
        assert shared == pytest.approx(full / 2, abs=0.1)
        assert "22.50 MiB" in chart and "11.25 MiB, 0.50x" in chart

    def test_heat(self, tmp_path: Path) -> None:
        found = evaluation()
        found["rows"][0]["retrieval"]["depths"][0]["score"] = score(37.2, 1.0)
        html = page_of(tmp_path, found).html
        assert '<td class="cell" style="--share:0.37">37</td>' in html

    def test_curve_goes_through_the_best_plan_of_a_size(self, tmp_path: Path) -> None:
        found = evaluation()
        front = copy.deepcopy(found["rows"][1]) | {"label": "front half", "loss_score": score(3.9, 0.05, 3.4)}
        front["kv_source_layers"] = [min(layer, 14) for layer in range(30)]
        found["rows"].insert(2, front)
        html = page_of(tmp_path, found).html
        curve = charts_of(html)[0]
        (line,) = re.findall(r'<polyline[^>]* points="([^"]*)"', curve)
        assert len(line.split()) == 4 and curve.count("<circle") == 5
        assert "3.90" not in re.findall(r'class="mark[^>]*>([^<]*)<', curve)
        assert "the line goes through the best" in html and "front half" in charts_of(html)[1]

    def test_roofline_and_what_could_not_be_measured(self, tmp_path: Path) -> None:
        found = bench(1)
        found["cells"][0]["roofline"] = {"full": {"decode_share": 0.61}, "shared": {"decode_share": 0.58}}
        found["cells"][0]["arms"]["shared"]["peak_bytes"] = None
        tree = Tree(page_of(tmp_path, found).html)
        cells = [text.strip() for text in tree.texts["td"]]
        assert "61 %" in cells and "58 %" in cells and "not measured" in cells


class TestCommand:
    def test_of_real_files(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """What `evaluate` and `bench` write today is what the report reads."""
        model, text = tiny_checkpoint(tmp_path / "m"), tiny_text(tmp_path / "text.txt", 40_000)
        quality, speed, out = tmp_path / "e.json", tmp_path / "b.json", tmp_path / "report.html"
        options = "--blocks 2 --block-size 128 --prompts 2 --new-tokens 4 --retention .5 .25".split()
        suites = [word for suite in ("perplexity", "agreement", "generation") for word in ("--suite", suite)]
        assert main(["evaluate", str(model), "--data", str(text), *options, *suites, "--json", str(quality)]) == 0
        sizes = "--prompt-tokens 16 --new-tokens 3 --repeats 2".split()
        assert main(["bench", str(model), *sizes, "--json", str(speed)]) == 0
        capsys.readouterr()
        assert main(["report", str(quality), str(speed), "--out", str(out)]) == 0
        shown = capsys.readouterr().out
        tree = Tree(out.read_text(encoding="utf-8"))
        expected = {"curve", "results", "positions", "agreement", "health", "samples", "plans", "speed"}
        assert expected <= set(tree.sections)
        loss = json.loads(quality.read_text())["rows"][0]["loss"]
        assert any(cell.strip().startswith(f"{loss:.3f}") for cell in tree.texts["td"])
        assert shown.startswith("At 50 % of the cache, loss ") and str(out) in shown

    def test_json(self, tmp_path: Path) -> None:
        (tmp_path / "e.json").write_text(json.dumps(evaluation()), encoding="utf-8")
        arguments = ["report", str(tmp_path / "e.json"), "--label", "mine", "--out", str(tmp_path / "r.html")]
        assert main([*arguments, "--json", str(tmp_path / "j.json")]) == 0
        found = json.loads((tmp_path / "j.json").read_text())
        assert found["verdict"].startswith("At 50 %") and found["verdict"] in (tmp_path / "r.html").read_text()

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["good.json", "bad.json"], "bad.json: expected what --json of evaluate, bench, plan or generate writes"),
            (["good.json", "none.json"], "a JSON file at none.json"),
            (["good.json", "--label", "a", "--label", "b"], "--label: expected one for each of 1 files, got 2"),
            (["good.json", "--out", "r.html", "--json", "r.html"], "--json: expected another file"),
            (["good.json", "--out", "good.json"], "--out: expected another file"),
            (["good.json", "--out", "no/r.html"], "expected a file in an existing folder"),
            ([], "FILE"),
        ],
    )
    def test_wrong_input(
        self,
        arguments: list[str],
        expected: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        good = json.dumps(evaluation())
        Path("good.json").write_text(good, encoding="utf-8")
        Path("bad.json").write_text('{"rows": []}', encoding="utf-8")
        Path("report.html").write_text("an earlier one", encoding="utf-8")
        assert main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
        assert Path("report.html").read_text() == "an earlier one" and Path("good.json").read_text() == good
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "good.json", "report.html"]
