"""Commands that take `--recipe`, and the command that writes one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from depthkv import SharingPlan, load, share
from depthkv.architectures import layer_kinds
from depthkv.cli import main
from depthkv.compress import CacheRecipe
from depthkv.compress.cache import CompressedLayer
from depthkv.compress.measure import streamed_losses
from depthkv.data import named_blocks, resolve_data
from depthkv.memory import cache_bytes
from depthkv.plan import SharingPlan as Plan
from tiny import LAYERS, figures, tiny_checkpoint, tiny_text

HALF = SharingPlan.every(2, LAYERS)
SMALL: dict[str, Any] = {"plan": HALF, "group_size": 8, "sinks": 2, "recent": 6}
BITS = CacheRecipe(**SMALL, key_bits=4, value_bits=2)
FEW = CacheRecipe(**SMALL, key_bits=(8, 4), value_bits=4, tokens=24, rule="attention")
WINDOW = CacheRecipe(**SMALL, tokens=24)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text(tmp_path_factory.mktemp("texts") / "text.txt")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bits.json, few.json and window.json."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, recipe in (("bits", BITS), ("few", FEW), ("window", WINDOW)):
        recipe.save(folder / f"{name}.json")
    return folder


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ["bits", "few"])
def test_generate(name: str, model: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"bits": BITS, "few": FEW}[name]
    out = tmp_path / "g.json"
    options = ("--prompt", "w1 w2 w3", "--max-new-tokens", 40, "--json", out)
    assert run("generate", model, "--recipe", recipes / f"{name}.json", *options) == 0
    found, shown = figures(out), " ".join(capsys.readouterr().out.split())
    loaded, tokenizer, _ = load(model)
    encoded = tokenizer("w1 w2 w3", return_tensors="pt", return_token_type_ids=False)
    with share(loaded, recipe):
        expected = loaded.generate(**encoded, max_new_tokens=40, do_sample=False, pad_token_id=2)
    assert found["text"] == tokenizer.decode(expected[0, 3:], skip_special_tokens=True)
    assert found["cache_recipe"] == recipe.figures() and found["router"] is None and found["leaders"] == [0, 2]
    lengths = range(3, expected.shape[1])  # the last token is never read
    sizes = [recipe.cache_bytes(loaded.config, loaded.dtype, n) for n in lengths]
    assert [(step["num_tokens"], step["cache_bytes"]) for step in found["steps"]] == list(
        zip(lengths, sizes, strict=True)
    )
    assert found["cache_bytes"] == sizes[-1] and found["peak_cache_bytes"] == max(sizes)
    assert found["full_cache_bytes"] == cache_bytes(loaded.config, loaded.dtype, lengths[-1])
    assert recipe.describe() in shown and "times smaller" in shown
    assert run("report", out, "--out", tmp_path / "r.html") == 0
    assert recipe.describe() in (tmp_path / "r.html").read_text()


def test_evaluate(model: Path, recipes: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--data", text, "--block-size", 48, "--blocks", 3, "--all-text", "--json", tmp_path / "e.json")
    suites = ("--suite", "perplexity", "agreement", "generation", "--prompts", 2, "--new-tokens", 20)
    several = ("--recipe", recipes / "bits.json", recipes / "few.json")
    assert run("evaluate", model, *several, *suites, *options) == 0
    found, shown = figures(tmp_path / "e.json"), " ".join(capsys.readouterr().out.split())
    full, rows = found["full_cache"], found["rows"]
    assert [row["label"] for row in rows] == ["50% of layers", "bits.json", "few.json"]
    assert found["streamed_prompt"] == 24 and full["cache_fraction"] == 1 and rows[0]["cache_fraction"] == 0.5
    loaded, tokenizer, _ = load(model)
    blocks, _ = named_blocks(resolve_data(text), tokenizer, 48)
    blocks = blocks[[0, len(blocks) // 3, 2 * len(blocks) // 3]]
    for row, how in zip([full, *rows], [Plan.full(LAYERS), HALF, BITS, FEW], strict=True):
        losses = streamed_losses(loaded, how, blocks, 24)  # all in the same way, on the same tokens
        assert row["loss"] == pytest.approx(sum(losses) / 3, abs=1e-5)
        places = [(part["first"], part["last"]) for part in row["texts"][0]["positions"]]
        assert places == [(24, 47)]
        assert row["loss_score"]["count"] == 3 and row["generation"]["repetition"]["count"] == 2
        if isinstance(how, CacheRecipe):
            assert row["cache_recipe"] == how.figures() and row["kv_bytes_per_token"] is None
            assert row["cache_bytes"] == how.cache_bytes(loaded.config, loaded.dtype, 48)
            assert row["cache_fraction"] == row["cache_bytes"] / full["cache_bytes"]
        else:
            assert row["cache_recipe"] is None and row["kv_bytes_per_token"] == 64 * len(how.leaders)
    assert len({row["loss"] for row in [full, *rows]}) == 4
    assert f"few.json: {FEW.describe()}" in shown and "24 tokens of each block were read as a prompt" in shown
    assert run("report", tmp_path / "e.json", "--out", tmp_path / "r.html") == 0
    page = (tmp_path / "r.html").read_text()
    assert FEW.describe() in page and "24, others through the cache" in page


def test_evaluate_answers_and_retrieves_under_a_recipe(model: Path, recipes: Path, text: Path, tmp_path: Path) -> None:
    options = ("--data", text, "--suite", "retrieval", "--length", 192, "--items", 2, "--json", tmp_path / "e.json")
    kept: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        inner = CompressedLayer.compress
        patch.setattr(CompressedLayer, "compress", lambda self: (inner(self), kept.append((self.seen, self.num_kept))))
        arms = ("--retention", 1, "--recipe", recipes / "window.json", "--block-size", 32)
        assert run("evaluate", model, *arms, *options) == 0
    assert max(seen for seen, _ in kept) > 160 and max(number for _, number in kept) == 24
    found = figures(tmp_path / "e.json")
    assert [row["label"] for row in found["rows"]] == ["full cache", "50% of layers", "window.json"]
    assert [row["retrieval"]["score"]["count"] for row in found["rows"]] == [8] * 3 and "full_cache" not in found


def test_evaluate_says_when_a_recipe_does_nothing(
    model: Path, recipes: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--data", text, "--block-size", 16, "--blocks", 1)
    assert run("evaluate", model, "--recipe", recipes / "window.json", *options) == 0
    assert "window.json does nothing to blocks of 16 tokens; raise --block-size" in capsys.readouterr().err


def test_bench(model: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several = ("--retention", ".25", "--recipe", recipes / "bits.json", recipes / "few.json")
    options = ("--prompt-tokens", 30, "--new-tokens", 9, "--repeats", 1, "--json", tmp_path / "b.json")
    assert run("bench", model, *several, *options) == 0
    cells = figures(tmp_path / "b.json")["cells"]
    assert [cell["cache_recipe"] for cell in cells] == [None, BITS.figures(), FEW.figures()]
    config = load(model)[0].config
    for cell, recipe in zip(cells[1:], (BITS, FEW), strict=True):
        assert cell["leaders"] == [0, 2]
        assert cell["arms"]["shared"]["cache_bytes"] == recipe.cache_bytes(config, torch.float32, 38)
        read = {arm: cell["roofline"][arm]["decode_bytes"] for arm in ("full", "shared")}
        assert read["shared"] < read["full"]
    assert "2 of 4 layers" in capsys.readouterr().out
    assert run("report", tmp_path / "b.json", "--out", tmp_path / "r.html") == 0
    assert f"shared: {FEW.describe()}" in (tmp_path / "r.html").read_text()


def test_inspect(model: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--context", 512, "--memory", "4MiB", "--json", tmp_path / "i.json")
    assert run("inspect", model, "--recipe", recipes / "bits.json", "--recipe", recipes / "few.json", *options) == 0
    found = figures(tmp_path / "i.json")
    assert [plan["name"] for plan in found["plans"]] == ["full", "bits.json", "few.json"]
    config = load(model)[0].config
    room = 4 * 2**20 - found["weight_bytes"]
    for plan, recipe in zip(found["plans"][1:], (BITS, FEW), strict=True):
        assert plan["cache_bytes"] == recipe.cache_bytes(config, torch.float32, 512)
        # one leader's unpacked pair lies beside the cache; a full group more is held before it is packed or evicted
        kept = min(512, recipe.tokens or 512)
        largest = max(recipe.cache_bytes(config, torch.float32, n) for n in (*range(kept - 32, kept + 1), 512))

        def taken(n: int, recipe: CacheRecipe = recipe, largest: int = largest) -> int:
            return n * largest + recipe.working_bytes(layer_kinds(config), torch.float32, 512, n)

        free = room - plan["activation_bytes"]
        assert taken(plan["sequences"]) <= free < taken(plan["sequences"] + 1)
        assert plan["cache_recipe"] == recipe.figures()
    longest = [plan["longest_context"] for plan in found["plans"]]
    assert longest == sorted(set(longest))
    assert FEW.describe() in " ".join(capsys.readouterr().out.split())


def test_adapt(model: Path, recipes: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--data", text, "--block-size", 32, "--blocks", 2, "--precision", "fp32", "--tokens", 256)
    more = ("--gradient-checkpointing", "--json", tmp_path / "a.json")
    assert run("adapt", model, *options, "--recipe", recipes / "few.json", "--out", tmp_path / "out", *more) == 0
    found = figures(tmp_path / "a.json")
    labels = [row["label"] for row in found["through_cache"]]
    assert labels == ["full cache", "the recipe's plan", "the recipe"]
    assert all(row["loss"] > 0 and row["loss_before"] != row["loss"] for row in found["through_cache"])
    assert "through the cache" in " ".join(capsys.readouterr().out.split())
    _, _, plan = load(tmp_path / "out")
    assert plan is not None and plan == HALF and plan.provenance["noise"] == FEW.describe()
    assert CacheRecipe.load(tmp_path / "out" / "recipe.json") == FEW
    # without noise it learns something else
    assert run("adapt", model, *options, "--out", tmp_path / "plain", "--json", tmp_path / "p.json") == 0
    assert figures(tmp_path / "p.json")["losses"] != found["losses"]
    assert figures(tmp_path / "p.json")["finetune_losses"] == pytest.approx(found["finetune_losses"], rel=1e-4)
    assert "through_cache" not in figures(tmp_path / "p.json")


def test_recipe_by_hand(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "recipe.json"
    HALF.save(tmp_path / "plan.json")
    options = ("--tokens", 64, "--rule", "key-norm", "--sinks", 0, "--recent", 16, "--group-size", 16)
    bits = ("--bits", 4, "--key-bits", "8,2")
    assert run("recipe", model, "--plan", tmp_path / "plan.json", "--out", out, *bits, *options) == 0
    made = CacheRecipe.load(out)
    expected = CacheRecipe(
        plan=HALF, key_bits=(8, 2), value_bits=4, group_size=16, sinks=0, recent=16, tokens=64, rule="key-norm"
    )
    assert made == expected and "recipe" in made.provenance["made_by"]
    shown = " ".join(capsys.readouterr().out.split())
    assert expected.describe() in shown
    config = model / "config.json"  # no weights are read
    assert run("recipe", config, "--retention", ".5", "--bits", 8, "--out", out, "--json", tmp_path / "r.json") == 0
    found = figures(tmp_path / "r.json")
    assert [row["tokens"] for row in found["rows"]] == [512, 2048]
    for row in found["rows"]:
        assert row["full_cache_bytes"] == 2 * row["plan_cache_bytes"] > 4 * row["cache_bytes"] * 0.9
    assert run("recipe", model, "--out", out) == 0
    assert CacheRecipe.load(out) == CacheRecipe(plan=SharingPlan.full(LAYERS))


Case = tuple[Callable[[Path, Path, Path, Path], list[object]], str]
"""From model, text, the folder of recipes and an empty one to arguments; what the line says."""


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def beside(*options: object) -> Case:
    name = str(options[0])
    return (
        lambda m, t, r, d: ["generate", m, "--prompt", "a", "--recipe", r / "bits.json", *options],
        f"expected --recipe or {name}, got both",
    )


BAD_INPUT: dict[str, Case] = {
    "recipe and a plan": beside("--plan", "p.json"),
    "recipe and a retention": beside("--retention", ".5"),
    "recipe and a router": beside("--router", "r.safetensors"),
    "recipe and a cache budget": beside("--kv-budget", "1MiB"),
    "recipe and adaptive": beside("--adaptive"),
    "recipe that is missing": (
        lambda m, t, r, d: ["evaluate", m, "--data", t, "--recipe", d / "none.json"],
        "expected a recipe file at",
    ),
    "recipe that is a plan": (
        lambda m, t, r, d: ["bench", m, "--recipe", written(d / "p.json", HALF.to_dict())],
        'p.json: expected "format": "depthkv-recipe", got \'depthkv-plan\'',
    ),
    "recipe for other layers": (
        lambda m, t, r, d: ["inspect", m, "--recipe", written(d / "o.json", _dict(plan=SharingPlan.every(2, 6)))],
        "o.json: expected a recipe for 4 layers, got one for 6",
    ),
    "recipe with bits that there are not": (
        lambda m, t, r, d: [
            "generate",
            m,
            "--prompt",
            "a",
            "--recipe",
            written(d / "b.json", _dict() | {"key_bits": 3}),
        ],
        "b.json: expected key_bits to be one of 16, 8, fp8, 4, 2, got 3",
    ),
    "training with a recipe that quantises nothing": (
        lambda m, t, r, d: ["adapt", m, "--data", t, "--recipe", r / "window.json", "--out", d / "out"],
        "window.json: expected a recipe with fewer than 16 bits to train with, got",
    ),
    "training with a recipe and a plan": (
        lambda m, t, r, d: ["adapt", m, "--data", t, "--recipe", r / "bits.json", "--plan", "p", "--out", d / "out"],
        "expected --recipe or --plan, got both",
    ),
    "blocks of one token under a recipe": (
        lambda m, t, r, d: ["evaluate", m, "--data", t, "--recipe", r / "bits.json", "--block-size", "1"],
        "--block-size: expected at least 2 with --recipe, got 1",
    ),
    "bits of a recipe by hand": (
        lambda m, t, r, d: ["recipe", m, "--bits", "3", "--out", d / "r.json"],
        "Invalid value for '--bits': expected 16, 8, fp8, 4, 2 or a list such as 8,4,4, got '3'",
    ),
    "bits for too few layers": (
        lambda m, t, r, d: ["recipe", m, "--key-bits", "8,4", "--out", d / "r.json"],
        "expected key_bits for each of the 4 leaders, got 2",
    ),
    "too few tokens for a recipe": (
        lambda m, t, r, d: ["recipe", m, "--tokens", "60", "--out", d / "r.json"],
        "expected tokens of at least sinks + recent + group_size = 68, got 60",
    ),
    "unknown rule of eviction": (
        lambda m, t, r, d: ["recipe", m, "--rule", "oldest", "--out", d / "r.json"],
        "expected rule to be one of window, key-norm, attention, or an object with needs_attention and scores, "
        "got 'oldest'",
    ),
    "recipe onto a folder": (
        lambda m, t, r, d: ["recipe", m, "--out", d],
        "Invalid value for '--out': expected a file, got the folder",
    ),
}


def _dict(**changes: Any) -> dict[str, Any]:
    return CacheRecipe(**(SMALL | changes)).to_dict()


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gets_one_line(
    name: str, model: Path, text: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, expected = BAD_INPUT[name]
    arguments = case(model, text, recipes, tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("depthkv: ") and expected in err, err
    assert "Traceback" not in err and out == ""
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["recipe", "generate", "evaluate", "bench", "adapt", "inspect"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    shown = capsys.readouterr().out
    assert "--json" in shown and ("--recipe" in shown or command == "recipe")
