"""All suites over all arms, in the form that `depthkv evaluate --json` writes. The first arm is what others are
compared with, item by item."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from depthkv.data import Document, named_blocks
from depthkv.errors import DataError, DepthKVError
from depthkv.evaluate.arms import Arm
from depthkv.evaluate.generation import write_tokens
from depthkv.evaluate.health import Health, health
from depthkv.evaluate.intervals import Score, score
from depthkv.evaluate.perplexity import spread
from depthkv.evaluate.qa import answer, answer_scores
from depthkv.evaluate.retrieval import RetrievalItem, retrieval_items, retrieve, summarize
from depthkv.evaluate.text import Reading, read_text
from depthkv.memory import cache_bytes, kv_bytes_per_token
from depthkv.plan import SharingPlan
from depthkv.qa import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EvaluateConfig", "Evaluation"]

SUITES = ("perplexity", "agreement", "generation", "qa", "retrieval")
"""What can be measured."""

Progress = Callable[[int], None]
"""Called with units of work done; `Evaluation.units` says how many there are."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to measure, and on how much.

    Raises:
        DepthKVError: an unknown suite, or a number that is too small.
    """

    suites: tuple[str, ...] = ("perplexity",)
    """Of `SUITES`. The first two share their work."""
    block_size: int = 512
    """Tokens of a block of text."""
    blocks: int = 16
    """Of each kind of text, spread over its documents."""
    streamed_prompt: int | None = None
    """Tokens of each block that are read as a prompt; the others are read through the cache, and only they are
    predicted: see `depthkv.evaluate.text.read_text`. Needed for recipes. None reads blocks in a single forward."""
    batch_size: int = 4
    """Blocks or prompts in one forward."""
    prompts: int = 8
    """Texts to go on from, for each kind of text."""
    prompt_tokens: int = 64
    new_tokens: int = 64
    """The least room that the generation suite gives a text."""
    samples: int = 2
    """Texts that are kept in the result, for reading."""
    questions: int = 100
    """Of those in the file, spread over it."""
    lengths: tuple[int, ...] = (512, 1024)
    """Of the retrieval suite's prompts, tokens."""
    items: int = 10
    """Of each retrieval task and length."""
    tasks: tuple[str, ...] = ("needle", "multi-needle", "variables", "common-words")
    """Of the retrieval suite; "qa" is added where there are questions."""
    seed: int = 0
    """Of what is drawn: needles, and the bootstrap's documents."""

    def __post_init__(self) -> None:
        for suite in self.suites:
            if suite not in SUITES:
                raise DepthKVError(f"expected a suite among {', '.join(SUITES)}, got {suite!r}")
        least = dict.fromkeys(
            ("blocks", "batch_size", "prompts", "prompt_tokens", "new_tokens", "questions", "items"), 1
        )
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise DepthKVError(f"expected {name} of at least {smallest}, got {getattr(self, name)}")
        prompt = self.streamed_prompt
        if prompt is not None and not 0 < prompt < self.block_size:
            raise DepthKVError(f"expected streamed_prompt from 1 to {self.block_size - 1}, got {prompt}")
        if not self.suites:
            raise DepthKVError(f"expected at least one suite among {', '.join(SUITES)}, got none")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Text:
    name: str
    blocks: torch.Tensor
    documents: list[str]


@dataclass(kw_only=True)
class Evaluation:
    """Everything that the suites read, prepared before anything slow runs.

    Args:
        tokenizer: the model's.
        texts: kind of text to its documents, none of which the model was trained on.
        config: what to measure.
        questions: for the suite "qa".

    Raises:
        DataError: a text that is too short, or no questions.
    """

    tokenizer: PreTrainedTokenizerBase
    texts: Mapping[str, Sequence[Document]]
    config: EvaluateConfig
    questions: Sequence[Question] = ()
    _texts: list[_Text] = field(default_factory=list, init=False)
    _items: list[RetrievalItem] = field(default_factory=list, init=False)
    _prompts: list[list[int]] = field(default_factory=list, init=False)
    _prompt_documents: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        config = self.config
        if not self.texts:
            raise DataError("expected at least one kind of text, got none")
        if "qa" in config.suites and not self.questions:
            raise DataError("expected questions for the suite qa, got none")
        self.questions = [self.questions[i] for i in spread(len(self.questions), config.questions)]
        for name, documents in self.texts.items():
            blocks, names = named_blocks(documents, self.tokenizer, config.block_size)
            chosen = spread(len(blocks), config.blocks)
            self._texts.append(_Text(name=name, blocks=blocks[chosen], documents=[names[i] for i in chosen]))
        if "generation" in config.suites:
            if config.prompt_tokens > config.block_size:
                raise DataError(
                    f"expected prompts of at most a block, {config.block_size} tokens, got {config.prompt_tokens}"
                )
            for text in self._texts:
                for i in spread(len(text.blocks), config.prompts):
                    self._prompts.append(text.blocks[i, : config.prompt_tokens].tolist())
                    self._prompt_documents.append(f"{text.name}/{text.documents[i]}")
        if "retrieval" in config.suites:
            tasks = [*config.tasks, *(["qa"] if self.questions and "qa" not in config.tasks else [])]
            self._items = retrieval_items(
                # documents of two kinds of text may have the same name
                [
                    Document(name=f"{name}/{document.name}", text=document.text)
                    for name, documents in self.texts.items()
                    for document in documents
                ],
                self.tokenizer,
                tasks=tasks,
                lengths=config.lengths,
                num_items=config.items,
                seed=config.seed,
                questions=self.questions or None,
            )

    @property
    def _reads_text(self) -> bool:
        return "perplexity" in self.config.suites or "agreement" in self.config.suites

    def units(self, arms: int) -> int:
        """Units of progress for so many arms."""
        text = sum(len(text.blocks) for text in self._texts) if self._reads_text else 0
        questions = len(self.questions) if "qa" in self.config.suites else 0
        return arms * (text + len(self._prompts) + questions + len(self._items))

    def run(self, model: nn.Module, arms: Sequence[Arm], progress: Progress | None = None) -> list[dict[str, Any]]:
        """One row of sections for each arm, in their order. The same model and arms give the same rows.

        Args:
            model: a causal language model of transformers, neither shared nor routed.
            arms: each with a label of its own. All are compared with the first, which should be the full cache.
            progress: called with units of work done.

        Raises:
            PlanError: an arm's plan does not fit the model.
            DepthKVError: labels that are not different, or a loss that is not finite.
        """
        labels = [arm.label for arm in arms]
        if not labels or len(set(labels)) < len(labels):
            raise DepthKVError(f"expected at least one arm, each with a label of its own, got {labels}")
        if self._reads_text and self.config.streamed_prompt is None and any(arm.recipe for arm in arms):
            raise DepthKVError("expected streamed_prompt with a recipe, got none: a single forward reads no cache")
        rows = [_head(model, arm, self.config.block_size) for arm in arms]
        if any(arm.recipe for arm in arms):
            # what takes as many bytes for every token can be compared with what does not at one length only
            for row in rows:
                if row["cache_bytes"] is not None and rows[0]["cache_bytes"]:
                    row["cache_fraction"] = row["cache_bytes"] / rows[0]["cache_bytes"]
        sections: dict[str, list[dict[str, Any]]] = {}
        if self._reads_text:
            self._read(model, arms, rows, progress)
        if "generation" in self.config.suites:
            sections["generation"] = self._generation(model, arms, progress)
        if "qa" in self.config.suites:
            sections["qa"] = self._qa(model, arms, progress)
        if "retrieval" in self.config.suites:
            sections["retrieval"] = self._retrieval(model, arms, progress)
        for name, section in sections.items():
            for row, part in zip(rows, section, strict=True):
                row[name] = part
        return rows

    def _read(
        self, model: nn.Module, arms: Sequence[Arm], rows: list[dict[str, Any]], progress: Progress | None
    ) -> None:
        config = self.config
        wanted = "agreement" in config.suites
        by_text = [
            read_text(
                model,
                arms,
                text.blocks,
                batch_size=config.batch_size,
                agreement=wanted,
                prompt_tokens=config.streamed_prompt,
                progress=progress,
            )
            for text in self._texts
        ]
        # the kinds of text are one population for the joint figures: a document's name alone could occur in two
        documents = [f"{text.name}/{name}" for text in self._texts for name in text.documents]
        for i, row in enumerate(rows):
            joint = _block_means([readings[i].losses for readings in by_text])
            first = None if i == 0 else _block_means([readings[0].losses for readings in by_text])
            loss = self._score(joint, documents, first)
            if not math.isfinite(loss.value):
                raise DepthKVError(
                    f"expected a finite loss of {row['label']}, got {loss.value}; try dtype float32 or bfloat16"
                )
            if "perplexity" in config.suites:
                row |= {"loss": loss.value, "perplexity": _exp(loss.value), "loss_score": loss.to_dict()}
                row["texts"] = [
                    self._text_section(text, readings[i], None if i == 0 else readings[0])
                    for text, readings in zip(self._texts, by_text, strict=True)
                ]
            if wanted:
                row["agreement"] = {
                    name: self._score(
                        _block_means([getattr(readings[i], name).double() * scale for readings in by_text]),
                        documents,
                        None
                        if i == 0
                        else _block_means([getattr(readings[0], name).double() * scale for readings in by_text]),
                    ).to_dict()
                    for name, scale in (("top1", 100.0), ("kl", 1.0))
                }

    def _text_section(self, text: _Text, found: Reading, first: Reading | None) -> dict[str, Any]:
        positions = []
        for start, end in _buckets(found.losses.shape[1]):
            own = _block_means([found.losses[:, start:end]])
            base = None if first is None else _block_means([first.losses[:, start:end]])
            # column i holds the loss of token i + found.first of the block
            place = {"first": start + found.first, "last": end - 1 + found.first}
            positions.append(place | {"loss": self._score(own, text.documents, base).to_dict()})
        base = None if first is None else _block_means([first.losses])
        return {
            "data": text.name,
            "documents": len(set(text.documents)),
            "loss": self._score(_block_means([found.losses]), text.documents, base).to_dict(),
            "positions": positions,
        }

    def _generation(self, model: nn.Module, arms: Sequence[Arm], progress: Progress | None) -> list[dict[str, Any]]:
        config = self.config
        written = []
        for arm in arms:
            with arm.applied(model):
                written.append(
                    write_tokens(
                        model,
                        self.tokenizer,
                        self._prompts,
                        max_new_tokens=config.new_tokens,
                        batch_size=config.batch_size,
                        make_cache=arm.make_cache,
                        progress=progress,
                    )
                )
        measured = [
            [health(own, full, config.new_tokens) for own, full in zip(texts, written[0], strict=True)]
            for texts in written
        ]
        sections = []
        for i, texts in enumerate(written):
            section: dict[str, Any] = {}
            for name in Health.__dataclass_fields__:
                own = [getattr(item, name) for item in measured[i]]
                base = None if i == 0 else [getattr(item, name) for item in measured[0]]
                section[name] = self._score(own, self._prompt_documents, base).to_dict()
            section["samples"] = [
                {"prompt": self._decode(self._prompts[j]), "text": self._decode(texts[j])}
                for j in spread(len(texts), config.samples)
            ]
            sections.append(section)
        return sections

    def _qa(self, model: nn.Module, arms: Sequence[Arm], progress: Progress | None) -> list[dict[str, Any]]:
        scores = []
        for arm in arms:
            with arm.applied(model):
                texts = answer(
                    model,
                    self.tokenizer,
                    self.questions,
                    batch_size=self.config.batch_size,
                    make_cache=arm.make_cache,
                    progress=progress,
                )
            scores.append(answer_scores(texts, self.questions))
        articles = [question.article for question in self.questions]
        return [
            {
                name: self._score(values, articles, None if i == 0 else scores[0][name]).to_dict()
                for name, values in found.items()
            }
            for i, found in enumerate(scores)
        ]

    def _retrieval(self, model: nn.Module, arms: Sequence[Arm], progress: Progress | None) -> list[dict[str, Any]]:
        scores = []
        for arm in arms:
            with arm.applied(model):
                scores.append(
                    retrieve(
                        model,
                        self.tokenizer,
                        self._items,
                        make_cache=arm.make_cache,
                        batch_size=self.config.batch_size,
                        progress=progress,
                    )
                )
        return [
            summarize(self._items, found, None if i == 0 else scores[0], seed=self.config.seed)
            for i, found in enumerate(scores)
        ]

    def _score(self, values: Sequence[float], documents: Sequence[str], baseline: Sequence[float] | None) -> Score:
        return score(values, documents, baseline, seed=self.config.seed)

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def _head(model: nn.Module, arm: Arm, num_tokens: int) -> dict[str, Any]:
    """What a row says of its arm."""
    config: Any = model.config
    dtype: Any = model.dtype
    recipe = arm.recipe
    plan = recipe.plan if recipe else arm.plan or SharingPlan.full(config.get_text_config().num_hidden_layers)
    # with a cache of its own the plan alone does not say how many bytes a token takes
    known = arm.make_cache is None and arm.patch is None
    held = recipe.cache_bytes(config, dtype, num_tokens) if recipe else cache_bytes(config, dtype, num_tokens, 1, plan)
    return {
        "label": arm.label,
        "retention": plan.retention,
        "leaders": list(plan.leaders),
        "kv_source_layers": list(plan.kv_source_layers),
        "kv_bytes_per_token": kv_bytes_per_token(config, dtype, plan) if known and not recipe else None,
        "cache_bytes": held if known else None,
        "cache_recipe": recipe.figures() if recipe else None,
    }


def _block_means(parts: Sequence[torch.Tensor]) -> list[float]:
    """One mean per block, over the blocks of all parts."""
    return [float(mean) for part in parts for mean in part.double().mean(dim=1).tolist()]


def _buckets(width: int) -> list[tuple[int, int]]:
    """Column ranges by position in the text, each twice as long as the one before: `[0, 63)`, `[63, 127)`, ..."""
    edges = [0]
    position = 64
    while position < width + 1:
        edges.append(position - 1)
        position *= 2
    return list(zip(edges, [*edges[1:], width], strict=True))


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
