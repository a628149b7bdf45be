"""The documentation says what is true: its Python runs, its command lines exist and run, its links lead somewhere.

Every page is read as a reader follows it: block after block, in one namespace and one folder. What would be downloaded
is a tiny model of as many layers and a tiny text; numbers that only decide how long something takes are made small.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main

import depthkv.checkpoint
import depthkv.cli
import depthkv.data
from depthkv import SharingPlan, load
from depthkv.adapt.adapters import LoraSettings, add_adapter, save_adapter
from depthkv.cli import _app, main
from depthkv.compress import CacheRecipe
from depthkv.location import Location
from plan_figures import plan_file
from tiny import WORDS, tiny_checkpoint, tiny_model, tiny_text

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

LAYERS = 30
"""Of SmolLM2-135M, which the pages' plans are for."""

SMALLER = {
    "300_000": "600",
    "token_blocks(held_out, tokenizer, 512)": "token_blocks(held_out, tokenizer, 64)",
    "prompt_tokens=256": "prompt_tokens=32",
}
SMALLER["token_blocks(training, tokenizer, 512)"] = "token_blocks(training, tokenizer, 64)"
SMALLER["named_blocks(training, tokenizer, 512)"] = "named_blocks(training, tokenizer, 64)"
"""What Python blocks say, and what runs instead."""

SMALL_OPTIONS = {
    "--minutes": ["0.002"],
    "--tokens": ["64"],
    "--repeats": ["1"],
    "--prompt-tokens": ["8"],
    "--new-tokens": ["3"],
    "--max-new-tokens": ["3"],
    "--length": ["192"],
    "--kv-budget": ["512"],
    "--block-size": ["32"],
}
"""What is given instead of the numbers of a command line."""

ADDED_OPTIONS: dict[str, dict[str, str]] = {
    "adapt": {"--block-size": "32", "--blocks": "0", "--precision": "fp32", "--finetune": "0"},
    "evaluate": {"--block-size": "32", "--blocks": "2", "--prompts": "1", "--new-tokens": "3", "--items": "1"}
    | {"--num-questions": "8", "--length": "192", "--retention": ".5"},
    "generate": {"--max-new-tokens": "3"},
    "plan": {"--block-size": "32", "--blocks": "2", "--cost-blocks": "1", "--held-out-blocks": "2"}
    | {"--evaluations": "1"},
    "router": {"--block-size": "32", "--blocks": "4", "--held-out-blocks": "2", "--steps": "2"},
    "bench": {"--prompt-tokens": "8", "--new-tokens": "3", "--repeats": "1"},
}
"""What is added where a command line says nothing of it."""

NOT_RUN_COMMANDS = {"demo": "has tests of its own", "serve": "has tests of its own"}
MOST_NOT_RUN = 2
"""Blocks that may be left out with `<!-- not run: reason -->`, over all pages."""


@dataclass(frozen=True)
class Block:
    """Code of a page."""

    language: str
    """As the fence says; "" for an indented block."""
    line: int
    code: str
    not_run: str | None
    """The reason why it is not run."""


def blocks_of(page: Path) -> Iterator[Block]:
    """Fenced and indented blocks, in their order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    i = 0
    while i < len(lines):
        start = i
        above = next((line for line in reversed(lines[:start]) if line.strip()), "")
        found = re.fullmatch(r"<!-- not run: (.+) -->", above.strip())
        reason = found[1] if found else None
        if fence := re.fullmatch(r"```(\w*).*", lines[i]):
            end = lines.index("```", i + 1)
            yield Block(fence[1], start + 2, "\n".join(lines[i + 1 : end]) + "\n", reason)
            i = end + 1
        elif lines[i].startswith("    ") and (i == 0 or not lines[i - 1].strip()):
            while i < len(lines) and (lines[i].startswith("    ") or not lines[i].strip()):
                i += 1
            yield Block("", start + 1, "\n".join(line[4:] for line in lines[start:i]) + "\n", reason)
        else:
            i += 1


def command_lines(block: Block) -> list[list[str]]:
    """Arguments of `depthkv`, also where torchrun or accelerate starts it."""
    if block.language not in ("", "sh", "bash", "console"):
        return []
    found = []
    for line in block.code.replace("\\\n", " ").splitlines():
        if match := re.match(r"(?:\$ )?(?:depthkv|(?:python|torchrun|accelerate launch) .*-m depthkv) (.+)", line):
            found.append(shlex.split(match[1], comments=True))
    return found


def spread(arguments: list[str]) -> list[str]:
    """What `main` hands to the parser: options that take several values are repeated there."""
    with pytest.MonkeyPatch.context() as patch:
        handed: list[str] = []
        patch.setattr(typer.Typer, "__call__", lambda app, args, **options: handed.extend(args))
        main(arguments)
    return handed


def parsed(arguments: list[str]) -> tuple[Any, Mapping[str, Any]]:
    """The command and the values that the real parser finds; raises where it knows an option or command not."""
    group: Any = typer.main.get_command(_app(arguments[0]))
    command = group.commands[arguments[0]]
    values, rest, _ = command.make_parser(command.context_class(command)).parse_args(spread(arguments)[1:])
    assert not rest, f"expected no further arguments, got {rest}"
    return command, values


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_command_lines_parse(page: Path) -> None:
    for block in blocks_of(page):
        for arguments in command_lines(block):
            command, values = parsed(arguments)
            missing = [p.name for p in command.params if p.required and not values.get(p.name)]
            assert not missing, f"line {block.line}: {' '.join(arguments)} lacks {missing}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_command_lines_in_the_text_parse(page: Path) -> None:
    """As in `depthkv evaluate --all-text`: a known command, known options."""
    for span in re.findall(r"`depthkv ([a-z][^`]*)`", page.read_text(encoding="utf-8")):
        parsed(shlex.split(span))


def test_parsing_finds_mistakes() -> None:
    with pytest.raises(KeyError):
        parsed(["compress", "MODEL"])
    with pytest.raises(Exception, match="--colour"):
        parsed(["inspect", "MODEL", "--colour", "red"])


# Running


def squad(path: Path) -> None:
    """Eight articles of one question each, whose answer stands in no other."""
    articles = []
    for i, word in enumerate(WORDS[50:58]):
        question = {"id": str(i), "question": f"w9 w{i}", "answers": [{"text": word, "answer_start": 0}]}
        paragraph = {"context": " ".join([word, *WORDS[10:50]]), "qas": [question]}
        articles.append({"title": f"article {i}", "paragraphs": [paragraph]})
    path.write_text(json.dumps({"version": "1.1", "data": articles}), encoding="utf-8")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of small files; built-in models and texts mean those there."""
    folder = tmp_path_factory.mktemp("stand-ins")
    tiny_checkpoint(folder / "model", num_hidden_layers=LAYERS)
    (folder / "text").mkdir()
    for i in range(12):
        tiny_text(folder / "text" / f"{i}.txt", num_words=1600, seed=i)
    with pytest.MonkeyPatch.context() as patch:
        real = depthkv.checkpoint.locate

        def locate(name: Any, progress: Any = None) -> Location:
            return real(folder / "model" if name == "builtin:smollm2-135m" else name, progress)

        patch.setattr(depthkv.checkpoint, "locate", locate)
        patch.setattr(depthkv.checkpoint, "_ADAPTERS", folder)
        patch.setattr(depthkv.data, "fetch_text", lambda name, progress=None: folder / "text")
        plan = SharingPlan.every(2, LAYERS)
        adapted = add_adapter(load("builtin:smollm2-135m")[0], LoraSettings(rank=2))
        save_adapter(
            folder / "smollm2-135m-depthkv", adapted, base="builtin:smollm2-135m", plan=plan, provenance={"steps": 3}
        )
        yield folder


@pytest.fixture
def here(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a reader works in, with what the pages call by these names."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stand_ins / "text", "my-text")
    shutil.copytree(stand_ins / "smollm2-135m-depthkv", "adapted")
    squad(tmp_path / "squad.json")
    SharingPlan.every(2, LAYERS).save("plan.json")
    SharingPlan.from_leaders(range(15), LAYERS).save("front.json")
    return tmp_path


def trainer() -> Any:
    """What "a training script of your own" has made before."""
    from transformers import Trainer, TrainingArguments

    examples = [{"input_ids": list(range(3, 19)), "labels": list(range(3, 19))}] * 2
    arguments = TrainingArguments("trainer", max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    return Trainer(tiny_model(num_hidden_layers=LAYERS), arguments, train_dataset=examples)


SETUP: dict[str, dict[str, Callable[[], Any]]] = {
    "README.md": {"trainer": trainer},
    "docs/how-to/adapt.md": {"trainer": trainer},
}
"""What the Python of a page takes from elsewhere."""

SERVED = "http://127.0.0.1:8000"
"""Where the server of `depthkv serve` is, in the pages' Python; in the tests it is elsewhere."""


@contextmanager
def served(code: str) -> Iterator[str]:
    """The code, and a server for it where it asks one."""
    if SERVED not in code:
        yield code
        return
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    from depthkv.serve.app import create_app
    from depthkv.serve.engine import Engine
    from serving import listening

    engine = Engine(*load("builtin:smollm2-135m-depthkv"))
    with listening(create_app(engine, name="smollm2-135m-depthkv")) as address:
        yield code.replace(SERVED, address)


PLACEHOLDERS = {"MODEL": "builtin:smollm2-135m", "D": "my-text", "DIR": "out"}


def quick(arguments: list[str]) -> list[str]:
    """The same command on small numbers."""
    name, *rest = [PLACEHOLDERS.get(argument, argument) for argument in arguments]
    found: list[str] = []
    skipping = False
    for argument in rest:
        if skipping and not argument.startswith("-"):
            continue
        small = {} if name == "recipe" else SMALL_OPTIONS  # nothing is read or written there: its numbers are free
        skipping = argument in small
        found += [argument, *small.get(argument, [])]
    added = ADDED_OPTIONS.get(name, {}) | ({} if "--minutes" in found or name != "adapt" else {"--tokens": "64"})
    for option, value in added.items():
        found += [] if option in found else [option, value]
    return [name, *found]


@pytest.mark.parametrize("name", NAMES)
def test_page_runs(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    namespace |= {key: make() for key, make in SETUP.get(name, {}).items()}
    done: list[list[str]] = []
    for block in blocks_of(ROOT / name):
        if block.not_run is not None:
            continue
        if block.language == "python":
            code = block.code
            for said, instead in SMALLER.items():
                code = code.replace(said, instead)
            code = "\n" * (block.line - 1) + code  # errors then name the page's own line
            with served(code) as code:
                exec(compile(code, str(ROOT / name), "exec", dont_inherit=True), namespace)
        for arguments in command_lines(block):
            command = quick(arguments)
            if arguments[0] in NOT_RUN_COMMANDS or command in done:
                continue
            done.append(command)
            assert main(command) == 0, f"{name}, line {block.line}: {shlex.join(command)}: {capsys.readouterr().err}"


def test_few_blocks_are_left_out() -> None:
    left_out = {f"{page.name}:{block.line}": block.not_run for page in PAGES for block in blocks_of(page)}
    left_out = {place: reason for place, reason in left_out.items() if reason is not None}
    assert len(left_out) <= MOST_NOT_RUN, left_out


def test_there_is_something_to_run() -> None:
    """Else a change of the Markdown, or of how it is read here, would let everything pass."""
    found = [block for page in PAGES for block in blocks_of(page)]
    assert sum(block.language == "python" for block in found) >= 20
    assert sum(len(command_lines(block)) for block in found) >= 15


# Links and pictures


def headings(page: Path) -> set[str]:
    """Anchors of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"expected {target} to lead to a file, got none at {file}"
        if anchor:
            assert anchor in headings(file), f"expected {target} to lead to a heading"


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> Any:
    """docs/pictures.py."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("pictures")


def test_pictures_are_what_their_script_draws(pictures: Any) -> None:
    folder = ROOT / "docs" / "pictures"
    assert {path.name for path in folder.iterdir()} == set(pictures.PICTURES)
    for name, draw in pictures.PICTURES.items():
        drawn = draw()
        assert (folder / name).read_text(encoding="utf-8") == drawn, f"run python docs/pictures.py: {name} is old"
        ElementTree.fromstring(drawn)
        assert len(drawn) < 10_000


def test_pages_show_every_picture_and_say_what_is_seen(pictures: Any) -> None:
    drawn = {name: draw() for name, draw in pictures.PICTURES.items()}
    shown = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert pictures.with_titles(text, drawn) == text, f"run python docs/pictures.py: {page.name} is old"
        for target in re.findall(r'(?:src|srcset)="([^"]+)"|!\[[^\]]+\]\(([^)]+)\)', text):
            file = (page.parent / "".join(target)).resolve()
            assert file.is_file(), f"expected {target} in {page.name} to be a picture, got none at {file}"
            shown.add(file.name)
    assert shown == set(drawn)


@pytest.mark.parametrize("narrow", [False, True])
def test_hero_shows_what_was_measured(
    narrow: bool, pictures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other losses than today's: of an adapter that nearly reaches the full cache, measured on more texts."""
    (tmp_path / "raw").mkdir()
    lines = [json.loads(line) for line in (ROOT / "docs" / "raw" / "compare.jsonl").read_text().splitlines()]
    for line in lines:
        line["data"] = [f"builtin:text{i}" for i in range(5)]
        for row in line["rows"] if line["group"] == "default" else ():
            row["loss"] = 2.25 + (row["retention"] < 1) / 4
            row["loss_score"] |= {"value": row["loss"], "low": row["loss"] - 0.125, "high": row["loss"] + 0.0625}
    (tmp_path / "raw" / "compare.jsonl").write_text("\n".join(map(json.dumps, lines)))
    before = pictures.hero(narrow=narrow)
    monkeypatch.setattr(pictures, "DOCS", tmp_path)
    drawn = pictures.hero(narrow=narrow)
    assert "adapted 2.25 at 100%, 2.50 at 50%" in drawn and "every second layer 20 GiB" in drawn
    assert drawn.count(">2.50<") == 3 and drawn.count(">2.25<") == 1 and ">2.50<" not in before
    assert "5 kinds of text" in drawn


# The site


def test_site_builds_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.html")}
    for page in PAGES[1:]:
        name = page.relative_to(ROOT / "docs").as_posix() if page.is_relative_to(ROOT / "docs") else page.name.lower()
        assert name.removesuffix(".md") + ".html" in built
    assert "depthkv.share" in (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")
    for path in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=\"?(https?:[^\s\">]+)", path.read_text())
        assert not loaded, f"{path.name} loads {loaded}"


# JSON


def documented(heading: str) -> set[str]:
    """The keys that docs/json.md lists under a heading."""
    section = (ROOT / "docs" / "json.md").read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.split("| key of S |")[0].splitlines() if line.startswith("|")]
    return {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)}


def keys_of(value: Any, path: str = "", whole: tuple[str, ...] = ()) -> set[str]:
    """The paths of all figures; scores and the objects named in `whole` count as one."""
    if path in whole or (isinstance(value, dict) and "difference_low" in value):
        return {path}
    if isinstance(value, dict):
        return {p for key, inner in value.items() for p in keys_of(inner, f"{path}.{key}".lstrip("."), whole)}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {p for inner in value for p in keys_of(inner, f"{path}[]", whole)}
    return {path}


def test_evaluation_has_the_documented_keys(here: Path) -> None:
    CacheRecipe(plan=SharingPlan.every(2, LAYERS), key_bits=4, group_size=8).save("r.json")
    options = "--data my-text --suite all --questions squad.json --recipe r.json --json e.json"
    assert main(quick(shlex.split(f"evaluate adapted {options}"))) == 0
    whole = ("environment", "provenance", "full_cache", "rows[].cache_recipe")
    found = keys_of(json.loads(Path("e.json").read_text()), whole=whole)
    assert found | {"rows[]"} == documented("evaluate")


def test_bench_has_the_documented_keys(here: Path) -> None:
    assert main(quick(shlex.split("bench adapted --retention .5 --prompt-tokens 8 --repeats 1 --json b.json"))) == 0
    figures = json.loads(Path("b.json").read_text())
    for cell in figures["cells"]:
        assert set(cell["arms"]) == {"full", "shared"} and cell["arms"].keys() == cell["roofline"].keys()
        for name, value in cell.items():
            assert name == "roofline" or figures[name] == value  # the first cell stands at the top level, too
        cell["arms"] = {"*": {key: value for key, value in cell["arms"]["full"].items() if key[-4:] not in _SPREAD}}
        assert set(cell["ratios"]) == set(cell["arms"]["*"])
        cell["roofline"] = {"*": cell["roofline"]["full"]}
    top = {key for key in figures if key not in figures["cells"][0]}
    found = keys_of({key: figures[key] for key in top}, whole=("environment", "cells[].ratios"))
    assert found | {"cells[].arms.*.out_of_memory"} == documented("bench")


def test_plan_has_the_documented_keys(here: Path) -> None:
    command = "plan adapted --data my-text --retention .5 --out p.json --json f.json --cost-blocks 2"
    assert main(quick(shlex.split(command))) == 0
    whole = ("environment", "budget", "similarity", "comparison[].against_even")
    for figures in (json.loads(Path("f.json").read_text()), plan_file()):  # and those that the report is tested with
        assert keys_of(figures, whole=whole) | {"nested[]", "comparison[]", "certainty"} == documented("plan")


def test_recipe_has_the_documented_keys(here: Path) -> None:
    command = "plan adapted --data my-text --kv-budget 1KiB --axes depth bits tokens --plan plan.json --out r.json "
    assert main(quick(shlex.split(command + "--json f.json --cost-blocks 2 --block-size 96"))) == 0
    whole = ("environment", "recipe", "prediction.coefficients", "sensitivity")
    whole += ("comparison[].recipe", "comparison[].against_single")
    found = keys_of(json.loads(Path("f.json").read_text()), whole=whole)
    assert found | {"measured[]", "comparison[]"} == documented("recipe")


def test_recipe_by_hand_has_the_documented_keys(here: Path) -> None:
    assert main(shlex.split("recipe adapted --bits 4 --out r.json --json f.json")) == 0
    found = keys_of(json.loads(Path("f.json").read_text()), whole=("cache_recipe",))
    assert found == documented("recipe by hand")


def test_inspect_has_the_documented_keys(here: Path) -> None:
    assert main(shlex.split("inspect adapted --memory 1GiB --json f.json")) == 0
    found = keys_of(json.loads(Path("f.json").read_text()), whole=("plans[].cache_recipe",))
    assert found | {"groups[]", "plans[]"} == documented("inspect")


def test_router_has_the_documented_keys(here: Path) -> None:
    command = "router adapted --data my-text --retention .5 --out r.safetensors --json r.json"
    assert main(quick(shlex.split(command))) == 0
    found = keys_of(json.loads(Path("r.json").read_text()), whole=("environment",))
    assert found == documented("router")


def test_export_has_the_documented_keys(here: Path) -> None:
    assert main(shlex.split("export adapted --out exported --json x.json")) == 0
    assert keys_of(json.loads(Path("x.json").read_text())) == documented("export")


def test_merge_heads_has_the_documented_keys(here: Path) -> None:
    assert main(shlex.split("merge-heads builtin:smollm2-135m --kv-heads 1 --out merged --json m.json")) == 0
    assert keys_of(json.loads(Path("m.json").read_text())) == documented("merge-heads")


_SPREAD = ("_min", "_max")


def test_tables_are_those_of_the_raw_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import inline
    import tables

    marks: dict[str, set[str]] = {"table": set(), "figure": set()}
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.fill(text) == text, f"{page.name}: run python benchmarks/tables.py"
        assert not re.search("^<!-- figure:", text, re.MULTILINE)  # Markdown would end the paragraph there
        for kind, found in marks.items():
            names = re.findall(rf"<!-- {kind}:([\w-]+) -->", text)
            assert len(names) == text.count(f"<!-- /{kind} -->")
            found |= set(names)
    assert marks == {"table": set(tables.TABLES), "figure": set(inline.FIGURES)}
