"""Each peer does what its paper says where that can be worked out by hand, and nothing where nothing is to be done."""

from __future__ import annotations

import itertools
import math
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.cache_utils
from transformers import DynamicCache

from depthkv import SharingPlan, share
from depthkv.cache import FollowerLayer
from depthkv.errors import DepthKVError
from depthkv.evaluate.arms import Arm
from depthkv.evaluate.text import PIECE, read_text
from tiny import LAYERS, tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import peers  # type: ignore[import-not-found]

BLOCKS = torch.randint(3, 64, (3, 48), generator=torch.Generator().manual_seed(1))
SIZES: dict[str, Any] = dict(hidden_size=128, head_dim=64, intermediate_size=64)
"""Heads of 64 numbers: what the quantisers' groups want."""


def losses(model: Any, arm: Arm) -> torch.Tensor:
    return read_text(model, [arm], BLOCKS)[0].losses


@pytest.fixture
def model() -> Any:
    return tiny_model(**SIZES)


@pytest.fixture
def full(model: Any) -> torch.Tensor:
    return losses(model, Arm(label="full"))


def written(model: Any, cache: Any) -> list[list[int]]:
    """What two prompts of one length go on with."""
    rows = model.generate(
        BLOCKS[:2, :20],
        attention_mask=torch.ones(2, 20, dtype=torch.long),
        past_key_values=cache,
        max_new_tokens=40,
        do_sample=False,
        pad_token_id=2,
        eos_token_id=None,
    )
    return rows[:, 20:].tolist()


@pytest.fixture
def usual(model: Any) -> list[list[int]]:
    return written(model, DynamicCache(config=model.config))


class TestWindow:
    def test_a_long_window_changes_nothing(self, model: Any, full: torch.Tensor, usual: list[list[int]]) -> None:
        arm = Arm(label="w", make_cache=lambda c: peers.window_cache(c, 60))
        assert torch.allclose(losses(model, arm), full, atol=1e-4)
        assert written(model, peers.window_cache(model.config, 60)) == usual

    def test_a_token_sees_sinks_and_the_latest(self, model: Any) -> None:
        """Token by token against attention with an explicit mask."""
        cache, window = peers.window_cache(model.config, 10), 10
        with torch.no_grad():
            steps = [
                model(input_ids=BLOCKS[:1, i : i + 1], past_key_values=cache, use_cache=True).logits[0, 0]
                for i in range(30)
            ]
            at = torch.arange(30)
            seen = (at[None] <= at[:, None]) & (
                (at[None] < peers.SINKS) | (at[:, None] - at[None] <= window - peers.SINKS)
            )
            mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
            expected = model(input_ids=BLOCKS[:1, :30], attention_mask=mask, use_cache=False).logits[0]
        assert torch.allclose(torch.stack(steps), expected, atol=1e-4)

    def test_text_is_generated_and_the_cache_stays_small(self, model: Any) -> None:
        cache = peers.window_cache(model.config, 8)
        rows = written(model, cache)
        assert {len(row) for row in rows} == {40}
        assert {layer.keys.shape[-2] for layer in cache.layers} == {8} and cache.get_seq_length() == 59

    @pytest.mark.parametrize("window", [0.5, 24])
    def test_bytes(self, window: float, model: Any) -> None:
        arm = Arm(label="w", make_cache=lambda c: peers.window_cache(c, window))
        assert peers.measured_bytes(model, arm, 48) == peers.measured_bytes(model, Arm(label="full"), 48) / 2
        assert peers.measured_bytes(model, arm, 48, batch=3) == 3 * peers.measured_bytes(model, arm, 48)


class TestQuantised:
    @pytest.mark.parametrize("bits", [4, 8])
    def test_numbers_come_back(self, bits: int) -> None:
        layer = peers.PackedLayer(nbits=bits, q_group_size=64)
        numbers = torch.randn(2, 3, 5, 128)
        back = layer._dequantize(layer._quantize(numbers, 0))
        groups = numbers.unflatten(-1, (2, 64))
        step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / (2**bits - 1)
        assert ((back.unflatten(-1, (2, 64)) - groups).abs() <= 0.501 * step).all()
        levels = torch.arange(64.0).remainder(2**bits)
        levels[0], levels[-1] = 0, 2**bits - 1
        levels = levels.expand(1, 1, 4, 64)
        assert torch.allclose(layer._dequantize(layer._quantize(levels, 0)), levels, atol=1e-5)
        equal = torch.full((1, 1, 2, 64), 3.0)
        assert torch.allclose(layer._dequantize(layer._quantize(equal, 0)), equal)

    @pytest.mark.filterwarnings("ignore")
    def test_four_bits_are_those_of_quanto(self) -> None:
        pytest.importorskip("optimum.quanto")
        from transformers.cache_utils import QuantoQuantizedLayer

        numbers = torch.randn(2, 3, 7, 64)
        own, theirs = peers.PackedLayer(nbits=4), QuantoQuantizedLayer(nbits=4)
        found = own._dequantize(own._quantize(numbers, 0))
        assert torch.allclose(found, theirs._dequantize(theirs._quantize(numbers, 0)), atol=1e-5)

    @pytest.mark.parametrize(("bits", "bound"), [(8, 0.02), (4, 0.4)])
    def test_loss_and_bytes(self, bits: int, bound: float, model: Any, full: torch.Tensor) -> None:
        arm = Arm(label="q", make_cache=lambda c: peers.quantised_cache(c, bits))
        found = losses(model, arm)
        assert 0 < float((found - full).abs().max()) and abs(float(found.mean() - full.mean())) < bound
        model = model.to(torch.bfloat16)
        assert {len(row) for row in written(model, peers.quantised_cache(model.config, bits))} == {40}
        # a scale and a least number of 16 bits for each group of 64; the last token is not packed yet
        vectors = 2 * LAYERS
        expected = vectors * (511 * (64 * bits // 8 + 4) + 64 * 2)
        assert peers.measured_bytes(model, arm, 512) == expected


class TestQuantisedUnderAPlan:
    """transformers' quantised caches are read back once in a step for each leader, whoever reads it."""

    PLAN = SharingPlan([0, 0, 0, 3])

    @staticmethod
    def counted(model: Any, layer_class: Any, **options: Any) -> tuple[Any, list[int], list[int]]:
        """The cache after 8 tokens, numbers read back in each step, and how many read-back tensors were alive then."""
        calls: list[int] = []
        alive: list[int] = []
        made: list[weakref.ref[torch.Tensor]] = []
        real = layer_class._dequantize

        def counting(self: Any, packed: Any) -> torch.Tensor:
            if len(calls) % 2 == 0:  # the keys of a layer
                alive.append(sum(reference() is not None for reference in made))
            calls.append(1)
            found: torch.Tensor = real(self, packed)
            made.append(weakref.ref(found))
            return found

        with pytest.MonkeyPatch.context() as patch, share(model, TestQuantisedUnderAPlan.PLAN):
            patch.setattr(layer_class, "_dequantize", counting)
            output = model.generate(
                BLOCKS[:2, :20],
                attention_mask=torch.ones(2, 20, dtype=torch.long),
                max_new_tokens=8,
                do_sample=False,
                pad_token_id=2,
                eos_token_id=None,
                return_dict_in_generate=True,
                **options,
            )
        return output.past_key_values, calls, alive

    def check(self, found: tuple[Any, list[int], list[int]], layer_class: Any) -> None:
        cache, calls, alive = found
        assert [type(layer) for layer in cache.layers] == [layer_class, FollowerLayer, FollowerLayer, layer_class]
        steps, leaders = 7, 2
        assert len(calls) == steps * leaders * 2  # keys and values
        assert set(alive) == {0}

    def test_a_layer_in_plain_torch(self, model: Any) -> None:
        cache = peers.quantised_cache(model.config, 4, residual_length=4)
        found = self.counted(model, peers.PackedLayer, past_key_values=cache)
        self.check(found, peers.PackedLayer)
        half = sum(isinstance(layer, peers.PackedLayer) for layer in cache.layers)
        alone = peers.quantised_cache(model.config, 4, residual_length=4)
        written_in_full = self.counted_in_full(model, alone)
        assert peers.stored_bytes(cache) * LAYERS == peers.stored_bytes(written_in_full) * half

    @staticmethod
    def counted_in_full(model: Any, cache: Any) -> Any:
        ones = torch.ones(2, 20, dtype=torch.long)
        model.generate(
            BLOCKS[:2, :20],
            attention_mask=ones,
            past_key_values=cache,
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
        )
        return cache

    def test_its_own_by_name(self, model: Any) -> None:
        fp8 = getattr(transformers.cache_utils, "Fp8QuantizedLayer", None)
        if fp8 is None:
            pytest.skip("transformers from 5.2x on")
        options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
        self.check(self.counted(model, fp8, **options), fp8)


class TestMiniCache:
    def test_slerp_by_hand(self) -> None:
        angle = peers.TOWARDS_LATER * math.pi / 2
        merged = peers.merged_direction(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        assert torch.allclose(merged, torch.tensor([math.cos(angle), math.sin(angle)]))
        same = torch.tensor([[0.6, 0.8], [0.6, 0.8]])
        assert torch.allclose(peers.merged_direction(same), same[0])
        three = torch.eye(3)
        assert torch.allclose(peers.merged_direction(three), torch.full((3,), 3**-0.5))

    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_equal_directions_lose_nothing(self, size: int) -> None:
        group = peers.Group(size)
        pairs = []
        for tokens in (40, 3, 1):
            keys, values = torch.randn(2, 2, 3, tokens, 8).unbind(0)
            pairs.append((keys, values))
            for member in range(size):
                group.pending[member] = (keys * (member + 1), values)
            group.merge()
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*pairs, strict=True))
        for member in range(size):
            restored = group.restore(member)
            assert torch.allclose(restored[0], keys * (member + 1), atol=1e-5)
            assert torch.allclose(restored[1], values, atol=1e-5)

    def test_norms_stay(self) -> None:
        group = peers.Group(2)
        group.pending = {i: (torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)) for i in range(2)}
        expected = {i: group.pending[i][0].norm(dim=-1) for i in range(2)}
        group.merge()
        for i in range(2):
            assert torch.allclose(group.restore(i)[0].norm(dim=-1), expected[i], atol=1e-5)

    def test_unlike_tokens_are_kept(self) -> None:
        group = peers.Group(2)
        keys = torch.nn.functional.normalize(torch.ones(1, 1, 40, 8), dim=-1)
        other = keys.clone()
        other[0, 0, 7] *= -1
        group.pending = {0: (keys, keys), 1: (other, keys)}
        group.merge()
        assert 7 in group.places[0].tolist() and group.places.shape == (1, 2)
        assert torch.allclose(group.restore(1)[0], other, atol=1e-5)

    @pytest.mark.parametrize("piece", [1, 3, PIECE, 200])
    def test_as_many_are_kept_however_the_tokens_come(self, piece: int) -> None:
        group = peers.Group(2)
        tokens = torch.randn(2, 2, 2, 1, 200, 8)
        for part in tokens.split(piece, dim=-2):
            group.pending = {i: (part[i, 0], part[i, 1]) for i in range(2)}
            group.merge()
        assert group.places.shape == (2, 200 * peers.KEPT)
        for i in range(2):
            index = group.places[:, None, :, None].expand(-1, 1, -1, 8)
            assert torch.equal(group.restore(i)[0].gather(2, index), tokens[i, 0].gather(2, index))

    def test_groups_of_one_change_nothing(self, model: Any, full: torch.Tensor, usual: list[list[int]]) -> None:
        arm = Arm(label="m", make_cache=lambda c: peers.merged_cache(c, [1] * LAYERS))
        assert torch.allclose(losses(model, arm), full, atol=1e-4)
        assert written(model, peers.merged_cache(model.config, [1] * LAYERS)) == usual

    def test_groups_are_even(self) -> None:
        assert peers.group_sizes(30, 15) == [2] * 15
        assert peers.group_sizes(30, 8) == [3, 3, 4, 4, 4, 4, 4, 4]
        assert peers.group_sizes(4, 4) == [1] * 4

    def test_bytes(self, model: Any) -> None:
        whole = peers.measured_bytes(model, Arm(label="full"), 200)
        for sizes in ([2, 2], [4]):
            arm = Arm(label="m", make_cache=lambda c, s=sizes: peers.merged_cache(c, s))
            # one direction for the group, a norm for each vector, the kept share as it was, and its places
            expected = whole * (len(sizes) / LAYERS + 1 / 64 + peers.KEPT) + len(sizes) * 8 * 200 * peers.KEPT
            assert peers.measured_bytes(model, arm, 200) == pytest.approx(expected)
            assert {len(row) for row in written(model, peers.merged_cache(model.config, sizes))} == {40}

    def test_refuses_groups_of_other_layers(self, model: Any) -> None:
        with pytest.raises(DepthKVError, match="groups of 4 layers in all, got 3"):
            peers.merged_cache(model.config, [2, 1])


class TestKVSharer:
    def test_the_most_unlike_pair_is_first(self, model: Any) -> None:
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight.mul_(30)  # far from all others
        plan, _ = peers.kvsharer_plan(model, BLOCKS, 1)
        # the last layer of a pair reads the first one: layer 1 is the far one of every pair
        assert plan.followers[0] == 1 or plan.kv_source_layers[plan.followers[0]] == 1

    def test_against_a_slow_search(self, model: Any) -> None:
        """The rule once more, step by step, with the whole model's hidden states."""
        with torch.no_grad():
            cache = model(BLOCKS, use_cache=True).past_key_values
            means = [torch.cat([part.mean(0).flatten() for part in (lay.keys, lay.values)]) for lay in cache.layers]
            expected = model(BLOCKS, output_hidden_states=True, use_cache=False).hidden_states[-1]
            distance = {
                (i, j): float(torch.dist(means[i], means[j])) for i, j in itertools.combinations(range(LAYERS), 2)
            }
            reads: dict[int, int] = {}
            for i, j in sorted(distance, key=lambda pair: -distance[pair]):
                if j in reads or len(reads) == 2:
                    continue
                trial = {**reads, j: i}
                sources = list(range(LAYERS))
                for layer in range(LAYERS):
                    while sources[layer] in trial:
                        sources[layer] = trial[sources[layer]]
                with share(model, SharingPlan(sources)):
                    found = model(BLOCKS, output_hidden_states=True, use_cache=False).hidden_states[-1]
                rows = zip(found.flatten(1), expected.flatten(1), strict=True)
                alike = [torch.cosine_similarity(a, b, dim=0) for a, b in rows]
                if float(torch.stack(alike).mean()) > peers.THRESHOLD:
                    reads, kept = trial, sources
        assert len(reads) == 2
        assert peers.kvsharer_plan(model, BLOCKS, 2) == (SharingPlan(kept), True)

    def test_likeness_is_that_of_whole_blocks(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peers, "THRESHOLD", -1.0)
        first, _ = peers.kvsharer_plan(model, BLOCKS, 1)
        with torch.no_grad():
            expected = model(BLOCKS, output_hidden_states=True).hidden_states[-1].flatten(1)
            with share(model, first):
                found = model(BLOCKS, output_hidden_states=True).hidden_states[-1].flatten(1)
        alike = float(torch.cosine_similarity(found, expected, dim=1).mean())
        monkeypatch.setattr(peers, "THRESHOLD", alike - 1e-4)
        assert peers.kvsharer_plan(model, BLOCKS, 1) == (first, True)
        monkeypatch.setattr(peers, "THRESHOLD", alike + 1e-4)
        assert peers.kvsharer_plan(model, BLOCKS, 1) != (first, True)

    @pytest.mark.parametrize("num_shared", [0, 1, 2, 3])
    def test_shares_as_many_as_asked(self, model: Any, num_shared: int) -> None:
        plan, _ = peers.kvsharer_plan(model, BLOCKS, num_shared)
        assert len(plan.followers) == num_shared
        with share(model, plan):
            model(BLOCKS)

    def test_says_when_the_threshold_is_given_up(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peers, "THRESHOLD", 0.9999999)
        assert peers.kvsharer_plan(model, BLOCKS, 3)[1] is False
        monkeypatch.setattr(peers, "THRESHOLD", -1.0)
        assert peers.kvsharer_plan(model, BLOCKS, 3)[1] is True

    def test_refuses_to_share_the_first_layer(self, model: Any) -> None:
        with pytest.raises(DepthKVError, match="at most 3 layers to share, got 4"):
            peers.kvsharer_plan(model, BLOCKS, 4)


class TestShallower:
    def test_influence(self, model: Any) -> None:
        with torch.no_grad():
            for name in ("self_attn.o_proj", "mlp.down_proj"):  # layer 2 then adds nothing to its input
                model.model.layers[2].get_submodule(name).weight.zero_()
        influence = peers.block_influence(model, BLOCKS)
        assert influence[2] == pytest.approx(0, abs=1e-6) and min(influence[:2]) > 1e-3
        full = losses(model, Arm(label="full"))
        arm = peers.shallower(model, BLOCKS, LAYERS - 1, "s")
        assert torch.allclose(losses(model, arm), full, atol=1e-5)
        assert peers.measured_bytes(model, arm, 48) == 0.75 * peers.measured_bytes(model, Arm(label="full"), 48)

    def test_is_a_model_of_the_other_layers(self, model: Any, usual: list[list[int]]) -> None:
        smaller = tiny_model(**SIZES, num_hidden_layers=2)
        weights = model.state_dict()
        smaller.load_state_dict(
            {name: weights[name.replace("layers.1.", "layers.3.")] for name in smaller.state_dict()}
        )
        with peers.without_layers(model, [1, 2]):
            assert torch.allclose(losses(model, Arm(label="s")), losses(smaller, Arm(label="s")), atol=1e-5)
            assert written(model, None) == written(smaller, None)
        assert written(model, None) == usual

    def test_restores(self, model: Any, full: torch.Tensor) -> None:
        arm = peers.shallower(model, BLOCKS, 2, "s")
        assert not torch.allclose(losses(model, arm), full, atol=1e-2)
        assert torch.equal(losses(model, Arm(label="full")), full)
        assert not any("forward" in vars(layer) for layer in model.model.layers)

        def hooked(*args: Any, **kwargs: Any) -> Any:
            return type(model.model.layers[3]).forward(model.model.layers[3], *args, **kwargs)

        model.model.layers[3].forward = hooked
        with pytest.raises(RuntimeError), peers.without_layers(model, [2, 3]):
            raise RuntimeError
        assert model.model.layers[3].forward is hooked and "forward" not in vars(model.model.layers[2])


def test_all_arms_run() -> None:
    model = tiny_model(**SIZES, num_hidden_layers=12).to(torch.bfloat16)
    found = peers.equal_bytes_arms(model, BLOCKS)
    whole = peers.measured_bytes(model, Arm(label="full", plan=SharingPlan.full(12)), 512)
    for fraction, arms in found.items():
        assert len({arm.label for arm in arms}) == len(arms) == 5
        for arm in arms:
            assert torch.isfinite(losses(model, arm)).all()
            # with the scales of their groups, codes of 4 bits take 4.5
            bound = 0.14 if "4 bits" in arm.label else 0.1
            assert peers.measured_bytes(model, arm, 512) / whole == pytest.approx(fraction, rel=bound), arm.label


def test_a_window_for_one_context() -> None:
    model = tiny_model(**SIZES)
    arm = next(arm for arm in peers.equal_bytes_arms(model, BLOCKS, tokens=64)[0.25] if "window" in arm.label)
    assert arm.make_cache is not None
    assert {layer.window for layer in arm.make_cache(model.config).layers} == {16}
