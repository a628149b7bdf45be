"""`depthkv router`, and `depthkv generate` with routers and budgets: what they write and show, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from depthkv import SharingPlan, load
from depthkv.adaptive import measure
from depthkv.adaptive.files import load_router
from depthkv.adaptive.learned import LearnedRouter
from depthkv.adaptive.portfolio import PortfolioRouter
from depthkv.adaptive.similarity import SimilarityRouter
from depthkv.architectures import layer_kinds
from depthkv.cli import main
from depthkv.memory import cache_bytes
from tiny import LAYERS, POSITIONS, figures, tiny_checkpoint, tiny_text

SMALL = ("--block-size", 32, "--blocks", 6, "--held-out-blocks", 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        tiny_text(folder / f"{i}.txt", num_words=400, seed=i)
    return folder


@pytest.fixture(scope="module")
def router(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("routers") / "router.safetensors"
    assert run("router", model, "--data", text, "--retention", ".75", "--out", path, *SMALL) == 0
    return path


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("method", ["portfolio", "similarity", "learned"])
def test_router_is_made_compared_and_used(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    out, options = tmp_path / "r.safetensors", ("--method", method, "--steps", 4, "--json", tmp_path / "f.json")
    assert run("router", model, "--data", text, "--retention", ".75", "--out", out, *SMALL, *options) == 0
    found, shown = figures(tmp_path / "f.json"), " ".join(capsys.readouterr().out.split())
    kinds = layer_kinds(load(model)[0].config)
    made = load_router(out, kinds)
    kind = {"portfolio": PortfolioRouter, "similarity": SimilarityRouter, "learned": LearnedRouter}[method]
    assert isinstance(made, kind)
    assert found["method"] == method and f"{method} router for 75% of 4 layers on average" in shown
    assert len(found["inputs"]) == 4 and found["static"]["retention"] <= 0.75
    kept = [len(set(entry["kv_source_layers"])) for entry in found["inputs"]]
    assert found["held_out_retention"] == pytest.approx(sum(kept) / len(kept) / LAYERS)
    assert found["loss"]["value"] == pytest.approx(sum(entry["loss"] for entry in found["inputs"]) / 4)
    assert found["loss"]["difference"] == pytest.approx(found["loss"]["value"] - found["static"]["loss"]["value"])
    assert run("generate", model, "--router", out, "--prompt", "w1 w2", "--json", tmp_path / "g.json") == 0
    assert figures(tmp_path / "g.json")["router"] == kind.__name__


def test_losses_are_kept_over_runs(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("router", model, "--data", text, "--retention", ".75", *SMALL, "--json", tmp_path / "f.json")
    assert run(*arguments, "--out", tmp_path / "a.safetensors") == 0
    first = figures(tmp_path / "f.json")
    calls: list[int] = []
    real = measure.continuation_losses
    monkeypatch.setattr(measure, "continuation_losses", lambda *a: calls.append(1) or real(*a))
    kept = ("--losses", tmp_path / "a.losses.json")
    assert run(*arguments, "--out", tmp_path / "b.safetensors", *kept) == 0
    assert not calls and figures(tmp_path / "f.json")["loss"] == first["loss"]
    # an interrupted run has fewer of them
    data = figures(tmp_path / "a.losses.json")
    data["losses"].popitem()
    (tmp_path / "a.losses.json").write_text(json.dumps(data), encoding="utf-8")
    assert run(*arguments, "--out", tmp_path / "b.safetensors", *kept) == 0
    assert len(calls) == 1 and figures(tmp_path / "f.json")["loss"] == first["loss"]


def test_several_prompts_within_a_budget(
    model: Path, router: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ("--prompt", "w1 w2 w3 w4 w5 w6", "--prompt", "w9", "--max-new-tokens", 30)
    full = cache_bytes(load(model)[0].config, load(model)[0].dtype, 6 + 29, 2)
    assert run("generate", model, *prompts, "--kv-budget", full // 2, "--json", tmp_path / "g.json") == 0
    found, shown = figures(tmp_path / "g.json"), " ".join(capsys.readouterr().out.split())
    assert found["kv_budget"] == full // 2 and found["router"] is None
    assert [entry["prompt"] for entry in found["sequences"]] == ["w1 w2 w3 w4 w5 w6", "w9"]
    assert [entry["prompt_tokens"] for entry in found["sequences"]] == [6, 1]
    assert found["prompt"] == found["sequences"][0]["prompt"] and found["text"] == found["sequences"][0]["text"]
    assert max(step["cache_bytes"] for step in found["steps"]) == found["peak_cache_bytes"] <= full // 2
    sizes = [step["leaders"] for step in found["steps"]]
    assert sizes[0] == [4, 4] and sum(sizes[-1]) < 8 and sum(len(s["given_up"]) for s in found["steps"]) > 0
    assert "in the end, to stay within" in shown and not found["ended_by_budget"]
    alone = tmp_path / "alone.json"
    for number, text in ((0, "w1 w2 w3 w4 w5 w6"), (1, "w9")):
        assert run("generate", model, "--router", router, *prompts, "--json", tmp_path / "g.json") == 0
        options = ("--prompt", text, "--max-new-tokens", 30, "--json", alone)
        assert run("generate", model, "--router", router, *options) == 0
        together = figures(tmp_path / "g.json")["sequences"][number]
        assert figures(alone)["sequences"] == [together]


def test_budget_that_ends_the_text(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--prompt", "w1 w2 w3", "--max-new-tokens", 500, "--kv-budget", "640 B", "--json", tmp_path / "g.json")
    assert run("generate", model, *options) == 0
    found = figures(tmp_path / "g.json")
    if found["new_tokens"] == 8:  # 10 tokens of one layer are 640 bytes; the eleventh is not read
        assert found["ended_by_budget"] and "has no room for another token" in capsys.readouterr().out
    assert found["peak_cache_bytes"] <= 640


def test_adaptive_without_a_file(model: Path, tmp_path: Path) -> None:
    options = ("--adaptive", "--retention", ".75", "--prompt", "w1 w2 w3", "--json", tmp_path / "g.json")
    assert run("generate", model, *options) == 0
    found = figures(tmp_path / "g.json")
    assert found["router"] == "SimilarityRouter" and 0 < found["retention"] <= 1
    assert found["steps"][0]["leaders"] == [len(found["leaders"])]


def test_plan_carries_its_nested_plans(model: Path, text: Path, tmp_path: Path) -> None:
    small = ("--block-size", 32, "--blocks", 4, "--cost-blocks", 2, "--held-out-blocks", 2, "--evaluations", 1)
    path = tmp_path / "plan.json"
    assert run("plan", model, "--data", text, "--retention", ".75", "--out", path, *small) == 0
    plan = SharingPlan.load(path)
    nested = [SharingPlan(sources) for sources in plan.provenance["nested"]]
    assert [len(p.leaders) for p in nested] == [2, 1] and set(nested[0].leaders) < set(plan.leaders)
    options = ("--plan", path, "--prompt", "w1 w2 w3", "--kv-budget", "1KiB", "--json", tmp_path / "g.json")
    assert run("generate", model, *options, "--max-new-tokens", 9) == 0
    given = [entry for step in figures(tmp_path / "g.json")["steps"] for entry in step["given_up"]]
    order = [set(plan.leaders) - set(nested[0].leaders), set(nested[0].leaders) - {0}]
    assert given and given == [[0, layer] for layers in order for layer in layers][: len(given)]


Case = tuple[Callable[[Path, Path, Path, Path], list[object]], str]
"""From model, text, router and an empty folder to arguments; what the line says."""


def routing(m: Path, t: Path, d: Path, *more: object) -> list[object]:
    return ["router", m, "--data", t, "--retention", ".75", "--out", d / "r.safetensors", *SMALL, *more]


def written(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


BAD_INPUT: dict[str, Case] = {
    "adaptive without a retention": (
        lambda m, t, r, d: ["generate", m, "--prompt", "a", "--adaptive"],
        "expected --retention with --adaptive",
    ),
    "router and a retention": (
        lambda m, t, r, d: ["generate", m, "--prompt", "a", "--router", r, "--retention", ".5"],
        "expected --router or --retention, got both",
    ),
    "router that is missing": (
        lambda m, t, r, d: ["generate", m, "--prompt", "a", "--router", d / "none"],
        "expected a router file at",
    ),
    "router that is a plan": (
        lambda m, t, r, d: ["generate", m, "--prompt", "a", "--router", written(d / "p.json", "{}")],
        "p.json",
    ),
    "a cache budget that is no size": (
        lambda m, t, r, d: ["generate", m, "--prompt", "a", "--kv-budget", "lots"],
        "--kv-budget: expected a size",
    ),
    "a cache budget for nothing": (
        lambda m, t, r, d: ["generate", m, "--prompt", "w1 w2", "--kv-budget", "10B"],
        "expected a KV budget of at least 128 B for 1 sequence of 2 tokens, got 10 B",
    ),
    "unknown method": (
        lambda m, t, r, d: routing(m, t, d, "--method", "magic"),
        "a method among portfolio,",
    ),
    "router for too few layers": (
        lambda m, t, r, d: routing(m, t, d, "--retention", ".1"),
        "--retention: expected at least 0.25",
    ),
    "prompts as long as blocks": (
        lambda m, t, r, d: routing(m, t, d, "--prompt-tokens", "32"),
        "--prompt-tokens: expected 1 to 31, got 32",
    ),
    "one block for a router": (lambda m, t, r, d: routing(m, t, d, "--blocks", "1"), "--blocks: expected at least 2"),
    "router onto its losses": (
        lambda m, t, r, d: routing(m, t, d, "--losses", d / "r.safetensors"),
        "--losses: expected another file",
    ),
    "losses of something else": (
        lambda m, t, r, d: routing(m, t, d, "--losses", written(d / "l.json", "{}")),
        "l.json: expected losses of plans",
    ),
    "router on blocks longer than positions": (
        lambda m, t, r, d: routing(m, t, d, "--block-size", POSITIONS + 1),
        "--block-size",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gets_one_line(
    name: str, model: Path, text: Path, router: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, expected = BAD_INPUT[name]
    capsys.readouterr()
    arguments = case(model, text, router, tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith("depthkv: ") and expected in last, err
    assert "Traceback" not in err and out == ""
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("router", "--help") == 0
    assert "--json" in capsys.readouterr().out
