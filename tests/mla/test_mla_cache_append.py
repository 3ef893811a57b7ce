"""mla_cache_append on every backend: normalised latent, rotated key, and where they are written."""

from __future__ import annotations

import pytest
import torch
from warploom.ops.mla import mla_cache_append

from tests import plain
from tests.backends import DEVICE, every_backend, every_dtype
from tests.numerics import FORWARD, assert_within

D_LATENT, D_ROPE, EPS = 144, 16, 1e-5
#: (cache_seqlens, new tokens, block_table of pages of 4): the second sequence's first page is missing,
#: the third outgrows its table.
LENGTHS, COUNTS = (2, 5, 3), (5, 5, 7)
TABLE = ((3, 0), (-5, 6), (2, 1))
WRITTEN = [
    (3, 2, 0, 0), (3, 3, 0, 1), (0, 0, 0, 2), (0, 1, 0, 3), (0, 2, 0, 4),
    (6, 1, 1, 0), (6, 2, 1, 1), (6, 3, 1, 2),
    (2, 3, 2, 0), (1, 0, 2, 1), (1, 1, 2, 2), (1, 2, 2, 3), (1, 3, 2, 4),
]  # fmt: skip
"""block, slot, sequence, place among its new tokens"""


def draw(dtype, weight_dtype):
    tokens = [torch.randn(count, D_LATENT + D_ROPE, device=DEVICE).to(dtype) for count in COUNTS]
    weight = torch.randn(D_LATENT, device=DEVICE).to(weight_dtype)
    angles = torch.rand(9, D_ROPE // 2, dtype=torch.float64) * 6
    return tokens, weight, (angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE))


def expected(tokens, weight, rotary, interleaved, dtype):
    """Row [13, D] for each of WRITTEN, computed in `dtype`."""
    rows = []
    for _, _, sequence, place in WRITTEN:
        token = tokens[sequence][place].cpu().to(dtype)
        latent = plain.rms_norm(token[:D_LATENT], weight.cpu(), EPS)
        position = torch.tensor([[min(LENGTHS[sequence] + place, 8)]])
        cos, sin = (table.cpu() for table in rotary)
        k_rope = token[D_LATENT:].view(1, 1, 1, -1)
        k_rope = plain.apply_rotary(k_rope, cos, sin, position, interleaved).flatten()
        rows.append(torch.cat((latent, k_rope)))
    return torch.stack(rows)


def append(backend, tokens, weight, rotary, interleaved, cache, packed):
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    table = torch.tensor(TABLE, dtype=torch.int32, device=DEVICE)
    options = {"rotary": rotary, "interleaved": interleaved, "eps": EPS, "backend": backend}
    if packed:
        bounds = torch.tensor([0, 5, 10, 17], dtype=torch.int32, device=DEVICE)
        mla_cache_append(
            torch.cat(tokens), weight, cache, lengths, table, cu_seqlens=bounds, **options
        )
    else:
        # One call a sequence, since they have different numbers of new tokens.
        for row, one in enumerate(tokens):
            mla_cache_append(
                one.unsqueeze(0), weight, cache, lengths[row : row + 1], table[row : row + 1],
                **options,
            )  # fmt: skip


def split_cache(cache):
    """The rows of WRITTEN, and all others."""
    written = torch.zeros(cache.shape[:2], dtype=torch.bool)
    for block, slot, _, _ in WRITTEN:
        written[block, slot] = True
    cache = cache.cpu()
    rows = torch.stack([cache[block, slot] for block, slot, _, _ in WRITTEN])
    return rows, cache[~written]


@every_backend
@every_dtype
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_dense_rows(backend, dtype, interleaved, packed):
    tokens, weight, rotary = draw(dtype, torch.float32 if packed else dtype)
    cache = torch.full((7, 4, D_LATENT + D_ROPE), 7.0, dtype=dtype, device=DEVICE)
    append(backend, tokens, weight, rotary, interleaved, cache, packed)
    rows, others = split_cache(cache)
    assert (others == 7).all()
    exact = expected(tokens, weight, rotary, interleaved, torch.float64)
    rough = expected(tokens, weight, rotary, interleaved, dtype)
    assert_within(rows, exact, rough, factor=FORWARD, what="rows")


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("format", "largest"),
    [(torch.float8_e4m3fn, 448.0), (torch.int8, 127.0)],
    ids=["float8", "int8"],
)
def test_compressed_rows(backend, dtype, format, largest):
    """A scale for each 128 features, the last group shorter; every code is the nearest one."""
    tokens, weight, rotary = draw(dtype, dtype)
    tokens[0][1, :128] = 0  # a group of zeros
    row_bytes = D_LATENT + 4 * 2 + 2 * D_ROPE
    cache = torch.full((7, 4, row_bytes), 7, dtype=torch.uint8, device=DEVICE).view(format)
    append(backend, tokens, weight, rotary, True, cache, packed=True)
    rows, others = split_cache(cache.view(torch.uint8))
    assert (others == 7).all()
    exact = expected(tokens, weight, rotary, True, torch.float64)
    codes = rows[:, :D_LATENT].view(format).double()
    scales = rows[:, D_LATENT : D_LATENT + 8].contiguous().view(torch.float32).double()
    k_rope = rows[:, D_LATENT + 8 :].contiguous().view(torch.bfloat16)
    rough = expected(tokens, weight, rotary, True, torch.bfloat16)
    assert_within(k_rope, exact[:, D_LATENT:], rough[:, D_LATENT:], factor=FORWARD, what="keys")
    for group, columns in enumerate((slice(0, 128), slice(128, D_LATENT))):
        want = exact[:, columns]
        most = want.abs().amax(1)
        scale = torch.where(most == 0, 1.0, most / largest)
        torch.testing.assert_close(scales[:, group], scale, rtol=1e-5, atol=0)
        step = scale[:, None].expand_as(want)
        if format == torch.float8_e4m3fn:  # 3 bits of fraction; subnormal below 2^-6
            step = step * torch.exp2((want / step).abs().clamp(min=2.0**-6).log2().floor() - 3)
        error = (codes[:, columns] * scales[:, group, None] - want).abs()
        assert (error <= 0.5001 * step + 1e-5 * want.abs()).all()


@pytest.mark.parametrize(
    ("format", "error"),
    [(torch.float8_e4m3fn, 0.026), (torch.int8, 0.0065)],
    ids=["float8", "int8"],
)
def test_size_of_the_rounding(format, error):
    """Of normally distributed latents, in the root mean square, as docs/kernels/mla.md states it."""
    latent = torch.randn(1, 400, 512)
    cache = torch.zeros(1, 400, 512 + 4 * 4, dtype=torch.uint8).view(format)
    start = torch.zeros(1, dtype=torch.int32)
    mla_cache_append(latent, torch.ones(512), cache, start, eps=0.0)
    latent = latent / latent.square().mean(-1, keepdim=True).sqrt()
    codes, raw = cache[..., :512].float(), cache.view(torch.uint8)
    scales = raw[..., 512:].contiguous().view(torch.float32).repeat_interleave(128, dim=-1)
    assert (codes * scales - latent).square().mean().sqrt() == pytest.approx(error, rel=0.02)


@every_backend
@pytest.mark.parametrize("odd", [False, True], ids=["aligned", "odd"])
def test_a_contiguous_cache(backend, odd):
    """The last sequence is full: only what fits is written. Odd: slices that begin anywhere."""
    buffer = torch.full((2, 9, 51), 7.0, dtype=torch.bfloat16, device=DEVICE)
    cache = buffer[..., 3:] if odd else buffer[..., 3:].contiguous()
    tokens = torch.randn(2, 3, 48, device=DEVICE).bfloat16()
    weight = torch.ones(32, device=DEVICE).bfloat16()
    lengths = torch.tensor([4, 8], dtype=torch.int32, device=DEVICE)
    mla_cache_append(tokens, weight, cache, lengths, backend=backend)
    changed = (cache != 7).any(-1)
    wanted = torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    wanted[0, 4:7] = wanted[1, 8] = True
    assert torch.equal(changed, wanted)
    assert torch.equal(cache[0, 4:7, 32:], tokens[0, :, 32:])  # no tables: not rotated
    assert (buffer[..., :3] == 7).all()


def test_errors_name_op_and_argument():
    tokens, weight = torch.randn(2, 3, 48), torch.ones(32)
    cache, lengths = torch.zeros(2, 9, 48), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"mla_cache_append: cos: expected shape \(P, 8\)"):
        tables = (torch.ones(4, 4), torch.ones(4, 4))
        mla_cache_append(tokens, weight, cache, lengths, rotary=tables)
    with pytest.raises(ValueError, match="mla_cache_append: kv_cache: expected rows of 48"):
        mla_cache_append(tokens, weight, cache[..., :40], lengths)
    with pytest.raises(ValueError, match="mla_cache_append: compressed_kv: expected a batch of 2"):
        mla_cache_append(tokens[:1], weight, cache, lengths)
    with pytest.raises(RuntimeError, match="compressed_kv: expected a tensor that needs no"):
        mla_cache_append(tokens.requires_grad_(), weight, cache, lengths)
