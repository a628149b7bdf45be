"""What goes into the engine and comes out of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from depthkv.errors import DepthKVError

ADAPTIVE = "adaptive"
"""As `kv_retention`: the router chooses."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Limits of one engine."""

    kv_budget: int | None = None
    """Bytes of all caches together; None is no limit."""
    max_sequences: int = 16
    """Answered at once."""
    max_queue: int = 256
    """Requests that may wait."""
    max_context: int = 2048
    """Tokens of a prompt and its answer."""
    timeout_s: float = 300.0
    """Seconds from arrival to the last token."""

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_context", "timeout_s"):
            if getattr(self, name) <= 0:
                raise DepthKVError(f"expected {name} above 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a request's listener gets after each token, and once at the end."""

    token: int
    """The one just written."""
    text: str
    """New text; may be empty."""
    num_tokens: int
    """Written so far."""
    cache_bytes: int
    """Of this request."""
    num_leaders: int
    """That keep a cache for this request."""
    finish_reason: str | None = None
    """"stop" or "length"; None while it goes on."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The end of a request that cannot be answered."""

    status: int
    """Of HTTP."""
    message: str


@dataclass(kw_only=True, eq=False)
class Request:
    """A prompt and how to go on from it."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    max_tokens: int
    """Most to write, at least one."""
    listener: Callable[[Progress | Failure], None]
    """Called from the engine's thread."""
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    kv_retention: float | str | None = None
    """Share of the layers to begin with, `ADAPTIVE`, or None for the server's choice."""
    arrived: float = field(default_factory=time.monotonic)
    is_cancelled: bool = False

    @property
    def most_cached(self) -> int:
        """Tokens in the cache at the end: the last one is never read."""
        return len(self.prompt) + self.max_tokens - 1
