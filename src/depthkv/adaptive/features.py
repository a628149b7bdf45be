"""What is known of a prompt after its first layers: how often it repeats itself, and its pooled hidden state."""

from __future__ import annotations

import torch

NUM_STATISTICS = 4


def token_statistics(tokens: torch.Tensor) -> torch.Tensor:
    """`[tokens]` -> `[NUM_STATISTICS]`: the share of tokens, of pairs and of quadruples of tokens that came before in
    the prompt, and the logarithm of its length.
    """
    ids = tokens.tolist()
    shares = []
    for size in (1, 2, 4):
        runs = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
        shares.append(1 - len(set(runs)) / len(runs) if runs else 0.0)
    return torch.tensor([*shares, torch.tensor(float(len(ids))).log().item() / 8])


def pooled(hidden: torch.Tensor, num_tokens: int | None = None) -> torch.Tensor:
    """`[..., tokens, hidden_size]` -> `[..., hidden_size]`, fp32: the mean over the prompt.

    Means over its first and last few positions told less of which plan is best (docs/results.md).

    Args:
        hidden: normed, as the attention gets it.
        num_tokens: of the prompt, where more tokens follow it.
    """
    return hidden[..., :num_tokens, :].float().mean(dim=-2)


def prompt_features(tokens: torch.Tensor | None, hidden: torch.Tensor, num_tokens: int | None = None) -> torch.Tensor:
    """`[tokens]` and `[tokens, hidden_size]` -> `[NUM_STATISTICS + hidden_size]`, on the CPU.

    Without token ids (only embeddings are known) the statistics are 0.
    """
    statistics = torch.zeros(NUM_STATISTICS) if tokens is None else token_statistics(tokens[:num_tokens])
    return torch.cat([statistics, pooled(hidden, num_tokens).cpu()])
