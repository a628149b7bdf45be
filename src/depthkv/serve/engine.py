"""One thread that answers all requests: it admits, reads prompts one by one, and decodes what runs in one batch.

A request is admitted when it and everybody who runs would fit at their full length with the fewest layers that the
server allows. So whoever was admitted is never stopped for lack of room; what the budget takes meanwhile is layers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from depthkv.adaptive import Router
from depthkv.adaptive.budget import KVBudget
from depthkv.adaptive.ladder import Sources
from depthkv.decoder import find_decoder
from depthkv.errors import CheckpointError, DepthKVError, ServerBusyError, ServerStoppedError
from depthkv.export import has_kv
from depthkv.plan import SharingPlan
from depthkv.serve.depth import Depths, Need, RequestRouter
from depthkv.serve.metrics import Metrics
from depthkv.serve.ragged import RaggedModel, SequenceCache, joint_step
from depthkv.serve.request import ADAPTIVE, EngineSettings, Failure, Progress, Request
from depthkv.serve.text import Codec, Writer, choose, end_tokens

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class _Running:
    request: Request
    cache: SequenceCache
    writer: Writer
    random: torch.Generator
    token: int
    """The last one written, not yet read."""
    num_tokens: int = 0


class Engine:
    """Answers requests on a thread of its own.

    Args:
        model: on its device, in evaluation mode; an adapter is merged into its weights. It is shared until `stop`.
        tokenizer: its own.
        plan: what requests get that ask for nothing.
        settings: limits.
        min_retention: see `depthkv.serve.depth.Depths`.
        max_retention: the same.
        router: chooses for requests with `kv_retention="adaptive"`.

    Raises:
        DepthKVError: bounds that contradict each other, or a router for another model.
        CheckpointError: the model computes something that is no number.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        plan: SharingPlan | None = None,
        settings: EngineSettings | None = None,
        *,
        min_retention: float | None = None,
        max_retention: float | None = None,
        router: Router | None = None,
    ) -> None:
        self.settings = settings or EngineSettings()
        # sequences of all retentions are decoded together, so that the adapter of sharing is on for all of them
        self.model: Any = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        decoder = find_decoder(self.model)
        self.kinds = decoder.kinds
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        can_lead = [layer for layer in range(decoder.num_layers) if has_kv(decoder, layer)]
        self.depths = Depths(self.kinds, dtype, plan, min_retention, max_retention, can_lead)
        self.codec = Codec(tokenizer)
        self.metrics = Metrics()
        self.metrics.budget_bytes.set(self.settings.kv_budget or 0)
        self._ends = end_tokens(self.model, tokenizer)
        self._router = RequestRouter(self.depths, router)
        self._handle = RaggedModel.of(self.model, self._router)
        self._waiting: deque[Request] = deque()
        self._running: list[_Running] = []
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="depthkv-engine", daemon=True)
        try:
            self._check_model()
        except BaseException:
            self._handle.remove()
            raise
        self._thread.start()

    # What other threads call

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return len(self.kinds)

    @property
    def is_adaptive(self) -> bool:
        """Whether requests may ask for `ADAPTIVE`."""
        return self._router.router is not None

    @property
    def is_alive(self) -> bool:
        """Whether requests are being answered."""
        return self._thread.is_alive()

    def check(self, request: Request) -> None:
        """Refuse what can never be answered.

        Raises:
            DepthKVError: too long, outside the bounds, or without room even if it ran alone with the fewest layers.
        """
        if not request.prompt:
            raise DepthKVError("expected a prompt of at least one token, got none")
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        if outside := [token for token in request.prompt if not 0 <= token < vocabulary]:
            raise DepthKVError(f"expected tokens from 0 to {vocabulary - 1}, got {outside[0]}")
        total = len(request.prompt) + request.max_tokens
        if total > self.settings.max_context:
            raise DepthKVError(
                f"expected a prompt and max_tokens of at most {self.settings.max_context} tokens together, got "
                f"{len(request.prompt)} + {request.max_tokens}"
            )
        needed, budget = self._least_bytes(self._start(request), request), self.settings.kv_budget
        if budget is not None and needed > budget:
            raise DepthKVError(
                f"expected a request whose cache fits into the server's {budget:,} bytes, got one of {needed:,} bytes "
                f"with the fewest layers"
            )

    def submit(self, request: Request) -> None:
        """Queue a request; its listener gets `Progress` and, if it fails, one `Failure`.

        Raises:
            DepthKVError: what `check` refuses.
            ServerBusyError: too many wait already.
            ServerStoppedError: it ends or has ended.
        """
        self.check(request)
        with self._changed:
            if self._is_stopping:
                raise ServerStoppedError("expected a running server, got one that is stopping")
            if len(self._waiting) >= self.settings.max_queue:
                raise ServerBusyError(f"expected at most {self.settings.max_queue} waiting requests, got one more")
            self._waiting.append(request)
            self.metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Nobody listens any more: its room is free after the present step. Harmless for what has ended."""
        with self._changed:
            request.is_cancelled = True
            if request in self._waiting:  # it leaves the queue at once, which others may want to join
                self._waiting.remove(request)
                self.metrics.requests.labels("cancelled").inc()
                self.metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def stop(self) -> None:
        """End the thread after the present step; whatever still runs or waits fails. The model is as it was before."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join()
        self._fail_all()
        self._handle.remove()

    # The thread

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._drop()
                self._admit()
                if self._running:
                    self._decode()
                self._count()
        except BaseException:  # a mistake of this file: nobody may wait for ever
            log.exception("the engine ended")
            with self._changed:
                self._is_stopping = True
            self._fail_all()
            raise

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._waiting or self._running or self._is_stopping):
                self._changed.wait()
            return not self._is_stopping

    def _fail_all(self) -> None:
        for request in [*self._waiting, *(running.request for running in self._running)]:
            self._fail(request, Failure(status=503, message="expected a running server, got one that is stopping"))
        self._waiting.clear()
        self._running.clear()
        self._count()

    def _drop(self) -> None:
        """Forget who left, fail who took too long."""
        late = time.monotonic() - self.settings.timeout_s
        with self._changed:
            waiting = list(self._waiting)
            gone = {id(request) for request in waiting if request.is_cancelled or request.arrived < late}
            self._waiting = deque(request for request in self._waiting if id(request) not in gone)
        ended = [running for running in self._running if running.request.is_cancelled or running.request.arrived < late]
        self._running = [running for running in self._running if running not in ended]
        for request in [*(r for r in waiting if id(r) in gone), *(running.request for running in ended)]:
            if request.is_cancelled:
                self.metrics.requests.labels("cancelled").inc()
            else:
                message = f"expected an answer within {self.settings.timeout_s:g} seconds, got a longer one"
                self._fail(request, Failure(status=504, message=message))

    def _start(self, request: Request) -> Sources:
        """The map that the request begins with; of an adaptive one the largest that it may get."""
        wanted = request.kv_retention
        if wanted == ADAPTIVE:
            if self._router.router is None:
                raise DepthKVError('expected kv_retention as a number, got "adaptive" and a server without --router')
            return self.depths.start(self.depths.max_retention)
        if isinstance(wanted, str):
            raise DepthKVError(f'expected kv_retention as a number or "adaptive", got {wanted!r}')
        return self.depths.start(self.depths.default if wanted is None else wanted)

    def _least_bytes(self, sources: Sources, request: Request) -> int:
        return self.depths.num_bytes(self.depths.smallest(sources), request.most_cached)

    def _admit(self) -> None:
        """Read the first waiting prompt, if there is room: one for each step, so that those who run go on."""
        with self._changed:
            request = self._waiting[0] if self._waiting else None
        if request is None or len(self._running) >= self.settings.max_sequences:
            return
        start, budget = self._start(request), self.settings.kv_budget
        reserved = sum(self._least_bytes(running.cache.sources, running.request) for running in self._running)
        if budget is not None and reserved + self._least_bytes(start, request) > budget:
            return
        needs = [Need(sources=r.cache.sources, num_tokens=r.cache.num_tokens + 1) for r in self._running]
        needs.append(Need(sources=start, num_tokens=min(len(request.prompt) + 1, request.most_cached)))
        if not self.depths.fit(needs, budget):  # cannot happen after what was reserved
            return
        self._apply(needs[:-1])
        self.metrics.given_up.inc(len(set(start)) - len(set(needs[-1].sources)))
        with self._changed:
            if request not in self._waiting:  # cancelled meanwhile
                return
            self._waiting.remove(request)
            self.metrics.waiting.set(len(self._waiting))
        try:
            self._begin(request, needs[-1].sources)
        except Exception:
            log.exception("a prompt of %d tokens failed", len(request.prompt))
            self._fail(request, Failure(status=500, message="expected an answer, got an internal error"))

    def _begin(self, request: Request, sources: Sources) -> None:
        """Read a prompt and write its first token."""
        adaptive = request.kv_retention == ADAPTIVE
        room = self.depths.num_bytes(sources, len(request.prompt))
        self._handle.budget = KVBudget(sequence=room if adaptive and self.settings.kv_budget is not None else None)
        self._router.choose(None if adaptive else sources)
        try:
            logits, cache = self._prefill(request.prompt)
        finally:
            self._handle.budget = KVBudget()  # of this prompt alone; steps are fitted before they run
        if adaptive:
            while len(set(cache.sources)) > len(set(sources)) and (below := self.depths.smaller(cache.sources)):
                cache.assign(below)
        random = torch.Generator()
        random.seed() if request.seed is None else random.manual_seed(request.seed)
        writer = Writer(self.codec, request.prompt, request.stop)
        running = _Running(request=request, cache=cache, writer=writer, random=random, token=-1)
        self.metrics.prompt_tokens.inc(len(request.prompt))
        self.metrics.ttft.observe(time.monotonic() - request.arrived)
        self._running.append(running)
        self._count()
        self._write([running], logits)

    @torch.no_grad()
    def _prefill(self, prompt: Sequence[int]) -> tuple[torch.Tensor, SequenceCache]:
        """Logits `[1, vocabulary]` after a prompt, and its cache."""
        cache: Any = DynamicCache(config=self.model.config)
        ids = torch.tensor([list(prompt)], device=self.model.device)
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1], SequenceCache.of_prompt(cache.layers, len(prompt))

    @torch.no_grad()
    def _decode(self) -> None:
        """One more token of everybody."""
        while True:
            needs = [Need(sources=r.cache.sources, num_tokens=r.cache.num_tokens + 1) for r in self._running]
            if self.depths.fit(needs, self.settings.kv_budget):
                break
            # a router chose a map that cannot be made as small as was reserved: the budget holds all the same
            chosen = [r for r in self._running if r.request.kv_retention == ADAPTIVE] or self._running
            last = chosen[-1]
            self._running.remove(last)
            self._fail(last.request, Failure(status=503, message="expected room for the answer, got none"))
        if not self._running:
            return
        self._apply(needs)
        running = list(self._running)
        try:
            logits = joint_step(self.model, self.kinds, [r.cache for r in running], [r.token for r in running])
        except Exception:  # the caches are of unlike lengths now
            log.exception("a step of %d requests failed", len(running))
            self._running.clear()
            for r in running:
                self._fail(r.request, Failure(status=500, message="expected an answer, got an internal error"))
            return
        self._count()
        self._write(running, logits)

    def _apply(self, needs: Sequence[Need]) -> None:
        """Let those who run give up what was decided."""
        for running, need in zip(self._running, needs, strict=True):
            if need.sources != running.cache.sources:
                before = running.cache.num_leaders
                running.cache.assign(need.sources)
                self.metrics.given_up.inc(before - running.cache.num_leaders)

    def _write(self, rows: Sequence[_Running], logits: torch.Tensor) -> None:
        """Choose the next token of each from its row of logits, and tell its listener."""
        for running, row in zip(rows, logits.float().cpu(), strict=True):
            event: Progress | Failure
            try:
                event = self._next(running, row)
            except Exception:
                log.exception("choosing a token failed")
                event = Failure(status=500, message="expected an answer, got an internal error")
            if isinstance(event, Failure):
                self._running.remove(running)
                self._fail(running.request, event)
                continue
            if event.finish_reason is not None:
                self._running.remove(running)
                self.metrics.requests.labels(event.finish_reason).inc()
            self._tell(running.request, event)
        self.metrics.wrote(len(rows))

    def _next(self, running: _Running, row: torch.Tensor) -> Progress | Failure:
        request, writer = running.request, running.writer
        if not row.max().isfinite():  # any NaN is the maximum
            return Failure(status=500, message="expected numbers from the model, got others")
        running.token = choose(row, request.temperature, request.top_p, running.random)
        running.num_tokens += 1
        ended = running.token in self._ends
        text = "" if ended else writer.add(running.token)
        reason = "stop" if ended or writer.stopped else "length" if running.num_tokens >= request.max_tokens else None
        if reason is not None:
            text += writer.finish()
            reason = "stop" if writer.stopped else reason
        return Progress(
            token=running.token,
            text=text,
            num_tokens=running.num_tokens,
            cache_bytes=running.cache.num_bytes,
            num_leaders=running.cache.num_leaders,
            finish_reason=reason,
        )

    def _fail(self, request: Request, failure: Failure) -> None:
        self.metrics.requests.labels("failed").inc()
        self._tell(request, failure)

    def _tell(self, request: Request, event: Progress | Failure) -> None:
        try:
            request.listener(event)
        except Exception:  # a listener's trouble is no other request's
            log.exception("a listener failed")
            request.is_cancelled = True

    def _count(self) -> None:
        running = self._running
        self.metrics.waiting.set(len(self._waiting))
        self.metrics.runs(len(running))
        self.metrics.holds(sum(r.cache.num_bytes for r in running))
        leaders = sum(r.cache.num_leaders for r in running)
        self.metrics.num_leaders.set(leaders / len(running) if running else 0)

    def _check_model(self) -> None:
        """A damaged checkpoint can load and compute nonsense."""
        self._router.choose(self.depths.start(self.depths.default))
        logits, cache = self._prefill([0])
        joint = torch.no_grad()(joint_step)(self.model, self.kinds, [cache], [0])
        if not bool(logits.isfinite().all() and joint.isfinite().all()):
            raise CheckpointError("expected a model that computes finite logits, got others: its weights are damaged")
