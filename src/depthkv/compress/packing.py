"""Stub until the real one lands."""
from __future__ import annotations
from collections.abc import Callable
from typing import Literal
import torch

Along = Literal["tokens", "channels"]

def _divisor(size: int, most: int) -> int:
    return next(g for g in range(min(size, most), 0, -1) if size % g == 0)

def packed_bytes(tokens: int, bits: int, group_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, along: Along) -> int:
    codes = tokens * head_dim * bits // 8
    groups = tokens // group_size * head_dim if along == "tokens" else tokens * (head_dim // _divisor(head_dim, group_size))
    return kv_heads * (codes + 2 * groups * dtype.itemsize)

class PackedTensor:
    def __init__(self, codes, scale, minimum, bits, along):
        self.codes, self.scale, self.minimum, self.bits, self.along = codes, scale, minimum, bits, along
    @classmethod
    def pack(cls, x: torch.Tensor, *, bits: int, group_size: int, along: Along) -> PackedTensor:
        b, h, t, d = x.shape
        x0 = x; x = x.to(torch.promote_types(x.dtype, torch.float32))
        g = x.unflatten(2, (-1, group_size)) if along == "tokens" else x.unflatten(3, (-1, _divisor(d, group_size)))
        dim = 3 if along == "tokens" else 4
        lo, hi = g.amin(dim, keepdim=True), g.amax(dim, keepdim=True)
        scale = ((hi.to(x.dtype) - lo.to(x.dtype)) / (2**bits - 1)).to(x0.dtype)
        s = scale.to(x.dtype)
        codes = (torch.where(s > 0, (g.to(x.dtype) - lo.to(x.dtype)) / s.clamp(min=1e-30), 0) + 0.501).floor().clamp(0, 2**bits - 1).to(torch.uint8)
        codes = codes.reshape(b, h, t, d)
        per = 8 // bits
        parts = codes.chunk(per, dim=-1)
        packed = sum((p << (bits * i)) for i, p in enumerate(parts)) if per > 1 else codes
        return cls(packed.contiguous(), scale, lo.to(x0.dtype), bits, along)
    @property
    def tensors(self):
        return self.codes, self.scale, self.minimum
    @property
    def num_tokens(self) -> int:
        return self.codes.shape[2]
    def unpack(self, out: torch.Tensor | None = None) -> torch.Tensor:
        per = 8 // self.bits
        parts = [(self.codes >> (self.bits * i)) & (2**self.bits - 1) for i in range(per)]
        ct = torch.promote_types(self.scale.dtype, torch.float32); codes = torch.cat(parts, -1).to(ct)
        b, h, t, d = codes.shape
        if self.along == "tokens":
            g = codes.unflatten(2, (self.scale.shape[2], -1))
        else:
            g = codes.unflatten(3, (self.scale.shape[3], -1))
        x = (g * self.scale.to(ct) + self.minimum.to(ct)).reshape(b, h, t, d).to(self.scale.dtype)
        return x if out is None else out.copy_(x)
    def append(self, other: PackedTensor) -> None:
        for n in ("codes", "scale", "minimum"):
            setattr(self, n, torch.cat([getattr(self, n), getattr(other, n)], 2))
    def drop_first(self, n: int) -> None:
        g = self.num_tokens // self.scale.shape[2] if self.along == "tokens" else 1
        self.codes = self.codes[:, :, n:].clone()
        self.scale = self.scale[:, :, n // g:].clone(); self.minimum = self.minimum[:, :, n // g:].clone()
    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedTensor:
        return PackedTensor(change(self.codes), change(self.scale), change(self.minimum), self.bits, self.along)

    def keep_groups(self, index: torch.Tensor, size: int) -> None:
        """index [batch, kv_heads, kept]: numbers of groups of `size` tokens."""
        groups = self.num_tokens // size
        for n in ("codes", "scale", "minimum"):
            t = getattr(self, n)
            setattr(self, n, keep_groups(t.reshape(*t.shape[:2], groups * (t.shape[2] // groups), -1), index, groups).reshape(*t.shape[:2], -1 if index.shape[2] else 0, *t.shape[3:]))


def keep_groups(t: torch.Tensor, index: torch.Tensor, groups: int) -> torch.Tensor:
    """Of groups of rows along dim 2 of `[batch, kv_heads, rows, width]` those in `index`, `[batch, kv_heads, kept]`."""
    batch, heads, rows, width = t.shape
    parts = t.reshape(batch, heads, groups, rows // groups * width)
    kept = parts.gather(2, index[..., None].expand(*index.shape, parts.shape[3]))
    return kept.view(batch, heads, -1 if index.shape[2] else 0, width)
