"""What the server tells Prometheus."""

from __future__ import annotations

import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_WINDOW = 10.0
"""Seconds over which tokens/s are counted."""


class Metrics:
    """Counters and gauges of one engine, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"depthkv_{name}", text, registry=self.registry)

        self.cache_bytes = gauge("kv_cache_bytes", "Bytes that the KV caches of running requests hold.")
        self.cache_bytes_peak = gauge("kv_cache_peak_bytes", "Most that they held since the start.")
        self.budget_bytes = gauge("kv_budget_bytes", "Most that they may hold; 0 is no limit.")
        self.num_leaders = gauge("num_leaders", "Layers that keep a cache, mean over running requests.")
        self.waiting = gauge("requests_waiting", "Requests that wait for room.")
        self.running = gauge("requests_running", "Requests that are being answered.")
        self.running_peak = gauge("requests_running_peak", "Most at once since the start.")
        self.tokens_per_second = gauge("tokens_per_second", f"Written in the last {_WINDOW:.0f} seconds.")
        self.tokens_per_second.set_function(self._rate)
        self.prompt_tokens = Counter("depthkv_prompt_tokens", "Tokens read.", registry=self.registry)
        self.tokens = Counter("depthkv_generated_tokens", "Tokens written.", registry=self.registry)
        self.given_up = Counter(
            "depthkv_layers_given_up", "Layers given up under pressure, new requests' included.", registry=self.registry
        )
        self.requests = Counter("depthkv_requests", "Requests that ended.", ["outcome"], registry=self.registry)
        self.ttft = Histogram(
            "depthkv_time_to_first_token_seconds",
            "From the request's arrival, waiting included.",
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
            registry=self.registry,
        )
        self._peak = self._most = 0
        self._recent: deque[tuple[float, int]] = deque()

    def wrote(self, num_tokens: int) -> None:
        """So many tokens were written just now."""
        self.tokens.inc(num_tokens)
        now = time.monotonic()
        self._recent.append((now, num_tokens))
        while self._recent and self._recent[0][0] < now - _WINDOW:
            self._recent.popleft()

    def holds(self, num_bytes: int) -> None:
        """The caches hold so many bytes."""
        self.cache_bytes.set(num_bytes)
        self._peak = max(self._peak, num_bytes)
        self.cache_bytes_peak.set(self._peak)

    def runs(self, num_requests: int) -> None:
        """So many requests are being answered."""
        self.running.set(num_requests)
        self._most = max(self._most, num_requests)
        self.running_peak.set(self._most)

    def value(self, name: str, **labels: str) -> float:
        """What Prometheus would read now, 0 for what was never set; `name` is without `depthkv_`."""
        return self.registry.get_sample_value(f"depthkv_{name}", labels) or 0.0

    def _rate(self) -> float:
        oldest = time.monotonic() - _WINDOW
        # the engine's thread adds to it meanwhile
        return sum(tokens for at, tokens in list(self._recent) if at >= oldest) / _WINDOW
