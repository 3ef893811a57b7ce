"""Representative arguments of every op: what its schema takes, for a number of tokens and a dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Arguments = tuple[Any, ...]

WIDTH = 2048
HEADS, KEY_VALUE_HEADS, HEAD_DIM = 16, 4, 64
LATENT, ROPE = 512, 64
LATENT_SCALE = 192**-0.5  # heads of 128 features and 64 rotated ones
EXPERTS, CHOSEN, EXPERT_WIDTH = 16, 2, 704
CLASSES, CLASS_WIDTH = 8192, 256
LOSS_OPTIONS = (-100, 0.0, 0.0, 0.0)  # ignore_index, label_smoothing, z_loss, softcap
RANK, SCALING = 16, 2.0
CHANNELS = 96
ROW, CONDITIONER = 64, 128  # channels of a tabular coupling, features of its conditioner


def rows(size: int, dtype: torch.dtype, count: int) -> list[Tensor]:
    return [torch.randn(size, WIDTH).to(dtype) for _ in range(count)]


def rotary_arguments(size: int, dtype: torch.dtype, interleaved: bool) -> Arguments:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = torch.rand(size, HEAD_DIM // 2, dtype=wide) * 6.28
    x = torch.randn(1, size, HEADS, HEAD_DIM).to(dtype)
    return x, angles.cos(), angles.sin(), None, interleaved, False


def attention_arguments(size: int, dtype: torch.dtype, sinks: bool) -> Arguments:
    q = torch.randn(1, size, HEADS, HEAD_DIM).to(dtype)
    k, v = (torch.randn(1, size, KEY_VALUE_HEADS, HEAD_DIM).to(dtype) for _ in range(2))
    logits = torch.randn(HEADS, dtype=statistics_dtype(dtype)) if sinks else None
    tensors = (None, None, logits, None, None, None, None, None)
    return q, k, v, *tensors, HEAD_DIM**-0.5, -1, 0, 0.0, 0.0, size, size


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def cache(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Key and value caches of four sequences of `size` tokens, and their lengths."""
    shape = (4, size, KEY_VALUE_HEADS, HEAD_DIM)
    k, v = (torch.randn(shape).to(dtype) for _ in range(2))
    return k, v, torch.full((4,), size, dtype=torch.int32)


def decode_arguments(size: int, dtype: torch.dtype) -> Arguments:
    q = torch.randn(4, 1, HEADS, HEAD_DIM).to(dtype)
    return q, *cache(size, dtype), None, None, None, HEAD_DIM**-0.5, -1, 0, 0.0, 0, 0


def append_arguments(size: int, dtype: torch.dtype) -> Arguments:
    k_cache, v_cache, lengths = cache(size, dtype)
    k, v = (torch.randn(4, 1, KEY_VALUE_HEADS, HEAD_DIM).to(dtype) for _ in range(2))
    return k, v, k_cache, v_cache, lengths - 1, None, None, None, False


def merge_arguments(size: int, dtype: torch.dtype) -> Arguments:
    def part() -> tuple[Tensor, Tensor]:
        out = torch.randn(1, size, HEADS, HEAD_DIM).to(dtype)
        return out, torch.randn(1, HEADS, size, dtype=statistics_dtype(dtype))

    return *part(), *part()


def expert_arguments(size: int, dtype: torch.dtype) -> Arguments:
    """Every token's row once for each of the experts that it chose, sorted by expert."""
    chosen = torch.rand(size, EXPERTS).topk(CHOSEN, dim=-1).indices
    offsets = torch.zeros(EXPERTS + 1, dtype=torch.int32)
    offsets[1:] = torch.bincount(chosen.flatten(), minlength=EXPERTS).cumsum(0)
    weight = torch.randn(EXPERTS, EXPERT_WIDTH, WIDTH) * (WIDTH**-0.5 / 2)
    return torch.randn(size * CHOSEN, WIDTH).to(dtype), weight.to(dtype), offsets, False


def adapter(dtype: torch.dtype) -> Tensor:
    lora_a: Tensor = torch.randn(RANK, WIDTH) * WIDTH**-0.5
    return lora_a.to(dtype)


def norm_shrink_arguments(size: int, dtype: torch.dtype) -> Arguments:
    weight = torch.rand(WIDTH).to(dtype) + 0.5
    return *rows(size, dtype, 2), weight, adapter(dtype), 1e-6


def adapter_arguments(size: int, dtype: torch.dtype) -> Arguments:
    """A linear map as wide as long, and an adapter of it."""
    shapes = ((size, WIDTH), (WIDTH, WIDTH), (RANK, WIDTH), (WIDTH, RANK))
    x, weight, lora_a, lora_b = (
        (torch.randn(shape) * shape[1] ** -0.5).to(dtype) for shape in shapes
    )
    tensors = x, weight, None, None, lora_a, lora_b, None, None, None
    return *tensors, "dense", SCALING, 0.0


def latent_cache(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Latents of four sequences of `size` tokens, with rotated keys, and their lengths."""
    cache = torch.randn(4, size, LATENT + ROPE).to(dtype)
    return cache, torch.full((4,), size, dtype=torch.int32)


def latent_arguments(size: int, dtype: torch.dtype) -> Arguments:
    q = torch.randn(4, 1, HEADS, LATENT + ROPE).to(dtype)
    return q, *latent_cache(size, dtype), None, LATENT, LATENT_SCALE, True, 0, 0


def latent_append_arguments(size: int, dtype: torch.dtype) -> Arguments:
    cache, lengths = latent_cache(size, dtype)
    new, weight = torch.randn(4, 1, LATENT + ROPE).to(dtype), torch.rand(LATENT).to(dtype) + 0.5
    return new, weight, cache, lengths - 1, None, None, None, None, 1e-6, True


def logits_arguments(size: int, dtype: torch.dtype) -> Arguments:
    logits, targets = torch.randn(size, CLASSES).to(dtype), torch.randint(CLASSES, (size,))
    return logits, targets, None, *LOSS_OPTIONS, False


def block_arguments(size: int, dtype: torch.dtype) -> Arguments:
    logits, targets, *_ = logits_arguments(size, dtype)
    state = logits.new_zeros(len(logits), 4, dtype=statistics_dtype(dtype))
    return logits, state, targets, 0, CLASSES, -100, 0.0, False


def loss_arguments(size: int, dtype: torch.dtype) -> Arguments:
    hidden = torch.randn(size, CLASS_WIDTH).to(dtype)
    weight = (torch.randn(CLASSES, CLASS_WIDTH) * CLASS_WIDTH**-0.5).to(dtype)
    tensors = (hidden, weight, torch.randint(CLASSES, (size,)), None, None, None, None)
    return *tensors, 1.0, *LOSS_OPTIONS, True, False, False, False, False, False


def coupling_arguments(size: int, dtype: torch.dtype) -> Arguments:
    """`size` // 64 images of 32 x 32 pixels, and their parameters."""
    images = [torch.randn(max(1, size // 64), CHANNELS, 32, 32).to(dtype) for _ in range(2)]
    options = ("range", CHANNELS // 2, CHANNELS // 2, "interleaved", "sigmoid", 1.0, 0.0, 1.0)
    return *images, None, None, None, None, *options, True, 1, 1, "none"


def texts(size: int, dtype: torch.dtype) -> Arguments:
    """A text of 24 tokens and `size` others of as many."""
    bounds = torch.arange(size + 1, dtype=torch.int32) * 24
    return torch.randint(50, (24,)), torch.randint(50, (size * 24,)), bounds


def feature_map(size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, 64, max(8, size // 32), 32).to(dtype)


def region_arguments(size: int, dtype: torch.dtype) -> Arguments:
    """As many regions of one feature map as it has rows, each of 7 x 7 bins of 2 x 2 samples."""
    x = feature_map(size, dtype)
    rows = x.shape[2]
    # Inside of the outer pixels' centres, where both sides mean the same.
    corners = 1 + torch.rand(rows, 2, 2) * torch.tensor([29.0, rows - 3])
    boxes = torch.cat((corners.amin(1), corners.amax(1) + 1), 1)
    rois = torch.cat((torch.zeros(rows, 1), boxes), 1).to(statistics_dtype(dtype))
    return x, rois, 7, 7, 1.0, 2, True


def spline_arguments(size: int, dtype: torch.dtype) -> Arguments:
    """All of 64 features of a row, with the logits of 8 bins."""
    x, params = torch.randn(size, 64, 1).to(dtype), (torch.randn(size, 64, 1, 23) / 8).to(dtype)
    interval = (-3.0, 3.0, -3.0, 3.0)
    return x, params, 0, 8, True, "linear", *interval, 1e-3, 1e-3, 1e-3, 1.0, "nflows", False


def coupling_linear_arguments(size: int, dtype: torch.dtype) -> Arguments:
    x, hidden = torch.randn(size, ROW), torch.randn(size, CONDITIONER)
    weight, bias = torch.randn(ROW, CONDITIONER) / CONDITIONER, torch.randn(ROW) / 4
    half = ROW // 2
    options = ("range", half, half, "shift_scale", "exp", 1.0, 0.0, 1.0, False, 1, 1)
    tensors = (tensor.to(dtype) for tensor in (x, hidden, weight, bias))
    return *tensors, None, None, None, *options


def maps(size: int, dtype: torch.dtype) -> Arguments:
    levels = [1, 1, 2, 2, 4, 4]
    return (
        torch.randn(size, 32, 13, 13).to(dtype),
        None,
        None,
        levels,
        "max",
        "adaptive",
        False,
        False,
    )
