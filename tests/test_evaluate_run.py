"""Arms are read as the plain computation says, compared with the full cache item by item, and twice the same."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import DynamicCache, Gemma2Config, PreTrainedModel

from depthkv import SharingPlan, share
from depthkv.cli import main
from depthkv.data import Document, named_blocks, token_blocks
from depthkv.errors import DataError, DepthKVError
from depthkv.evaluate.arms import Arm, plan_arms
from depthkv.evaluate.generation import write_lines, write_tokens
from depthkv.evaluate.health import health
from depthkv.evaluate.intervals import score
from depthkv.evaluate.run import EvaluateConfig, Evaluation
from depthkv.evaluate.text import read_text
from test_evaluate import capped_model
from tiny import LAYERS, WORDS, tiny_checkpoint, tiny_model, tiny_text, tiny_tokenizer

BLOCKS = torch.randint(3, 64, (5, 40), generator=torch.Generator().manual_seed(1))
FULL, HALF = SharingPlan.full(LAYERS), SharingPlan.every(2, LAYERS)
ARMS = plan_arms([FULL, HALF])


def documents(count: int = 6, words: int = 120) -> list[Document]:
    return [
        Document(f"text {i}", " ".join(WORDS[(3 * i + j * (1 + i % 3)) % len(WORDS)] for j in range(words)))
        for i in range(count)
    ]


class TestReadText:
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_equals_the_plain_computation(self, batch_size: int) -> None:
        model = tiny_model()
        full, half = read_text(model, ARMS, BLOCKS, batch_size=batch_size, agreement=True)
        logits = []
        for plan in (FULL, HALF):
            with torch.no_grad(), share(model, plan):
                logits.append(model(BLOCKS).logits[:, :-1])
        for found, own in zip((full, half), logits, strict=True):
            expected = cross_entropy(own.transpose(1, 2), BLOCKS[:, 1:], reduction="none")
            assert torch.allclose(found.losses, expected, atol=1e-5)
        divergence = kl_div(logits[1].log_softmax(-1), logits[0].log_softmax(-1), log_target=True, reduction="none")
        assert half.kl is not None and half.top1 is not None and full.kl is not None and full.top1 is not None
        assert torch.allclose(half.kl, divergence.sum(-1), atol=1e-5) and float(half.kl.mean()) > 0.01
        assert torch.equal(half.top1, logits[0].argmax(-1) == logits[1].argmax(-1)) and not half.top1.all()
        assert full.top1.all() and float(full.kl.max()) < 1e-5

    def test_capped_logits(self) -> None:
        model = capped_model(Gemma2Config, final_logit_softcapping=1.5, query_pre_attn_scalar=8)
        plan = SharingPlan([0, 1, 0, 1])  # sliding and full attention take turns
        _, half = read_text(model, plan_arms([FULL, plan]), BLOCKS, agreement=True)
        with torch.no_grad(), share(model, plan):
            logits = model(BLOCKS).logits[:, :-1]
        expected = cross_entropy(logits.transpose(1, 2), BLOCKS[:, 1:], reduction="none")
        assert torch.allclose(half.losses, expected, atol=1e-5)

    def test_through_a_cache_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        widths: list[int] = []
        model = tiny_model()
        model.model.register_forward_pre_hook(  # type: ignore[union-attr, operator]
            lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        cached = Arm(label="cached", plan=HALF, make_cache=lambda config: DynamicCache(config=config))
        half, same = read_text(model, [ARMS[1], cached], BLOCKS)
        assert torch.allclose(half.losses, same.losses, atol=1e-5)
        assert {16, 7} <= set(widths)  # 39 tokens: 16, 16 and 7

    def test_patches_hold_and_go(self) -> None:
        model = tiny_model().train()

        @contextmanager
        def doubled(inner: nn.Module) -> Any:
            weight: Any = inner.get_parameter("model.norm.weight")
            with torch.no_grad():
                weight.mul_(2)
                yield
                weight.div_(2)

        before, changed, after = read_text(
            model, [Arm(label="a"), Arm(label="b", patch=doubled), Arm(label="c")], BLOCKS
        )
        assert torch.equal(before.losses, after.losses) and not torch.equal(before.losses, changed.losses)
        assert model.training

    def test_progress(self) -> None:
        done: list[int] = []
        read_text(tiny_model(), ARMS, BLOCKS, batch_size=2, progress=done.append)
        assert done == [2, 2, 2, 2, 1, 1]


def test_plan_arms_have_labels_of_their_own() -> None:
    other = SharingPlan.from_leaders([0, 1], LAYERS)
    assert [arm.label for arm in plan_arms([FULL, HALF, other, HALF])] == [
        "full cache",
        "50% of layers (1)",
        "50% of layers (2)",
    ]


class TestScore:
    def test_means_and_differences(self) -> None:
        found = score([1.0, 2.0, 6.0], ["a", "a", "b"], [1.0, 1.0, 1.0])
        assert (found.value, found.difference, found.count) == (3.0, 2.0, 3)

    def test_the_interval_is_the_bootstraps(self) -> None:
        """Against a closed form: the mean of n independent values has a standard error of their deviation / sqrt n."""
        values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
        found = score(values.tolist(), list(range(400)))
        error = float(values.std()) / 20
        assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.15 * error)
        assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.15 * error)

    def test_parts_of_a_document_count_as_one(self) -> None:
        values = [0.0, 1.0, 2.0, 3.0] * 8
        names = [i % 4 for i in range(32)]
        apart = score(values, list(range(32)))
        together = score(values, names)
        assert together.high - together.low > 2 * (apart.high - apart.low)

    def test_pairing_narrows_the_difference(self) -> None:
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(50, generator=generator)
        worse = base + 0.1 + 0.01 * torch.randn(50, generator=generator)
        found = score(worse.tolist(), list(range(50)), base.tolist())
        assert found.difference is not None and found.difference_low is not None and found.difference_high is not None
        assert 0.09 < found.difference_low < found.difference < found.difference_high < 0.11
        assert found.high - found.low > 0.3

    def test_one_document_has_no_interval(self) -> None:
        found = score([1.0, 2.0], ["a", "a"])
        assert found.low != found.low and found.high != found.high

    def test_lengths_must_agree(self) -> None:
        with pytest.raises(DepthKVError, match="expected as many documents as values, got 1 and 2"):
            score([1.0, 2.0], ["a"])
        with pytest.raises(DepthKVError, match="at least one value"):
            score([], [])


class TestHealth:
    def test_prose_and_loops(self) -> None:
        prose = health(list(range(20)), list(range(10)) + [0] * 10, 20)
        assert (prose.repetition, prose.length, prose.ended, prose.same_prefix) == (0, 20, 0, 10)
        loop = health([1, 2] * 10, [], 30)
        assert loop.repetition == pytest.approx(100 * (1 - 2 / 17)) and loop.ended == 100 and loop.same_prefix == 0
        assert health([], [1], 4).repetition == 0


class TestWriting:
    def test_caches_get_prompts_of_equal_length(self) -> None:
        model, tokenizer = tiny_model(), tiny_tokenizer()
        prompts = [[3, 4, 5], [9, 8], [6, 7, 8], [5, 5, 5, 5]]
        made: list[int] = []

        def make_cache(config: Any) -> DynamicCache:
            made.append(1)
            return DynamicCache(config=config)

        plain = write_tokens(model, tokenizer, prompts, max_new_tokens=5)
        assert write_tokens(model, tokenizer, prompts, max_new_tokens=5, make_cache=make_cache) == plain
        assert len(made) == 3

    def test_lines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer = tiny_tokenizer()
        monkeypatch.setattr(
            tokenizer, "decode", lambda tokens, **options: " one\ntwo" if len(tokens) > 1 else "x", raising=False
        )
        assert write_lines(tiny_model(), tokenizer, [[3, 4]], max_new_tokens=3) == ["one"]

    def test_unusable_prompts(self) -> None:
        with pytest.raises(DataError, match="expected prompts of at least one token, got an empty one"):
            write_tokens(tiny_model(), tiny_tokenizer(), [[3], []], max_new_tokens=3)
        with pytest.raises(DepthKVError, match="of at least 1, got 8 and 0"):
            write_tokens(tiny_model(), tiny_tokenizer(), [[3]], max_new_tokens=0)


def evaluation(**changes: Any) -> Evaluation:
    settings: dict[str, Any] = dict(
        suites=("perplexity", "agreement", "generation"), block_size=40, blocks=8, prompts=3, prompt_tokens=8,
        new_tokens=6, samples=1,
    )  # fmt: skip
    config = EvaluateConfig(**{**settings, **changes})
    return Evaluation(tokenizer=tiny_tokenizer(), texts={"a": documents(), "b": documents(3)[1:]}, config=config)


class TestEvaluation:
    def test_blocks_know_their_documents(self) -> None:
        blocks, names = named_blocks(documents(3), tiny_tokenizer(), 40)
        assert torch.equal(blocks, token_blocks(documents(3), tiny_tokenizer(), 40))
        # 121 tokens each with the end of text: blocks start at 0, 40, 80, 120 | 160, 200, 240 | 280, 320
        assert names == ["text 0"] * 4 + ["text 1"] * 3 + ["text 2"] * 2

    def test_rows(self) -> None:
        model, work = tiny_model(), evaluation()
        done: list[int] = []
        full, half = work.run(model, ARMS, done.append)
        assert sum(done) == work.units(2)
        assert json.loads(json.dumps(half, allow_nan=False)) == half
        assert (full["label"], full["retention"], half["leaders"]) == ("full cache", 1.0, [0, 2])
        assert full["kv_bytes_per_token"] == 2 * half["kv_bytes_per_token"]
        assert half["loss_score"]["difference"] == pytest.approx(half["loss"] - full["loss"])
        assert full["loss_score"]["difference"] is None
        first, second = half["texts"]
        assert (first["data"], first["documents"], second["documents"]) == ("a", 5, 2)
        assert half["loss"] == pytest.approx((8 * first["loss"]["value"] + 6 * second["loss"]["value"]) / 14)
        (bucket,) = first["positions"]
        assert (bucket["first"], bucket["last"], bucket["loss"]["value"]) == (1, 39, first["loss"]["value"])
        assert full["agreement"]["top1"]["value"] == 100 and full["agreement"]["kl"]["value"] < 1e-5
        assert half["agreement"]["top1"]["value"] < 100 and half["agreement"]["kl"]["value"] > 0.01
        assert full["generation"]["same_prefix"]["value"] == full["generation"]["length"]["value"]
        assert half["generation"]["same_prefix"]["value"] < 6
        assert len(half["generation"]["samples"]) == 1 and half["generation"]["samples"][0]["prompt"].startswith("w")

    def test_positions(self) -> None:
        found = evaluation(suites=("perplexity",), block_size=200, blocks=2).run(tiny_model(), ARMS)[1]["texts"][0]
        assert [(part["first"], part["last"]) for part in found["positions"]] == [(1, 63), (64, 127), (128, 199)]
        mean = sum(p["loss"]["value"] * (p["last"] - p["first"] + 1) for p in found["positions"]) / 199
        assert mean == pytest.approx(found["loss"]["value"])

    def test_twice_the_same(self) -> None:
        assert evaluation().run(tiny_model(), ARMS) == evaluation().run(tiny_model(), ARMS)

    def test_settings_are_checked(self) -> None:
        with pytest.raises(DepthKVError, match=r"expected a suite among perplexity, .* got 'speed'"):
            EvaluateConfig(suites=("speed",))
        with pytest.raises(DepthKVError, match="expected blocks of at least 1, got 0"):
            EvaluateConfig(blocks=0)
        with pytest.raises(DataError, match="expected questions for the suite qa"):
            evaluation(suites=("qa",))
        with pytest.raises(DepthKVError, match="each with a label of its own"):
            evaluation().run(tiny_model(), [ARMS[0], ARMS[0]])

    def test_a_loss_that_is_not_finite(self) -> None:
        model: PreTrainedModel = tiny_model()
        with torch.no_grad():
            model.get_parameter("model.norm.weight")[0] = float("nan")
        with pytest.raises(DepthKVError, match="expected a finite loss of full cache, got nan"):
            evaluation().run(model, ARMS)


SCORE = {"value", "low", "high", "difference", "difference_low", "difference_high", "count"}


class TestCommand:
    def run(self, *arguments: object) -> int:
        return main([str(argument) for argument in arguments])

    def test_the_file_has_the_documented_form(self, tmp_path: Path) -> None:
        model, text = tiny_checkpoint(tmp_path / "m"), tiny_text(tmp_path / "t.txt")
        options = ("--block-size", 32, "--blocks", 3, "--prompts", 2, "--new-tokens", 4, "--json")
        suites = ("--suite", "perplexity", "--suite", "agreement", "--suite", "generation")
        command = ("evaluate", model, "--data", text, "--retention", ".5", *suites, *options)
        assert self.run(*command, tmp_path / "o.json") == 0
        found = json.loads((tmp_path / "o.json").read_text())
        assert (found["format"], found["version"], found["num_layers"]) == ("depthkv-evaluation", 1, LAYERS)
        assert found["suites"] == ["perplexity", "agreement", "generation"] and found["data"] == [str(text)]
        assert found["command"].startswith(f"depthkv evaluate {model} --data {text} --retention .5")
        assert set(found["environment"]) == {"depthkv", "python", "torch", "transformers", "device", "threads"}
        # the full cache was not asked for, and is what the differences are from
        (row,) = found["rows"]
        assert row["retention"] == 0.5 and found["full_cache"]["retention"] == 1
        assert row["loss_score"]["difference"] == pytest.approx(row["loss"] - found["full_cache"]["loss"])
        scores = [row["loss_score"], row["agreement"]["kl"], row["generation"]["length"]]
        scores += [row["texts"][0]["loss"], row["texts"][0]["positions"][0]["loss"]]
        assert all(set(part) == SCORE for part in scores)
        assert self.run(*command, tmp_path / "p.json") == 0
        again = json.loads((tmp_path / "p.json").read_text())
        assert again["rows"] == found["rows"]

    def test_equal_plans_are_one_row(self, tmp_path: Path) -> None:
        model, text = tiny_checkpoint(tmp_path / "m"), tiny_text(tmp_path / "t.txt")
        options = ("--block-size", 32, "--blocks", 2, "--json", tmp_path / "o.json")
        assert self.run("evaluate", model, "--data", text, "--retention", ".5", ".45", ".25", *options) == 0
        rows = json.loads((tmp_path / "o.json").read_text())["rows"]
        assert [row["retention"] for row in rows] == [0.5, 0.25]

    def test_documents_of_the_same_name_are_two(self, tmp_path: Path) -> None:
        model = tiny_checkpoint(tmp_path / "m")
        for i in (0, 1):
            (tmp_path / str(i)).mkdir()
        texts = [part for i in (0, 1) for part in ("--data", tiny_text(tmp_path / str(i) / "t.txt", seed=i))]
        options = ("--suite", "generation", "--block-size", 64, "--blocks", 4, "--new-tokens", 4, "--prompts", 2)
        assert self.run("evaluate", model, *texts, *options, "--all-text", "--json", tmp_path / "o.json") == 0
        row = json.loads((tmp_path / "o.json").read_text())["rows"][0]
        assert row["generation"]["length"]["low"] is not None

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--suite", "speed"), "expected a suite among perplexity"),
            (("--suite", "qa"), "--questions: expected a file of questions"),
            (("--questions", "q.json"), "--questions: expected the suite qa or retrieval with it, got perplexity"),
            (("--suite", "qa", "--questions", "q.json"), "q.json"),
            (("--suite", "retrieval", "--length", 99999), "--length"),
            (("--block-size", 1), "block size of 2"),
            (("--suite", "retrieval", "--length", 20, "--block-size", 32), "depthkv: expected a length of at least"),
            (("--seed", 2**32), "expected a whole number from 0 to 4294967295"),
        ],
    )
    def test_bad_input(
        self, options: tuple[object, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model, text = tiny_checkpoint(tmp_path / "m"), tiny_text(tmp_path / "t.txt")
        capsys.readouterr()  # saving shows a progress bar
        assert self.run("evaluate", model, "--data", text, *options, "--json", tmp_path / "o.json") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (tmp_path / "o.json").exists()
