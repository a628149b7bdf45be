"""Each peer does what its paper says where that can be worked out by hand, and nothing where nothing is to be done."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from depthkv import SharingPlan, share
from depthkv.evaluate.arms import Arm
from depthkv.evaluate.text import read_text
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


def written(model: Any, cache: Any) -> list[int]:
    row = model.generate(BLOCKS[:1, :20], past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=2)
    return row[0, 20:].tolist()


class TestWindow:
    def test_a_long_window_changes_nothing(self, model: Any, full: torch.Tensor) -> None:
        arm = Arm(label="w", make_cache=lambda c: peers.window_cache(c, 48))
        assert torch.allclose(losses(model, arm), full, atol=1e-4)
        assert written(model, peers.window_cache(model.config, 99)) == written(model, DynamicCache(config=model.config))

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

    def test_bytes(self, model: Any) -> None:
        arm = Arm(label="w", make_cache=lambda c: peers.window_cache(c, 0.5))
        assert peers.measured_bytes(model, arm, 48) == peers.measured_bytes(model, Arm(label="full"), 48) / 2


class TestQuantised:
    def test_numbers_come_back(self) -> None:
        layer = peers.Int8Layer(nbits=8, q_group_size=64)
        numbers = torch.randn(2, 3, 5, 64)
        back = layer._dequantize(layer._quantize(numbers, 0))
        span = numbers.amax(-1, keepdim=True) - numbers.amin(-1, keepdim=True)
        assert ((back - numbers).abs() <= 0.51 * span / 255 + 1e-6).all()
        even = torch.arange(256.0).repeat(4)[:256].view(1, 1, 4, 64)  # each group holds 64 whole numbers in a row
        assert torch.allclose(layer._dequantize(layer._quantize(even, 0)), even, atol=0.2)

    @pytest.mark.parametrize(("bits", "bound"), [(8, 0.02), (4, 0.4)])
    def test_loss_and_bytes(self, bits: int, bound: float, model: Any, full: torch.Tensor) -> None:
        if bits == 4:
            pytest.importorskip("optimum.quanto")
        arm = Arm(label="q", make_cache=lambda c: peers.quantised_cache(c, bits))
        found = losses(model, arm)
        assert 0 < float((found - full).abs().max()) and abs(float(found.mean() - full.mean())) < bound
        model = model.to(torch.bfloat16)
        share_of = peers.measured_bytes(model, arm, 512) / peers.measured_bytes(model, Arm(label="full"), 512)
        # a scale and a zero of 16 bits for each group of 64
        assert share_of == pytest.approx((bits + 0.5) / 16, rel=0.1)
        assert len(written(model, peers.quantised_cache(model.config, bits))) > 0


class TestMiniCache:
    def test_slerp_by_hand(self) -> None:
        units = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        assert torch.allclose(peers.merged_direction(units), torch.full((2,), 0.5**0.5))
        same = torch.tensor([[0.6, 0.8], [0.6, 0.8]])
        assert torch.allclose(peers.merged_direction(same), same[0])

    @pytest.mark.parametrize("size", [2, 4])
    def test_equal_layers_lose_nothing(self, size: int) -> None:
        group = peers.Group(size)
        for tokens in (40, 3):
            keys, values = torch.randn(2, 2, 3, tokens, 8).unbind(0)
            for member in range(size):
                group.pending[member] = (keys * (member + 1), values)
            group.merge()
        for member in range(size):
            restored = group.restore(member)
            assert torch.allclose(restored[0][..., -3:, :], keys * (member + 1), atol=1e-5)
            assert torch.allclose(restored[1][..., -3:, :], values, atol=1e-5)

    def test_unlike_tokens_are_kept(self) -> None:
        group = peers.Group(2)
        keys = torch.nn.functional.normalize(torch.ones(1, 1, 40, 8), dim=-1)
        other = keys.clone()
        other[0, 0, 7] *= -1
        group.pending = {0: (keys, keys), 1: (other, keys)}
        group.merge()
        assert 7 in group.places[0].tolist() and group.places.shape == (1, 2)
        assert torch.allclose(group.restore(1)[0], other, atol=1e-5)

    def test_groups_of_one_change_nothing(self, model: Any, full: torch.Tensor) -> None:
        arm = Arm(label="m", make_cache=lambda c: peers.merged_cache(c, 1))
        assert torch.allclose(losses(model, arm), full, atol=1e-4)

    def test_bytes(self, model: Any) -> None:
        whole = peers.measured_bytes(model, Arm(label="full"), 200)
        for size in (2, 4):
            arm = Arm(label="m", make_cache=lambda c, g=size: peers.merged_cache(c, g))
            # one direction for the group, a norm for each vector, the kept share as it was, its places
            expected = 1 / size + 1 / 64 + peers.KEPT
            assert peers.measured_bytes(model, arm, 200) / whole == pytest.approx(expected, rel=0.05)
        assert len(written(model, peers.merged_cache(model.config, 2))) > 0


class TestKVSharer:
    def test_the_most_unlike_pair_is_first(self, model: Any) -> None:
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight.mul_(30)  # far from all others
        plan, _ = peers.kvsharer_plan(model, BLOCKS, 1)
        # the last layer of a pair reads the first one: layer 1 is the far one of every pair
        assert plan.followers[0] == 1 or plan.kv_source_layers[plan.followers[0]] == 1

    @pytest.mark.parametrize("num_shared", [0, 1, 2, 3])
    def test_shares_as_many_as_asked(self, model: Any, num_shared: int) -> None:
        plan, _ = peers.kvsharer_plan(model, BLOCKS, num_shared)
        assert len(plan.followers) == num_shared
        with share(model, plan):
            model(BLOCKS)

    def test_says_when_the_threshold_is_given_up(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peers, "THRESHOLD", 0.9999999)
        assert peers.kvsharer_plan(model, BLOCKS, 3)[1] is False
        monkeypatch.setattr(peers, "THRESHOLD", 1e-9 - 1)
        assert peers.kvsharer_plan(model, BLOCKS, 0)[1] is True


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

    def test_restores(self, model: Any, full: torch.Tensor) -> None:
        arm = peers.shallower(model, BLOCKS, 2, "s")
        assert not torch.allclose(losses(model, arm), full, atol=1e-2)
        assert torch.equal(losses(model, Arm(label="full")), full)


def test_all_arms_run(model: Any) -> None:
    pytest.importorskip("optimum.quanto")
    model = model.to(torch.bfloat16)
    found = peers.equal_bytes_arms(model, BLOCKS)
    whole = peers.measured_bytes(model, Arm(label="full", plan=SharingPlan.full(LAYERS)), 256)
    for fraction, arms in found.items():
        assert len({arm.label for arm in arms}) == len(arms) == 5
        for arm in arms:
            assert torch.isfinite(losses(model, arm)).all()
            assert peers.measured_bytes(model, arm, 256) / whole == pytest.approx(fraction, rel=0.35), arm.label
