"""Questions are read, split and encoded as documented; the scores are SQuAD's; batches change no answer."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from depthkv import SharingPlan, share
from depthkv.adapt.pretrain import train_tokenizer
from depthkv.data import Document
from depthkv.errors import DataError, DepthKVError, PlanError
from depthkv.evaluate.qa import QAScores, evaluate_qa, exact_match, f1, normalize_answer, rouge_l
from depthkv.qa import Question, collate, encode, prompt, prompt_tokens, read_squad, split_articles
from tiny import LAYERS, tiny_model, tiny_tokenizer

CONTEXT = "The tower was built by Ada Brown in 1889, and the bridge by Max Gray in 1901."
PLANS = [SharingPlan.full(LAYERS), SharingPlan.every(2, LAYERS), SharingPlan.every(LAYERS, LAYERS)]


def question(**changes: Any) -> Question:
    values = dict(context=CONTEXT, question="Who built the tower?", answers=("Ada Brown", "Brown"), article="T", id="1")
    return Question(**{**values, **changes})  # type: ignore[arg-type]


def word_questions(count: int = 7) -> list[Question]:
    """For `tiny_tokenizer`, of very different lengths."""
    return [
        question(context=" ".join(f"w{(i + j) % 61}" for j in range(3 + 5 * i)), question=f"w{i}", answers=("w5 w7",))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, so that text survives exactly."""
    return train_tokenizer([Document("text", prompt(question()) * 4)], 320)


def squad() -> dict[str, Any]:
    def entry(name: str, *answers: str) -> dict[str, Any]:
        found = [{"text": text, "answer_start": CONTEXT.find(text)} for text in answers]
        return {"id": name, "question": f" {name}? ", "answers": found, "is_impossible": not answers}

    towers = {"context": CONTEXT, "qas": [entry("a", "Ada Brown", "Brown"), entry("b"), entry("c", "1889")]}
    bridges = {"context": CONTEXT, "qas": [entry("d", "1901")]}
    data = [{"title": "Towers", "paragraphs": [towers]}, {"title": "Bridges", "paragraphs": [bridges]}]
    return {"version": "v2.0", "canary": "an extra key", "data": data}


class TestReadSquad:
    def test_reads_what_has_an_answer(self, tmp_path: Path) -> None:
        path = tmp_path / "squad.json"
        path.write_text(json.dumps(squad()), encoding="utf-8")
        questions = read_squad(path)
        assert [q.id for q in questions] == ["a", "c", "d"]
        assert questions[0] == question(question="a?", article="Towers", id="a")
        assert questions[2].article == "Bridges"

    @pytest.mark.parametrize(
        ("damage", "wanted"),
        [
            (lambda data: data.pop("data"), 'a list "data" in the file, got none'),
            (lambda data: data["data"].append("x"), r"data\[2\] as a JSON object, got str"),
            (lambda data: data["data"][0].update(title=3), r'a string "title" in data\[0\], got int'),
            (lambda data: data["data"][1]["paragraphs"][0].pop("qas"), r"data\[1\].paragraphs\[0\], got none"),
            (
                lambda data: data["data"][0]["paragraphs"][0]["qas"][2].update(answers=["1889"]),
                r"qas\[2\].answers\[0\] as a JSON object",
            ),
            (lambda data: data.update(data=[]), "at least one question"),
        ],
    )
    def test_another_structure(self, tmp_path: Path, damage: Callable[[Any], object], wanted: str) -> None:
        data = squad()
        damage(data)
        path = tmp_path / "damaged.json"
        path.write_text(json.dumps(data), encoding="utf-8")
        with pytest.raises(DataError, match=rf"damaged\.json: expected .*{wanted}"):
            read_squad(path)

    @pytest.mark.parametrize("content", [b"[1, 2]", b"{", b"\xff\xfe\x00", b"[" * 100_000])
    def test_no_json_or_no_object(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "damaged.json"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"damaged\.json: expected "):
            read_squad(path)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"missing\.json"):
            read_squad(tmp_path / "missing.json")


class TestSplitArticles:
    questions = tuple(question(article=f"article {i % 8}", id=str(i)) for i in range(40))

    def test_no_article_is_in_both(self) -> None:
        train, held_out = split_articles(self.questions)
        assert len({q.article for q in held_out}) == 2
        assert not {q.article for q in train} & {q.article for q in held_out}
        assert sorted(int(q.id) for q in train + held_out) == list(range(40))
        assert (train, held_out) == split_articles(self.questions)
        assert any(split_articles(self.questions, seed=seed)[1] != held_out for seed in range(1, 4))

    @pytest.mark.parametrize("fraction", [0.001, 0.999])
    def test_neither_is_empty(self, fraction: float) -> None:
        assert all(split_articles(self.questions, fraction))

    def test_impossible(self) -> None:
        with pytest.raises(DataError, match="two articles"):
            split_articles([question()])
        with pytest.raises(DataError, match="fraction"):
            split_articles(self.questions, 1.0)


class TestEncode:
    def test_loss_is_on_the_answer_only(self, tokenizer: PreTrainedTokenizerFast) -> None:
        for example in encode([question()] * 8, tokenizer):
            tokens, labels = example["input_ids"], example["labels"]
            predicted = labels != -100
            assert tokenizer.decode(tokens[predicted]) == " Ada Brown" + tokenizer.eos_token
            assert torch.equal(labels[predicted], tokens[predicted])
            before = tokenizer.decode(tokens[~predicted])
            assert before in (prompt(question()), prompt(question(), context_first=False))
            # one block at the end
            assert not predicted[: -int(predicted.sum())].any()

    def test_both_orders_occur_evenly(self) -> None:
        tokenizer = tiny_tokenizer()
        texts = [question(context="w1", question="w2")] * 1000

        def orders(seed: int) -> list[bool]:
            # "Context:" is unknown to this tokenizer, so w1 comes second where the context is first
            return [example["input_ids"].tolist().index(4) == 1 for example in encode(texts, tokenizer, seed=seed)]

        first = orders(0)
        assert 440 < sum(first) < 560
        assert first == orders(0) != orders(1)

    @pytest.mark.parametrize("at", [0, 1, 300, 598, 599])
    def test_long_context_keeps_the_answer(self, tokenizer: PreTrainedTokenizerFast, at: int) -> None:
        words = [f"word{i}" for i in range(600)]
        words[at : at + 1] = ["Ada", "Brown,"]
        long = question(context=" ".join(words))
        for seed in range(4):
            (example,) = encode([long], tokenizer, max_tokens=128, seed=seed)
            assert 118 <= len(example["input_ids"]) <= 128
            text = tokenizer.decode(example["input_ids"])
            assert "Ada Brown" in text.partition("Answer:")[0] and "Question: Who built the tower?" in text
            context = text.partition("Context: ")[2].partition("\n\n")[0]
            assert context in long.context

    def test_answer_that_is_not_in_a_long_context(self, tokenizer: PreTrainedTokenizerFast) -> None:
        (example,) = encode([question(context="word " * 600, answers=("none",))], tokenizer, max_tokens=128)
        assert len(example["input_ids"]) <= 128

    def test_begin_of_text_token(self) -> None:
        tokenizer = tiny_tokenizer()
        assert encode(word_questions(1), tokenizer)[0]["input_ids"][0] != tokenizer.bos_token_id
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        (example,) = encode(word_questions(1), tokenizer)
        assert example["input_ids"].tolist().count(1) == 1 and example["input_ids"][0] == 1

    def test_impossible(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(DataError, match="question '1' without most of its context"):
            encode([question()], tokenizer, max_tokens=12)
        with pytest.raises(DataError, match="answer"):
            encode([question(answers=())], tokenizer)
        without = tiny_tokenizer()
        without.eos_token = None
        with pytest.raises(DataError, match="end-of-text"):
            encode([question()], without)


def test_prompt_tokens_keep_the_context_from_its_start(tokenizer: PreTrainedTokenizerFast) -> None:
    long = question(context=" ".join(f"word{i}" for i in range(600)) + " Ada Brown")
    tokens = prompt_tokens(long, tokenizer, max_tokens=100)
    text = tokenizer.decode(tokens)
    assert 90 <= len(tokens) <= 100
    assert text.startswith("Context: word0 word1 ") and text.endswith("\n\nQuestion: Who built the tower?\n\nAnswer:")
    assert "Ada" not in text
    with pytest.raises(DataError):
        prompt_tokens(long, tokenizer, max_tokens=5)


def test_collate() -> None:
    examples = encode(word_questions(3), tiny_tokenizer())
    batch = collate(examples, pad_token_id=9)
    for row, example in enumerate(examples):
        size = len(example["input_ids"])
        assert torch.equal(batch["input_ids"][row, :size], example["input_ids"])
        assert torch.equal(batch["labels"][row, :size], example["labels"])
        assert batch["input_ids"][row, size:].eq(9).all() and batch["labels"][row, size:].eq(-100).all()
        assert batch["attention_mask"][row].sum() == size and batch["attention_mask"][row, :size].all()
    assert batch["input_ids"].shape == (3, len(examples[2]["input_ids"]))
    with pytest.raises(DataError):
        collate([], 0)


class TestScores:
    def test_normalize_answer(self) -> None:
        assert normalize_answer("The  Cat, a dog; an\tOWL!") == "cat dog owl"
        assert normalize_answer("theatre a-b") == "theatre ab"
        assert normalize_answer("U.S.") == "us"

    def test_exact_match(self) -> None:
        assert exact_match("the Denver Broncos.", ["Denver Broncos"]) == 1
        assert exact_match("Denver", ["Denver Broncos", "denver"]) == 1
        assert exact_match("Broncos", ["Denver Broncos"]) == 0
        assert exact_match("", ["the"]) == 1

    def test_f1(self) -> None:
        assert f1("Denver Broncos", ["The Denver Broncos"]) == 1
        assert f1("Broncos of Denver", ["Denver Broncos"]) == pytest.approx(0.8)
        assert f1("Denver", ["Carolina Panthers", "Denver Broncos"]) == pytest.approx(2 / 3)
        assert f1("b b b", ["b c"]) == pytest.approx(0.4)
        assert f1("Panthers", ["Denver Broncos"]) == 0
        assert f1("", ["Denver"]) == 0 and f1("the", ["a"]) == 1

    def test_rouge_l(self) -> None:
        assert rouge_l("Denver Broncos", ["the Denver Broncos"]) == 1
        # order counts, unlike in F1
        assert rouge_l("Broncos of Denver", ["Denver Broncos"]) == pytest.approx(0.4)
        # Lin (2004): police [kill] gunman; the articles are dropped
        assert rouge_l("police kill the gunman", ["police killed the gunman"]) == pytest.approx(2 / 3)
        assert rouge_l("the gunman kill police", ["police killed the gunman"]) == pytest.approx(1 / 3)
        assert rouge_l("w1 w2 w3 w4 w5", ["w1 w3 w9 w5", "w7"]) == pytest.approx(2 * 3 / 9)
        assert rouge_l("", ["Denver"]) == 0 and rouge_l("", [""]) == 1

    def test_answers_are_a_list(self) -> None:
        for score in (f1, rouge_l, exact_match):
            with pytest.raises(DataError):
                score("x", [])
            with pytest.raises(DataError):
                score("x", "x")


class TestEvaluateQA:
    @staticmethod
    def plain_answer(model: PreTrainedModel, tokenizer: Any, prompt_ids: list[int], plan: SharingPlan) -> str:
        """Token by token, without a cache."""
        tokens = list(prompt_ids)
        with share(model, plan), torch.no_grad():
            for _ in range(6):
                chosen = int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
                if chosen == tokenizer.eos_token_id:
                    break
                tokens.append(chosen)
        return str(tokenizer.decode(tokens[len(prompt_ids) :], skip_special_tokens=True)).strip()

    @pytest.mark.parametrize("batch_size", [1, 3, 8])
    def test_equals_plain_decoding(self, batch_size: int) -> None:
        model, tokenizer = tiny_model(), tiny_tokenizer()
        questions = word_questions()
        rows = []
        for plan in PLANS:
            written = [
                self.plain_answer(model, tokenizer, prompt_tokens(q, tokenizer, max_tokens=64), plan) for q in questions
            ]
            # what each plan says is right under it; another plan's answers would not score 100
            asked = [replace(q, answers=(text,)) for q, text in zip(questions, written, strict=True)]
            (row,) = evaluate_qa(
                model, tokenizer, asked, [plan], max_new_tokens=6, batch_size=batch_size, max_tokens=64
            )
            assert (row.f1, row.exact_match, row.rouge_l) == pytest.approx((100, 100, 100))
            rows.append(evaluate_qa(model, tokenizer, asked, PLANS, max_new_tokens=6, batch_size=batch_size))
        assert rows[0][0].f1 == pytest.approx(100) and rows[0][1].f1 < 100 and rows[0][2].f1 < 100

    def test_rows(self) -> None:
        model, tokenizer = tiny_model(), tiny_tokenizer()
        model.train()
        seen: list[int] = []
        plans = [PLANS[1], PLANS[0], PLANS[1]]
        rows = evaluate_qa(model, tokenizer, word_questions(), plans, batch_size=3, progress=seen.append)
        assert model.training and "forward" not in model.model.__dict__
        assert [row.leaders for row in rows] == [(0, 2), (0, 1, 2, 3), (0, 2)]
        assert [row.retention for row in rows] == [0.5, 1.0, 0.5] and rows[0] == rows[2]
        assert seen == [3, 3, 1, 3, 3, 1, 7]
        assert json.loads(json.dumps(rows[0].to_dict())) == {
            "retention": 0.5,
            "leaders": [0, 2],
            "f1": rows[0].f1,
            "exact_match": rows[0].exact_match,
            "rouge_l": rows[0].rouge_l,
            "num_questions": 7,
        }

    def test_stops_at_a_line_break(self, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model(vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0, bos_token_id=None)
        say = tokenizer(" Ada Brown\n or not", add_special_tokens=False)["input_ids"]
        line_break = next(i for i, token in enumerate(say) if "\n" in tokenizer.decode([token]))
        forward, steps = model.forward, []

        def parrot(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            output.logits[:, -1] = torch.nn.functional.one_hot(torch.tensor(say[len(steps)]), len(tokenizer)).float()
            steps.append(1)
            return output

        parrot.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        monkeypatch.setattr(model, "forward", parrot)
        rows = evaluate_qa(model, tokenizer, [question(), question(answers=("Ada",))], PLANS[:1])
        assert len(steps) == line_break + 1
        assert rows == [
            QAScores(
                retention=1.0,
                leaders=(0, 1, 2, 3),
                f1=pytest.approx((100 + 200 / 3) / 2),
                exact_match=50.0,
                rouge_l=pytest.approx((100 + 200 / 3) / 2),
                num_questions=2,
            )
        ]

    def test_checkpoints_own_settings_do_not_count(self) -> None:
        model, tokenizer = tiny_model(), tiny_tokenizer()
        plain = evaluate_qa(model, tokenizer, word_questions(), PLANS[:1])
        model.generation_config.repetition_penalty = 5.0
        model.generation_config.do_sample = True
        model.generation_config.temperature = 9.0
        model.generation_config.suppress_tokens = list(range(3, 40))
        model.generation_config.return_dict_in_generate = True
        own = model.generation_config
        assert evaluate_qa(model, tokenizer, word_questions(), PLANS[:1]) == plain
        assert model.generation_config is own

    def test_prompts_leave_room_among_the_models_positions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[int] = []
        model = tiny_model(max_position_embeddings=40)
        model.model.register_forward_pre_hook(  # type: ignore[union-attr, operator]
            lambda module, args, kwargs: seen.append(int(kwargs["position_ids"].max())), with_kwargs=True
        )
        question = Question(context=" ".join(["w7"] * 300), question="w9", answers=("w1",), id="a", article="a")
        evaluate_qa(model, tiny_tokenizer(), [question], PLANS[:1])
        assert 16 <= max(seen) < 40

    def test_impossible(self) -> None:
        model, tokenizer = tiny_model(), tiny_tokenizer()
        with pytest.raises(DataError, match="at least one question"):
            evaluate_qa(model, tokenizer, [], PLANS)
        with pytest.raises(DepthKVError, match="batch size"):
            evaluate_qa(model, tokenizer, word_questions(), PLANS, batch_size=0)
        with pytest.raises(PlanError):
            evaluate_qa(model, tokenizer, word_questions(), [SharingPlan.full(3)])
        assert not model.training
