"""Answers to questions under sharing plans: F1, exact match and ROUGE-L of what the model writes greedily."""

from __future__ import annotations

import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from depthkv.errors import DataError, DepthKVError
from depthkv.plan import SharingPlan
from depthkv.qa import Question, prompt_tokens
from depthkv.sharing import share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int], None]
"""Called after each batch with the number of questions that it held."""


@dataclass(frozen=True, kw_only=True)
class QAScores:
    """One point of the quality curve; the scores are means over the questions, 0 to 100."""

    retention: float
    """Share of the layers that keep a cache."""
    leaders: tuple[int, ...]
    """Layers that keep a cache."""
    f1: float
    exact_match: float
    rouge_l: float
    num_questions: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"leaders": list(self.leaders)}


def normalize_answer(text: str) -> str:
    """As SQuAD's official script: lower case, no punctuation, no articles (a, an, the), single spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals one of the answers after `normalize_answer`, else 0."""
    return float(normalize_answer(prediction) in {normalize_answer(answer) for answer in _some(answers)})


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the normalised words, 0 to 1; the largest over the answers."""

    def overlap(ours: list[str], theirs: list[str]) -> int:
        return sum((Counter(ours) & Counter(theirs)).values())

    return _best(prediction, answers, overlap)


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """ROUGE-L: F-measure (beta 1) of the longest common subsequence of words, 0 to 1; the largest over the answers.

    Words are those of `normalize_answer`, not of the stemmer that some ROUGE packages apply.
    """
    return _best(prediction, answers, _common_subsequence)


def evaluate_qa(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    plans: Sequence[SharingPlan],
    *,
    max_new_tokens: int = 24,
    batch_size: int = 8,
    max_tokens: int = 512,
    context_first: bool = True,
    progress: Progress | None = None,
) -> list[QAScores]:
    """Answer the questions greedily under each plan; the answer is what comes before a line break or end of text.

    Args:
        model: a causal language model of transformers, neither shared nor routed. In evaluation mode meanwhile.
        tokenizer: the model's.
        questions: with answers.
        plans: for as many layers as the model has. Equal plans are measured once.
        max_new_tokens: of an answer.
        batch_size: questions answered together, padded on the left; those of similar length are.
        max_tokens: of a prompt; a longer context loses its end, see `depthkv.qa.prompt_tokens`.
        context_first: the order in the prompt, for all questions.
        progress: called after each batch, for each plan in turn.

    Returns:
        One row per plan, in their order.

    Raises:
        DataError: no questions, one without answers, or one that does not fit.
        PlanError: a plan does not fit the model.
    """
    if not questions:
        raise DataError("expected at least one question, got none")
    if batch_size < 1 or max_new_tokens < 1:
        raise DepthKVError(f"expected a batch size and new tokens of at least 1, got {batch_size} and {max_new_tokens}")
    prompts = [
        prompt_tokens(question, tokenizer, max_tokens=max_tokens, context_first=context_first) for question in questions
    ]
    measured: dict[SharingPlan, QAScores] = {}
    for plan in plans:
        if plan in measured:
            if progress is not None:
                progress(len(questions))
            continue
        with share(model, plan), _evaluating(model):
            texts = _answers(model, tokenizer, prompts, max_new_tokens, batch_size, progress)
        pairs = [(text, question.answers) for text, question in zip(texts, questions, strict=True)]
        measured[plan] = QAScores(
            retention=plan.retention,
            leaders=plan.leaders,
            f1=100 * statistics.fmean(f1(*pair) for pair in pairs),
            exact_match=100 * statistics.fmean(exact_match(*pair) for pair in pairs),
            rouge_l=100 * statistics.fmean(rouge_l(*pair) for pair in pairs),
            num_questions=len(questions),
        )
    return [measured[plan] for plan in plans]


class _StopAtLineBreak(StoppingCriteria):
    """Ends each sequence whose last token holds a line break: nothing after it counts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        done = ["\n" in self._tokenizer.decode([token]) for token in input_ids[:, -1].tolist()]
        return torch.tensor(done, device=input_ids.device)


@torch.no_grad()
def _answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
    progress: Progress | None,
) -> list[str]:
    """What the model writes after each prompt, in their order."""
    device = next(model.get_input_embeddings().parameters()).device
    eos = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos if eos is not None else 0
    # all that could make the checkpoint's own settings anything but greedy is set, so that they do not count
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=eos,
    )
    criteria = StoppingCriteriaList([_StopAtLineBreak(tokenizer)])
    texts = [""] * len(prompts)
    # longest first: a batch that is too large for the memory fails at once
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = len(prompts[chosen[0]])
        gaps = [width - len(prompts[i]) for i in chosen]
        tokens = torch.tensor([[pad] * gap + prompts[i] for gap, i in zip(gaps, chosen, strict=True)])
        mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])
        output = model.generate(
            tokens.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            stopping_criteria=criteria,
        )
        for i, row in zip(chosen, output[:, width:].tolist(), strict=True):
            written = row[: row.index(eos)] if eos in row else row
            texts[i] = tokenizer.decode(written, skip_special_tokens=True).partition("\n")[0].strip()
        if progress is not None:
            progress(len(chosen))
    return texts


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _best(prediction: str, answers: Sequence[str], overlap: Callable[[list[str], list[str]], int]) -> float:
    """The largest F-measure of the words that an answer has in common with the prediction, as `overlap` counts them."""
    ours = normalize_answer(prediction).split()
    scores = []
    for answer in _some(answers):
        theirs = normalize_answer(answer).split()
        if not ours or not theirs:  # as SQuAD 2.0's script: nothing is right where nothing is wanted
            scores.append(float(ours == theirs))
        else:
            # the same as 2PR / (P + R)
            scores.append(2 * overlap(ours, theirs) / (len(ours) + len(theirs)))
    return max(scores)


def _common_subsequence(ours: list[str], theirs: list[str]) -> int:
    lengths = [0] * (len(theirs) + 1)
    for word in ours:
        diagonal = 0
        for j, other in enumerate(theirs, start=1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if word == other else max(above, lengths[j - 1])
            diagonal = above
    return lengths[-1]


def _some(answers: Sequence[str]) -> Sequence[str]:
    # a string would pass as a sequence of one-letter answers
    if isinstance(answers, str) or not answers:
        raise DataError(f"expected at least one answer in a list, got {answers!r}")
    return answers
