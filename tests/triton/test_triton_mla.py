"""The launchers of latent attention against float64, and the codes of compressed rows bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from warploom.reference import mla as reference
from warploom.triton_kernels.mla import mla_absorbed_backward, mla_cache_append, mla_decode
from warploom.triton_kernels.mla.tiles import backward_tile, decode_tile

from tests.mla.caches import Call, Case, prepare
from tests.triton.conftest import DEVICE, DTYPES

Check = Callable[..., None]
Embed = Callable[[Tensor], Tensor]

FLOAT8 = torch.float8_e4m3fn
FORMATS = pytest.mark.parametrize("format", (FLOAT8, torch.int8), ids=("float8", "int8"))


@pytest.fixture(autouse=True)
def default_device() -> Iterator[None]:
    """Calls are drawn on the CPU, then moved."""
    with torch.device("cpu"):
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def integers(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def decode(call: Call, num_splits: int = 0, split_size: int = 0) -> tuple[Tensor, Tensor]:
    case = call.case
    return mla_decode.mla_decode(
        call.q, call.kv_cache, call.cache_seqlens, call.block_table, case.d_latent,
        case.softmax_scale, case.causal, num_splits, split_size,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("case", "splits"),
    (
        pytest.param(Case((37, 0, 5), heads=5, page_size=1), (1, 0), id="pages-of-1"),
        pytest.param(Case((70, 33), heads=20, page_size=48), (3, 0), id="pages-of-48"),
        pytest.param(Case((300, 9), page_size=256, queries=3), (0, 64), id="pages-of-256"),
        pytest.param(Case((40, 130), heads=7, queries=9, d_latent=64, d_rope=0), (0, 0), id="latents-alone"),
        pytest.param(Case((9, 2), heads=3, queries=5, causal=False), (2, 0), id="not-causal"),
        pytest.param(Case((4, 40), heads=16, d_latent=512, d_rope=64, page_size=64), (0, 0), id="512-64"),
        pytest.param(Case((20, 33), heads=6, d_latent=448, d_rope=128), (2, 0), id="448-128"),
    ),
)  # fmt: skip
def test_decode(case: Case, splits: tuple[int, int], dtype: torch.dtype) -> None:
    call = prepare(case, dtype)
    call.check(decode(call, *splits))


@FORMATS
@pytest.mark.parametrize("d_latent", (32, 208, 512))
def test_compressed_caches(format: torch.dtype, d_latent: int) -> None:
    case = Case((40, 0, 19), heads=20, d_latent=d_latent, page_size=7, format=format)
    for dtype in (torch.float32, torch.bfloat16):
        call = prepare(case, dtype)
        call.check(decode(call, 2))


@FORMATS
def test_every_code_is_read_as_torch_reads_it(format: torch.dtype) -> None:
    """The output of a cache of one token is that token's latent."""
    codes = torch.arange(256).to(torch.uint8)
    codes = codes.where(~codes.view(format).float().isnan(), 0).view(format)
    rows = reference.compress_rows(torch.zeros(256), torch.zeros(0), format).view(torch.uint8)
    rows[:256] = codes.view(torch.uint8)
    cache = rows.view(format).view(1, 1, -1).to(DEVICE)
    args = (integers(1), None, 256, 0.0, True, 0, 0)
    out, lse = mla_decode.mla_decode(draw(1, 1, 1, 256), cache, *args)
    assert torch.equal(out.flatten().cpu(), codes.float())
    assert lse.item() == 0
    if format == FLOAT8:
        cache.view(torch.uint8)[..., 3] = 0x7F
        assert mla_decode.mla_decode(draw(1, 1, 1, 256), cache, *args)[0].isnan().all()


def test_a_split_size_makes_a_sequence_independent_of_its_batch() -> None:
    call = prepare(Case((7, 0, 200, 129), queries=2, page_size=16), torch.bfloat16)
    out, lse = decode(call, 0, 64)
    for row, length in enumerate(call.case.lengths):
        # Alone, with as little room in the cache as the sequence takes: fewer splits.
        places, one = max(1, -(-length // 16)), slice(row, row + 1)
        table = call.block_table[one, :places]
        alone = Call(
            call.case, call.q[one], call.rows, call.kv_cache, call.cache_seqlens[one], table
        )
        assert all(torch.equal(a, b[one]) for a, b in zip(decode(alone, 0, 64), (out, lse)))


def test_splits_without_keys_change_no_bit() -> None:
    call = prepare(Case((7, 0, 200, 129), page_size=16), torch.float32)
    # No sequence has more than 13 tiles of keys, a split each; the others are empty.
    assert all(torch.equal(a, b) for a, b in zip(decode(call, 13), decode(call, 17)))


@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize(
    ("queries", "lengths", "heads", "d_latent", "d_rope"),
    (
        pytest.param(5, (7, 4), 4, 32, 16, id="small"),
        pytest.param(9, (4, 0), 3, 64, 0, id="more-queries-than-keys"),
        pytest.param(20, (70, 33), 5, 48, 32, id="across-tiles"),
        pytest.param(3, (20, 17), 4, 512, 64, id="512-64"),
        pytest.param(2, (9, 5), 3, 448, 128, id="448-128"),
    ),
)
def test_gradients(
    queries: int,
    lengths: tuple[int, ...],
    heads: int,
    d_latent: int,
    d_rope: int,
    causal: bool,
    dtype: torch.dtype,
    embedded: Embed,
    assert_close: Check,
) -> None:
    """Rows that do not count hold NaN, and get 0."""
    batch, width = len(lengths), d_latent + d_rope
    q = draw(batch, queries, heads, width, dtype=dtype)
    kv = draw(batch, max(lengths) + 3, width, dtype=dtype)
    for row, length in enumerate(lengths):
        kv[row, length:] = math.nan
    scale, count = 1.2 * width**-0.5, integers(*lengths)
    out, lse = reference.mla_decode(q, kv, count, None, d_latent, scale, causal, 0, 0)
    grads = draw(*out.shape, dtype=dtype), draw(*lse.shape)
    for grad_lse in (None, grads[1]):
        args = (grads[0], q, kv, out, lse, grad_lse, count, d_latent, scale, causal)
        spoiled = (*map(embedded, args[:3]), *args[3:])
        actual = mla_absorbed_backward.mla_absorbed_backward(*spoiled)
        assert_close(actual, reference.mla_absorbed_backward, *args, factor=3)


@pytest.mark.parametrize("shape", ((0, 1, 2), (2, 0, 2), (2, 1, 0)), ids=str)
def test_nothing_to_do(shape: tuple[int, int, int]) -> None:
    q, kv = draw(*shape, 48), draw(shape[0], 5, 48)
    count = torch.full(shape[:1], 5, dtype=torch.int32, device=DEVICE)
    out, lse = mla_decode.mla_decode(q, kv, count, None, 32, 1.0, True, 0, 0)
    assert out.shape == (*shape, 32) and lse.shape == (shape[0], shape[2], shape[1])
    args = (out, q, kv, out, lse, None, count, 32, 1.0, True)
    grad_q, grad_kv = mla_absorbed_backward.mla_absorbed_backward(*args)
    assert grad_q.shape == q.shape and torch.equal(grad_kv, torch.zeros_like(kv))


@pytest.mark.parametrize("packed", (False, True), ids=("rows", "packed"))
@pytest.mark.parametrize("paging", (False, True), ids=("contiguous", "pages"))
@pytest.mark.parametrize(
    ("d_rope", "rotation"), ((16, None), (24, True), (8, False), (0, None)), ids=str
)
def test_cache_append(
    packed: bool,
    paging: bool,
    d_rope: int,
    rotation: bool | None,
    dtype: torch.dtype,
    embedded: Embed,
) -> None:
    x = draw(3, 5, 48 + d_rope, dtype=dtype)
    # Rows that do not fit, positions beyond the tables, a missing block.
    lengths, bounds, table, place = integers(0, 6, 14), None, None, (3, 16)
    if packed:
        # A sequence without new tokens, and a token of no sequence.
        bounds, x = integers(0, 6, 6, 14), x.flatten(0, 1)
    if paging:
        table, place = torch.randperm(12).view(3, 4).to(DEVICE, torch.int32), (12, 4)
        table[1, 2] = -1
    tables = (None, None) if rotation is None else (draw(13, d_rope // 2), draw(13, d_rope // 2))
    want = draw(*place, 48 + d_rope, dtype=dtype)
    got = embedded(want)
    rest = (lengths, table, bounds, *tables, 1e-5, bool(rotation))
    weight = draw(48)
    reference.mla_cache_append(x, weight, want, *rest)
    mla_cache_append.mla_cache_append(embedded(x), weight, got, *rest)
    exact = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=exact, atol=exact)
    assert got._base.isfinite().sum() == got.numel(), "written outside of the cache"


@FORMATS
def test_codes_are_rounded_to_even_bit_for_bit(format: torch.dtype) -> None:
    """A latent of ones is its weight; a largest magnitude of LARGEST makes the scale 1."""
    largest = reference.LARGEST[format]
    every = torch.arange(256).to(torch.uint8).view(format).float()
    grid = every[every.abs() <= largest].unique()
    ties = (grid[1:] + grid[:-1]) / 2
    numbers = [
        grid,
        ties,
        ties.nextafter(ties + 1),
        ties.nextafter(ties - 1),
        torch.randn(500) / 64,
    ]
    numbers = torch.cat(numbers).split(127)
    groups = [
        torch.nn.functional.pad(group, (1, 127 - len(group)), value=largest) for group in numbers
    ]
    for start in range(0, len(groups), 4):
        weight = torch.cat(groups[start : start + 4])
        k_rope = torch.randn(16)
        want = reference.compress_rows(weight, k_rope, format).view(torch.uint8)
        cache = torch.zeros(1, 1, want.numel(), dtype=torch.uint8, device=DEVICE)
        x = torch.cat((torch.ones_like(weight), k_rope)).view(1, 1, -1).to(DEVICE)
        rest = (integers(0), None, None, None, None, 0.0, True)
        mla_cache_append.mla_cache_append(x, weight.to(DEVICE), cache.view(format), *rest)
        assert torch.equal(cache.flatten().cpu(), want)


def test_why_not_names_what_triton_cannot_do() -> None:
    q, kv, count = draw(1, 1, 2, 48), draw(1, 4, 48), integers(4)
    forward = (q, kv, count, None, 32, 1.0, True, 0, 0)
    backward = (q[..., :32], q, kv, q[..., :32], draw(1, 2, 1), None, count, 32, 1.0, True)
    compressed = torch.zeros(1, 4, 68, dtype=torch.uint8, device=DEVICE).view(FLOAT8)
    for why_not, args in (
        (mla_decode.why_not, forward),
        (mla_decode.why_not, (q, compressed, *forward[2:])),
        (mla_absorbed_backward.why_not, forward),
        (mla_absorbed_backward.why_not, backward),
    ):
        assert why_not(*args) == []
        doubled = [x.double() if x is q else x for x in args]
        assert ["float64" in reason for reason in why_not(*doubled)] == [True]
    wide = draw(1, 1, 2, 528)
    assert "528" in mla_decode.why_not(wide, wide[0], count, None, 528, 1.0, True, 0, 0)[0]
    assert "496" in mla_decode.why_not(wide, wide[0], count, None, 32, 1.0, True, 0, 0)[0]
    args = (draw(1, 1, 48), draw(32), draw(1, 48, 4).transpose(1, 2), count)
    (reason,) = mla_cache_append.why_not(*args, *[None] * 4, 1e-5, False)
    assert "kv_cache" in reason


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_are_powers_of_two(dtype: torch.dtype) -> None:
    tiles = [backward_tile(dtype)[0]]
    tiles += [
        decode_tile(dtype, d_latent, 64, rows, False) for d_latent in (64, 512) for rows in (1, 99)
    ]
    for tile in tiles:
        assert all(size & (size - 1) == 0 for size in (tile.rows, tile.keys, tile.num_warps))
