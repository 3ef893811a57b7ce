"""Latent caches for the tests: contiguous, in pages, compressed; what is unused holds NaN or garbage."""

from __future__ import annotations

import dataclasses
import functools

import torch
from warploom.ops.mla import mla_decode

from tests import plain
from tests.backends import DEVICE
from tests.numerics import FORWARD, assert_within, error_near_by

NAN = float("nan")
#: What unused places of a block table hold.
GARBAGE = (2147480000, -7, -2147483648)
SCALE_GROUP = 128


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `page_size` None: a contiguous cache; `format` None: a dense one."""

    lengths: tuple[int, ...]
    queries: int = 1
    heads: int = 4
    d_latent: int = 32
    d_rope: int = 16
    page_size: int | None = None
    spare: int = 9  # capacity beyond the longest sequence
    causal: bool = True
    format: torch.dtype | None = None
    options: dict = dataclasses.field(default_factory=dict)

    @property
    def capacity(self) -> int:
        rows = max(self.lengths, default=0) + self.spare
        return rows if self.page_size is None else -(-rows // self.page_size) * self.page_size

    @property
    def softmax_scale(self) -> float:
        return 1.3 * (self.d_latent + self.d_rope) ** -0.5


@dataclasses.dataclass
class Call:
    case: Case
    q: torch.Tensor
    rows: torch.Tensor  # [B, capacity, D] in their order, 0 beyond the length
    kv_cache: torch.Tensor
    cache_seqlens: torch.Tensor
    block_table: torch.Tensor | None

    def decode(self, backend, **changes):
        return mla_decode(
            self.q, self.kv_cache, self.cache_seqlens, self.block_table,
            d_latent=self.case.d_latent, softmax_scale=self.case.softmax_scale,
            causal=self.case.causal, return_lse=True, backend=backend,
            **{**self.case.options, **changes},
        )  # fmt: skip

    def check(self, actual):
        """The rule of docs/numerics.md for out and lse."""
        rest = (self.case.lengths, self.case.d_latent, self.case.softmax_scale, self.case.causal)
        q, rows = self.q.cpu(), self.rows.cpu()
        exact = plain.latent_attention(q.double(), rows.double(), *rest)
        rough = plain.latent_attention(q, rows.to(q.dtype), *rest)

        def plainly(q, rows):
            return plain.latent_attention(q, rows, *rest)

        for index, (got, want, yard) in enumerate(zip(actual, exact, rough)):
            elsewhere = functools.partial(
                error_near_by, plainly, [q, rows.to(q.dtype)], exact, index
            )
            what = ("out", "lse")[index]
            assert_within(
                got.cpu(), want, yard, factor=FORWARD, what=what, plain_elsewhere=elsewhere
            )


def compressed(codes, scales, k_rope):
    """Rows of bytes: codes [..., d_latent], float32 scales, a rotated key in bfloat16."""
    parts = (codes, scales.float(), k_rope.bfloat16())
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1).view(codes.dtype)


def draw_rows(case, dtype, generator):
    """The numbers [B, capacity, D] that a cache holds, and its rows."""
    shape = (len(case.lengths), case.capacity)

    def randn(columns):
        return torch.randn(*shape, columns, generator=generator, dtype=torch.float64)

    if case.format is None:
        rows = randn(case.d_latent + case.d_rope).to(dtype)
        return rows, rows.clone()
    spread = 40.0 if case.format == torch.int8 else 100.0
    codes = (randn(case.d_latent) * spread).clamp(-127, 127).to(case.format)
    scales = (randn(-(-case.d_latent // SCALE_GROUP)).abs() / spread + 0.002).float()
    k_rope = randn(case.d_rope).bfloat16()
    spread_scales = scales.repeat_interleave(SCALE_GROUP, dim=-1)[..., : case.d_latent]
    numbers = torch.cat((codes.float() * spread_scales, k_rope.float()), dim=-1)
    return numbers, compressed(codes, scales, k_rope)


def fill(cache, index):
    """NaN where the format has one: 0x7f is NaN as e4m3, and 0xff.. as float32 and bfloat16."""
    if cache.dtype.is_floating_point and cache.element_size() > 1:
        cache[index] = NAN
    else:
        cache.view(torch.uint8)[index] = 0xFF


def in_pages(cache, page_size, order):
    """[B, capacity, row] as pages in the order given, two more unused ones among them."""
    cut = cache.view(torch.uint8) if cache.element_size() == 1 else cache
    cut = cut.reshape(-1, page_size, cache.shape[-1])
    pages = cut.new_empty(cut.shape[0] + 2, *cut.shape[1:])
    fill(pages, slice(None))
    pages[order] = cut
    return pages.view(cache.dtype)


def prepare(case, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, width = len(case.lengths), case.d_latent + case.d_rope
    q = torch.randn(
        batch, case.queries, case.heads, width, generator=generator, dtype=torch.float64
    ).to(dtype)
    rows, cache = draw_rows(case, dtype, generator)
    for row, length in enumerate(case.lengths):
        rows[row, length:] = 0
        fill(cache, (row, slice(length, None)))
    table = None
    if case.page_size is not None:
        places = case.capacity // case.page_size
        order = torch.randperm(batch * places + 2, generator=generator)[: batch * places]
        cache = in_pages(cache, case.page_size, order)
        table = order.view(batch, places).to(torch.int32)
        for row, length in enumerate(case.lengths):
            for place in range(-(-length // case.page_size), places):
                table[row, place] = GARBAGE[place % len(GARBAGE)]
        table = table.to(DEVICE)
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=DEVICE)
    return Call(case, q.to(DEVICE), rows.to(DEVICE), cache.to(DEVICE), lengths, table)
