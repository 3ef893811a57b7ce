"""The coupling of rows joined with its conditioner's last layer, against the layer and the coupling apart.

65536 rows of 64 channels, 256 features of the conditioner; forward, as in sampling, and training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from warploom.ops.coupling import affine_coupling, affine_coupling_linear

from bench.harness import Case, Run, close_to, training

ROWS, CHANNELS, FEATURES = 65536, 64, 256

#: (x, hidden, weight, bias) -> z with log_det as one more column
Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _joined(z: Tensor, log_det: Tensor) -> Tensor:
    return torch.cat((z, log_det[:, None].to(z.dtype)), dim=1)


def ours(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _joined(*affine_coupling_linear(x, hidden, weight, bias))


def apart(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _joined(*affine_coupling(x, F.linear(hidden, weight, bias)))


def eager(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    kept, moved = x.chunk(2, dim=1)
    shift, log_scale = F.linear(hidden, weight, bias).chunk(2, dim=1)
    return _joined(torch.cat((kept, moved * log_scale.exp() + shift), dim=1), log_scale.sum(1))


def cases_of(rows: int, dtype: torch.dtype, device: str) -> list[Case]:
    def make(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(dtype)

    tensors = [make(rows, CHANNELS), make(rows, FEATURES), make(CHANNELS, FEATURES), make(CHANNELS)]
    peers: dict[str, Function] = {"apart": apart, "eager": eager}
    moved = rows * (2 * CHANNELS + FEATURES) + CHANNELS * FEATURES
    product = 2 * rows * CHANNELS * FEATURES

    def case(op: str, bind: Callable[[Function, list[Tensor]], Run], products: int) -> Case:
        return Case(
            family="coupling",
            op=op,
            shape=f"{rows}x{CHANNELS}, {FEATURES} features",
            dtype=dtype,
            run=bind(ours, tensors),
            peers={name: bind(peer, tensors) for name, peer in peers.items()},
            verify=close_to(ours, eager, tensors),
            bytes=(1 if products == 1 else 3) * moved * tensors[0].element_size(),
            flops=products * product,
        )

    return [
        case("affine_coupling_linear", lambda f, given: functools.partial(f, *given), 1),
        case("affine_coupling_linear forward+backward", training, 4),
    ]


def cases(device: str) -> list[Case]:
    dtypes = (torch.float32, torch.bfloat16)
    return [case for dtype in dtypes for case in cases_of(ROWS, dtype, device)]
