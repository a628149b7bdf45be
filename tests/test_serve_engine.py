"""The engine of `depthkv serve`: a request's tokens are those that it would get alone, within the budget."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")

import families
from depthkv import SharingPlan
from depthkv.adaptive.similarity import similarity_router
from depthkv.architectures import layer_kinds
from depthkv.errors import CheckpointError, DepthKVError, ServerBusyError, ServerStoppedError
from depthkv.export import remove_follower_kv
from depthkv.serve.depth import Depths, Need
from depthkv.serve.engine import Engine
from depthkv.serve.ragged import joint_step
from depthkv.serve.request import EngineSettings, Request
from depthkv.serve.text import Codec, Writer, choose
from serving import PLAN, Answer, ask, endless_tokenizer, generated, prompts, running
from tiny import tiny_model, tiny_tokenizer

BYTES = 64
"""Of a token and a layer of the tiny model."""


@pytest.fixture
def engine() -> Iterator[Engine]:
    with running(tiny_model(eos_token_id=None), endless_tokenizer(), PLAN, min_retention=0.25) as made:
        yield made


# The same tokens


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "cohere2", "gpt_oss", "phi3", "gpt2", "gpt_neox"]
)
def test_tokens_are_those_of_generate(family: str) -> None:
    """Of unlike prompts and retentions in one batch, also beyond a sliding window."""
    attention = "eager" if family in ("gemma2", "gpt_oss") else "sdpa"
    overrides = {"rope_scaling": None} if family == "gpt_oss" else {}
    model = families.tiny_model(family, attention, **overrides)
    kinds = layer_kinds(model.config)
    asked = [(prompt, retention) for prompt in prompts(4) for retention in (1.0, 0.5, 0.34)]
    plans = {retention: SharingPlan.for_retention(retention, kinds) for retention in (1.0, 0.5, 0.34)}
    expected = [generated(model, plans[retention], prompt, pad_token_id=0) for prompt, retention in asked]
    with running(model, endless_tokenizer(), plans[0.5], min_retention=0.1) as engine:
        answers = [ask(engine, prompt, kv_retention=retention)[1] for prompt, retention in asked]
        assert [answer.tokens for answer in answers] == expected
        assert engine.metrics.value("requests_running_peak") > 4


def test_neighbours_change_nothing() -> None:
    """A request alone, and among others that come, end and leave meanwhile."""
    mine, *others = prompts(9)
    with running(tiny_model(eos_token_id=None), endless_tokenizer(), PLAN, min_retention=0.25) as engine:
        for options in ({}, {"temperature": 1.3, "top_p": 0.9, "seed": 5}):
            alone = ask(engine, mine, 60, **options)[1].tokens
            _, answer = ask(engine, mine, 60, **options)
            for i, other in enumerate(others):
                request, _ = ask(engine, other, 4 + 5 * i, kv_retention=[1, 0.5, 0.25][i % 3])
                if i % 4 == 3:
                    engine.cancel(request)
                time.sleep(0.01)
            assert answer.tokens == alone


def test_end_token_and_its_text() -> None:
    model, tokenizer = tiny_model(eos_token_id=None), tiny_tokenizer()
    (prompt,) = prompts(1)
    written = generated(model, PLAN, prompt, 20, pad_token_id=0)
    model.generation_config.eos_token_id = [written[7]]
    expected = written[: written.index(written[7]) + 1]
    with running(model, tokenizer, PLAN) as engine:
        _, answer = ask(engine, prompt, 20)
        assert answer.tokens == expected
        assert answer.events[-1].finish_reason == "stop"
        # the end token has no text
        assert answer.text.strip() == tokenizer.decode(expected[:-1], skip_special_tokens=True)


def test_a_router_chooses() -> None:
    model, asked = tiny_model(eos_token_id=None), prompts(3)
    router = similarity_router(model, [torch.tensor(prompt) for prompt in asked], 0.5)
    expected = [generated(model, router, prompt, pad_token_id=0) for prompt in asked]
    with running(model, endless_tokenizer(), PLAN, min_retention=0.25, router=router) as engine:
        # others in between get their own plans
        answers = [(ask(engine, p, kv_retention="adaptive")[1], ask(engine, p, kv_retention=1)[1]) for p in asked]
        assert [adaptive.tokens for adaptive, _ in answers] == expected
        assert {answer.layers[0] for _, answer in answers} == {4}
    with running(model, endless_tokenizer(), PLAN) as engine, pytest.raises(DepthKVError, match="--router"):
        ask(engine, asked[0], kv_retention="adaptive")


def test_a_router_beside_others_within_a_budget() -> None:
    model, asked = tiny_model(eos_token_id=None), prompts(4)
    router = similarity_router(model, [torch.tensor(prompt) for prompt in asked], 0.5)
    settings = EngineSettings(kv_budget=6000)
    with running(model, endless_tokenizer(), PLAN, settings, min_retention=0.25, router=router) as engine:
        answers = [ask(engine, p, 20, kv_retention=how)[1] for p in asked for how in ("adaptive", 1, "adaptive", 0.5)]
        assert all(len(answer.tokens) == 20 for answer in answers)
        assert 0 < engine.metrics.cache_bytes_peak._value.get() <= 6000


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model(eos_token_id=None)
    (prompt,) = prompts(1)
    before = generated(model, SharingPlan.full(4), prompt, pad_token_id=0)
    with running(model, endless_tokenizer(), PLAN) as engine:
        ask(engine, prompt)[1].tokens  # noqa: B018
    assert generated(model, SharingPlan.full(4), prompt, pad_token_id=0) == before


# Sampling


def test_choosing() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    random = torch.Generator().manual_seed(0)
    assert choose(logits, 0, 1, random) == choose(logits, 1e-40, 1, random) == 1
    drawn = [choose(logits, 1.0, 1.0, random) for _ in range(4000)]
    frequencies = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    torch.testing.assert_close(frequencies, logits.softmax(0), atol=0.03, rtol=0)
    assert {choose(logits, 1.0, 0.9, random) for _ in range(200)} == {1, 2}
    assert {choose(logits, 0.05, 1.0, random) for _ in range(200)} == {1}


# The budget


def test_the_budget_holds_and_lowers_depth_before_anyone_waits() -> None:
    """Room for 4 full caches: 16 requests run at once, with fewer layers; nothing is lost."""
    tokens = 8 + 24 - 1
    budget = 4 * tokens * 4 * BYTES
    settings = EngineSettings(kv_budget=budget)
    with running(tiny_model(eos_token_id=None), endless_tokenizer(), PLAN, settings, min_retention=0.25) as engine:
        answers = [ask(engine, [5 + i] * 8, 24, kv_retention=1)[1] for i in range(16)]
        assert all(len(answer.tokens) == 24 for answer in answers)
        metrics = engine.metrics
        assert metrics.value("requests_running_peak") == 16
        assert 0.5 * budget < metrics.value("kv_cache_peak_bytes") <= budget
        assert metrics.value("layers_given_up_total") > 0
        assert min(min(answer.layers) for answer in answers) == 1
        assert all(sorted(answer.layers, reverse=True) == answer.layers for answer in answers)
    assert engine.metrics.value("kv_cache_bytes") == 0


def test_without_depths_to_lower_requests_wait() -> None:
    tokens = 8 + 24 - 1
    settings = EngineSettings(kv_budget=4 * tokens * 4 * BYTES)
    full = dict(min_retention=1.0)
    with running(tiny_model(eos_token_id=None), endless_tokenizer(), None, settings, **full) as engine:
        answers = [ask(engine, [5 + i] * 8, 24)[1] for i in range(12)]
        assert all(len(answer.tokens) == 24 for answer in answers)
        assert engine.metrics.value("requests_running_peak") == 4
        assert {layers for answer in answers for layers in answer.layers} == {4}


def test_giving_up_layers_is_that_of_generate() -> None:
    """One request within a budget writes what generate(kv_budget=...) does."""
    model, (prompt,) = tiny_model(eos_token_id=None), prompts(1)
    budget = (len(prompt) + 30) * 2 * BYTES
    expected = generated(model, SharingPlan.full(4), prompt, 28, pad_token_id=0, kv_budget=budget)
    free = generated(model, SharingPlan.full(4), prompt, 28, pad_token_id=0)
    assert expected != free  # else nothing was given up
    settings = EngineSettings(kv_budget=budget)
    with running(model, endless_tokenizer(), SharingPlan.full(4), settings, min_retention=0.25) as engine:
        _, answer = ask(engine, prompt, 28)
        assert answer.tokens == expected
        assert (answer.layers[0], answer.layers[-1]) == (4, 2)


def test_what_never_fits_is_refused() -> None:
    settings = EngineSettings(kv_budget=20 * BYTES, max_context=200)
    with running(tiny_model(), tiny_tokenizer(), PLAN, settings, min_retention=0.25) as engine:
        ask(engine, [5] * 8, 13)[1].tokens  # noqa: B018
        with pytest.raises(DepthKVError, match="fits into the server's 1,280 bytes, got one of 1,344 bytes"):
            ask(engine, [5] * 8, 14)
        for prompt, number, message in [
            ([5] * 100, 101, "at most 200 tokens together, got 100 \\+ 101"),
            ([], 1, "at least one token"),
            ([64], 1, "tokens from 0 to 63, got 64"),
        ]:
            with pytest.raises(DepthKVError, match=message):
                ask(engine, prompt, number)
        for retention in (0.2, 1.2):
            with pytest.raises(DepthKVError, match=r"kv_retention from 0\.25 to 1"):
                ask(engine, [5], 1, kv_retention=retention)


def test_fitting_lowers_the_largest_first() -> None:
    kinds = layer_kinds(tiny_model().config)
    depths = Depths(kinds, torch.float32, PLAN, 0.5)
    needs = [Need(sources=(0, 1, 2, 3), num_tokens=n) for n in (10, 4)]
    assert depths.fit(needs, (10 * 3 + 4 * 4) * BYTES)
    assert [len(set(need.sources)) for need in needs] == [3, 4]
    assert not depths.fit(needs, 27 * BYTES)
    assert [len(set(need.sources)) for need in needs] == [3, 4]
    assert depths.fit(needs, 28 * BYTES)
    assert [need.sources for need in needs] == [depths.smallest((0, 1, 2, 3))] * 2


def test_bounds_of_retention() -> None:
    kinds = layer_kinds(tiny_model().config)
    assert (Depths(kinds, torch.float32).min_retention, Depths(kinds, torch.float32).default) == (1, 1)
    assert (Depths(kinds, torch.float32, PLAN).min_retention, Depths(kinds, torch.float32, PLAN).default) == (0.25, 0.5)
    odd = SharingPlan([0, 0, 0, 3])
    assert Depths(kinds, torch.float32, odd).start(0.5) == odd.kv_source_layers
    nested = SharingPlan([0, 1, 2, 2], {"nested": [[0, 0, 2, 2], [0, 0, 0, 0]]})
    assert Depths(kinds, torch.float32, nested).start(0.5) == (0, 0, 2, 2)
    with pytest.raises(DepthKVError, match=r"at most the largest, 0\.5, got 0\.75"):
        Depths(kinds, torch.float32, PLAN, 0.75, 0.5)


def test_most_tokens_are_what_fits_with_the_fewest_layers() -> None:
    depths = Depths(layer_kinds(tiny_model().config), torch.float32, PLAN)
    assert depths.most_tokens(10, 500, None) == 500
    for budget in (64 * 10, 64 * 11, 64 * 30 + 63, 64 * 1000):
        most = depths.most_tokens(10, 500, budget)
        assert depths.least == (0,) * 4
        assert most == 1 or depths.num_bytes(depths.least, 10 + most - 1) <= budget
        assert most == 500 or depths.num_bytes(depths.least, 10 + most) > budget


def test_bounds_are_not_rounded_away() -> None:
    kinds, plan = layer_kinds(tiny_model(num_hidden_layers=8).config), SharingPlan.every(2, 8)
    for least, most in ((0.3, 1.0), (0.25, 0.35), (0.1, 0.45), (0.3, 0.35), (0.4, 0.4)):
        depths = Depths(kinds, torch.float32, plan, least, most)
        for retention in (least, (least + most) / 2, most):
            leaders = len(set(depths.start(retention)))
            assert leaders >= 8 * least and (leaders <= 8 * most or leaders - 1 < 8 * least)


def test_a_plan_whose_other_layers_have_no_weights() -> None:
    """As exports are: every map keeps to the plan's leaders."""
    model, (prompt,) = tiny_model(eos_token_id=None), prompts(1)
    plan = SharingPlan([0, 1, 1, 1])
    expected = generated(model, plan, prompt, pad_token_id=0)
    smaller = generated(model, SharingPlan([0, 0, 0, 0]), prompt, pad_token_id=0)
    remove_follower_kv(model, plan)
    with running(model, endless_tokenizer(), plan) as engine:
        assert (engine.depths.min_retention, engine.depths.max_retention) == (0.25, 0.5)
        assert ask(engine, prompt)[1].tokens == expected
        assert ask(engine, prompt, kv_retention=0.25)[1].tokens == smaller
    with pytest.raises(DepthKVError, match=r"at most 0\.5, since layer 2 and others have no K and V weights .* got 1"):
        Engine(model, endless_tokenizer(), plan, max_retention=1.0)
    with pytest.raises(DepthKVError, match=r"at most 0\.5, since layer 2"):
        Engine(model, endless_tokenizer())


def test_prefill_stops_early_where_no_map_can_lead_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (prompt,) = tiny_model(eos_token_id=None), prompts(1)
    plan = SharingPlan([0, 1, 1, 1])
    expected = generated(model, plan, prompt, pad_token_id=0)
    widths: list[int] = []
    model.model.layers[3].mlp.register_forward_pre_hook(lambda module, given: widths.append(given[0].shape[1]))
    for largest, width in ((1.0, len(prompt)), (0.5, 1)):
        with running(model, endless_tokenizer(), plan, max_retention=largest) as engine:
            widths.clear()
            assert ask(engine, prompt)[1].tokens == expected
            assert widths[0] == width


# Leaving, waiting, failing


def test_cancelled_requests_free_their_room(engine: Engine) -> None:
    running_request, answer = ask(engine, [5] * 4, 1500)
    assert answer.begun.wait(30)
    engine.cancel(running_request)
    later = ask(engine, [5] * 4, 3)[1]
    assert len(later.tokens) == 3
    written = len(answer.events)
    ask(engine, [6] * 4, 3)[1].tokens  # noqa: B018
    assert len(answer.events) == written < 1500 and not answer.done.is_set()
    wait_for(lambda: engine.metrics.value("kv_cache_bytes") == 0)
    assert engine.metrics.value("requests_total", outcome="cancelled") == 1


def test_late_requests_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_step(*args: Any) -> torch.Tensor:
        time.sleep(0.01)
        return joint_step(*args)

    settings = EngineSettings(timeout_s=2, max_sequences=1)
    with running(tiny_model(eos_token_id=None), endless_tokenizer(), PLAN, settings) as engine:
        monkeypatch.setattr("depthkv.serve.engine.joint_step", slow_step)
        first = ask(engine, [5], 2000)[1]
        assert first.begun.wait(30)
        second = ask(engine, [5], 2000, arrived=time.monotonic() - 1.9)[1]  # is late while it waits
        for answer in (first, second):
            assert answer.done.wait(30) and answer.failure is not None
            assert answer.failure.status == 504 and "within 2 seconds" in answer.failure.message
        assert first.events and not second.events


def test_full_queue() -> None:
    settings = EngineSettings(max_sequences=1, max_queue=1)
    with running(tiny_model(eos_token_id=None), endless_tokenizer(), PLAN, settings) as engine:
        _, first = ask(engine, [5], 2000)
        assert first.begun.wait(30)
        _, second = ask(engine, [5], 5)
        with pytest.raises(ServerBusyError, match="at most 1 waiting"):
            ask(engine, [5], 5)
    for answer in (first, second):  # the engine was stopped
        assert answer.failure is not None and answer.failure.status == 503
    with pytest.raises(ServerStoppedError, match="stopping"):
        ask(engine, [5], 5)


def test_a_failing_step_fails_its_requests_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ask(engine, [5] * 3)[1].tokens

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_prefill", fail)
        _, answer = ask(engine, [5] * 3)
        assert answer.done.wait(30) and answer.failure is not None and answer.failure.status == 500
        assert "memory" not in answer.failure.message
    with monkeypatch.context() as patch:
        patch.setattr("depthkv.serve.engine.joint_step", fail)
        _, answer = ask(engine, [5] * 3)
        assert answer.done.wait(30) and answer.failure is not None
    nan = torch.full((1, 64), float("nan"))
    for name, broken in (("choose", fail), ("joint_step", lambda *args: nan)):
        with monkeypatch.context() as patch:
            patch.setattr(f"depthkv.serve.engine.{name}", broken)
            _, answer = ask(engine, [5] * 3)
            assert answer.done.wait(30) and answer.failure is not None and answer.failure.status == 500
    assert ask(engine, [5] * 3)[1].tokens == expected


def test_a_listener_that_fails_harms_nobody(engine: Engine) -> None:
    class Bad(Answer):
        def __call__(self, event: Any) -> None:
            raise RuntimeError("gone")

    engine.submit(Request(prompt=[5], max_tokens=500, listener=Bad(), temperature=0))
    assert len(ask(engine, [5])[1].tokens) == 12
    wait_for(lambda: engine.metrics.value("requests_running") == 0)


def test_damaged_weights_are_refused() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="finite logits"):
        Engine(model, tiny_tokenizer(), PLAN)


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# Text


class Bytes:
    """Decodes bytes."""

    def decode(self, tokens: Any) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def written(text: str, stop: list[str]) -> tuple[list[str], bool]:
    writer = Writer(Bytes(), b"prompt", stop)  # type: ignore[arg-type]
    pieces = []
    for byte in text.encode():
        pieces.append(writer.add(byte))
        if writer.stopped:
            break
    return [*pieces, writer.finish()], writer.stopped


def test_text_comes_in_whole_characters() -> None:
    pieces, stopped = written("aé𝄞b", [])
    assert "".join(pieces) == "aé𝄞b" and not stopped
    assert not any("\ufffd" in piece for piece in pieces)
    writer = Writer(Bytes(), b"x", [])  # type: ignore[arg-type]
    assert writer.add("é".encode()[0]) == "" and writer.finish() == "\ufffd"  # an end within a character


def test_stop_texts_are_no_part_of_the_answer() -> None:
    pieces, stopped = written("one two three", ["two"])
    assert "".join(pieces) == "one " and stopped
    pieces, stopped = written("one twt", ["two"])  # what could have begun it comes later
    assert "".join(pieces) == "one twt" and not stopped and pieces[4:6] == ["", ""]
    pieces, stopped = written("aab", ["aaab", "ab"])
    assert "".join(pieces) == "a" and stopped


def test_text_is_that_of_the_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    writer = Writer(Codec(tokenizer), [5, 6], [])
    tokens = [7, 8, 2, 9]
    text = "".join(writer.add(token) for token in tokens) + writer.finish()
    assert text.strip() == tokenizer.decode(tokens, skip_special_tokens=True)
