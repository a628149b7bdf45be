"""Text that a model writes greedily after prompts of different lengths, under whatever is applied to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from depthkv.errors import DataError, DepthKVError
from depthkv.evaluate.arms import MakeCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int], None]
"""Called after each batch with the number of prompts that it held."""


@torch.no_grad()
def write_tokens(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    one_line: bool = False,
    make_cache: MakeCache | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """The tokens that the model writes after each prompt, without the end-of-text token.

    The likeliest token is taken each time, whatever the checkpoint's own settings say.

    Args:
        model: a causal language model of transformers in evaluation mode, under whatever holds meanwhile.
        tokenizer: the model's.
        prompts: token ids, at least one each.
        max_new_tokens: for each.
        batch_size: prompts answered together, padded on the left; those of similar length are.
        one_line: stop each at its first line break, which may be among the tokens returned.
        make_cache: the cache to use. Only prompts of the same length are then answered together: other methods'
            caches know nothing of padding.
        progress: called after each batch.

    Raises:
        DataError: no prompts, or an empty one.
        DepthKVError: a batch size or number of tokens below 1.
    """
    if not prompts or not all(prompts):
        raise DataError("expected prompts of at least one token, got " + ("none" if not prompts else "an empty one"))
    if batch_size < 1 or max_new_tokens < 1:
        raise DepthKVError(f"expected a batch size and new tokens of at least 1, got {batch_size} and {max_new_tokens}")
    device = next(model.get_input_embeddings().parameters()).device
    eos = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos if eos is not None else 0
    settings = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=eos)
    criteria = StoppingCriteriaList([_StopAtLineBreak(tokenizer)] if one_line else [])
    written: list[list[int]] = [[]] * len(prompts)
    for chosen in _batches([len(prompt) for prompt in prompts], batch_size, equal_lengths=make_cache is not None):
        width = len(prompts[chosen[0]])
        gaps = [width - len(prompts[i]) for i in chosen]
        tokens = torch.tensor([[pad] * gap + list(prompts[i]) for gap, i in zip(gaps, chosen, strict=True)])
        mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])
        cache = {} if make_cache is None else {"past_key_values": make_cache(model.config)}
        with _without_own_settings(model):
            output = model.generate(
                tokens.to(device),
                attention_mask=mask.to(device),
                generation_config=settings,
                stopping_criteria=criteria,
                **cache,
            )
        for i, row in zip(chosen, output[:, width:].tolist(), strict=True):
            # what ends early is filled up with padding
            written[i] = row[: next((at for at, token in enumerate(row) if token in (eos, pad)), len(row))]
        if progress is not None:
            progress(len(chosen))
    return written


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """The checkpoint's generation settings fill what a call leaves open, so that few of them would still be greedy."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def write_lines(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], **options: Any
) -> list[str]:
    """The first line that the model writes after each prompt, as text; options as for `write_tokens`."""
    rows = write_tokens(model, tokenizer, prompts, one_line=True, **options)
    return [tokenizer.decode(row, skip_special_tokens=True).partition("\n")[0].strip() for row in rows]


def _batches(lengths: Sequence[int], batch_size: int, *, equal_lengths: bool) -> list[list[int]]:
    """Indices of prompts, longest first: a batch that is too large for the memory fails at once."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        last = batches[-1] if batches else []
        if last and len(last) < batch_size and not (equal_lengths and lengths[last[0]] != lengths[i]):
            last.append(i)
        else:
            batches.append([i])
    return batches


class _StopAtLineBreak(StoppingCriteria):
    """Ends each sequence whose last token holds a line break: nothing after it counts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        done = ["\n" in self._tokenizer.decode([token]) for token in input_ids[:, -1].tolist()]
        return torch.tensor(done, device=input_ids.device)
