"""Blocks of pixels that become channels, between the scales of a flow."""

from __future__ import annotations

import torch
from torch import Tensor

from warploom._library import Differentiable, define
from warploom.ops._check import check_choice, check_dim, check_floating, fail
from warploom.ops._fakes import dense_like_lines
from warploom.reference import coupling as reference

_OP = "squeeze"
ORDERS = ("channel_major", "position_major")


def _fake(x: Tensor, factor: int, order: str, inverse: bool) -> Tensor:
    batch, channels, height, width = x.shape
    positions = factor * factor
    shape = (
        (batch, channels // positions, height * factor, width * factor)
        if inverse
        else (batch, channels * positions, height // factor, width // factor)
    )
    return dense_like_lines(torch.Size(shape), x)


_squeeze_op = define(
    "squeeze",
    "(Tensor x, int factor, str order, bool inverse) -> Tensor",
    reference=reference.squeeze,
    fake=_fake,
    triton="coupling.squeeze:squeeze",
    sharding=("B c h w -> B d i j",),
)

# Elements are moved: the gradient takes the way back.
_squeeze = Differentiable(
    _squeeze_op,
    _squeeze_op,
    save=lambda args, outputs: (),
    backward=lambda overload, saved, scalars, grads, needs: (
        overload(grads[0], *scalars[:-1], not scalars[-1]),
    ),
)


def squeeze(
    x: Tensor,
    factor: int = 2,
    *,
    order: str = "channel_major",
    inverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Blocks of factor x factor pixels become channels: [B, C, H, W] -> [B, C f^2, H / f, W / f].

    Pixel (dy, dx) of a block of channel c goes to channel c f^2 + dy f + dx ("channel_major", as in Glow,
    nflows, normflows) or (dy f + dx) C + c ("position_major"). Its log-determinant is 0.

    Args:
        x: [B, C, H, W], float32, float16, bfloat16 (float64 on `reference` and `cpu`), any strides; H and W
            multiples of `factor`, with `inverse` C a multiple of factor^2.
        factor: at least 1; default 2.
        order: "channel_major" (default) or "position_major".
        inverse: the inverse map; default False.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        x's elements, contiguous (channels-last where x is so).

    Raises:
        TypeError, ValueError: a dtype, a shape that does not divide, or an unknown order.
        RuntimeError: the named backend cannot serve the call; forward-mode or second differentiation.

    Source: Dinh, Sohl-Dickstein, Bengio, Density estimation using Real NVP (2017), section 3.6.
    """
    check_floating(_OP, "x", x)
    check_dim(_OP, "x", x, 4, "[B, C, H, W]")
    check_choice(_OP, "order", order, ORDERS)
    if factor < 1:
        fail(_OP, "factor", "at least 1", factor)
    positions = factor * factor
    _, channels, height, width = x.shape
    if inverse and channels % positions:
        fail(_OP, "x", f"a multiple of {positions} channels", channels)
    if not inverse and (height % factor or width % factor):
        fail(_OP, "x", f"height and width that {factor} divides", (height, width))
    out: Tensor = _squeeze(x, factor, order, bool(inverse), backend=backend)
    return out
