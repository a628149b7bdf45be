"""Questions about a context: reading them, and making training examples whose loss is on the answer only.

The protocol of arXiv:2604.22782: one prompt in two orders, question or context first with probability one half each.
"""

from __future__ import annotations

import bisect
import json
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from depthkv.data import _start_tokens
from depthkv.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Question", "encode", "read_squad", "split_articles"]

_IGNORED = -100
"""Label of tokens that the loss leaves out."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question that its context answers."""

    context: str
    question: str
    answers: tuple[str, ...]
    """At least one; each counts as right."""
    article: str
    """Title of the text that the context is from: questions on one article belong together."""
    id: str


def read_squad(path: str | os.PathLike[str]) -> list[Question]:
    """Read questions in the JSON format of SQuAD 1.1 or 2.0. Those without an answer are skipped.

    Raises:
        DataError: the file cannot be read, has another structure, or holds no question with an answer.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as problem:
        raise DataError(f"expected a file of questions at {path}, got {problem.strerror or problem}") from problem
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{path}: expected questions in JSON, got {problem or 'too deep a nesting'}") from problem
    questions = []
    try:
        for a, article in enumerate(_get(data, "data", list, "the file")):
            where = f"data[{a}]"
            title = _get(article, "title", str, where)
            for p, paragraph in enumerate(_get(article, "paragraphs", list, where)):
                inner = f"{where}.paragraphs[{p}]"
                context = _get(paragraph, "context", str, inner)
                for q, entry in enumerate(_get(paragraph, "qas", list, inner)):
                    question = _question(entry, f"{inner}.qas[{q}]", title, context)
                    if question.answers:
                        questions.append(question)
    except DataError as problem:
        raise DataError(f"{path}: {problem}") from None
    if not questions:
        raise DataError(f"{path}: expected at least one question with an answer, got none")
    return questions


def split_articles(
    questions: Sequence[Question], held_out_fraction: float = 0.25, seed: int = 0
) -> tuple[list[Question], list[Question]]:
    """Part the questions into training and held-out ones so that no article is in both.

    Args:
        questions: on two articles or more.
        held_out_fraction: of the articles, which are drawn at random; at least one is held out and one is not.
        seed: of the draw.

    Returns:
        (train, held_out), each in the order of `questions`.

    Raises:
        DataError: fewer than two articles, or a fraction outside (0, 1).
    """
    if not 0 < held_out_fraction < 1:
        raise DataError(f"expected a held-out fraction above 0 and below 1, got {held_out_fraction}")
    articles = sorted({question.article for question in questions})
    if len(articles) < 2:
        raise DataError(f"expected questions on at least two articles, got {len(articles)}")
    count = min(len(articles) - 1, max(1, round(held_out_fraction * len(articles))))
    chosen = set(random.Random(seed).sample(articles, count))
    train = [question for question in questions if question.article not in chosen]
    return train, [question for question in questions if question.article in chosen]


def prompt(question: Question, *, context_first: bool = True) -> str:
    """What the model reads; the answer follows after a space."""
    parts = [f"Context: {question.context}", f"Question: {question.question}"]
    return "\n\n".join([*(parts if context_first else parts[::-1]), "Answer:"])


def prompt_tokens(
    question: Question, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, context_first: bool = True
) -> list[int]:
    """The prompt's token ids, for answering. A context that does not fit loses its end, wherever the answer is.

    Raises:
        DataError: the question alone has more than `max_tokens`.
    """
    return _fitting_prompt(question, tokenizer, max_tokens, context_first, kept="", place=0.0)


def encode(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int = 512, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Training examples: prompt, the first answer, the end-of-text token.

    Which of context and question comes first is a coin flip, a pure function of the seed and the question's place in
    the list. A context that does not fit is cut to whole words around the answer's first occurrence, which lies at a
    random place in them.

    Args:
        questions: as from `read_squad`.
        tokenizer: with an end-of-text token.
        max_tokens: of an example.
        seed: of the order and of the cuts.

    Returns:
        One dict per question: `input_ids` and `labels`, int64 `[tokens]`. Labels are -100 in the prompt.

    Raises:
        DataError: no end-of-text token, a question without an answer, or one too long even without its context.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("expected a tokenizer with an end-of-text token, got one without")
    examples = []
    for index, question in enumerate(questions):
        if not question.answers:
            raise DataError(f"expected an answer to question {question.id!r}, got none")
        rng = random.Random(f"{seed}:{index}")
        context_first, place = rng.random() < 0.5, rng.random()
        # in one line, since reading an answer stops at the first line break
        answer = [*_tokens(tokenizer, " " + " ".join(question.answers[0].split())), int(tokenizer.eos_token_id)]
        room = max_tokens - len(answer)
        before = _fitting_prompt(question, tokenizer, room, context_first, kept=question.answers[0], place=place)
        examples.append(
            {
                "input_ids": torch.tensor(before + answer, dtype=torch.long),
                "labels": torch.tensor([_IGNORED] * len(before) + answer, dtype=torch.long),
            }
        )
    return examples


def collate(examples: Sequence[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """One batch, padded on the right: `input_ids`, `attention_mask` and `labels`, int64 `[examples, tokens]`."""
    if not examples:
        raise DataError("expected at least one example, got none")
    tokens = [example["input_ids"] for example in examples]
    masks = [torch.ones_like(row) for row in tokens]
    labels = [example["labels"] for example in examples]
    return {
        name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
        for name, rows, value in (
            ("input_ids", tokens, pad_token_id),
            ("attention_mask", masks, 0),
            ("labels", labels, _IGNORED),
        )
    }


def _question(entry: object, where: str, title: str, context: str) -> Question:
    answers = [
        _get(answer, "text", str, f"{where}.answers[{i}]")
        for i, answer in enumerate(_get(entry, "answers", list, where))
    ]
    return Question(
        context=context,
        question=_get(entry, "question", str, where).strip(),
        answers=tuple(answer for answer in answers if answer.strip()),
        article=title,
        id=_get(entry, "id", str, where),
    )


def _get(value: object, key: str, kind: type, where: str) -> Any:
    if not isinstance(value, dict):
        raise DataError(f"expected {where} as a JSON object, got {type(value).__name__}")
    if not isinstance(value.get(key), kind):
        wanted = "list" if kind is list else "string"
        got = type(value[key]).__name__ if key in value else "none"
        raise DataError(f'expected a {wanted} "{key}" in {where}, got {got}')
    return value[key]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: no warning about a context that is longer than the model's, since it is cut afterwards
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens


def _fitting_prompt(
    question: Question,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    context_first: bool,
    kept: str,
    place: float,
) -> list[int]:
    """The prompt's tokens, at most `max_tokens`, with as much of the context as fits; `kept` stays in it."""
    start = _start_tokens(tokenizer)

    def with_context(context: str) -> list[int]:
        text = prompt(replace(question, context=context), context_first=context_first)
        return start + _tokens(tokenizer, text)

    whole = with_context(question.context)
    if len(whole) <= max_tokens:
        return whole
    window, most_extra = _windows(question.context, kept, place)
    # the first number of words that is too large
    too_many = bisect.bisect_left(
        range(most_extra + 1), True, key=lambda extra: len(with_context(window(extra))) > max_tokens
    )
    if too_many == 0:
        raise DataError(
            f"expected question {question.id!r} without most of its context to have at most {max_tokens} tokens, "
            f"got {len(with_context(window(0)))}"
        )
    return with_context(window(too_many - 1))


def _windows(context: str, kept: str, place: float) -> tuple[Callable[[int], str], int]:
    """A function from a number of words to a part of the context: `kept` and so many words around it.

    Args:
        context: what to cut.
        kept: at its first occurrence; where there is none, the parts start where the context does.
        place: share of the words that come before `kept`, as far as there are any.

    Returns:
        (the function, the largest number that it takes)
    """
    words = [match.span() for match in re.finditer(r"\S+", context)]
    at = context.find(kept) if kept else -1
    inside = [i for i, (start, end) in enumerate(words) if at >= 0 and start < at + len(kept) and end > at]
    first, last = (inside[0], inside[-1] + 1) if inside else (0, 0)
    most = first + len(words) - last

    def window(extra: int) -> str:
        before = min(first, max(round(place * extra), extra - (len(words) - last)))
        low, high = first - before, last + extra - before
        return context[words[low][0] : words[high - 1][1]] if high > low else ""

    return window, most
