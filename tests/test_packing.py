"""Quantised keys and values: what is read back, what is held, and the gradient of the noise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from depthkv.compress import packing
from depthkv.compress.packing import PackedTensor, packed_bytes_per_token
from depthkv.compress.quantization import Along, Bits, fake_quantize, used_group_size
from depthkv.errors import DepthKVError

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INTEGER_BITS = [8, 4, 2]


def allowed_error(x: Tensor, bits: int, group: int, along: Along) -> Tensor:
    """Half a step of each element's group, and what the roundings to the dtype may add: one group after the other."""
    eps, tiny = torch.finfo(x.dtype).eps, torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    allowed = torch.zeros(x.shape, dtype=torch.float64)
    batch, heads, tokens, head_dim = x.shape
    for b in range(batch):
        for h in range(heads):
            for t in range(0, tokens, group if along == "tokens" else 1):
                for c in range(0, head_dim, 1 if along == "tokens" else group):
                    at = (b, h, slice(t, t + group), c) if along == "tokens" else (b, h, t, slice(c, c + group))
                    values = x[at].double()
                    step = (values.max() - values.min()) / (2**bits - 1)
                    largest = values.abs().max()
                    allowed[at] = 0.5 * (step * (1 + eps) + tiny) + 0.501 * (eps * largest + tiny) + 1e-6 * step
                    if step == 0:
                        allowed[at] = 0
    return allowed


def fp8_reference(x: Tensor) -> Tensor:
    """One token and head after the other, in torch's own float8."""
    out, info = torch.empty_like(x), torch.finfo(x.dtype)
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            for t in range(x.shape[2]):
                row = x[b, h, t]
                want = float(row.abs().max()) / 448
                scale = torch.tensor(want, dtype=x.dtype)
                if float(scale) < want and x.dtype != torch.float32:
                    scale += info.eps * max(2 ** math.floor(math.log2(want)), info.smallest_normal)
                if float(scale) > 0:
                    codes = (row.float() / float(scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
                    out[b, h, t] = (codes.float() * float(scale)).to(x.dtype)
                else:
                    out[b, h, t] = 0
    return out


def random_kv(shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0, size: float = 1.0) -> Tensor:
    """Noise in which some channels are much larger than the others, as keys have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * size
    x[..., ::5] = x[..., ::5] * 8 + 3 * size
    return x.to(dtype)


def held_bytes(packed: PackedTensor) -> int:
    return sum(t.untyped_storage().nbytes() for t in packed.tensors())


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(INTEGER_BITS),
    along=st.sampled_from(["tokens", "channels"]),
    dtype=st.sampled_from(DTYPES),
    group=st.sampled_from([4, 8, 12, 32]),
    num_groups=st.integers(0, 3),
    head_dim=st.sampled_from([4, 8, 20, 32]),
    batch=st.integers(1, 2),
    size=st.sampled_from([1e-7, 1e-3, 1.0, 700.0]),
    seed=st.integers(0, 10_000),
)
def test_error_is_at_most_half_a_step(
    bits: Bits,
    along: Along,
    dtype: torch.dtype,
    group: int,
    num_groups: int,
    head_dim: int,
    batch: int,
    size: float,
    seed: int,
) -> None:
    x = random_kv((batch, 2, group * num_groups, head_dim), dtype, seed, size)
    before = x.clone()
    packed = PackedTensor.pack(x, bits=bits, group_size=group, along=along)
    read = packed.unpack()
    assert torch.equal(x, before)
    assert read.dtype == dtype and read.shape == x.shape == packed.shape and packed.num_tokens == x.shape[2]
    used = used_group_size(bits, group, head_dim, along)
    assert ((read.double() - x.double()).abs() <= allowed_error(x, int(bits), used, along)).all()
    assert held_bytes(packed) == batch * x.shape[2] * packed_bytes_per_token(bits, group, head_dim, 2, dtype, along)
    assert torch.equal(fake_quantize(x, bits, group, along), read)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-7, 1e-3, 1.0, 700.0])
def test_fp8_is_torchs_own(dtype: torch.dtype, size: float) -> None:
    x = random_kv((2, 3, 5, 16), dtype, size=size)
    x[0, 0, 0] = 0
    x[1, 1, 1] *= torch.logspace(-6, 0, 16).to(dtype)  # subnormal codes
    before = x.clone()
    packed = PackedTensor.pack(x, bits="fp8", group_size=32, along="tokens")
    assert torch.equal(packed.unpack(), fp8_reference(before)) and torch.equal(x, before)
    assert torch.equal(fake_quantize(x, "fp8", 32, "tokens"), packed.unpack())
    assert held_bytes(packed) == 2 * 5 * packed_bytes_per_token("fp8", 32, 16, 3, dtype, "tokens")


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_reads_every_code(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 0x7F != 0x7F].view(torch.float8_e4m3fn).to(dtype)
    x = codes.expand(1, 1, 1, -1).contiguous()
    assert torch.equal(PackedTensor.pack(x, bits="fp8", group_size=1, along="channels").unpack(), x)


@pytest.mark.parametrize("along", ["tokens", "channels"])
@pytest.mark.parametrize("bits", INTEGER_BITS)
def test_codes_are_really_packed(bits: Bits, along: Along) -> None:
    x = (torch.arange(8 * 16) % 2 ** int(bits)).view(1, 1, 8, 16).float()
    lowest, highest = (x[:, :, 0], x[:, :, 1]) if along == "tokens" else (x[..., ::8], x[..., 1::8])
    lowest.fill_(0), highest.fill_(2**bits - 1)  # each group has the whole range, so its step is 1
    packed = PackedTensor.pack(x, bits=bits, group_size=8, along=along)
    codes, scale, minimum = packed.tensors()
    assert codes.dtype == torch.uint8 and codes.numel() == x.numel() * bits // 8
    assert scale.eq(1).all() and minimum.eq(0).all()
    assert torch.equal(packed.unpack(), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("along", ["tokens", "channels"])
@pytest.mark.parametrize("bits", [8, 4, 2, "fp8"])
def test_large_values_do_not_overflow(bits: Bits, along: Along, dtype: torch.dtype) -> None:
    largest = 65504.0 if dtype == torch.float16 else 1e38
    x = torch.linspace(-largest, largest, 16 * 16).view(1, 1, 16, 16).to(dtype)
    for values in (x, x.transpose(2, 3), x.flip(2), x.abs()):
        read = PackedTensor.pack(values, bits=bits, group_size=16, along=along).unpack()
        assert read.isfinite().all()
        span = values.float().abs().max() * 2
        assert (read.double() - values.double()).abs().max() <= span * {8: 0.006, 4: 0.04, 2: 0.17, "fp8": 0.04}[bits]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("along", ["tokens", "channels"])
@pytest.mark.parametrize("bits", INTEGER_BITS)
def test_constant_groups_are_exact(bits: Bits, along: Along, dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 1, 1).to(dtype).expand(1, 2, 8, 8)
    assert torch.equal(PackedTensor.pack(x, bits=bits, group_size=8, along=along).unpack(), x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("along", ["tokens", "channels"])
@pytest.mark.parametrize("bits", [8, 4, 2, "fp8"])
def test_not_finite_stays_in_its_group_and_does_not_vanish(bits: Bits, along: Along, bad: float) -> None:
    x = random_kv((1, 2, 16, 16), torch.bfloat16)
    clean = PackedTensor.pack(x, bits=bits, group_size=8, along=along).unpack()
    x[0, 1, 3, 5] = bad
    read = PackedTensor.pack(x, bits=bits, group_size=8, along=along).unpack()
    group = torch.zeros(x.shape, dtype=torch.bool)
    if bits == "fp8":
        group[0, 1, 3] = True
    elif along == "tokens":
        group[0, 1, :8, 5] = True
    else:
        group[0, 1, 3, :8] = True
    assert torch.equal(read[~group], clean[~group])
    assert not read[0, 1, 3, 5].isfinite()


@pytest.mark.parametrize("along", ["tokens", "channels"])
@pytest.mark.parametrize("bits", [8, 4, 2, "fp8"])
def test_unpacks_into_a_slice_in_chunks(bits: Bits, along: Along, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random_kv((2, 2, 24, 16), torch.bfloat16)
    kv = PackedTensor.pack(x, bits=bits, group_size=8, along=along)
    whole = kv.unpack()
    for chunk in (1, 2 * 2 * 16 * 16):
        monkeypatch.setattr(packing, "_CPU_CHUNK", chunk)
        buffer = torch.full((2, 2, 30, 16), 7.0, dtype=torch.bfloat16)
        assert kv.unpack(out=buffer[:, :, 2:26]).data_ptr() == buffer[:, :, 2:].data_ptr()
        assert torch.equal(buffer[:, :, 2:26], whole)
        assert buffer[:, :, :2].eq(7).all() and buffer[:, :, 26:].eq(7).all()


@pytest.mark.parametrize("along", ["tokens", "channels"])
@pytest.mark.parametrize("bits", [8, 4, 2, "fp8"])
def test_tokens_and_rows_come_and_go(bits: Bits, along: Along) -> None:
    def pack(x: Tensor) -> PackedTensor:
        return PackedTensor.pack(x, bits=bits, group_size=8, along=along)

    def check(packed: PackedTensor, x: Tensor) -> None:
        assert torch.equal(packed.unpack(), pack(x).unpack())
        rate = packed_bytes_per_token(bits, 8, 16, 2, torch.float16, along)
        assert held_bytes(packed) == x.shape[0] * x.shape[2] * rate  # nothing that was dropped is still held

    # as attention gives them: [batch, tokens, kv_heads, head_dim] in memory
    x = random_kv((3, 2, 48, 16), torch.float16).transpose(1, 2).contiguous().transpose(1, 2)
    packed = pack(x[:, :, :0])
    check(packed, x[:, :, :0])
    packed.append(pack(x[:, :, :32]))
    packed.append(pack(x[:, :, 32:]))
    check(packed, x)
    packed.drop_first(16)
    check(packed, x[:, :, 16:])
    groups = torch.tensor([[[0, 2, 3], [1, 2, 3]]]).expand(3, 2, 3)  # the heads keep different ones
    packed.keep_groups(groups, 8)
    x = torch.stack([x[:, 0, [*range(16, 24), *range(32, 48)]], x[:, 1, 24:48]], dim=1)
    check(packed, x)
    packed.change(lambda t: t.index_select(0, torch.tensor([2, 0])))
    check(packed, x[[2, 0]])
    packed.change(lambda t: t.repeat_interleave(2, dim=0))
    check(packed, x[[2, 2, 0, 0]])
    packed.drop_first(24)
    check(packed, x[[2, 2, 0, 0], :, :0])


@pytest.mark.parametrize("along", ["tokens", "channels"])
@pytest.mark.parametrize("bits", [8, 4, 2, "fp8"])
def test_noise_has_the_gradient_of_the_identity(bits: Bits, along: Along) -> None:
    x = random_kv((2, 2, 21, 16), torch.bfloat16).requires_grad_()
    noisy = fake_quantize(x, bits, 8, along)
    whole = PackedTensor.pack(x[:, :, :16], bits=bits, group_size=8, along=along).unpack()
    assert torch.equal(noisy[:, :, :16], whole) and not torch.equal(noisy, x)
    if along == "tokens" and bits != "fp8":  # the incomplete group has its own extremes, which are kept
        assert torch.equal(noisy[:, :, 16:].amin(2), x[:, :, 16:].amin(2))
    weights = torch.randn(x.shape).to(x.dtype)
    (noisy * weights).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weights)


def test_group_along_channels_divides_the_head() -> None:
    assert [used_group_size(4, 64, d, "channels") for d in (16, 64, 80, 96, 128)] == [16, 64, 40, 48, 64]
    assert used_group_size(4, 64, 16, "tokens") == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, 'expected 8, 4 or 2 bits or "fp8", got 3'),
        ({"along": "heads"}, "got 'heads'"),
        ({"group_size": 0}, "expected a group size of at least 1, got 0"),
        ({"group_size": 6, "bits": 2}, "expected a group size that is a multiple of 4 for 2 bits, got 6"),
        ({"group_size": 12}, "expected a number of tokens that is a multiple of 12, got 16"),
        ({"x": torch.zeros(1, 1, 4, 3), "along": "channels"}, "expected a head_dim that is a multiple of 2"),
        ({"x": torch.zeros(1, 4, 8)}, r"got \[1, 4, 8\]"),
        ({"x": torch.zeros(1, 1, 8, 8, dtype=torch.int64)}, "got .* in torch.int64"),
    ],
)
def test_says_what_was_expected(options: dict, message: str) -> None:
    settings = {"x": torch.zeros(1, 1, 16, 8), "bits": 4, "group_size": 8, "along": "tokens"} | options
    with pytest.raises(DepthKVError, match=message):
        PackedTensor.pack(settings.pop("x"), **settings)


def test_refuses_what_does_not_fit() -> None:
    packed = PackedTensor.pack(torch.zeros(1, 1, 16, 8), bits=4, group_size=8, along="tokens")
    for wrong in (-8, 4, 24):
        with pytest.raises(DepthKVError, match=f"expected a multiple of 8 tokens up to 16, got {wrong}"):
            packed.drop_first(wrong)
    with pytest.raises(DepthKVError, match="expected out of shape"):
        packed.unpack(out=torch.zeros(1, 1, 8, 8))
    with pytest.raises(DepthKVError, match="expected a tensor packed as"):
        packed.append(PackedTensor.pack(torch.zeros(1, 1, 16, 8), bits=2, group_size=8, along="tokens"))
