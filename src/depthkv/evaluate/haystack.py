"""Prompts that hide something in real text, whatever their length: one small function for each task.

The tasks follow RULER (arXiv:2404.06654, section 3) and the needle-in-a-haystack test. The differences: everything
but the list of `common_words` and the passages of `qa` is filled up with the user's own text in its own order, and
counts scale with the length, so that 512 tokens are enough. Every prompt but that of `qa` ends in the beginning of its
answer: a model that was never taught to follow instructions can go on from there.
"""

from __future__ import annotations

import bisect
import itertools
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from depthkv.data import Document
from depthkv.errors import DataError
from depthkv.evaluate.qa import normalize_answer
from depthkv.qa import Question, prompt

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the single needle lies in turn: share of the text that comes before it."""

NEEDLES = 4
"""Of a multi-needle prompt; one is asked for."""

CHAINS = 2
"""Of variables; the value of one is asked for."""

CHAIN_VARIABLES = 3
"""That hold one value: the first is given the value itself, each other one the variable before it."""

COMMON_WORDS = 5
"""To be named; together they make up a quarter of the list."""

SHIFT = 20
"""Units of text by which something hidden is moved at most, to lie between two sentences."""

_SENTENCE_END = re.compile("[.!?][\"')\\]\u201d\u2019]* $|[\u3002\uff01\uff1f]$")
"""Of a unit; the escapes are curly quotes and the full-width marks of Chinese and Japanese."""

WORDS = tuple(
    """
    anchor apple arrow autumn bakery balloon banana basket blanket bottle bridge bucket button cactus camera
    candle carpet castle cherry circle coffee copper corner cotton cradle crystal curtain desert diamond doctor
    dragon engine falcon farmer feather fiddle finger flower forest fountain garden garlic giraffe glacier
    guitar hammer harbor helmet honey island jacket jungle kettle kitchen ladder lantern lemon library lizard
    magnet marble meadow mirror monkey mountain needle ocean orange oyster palace panther parrot pebble pencil
    pepper piano pigeon pillow planet pocket potato rabbit ribbon river rocket saddle sailor shadow silver
    spider statue tailor temple thunder ticket tiger tunnel turtle valley violin walnut whistle window winter
    wizard
    """.split()
)
"""Keys of needles and the words of lists. None is part of another, so that finding one means just that."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A prompt whose length is still open."""

    text: Callable[[int], str]
    """The prompt with so many units of filler."""
    least: int = 0
    """Units of filler that it makes sense with."""
    most: int | None
    """Units of filler that there are; None where there is no limit."""
    answers: tuple[str, ...]
    any_answer: bool = False
    """One of the answers is enough; otherwise each of them counts."""
    depth: float | None = None
    """Share of the filler before what is asked for, where it was chosen."""
    document: str | None = None
    """What it is made from; None where it is from no document."""


class Haystack:
    """The words of all documents in order, as a ring: after the last document comes the first.

    Runs without spaces, as in Chinese, are parted every 16 characters. Such a part or a word is a *unit*.
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        self._units: list[str] = []
        self._names = [document.name for document in documents if document.text.strip()]
        self._starts: list[int] = []
        for document in documents:
            found = re.findall(r"(\S{1,16})(\s*)", document.text.strip())
            if found:
                self._starts.append(len(self._units))
                self._units += [unit + " " * bool(space) for unit, space in found[:-1]] + [found[-1][0] + " "]
        if not self._units:
            raise DataError("expected text to hide something in, got none")
        last = {start - 1 for start in self._starts[1:]} | {len(self._units) - 1}
        self._ends = [i in last or _SENTENCE_END.search(unit) is not None for i, unit in enumerate(self._units)]

    def __len__(self) -> int:
        return len(self._units)

    def draw(self, rng: random.Random) -> tuple[int, str]:
        """The unit after a random end of a sentence, and the name of its document."""
        at = rng.randrange(len(self))
        start = next((i + 1 for i in range(at, len(self)) if self._ends[i]), 0) % len(self)
        return start, self._names[bisect.bisect_right(self._starts, start) - 1]

    def hide(self, sentences: Sequence[str], places: Sequence[float], start: int, count: int) -> str:
        """`count` units from `start` on with the sentences among them.

        Args:
            sentences: in the order of `places`.
            places: share of the units before each, 0 to 1, rising. Each is moved to the nearest end of a sentence,
                by `SHIFT` units at most.
            start: index of the first unit.
            count: at most as many as there are.
        """
        size = len(self)
        units = [self._units[(start + i) % size] for i in range(count)]
        ends = [0, *(i + 1 for i in range(count) if self._ends[(start + i) % size]), count]
        parts: list[str] = []
        done = 0
        for sentence, place in zip(sentences, places, strict=True):
            wanted = round(place * count)
            near = min(ends, key=lambda end: abs(end - wanted))
            at = near if abs(near - wanted) <= SHIFT else wanted
            parts += ["".join(units[done:at]).strip(), sentence]
            done = at
        parts.append("".join(units[done:]).strip())
        return " ".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """What prompts are made from."""

    haystack: Haystack
    questions: Sequence[Question] = ()
    """To be asked, one after another."""
    passages: Sequence[Question] = ()
    """Whose contexts are distractors."""


Make = Callable[[Source, random.Random, int], Draft]
"""From the source, a random state and the item's number to its draft."""


def needle(source: Source, rng: random.Random, index: int) -> Draft:
    """One sentence with a number, at each of `DEPTHS` in turn."""
    (key,), (number,) = rng.sample(WORDS, 1), _numbers(rng, 1)
    return _needles(source, rng, [key], [number], [DEPTHS[index % len(DEPTHS)]], asked=0)


def multi_needle(source: Source, rng: random.Random, index: int) -> Draft:
    """`NEEDLES` such sentences with different keys at random places; one is asked for (RULER's multi-key task)."""
    keys, numbers = rng.sample(WORDS, NEEDLES), _numbers(rng, NEEDLES)
    return _needles(source, rng, keys, numbers, None, asked=rng.randrange(NEEDLES))


def variables(source: Source, rng: random.Random, index: int) -> Draft:
    """Assignments of values and of other variables, scattered; which ones hold a value is asked (variable tracking)."""
    names: dict[str, None] = {}
    while len(names) < CHAINS * CHAIN_VARIABLES:
        names["".join(rng.choices(string.ascii_uppercase, k=5))] = None
    values = _numbers(rng, CHAINS)
    chains = [list(names)[i::CHAINS] for i in range(CHAINS)]
    waiting = [
        iter([f"VAR {chain[0]} = {value}.", *(f"VAR {b} = VAR {a}." for a, b in itertools.pairwise(chain))])
        for chain, value in zip(chains, values, strict=True)
    ]
    turns = [i for i in range(CHAINS) for _ in range(CHAIN_VARIABLES)]
    rng.shuffle(turns)  # the chains mix, and each keeps its own order
    sentences = [next(waiting[i]) for i in turns]
    places = sorted(rng.random() for _ in sentences)
    start, document = source.haystack.draw(rng)
    asked = rng.randrange(CHAINS)
    intro = "Some variables are given values in the following text."
    question = f"Which variables have the value {values[asked]}?"
    # small models go on with names only where one has begun
    answer = f"The {CHAIN_VARIABLES} variables that have the value {values[asked]} are VAR"
    return Draft(
        text=lambda n: _ask(intro, source.haystack.hide(sentences, places, start, n), question, answer),
        most=len(source.haystack),
        answers=tuple(chains[asked]),
        document=document,
    )


def common_words(source: Source, rng: random.Random, index: int) -> Draft:
    """A list in which some words come at least three times as often as any other; all of these are asked for."""
    words = rng.sample(WORDS, len(WORDS))
    common, others = words[:COMMON_WORDS], words[COMMON_WORDS:]
    order = rng.random()

    def listed(count: int) -> str:
        # each word of the two kinds as often as any other of its kind, as far as that is possible
        often = count // (4 * COMMON_WORDS)
        items = common * often + [others[i % len(others)] for i in range(count - COMMON_WORDS * often)]
        random.Random(order).shuffle(items)
        return ", ".join(items) + "."

    intro = "Some words come often in the following list, others come rarely."
    question = f"Which {COMMON_WORDS} words come most often in the list?"
    answer = f"The {COMMON_WORDS} most common words are"
    return Draft(
        text=lambda n: _ask(intro, listed(n), question, answer),
        # there the common words come three times and the others once
        least=12 * COMMON_WORDS,
        most=None,
        answers=tuple(common),
    )


def qa(source: Source, rng: random.Random, index: int) -> Draft:
    """A question and the passage that answers it, at a random place among passages of other articles.

    None of these holds an answer by chance; the last one is cut where the prompt is full. The prompt is that of
    `depthkv.qa`, so that a model that was trained on such questions knows it.
    """
    asked = source.questions[index % len(source.questions)]
    answers = [answer.lower() for answer in asked.answers]
    others = list(dict.fromkeys(other.context for other in source.passages if other.article != asked.article))
    others = [other for other in others if not any(answer in other.lower() for answer in answers)]
    rng.shuffle(others)
    words = [other.split() for other in others]
    place = rng.random()

    def passages(count: int) -> str:
        kept: list[str] = []
        for passage in words:
            if count <= 0:
                break
            kept.append(" ".join(passage[:count]))
            count -= len(passage)
        kept.insert(round(place * len(kept)), " ".join(asked.context.split()))
        return prompt(replace(asked, context="\n\n".join(kept)))

    return Draft(
        text=passages,
        most=sum(len(passage) for passage in words),
        answers=tuple(answer for answer in asked.answers if normalize_answer(answer)),
        any_answer=True,
        document=asked.article,
    )


TASKS: dict[str, tuple[Make, int]] = {
    "needle": (needle, 16),
    "multi-needle": (multi_needle, 16),
    "variables": (variables, 40),
    "common-words": (common_words, 32),
    "qa": (qa, 32),
}
"""Name to what makes a prompt, and the tokens of room that are left for the answer."""


def _needles(
    source: Source,
    rng: random.Random,
    keys: Sequence[str],
    numbers: Sequence[str],
    depths: Sequence[float] | None,
    asked: int,
) -> Draft:
    sentences = [f"The special number of {key} is {number}." for key, number in zip(keys, numbers, strict=True)]
    places = depths if depths is not None else sorted(rng.random() for _ in keys)
    start, document = source.haystack.draw(rng)
    hidden = "A special number is" if len(keys) == 1 else "Special numbers are"
    intro = f"{hidden} hidden in the following text."
    question = f"What is the special number of {keys[asked]}?"
    answer = f"The special number of {keys[asked]} is"
    return Draft(
        text=lambda n: _ask(intro, source.haystack.hide(sentences, places, start, n), question, answer),
        most=len(source.haystack),
        answers=(numbers[asked],),
        depth=None if depths is None else depths[asked],
        document=document,
    )


def _numbers(rng: random.Random, count: int) -> list[str]:
    """Different numbers of six digits."""
    return [str(number) for number in rng.sample(range(100_000, 1_000_000), count)]


def _ask(intro: str, text: str, question: str, answer: str) -> str:
    return f"{intro}\n\n{text}\n\nQuestion: {question}\nAnswer: {answer}"
