"""Text in, blocks of tokens out: reading files and folders, holding documents out, cutting into equal blocks.

Text is always read as UTF-8; bytes that are not UTF-8 become U+FFFD, and a file with NUL bytes is refused as binary.
"""

from __future__ import annotations

import bisect
import gzip
import json
import os
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from depthkv.downloads import Progress, fetch_text
from depthkv.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Document", "named_blocks", "read_texts", "resolve_data", "split_documents", "token_blocks"]

BUILTIN_TEXTS = ("anarchism", "brown", "fallback")
"""What `builtin:NAME` can name; the first two are downloaded, "fallback" is part of the package."""

_BUILTIN_MIN_PARAGRAPH_WORDS = 25
"""Shorter paragraphs of built-in texts are headings, lists and navigation."""

_SUFFIXES = (".txt", ".md", ".jsonl")


@dataclass(frozen=True)
class Document:
    """One text that belongs together: a file, or a line of a .jsonl file."""

    name: str
    """Where it came from, for messages: a file name, with `:LINE` for .jsonl."""
    text: str


def resolve_data(name: str | os.PathLike[str], progress: Progress | None = None) -> list[Document]:
    """The documents of `builtin:NAME` or of a file or folder.

    Built-in texts lose their paragraphs of fewer than 25 words; a user's text is kept whole.

    Args:
        name: `builtin:anarchism`, `builtin:brown`, `builtin:fallback` or a path, see `read_texts`.
        progress: gets one line before a download, which by default goes to stderr, and one about files left out.

    Raises:
        DataError: an unknown built-in, a failed download, or text that cannot be read.
    """
    if not isinstance(name, str) or not name.startswith("builtin:"):
        return read_texts(name, progress=progress)
    short = name.removeprefix("builtin:")
    if short not in BUILTIN_TEXTS:
        choices = ", ".join(f"builtin:{text}" for text in BUILTIN_TEXTS)
        raise DataError(f"expected a path or one of {choices}, got {name!r}")
    if short == "fallback":
        return _fallback()
    return read_texts(fetch_text(short, progress), min_paragraph_words=_BUILTIN_MIN_PARAGRAPH_WORDS)


def read_texts(
    path: str | os.PathLike[str], *, min_paragraph_words: int = 0, progress: Progress | None = None
) -> list[Document]:
    """Read a text file, or every .txt, .md and .jsonl file (plain or .gz) in a folder and its subfolders.

    Args:
        path: a file or folder. A .jsonl file holds one object with a "text" string on every line, each a document;
            any other file is one document. Hidden files and folders inside a folder are skipped.
        min_paragraph_words: paragraphs (parted by blank lines) with fewer words are dropped; 0 keeps the text whole.
        progress: gets one line if a folder has files of other types, which are left out.

    Returns:
        The documents that hold any text, in the order of their paths.

    Raises:
        DataError: a missing path, a damaged or binary file, a .jsonl line without text, no text at all.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        seen = sorted(file for file in root.rglob("*") if _is_visible_file(file, root))
        files = [file for file in seen if _is_text_file(file)]
        if not files:
            raise DataError(f"expected .txt, .md or .jsonl files (or these with .gz) in {root}, got none")
        if progress is not None and (others := len(seen) - len(files)):
            example = next(file.name for file in seen if not _is_text_file(file))
            progress(f"{root}: {others} files of other types than .txt, .md and .jsonl left out, such as {example}")
    elif root.exists():
        files = [root]
    else:
        raise DataError(f"expected a text file or folder, got {str(path)!r}, which does not exist")
    documents = []
    for file in files:
        shown = file.relative_to(root).as_posix() if root.is_dir() else file.name
        for document in _read_file(file, shown):
            text = _long_paragraphs(document.text, min_paragraph_words) if min_paragraph_words else document.text
            if text.strip():
                documents.append(Document(document.name, text))
    if not documents:
        raise DataError(f"expected text in {root}, got only empty or blank files")
    return documents


def split_documents(
    documents: Sequence[Document], held_out_fraction: float = 0.1, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Part the documents into training and held-out ones, the same way every time for the same arguments.

    Whole documents are held out, drawn at random until they come to at most `held_out_fraction` of the characters.
    Where every document is larger than that, as with a single one, the longest is cut and its tail is held out.

    Returns:
        (train, held_out), each in the order of `documents`, neither empty.

    Raises:
        DataError: no documents, a fraction outside (0, 1), or a text of fewer than two words.
    """
    if not 0 < held_out_fraction < 1:
        raise DataError(f"expected a held-out fraction above 0 and below 1, got {held_out_fraction}")
    if not documents:
        raise DataError("expected documents to split, got none")
    sizes = [len(document.text) for document in documents]
    budget = held_out_fraction * sum(sizes)
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    chosen: set[int] = set()
    for index in order:
        if sizes[index] <= budget:
            chosen.add(index)
            budget -= sizes[index]
    if chosen:
        train = [document for i, document in enumerate(documents) if i not in chosen]
        return train, [documents[i] for i in sorted(chosen)]
    longest = max(range(len(documents)), key=lambda i: sizes[i])
    head, tail = _cut_tail(documents[longest], round(budget))
    return [*documents[:longest], head, *documents[longest + 1 :]], [tail]


def token_blocks(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> torch.LongTensor:
    """Tokenize, join the documents with the end-of-text token, and cut the stream into equal blocks.

    A tokenizer that starts every text with a special token (Gemma, Llama 2) gets it at the start of every block:
    such models are lost without it. What does not fill a last block is dropped.

    Returns:
        int64 tensor [blocks, block_size].

    Raises:
        DataError: a block size below 2, or a text shorter than one block.
    """
    return named_blocks(documents, tokenizer, block_size)[0]


def named_blocks(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> tuple[torch.LongTensor, list[str]]:
    """`token_blocks`, and the name of the document that each block starts in.

    Raises:
        DataError: as `token_blocks`.
    """
    if block_size < 2:
        raise DataError(f"expected a block size of 2 tokens or more, got {block_size}")
    prefix = _start_tokens(tokenizer)
    width = block_size - len(prefix)
    separator = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    stream: list[int] = []
    ends: list[int] = []
    # verbose=False: a document longer than the model's context is what we want here, so no warning about it
    texts = [document.text for document in documents]
    encoded: Any = tokenizer(texts, add_special_tokens=False, verbose=False) if texts else {"input_ids": []}
    for tokens in encoded["input_ids"]:
        stream += tokens
        stream += separator
        ends.append(len(stream))
    num_blocks = len(stream) // width
    if num_blocks == 0:
        raise DataError(f"expected text of at least {width} tokens for one block, got {len(stream)}")
    blocks = torch.tensor(stream[: num_blocks * width], dtype=torch.long).view(num_blocks, width)
    if prefix:
        blocks = torch.cat([torch.tensor(prefix, dtype=torch.long).expand(num_blocks, -1), blocks], dim=1)
    names = [documents[bisect.bisect_right(ends, i * width)].name for i in range(num_blocks)]
    return torch.LongTensor(blocks), names


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin-of-text token where the tokenizer puts one by itself, else nothing."""
    if tokenizer.bos_token_id is None:
        return []
    tokens: Any = tokenizer("a")["input_ids"]
    return [int(tokens[0])] if tokens and tokens[0] == tokenizer.bos_token_id else []


def _is_visible_file(file: Path, root: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)


def _is_text_file(file: Path) -> bool:
    return file.name.lower().removesuffix(".gz").endswith(_SUFFIXES)


def _read_file(file: Path, shown: str) -> Iterator[Document]:
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix.lower() == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as problem:
        raise DataError(f"expected a readable text file, got {file}: {problem}") from problem
    if b"\0" in data:
        raise DataError(f"expected UTF-8 text, got {file}, which is binary")
    text = data.decode("utf-8-sig", "replace").replace("\r\n", "\n").replace("\r", "\n")
    if file.name.lower().removesuffix(".gz").endswith(".jsonl"):
        yield from _json_lines(text, file, shown)
    else:
        yield Document(shown, text)


def _json_lines(text: str, file: Path, shown: str) -> Iterator[Document]:
    # not splitlines(): that also parts at U+2028, which may stand inside a JSON string
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise DataError(f"expected a JSON object on line {number} of {file}, got {problem}") from problem
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise DataError(f'expected an object with a "text" string on line {number} of {file}, got {line[:60]!r}')
        yield Document(f"{shown}:{number}", record["text"])


def _long_paragraphs(text: str, min_words: int) -> str:
    kept = [part.strip("\n") for part in re.split(r"\n\s*\n", text) if len(part.split()) >= min_words]
    return "\n\n".join(kept) + "\n" if kept else ""


def _cut_tail(document: Document, tail_chars: int) -> tuple[Document, Document]:
    """Cut at the first paragraph's end in the tail, else between words."""
    text = document.text.rstrip()
    start = max(1, len(text) - max(1, tail_chars))
    for boundary in (r"\n\s*\n", r"\s+"):
        # a boundary far into the tail would leave much less than was asked for
        limit = start + max(1, (len(text) - start) // 2)
        if match := re.compile(boundary).search(text, start, limit):
            break
    else:
        matches = list(re.finditer(r"\s+", text))
        match = matches[-1] if matches else None
    if match is None or not text[: match.start()].strip():
        raise DataError(f"expected at least two words to hold some out, got {document.name}: {text[:40]!r}")
    tail = Document(f"{document.name} (tail)", text[match.end() :])
    return Document(document.name, text[: match.start()]), tail


def _fallback() -> list[Document]:
    """The bundled essays: one document for each heading."""
    text = resources.files("depthkv").joinpath("texts/fallback.txt").read_text(encoding="utf-8")
    documents = []
    for section in re.split(r"^# ", text, flags=re.MULTILINE):
        title, _, body = section.strip().partition("\n")
        if body:
            documents.append(Document(f"fallback: {title}", _long_paragraphs(body, _BUILTIN_MIN_PARAGRAPH_WORDS)))
    return documents
