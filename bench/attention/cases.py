"""Attention against the eager composition, PyTorch's SDPA (on a GPU each of its backends), FlexAttention.

Prefill and training, sinks, windows, soft-cap, packed sequences, decoding from contiguous and paged caches.
On a GPU the shapes of the published figures: 16k tokens, 2048 features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from warploom.ops.attention import attention, attention_decode, attention_varlen

from bench.harness import Case, training

#: The eager composition holds all scores: no peer where they take more than this.
MOST_EAGER_BYTES = 8 * 2**30


@dataclass(frozen=True)
class Work:
    """One prefill: q [B, S, H, D], k [B, S, Hkv, D], v [B, S, Hkv, Dv], and what changes the scores."""

    name: str
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int = 0  # 0: head_dim
    causal: bool = True
    window: int = -1
    softcap: float = 0.0
    sinks: bool = False

    def inputs(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        shapes = (
            (self.heads, self.head_dim),
            (self.kv_heads, self.head_dim),
            (self.kv_heads, self.value_dim or self.head_dim),
        )
        drawn = [
            torch.randn(self.batch, self.length, *shape, device=device).to(dtype)
            for shape in shapes
        ]
        return [*drawn, torch.randn(self.heads, device=device)] if self.sinks else drawn

    @property
    def shape(self) -> str:
        dims = f"{self.head_dim}" + (f"/{self.value_dim}" if self.value_dim else "")
        return f"B{self.batch} S{self.length} H{self.heads}/{self.kv_heads} D{dims}"

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        seen = self.length * self.length
        if self.causal:
            seen //= 2
        if self.window >= 0:
            seen = min(seen, self.length * (self.window + 1))
        return self.batch * self.heads * seen

    @property
    def flops(self) -> int:
        return 2 * self.pairs * (self.head_dim + (self.value_dim or self.head_dim))

    def ours(self, backend: str, q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> Tensor:
        result: Tensor = attention(
            q, k, v, causal=self.causal, window=(self.window, -1), softcap=self.softcap,
            sinks=sinks[0] if sinks else None, backend=backend,
        )  # fmt: skip
        return result

    def eager(self, q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> Tensor:
        """The composition that models are written in; q may be the last queries alone."""
        group = self.heads // self.kv_heads
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        k, v = (tensor.repeat_interleave(group, dim=1) for tensor in (k, v))
        scores = q @ k.transpose(2, 3) * self.head_dim**-0.5
        if self.softcap:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        rows = torch.arange(q.shape[2], device=q.device) + (k.shape[2] - q.shape[2])
        behind = torch.arange(k.shape[2], device=q.device) - rows[:, None]
        hidden = torch.zeros_like(behind, dtype=torch.bool)
        if self.causal:
            hidden |= behind > 0
        if self.window >= 0:
            hidden |= behind < -self.window
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks:
            column = sinks[0].to(q.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            weights = torch.softmax(torch.cat((scores, column), dim=-1), dim=-1)[..., :-1]
        else:
            weights = torch.softmax(scores, dim=-1)
        return (weights @ v).transpose(1, 2)

    def sdpa(self, kind: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]

        def call() -> Tensor:
            return F.scaled_dot_product_attention(
                *heads_first, is_causal=self.causal, enable_gqa=self.heads != self.kv_heads
            )

        if kind is None:
            return call().transpose(1, 2)
        with sdpa_kernel(kind):
            return call().transpose(1, 2)

    def flex(self, device: str) -> Callable[..., Tensor]:
        """FlexAttention, compiled, with this mask and soft-cap."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            inside = i >= j if self.causal else i == i
            return inside & (i - j <= self.window) if self.window >= 0 else inside

        def cap(score: Tensor, *_: Tensor) -> Tensor:
            return torch.tanh(score / self.softcap) * self.softcap

        mask = create_block_mask(seen, None, None, self.length, self.length, device=device)
        compiled = torch.compile(flex_attention, fullgraph=True)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = compiled(
                *(tensor.transpose(1, 2) for tensor in (q, k, v)),
                score_mod=cap if self.softcap else None,
                block_mask=mask,
                enable_gqa=self.heads != self.kv_heads,
            )
            return out.transpose(1, 2)

        return run

    def verify(self, backend: str, inputs: list[Tensor]) -> Callable[[], None]:
        """The last queries, which see the most keys, against the composition in float64."""

        def check() -> None:
            q, *rest = inputs
            got = self.ours(backend, *inputs)[:, -32:].double()
            want = self.eager(*(tensor.double() for tensor in (q[:, -32:], *rest)))
            tolerance = 8 * torch.finfo(q.dtype).eps
            limit = tolerance * want.abs().max().item()
            torch.testing.assert_close(got, want, rtol=tolerance, atol=limit)

        return check


CPU_WORK = [
    Work("attention", 1, 2048, 16, 4, 64),
    Work("attention sinks", 1, 2048, 16, 4, 64, sinks=True),
    Work("attention window 256", 1, 2048, 16, 4, 64, window=255),
    Work("attention soft-cap", 1, 2048, 16, 4, 64, softcap=30.0),
    Work("attention 192/128", 1, 1024, 16, 16, 192, 128),
]


def _gpu_work() -> list[Work]:
    """B S = 16k and H D = 2048, as FlashAttention-3 and the Triton tutorial report theirs."""
    found = []
    for head_dim in (128, 64, 256):
        for length in (8192, 2048, 512, 16384):
            for causal in (True, False):
                name = "attention causal" if causal else "attention full"
                heads = 2048 // head_dim
                found.append(
                    Work(name, 16384 // length, length, heads, heads, head_dim, causal=causal)
                )
    gqa = Work("attention causal", 2, 8192, 32, 8, 128)
    # What a model asks for first: a run that is cut short has those.
    return [
        gqa,
        found[0],
        Work("attention 192/128", 1, 8192, 16, 16, 192, 128),
        replace(gqa, name="attention window 1024", window=1023),
        replace(gqa, name="attention sinks", sinks=True),
        replace(gqa, name="attention soft-cap", softcap=30.0),
        *found[1:],
    ]


def _runs(function: Callable[..., Any], inputs: list[Tensor]) -> bool:
    """Whether a peer serves the shape here at all."""
    try:
        with torch.no_grad():
            function(*inputs)
    except Exception:  # Whatever a peer raises, it does not serve this row.
        return False
    return True


def _peers(work: Work, device: str, inputs: list[Tensor]) -> dict[str, Callable[..., Tensor]]:
    peers: dict[str, Callable[..., Tensor]] = {}
    if work.pairs * (2 if work.causal else 1) * 4 <= MOST_EAGER_BYTES:
        peers["eager"] = work.eager
    if work.window < 0 and not work.softcap and not work.sinks:
        peers["torch"] = functools.partial(work.sdpa, None)
        if device == "cuda":
            for kind in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
                name = f"SDPA {kind.split('_')[0].lower()}"
                peers[name] = functools.partial(work.sdpa, getattr(SDPBackend, kind))
    if not work.sinks and (work.window >= 0 or work.softcap):
        peers["flex"] = work.flex(device)
    return {name: peer for name, peer in peers.items() if _runs(peer, inputs)}


def _prefill(work: Work, device: str, dtype: torch.dtype, backend: str) -> list[Case]:
    inputs = work.inputs(device, dtype)
    peers = _peers(work, device, inputs)
    q, k, v = inputs[:3]
    out_size = q.numel() // q.shape[-1] * v.shape[-1]
    size = (q.numel() + k.numel() + v.numel() + out_size) * q.element_size()
    ours = functools.partial(work.ours, backend)
    verify = work.verify(backend, inputs)
    name = work.name if device == "cpu" else f"{work.name} ({backend})"

    def case(op: str, run: Any, others: dict[str, Any], factor: int) -> Case:
        flops = work.flops if factor == 1 else work.flops * 7 // 2
        return Case("attention", op, work.shape, dtype, run, others, verify, factor * size, flops)

    bound = {peer: functools.partial(call, *inputs) for peer, call in peers.items()}
    trained = {
        peer: training(call, inputs)
        for peer, call in peers.items()
        if peer != "flex" or device == "cuda"  # FlexAttention has no backward on a CPU.
    }
    return [
        case(name, functools.partial(ours, *inputs), bound, 1),
        case(f"{name} forward+backward", training(ours, inputs), trained, 3),
    ]


def _varlen(device: str, dtype: torch.dtype, backend: str) -> list[Case]:
    """Four sequences of unequal length, packed, against the composition one by one."""
    scale = 1 if device == "cpu" else 4
    lengths = [scale * length for length in (1024, 128, 640, 256)]
    work = Work("attention packed", 1, sum(lengths), 16, 4, 64 if device == "cpu" else 128)
    q, k, v = (tensor[0] for tensor in work.inputs(device, dtype))
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = attention_varlen(
            q, k, v, bounds, bounds, max(lengths), max(lengths), causal=True, backend=backend
        )
        return result

    def one_by_one(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = zip(q.split(lengths), k.split(lengths), v.split(lengths))
            outs = [function(*(tensor.unsqueeze(0) for tensor in part))[0] for part in parts]
            return torch.cat(outs)

        return run

    peers = {
        "eager": one_by_one(work.eager),
        "torch": one_by_one(functools.partial(work.sdpa, None)),
    }
    inputs = [q, k, v]

    def verify() -> None:
        got, want = ours(*inputs).double(), peers["eager"](*(tensor.double() for tensor in inputs))
        tolerance = 8 * torch.finfo(dtype).eps
        limit = tolerance * want.abs().max().item()
        torch.testing.assert_close(got, want, rtol=tolerance, atol=limit)

    size = (2 * q.numel() + k.numel() + v.numel()) * q.element_size()
    flops = 2 * work.heads * 2 * work.head_dim * sum(length**2 // 2 for length in lengths)
    shape = f"{'+'.join(map(str, lengths))} H{work.heads}/{work.kv_heads} D{work.head_dim}"
    name = "attention packed" if device == "cpu" else f"attention packed ({backend})"
    forward = {peer: functools.partial(call, *inputs) for peer, call in peers.items()}
    trained = {peer: training(call, inputs) for peer, call in peers.items()}
    run = functools.partial(ours, *inputs)
    forward_case = Case("attention", name, shape, dtype, run, forward, verify, size, flops)
    return [
        forward_case,
        replace(
            forward_case,
            op=f"{name} forward+backward",
            run=training(ours, inputs),
            peers=trained,
            bytes=3 * size,
            flops=flops * 7 // 2,
        ),
    ]


def _decode(device: str, dtype: torch.dtype, backend: str, page_size: int) -> Case:
    """One token a sequence on full caches; pages in a random order."""
    batch, heads, kv_heads, length, dim = (
        (4, 32, 8, 4096, 128) if device == "cpu" else (16, 64, 8, 8192, 128)
    )
    q = torch.randn(batch, 1, heads, dim, device=device).to(dtype)
    k, v = (torch.randn(batch, length, kv_heads, dim, device=device).to(dtype) for _ in range(2))
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    caches, table = [k, v], None
    if page_size:
        order = torch.randperm(batch * length // page_size, device=device)
        caches = [
            cache.reshape(-1, page_size, kv_heads, dim)[torch.argsort(order)] for cache in (k, v)
        ]
        table = order.view(batch, -1).int()

    def ours() -> Tensor:
        result: Tensor = attention_decode(q, *caches, lengths, table, backend=backend)
        return result

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, enable_gqa=True).transpose(1, 2)

    def verify() -> None:
        want = theirs(q.double(), k.double(), v.double())
        tolerance = 8 * torch.finfo(dtype).eps
        limit = tolerance * want.abs().max().item()
        torch.testing.assert_close(ours().double(), want, rtol=tolerance, atol=limit)

    # The floor of reading: a sum over the same bytes, as float32, whose sum PyTorch vectorises.
    read = torch.randn(2 * k.numel() * k.element_size() // 4, device=device)
    layout = f"pages of {page_size}" if page_size else "contiguous"
    name = "attention_decode" if device == "cpu" else f"attention_decode ({backend})"
    size = 2 * k.numel() * k.element_size()
    flops = 4 * batch * heads * length * dim
    peers = {"torch": lambda: theirs(q, k, v), "sum of the bytes": read.sum}
    shape = f"B{batch} S{length} H{heads}/{kv_heads} D{dim} {layout}"
    return Case("attention", name, shape, dtype, ours, peers, verify, size, flops)


def cases(device: str) -> Iterator[Case]:
    torch.manual_seed(0)
    backends = ("cuda", "triton") if device == "cuda" else ("cpu",)
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)
    works = _gpu_work() if device == "cuda" else CPU_WORK
    for dtype in dtypes:
        for work in works[:1]:
            for backend in backends:
                yield from _prefill(work, device, dtype, backend)
        for backend in backends:
            yield from (_decode(device, dtype, backend, page_size) for page_size in (0, 16))
            yield from _varlen(device, dtype, backend)
        for work in works[1:]:
            for backend in backends:
                yield from _prefill(work, device, dtype, backend)
