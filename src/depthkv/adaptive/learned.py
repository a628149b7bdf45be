"""A small head per layer that decides from the prompt whether the layer keeps its pair, and how the heads are trained.

In training a decision is a sample: Gumbel-sigmoid noise on the head's output (Jang et al., arXiv:1611.01144; Maddison
et al., arXiv:1611.00712), hard in the forward and soft in the gradient (straight-through). In serving it is the sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from depthkv.adaptive.features import NUM_STATISTICS, pooled, token_statistics
from depthkv.adaptive.router import MadeRouter, Pair, Prompt
from depthkv.architectures import LayerKind
from depthkv.decoder import find_decoder
from depthkv.errors import DepthKVError, PlanError
from depthkv.patches import Patches, adapter_switch, guarded
from depthkv.plan import SharingPlan
from depthkv.sharing import check_plan, share

__all__ = ["LearnedRouter", "RouterTraining", "train_router"]


class LearnedRouter(MadeRouter):
    """A layer leads where its head says so; the others read the nearest leader.

    Args:
        weights: `[layers, features]`, see `features.prompt_features`.
        bias: `[layers]`; a layer leads where `weights @ features + bias > threshold`.
        kinds: of the layers.
        threshold: moves the mean retention without another training.
        order: for giving up leaders, see `Ladder`.
    """

    needs_kv = False

    def __init__(
        self,
        weights: torch.Tensor,
        bias: torch.Tensor,
        kinds: Sequence[LayerKind],
        threshold: float = 0.0,
        order: Sequence[int] = (),
    ) -> None:
        super().__init__(kinds, order, weights.shape[-1] - NUM_STATISTICS if weights.ndim == 2 else 0)
        self.weights, self.bias, self.threshold = weights.float().cpu(), bias.float().cpu(), threshold
        if weights.ndim != 2 or weights.shape[0] != len(kinds) or bias.shape != (len(kinds),):
            raise PlanError(f"expected heads for {len(kinds)} layers, got {list(weights.shape)} and {list(bias.shape)}")

    def source(self, layer: int, prompt: Prompt, own: Pair | None) -> int:
        assert prompt.hidden is not None
        if "statistics" not in prompt.notes:
            ids = prompt.tokens
            prompt.notes["statistics"] = torch.zeros(NUM_STATISTICS) if ids is None else token_statistics(ids)
        features = torch.cat([prompt.notes["statistics"], pooled(prompt.hidden).cpu()])
        leads = float(self.weights[layer] @ features + self.bias[layer]) > self.threshold
        return layer if leads else prompt.leaders(layer)[-1]


class RouterTraining(Patches):
    """The model with sampled gates: layer l reads `g own + (1 - g) current leader's`, for each sequence its own g.

    Usable as a context manager, on a model that is neither shared nor routed. Gradients reach the heads only.

    Args:
        model: a causal language model of transformers.
        start: leaders of this plan begin as likely to lead.
        temperature: of the soft gradient.
        seed: of the samples.
    """

    def __init__(self, model: nn.Module, start: SharingPlan, *, temperature: float = 1.0, seed: int = 0) -> None:
        decoder = find_decoder(model)
        check_plan(start, decoder.kinds)
        super().__init__(decoder, adapter_switch(model))
        self.kinds = decoder.kinds
        width = NUM_STATISTICS + int(decoder.config.get_text_config().hidden_size)
        self.weights = nn.Parameter(torch.zeros(len(self.kinds), width))
        signs = [2.0 if source == layer else -2.0 for layer, source in enumerate(start.kv_source_layers)]
        self.bias = nn.Parameter(torch.tensor(signs))
        self.temperature = temperature
        self.gates: list[torch.Tensor] = []
        """Of the last forward: probability of leading, `[batch]`, of each layer that had a choice."""
        self._generator = torch.Generator().manual_seed(seed)
        self._statistics = torch.zeros(0)
        self._prompt_tokens: int | None = None
        self._current: dict[LayerKind, Pair] = {}
        guarded(self, self._apply)

    def _apply(self) -> None:
        decoder = self._decoder
        for layer in range(decoder.num_layers):
            self._replace(decoder.attention(layer), "forward", partial(self._attend, layer))
        self._replace(decoder.module, "forward", self._wrap_decoder)

    def _wrap_decoder(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs["use_cache"] = False
            self._current, self.gates = {}, []
            return original(*args, **kwargs)

        return forward

    def prompts(self, tokens: torch.Tensor, prompt_tokens: int) -> None:
        """The next forward is of `tokens` `[batch, tokens]`, of which so many are the prompts."""
        self._statistics = torch.stack([token_statistics(row[:prompt_tokens]) for row in tokens])
        self._prompt_tokens = prompt_tokens

    def _attend(self, layer: int, original: Callable[..., Any]) -> Callable[..., Any]:
        name = self._decoder.family.cache_argument

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            kwargs[name] = _Mixer(self, layer, hidden)
            return original(*args, **kwargs)

        return forward

    def gate(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens, hidden_size]` -> `[batch]` of 0 and 1, with the gradient of the probability."""
        features = torch.cat([self._statistics, pooled(hidden, self._prompt_tokens).detach().cpu()], dim=1)
        logits = features @ self.weights[layer] + self.bias[layer]
        self.gates.append(logits.sigmoid())
        uniform = torch.rand(len(logits), generator=self._generator).clamp(1e-6, 1 - 1e-6)
        soft = ((logits + uniform.log() - (-uniform).log1p()) / self.temperature).sigmoid()
        return (soft > 0.5).float() + soft - soft.detach()

    def mix(self, layer: int, hidden: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """What the layer reads; later layers of its kind may join that."""
        kind = self.kinds[layer]
        pair = (keys, values)
        if kind in self._current:
            gate = self.gate(layer, hidden).to(keys)[:, None, None, None]
            before = self._current[kind]
            pair = gate * keys + (1 - gate) * before[0], gate * values + (1 - gate) * before[1]
        self._current[kind] = pair
        return pair


class _Mixer:
    """What an attention module gets instead of its KV cache."""

    def __init__(self, training: RouterTraining, layer: int, hidden: torch.Tensor) -> None:
        self._training, self._layer, self._hidden = training, layer, hidden

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Pair:
        return self._training.mix(self._layer, self._hidden, keys, values)


def train_router(
    model: Any,
    tokens: torch.Tensor,
    retention: float,
    start: SharingPlan,
    *,
    prompt_tokens: int,
    steps: int = 100,
    batch_size: int = 4,
    learning_rate: float = 3e-2,
    budget_weight: float = 5.0,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> LearnedRouter:
    """Train the heads on a frozen model: the loss of what follows the prompts, and a penalty on the mean retention.

    Args:
        model: a causal language model of transformers, trained with routing, neither shared nor routed.
        tokens: `[inputs, tokens]`.
        retention: mean share of layers that lead.
        start: a plan of about this size, such as the planner's.
        prompt_tokens: of each input; decisions see these, the loss is of the rest.
        steps: of AdamW.
        batch_size: inputs in a step.
        learning_rate: decayed linearly to 0.
        budget_weight: nats for a mean retention that is off by 1, squared and times ten; the price itself adapts.
        seed: of the order and the samples.
        advance: called with 1 after each step.

    Raises:
        DepthKVError: a prompt that leaves nothing to predict, or a retention outside its range.
    """
    if not 0 < retention <= 1 or not 0 < prompt_tokens < tokens.shape[1]:
        raise DepthKVError(
            f"expected a retention above 0 and at most 1 and prompts shorter than the {tokens.shape[1]} tokens, "
            f"got {retention} and {prompt_tokens}"
        )
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    device = model.get_input_embeddings().weight.device
    price = 0.0
    try:
        with RouterTraining(model, start, seed=seed) as training:
            optimizer = torch.optim.AdamW([training.weights, training.bias], lr=learning_rate, weight_decay=0.01)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
            for rows in _batches(len(tokens), batch_size, steps, seed):
                batch = tokens[rows]
                training.prompts(batch, prompt_tokens)
                logits = model(
                    input_ids=batch.to(device), use_cache=False, logits_to_keep=batch.shape[1] - prompt_tokens + 1
                ).logits
                targets = batch[:, prompt_tokens:].to(device)
                loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())
                kept = (torch.stack(training.gates).sum(dim=0) + len(set(training.kinds))) / len(training.kinds)
                over = kept.mean() - retention
                # a price that rises while too much is kept, and a spring that keeps it from swinging
                (loss.cpu() + price * over + 10 * budget_weight * over.square()).backward()  # type: ignore[no-untyped-call]
                price += budget_weight * over.item()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                advance(1)
            weights, bias = training.weights.detach(), training.bias.detach()
            kinds = training.kinds
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    router = LearnedRouter(weights, bias, kinds)
    return _at_retention(model, router, [row[:prompt_tokens] for row in tokens], retention)


@torch.no_grad()
def _at_retention(
    model: Any, router: LearnedRouter, prompts: Sequence[torch.Tensor], retention: float
) -> LearnedRouter:
    """The threshold at which the prompts keep `retention` on average, by bisection."""
    device = model.get_input_embeddings().weight.device
    low, high, best = -4.0, 4.0, (math.inf, 0.0)
    for _ in range(6):
        router.threshold = (low + high) / 2 if math.isfinite(best[0]) else 0.0
        with share(model, router) as handle:
            kept = 0
            for tokens in prompts:
                model(input_ids=tokens[None].to(device), use_cache=False, logits_to_keep=1)
                kept += sum(source == layer for layer, source in enumerate(handle.last_maps[0]))
        share_kept = kept / (len(prompts) * len(router.kinds))
        best = min(best, (abs(share_kept - retention), router.threshold))
        low, high = (router.threshold, high) if share_kept > retention else (low, router.threshold)
    router.threshold = best[1]
    return router


def _batches(number: int, batch_size: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += torch.randperm(number, generator=generator).tolist()
        yield torch.tensor(order[:batch_size])
        order = order[batch_size:]
