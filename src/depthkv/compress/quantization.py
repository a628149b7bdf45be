"""Rounding keys and values to codes and reading them back, after KIVI (arXiv:2402.02750).

Keys have channels that are large for every token, so a group of keys is `group_size` consecutive tokens of one channel
(`along="tokens"`). Values have none, so a group of values is neighbouring channels of one token (`along="channels"`).
A group has its minimum and its step in the dtype of the input, and a code of 8, 4 or 2 bits per element.
`bits="fp8"` is float8_e4m3fn with one scale per token and head instead.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from depthkv.errors import DepthKVError

Bits = Literal[8, 4, 2, "fp8"]
Along = Literal["tokens", "channels"]

_FP8_MAX = 448.0  # the largest float8_e4m3fn


def fake_quantize(x: Tensor, bits: Bits, group_size: int, along: Along) -> Tensor:
    """What `PackedTensor` would return for `x`, with the gradient of the identity, to train with quantisation noise.

    Args:
        x: `[batch, kv_heads, tokens, head_dim]`, any number of tokens. An incomplete last group of tokens is a group
            of its own.
    """
    group, tokens = used_group_size(bits, group_size, x.shape[3], along), x.shape[2]
    rest = tokens % group if along == "tokens" and bits != "fp8" else 0
    with torch.no_grad():
        noisy = _read_back(x[:, :, : tokens - rest], bits, group, along)
        if rest:
            noisy = torch.cat([noisy, _read_back(x[:, :, tokens - rest :], bits, rest, along)], dim=2)
    return noisy + (x - x.detach())  # adds exactly 0, and the gradient


def used_group_size(bits: Bits, group_size: int, head_dim: int, along: Along) -> int:
    """`group_size`; along channels the largest divisor of `head_dim` that is not larger.

    Raises:
        DepthKVError: an option is not one of those above, or codes would not fill whole bytes.
    """
    if bits not in (8, 4, 2, "fp8"):
        raise DepthKVError(f'expected 8, 4 or 2 bits or "fp8", got {bits!r}')
    if along not in ("tokens", "channels"):
        raise DepthKVError(f'expected groups along "tokens" or "channels", got {along!r}')
    if group_size < 1:
        raise DepthKVError(f"expected a group size of at least 1, got {group_size}")
    if bits != "fp8":
        name, size = ("group size", group_size) if along == "tokens" else ("head_dim", head_dim)
        if size % (8 // bits):
            raise DepthKVError(f"expected a {name} that is a multiple of {8 // bits} for {bits} bits, got {size}")
    if along == "tokens":
        return group_size
    return next(size for size in range(min(group_size, head_dim), 0, -1) if head_dim % size == 0)


def split(x: Tensor, dim: int, *sizes: int) -> Tensor:
    """A view of `x` with dimension `dim` split into `sizes`."""
    return x.view(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def _groups(x: Tensor, group: int, along: Along) -> Tensor:
    """`x` viewed as `[batch, kv_heads, groups, group, head_dim]` or `[batch, kv_heads, tokens, groups, group]`."""
    dim = 2 if along == "tokens" else 3
    return split(x, dim, x.shape[dim] // group, group)


def encode(x: Tensor, bits: int, group: int, along: Along) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in uint8, shaped as `x`, with the scale and minimum of each group."""
    groups, dim, top = _groups(x, group, along), 3 if along == "tokens" else 4, 2**bits - 1
    minimum, maximum = torch.aminmax(groups, dim=dim, keepdim=True)
    scale = _scale((_wide(maximum) - _wide(minimum)) / top, minimum, top)
    codes = (_wide(groups) - _wide(minimum)).div_(_wide(scale)).round_().clamp_(0, top)
    # 0 / 0 where all are equal; NaN has no code, but then the scale is NaN
    codes = codes.nan_to_num_(0).to(torch.uint8)
    return codes.reshape(x.shape), scale.squeeze(dim), minimum.squeeze(dim)


def read(codes: Tensor, scale: Tensor, minimum: Tensor, out: Tensor, group: int, along: Along) -> None:
    """`out = minimum + codes * scale`, computed in float32 and rounded once.

    `codes` are whole numbers of any dtype, and may be `out` itself.
    """
    codes, out, dim = _groups(codes, group, along), _groups(out, group, along), 3 if along == "tokens" else 4
    scale, minimum = scale.unsqueeze(dim), minimum.unsqueeze(dim)
    if out.device.type == "cpu" and along == "channels":
        # torch vectorises a loop over one broadcast operand, not over two: without this it takes 5 times as long
        scale, minimum = scale.expand(out.shape).contiguous(), minimum.expand(out.shape).contiguous()
    torch.addcmul(minimum, codes, scale, out=out)


def encode_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes of float8_e4m3fn in uint8 (few operations take float8), and the scale of each token and head."""
    largest = x.abs().amax(3, keepdim=True)
    scale = _scale(largest.float() / _FP8_MAX, torch.zeros_like(largest), _FP8_MAX)
    codes = (x.float() / scale.float()).clamp_(-_FP8_MAX, _FP8_MAX).nan_to_num_(0)  # NaN as in `encode`
    return codes.to(torch.float8_e4m3fn, memory_format=torch.contiguous_format).view(torch.uint8), scale


def read_fp8(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """`out = codes * scale`, rounded once."""
    if out.device.type != "cpu":
        torch.mul(codes.view(torch.float8_e4m3fn).to(out.dtype), scale, out=out)
        return
    # torch's own conversion is not vectorised on a CPU. The sign and the other bits, moved to their places in a
    # float16, are the same number / 256, subnormal or not. There is no NaN.
    half = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4080).view(torch.float16)
    out.copy_(half.float().mul_(scale.float() * 256))


def _read_back(x: Tensor, bits: Bits, group: int, along: Along) -> Tensor:
    """What `x` reads as once quantised, without packing."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if bits == "fp8":
        read_fp8(*encode_fp8(x), out)
    else:
        codes, scale, minimum = encode(x, bits, group, along)
        read(codes, scale, minimum, out, group, along)
    return out


def _scale(step: Tensor, lowest: Tensor, top: float) -> Tensor:
    """`step`, float32, in the dtype of `lowest`: rounded up, so that no element is beyond `lowest + top * scale`.

    Rounded down instead where that sum would overflow.
    """
    scale = step.to(lowest.dtype)
    if scale.dtype in (torch.float32, torch.float64):
        return scale
    below = scale.float() < step * (1 - 2**-22)  # a GPU divides by numbers with an error of 2**-24
    scale = (scale.view(torch.int16) + below).view(scale.dtype)  # the next number has the next bits
    overflows = lowest.float() + top * scale.float() > torch.finfo(scale.dtype).max
    return (scale.view(torch.int16) - (overflows & (scale.float() > step)).to(torch.int16)).view(scale.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
