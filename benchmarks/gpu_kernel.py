"""Attention of one query per sequence over a static cache, in Triton: K and V of used tokens are read once.

The tokens of a sequence are divided among `splits` programs by the length that lies on the device, so one captured
graph serves every length; a second kernel joins the parts (flash decoding, arXiv:2311.01282). All query heads of a KV
head are computed together.
"""

import torch
import triton
import triton.language as tl

BLOCK = 64


@triton.jit
def _partial(
    query,
    keys,
    values,
    position,
    out,
    highest,
    total,
    scale,
    query_b,
    query_h,
    key_b,
    key_h,
    key_t,
    value_b,
    value_h,
    value_t,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0)
    split = tl.program_id(1)
    b = (pair // KV_HEADS).to(tl.int64)
    h = (pair % KV_HEADS).to(tl.int64)
    length = (tl.load(position + b) + 1).to(tl.int32)
    chunk = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    start = split * chunk
    end = tl.minimum(start + chunk, length)
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    used = rows < GROUP
    queries = tl.load(
        query + b * query_b + (h * GROUP + rows)[:, None] * query_h + dims[None, :], mask=used[:, None], other=0.0
    )
    m = tl.full([ROWS], float("-inf"), tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    key_base = keys + b * key_b + h * key_h
    value_base = values + b * value_b + h * value_h
    for first in range(start, end, BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        inside = tokens < end
        offsets = tokens.to(tl.int64)
        k = tl.load(key_base + offsets[None, :] * key_t + dims[:, None], mask=inside[None, :], other=0.0)
        scores = tl.dot(queries, k) * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(m, tl.max(scores, 1))
        shrink = tl.exp2(m - higher)
        p = tl.exp2(scores - higher[:, None])
        v = tl.load(value_base + offsets[:, None] * value_t + dims[None, :], mask=inside[:, None], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        s = s * shrink + tl.sum(p, 1)
        m = higher
    place = ((b * KV_HEADS + h) * GROUP + rows) * SPLITS + split
    tl.store(highest + place, m, mask=used)
    tl.store(total + place, s, mask=used)
    tl.store(out + place[:, None] * DIM + dims[None, :], acc, mask=used[:, None])


@triton.jit
def _join(out, highest, total, result, DIM: tl.constexpr, SPLITS: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    splits = head * SPLITS + tl.arange(0, SPLITS)
    dims = tl.arange(0, DIM)
    m = tl.load(highest + splits)
    weight = tl.exp2(m - tl.max(m, 0))
    parts = tl.load(out + splits[:, None] * DIM + dims[None, :])
    norm = tl.sum(tl.load(total + splits) * weight, 0)
    joined = tl.sum(parts * weight[:, None], 0) / norm
    tl.store(result + head * DIM + dims, joined.to(result.dtype.element_ty))


def num_splits(pairs: int, processors: int) -> int:
    """Programs for each pair of sequence and KV head: about two for each processor, a power of two."""
    if pairs > 2 * processors:
        return 4  # so that the last wave of programs is a short one
    return max(1, min(64, 1 << ((2 * processors // pairs).bit_length() - 1)))


@torch.library.custom_op("depthkv_bench::decode_attention", mutates_args=())
def decode_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor, scale: float
) -> torch.Tensor:
    """Queries `[batch, heads, 1, head_dim]` over K and V `[batch, kv_heads, tokens, head_dim]` up to `position`
    `[batch]`, its own token included. Returns `[batch, 1, heads, head_dim]`."""
    batch, heads, _, dim = query.shape
    kv_heads = keys.shape[1]
    assert query.stride(3) == keys.stride(3) == values.stride(3) == 1
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 2
    splits = num_splits(batch * kv_heads, processors)
    group = heads // kv_heads
    out = torch.empty(batch * heads, splits, dim, dtype=torch.float32, device=query.device)
    highest, total = (torch.empty(batch * heads, splits, dtype=torch.float32, device=query.device) for _ in range(2))
    result = torch.empty(batch, 1, heads, dim, dtype=query.dtype, device=query.device)
    _partial[(batch * kv_heads, splits)](
        query,
        keys,
        values,
        position,
        out,
        highest,
        total,
        scale * 1.4426950408889634,  # exp2 instead of exp
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        KV_HEADS=kv_heads,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        DIM=dim,
        SPLITS=splits,
        BLOCK=BLOCK,
        num_warps=4,
        num_stages=3,
    )
    _join[(batch * heads,)](out, highest, total, result, DIM=dim, SPLITS=splits, num_warps=4)
    return result


@decode_attention.register_fake
def _(query, keys, values, position, scale):  # type: ignore[no-untyped-def]
    batch, heads, _, dim = query.shape
    return query.new_empty(batch, 1, heads, dim)
