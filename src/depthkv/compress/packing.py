"""Quantised keys and values as they lie in memory, in plain torch: codes really packed into bytes.

A byte holds codes that are far apart (for 4 bits tokens `t` and `t + group_size / 2` of a group along tokens, channels
`c` and `c + head_dim / 2` along channels), so that each shift fills one contiguous part of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction

import torch
from torch import Tensor

from depthkv.compress.quantization import Along, Bits, encode, encode_fp8, read, read_fp8, split, used_group_size
from depthkv.errors import DepthKVError

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Elements unpacked at a time, which bounds what `unpack` needs beside its output. A GPU needs larger kernels.
_CPU_CHUNK, _GPU_CHUNK = 1 << 21, 1 << 26


def packed_bytes_per_token(
    bits: Bits, group_size: int, head_dim: int, kv_heads: int, dtype: torch.dtype, along: Along
) -> Fraction:
    """Bytes of one token's keys or values in one layer and batch row: codes, steps and minima.

    Times the number of tokens that a `PackedTensor` can hold, this is a whole number and the size of its storages.
    """
    group = used_group_size(bits, group_size, head_dim, along)
    if bits == "fp8":
        return Fraction(kv_heads * (head_dim + dtype.itemsize))
    return kv_heads * head_dim * (Fraction(bits, 8) + Fraction(2 * dtype.itemsize, group))


class PackedTensor:
    """Quantised keys or values of one layer, `[batch, kv_heads, tokens, head_dim]` when read.

    A group that holds an infinity or NaN reads as not finite as a whole. Groups whose elements are all equal read
    exactly. Else the error is at most half a step, where a step is the range of the group / (2**bits - 1), rounded up
    in the input's dtype, plus the rounding of the result to that dtype.
    """

    def __init__(self, codes: Tensor, scale: Tensor, minimum: Tensor | None, bits: Bits, group: int, along: Along):
        self._codes = codes
        """uint8: `[batch, kv_heads, tokens / n, head_dim]` along tokens, `[batch, kv_heads, tokens, head_dim / n]`
        along channels, where a byte holds n codes."""
        self._scale = scale
        """`[batch, kv_heads, tokens / group, head_dim]`, `[..., tokens, head_dim / group]`, fp8 `[..., tokens, 1]`."""
        self._minimum = minimum
        """As the scale; None for fp8."""
        self.bits: Bits = bits
        self.group_size = group
        self.along: Along = along

    @classmethod
    def pack(cls, x: Tensor, *, bits: Bits, group_size: int, along: Along) -> PackedTensor:
        """Quantise `x`, `[batch, kv_heads, tokens, head_dim]` in a floating dtype.

        Args:
            group_size: elements that share a step and a minimum. Along channels the largest divisor of `head_dim` that
                is not larger; along tokens it must divide the number of tokens. Without meaning for fp8.

        Raises:
            DepthKVError: an option is not one of those above, or does not fit the shape of `x`.
        """
        if x.dim() != 4 or x.dtype not in _DTYPES:
            raise DepthKVError(
                f"expected [batch, kv_heads, tokens, head_dim] in a floating dtype, got {list(x.shape)} in {x.dtype}"
            )
        group = used_group_size(bits, group_size, x.shape[3], along)
        if bits == "fp8":
            codes, scale = encode_fp8(x.detach())
            return cls(codes, scale, None, bits, 1, along)
        if along == "tokens" and x.shape[2] % group:
            raise DepthKVError(f"expected a number of tokens that is a multiple of {group}, got {x.shape[2]}")
        codes, scale, minimum = encode(x.detach(), bits, group, along)
        first, *others = _parts(codes, bits, group, along)
        packed = first.clone(memory_format=torch.contiguous_format)
        for i, part in enumerate(others, start=1):
            packed |= part << bits * i
        return cls(packed.flatten(2, -2), scale, minimum, bits, group, along)

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return self._scale.shape[2] * self._step

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what was packed, and of what is read."""
        return self._scale.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(batch, kv_heads, tokens, head_dim)` as read."""
        batch, heads, _, width = self._codes.shape
        head_dim = width if self.bits == "fp8" or self.along == "tokens" else width * 8 // self.bits
        return batch, heads, self.num_tokens, head_dim

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held: codes, scale and minimum, each the whole of its storage."""
        return (self._codes, self._scale) if self._minimum is None else (self._codes, self._scale, self._minimum)

    def unpack(self, out: Tensor | None = None) -> Tensor:
        """The values, `[batch, kv_heads, tokens, head_dim]` in `dtype`.

        Args:
            out: where to write them, such as a slice of the tokens of a larger buffer.

        Raises:
            DepthKVError: `out` has another shape or dtype.
        """
        if out is None:
            out = torch.empty(self.shape, dtype=self.dtype, device=self._codes.device)
        if out.shape != self.shape or out.dtype != self.dtype:
            raise DepthKVError(
                f"expected out of shape {list(self.shape)} in {self.dtype}, got {list(out.shape)} in {out.dtype}"
            )
        batch, heads, tokens, head_dim = self.shape
        chunk = _CPU_CHUNK if out.device.type == "cpu" else _GPU_CHUNK
        chunk = max(1, chunk // max(1, batch * heads * head_dim * self._step)) * self._step
        for start in range(0, tokens, chunk):
            self._unpack_tokens(start, min(tokens, start + chunk), out)
        return out

    def append(self, other: PackedTensor) -> None:
        """Put the tokens of `other` after those held.

        Raises:
            DepthKVError: `other` is packed in another way.
        """
        mine, its = ((t.bits, t.group_size, t.along, t.dtype) for t in (self, other))
        if mine != its:
            raise DepthKVError(f"expected a tensor packed as {mine}, got {its}")
        self._set(torch.cat(pair, dim=2) for pair in zip(self.tensors(), other.tensors(), strict=True))

    def drop_first(self, num_tokens: int) -> None:
        """Forget the first `num_tokens`, whole groups along tokens, and free their memory."""
        if not 0 <= num_tokens <= self.num_tokens or num_tokens % self._step:
            raise DepthKVError(f"expected a multiple of {self._step} tokens up to {self.num_tokens}, got {num_tokens}")
        # the clone is what frees the memory: a view would keep the whole storage
        held = self._cut(num_tokens, self.num_tokens)
        self._set(t.clone(memory_format=torch.contiguous_format) for t in held)

    def keep_groups(self, groups: Tensor, size: int) -> None:
        """Keep some groups of `size` tokens only, each head its own.

        Args:
            groups: their numbers in the order to keep, int64 `[batch, kv_heads, kept]`.
            size: tokens of each, whole groups along tokens.
        """
        number = self.num_tokens // size
        self._set(keep_groups(t, groups, number) for t in self.tensors())

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Do the same to all that is held, along the batch (the first dimension of each) or to another device."""
        self._set(change(t) for t in self.tensors())

    @property
    def _step(self) -> int:
        """Tokens can be cut at multiples of this."""
        return self.group_size if self.along == "tokens" and self.bits != "fp8" else 1

    def _set(self, tensors: Iterable[Tensor]) -> None:
        self._codes, self._scale, *minimum = tensors
        self._minimum = minimum[0] if minimum else None

    def _cut(self, start: int, stop: int) -> list[Tensor]:
        """Views of `tensors()` with the tokens from `start` to `stop` only."""
        tokens = max(1, self.num_tokens)
        return [t[:, :, start * t.shape[2] // tokens : stop * t.shape[2] // tokens] for t in self.tensors()]

    def _unpack_tokens(self, start: int, stop: int, out: Tensor) -> None:
        """Write the tokens from `start` to `stop` to their place in `out`."""
        codes, scale, *minimum = self._cut(start, stop)
        out = out[:, :, start:stop]
        if self.bits == "fp8":
            return read_fp8(codes, scale, out)
        per_byte, mask = 8 // self.bits, 2**self.bits - 1
        if self.along == "tokens":
            codes = split(codes, 2, scale.shape[2], self.group_size // per_byte)
        if out.device.type == "cpu":  # into `out`, as numbers of its dtype, all of which are exact
            for i, part in enumerate(_parts(out, self.bits, self.group_size, self.along)):
                part.copy_(codes >> self.bits * i & mask if i else codes & mask)
            numbers = out
        else:  # few kernels
            shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=out.device)
            shifts = shifts.view(-1, *[1] * (codes.dim() - 3))
            numbers = (codes.unsqueeze(3) >> shifts).bitwise_and_(mask).view(out.shape)
        read(numbers, scale, minimum[0], out, self.group_size, self.along)


def _parts(x: Tensor, bits: int, group: int, along: Along) -> tuple[Tensor, ...]:
    """Views of `x` whose elements at the same place share a byte, lowest bits first."""
    per_byte = 8 // bits
    if along == "tokens":
        return split(x, 2, x.shape[2] // group, per_byte, group // per_byte).unbind(3)
    return x.chunk(per_byte, dim=3)


class PlainTensor:
    """The same for numbers that are kept as they are: 16 bits in a recipe."""

    def __init__(self, whole: Tensor) -> None:
        self._whole = whole.clone(memory_format=torch.contiguous_format)

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return self._whole.shape[2]

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held."""
        return (self._whole,)

    def unpack(self, out: Tensor) -> Tensor:
        """Copy the values to `out`."""
        return out.copy_(self._whole)

    def append(self, other: PlainTensor) -> None:
        """Put the tokens of `other` after those held."""
        self._whole = torch.cat([self._whole, other._whole], dim=2)

    def drop_first(self, num_tokens: int) -> None:
        """Forget the first `num_tokens`, and free their memory."""
        self._whole = self._whole[:, :, num_tokens:].clone(memory_format=torch.contiguous_format)

    def keep_groups(self, groups: Tensor, size: int) -> None:
        """As `PackedTensor.keep_groups`."""
        self._whole = keep_groups(self._whole, groups, self.num_tokens // size)

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """As `PackedTensor.change`."""
        self._whole = change(self._whole)


def keep_groups(x: Tensor, groups: Tensor, number: int) -> Tensor:
    """Of the `number` equal runs of rows of `x`, `[batch, kv_heads, rows, width]`, those in `groups`.

    Args:
        groups: their numbers in the order to keep, int64 `[batch, kv_heads, kept]`.
    """
    batch, heads, rows, width = x.shape
    runs = x.view(batch, heads, number, rows // number * width)
    kept = runs.gather(2, groups[..., None].expand(*groups.shape, runs.shape[3]))
    return kept.view(batch, heads, groups.shape[2] * (rows // number), width)
