"""The measurements themselves: each is one pass, shows its progress, and goes on where a stopped run left off."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depthkv.calibrate.moments import SUMS, Moments
from depthkv.calibrate.probe import Probe
from depthkv.calibrate.store import Calibration, Matrix, fingerprint, kind_names
from depthkv.decoder import find_decoder
from depthkv.errors import DepthKVError
from depthkv.evaluate.perplexity import perplexity, spread
from depthkv.evaluate.text import Features, check_blocks, reading, rows_at_once, token_losses
from depthkv.files import replacing
from depthkv.patches import adapter_switch
from depthkv.plan import SharingPlan
from depthkv.sharing import share

SAVE_SECONDS = 15.0
"""Between two saves: what a kill can cost."""

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""From a phase and its units to a function that advances it, such as `depthkv.cli.output.progress_bar`."""


def no_bar(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Shows nothing."""
    return nullcontext(lambda done: None)


class Calibrator:
    """Measures a model on blocks of text. Each `measure_...` does nothing where its figures are there already.

    Args:
        model: a causal language model of transformers, neither shared nor routed. An adapter that belongs to sharing is
            on during all measurements.
        blocks: token ids, `[blocks, tokens]`, from `depthkv.data.named_blocks`.
        documents: the document of each block.
        cost_blocks: of these blocks, evenly spread, the losses are measured on; all of them are compared on.
        output_blocks: the same for attention outputs.
        batch_size: blocks in one forward.
        path: the calibration file, read if it is there and written every `SAVE_SECONDS`; None keeps nothing.

    Raises:
        DepthKVError: the file is of another model, text or setting.
        DataError, UnsupportedModelError: as `perplexity` and `share` say.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: torch.Tensor,
        documents: Sequence[str],
        *,
        cost_blocks: int = 8,
        output_blocks: int = 8,
        batch_size: int = 4,
        path: Path | None = None,
        bar: Bar = no_bar,
    ) -> None:
        check_blocks(model, blocks, batch_size)
        self.model, self.blocks, self.bar, self.path = model, blocks, bar, path
        self.batch_size = rows_at_once(model, blocks.shape[1], batch_size)
        self.device = next(model.get_input_embeddings().parameters()).device  # type: ignore[operator]
        chosen = spread(len(blocks), cost_blocks)
        self.cost_blocks = blocks[chosen]
        self.output_blocks = blocks[spread(len(blocks), output_blocks)]
        decoder = find_decoder(model)
        settings = [list(blocks.shape), list(documents), chosen, len(self.output_blocks)]
        fresh = Calibration(
            fingerprint=fingerprint(model, blocks, settings),
            kinds=kind_names(decoder.kinds),
            block_documents=[documents[i] for i in chosen],
            block_size=blocks.shape[1],
        )
        self.calibration = fresh
        if path is not None and path.exists():
            found = Calibration.load(path)
            same = ("fingerprint", "kinds", "block_documents", "block_size")
            if any(getattr(found, name) != getattr(fresh, name) for name in same):
                raise DepthKVError(
                    f"{path}: expected measurements of this model with this adapter, on the same text, number and size "
                    "of blocks, got others; name another file to begin anew"
                )
            self.calibration = found
        self._saved = time.monotonic()

    # Keys and values

    def measure_similarity(self) -> None:
        """Compare keys and values of all layers, one pass over the text."""
        found = self.calibration
        state = _MomentsFile(self.path, found.fingerprint)
        if "key_cka" in found.similarity:
            state.remove()
            return
        with self._evaluating(), Probe(self.model) as probe, self._timed("similarity"):
            groups = self._groups()
            kinds = probe.decoder.kinds
            sums = {
                (name, i): Moments(len(layers), kinds[layers[0]].kv_heads, kinds[layers[0]].head_dim, self.device)
                for name in ("key", "value")
                for i, layers in enumerate(groups)
            }
            done = state.restore(sums)
            with (
                self.bar("comparing keys and values", len(self.blocks)) as advance,
                reading(self.model) as (forward, _),
            ):
                advance(done)
                while done < len(self.blocks):
                    batch = self.blocks[done : done + self.batch_size].to(self.device)
                    with probe.recording(keys=True) as seen:
                        forward(batch)
                    for i, layers in enumerate(groups):
                        keys = [seen.keys[n].flatten(0, 1).to(self.device) for n in layers]
                        values = [seen.pairs[n][1].transpose(1, 2).flatten(0, 1).to(self.device) for n in layers]
                        sums["key", i].add(torch.stack(keys, dim=1))
                        sums["value", i].add(torch.stack(values, dim=1))
                    done += len(batch)
                    advance(len(batch))
                    state.save(sums, done)
            self._finish_similarity(sums, groups)
            found.similarity_tokens = self.blocks.numel()
        self.save()
        state.remove()

    def _groups(self) -> list[list[int]]:
        """Layers that could share with each other."""
        kinds = self.calibration.kinds
        return [[i for i, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)]

    def _finish_similarity(self, sums: dict[tuple[str, int], Moments], groups: list[list[int]]) -> None:
        found = self.calibration
        names = [f"{name}_{measure}" for name in ("key", "value") for measure in ("cka", "cosine", "r2")]
        aggregates = {name: self._empty() for name in [*names, "kv_distance"]}
        num_heads = min(moments.shape[1] for moments in sums.values())
        heads = {name: [self._empty() for _ in range(num_heads)] for name in names}
        for i, layers in enumerate(groups):
            squared = torch.zeros(len(layers), len(layers), dtype=torch.float64)
            for name in ("key", "value"):
                measured = sums[name, i].similarities()
                squared += measured.pop("squared_distance")[0]
                for measure, values in measured.items():
                    _put(aggregates[f"{name}_{measure}"], layers, values[0])
                    for head, matrix in enumerate(heads[f"{name}_{measure}"]):
                        _put(matrix, layers, values[1 + head])
            _put(aggregates["kv_distance"], layers, squared.sqrt())
        _require_finite(*(torch.tensor([v for row in m for v in row if v is not None]) for m in aggregates.values()))
        found.similarity |= aggregates
        found.similarity_heads |= heads

    # Attention outputs

    def measure_outputs(self) -> None:
        """Compare what each layer's attention gives when it reads another layer with what it gives on its own."""
        found = self.calibration
        if "output_cosine" in found.similarity:
            return
        size = found.num_layers
        cosine = torch.zeros(size, size, dtype=torch.float64)
        error, norm = torch.zeros_like(cosine), torch.zeros(size, dtype=torch.float64)
        with self._evaluating(), Probe(self.model) as probe, self._timed("outputs"):
            with (
                self.bar("comparing attention", len(self.output_blocks)) as advance,
                reading(self.model) as (forward, _),
            ):
                for start in range(0, len(self.output_blocks), self.batch_size):
                    batch = self.output_blocks[start : start + self.batch_size].to(self.device)
                    with probe.recording(attention=True) as seen:
                        forward(batch)
                    for layer in range(size):
                        norm[layer] += seen.outputs[layer].float().square().sum().double().cpu()
                    for layer, source in found.pairs():
                        own = seen.outputs[layer].float()
                        other = probe.attention_output(layer, source).float()
                        cosine[layer, source] += torch.cosine_similarity(own, other, dim=-1).sum().double().cpu()
                        error[layer, source] += (own - other).square().sum().double().cpu()
                    advance(len(batch))
        found.output_tokens = self.output_blocks.numel()
        cosine = cosine / found.output_tokens
        error = error / norm.clamp(min=1e-30)[:, None]
        _require_finite(cosine, error)
        cosine.fill_diagonal_(1.0)
        error.fill_diagonal_(0.0)
        for name, matrix in (("output_cosine", cosine), ("output_error", error)):
            found.similarity[name] = self._empty()
            for layers in self._groups():
                _put(found.similarity[name], layers, matrix[layers][:, layers])
        self.save()

    # Losses

    def measure_costs(self) -> None:
        """The loss when only layer l reads source j, for every pair: the gold measure, and by far the slowest."""
        found = self.calibration
        if found.has_costs:
            return
        wanted = len(self.cost_blocks)
        lists = self._loss_lists()
        with self._evaluating(), Probe(self.model) as probe, self._timed("costs"), reading(self.model) as functions:
            with self.bar("measuring every pair", wanted * found.num_pairs) as advance:
                advance(sum(len(losses) for losses in lists.values()))
                while (start := min([len(found.full_losses), *map(len, lists.values())])) < wanted:
                    # up to where some pairs are already: an earlier run may have had another batch size
                    ahead = [len(losses) for losses in lists.values() if len(losses) > start]
                    end = min([start + self.batch_size, wanted, *ahead])
                    batch = self.cost_blocks[start:end].to(self.device)
                    with probe.recording():
                        own = _block_losses(batch, *functions)
                    found.full_losses[start:end] = own
                    for (layer, source), losses in lists.items():
                        if len(losses) == start:
                            with probe.reading(layer, source):
                                losses += _block_losses(batch, *functions)
                            advance(end - start)
                            self._save_sometimes()
        self.save()

    def _loss_lists(self) -> dict[tuple[int, int], list[float]]:
        """By pair: the list in the calibration, which grows by one for each block."""
        rows = self.calibration.cost_losses
        return {(layer, j): rows.setdefault(layer, {}).setdefault(j, []) for layer, j in self.calibration.pairs()}

    def plan_losses(self, plan: SharingPlan) -> list[float]:
        """Loss of each cost block under a plan; measured once and kept."""
        found = self.calibration
        if plan.is_full:
            if len(found.full_losses) < len(self.cost_blocks):
                self._measure_full()
            return found.full_losses
        if plan.kv_source_layers not in found.plan_losses:
            started = time.monotonic()
            with share(self.model, plan):
                result = perplexity(self.model, self.cost_blocks, batch_size=self.batch_size)
            found.plan_losses[plan.kv_source_layers] = list(result.block_losses)
            found.seconds["plans"] = found.seconds.get("plans", 0.0) + time.monotonic() - started
            self._save_sometimes()
        return found.plan_losses[plan.kv_source_layers]

    def plan_loss(self, plan: SharingPlan) -> float:
        """The mean of `plan_losses`."""
        self.plan_losses(plan)
        loss = self.calibration.plan_loss(plan)
        assert loss is not None
        return loss

    @property
    def has_adapter(self) -> bool:
        """Whether the model has an adapter that is on while layers share, and off in the model with its full cache."""
        return adapter_switch(self.model) is not None

    @contextmanager
    def with_own_kv(self) -> Iterator[None]:
        """Every layer reads its own keys and values; an adapter that belongs to sharing is on, as under a plan."""
        with self._evaluating(), Probe(self.model) as probe, probe.recording():
            yield

    def _measure_full(self) -> None:
        with self.with_own_kv():
            result = perplexity(self.model, self.cost_blocks, batch_size=self.batch_size)
        self.calibration.full_losses = list(result.block_losses)

    # Files and time

    def save(self) -> None:
        """Write the file, if there is one."""
        self._saved = time.monotonic()
        if self.path is not None:
            self.calibration.save(self.path)

    def _save_sometimes(self) -> None:
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        earlier = self.calibration.seconds.get(phase, 0.0)
        try:
            yield
        finally:
            self.calibration.seconds[phase] = round(earlier + time.monotonic() - started, 2)
            if phase == "costs":
                self.save()  # Ctrl-C loses nothing

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)

    def _empty(self) -> Matrix:
        size = self.calibration.num_layers
        return [[None] * size for _ in range(size)]


class _MomentsFile:
    """Sums of a similarity pass under way, beside the calibration file; it is deleted when the pass is done."""

    def __init__(self, path: Path | None, of: str) -> None:
        self.path = None if path is None else path.with_name(f".{path.name}.moments.safetensors")
        self.of = of
        self._saved = time.monotonic()
        self._took = 0.0
        """Seconds of the last save: the sums of a large model are gigabytes."""

    def restore(self, sums: dict[tuple[str, int], Moments]) -> int:
        """Blocks that are summed already."""
        from safetensors import SafetensorError, safe_open

        if self.path is None or not self.path.exists():
            return 0
        try:
            with safe_open(self.path, framework="pt") as file:
                about: Any = file.metadata() or {}
                if about.get("of") != self.of:
                    return 0
                for (name, group), moments in sums.items():
                    moments.restore({key: file.get_tensor(f"{name}.{group}.{key}") for key in SUMS})
                return int(about["blocks"])
        except (OSError, SafetensorError) as error:
            raise DepthKVError(f"expected sums of a stopped run in {self.path}, got {error}; delete it") from error

    def save(self, sums: dict[tuple[str, int], Moments], blocks: int) -> None:
        """Now and then."""
        from safetensors.torch import save_file

        if self.path is None or time.monotonic() - self._saved < max(SAVE_SECONDS, 20 * self._took):
            return
        started = time.monotonic()
        tensors = {f"{name}.{group}.{k}": v for (name, group), m in sums.items() for k, v in m.state().items()}
        with replacing(self.path, "the sums of the calibration") as temporary:
            save_file(tensors, temporary, metadata={"of": self.of, "blocks": str(blocks)})
        self._saved = time.monotonic()
        self._took = self._saved - started

    def remove(self) -> None:
        """The pass is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _block_losses(batch: torch.Tensor, forward: Features, to_logits: Features) -> list[float]:
    """Mean loss of each block of a batch, nats per token."""
    losses = token_losses(forward(batch), batch[:, 1:].flatten(), to_logits)
    means = losses.view(len(batch), -1).double().mean(dim=1)
    _require_finite(means)
    return means.tolist()


def _require_finite(*tensors: torch.Tensor) -> None:
    """Before anything is kept: a file must not hold what cannot be used."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise DepthKVError("expected finite figures, got some that are not; try --dtype float32 or bfloat16")


def _put(matrix: Matrix, layers: Sequence[int], values: torch.Tensor) -> None:
    """`values[a][b]` to where reader layers[a] and source layers[b] stand; sources come no later than readers."""
    for a, reader in enumerate(layers):
        for b in range(a + 1):
            matrix[reader][layers[b]] = round(float(values[a, b]), 6)
