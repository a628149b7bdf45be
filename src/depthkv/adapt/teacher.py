"""Teachers: the model with every layer's own cache, live or from a file."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import linear

from depthkv.adapt.loss import Batch
from depthkv.decoder import find_decoder
from depthkv.errors import CheckpointError, DepthKVError
from depthkv.files import replacing
from depthkv.head import plain_head
from depthkv.patches import ACTIVE, ADAPTER_SWITCH
from depthkv.sharing import Routing

__all__ = ["FrozenTeacher", "SelfTeacher", "StoredTeacher", "Teacher", "write_teacher"]

_CHUNK_ELEMENTS = 2**22
"""Logits of one chunk: 16 MB in fp32, memory that the next chunk gets again instead of fresh pages."""


class Teacher(Protocol):
    """Knows what the full-cache model says about a batch."""

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """While this is open, `model` is the student."""
        ...

    def top(self, batch: Batch, top_k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log probabilities and ids of the likeliest next tokens, each `[batch, tokens, top_k]`."""
        ...

    def attention_outputs(self, batch: Batch) -> list[torch.Tensor]:
        """One `[batch, tokens, hidden_size]` for each layer."""
        ...


class FrozenTeacher:
    """A copy of the model as it was when training began: for training that changes the weights themselves."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        self._full = _FullCache(frozen if dtype is None else frozen.to(dtype))

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """See `Teacher.of`."""
        yield

    def top(self, batch: Batch, top_k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Teacher.top`."""
        return self._full.top(batch, top_k, temperature)

    def attention_outputs(self, batch: Batch) -> list[torch.Tensor]:
        """See `Teacher.attention_outputs`."""
        return self._full.attention_outputs(batch)


class SelfTeacher:
    """The student itself, unrouted and with its adapter off: no second copy of the weights.

    For LoRA (`depthkv.adapt.adapters`), whose base never changes. Routing is suspended meanwhile and counts no step.
    """

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._full: _FullCache | None = None

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """See `Teacher.of`."""
        if getattr(model, ADAPTER_SWITCH, None) is None:
            raise DepthKVError("expected a model with an adapter as its own teacher, got one whose own weights train")
        self._model, self._full = model, _FullCache(model)
        try:
            yield
        finally:
            self._model = self._full = None

    def top(self, batch: Batch, top_k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Teacher.top`."""
        with self._unadapted() as full:
            return full.top(batch, top_k, temperature)

    def attention_outputs(self, batch: Batch) -> list[torch.Tensor]:
        """See `Teacher.attention_outputs`."""
        with self._unadapted() as full:
            return full.attention_outputs(batch)

    @contextmanager
    def _unadapted(self) -> Iterator[_FullCache]:
        model, full = self._model, self._full
        if model is None or full is None:
            raise RuntimeError("expected a student, got none")
        active = getattr(full.decoder.module, ACTIVE, None)
        if active is not None and not isinstance(active, Routing):
            raise DepthKVError("expected a student that is routed or neither routed nor shared, got one that is shared")
        training = model.training
        model.eval()
        try:
            with active.suspended() if active is not None else nullcontext():  # this switches the adapter, too
                yield full
        finally:
            model.train(training)


class StoredTeacher:
    """What `write_teacher` stored: the teacher is run once, not in every epoch, and need not fit beside the student.

    Batches are recognised by their tokens, so order, shuffling and epochs do not matter; the blocks must be the same.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        try:
            with safe_open(self._path, framework="pt") as file:
                self._values, self._index = file.get_tensor("log_probabilities"), file.get_tensor("tokens")
                keys = file.get_tensor("blocks")
                self._temperature = float((file.metadata() or {})["temperature"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"expected a stored teacher in {self._path}, got {error}") from error
        self._rows = {bytes(key.tolist()): row for row, key in enumerate(keys)}

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """See `Teacher.of`."""
        yield

    def top(self, batch: Batch, top_k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Teacher.top`."""
        if top_k > self._values.shape[-1] or temperature != self._temperature:
            raise DepthKVError(
                f"expected top_k of at most {self._values.shape[-1]} and temperature {self._temperature:g} with "
                f"{self._path}, got {top_k} and {temperature:g}"
            )
        device = batch["input_ids"].device
        try:
            rows = [self._rows[_fingerprint(block)] for block in batch["input_ids"]]
        except KeyError:
            raise DepthKVError(f"expected blocks that {self._path} was made from, got another one") from None
        return self._values[rows, :, :top_k].float().to(device), self._index[rows, :, :top_k].long().to(device)

    def attention_outputs(self, batch: Batch) -> list[torch.Tensor]:
        """Not stored: a layer's outputs are as large as the model's activations."""
        raise DepthKVError("expected a live teacher to match attention outputs, got a stored one")


def write_teacher(
    model: nn.Module,
    blocks: torch.Tensor,
    path: str | Path,
    *,
    top_k: int = 32,
    temperature: float = 1.0,
    batch_size: int = 4,
    progress: Any = None,
) -> None:
    """Store the full-cache model's likeliest tokens for `blocks` `[blocks, tokens]`; fp16 values, int32 ids.

    Raises:
        DepthKVError: the file cannot be written.
    """
    device = next(model.parameters()).device
    training, full = model.training, _FullCache(model)
    model.eval()
    values, index = [], []
    try:
        for start in range(0, len(blocks), batch_size):
            tokens = blocks[start : start + batch_size].to(device)
            top = full.top({"input_ids": tokens}, top_k, temperature)
            values.append(top[0].half().cpu())
            index.append(top[1].int().cpu())
            if progress is not None:
                progress(len(tokens))
    finally:
        model.train(training)
    keys = torch.tensor([list(_fingerprint(block)) for block in blocks], dtype=torch.uint8)
    tensors = {"log_probabilities": torch.cat(values), "tokens": torch.cat(index), "blocks": keys}
    with replacing(path, "the stored teacher") as temporary:
        save_file(tensors, temporary, metadata={"temperature": repr(float(temperature))})


@contextmanager
def recorded_outputs(modules: list[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """The outputs of modules that run once each, in their order, while the block runs."""
    outputs: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _fingerprint(block: torch.Tensor) -> bytes:
    return hashlib.blake2b(block.cpu().contiguous().long().numpy().tobytes(), digest_size=16).digest()


class _FullCache:
    """A model that runs with every layer's own cache."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.head, self.decoder = model, plain_head(model), find_decoder(model)

    def _forward(self, batch: Batch) -> Any:
        given = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        # soft-capped or scaled logits come from the model itself, and FSDP2 gathers weights in its forward only
        runs = self.model if self.head is None else self.decoder.module
        return runs(**given, use_cache=False)

    def _scores(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self.head
        # the head's forward may be replaced meanwhile
        return hidden if head is None else linear(hidden.to(head.weight.dtype), head.weight, head.bias)

    @torch.no_grad()
    def top(self, batch: Batch, top_k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        values, index = [], []
        output = self._forward(batch)
        output = output.logits if self.head is None else output.last_hidden_state
        vocabulary = output.shape[-1] if self.head is None else self.head.out_features
        for some in output.flatten(0, 1).split(max(1, _CHUNK_ELEMENTS // vocabulary)):
            logits = self._scores(some).float()
            if temperature != 1:
                logits /= temperature
            top = logits.topk(min(top_k, vocabulary), dim=-1)
            values.append(top.values - logits.logsumexp(-1, keepdim=True))
            index.append(top.indices)
        shape = *output.shape[:2], -1
        return torch.cat(values).reshape(shape), torch.cat(index).reshape(shape)

    @torch.no_grad()
    def attention_outputs(self, batch: Batch) -> list[torch.Tensor]:
        decoder = self.decoder
        with recorded_outputs([decoder.attention(layer) for layer in range(decoder.num_layers)]) as outputs:
            self._forward(batch)
        return outputs
