"""Kernel arguments, by name, that several kernels of this family take, and how they are launched."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from warploom.triton_kernels.attention.tiles import LOG2_E, AttentionTile, padded_head_dim
from warploom.triton_kernels.common.dropout import dropout_threshold
from warploom.triton_kernels.common.launch import COMPILE_OPTIONS, AheadOfTimeCase, Constant

Arguments = dict[str, Any]

# No limit of a window: beyond every distance, and sums with positions stay below 2^31.
UNLIMITED = 1 << 30

# Integers that vary from call to call: a kernel is not compiled anew where one is 1 or divisible by
# 16. The second list has those of single kernels, which name them where they are defined.
UNSPECIALIZED = ["H", "Sq", "Sk", "window_left", "window_right", "dropout_threshold"]
_UNSPECIALIZED_TOO = ("M", "S", "P", "CAPACITY", "num_splits", "split_size")


def head_strides(name: str, tensor: torch.Tensor, packed: bool) -> Arguments:
    """Strides of [B, S, H, D], or of a packed [T, H, D], whose batches are 0 apart."""
    batch = 0 if packed else tensor.stride(0)
    return {
        f"{name}_stride_b": batch,
        f"{name}_stride_s": tensor.stride(-3),
        f"{name}_stride_h": tensor.stride(-2),
    }


def sequence_arguments(
    q: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Arguments:
    """Where sequences lie; the strides of lse and of what is laid out like it."""
    rows, heads = q.shape[-3:-1]
    return {
        "cu_seqlens_q_ptr": None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
        "cu_seqlens_k_ptr": None if cu_seqlens_k is None else cu_seqlens_k.contiguous(),
        "H": heads,
        "Sq": max_seqlen_q,
        "Sk": max_seqlen_k,
        "lse_stride_b": 0 if cu_seqlens_q is not None else heads * rows,
        "lse_stride_h": rows,
    }


def score_arguments(
    alibi_slopes: torch.Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[Arguments, Arguments]:
    """What every score needs -> (arguments, constants)."""
    arguments = {
        "alibi_ptr": None if alibi_slopes is None else alibi_slopes.contiguous(),
        "window_left": UNLIMITED if window_left < 0 else min(window_left, UNLIMITED),
        "window_right": UNLIMITED if window_right < 0 else min(window_right, UNLIMITED),
        "score_scale": softmax_scale / softcap if softcap > 0 else softmax_scale * LOG2_E,
        "softcap_log2": softcap * LOG2_E,
    }
    return arguments, {"LEFT": window_left >= 0, "SOFTCAP": softcap > 0}


def is_plain(window_left: int, softcap: float, *optional: torch.Tensor | None) -> bool:
    """Whether the inner loops have no more to do than products and a causal mask."""
    return window_left < 0 and softcap == 0 and all(tensor is None for tensor in optional)


def dense_arguments(
    bias: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    dropout_p: float,
) -> Arguments:
    """What prefill and its gradient know and decoding does not."""
    strides = (0, 0, 0, 0) if bias is None else bias.stride()
    mask = None if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8)
    return {
        "bias_ptr": bias,
        **dict(zip((f"bias_stride_{of}" for of in "bhqk"), strides, strict=True)),
        "padding_ptr": mask,
        "seed_ptr": dropout_seed if dropout_p > 0 else None,
        "dropout_threshold": dropout_threshold(dropout_p),
        "keep_scale": 1 / (1 - dropout_p) if dropout_seed is not None else 1.0,
    }


def block_constants(tile: AttentionTile, d: int, dv: int, group: int) -> Arguments:
    # Compiled by Triton 3.6 for sm_90, 16-bit tiles of 32 features with values of 16 read outside of memory.
    least = min(32, padded_head_dim(max(d, dv)))
    return {
        "GROUP": group,
        "D": d,
        "DV": dv,
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "BLOCK_D": max(least, padded_head_dim(d)),
        "BLOCK_DV": max(least, padded_head_dim(dv)),
    }


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a kernel, or what is compiled for it ahead of time."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Arguments
    constants: Arguments
    num_warps: int
    num_stages: int = 1

    def run(self) -> None:
        self.kernel[self.grid](
            **self.arguments,
            **self.constants,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            **COMPILE_OPTIONS,
        )

    def ahead_of_time(self, name: str) -> AheadOfTimeCase:
        """The specialisation that these arguments, of which only types and divisors count, ask for."""
        types = {key: _type_of(key, value) for key, value in self.arguments.items()}
        types |= {key: Constant(value) for key, value in self.constants.items()}
        return AheadOfTimeCase(name, self.kernel, types, self.num_warps, self.num_stages)


_POINTERS = {
    torch.bfloat16: "*bf16:16",
    torch.float16: "*fp16:16",
    torch.float32: "*fp32:16",
    torch.int32: "*i32:16",
    torch.int64: "*i64:16",
    torch.uint8: "*u8:16",
}


def _type_of(name: str, value: Any) -> Constant | str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if value is None:
        return Constant(None)
    if isinstance(value, float):
        return "fp32"
    if name in (*UNSPECIALIZED, *_UNSPECIALIZED_TOO):
        return "i32"
    if value == 1:
        return Constant(1)
    return "i32:16" if value % 16 == 0 else "i32"


def example(
    dtype: torch.dtype, d: int, dv: int, *features: str
) -> tuple[str, tuple[torch.Tensor, ...], dict[str, Any]]:
    """A call of prefill to compile ahead of time: its name; q, k, v and out; the other arguments."""
    b, s, h, kv_heads = 2, 1024, 8, 2
    packed = "packed" in features or "pages" in features

    def tensor(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    rows = (b * s,) if packed else (b, s)
    q, out = tensor(*rows, h, d, of=dtype), tensor(*rows, h, dv, of=dtype)
    place = (64, 16) if "pages" in features else rows
    k, v = tensor(*place, kv_heads, d, of=dtype), tensor(*place, kv_heads, dv, of=dtype)
    bounds = tensor(b + 1, of=torch.int32) if packed else None
    options = {
        "bias": tensor(b, h, s, s, of=dtype) if "bias" in features else None,
        "alibi_slopes": tensor(b, h) if "alibi" in features else None,
        "sinks": tensor(h) if "sinks" in features else None,
        "key_padding_mask": tensor(b, s, of=torch.bool) if "padding" in features else None,
        "cu_seqlens_q": bounds,
        "cu_seqlens_k": bounds,
        "block_table": tensor(b, 64, of=torch.int32) if "pages" in features else None,
        "dropout_seed": tensor(1, of=torch.int64) if "dropout" in features else None,
        "softmax_scale": 0.125,
        "window_left": 256 if "window" in features else -1,
        "window_right": 0,
        "softcap": 30.0 if "softcap" in features else 0.0,
        "dropout_p": 0.1 if "dropout" in features else 0.0,
        "max_seqlen_q": s,
        "max_seqlen_k": s,
    }
    name = f"{_POINTERS[dtype][1:-3]} D={d} Dv={dv} {' '.join(features)}".rstrip()
    return name, (q, k, v, out), options
