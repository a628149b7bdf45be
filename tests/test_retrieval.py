"""Prompts have their length and hide what they promise; who reads them scores 100, and batches change nothing."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from depthkv import SharingPlan
from depthkv.adapt.pretrain import train_tokenizer
from depthkv.data import Document
from depthkv.errors import DataError, DepthKVError
from depthkv.evaluate import retrieval
from depthkv.evaluate.arms import Arm
from depthkv.evaluate.generation import write_lines
from depthkv.evaluate.haystack import COMMON_WORDS, DEPTHS, SHIFT, TASKS, WORDS, Haystack
from depthkv.evaluate.intervals import score
from depthkv.evaluate.retrieval import RetrievalItem, retrieval_items, retrieve, summarize
from depthkv.qa import Question
from tiny import LAYERS, POSITIONS, tiny_model, tiny_tokenizer

PLAN = SharingPlan.every(2, LAYERS)
LENGTHS = (512, 768)


def _documents() -> list[Document]:
    """Sentences of 4 to 12 made-up words, every word another one: any run of them can be found again."""
    rng = random.Random(0)
    letters = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = iter(dict.fromkeys("".join(rng.choices(letters, k=4)) for _ in range(4000)))
    documents = []
    for i in range(5):
        sentences = [" ".join(next(words) for _ in range(rng.randint(4, 12))) + "." for _ in range(60)]
        documents.append(Document(f"text {i}", "\n".join(sentences)))
    return documents


DOCUMENTS = _documents()
STREAM = " ".join(document.text for document in DOCUMENTS).split()
"""All words in their order."""
QUESTIONS = [
    Question(
        context=" ".join([f"The keeper of gate {10 + i} is named {WORDS[i].title()}.", *STREAM[25 * i : 25 * (i + 1)]]),
        question=f"Who is the keeper of gate {10 + i}?",
        answers=(f"the {WORDS[i].title()}", "nobody else"),
        article=f"article {i // 3}",
        id=str(i),
    )
    for i in range(40)
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, so that text survives exactly."""
    common = (
        "Some words come often in the following list. Special numbers of variables that have the value are hidden. "
    )
    return train_tokenizer([*DOCUMENTS, Document("words", (common + ", ".join(WORDS)) * 9)], 1200)


def _items(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> list[RetrievalItem]:
    options: dict[str, Any] = dict(tasks=tuple(TASKS), lengths=LENGTHS, num_items=5, questions=QUESTIONS)
    return retrieval_items(DOCUMENTS, tokenizer, **{**options, **changes})


@pytest.fixture(scope="module")
def items(tokenizer: PreTrainedTokenizerFast) -> list[RetrievalItem]:
    return _items(tokenizer)


def _oracle(prompt: str) -> str:
    """Reads the prompt and answers; knows no more than what is in it."""
    text, _, question = prompt.partition("Question: ")
    if found := re.search(r"special number of (\w+)\?", question):
        return re.findall(rf"special number of {found[1]} is (\d+)\.", text)[0]
    if found := re.search(r"have the value (\d+)\?", question):
        values: dict[str, str] = {}
        # in the order of the text, as a program would run
        for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
            values[name] = values.get(value, value)
        return ", ".join(name for name, value in values.items() if value == found[1])
    if "most often" in question:
        counts = Counter(text.partition("\n\n")[2].strip().rstrip(".").split(", "))
        return " ".join(word for word, _ in counts.most_common(COMMON_WORDS))
    (gate,) = re.findall(r"gate (\d+)\?", question)
    return re.findall(rf"gate {gate} is named (\w+)\.", text)[0]


class TestItems:
    def test_lengths(self, items: list[RetrievalItem]) -> None:
        assert [(item.task, item.tokens) for item in items] == [
            (task, tokens) for task in TASKS for tokens in LENGTHS for _ in range(5)
        ]
        gaps = [item.tokens - item.answer_tokens - len(item.prompt_tokens) for item in items]
        assert all(item.answer_tokens == TASKS[item.task][1] for item in items)
        assert min(gaps) == 0 and max(gaps) <= 2 and gaps.count(0) >= 0.9 * len(gaps)

    def test_one_token_words_fill_every_prompt_exactly(self) -> None:
        found = _items(tiny_tokenizer(), tasks=["needle", "variables", "common-words", "qa"], answer_tokens=7)
        assert {item.tokens - len(item.prompt_tokens) for item in found} == {7} == {i.answer_tokens for i in found}

    def test_same_arguments_same_items(self, tokenizer: PreTrainedTokenizerFast, items: list[RetrievalItem]) -> None:
        assert _items(tokenizer) == items
        # an item depends on nothing but its own task, length and number
        assert (
            _items(tokenizer, tasks=["variables"], lengths=LENGTHS[1:], num_items=2)
            == [item for item in items if (item.task, item.tokens) == ("variables", LENGTHS[1])][:2]
        )
        others = _items(tokenizer, seed=1)
        assert all(one.prompt_tokens != other.prompt_tokens for one, other in zip(items, others, strict=True))
        assert len({item.prompt_tokens for item in items}) == len(items)

    def test_needle_lies_where_it_says(self, tokenizer: PreTrainedTokenizerFast, items: list[RetrievalItem]) -> None:
        needles = [item for item in items if item.task == "needle"]
        assert [item.depth for item in needles] == [*DEPTHS, *DEPTHS]
        for item in needles:
            text = tokenizer.decode(item.prompt_tokens).partition("\n\n")[2].rpartition("\n\n")[0]
            (sentence,) = re.findall(r"The special number of \w+ is \d{6}\.", text)
            assert item.answers[0] in sentence
            before, after = (part.split() for part in text.split(sentence))
            count = len(before) + len(after)
            assert item.depth is not None and abs(len(before) - item.depth * count) <= min(SHIFT, 7)
            assert not before or not after or before[-1].endswith(".")
            # around it is the documents' text in its order, from the start of a sentence in the document named
            start = STREAM.index((before + after)[0])
            assert before + after == [STREAM[(start + i) % len(STREAM)] for i in range(count)]
            assert STREAM[start - 1].endswith(".")
            assert (before + after)[0] in {d.name: d.text for d in DOCUMENTS}[item.document].split()

    def test_what_several_sentences_hide(self, tokenizer: PreTrainedTokenizerFast, items: list[RetrievalItem]) -> None:
        for item in items:
            text = tokenizer.decode(item.prompt_tokens)
            if item.task == "multi-needle":
                keys, numbers = zip(*re.findall(r"special number of (\w+) is (\d{6})\.", text), strict=True)
                assert len(set(keys)) == len(set(numbers)) == 4 and item.answers[0] in numbers
            if item.task == "variables":
                set_here: list[str] = []
                for name, other in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
                    assert name not in set_here and (other.isdigit() or other in set_here)
                    set_here.append(name)
                assert len(set_here) == 6 and len(set(item.answers)) == 3 and set(item.answers) < set(set_here)
            assert item.depth is None or item.task == "needle"

    @pytest.mark.parametrize("tokens", [400, 512, 768, 1500])
    def test_common_words_are_common(self, tokenizer: PreTrainedTokenizerFast, tokens: int) -> None:
        for item in _items(tokenizer, tasks=["common-words"], lengths=[tokens], num_items=2):
            listed = tokenizer.decode(item.prompt_tokens).split("\n\n")[1].rstrip(".").split(", ")
            counts = Counter(listed)
            most, other = counts.most_common(COMMON_WORDS), counts.most_common(COMMON_WORDS + 1)[-1]
            assert {word for word, _ in most} == set(item.answers) and most[-1][1] >= 3 * other[1]
            assert set(listed) <= set(WORDS)

    def test_qa_hides_the_passage_among_those_of_other_articles(
        self, tokenizer: PreTrainedTokenizerFast, items: list[RetrievalItem]
    ) -> None:
        asked = [item for item in items if item.task == "qa"]
        places = set()
        for item in asked:
            context, _, question = tokenizer.decode(item.prompt_tokens).partition("\n\nQuestion: ")
            (source,) = [q for q in QUESTIONS if q.question == question.partition("\n")[0]]
            passages = context.removeprefix("Context: ").split("\n\n")
            assert source.context in passages and item.document == source.article and item.any_answer
            places.add(passages.index(source.context))
            contexts = {q.context: q.article for q in QUESTIONS}
            others = [passage for passage in passages if passage != source.context]
            whole = [passage for passage in others if passage in contexts]
            assert len(others) - 1 <= len(whole) and len(others) >= 2
            assert all(contexts[passage] != source.article for passage in whole)
        assert len(places) > 1 and len({item.answers for item in asked}) > 5

    def test_qa_leaves_answers_out_of_distractors(self, tokenizer: PreTrainedTokenizerFast) -> None:
        # half of the other passages mention the answer, too
        spoiled = [replace(q, context=q.context + " So says Apple.") for q in QUESTIONS[3::2]]
        asked = replace(QUESTIONS[1], answers=("apple",), context="The keeper of gate 11 is named Apple.")
        found = _items(tokenizer, tasks=["qa"], num_items=20, questions=[asked, *spoiled, *QUESTIONS[4::2]])
        texts = [tokenizer.decode(item.prompt_tokens) for item in found if item.answers == ("apple",)]
        assert texts and all(text.count("Apple") == 1 for text in texts)

    def test_begin_of_text_token(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        for item in _items(tokenizer, tasks=["needle"]):
            assert item.prompt_tokens.count(1) == 1 and item.prompt_tokens[0] == 1
            assert len(item.prompt_tokens) == item.tokens - item.answer_tokens

    def test_words_are_apart(self) -> None:
        assert not [(a, b) for a in WORDS for b in WORDS if a != b and a in b]
        assert len(set(WORDS)) == len(WORDS) and all(re.fullmatch("[a-z]+", word) for word in WORDS)

    @pytest.mark.parametrize(
        ("changes", "error", "wanted"),
        [
            (
                {"tasks": ["needle", "pins"]},
                DepthKVError,
                "needle, multi-needle, variables, common-words, qa, got 'pins'",
            ),
            ({"tasks": []}, DepthKVError, "at least one task"),
            ({"lengths": []}, DepthKVError, "at least one task, length"),
            ({"num_items": 0}, DepthKVError, "item"),
            ({"answer_tokens": 0}, DepthKVError, "answer token"),
            ({"tasks": ["needle"], "lengths": [40]}, DepthKVError, r"length of at least \d+ tokens .* needle, got 40"),
            ({"tasks": ["common-words"], "lengths": [64]}, DepthKVError, "task common-words, got 64"),
            ({"tasks": ["qa"], "questions": None}, DataError, "questions for the task qa .* got none"),
            ({"tasks": ["qa"], "lengths": [100]}, DataError, "at most 50 tokens, got 40 with longer ones"),
            ({"tasks": ["qa"], "questions": QUESTIONS[:3]}, DataError, "text for prompts of 480 tokens of the task qa"),
            ({"tasks": ["needle"], "lengths": [20_000]}, DataError, r"of 19984 tokens .* needle, got enough for \d+$"),
        ],
    )
    def test_impossible(
        self, tokenizer: PreTrainedTokenizerFast, changes: dict[str, Any], error: type[Exception], wanted: str
    ) -> None:
        with pytest.raises(error, match=wanted):
            _items(tokenizer, **changes)

    def test_no_text(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(DataError, match="got none"):
            retrieval_items([Document("empty", " \n")], tokenizer, tasks=["needle"], lengths=[512], num_items=1)


class TestHaystack:
    def test_after_the_last_document_comes_the_first(self) -> None:
        haystack = Haystack([Document("a", "one two"), Document("b", " \n"), Document("c", "three\n\nfour")])
        assert len(haystack) == 4
        assert haystack.hide([], [], 3, 4) == "four one two three"
        assert {haystack.draw(random.Random(i)) for i in range(20)} == {(0, "a"), (2, "c")}

    def test_text_without_spaces_survives(self) -> None:
        text = "天地玄黄宇宙洪荒" * 8
        haystack = Haystack([Document("a", text)])
        assert len(haystack) > 1 and haystack.hide([], [], 0, len(haystack)) == text

    def test_a_far_end_of_a_sentence_draws_nothing(self) -> None:
        haystack = Haystack([Document("a", " ".join(["word"] * 200))])
        assert haystack.hide(["HERE", "THERE"], [0.5, 0.95], 0, 200).split().index("HERE") == 100
        # an end that is near enough does
        assert haystack.hide(["HERE", "THERE"], [0.5, 0.95], 0, 200).endswith("word THERE")


class TestRetrieve:
    def _fake(self, monkeypatch: pytest.MonkeyPatch, write: Any) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def fake(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[str]:
            calls.append({"lengths": [len(prompt) for prompt in prompts], **options})
            options["progress"](len(prompts))
            return [write(tokenizer.decode(prompt)) for prompt in prompts]

        monkeypatch.setattr(retrieval, "write_lines", fake)
        return calls

    def test_a_reader_scores_100(
        self, tokenizer: PreTrainedTokenizerFast, items: list[RetrievalItem], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._fake(monkeypatch, _oracle)
        done: list[int] = []
        assert retrieve(None, tokenizer, items, progress=done.append) == [100.0] * len(items)
        assert sum(done) == len(items)

    @pytest.mark.parametrize("text", ["", "I do not know.", "12 apples, VAR X"])
    def test_nonsense_scores_0(
        self,
        tokenizer: PreTrainedTokenizerFast,
        items: list[RetrievalItem],
        monkeypatch: pytest.MonkeyPatch,
        text: str,
    ) -> None:
        self._fake(monkeypatch, lambda prompt: text)
        kept = [item for item in items if "apple" not in item.answers and "the Apple" not in item.answers]
        assert retrieve(None, tokenizer, kept, progress=lambda count: None) == [0.0] * len(kept)

    def test_part_of_the_answers(self, items: list[RetrievalItem]) -> None:
        (item,) = [item for item in items if item.task == "common-words"][:1]
        assert item.score(f"{item.answers[0].upper()}, and: {item.answers[3]}!") == 40
        (item,) = [item for item in items if item.task == "qa"][:1]
        assert item.score("Nobody else, I think") == 100 == item.score("it is " + item.answers[0].removeprefix("the "))

    def test_batches(
        self, tokenizer: PreTrainedTokenizerFast, items: list[RetrievalItem], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = self._fake(monkeypatch, _oracle)
        cache = object()
        options: dict[str, Any] = dict(make_cache=cache, progress=lambda count: None)
        retrieve(None, tokenizer, items, batch_size=4, batch_tokens=1500, **options)
        totals = [max(call["lengths"]) + call["max_new_tokens"] for call in calls]
        assert totals == [768] * 3 + [512] * 3  # one call for each length and room for an answer
        assert [call["batch_size"] for call in calls] == [1] * 3 + [2] * 3
        assert all(call["make_cache"] is cache for call in calls)
        calls.clear()
        retrieve(None, tokenizer, items, batch_size=4, batch_tokens=100, **options)
        assert {call["batch_size"] for call in calls} == {1}

    def test_a_model(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Answers are replaced by what the shared model writes to each prompt alone: it alone finds them all."""
        model = tiny_model(vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0, max_position_embeddings=POSITIONS)
        found = _items(tokenizer, tasks=["needle", "common-words", "qa"], lengths=[400], answer_tokens=12)
        with Arm(label="shared", plan=PLAN).applied(model):
            lines = [
                write_lines(model, tokenizer, [item.prompt_tokens], max_new_tokens=12, batch_size=1)[0]
                for item in found
            ]
            found = [replace(item, answers=(line,)) for item, line in zip(found, lines, strict=True)]
            for batch_size in (1, 3, 8):
                assert retrieve(model, tokenizer, found, batch_size=batch_size) == [100.0] * len(found)
        assert sum(retrieve(model, tokenizer, found)) < 100 * len(found)

    def test_impossible(self, tokenizer: PreTrainedTokenizerFast, items: list[RetrievalItem]) -> None:
        with pytest.raises(DataError, match="got none"):
            retrieve(None, tokenizer, [])
        with pytest.raises(DepthKVError, match="batch size"):
            retrieve(None, tokenizer, items, batch_size=0)


class TestSummarize:
    def test_means_of_parts(self, items: list[RetrievalItem]) -> None:
        rng = random.Random(0)
        own, full = ([rng.choice([0.0, 50.0, 100.0]) for _ in items] for _ in range(2))
        section = summarize(items, own, full, seed=3)
        names = [item.document for item in items]
        assert section["score"] == score(own, names, full, seed=3).to_dict()
        assert [(part["task"], part["tokens"]) for part in section["tasks"]] == [(t, n) for t in TASKS for n in LENGTHS]
        for i, part in enumerate(section["tasks"]):
            assert part["score"]["value"] == pytest.approx(sum(own[5 * i : 5 * i + 5]) / 5)
            apart = sum(own[5 * i : 5 * i + 5]) - sum(full[5 * i : 5 * i + 5])
            assert part["score"]["difference"] == pytest.approx(apart / 5)
        # the needles come first, at one depth each
        assert [(part["tokens"], part["depth"]) for part in section["depths"]] == [
            (n, d) for n in LENGTHS for d in DEPTHS
        ]
        assert [part["score"]["value"] for part in section["depths"]] == own[:10]
        assert {part["score"]["count"] for part in section["depths"]} == {1}

    def test_the_full_cache_itself(self, items: list[RetrievalItem]) -> None:
        section = summarize(items, [100.0] * len(items))
        assert section["score"]["value"] == 100 and section["score"]["difference"] is None
        without = [item for item in items if item.task == "variables"]
        assert summarize(without, [0.0] * len(without))["depths"] == []

    def test_impossible(self, items: list[RetrievalItem]) -> None:
        with pytest.raises(DepthKVError, match="as many scores as items"):
            summarize(items, [1.0])
        with pytest.raises(DepthKVError):
            summarize([], [])
