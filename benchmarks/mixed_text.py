"""Inputs of five sorts for the adaptive benchmarks: prose, code, tables, repetition, and looking things up.

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
        for document, text in _MAKERS[sort](test):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) < tokens:
                continue
            rows.append(torch.tensor(ids[:tokens]))
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


def _prose(test: bool) -> Iterator[tuple[str, str]]:
    rng = random.Random(f"prose {test}")
    documents = [d for d in _parts(test) if len(d.text) > 8000]
    for number in range(10_000):
        document = documents[number % len(documents)]
        start = rng.randrange(len(document.text) - 6000)
        yield document.name, document.text[document.text.index(" ", start) + 1 :][:6000]


def _code(test: bool) -> Iterator[tuple[str, str]]:
    rng = random.Random("code")
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    files = [file for file in files if 8000 < file.stat().st_size < 100_000]
    rng.shuffle(files)
    for file in files[test::2]:
        text = file.read_text(encoding="utf-8", errors="replace")
        start = text.index("\n", rng.randrange(len(text) - 6000)) + 1
        yield file.name, text[start:][:6000]


def _tables(test: bool) -> Iterator[tuple[str, str]]:
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
        yield f"{file.name} {number}", "\n".join([head, *rows[:200]])


def _repetition(test: bool) -> Iterator[tuple[str, str]]:
    """A few sentences again and again, numbered, as in logs and forms."""
    rng = random.Random(f"repetition {test}")
    for document, text in _prose(test):
        words = text.split()
        start = rng.randrange(200)
        part = " ".join(words[start : start + rng.randrange(20, 60)])
        yield document, "\n".join(f"{number}. {part}" for number in range(1, 60))


def _lookup(test: bool) -> Iterator[tuple[str, str]]:
    """Eight numbers hidden in prose; then each is asked for, twice in a random order."""
    rng = random.Random(f"lookup {test}")
    haystack = Haystack(_parts(test))
    while True:
        keys = rng.sample(WORDS, 8)
        numbers = {key: str(rng.randrange(1000, 10_000)) for key in keys}
        facts = [f"The special number of {key} is {numbers[key]}." for key in keys]
        start, document = haystack.draw(rng)
        places = sorted(rng.random() for _ in facts)
        asked = [key for _ in range(4) for key in rng.sample(keys, 8)]
        answers = [f"The special number of {key} is {numbers[key]}." for key in asked]
        yield document, haystack.hide(facts, places, start, 105) + "\n\nAgain:\n" + "\n".join(answers)


_MAKERS: dict[str, Callable[[bool], Iterator[tuple[str, str]]]] = {
    "prose": _prose,
    "code": _code,
    "tables": _tables,
    "repetition": _repetition,
    "lookup": _lookup,
}
