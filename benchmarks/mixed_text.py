"""Inputs of several sorts for the adaptive benchmarks: prose, code, tables, repetition, and looking things up.

Each is `tokens` long: the first half is the prompt, on which a router decides, the second half is scored. Calibration
and test share no document. Everything is made from what the machine has: held-out prose of a built-in text, the source
of Python's standard library, and the CSV files of scikit-learn.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from depthkv.data import Document, resolve_data, split_documents
from depthkv.evaluate.haystack import WORDS, Haystack

SORTS = ("prose", "code", "tables", "repetition", "lookup")
"""A further one is "recall": what is to be looked up lies at the very beginning, and is asked for at the very end."""


Made = tuple[str, str, str]
"""Name of the document, text, and what the input ends with."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Token ids `[inputs, tokens]`, and what each is."""

    tokens: torch.Tensor
    sorts: list[str]
    documents: list[str]


def mixed_inputs(tokenizer: Any, *, tokens: int, per_sort: int, test: bool, sorts: Sequence[str] = SORTS) -> Inputs:
    """`per_sort` inputs of each sort; calibration inputs, or test inputs that share no document with them."""
    rows, names, documents = [], [], []
    for sort in sorts:
        seen = 0
        for document, text, end in _MAKERS[sort](test, max(6000, 8 * tokens)):
            ids, last = (tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in (text, end))
            if len(ids) + len(last) < tokens:
                continue
            rows.append(torch.tensor(ids[: tokens - len(last)] + last))
            names.append(sort)
            documents.append(f"{sort}: {document}")
            seen += 1
            if seen == per_sort:
                break
        else:
            raise SystemExit(f"expected text for {per_sort} inputs of sort {sort}, got text for {seen}")
    return Inputs(tokens=torch.stack(rows), sorts=names, documents=documents)


def _parts(test: bool) -> list[Document]:
    """Held-out prose, half of its documents for each use."""
    _, held_out = split_documents(resolve_data("builtin:anarchism"))
    halves = split_documents(held_out, held_out_fraction=0.5, seed=2)
    return halves[test]


def _prose(test: bool, size: int) -> Iterator[Made]:
    rng = random.Random(f"prose {test}")
    documents = [d for d in _parts(test) if len(d.text) > size + 2000]
    for number in range(10_000):
        document = documents[number % len(documents)]
        start = rng.randrange(len(document.text) - size)
        yield document.name, document.text[document.text.index(" ", start) + 1 :][:size], ""


def _code(test: bool, size: int) -> Iterator[Made]:
    rng = random.Random("code")
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    files = [file for file in files if size + 2000 < file.stat().st_size < 100_000]
    rng.shuffle(files)
    for file in files[test::2]:
        text = file.read_text(encoding="utf-8", errors="replace")
        start = text.index("\n", rng.randrange(len(text) - size)) + 1
        yield file.name, text[start:][:size], ""


def _tables(test: bool, size: int) -> Iterator[Made]:
    import sklearn.datasets

    rng = random.Random(f"tables {test}")
    folder = Path(sklearn.datasets.__file__).parent / "data"
    files = ["iris.csv", "diabetes_data_raw.csv.gz"] if test else ["wine_data.csv", "breast_cancer.csv"]
    import gzip

    for number in range(10_000):
        file = folder / files[number % 2]
        opened = gzip.open(file, "rt") if file.suffix == ".gz" else file.open()
        with opened as lines:
            head, *rows = lines.read().splitlines()
        rng.shuffle(rows)
        yield f"{file.name} {number}", "\n".join([head, *rows])[:size], ""


def _repetition(test: bool, size: int) -> Iterator[Made]:
    """A few sentences again and again, numbered, as in logs and forms."""
    rng = random.Random(f"repetition {test}")
    for document, text, _ in _prose(test, 6000):
        words = text.split()
        start = rng.randrange(200)
        part = " ".join(words[start : start + rng.randrange(20, 60)])
        yield document, "\n".join(f"{number}. {part}" for number in range(1, 400))[:size], ""


def _lookup(test: bool, size: int) -> Iterator[Made]:
    """Eight numbers hidden in prose; then each is asked for, twice in a random order."""
    rng = random.Random(f"lookup {test}")
    haystack = Haystack(_parts(test))
    while True:
        keys = rng.sample(WORDS, 8)
        numbers = {key: str(rng.randrange(1000, 10_000)) for key in keys}
        facts = [f"The special number of {key} is {numbers[key]}." for key in keys]
        start, document = haystack.draw(rng)
        places = sorted(rng.random() for _ in facts)
        asked = [key for _ in range(max(4, size // 1500)) for key in rng.sample(keys, 8)]
        answers = [f"The special number of {key} is {numbers[key]}." for key in asked]
        yield document, haystack.hide(facts, places, start, 105) + "\n\nAgain:\n" + "\n".join(answers), ""


def _recall(test: bool, size: int) -> Iterator[Made]:
    """Four numbers, then prose, and at the very end each number once more."""
    rng = random.Random(f"recall {test}")
    for document, text, _ in _prose(test, size):
        keys = rng.sample(WORDS, 4)
        facts = [f"The special number of {key} is {rng.randrange(1000, 10_000)}." for key in keys]
        start, end = "\n".join(facts), "\n\nAgain:\n" + "\n".join(rng.sample(facts, 4))
        yield document, f"{start}\n\n{text}", end


_MAKERS: dict[str, Callable[[bool, int], Iterator[Made]]] = {
    "prose": _prose,
    "code": _code,
    "tables": _tables,
    "repetition": _repetition,
    "lookup": _lookup,
    "recall": _recall,
}
