# NOTE FOR THE RETRIEVAL HELPER: the lead overwrote your retrieval.py with this stop-gap by accident at 01:31. Your design (haystack.py) is better:
# write YOUR version of this file again, with the names that src/depthkv/evaluate/run.py imports and calls (RetrievalItem, retrieval_items, retrieve,
# summarize; see their use there), exactly as in your brief. The lead will not touch this file any more.
"""Retrieval from long contexts that are made of real text, after RULER (arXiv:2404.06654) and needle-in-a-haystack.

All prompts of one length have exactly as many tokens, so that they need no padding. What is hidden lies between
sentences of the user's documents at a known depth: 0 is the start of the text, 1 its end.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from depthkv.data import Document, _start_tokens
from depthkv.errors import DataError, DepthKVError
from depthkv.evaluate.arms import MakeCache
from depthkv.evaluate.generation import Progress, write_tokens
from depthkv.evaluate.intervals import score
from depthkv.qa import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the single needle lies, in turns."""

ANSWER_TOKENS = 24
"""Room for the answer within an item's length."""

_BATCH_TOKENS = 2**14
"""Most prompt tokens in one forward: the longer the prompts, the fewer together."""

_KEYS = (
    "amber basil cedar delta ember falcon garnet harbor indigo jasper kestrel lantern meadow nectar orchid pepper quartz "
    "raven saffron timber umber velvet willow yarrow zephyr anchor bishop copper dragon engine"
).split()


@dataclass(frozen=True, kw_only=True)
class RetrievalItem:
    """One prompt and what has to be found in it."""

    task: str
    tokens: int
    """Of the prompt and the room for the answer."""
    prompt: tuple[int, ...]
    """Token ids, `tokens - ANSWER_TOKENS` of them."""
    answers: tuple[str, ...]
    """All have to be written, each counts alike; of a "qa" item's, one is enough."""
    depth: float | None
    """Of what is asked for, from 0 to 1, where it is in one place."""
    name: str
    """Tells items apart."""


@dataclass(frozen=True, kw_only=True)
class _Puzzle:
    """What a task hides and asks."""

    intro: str
    hidden: tuple[tuple[float, str], ...] = ()
    """(depth, text) of each thing to put between sentences."""
    question: str
    answers: tuple[str, ...]
    depth: float | None = None
    haystack: str | None = None
    """Instead of the documents."""


_Rng = random.Random
_Task = Callable[[_Rng, int, "_Source"], _Puzzle]


def _needle(rng: _Rng, number: int, source: _Source) -> _Puzzle:
    """One number, at each of `DEPTHS` in turn."""
    return _hide_numbers(rng, 1, DEPTHS[number % len(DEPTHS)])


def _multi_needle(rng: _Rng, number: int, source: _Source) -> _Puzzle:
    """Four numbers of different names, one of which is asked for."""
    return _hide_numbers(rng, 4, None)


def _hide_numbers(rng: _Rng, count: int, depth: float | None) -> _Puzzle:
    keys = rng.sample(_KEYS, count)
    numbers = rng.sample(range(10_000, 100_000), count)
    depths = [rng.random() if depth is None else depth for _ in keys]
    return _Puzzle(
        intro="Remember the secret numbers in this text.\n\n",
        hidden=tuple(
            (place, f"The secret number of {key} is {value}.")
            for place, key, value in zip(depths, keys, numbers, strict=True)
        ),
        question=f"\n\nQuestion: What is the secret number of {keys[0]}?\nAnswer: The secret number of {keys[0]} is",
        answers=(str(numbers[0]),),
        depth=depths[0],
    )


def _variables(rng: _Rng, number: int, source: _Source) -> _Puzzle:
    """A number is handed from name to name: which names hold it?"""
    names = rng.sample([key.upper() for key in _KEYS], 6)
    values = rng.sample(range(10_000, 100_000), 2)
    chain, other = names[:3], names[3:]
    hidden = []
    for members, value in ((chain, values[0]), (other, values[1])):
        # each name is set before it is read
        places = sorted(rng.random() for _ in members)
        lines = [f"VAR {members[0]} = {value}."]
        lines += [f"VAR {name} = VAR {before}." for before, name in zip(members, members[1:], strict=False)]
        hidden += list(zip(places, lines, strict=True))
    return _Puzzle(
        intro="Keep track of the variables in this text.\n\n",
        hidden=tuple(sorted(hidden)),
        question=f"\n\nQuestion: Which three variables hold the value {values[0]}?\nAnswer: They are VAR",
        answers=tuple(chain),
    )


def _common_words(rng: _Rng, number: int, source: _Source) -> _Puzzle:
    """A list of words of the text, five of which come again and again."""
    common = rng.sample(source.words, 5)
    rest = [word for word in source.words if word not in common]
    words = [rng.choice(rest) for _ in range(source.tokens)]
    # a fifth of the list: each common word is then one in 25, any other at most one in a few hundred
    for i in range(len(words)):
        if rng.random() < 0.2:
            words[i] = rng.choice(common)
    return _Puzzle(
        intro="Words of this list occur again and again:\n\n",
        question="\n\nQuestion: Which five words occur most often in the list?\nAnswer: The words are",
        answers=tuple(common),
        haystack=" " + " ".join(words),
    )


def _questions(rng: _Rng, number: int, source: _Source) -> _Puzzle:
    """A paragraph that answers a question, among paragraphs of other articles."""
    asked = source.questions[number % len(source.questions)]
    others = sorted({q.context for q in source.questions if q.article != asked.article})
    if not others:
        raise DataError("expected questions on at least two articles for the retrieval task qa, got one")
    rng.shuffle(others)
    depth = rng.random()
    return _Puzzle(
        intro="Answer the question by this text.\n\n",
        hidden=((depth, f"\n{asked.context}\n"),),
        question=f"\n\nQuestion: {asked.question}\nAnswer:",
        answers=asked.answers,
        depth=depth,
        haystack="\n\n".join(others),
    )


TASKS: dict[str, _Task] = {
    "needle": _needle,
    "multi-needle": _multi_needle,
    "variables": _variables,
    "common-words": _common_words,
    "qa": _questions,
}
"""What can be asked for. A task makes a puzzle from random numbers, the item's number and the source."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What puzzles are made from."""

    tokens: int
    words: list[str]
    """Words of the documents that are one token each after a space."""
    questions: Sequence[Question]


def retrieval_items(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str] = ("needle", "multi-needle", "variables", "common-words"),
    lengths: Sequence[int] = (512, 1024),
    num_items: int = 10,
    seed: int = 0,
    questions: Sequence[Question] | None = None,
) -> list[RetrievalItem]:
    """Items for every task and length. The same arguments give the same items.

    Args:
        documents: the text to hide in. It is read on from a random place, and from its start again if it is short.
        tokenizer: the model's.
        tasks: of `TASKS`.
        lengths: tokens of prompt and answer.
        num_items: of each task and length.
        seed: of everything drawn.
        questions: for the task "qa", on two articles or more.

    Raises:
        DataError: an unknown task, "qa" without questions, a length that does not hold the puzzle, no text.
    """
    for task in tasks:
        if task not in TASKS:
            raise DataError(f"expected a retrieval task among {', '.join(TASKS)}, got {task!r}")
    if "qa" in tasks and not questions:
        raise DataError("expected questions for the retrieval task qa, got none")
    if num_items < 1:
        raise DepthKVError(f"expected at least 1 item, got {num_items}")
    text = _Tokens(tokenizer)
    haystack = text("\n\n".join(document.text.strip() for document in documents))
    if not haystack:
        raise DataError("expected documents with text to hide something in, got none")
    words = _one_token_words(documents, text) if "common-words" in tasks else []
    items = []
    for task in tasks:
        for length in lengths:
            source = _Source(tokens=length, words=words, questions=questions or ())
            for i in range(num_items):
                rng = random.Random(f"{seed}:{task}:{length}:{i}")
                puzzle = TASKS[task](rng, i, source)
                straw = haystack if puzzle.haystack is None else text(puzzle.haystack)
                start = rng.randrange(len(straw)) if puzzle.haystack is None else 0
                prompt = _assemble(text, puzzle, straw, start, length - ANSWER_TOKENS)
                if prompt is None:
                    raise DataError(f"expected more than {length} tokens for the retrieval task {task}, got {length}")
                items.append(
                    RetrievalItem(
                        task=task,
                        tokens=length,
                        prompt=tuple(prompt),
                        answers=puzzle.answers,
                        depth=puzzle.depth,
                        name=f"{task}:{length}:{i}",
                    )
                )
    return items


def retrieve(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[RetrievalItem],
    *,
    make_cache: MakeCache | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[float]:
    """The share of each item's answers that the model writes, per cent, under whatever is applied to it.

    Args:
        model: a causal language model of transformers in evaluation mode.
        tokenizer: the model's.
        items: from `retrieval_items`.
        make_cache: as for `write_tokens`.
        batch_size: prompts of one length answered together; fewer where they are long.
        progress: called after each batch.
    """
    found = [0.0] * len(items)
    for length in sorted({len(item.prompt) for item in items}, reverse=True):
        chosen = [i for i, item in enumerate(items) if len(item.prompt) == length]
        written = write_tokens(
            model,
            tokenizer,
            [items[i].prompt for i in chosen],
            max_new_tokens=ANSWER_TOKENS,
            batch_size=max(1, min(batch_size, _BATCH_TOKENS // length)),
            make_cache=make_cache,
            progress=progress,
        )
        for i, tokens in zip(chosen, written, strict=True):
            found[i] = item_score(items[i], tokenizer.decode(tokens, skip_special_tokens=True))
    return found


def item_score(item: RetrievalItem, text: str) -> float:
    """The share of the answers that `text` holds, per cent; of a "qa" item's, one is enough."""
    # a number must not count for being part of a longer one
    hits = [re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None for answer in item.answers]
    return 100.0 * any(hits) if item.task == "qa" else 100.0 * sum(hits) / len(hits)


def summarize(
    items: Sequence[RetrievalItem], scores: Sequence[float], baseline: Sequence[float] | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """The section "retrieval" of `evaluate --json`: all items, by task and length, and the needle by depth.

    Args:
        items: from `retrieval_items`.
        scores: from `retrieve`.
        baseline: the full cache's.
        seed: of the bootstrap over items.
    """

    def over(chosen: Sequence[int]) -> dict[str, Any]:
        base = None if baseline is None else [baseline[i] for i in chosen]
        return score([scores[i] for i in chosen], [items[i].name for i in chosen], base, seed=seed).to_dict()

    tasks: dict[tuple[str, int], list[int]] = {}
    depths: dict[tuple[int, float], list[int]] = {}
    for i, item in enumerate(items):
        tasks.setdefault((item.task, item.tokens), []).append(i)
        if item.task == "needle" and item.depth is not None:
            depths.setdefault((item.tokens, item.depth), []).append(i)
    return {
        "score": over(range(len(items))),
        "tasks": [{"task": task, "tokens": n, "score": over(chosen)} for (task, n), chosen in tasks.items()],
        "depths": [{"tokens": n, "depth": d, "score": over(chosen)} for (n, d), chosen in sorted(depths.items())],
    }


class _Tokens:
    """The tokenizer, without special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.start = _start_tokens(tokenizer)
        self._ends: dict[int, bool] = {}

    def __call__(self, text: str) -> list[int]:
        # verbose=False: a text longer than the model's context is what we want here, so no warning about it
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return tokens

    def ends_sentence(self, token: int) -> bool:
        """Whether something may be put after this token."""
        if token not in self._ends:
            text = str(self._tokenizer.decode([token]))
            self._ends[token] = "\n" in text or text.rstrip().endswith((".", "!", "?"))
        return self._ends[token]


def _assemble(text: _Tokens, puzzle: _Puzzle, straw: list[int], start: int, wanted: int) -> list[int] | None:
    """The prompt's tokens, exactly `wanted`; None where they are too few."""
    intro, question = text.start + text(puzzle.intro), text(puzzle.question)
    hidden = [(depth, text(f"\n{piece}\n")) for depth, piece in puzzle.hidden]
    room = wanted - len(intro) - len(question) - sum(len(piece) for _, piece in hidden)
    if room < len(hidden) + 1:
        return None
    hay = [straw[(start + i) % len(straw)] for i in range(room)]
    ends = [0, *(i + 1 for i, token in enumerate(hay) if text.ends_sentence(token)), room]
    prompt, done = intro, 0
    # nearest sentence end; the order by depth is kept, as later lines may refer to earlier ones
    for depth, piece in sorted(hidden, key=lambda pair: pair[0]):
        at = max(done, min(ends, key=lambda end: abs(end - depth * room)))
        prompt = prompt + hay[done:at] + piece
        done = at
    return prompt + hay[done:] + question


def _one_token_words(documents: Sequence[Document], text: _Tokens) -> list[str]:
    """Words of at least four letters that are one token each after a space: lists of them have an exact length."""
    seen = sorted({word for document in documents for word in re.findall(r"\b[a-z0-9]{2,}\b", document.text[:50_000])})
    words = [word for word in seen if len(text(f" {word}")) == 1]
    if len(words) < 10:
        raise DataError(f"expected at least 10 words of one token each for the task common-words, got {len(words)}")
    return [word for word in words if len(word) >= 4] if sum(len(word) >= 4 for word in words) >= 10 else words


__all__ = [
    "ANSWER_TOKENS",
    "DEPTHS",
    "TASKS",
    "RetrievalItem",
    "item_score",
    "retrieval_items",
    "retrieve",
    "summarize",
]
