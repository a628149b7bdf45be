"""Does the model find what stands far back in a long prompt? Tasks after RULER (arXiv:2404.06654), from real text."""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from depthkv.data import Document, _start_tokens
from depthkv.errors import DataError, DepthKVError
from depthkv.evaluate.arms import MakeCache
from depthkv.evaluate.generation import Progress, write_lines
from depthkv.evaluate.haystack import TASKS, Draft, Haystack, Source, qa
from depthkv.evaluate.intervals import score
from depthkv.evaluate.qa import normalize_answer
from depthkv.qa import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 16384
"""Tokens of the prompts of one batch, with room for the answers, at most; a single prompt may have more."""

_TRIES = 8
"""Drafts of one item. Whole words fill a prompt to its last token in about two of three drafts."""


@dataclass(frozen=True, kw_only=True)
class RetrievalItem:
    """One prompt and what has to be found in it."""

    task: str
    """Of `depthkv.evaluate.haystack.TASKS`."""
    tokens: int
    """Length of prompt and answer together."""
    depth: float | None
    """Share of the text before the needle, 0 to 1; None for other tasks."""
    prompt_tokens: tuple[int, ...]
    answers: tuple[str, ...]
    """What has to occur in the first line written."""
    any_answer: bool
    """One of the answers is enough; otherwise the score is the share of them that occurs."""
    answer_tokens: int
    """Room for the answer."""
    document: str
    """What the text is from, for the bootstrap: a document's name, an article's title, or the item's own id."""

    def score(self, line: str) -> float:
        """Of what was written, 0 to 100. What else is in it does not matter, as with RULER's scores.

        Both are normalised as for SQuAD: case, punctuation and articles do not count.
        """
        written = normalize_answer(line)
        found = [normalize_answer(answer) in written for answer in self.answers]
        return 100.0 * any(found) if self.any_answer else 100 * sum(found) / len(found)


def retrieval_items(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    num_items: int,
    seed: int = 0,
    questions: Sequence[Question] | None = None,
    answer_tokens: int | None = None,
) -> list[RetrievalItem]:
    """Prompts of each task and length; the same arguments give the same ones.

    Text is taken from a random place on, in its order, from the first document again after the last, and never twice
    in a prompt. A prompt holds whole words, and fills its length up to the last token where a few tries can do that;
    so nearly all prompts of one task and length have the same number of tokens.

    Args:
        documents: text to hide something in.
        tokenizer: the model's.
        tasks: of `depthkv.evaluate.haystack.TASKS`.
        lengths: of prompt and answer together, tokens.
        num_items: of each task and length. Needles lie at five depths in turn, so a multiple of 5 is best.
        seed: of everything that is drawn.
        questions: for the task "qa". Those whose passage takes more than half of the length are not asked; where fewer
            than `num_items` remain, they are asked again among other passages.
        answer_tokens: room for the answer; by default the task's own.

    Raises:
        DepthKVError: an unknown task, a length too small for a task, or a number below 1.
        DataError: too little text for a length, or no questions that fit.
    """
    for task in tasks:
        if task not in TASKS:
            raise DepthKVError(f"expected a retrieval task among {', '.join(TASKS)}, got {task!r}")
    if not tasks or not lengths or num_items < 1 or (answer_tokens is not None and answer_tokens < 1):
        raise DepthKVError(
            "expected at least one task, length, item and answer token, "
            f"got {list(tasks)}, {list(lengths)}, {num_items} and {answer_tokens}"
        )
    haystack = Haystack(documents)
    encode = _Encoder(tokenizer)
    items = []
    for task in tasks:
        make, own_room = TASKS[task]
        room = own_room if answer_tokens is None else answer_tokens
        for tokens in lengths:
            source = Source(haystack=haystack)
            if make is qa:
                rng = random.Random(f"{seed}:{task}:{tokens}")
                asked = _fitting_questions(questions or (), encode, tokens, num_items, rng)
                source = Source(haystack=haystack, questions=asked, passages=questions or ())
            for i in range(num_items):
                draft, prompt = _fullest(source, encode, task, tokens, room, seed, i)
                items.append(
                    RetrievalItem(
                        task=task,
                        tokens=tokens,
                        depth=draft.depth,
                        prompt_tokens=tuple(prompt),
                        answers=draft.answers,
                        any_answer=draft.any_answer,
                        answer_tokens=room,
                        document=f"{task}:{tokens}:{i}" if draft.document is None else draft.document,
                    )
                )
    return items


def retrieve(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[RetrievalItem],
    *,
    make_cache: MakeCache | None = None,
    batch_size: int = 8,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> list[float]:
    """Score of each item, 0 to 100, from what the model writes greedily in one line.

    Args:
        model: a causal language model of transformers in evaluation mode, under whatever holds meanwhile.
        tokenizer: the model's.
        items: from `retrieval_items` with the same tokenizer.
        make_cache: as for `depthkv.evaluate.generation.write_tokens`.
        batch_size: prompts answered together.
        batch_tokens: fewer are, where they have more tokens than this in all.
        progress: called after each batch.

    Raises:
        DataError: no items.
        DepthKVError: a batch size below 1.
    """
    if not items:
        raise DataError("expected at least one item to retrieve, got none")
    if batch_size < 1:
        raise DepthKVError(f"expected a batch size of at least 1, got {batch_size}")
    groups: dict[tuple[int, int], list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault((item.tokens, item.answer_tokens), []).append(i)
    scores = [0.0] * len(items)
    # the longest first: what is too large for the memory fails at once
    for (tokens, answer_tokens), group in sorted(groups.items(), reverse=True):
        lines = write_lines(
            model,
            tokenizer,
            [items[i].prompt_tokens for i in group],
            max_new_tokens=answer_tokens,
            batch_size=max(1, min(batch_size, batch_tokens // tokens)),
            make_cache=make_cache,
            progress=progress,
        )
        for i, line in zip(group, lines, strict=True):
            scores[i] = items[i].score(line)
    return scores


def summarize(
    items: Sequence[RetrievalItem],
    scores: Sequence[float],
    baseline: Sequence[float] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Means with their intervals, for JSON: of everything, of each task and length, and of each depth of the needle.

    Args:
        items: what was asked.
        scores: of each.
        baseline: the full cache's score of each; None for the full cache itself.
        seed: of the bootstrap.

    Returns:
        {"score": S, "tasks": [{"task", "tokens", "score": S}], "depths": [{"tokens", "depth", "score": S}]}, where S
        is a `Score` as a dict, in per cent.

    Raises:
        DepthKVError: no items, or another number of scores.
    """
    if len(scores) != len(items):
        raise DepthKVError(f"expected as many scores as items, {len(items)}, got {len(scores)}")

    def part(chosen: Sequence[int]) -> dict[str, Any]:
        return score(
            [scores[i] for i in chosen],
            [items[i].document for i in chosen],
            None if baseline is None else [baseline[i] for i in chosen],
            seed=seed,
        ).to_dict()

    tasks: dict[tuple[str, int], list[int]] = {}
    depths: dict[tuple[int, float], list[int]] = {}
    for i, item in enumerate(items):
        tasks.setdefault((item.task, item.tokens), []).append(i)
        if item.depth is not None:
            depths.setdefault((item.tokens, item.depth), []).append(i)
    return {
        "score": part(range(len(items))),
        "tasks": [{"task": task, "tokens": tokens, "score": part(group)} for (task, tokens), group in tasks.items()],
        "depths": [
            {"tokens": tokens, "depth": depth, "score": part(group)}
            for (tokens, depth), group in sorted(depths.items())
        ],
    }


class _Encoder:
    """From text to token ids, with the token that the tokenizer starts every text with, if any."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._start = _start_tokens(tokenizer)

    def __call__(self, text: str) -> list[int]:
        # verbose=False: no warning about a text that is longer than the model's context
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self._start + tokens


def _fullest(
    source: Source, encode: _Encoder, task: str, tokens: int, room: int, seed: int, index: int
) -> tuple[Draft, list[int]]:
    """The first of a few drafts that fills the length exactly, or else the one that fills it best."""
    rng = random.Random(f"{seed}:{task}:{tokens}:{index}")
    found: list[tuple[Draft, list[int]]] = []
    while len(found) < _TRIES and not (found and len(found[-1][1]) == tokens - room):
        draft = TASKS[task][0](source, rng, index)
        found.append((draft, _fill(draft, encode, task, tokens, room)))
    return max(found, key=lambda pair: len(pair[1]))


def _fill(draft: Draft, encode: _Encoder, task: str, tokens: int, room: int) -> list[int]:
    """The draft's prompt with as much filler as fits."""
    limit = tokens - room
    if (shortest := len(encode(draft.text(draft.least)))) > limit:
        raise DepthKVError(f"expected a length of at least {shortest + room} tokens for the task {task}, got {tokens}")
    # a unit takes a token or more, except with the few tokenizers that merge words
    most = max(draft.least, 2 * limit if draft.most is None else min(2 * limit, draft.most))
    counts = range(draft.least, most + 1)
    # the first number of units that is too large
    too_many = bisect.bisect_left(counts, True, key=lambda count: len(encode(draft.text(count))) > limit)
    prompt = encode(draft.text(counts[too_many - 1]))
    if too_many == len(counts) and len(prompt) < limit:
        raise DataError(f"expected text for prompts of {limit} tokens of the task {task}, got enough for {len(prompt)}")
    return prompt


def _fitting_questions(
    questions: Sequence[Question], encode: _Encoder, tokens: int, count: int, rng: random.Random
) -> list[Question]:
    """Up to `count` questions that an answer counts for and whose context takes at most half of `tokens`."""
    chosen: list[Question] = []
    for question in rng.sample(list(questions), len(questions)):
        if len(chosen) == count:
            break
        if any(map(normalize_answer, question.answers)) and 2 * len(encode(question.context)) <= tokens:
            chosen.append(question)
    if not chosen:
        raise DataError(
            f"expected questions for the task qa whose passages have at most {tokens // 2} tokens, got "
            + (f"{len(questions)} with longer ones" if questions else "none")
        )
    return chosen
