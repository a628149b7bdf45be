"""Maps chosen for each sequence, and leaders given up while it grows: against references, in every family."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from depthkv import SharingPlan, share
from depthkv.adaptive import Ladder, Prompt, Router, StepReport
from depthkv.adaptive.budget import map_bytes
from depthkv.architectures import layer_kinds
from depthkv.errors import CacheMismatchError, DepthKVError, KVBudgetError, PlanError
from depthkv.memory import cache_bytes, measured_cache_bytes
from depthkv.reference import ReplayCache, reference_greedy
from families import CONFIGS, NUM_LAYERS, tiny_model
from test_families import EAGER_ONLY

TOKENS, NEW = 19, 6
PADS = (0, 4, 11)


class ByContent(Router):
    """A decision that depends on every token of the prompt, through the layer's own keys."""

    def source(self, layer: int, prompt: Prompt, own: Any) -> int:
        number = int(own[0].double().abs().sum() * 1e4)
        leaders = prompt.leaders(layer)
        return layer if number % 2 else leaders[number % len(leaders)]


class ByHidden(Router):
    """The same from what goes into the attention, before keys are computed."""

    needs_kv = False

    def source(self, layer: int, prompt: Prompt, own: Any) -> int:
        assert own is None and prompt.hidden is not None
        number = int(prompt.hidden.double().abs().sum() * 1e4)
        leaders = prompt.leaders(layer)
        return layer if number % 2 else leaders[number % len(leaders)]


class Everyone(Router):
    """Every layer would lead, if it may."""

    def source(self, layer: int, prompt: Prompt, own: Any) -> int:
        return layer


def model_of(family: str, **changes: Any) -> PreTrainedModel:
    return tiny_model(family, "eager" if family in EAGER_ONLY else "sdpa", **changes)


def padded(pads: tuple[int, ...] = PADS, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of different lengths, `[batch, tokens]`, and their mask."""
    ids = torch.randint(2, 97, (len(pads), tokens), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
        ids[row, :pad] = 0
    return ids, mask


def write(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options)


# Maps of their own


@pytest.mark.parametrize("router", [ByContent, ByHidden])
@pytest.mark.parametrize("family", CONFIGS)
def test_each_sequence_equals_the_reference_of_its_own_map(family: str, router: type[Router]) -> None:
    model = model_of(family)
    ids, mask = padded()
    forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    with share(model, router()) as handle:
        out = write(model, ids, mask)
        maps = handle.last_maps
        hidden = model(ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        alone = []
        for row, pad in enumerate(PADS):
            single = write(model, ids[row : row + 1, pad:])
            assert handle.last_maps == (maps[row],)
            alone.append(single)
    assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == forwards
    assert len(set(maps)) > 1, "all maps are alike, so the test could not fail"
    assert hidden.hidden_states[-1].shape[:2] == ids.shape
    for row, pad in enumerate(PADS):
        tokens, steps = reference_greedy(model, maps[row], ids[row : row + 1, pad:], NEW)
        for got, at in ((out, row), (alone[row], 0)):
            assert torch.equal(got.sequences[at, -NEW:], tokens[0])
            torch.testing.assert_close(torch.stack(got.logits, 1)[at], steps[0], atol=1e-4, rtol=0)
    seen = TOKENS + NEW - 1
    kinds = layer_kinds(model.config)
    expected = sum(map_bytes(sources, kinds, model.dtype, seen) for sources in maps)
    assert measured_cache_bytes(out.past_key_values) == expected


def test_decisions_do_not_depend_on_the_batch() -> None:
    """64 random batches in bf16, where batches of other sizes give other rounding."""
    model = model_of("qwen3").bfloat16()
    rng = random.Random(0)
    prompts = [torch.randint(2, 97, (rng.randrange(1, 40),)) for _ in range(12)]
    found: dict[int, tuple[int, ...]] = {}
    with share(model, ByContent()) as handle, torch.no_grad():
        for _ in range(64):
            chosen = [rng.randrange(len(prompts)) for _ in range(rng.randrange(1, 7))]
            width = max(len(prompts[i]) for i in chosen) + rng.randrange(3)
            ids = torch.stack([torch.nn.functional.pad(prompts[i], (width - len(prompts[i]), 0)) for i in chosen])
            mask = torch.stack([(torch.arange(width) >= width - len(prompts[i])).long() for i in chosen])
            position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
            model(ids, attention_mask=mask, position_ids=position_ids, use_cache=rng.random() < 0.5)
            for i, sources in zip(chosen, handle.last_maps, strict=True):
                assert found.setdefault(i, sources) == sources
    assert len(set(found.values())) > 3


def test_later_tokens_follow_the_decision_in_chunks_and_turns() -> None:
    model = model_of("llama")
    ids, _ = padded((0, 0))
    with share(model, ByContent()) as handle, torch.no_grad():
        cache = DynamicCache(config=model.config)
        for chunk in (ids[:, :7], ids[:, 7:12], ids[:, 12:]):
            logits = model(chunk, past_key_values=cache).logits[:, -1]
        maps = handle.last_maps
        cache.crop(-7)
        again = model(ids[:, 12:], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(again, logits, atol=1e-5, rtol=0)
        assert handle.last_maps == maps
    for row in range(2):
        replay = ReplayCache(model.config, maps[row])
        with torch.no_grad():
            expected = model(ids[row : row + 1], past_key_values=replay).logits[:, -1]
        torch.testing.assert_close(logits[row : row + 1], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_batch_operations_move_maps_with_sequences(family: str) -> None:
    model = model_of(family)
    ids, _ = padded((0, 0, 0))
    step = torch.full((3, 1), 5)
    order = torch.tensor([2, 0, 2, 1])
    with share(model, ByContent()) as handle, torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        maps = handle.last_maps
        expected = model(step, past_key_values=cache).logits
        cache = model(ids, use_cache=True).past_key_values
        cache.reorder_cache(order)
        got = model(step[:1].expand(4, 1), past_key_values=cache).logits
        assert handle.last_maps == tuple(maps[row] for row in order)
        torch.testing.assert_close(got, expected[order], atol=1e-5, rtol=0)
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1, 4]))
        got = model(step[:2], past_key_values=cache).logits
        torch.testing.assert_close(got, expected[[0, 2]], atol=1e-5, rtol=0)
        cache.reset()
        again = model(ids, past_key_values=cache).logits
        assert handle.last_maps == maps and again.shape[0] == 3


def test_equal_prompts_are_read_once() -> None:
    model = model_of("gemma3_text")
    ids, mask = padded((0, 4, 11, 0))
    ids, mask = ids[[0, 1, 0, 2, 1]], mask[[0, 1, 0, 2, 1]]
    calls: list[int] = []
    hook = model.model.layers[0].register_forward_hook(lambda *args: calls.append(1))
    with share(model, ByContent()) as handle:
        out = write(model, ids, mask)
        maps = handle.last_maps
        assert len(calls) == 3 + NEW - 1
        alone = [write(model, ids[row : row + 1, pad:]) for row, pad in ((0, 0), (1, 4), (3, 11))]
    hook.remove()
    assert maps[2] == maps[0] and maps[4] == maps[1]
    for row, single in zip(range(5), (0, 1, 0, 2, 1), strict=True):
        assert torch.equal(out.sequences[row, -NEW:], alone[single].sequences[0, -NEW:])


def test_beams_and_sampling_run() -> None:
    model = model_of("llama")
    ids, mask = padded()
    with share(model, ByContent()):
        beams = write(model, ids, mask, num_beams=3)
        torch.manual_seed(0)
        several = write(model, ids, mask, do_sample=True, num_return_sequences=2)
        tuples = model(ids, attention_mask=mask, return_dict=False)
    assert beams.sequences.shape[0] == 3 and several.sequences.shape[0] == 6
    assert tuples[0].shape[:2] == ids.shape


def test_inputs_as_embeddings() -> None:
    model = model_of("llama")
    ids, mask = padded()
    with share(model, ByContent()) as handle, torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        maps = handle.last_maps
        embeddings = model.get_input_embeddings()(ids)
        got = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits
        assert handle.last_maps == maps
    torch.testing.assert_close(got[:, -1], expected[:, -1])


# Budgets


class Growing:
    """Greedy generation written out: the reference gets each step's map from the run under test."""

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor) -> None:
        self.model, self.ids = model, ids
        self.reports: list[StepReport] = []

    def run(self, handle: Any, new_tokens: int) -> torch.Tensor:
        handle.on_step = self.reports.append
        out = write(self.model, self.ids, max_new_tokens=new_tokens)
        self.sequences = out.sequences
        return torch.stack(out.logits, 1)

    @torch.no_grad()
    def replay(self, row: int) -> torch.Tensor:
        cache = ReplayCache(self.model.config, self.reports[0].maps[row])
        prompt = self.ids.shape[1]
        logits = []
        for number, report in enumerate(self.reports):
            cache.kv_source_layers = list(report.maps[row])
            start, end = (0, prompt) if number == 0 else (prompt + number - 1, prompt + number)
            positions = torch.arange(start, end)[None]
            fed = self.sequences[row : row + 1, start:end]
            logits.append(self.model(fed, past_key_values=cache, position_ids=positions).logits[0, -1])
        return torch.stack(logits)


@pytest.mark.parametrize("family", CONFIGS)
def test_shedding_equals_a_replay_of_the_same_history(family: str) -> None:
    model = model_of(family)
    ids = padded((0, 0))[0][:, :4]  # shorter than the windows, so that these grow, too
    kinds = layer_kinds(model.config)
    full = SharingPlan.full(NUM_LAYERS)
    # just enough for the fewest leaders at the end
    smallest = Ladder(kinds).smallest(full.kv_source_layers)
    budget = 2 * map_bytes(smallest, kinds, model.dtype, 4 + 24)
    growing = Growing(model, ids)
    with share(model, full, kv_budget=budget) as handle:
        logits = growing.run(handle, 24)
    reports = growing.reports
    assert len(reports) == 24 and all(report.cache_bytes <= budget for report in reports)
    given_up = [entry for report in reports for entry in report.given_up]
    assert len(given_up) == 2 * len(set(reports[0].maps[0])) - 2 * len(set(reports[-1].maps[0])) > 0
    for row in range(2):
        torch.testing.assert_close(logits[row], growing.replay(row), atol=1e-4, rtol=0)


def test_budget_is_a_limit_for_each_call_and_each_sequence() -> None:
    model = model_of("llama")
    ids, mask = padded()
    per_token = map_bytes(range(NUM_LAYERS), layer_kinds(model.config), model.dtype, 1)
    full = per_token * (TOKENS + NEW - 1)
    for plan in (SharingPlan.full(NUM_LAYERS), SharingPlan.every(2, NUM_LAYERS)):
        with share(model, plan):
            free = write(model, ids, mask)
            limited = write(model, ids, mask, kv_budget=int(full * 3 * 0.3))
            assert torch.equal(write(model, ids, mask).sequences, free.sequences)
        assert measured_cache_bytes(limited.past_key_values) <= full * 3 * 0.3
        assert limited.sequences.shape == free.sequences.shape
    with share(model, Everyone(), sequence_kv_budget=full // 2) as handle:
        assert handle.last_maps == ()
        write(model, ids, mask)
        for sources in handle.last_maps:
            assert map_bytes(sources, layer_kinds(model.config), model.dtype, TOKENS + NEW - 1) <= full // 2
        assert len(set(map(len, map(set, handle.last_maps)))) == 1


def test_the_sequence_that_takes_most_gives_way_first() -> None:
    model = model_of("llama")
    ids, _ = padded((0, 0))

    class Uneven(Router):
        def source(self, layer: int, prompt: Prompt, own: Any) -> int:
            first = bool(torch.equal(prompt.tokens, ids[0]))
            return layer if first or layer < 2 else prompt.leaders(layer)[-1]

    reports: list[StepReport] = []
    per_layer = map_bytes([0] * NUM_LAYERS, layer_kinds(model.config), model.dtype, 1)
    with share(model, Uneven()) as handle, torch.no_grad():
        handle.on_step = reports.append
        cache = model(ids, use_cache=True).past_key_values
        with handle.limited(per_layer * (TOKENS + 1) * 5):
            model(torch.tensor([[5], [5]]), past_key_values=cache)
    assert [len(set(m)) for m in reports[0].maps] == [6, 2]
    assert [len(set(m)) for m in reports[1].maps] == [3, 2]
    assert [row for row, _ in reports[1].given_up] == [0, 0, 0]


def test_memory_can_be_asked_back_from_outside() -> None:
    model = model_of("llama")
    ids, _ = padded((0, 0))
    room = [10**9]
    sizes: list[int] = []

    def note(report: StepReport) -> None:
        sizes.append(report.cache_bytes)
        if len(sizes) == 3:
            room[0] = sizes[-1] // 2

    with share(model, SharingPlan.full(NUM_LAYERS), kv_budget=lambda: room[0]) as handle:
        handle.on_step = note
        out = write(model, ids)
    assert sizes[3] <= room[0] < sizes[2] and len(sizes) == NEW
    assert out.sequences.shape[1] == TOKENS + NEW


def test_generation_ends_where_nothing_more_fits() -> None:
    model = model_of("llama")
    ids, _ = padded((0,))
    one = map_bytes([0] * NUM_LAYERS, layer_kinds(model.config), model.dtype, 1)
    with share(model, SharingPlan.full(NUM_LAYERS), kv_budget=one * (TOKENS + 3)):
        out = write(model, ids)
        assert out.sequences.shape[1] == TOKENS + 4  # the last token was chosen and not read
        assert measured_cache_bytes(out.past_key_values) == one * (TOKENS + 3)
        with pytest.raises(KVBudgetError, match=r"expected a KV budget of at least .* for 1 sequence of 23 tokens"):
            model(ids[:, :1], past_key_values=out.past_key_values)
        with pytest.raises(KVBudgetError, match="got 10 B"):
            write(model, ids, kv_budget=10)
        with pytest.raises(DepthKVError, match="expected a KV budget such as"):
            write(model, ids, kv_budget=1.5)
    with pytest.raises(DepthKVError, match="expected a size"):
        share(model, SharingPlan.full(NUM_LAYERS), kv_budget="lots")
    assert torch.equal(write(model, ids).sequences[:, :TOKENS], ids)


def test_eight_times_what_the_full_cache_could_hold() -> None:
    model = model_of("llama", num_hidden_layers=12)
    ids = torch.randint(2, 97, (1, 8))
    budget = cache_bytes(model.config, model.dtype, 16)
    reports: list[StepReport] = []
    with share(model, SharingPlan.full(12), kv_budget=budget) as handle:
        handle.on_step = reports.append
        out = write(model, ids, max_new_tokens=8 * 16 - 8)
    assert out.sequences.shape[1] == 8 * 16
    assert max(report.cache_bytes for report in reports) <= budget
    leaders = [len(set(report.maps[0])) for report in reports]
    assert leaders == sorted(leaders, reverse=True) and leaders[0] == 12 and leaders[-1] == 1


def test_a_budget_that_falls_at_any_moment_ends_the_text_and_keeps_it() -> None:
    model = model_of("llama")
    ids, _ = padded((0,))
    for last in range(1, 12):
        asked: list[int] = []

        def room(last: int = last, asked: list[int] = asked) -> int:
            asked.append(1)
            return 10**9 if len(asked) <= last + 2 else 1  # the first answers are share's, generate's and the prompt's

        with share(model, SharingPlan.full(NUM_LAYERS), kv_budget=room) as handle:
            out = write(model, ids)
        assert TOKENS < out.sequences.shape[1] <= TOKENS + NEW
        assert handle.ended_for_room == (out.sequences.shape[1] < TOKENS + NEW)


def test_what_ends_by_itself_did_not_end_for_room() -> None:
    model = model_of("llama")
    ids, _ = padded((0,))
    one = map_bytes([0] * NUM_LAYERS, layer_kinds(model.config), model.dtype, 1)
    with share(model, SharingPlan.full(NUM_LAYERS), kv_budget=one * (TOKENS + NEW - 1)) as handle:
        out = write(model, ids)
        assert out.sequences.shape[1] == TOKENS + NEW and not handle.ended_for_room
        out = write(model, ids, max_new_tokens=NEW + 1)
        assert out.sequences.shape[1] == TOKENS + NEW and handle.ended_for_room
        # a cache of before says nothing of a text that is written without one
        assert write(model, ids, max_new_tokens=NEW + 1, use_cache=False).sequences.shape[1] == TOKENS + NEW + 1
        positional = model.generate(ids, None, None, [], max_new_tokens=NEW, do_sample=False)
        assert torch.equal(positional[:, : TOKENS + NEW], out.sequences)


def test_a_failed_prompt_leaves_an_empty_cache() -> None:
    model = model_of("llama")
    ids, mask = padded()

    class Fails(ByContent):
        armed = True

        def source(self, layer: int, prompt: Prompt, own: Any) -> int:
            if self.armed and layer == 3:
                raise RuntimeError("a bug")
            return super().source(layer, prompt, own)

    router = Fails()
    with share(model, router), torch.no_grad():
        for rows in (slice(0, 1), slice(0, 3)):
            cache = DynamicCache(config=model.config)
            router.armed = True
            with pytest.raises(RuntimeError, match="a bug"):
                model(ids[rows], attention_mask=mask[rows], past_key_values=cache)
            assert cache.get_seq_length() == 0 and measured_cache_bytes(cache) == 0
            router.armed = False
            got = model(ids[rows], attention_mask=mask[rows], past_key_values=cache).logits
            torch.testing.assert_close(got, model(ids[rows], attention_mask=mask[rows], use_cache=False).logits)
            cache.crop(-TOKENS)
            assert cache.layers[0].sources == []


def test_prefill_of_a_batch_holds_the_cache_and_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    from depthkv.adaptive.cache import GroupedLayer

    model = model_of("llama")
    ids, mask = padded()
    alive: list[Any] = []
    held: list[int] = []
    fill = GroupedLayer.fill

    def watched(self: Any, parts: Any, num_tokens: int) -> None:
        held.append(sum(reference() is not None for reference in alive))
        alive.extend(weakref.ref(tensor) for pair in parts for tensor in pair)
        fill(self, parts, num_tokens)

    monkeypatch.setattr(GroupedLayer, "fill", watched)
    with share(model, Everyone()), torch.no_grad():
        model(ids, attention_mask=mask, use_cache=True)
    assert held == [0] * NUM_LAYERS  # what was joined before is freed


# The ladder


def test_ladder_follows_nested_plans_and_orders() -> None:
    kinds = layer_kinds(model_of("llama").config)
    nested = [SharingPlan([0, 1, 0, 3, 1, 3]), SharingPlan([0, 0, 0, 3, 0, 3]), SharingPlan([0] * 6)]
    plan = SharingPlan(nested[0].kv_source_layers, {"nested": [list(p.kv_source_layers) for p in nested[1:]]})
    ladder = Ladder.of(plan, kinds)
    assert ladder.smaller(plan.kv_source_layers) == nested[1].kv_source_layers
    assert ladder.smallest(plan.kv_source_layers) == (0,) * 6
    assert ladder.smaller((0,) * 6) is None
    ordered = Ladder(kinds, order=[4, 2, 5, 1, 3])
    assert ordered.smaller((0, 1, 2, 3, 4, 5)) == (0, 1, 2, 3, 3, 5)
    assert ordered.smaller((0, 1, 1, 3, 3, 3)) == (0, 0, 0, 3, 3, 3)
    # without either: the leader whose readers move least, the later one of two
    assert Ladder(kinds).smaller((0, 0, 0, 3, 3, 5)) == (0, 0, 0, 3, 3, 3)
    assert Ladder(kinds).smaller((0, 1, 2, 3, 4, 5)) == (0, 1, 2, 3, 4, 4)
    with pytest.raises(PlanError, match="nested"):
        Ladder(kinds, plans=[nested[1], nested[0]])
    for order in ([1, 1], [6], ["a"], [1.5], [True]):
        with pytest.raises(PlanError, match="order of layers"):
            Ladder(kinds, order=order)  # type: ignore[arg-type]
    for sources in ([0, 1], [0, 1, 2, 3, 4, 9]):
        with pytest.raises(PlanError):
            Ladder.of(SharingPlan(plan.kv_source_layers, {"nested": [sources]}), kinds)


@pytest.mark.parametrize("family", CONFIGS)
def test_ladder_ends_at_the_first_layer_of_each_kind(family: str) -> None:
    kinds = layer_kinds(model_of(family).config)
    sources = tuple(range(NUM_LAYERS))
    ladder = Ladder(kinds)
    sizes = []
    while (below := ladder.smaller(sources)) is not None:
        assert set(below) < set(sources)
        SharingPlan(below)
        assert all(kinds[source] == kinds[layer] for layer, source in enumerate(below))
        sources = below
        sizes.append(len(set(sources)))
    assert sizes == list(range(NUM_LAYERS - 1, len(set(kinds)) - 1, -1))


# What is refused


def test_refusals() -> None:
    model = model_of("llama")
    ids, mask = padded()
    with share(model, ByContent()), torch.no_grad():
        with pytest.raises(CacheMismatchError, match="dynamic cache for adaptive sharing, got StaticLayer"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=64))
        with pytest.raises(PlanError, match="padded on the left only"):
            model(ids, attention_mask=mask.flip(1))
        with pytest.raises(PlanError, match="attention mask of shape"):
            model(ids, attention_mask=torch.ones(3, 1, TOKENS, TOKENS, dtype=torch.bool))
        with pytest.raises(PlanError, match="neither shared nor routed"):
            share(model, ByContent())
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(PlanError, match="expected 3 sequences"):
            model(ids[:1], past_key_values=cache)
    with torch.no_grad(), pytest.raises(CacheMismatchError, match="filled under adaptive sharing"):
        model(ids, past_key_values=cache)
    with share(model, SharingPlan.every(2, NUM_LAYERS)), torch.no_grad():
        with pytest.raises(CacheMismatchError):
            model(ids[:, :1], past_key_values=cache)
        own = model(ids, use_cache=True).past_key_values
    with share(model, ByContent()), torch.no_grad():
        with pytest.raises(CacheMismatchError, match=r"made under a sharing plan|tokens in layer 0"):
            model(ids[:, :1], past_key_values=own)
    with pytest.raises(PlanError, match="CacheRecipe or a Router, got str"):
        share(model, "plan.json")  # type: ignore[arg-type]

    class Later(Router):
        def source(self, layer: int, prompt: Prompt, own: Any) -> int:
            return layer + 1

    with share(model, Later()), pytest.raises(PlanError, match="expected Later to let layer 1 read itself"):
        model(ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    with share(model, ByContent()):
        with pytest.raises(PlanError, match="adaptive sharing is for inference, got one in training"):
            model(ids)
        with torch.no_grad():
            model(ids)
    model.eval()
    with share(model, SharingPlan.full(NUM_LAYERS)) as handle:
        kept = model.generate
        handle.remove()
        with pytest.raises(PlanError, match="kv_budget after remove"):
            kept(ids, kv_budget="1MiB")
        assert "generate" not in model.__dict__
    for options in ({"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}):
        for shared in ({"plan": ByContent()}, {"plan": SharingPlan.full(NUM_LAYERS), "kv_budget": "1MiB"}):
            with (
                share(model, **shared),
                pytest.raises(PlanError, match=f"one token at a time .*, got {next(iter(options))}"),
            ):
                write(model, ids, mask, **options)
    with share(model, ByContent()), torch.no_grad():
        with pytest.raises(CacheMismatchError, match="offloaded"):
            model(ids, past_key_values=DynamicCache(config=model.config, offloading=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_prefill_stops_early_under_a_plan_with_a_budget(family: str) -> None:
    """Layers above the last leader run for one position, also where the prompts begin with a smaller plan."""
    model = model_of(family)
    ids, mask = padded()
    plan = SharingPlan.from_leaders([0, 1, 2], NUM_LAYERS, layer_kinds(model.config))
    seen: list[int] = []
    decoder = model.model if hasattr(model, "model") else model.transformer
    last = (decoder.layers if hasattr(decoder, "layers") else decoder.h)[-1].mlp
    hook = last.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    with share(model, plan):
        expected = write(model, ids, mask)
        for budget in ("1GiB", map_bytes([0, 0, 2, 2, 2, 2], layer_kinds(model.config), model.dtype, TOKENS + NEW) * 3):
            seen.clear()
            out = write(model, ids, mask, kv_budget=budget)
            assert seen[:3] == [1, 1, 1]
            if budget == "1GiB":
                assert torch.equal(out.sequences, expected.sequences)
    hook.remove()
