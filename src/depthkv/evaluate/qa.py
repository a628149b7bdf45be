"""Answers to questions under sharing plans: F1, exact match and ROUGE-L of what the model writes greedily."""

from __future__ import annotations

import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from depthkv.architectures import max_positions
from depthkv.errors import DataError
from depthkv.evaluate.arms import Arm, MakeCache
from depthkv.evaluate.generation import Progress, write_lines
from depthkv.plan import SharingPlan
from depthkv.qa import Question, prompt_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["QAScores", "evaluate_qa", "exact_match", "f1", "normalize_answer", "rouge_l"]


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
        max_tokens: of a prompt, or as many as the model has positions for; a longer context loses its end, see
            `depthkv.qa.prompt_tokens`.
        context_first: the order in the prompt, for all questions.
        progress: called after each batch, for each plan in turn.

    Returns:
        One row per plan, in their order.

    Raises:
        DataError: no questions, one without answers, or one that does not fit.
        PlanError: a plan does not fit the model.
    """
    prompts = _prompts(model, questions, tokenizer, max_tokens, max_new_tokens, context_first)
    measured: dict[SharingPlan, QAScores] = {}
    for plan in plans:
        if plan in measured:
            if progress is not None:
                progress(len(questions))
            continue
        with Arm(label="plan", plan=plan).applied(model):
            texts = write_lines(
                model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
            )
        scores = answer_scores(texts, questions)
        measured[plan] = QAScores(
            retention=plan.retention,
            leaders=plan.leaders,
            num_questions=len(questions),
            **{name: statistics.fmean(values) for name, values in scores.items()},
        )
    return [measured[plan] for plan in plans]


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 24,
    batch_size: int = 8,
    max_tokens: int = 512,
    context_first: bool = True,
    make_cache: MakeCache | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """What the model answers, under whatever is applied to it; arguments and errors as for `evaluate_qa`."""
    return write_lines(
        model,
        tokenizer,
        _prompts(model, questions, tokenizer, max_tokens, max_new_tokens, context_first),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        make_cache=make_cache,
        progress=progress,
    )


def answer_scores(texts: Sequence[str], questions: Sequence[Question]) -> dict[str, list[float]]:
    """`f1`, `exact_match` and `rouge_l` of each answer, 0 to 100."""
    pairs = [(text, question.answers) for text, question in zip(texts, questions, strict=True)]
    measures = {"f1": f1, "exact_match": exact_match, "rouge_l": rouge_l}
    return {name: [100 * measure(*pair) for pair in pairs] for name, measure in measures.items()}


def _prompts(
    model: nn.Module,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    max_new_tokens: int,
    context_first: bool,
) -> list[list[int]]:
    if not questions:
        raise DataError("expected at least one question, got none")
    positions = max_positions(model.config)
    if positions is not None:
        max_tokens = min(max_tokens, max(1, positions - max_new_tokens))
    return [
        prompt_tokens(question, tokenizer, max_tokens=max_tokens, context_first=context_first) for question in questions
    ]


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
