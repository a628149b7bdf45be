"""Bodies of requests and answers. What this server does not do is refused by name, and never dropped in silence."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "metadata": ({},),
}
"""Parameters of OpenAI's that are taken only where they change nothing (or are null)."""

Text = Annotated[str, Field(max_length=1_000_000)]
Token = Annotated[int, Field(ge=0, strict=True)]


class StreamOptions(BaseModel):
    """Of a stream."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Sampling(BaseModel):
    """What both kinds of completions take."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    max_tokens: Annotated[int, Field(ge=1, strict=True)] | None = Field(
        None, description="Most tokens to write; by default what the server allows."
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0 takes the likeliest token.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)] | None = None
    stop: Annotated[str, Field(min_length=1)] | Annotated[list[Text], Field(max_length=16)] | None = Field(
        None, description="The answer ends before any of these texts."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    kv_retention: float | Literal["adaptive"] | None = Field(
        None,
        description="Share of the layers that keep a cache for this request, within the server's bounds, or "
        '"adaptive". Under pressure the server lowers it further.',
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in [name for name in _NEUTRAL if name in data and name not in cls.model_fields]:
            value = data[name]
            # 0 is False to Python, but as logprobs it asks for something
            neutral = any(value == ok and isinstance(value, bool) == isinstance(ok, bool) for ok in _NEUTRAL[name])
            if value is not None and not neutral:
                shown = repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:100]}..."
                raise ValueError(f"expected {name} to be left out, since this server does not support it, got {shown}")
        return {name: value for name, value in data.items() if name not in _NEUTRAL}

    @field_validator("kv_retention", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(f'expected a share of the layers or "adaptive", got {value}')
        return value

    @field_validator("temperature", "top_p", "kv_retention")
    @classmethod
    def _finite(cls, value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"expected a finite number, got {value}")
        return value

    @property
    def stops(self) -> list[str]:
        """Always a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: Text | list[Token] = Field(description="One text, or the tokens of one.")


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: None = Field(None, description="Not supported.")

    def to_template(self) -> dict[str, str]:
        """What chat templates take."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None


# Answers


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CacheReport(BaseModel):
    """What the request's KV cache is at this token."""

    cache_bytes: int
    num_leaders: int
    num_layers: int


class CompletionChoice(BaseModel):
    """An answer, or a piece of one."""

    index: int = 0
    text: str
    finish_reason: str | None = None
    logprobs: None = None


class Completion(BaseModel):
    """Answer of /v1/completions, and each piece of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    depthkv: CacheReport | None = None


class ChatMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """The answer."""

    index: int = 0
    message: ChatMessage
    finish_reason: str | None = None
    logprobs: None = None


class ChatCompletion(BaseModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None
    depthkv: CacheReport | None = None


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "depthkv"
    num_layers: int
    min_retention: float
    max_retention: float
    default_retention: float
    adaptive: bool
    max_context: int
    max_tokens: int
    chat: bool


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every error, in OpenAI's form."""

    error: ErrorDetail


def new_id(prefix: str) -> tuple[str, int]:
    """An answer's id and the time."""
    return f"{prefix}-{uuid.uuid4().hex}", int(time.time())


def usage(prompt: Sequence[int], written: int) -> Usage:
    """Of a prompt's tokens and the number of those written."""
    return Usage(prompt_tokens=len(prompt), completion_tokens=written, total_tokens=len(prompt) + written)
