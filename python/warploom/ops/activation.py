"""Family `activation`: the gated activations of feed-forward layers."""

from __future__ import annotations

from torch import Tensor

from warploom._library import Differentiable, define
from warploom.ops._check import check_floating, check_same, check_shape, fail
from warploom.ops._fakes import dense
from warploom.reference import activation as reference

_gated_activation_op = define(
    "gated_activation",
    "(Tensor gate, Tensor up, str activation) -> Tensor",
    reference=reference.gated_activation,
    fake=lambda gate, up, activation: dense(gate),
    triton="activation.gated_activation:gated_activation",
    sharding=("..., ... -> ...",),
)
_gated_activation_backward_op = define(
    "gated_activation_backward",
    "(Tensor grad_out, Tensor gate, Tensor up, str activation) -> (Tensor grad_gate, Tensor grad_up)",
    reference=reference.gated_activation_backward,
    fake=lambda grad_out, gate, up, activation: (dense(gate), dense(up)),
    triton="activation.gated_activation:gated_activation_backward",
    sharding=("..., ..., ... -> ..., ...",),
)

_gated_activation = Differentiable(
    _gated_activation_op,
    _gated_activation_backward_op,
    save=lambda args, outputs: (args[0], args[1]),
    backward=lambda overload, saved, scalars, grads, needs: overload(grads[0], *saved, *scalars),
)


def _apply(op: str, gate: Tensor, up: Tensor, activation: str, backend: str | None) -> Tensor:
    check_floating(op, "gate", gate)
    check_same(op, "up", up, "gate", gate)
    check_shape(op, "up", up, gate.shape)
    out: Tensor = _gated_activation(gate, up, activation, backend=backend)
    return out


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """out = silu(gate) * up, silu(z) = z / (1 + exp(-z)).

    Args:
        gate, up: one shape and dtype: float32, float16, bfloat16 (float64 on `reference` and `cpu`);
            any strides, so the two halves of one projection do.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        gate's shape and dtype, contiguous; float32 arithmetic, one rounding.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: the named backend cannot serve the call; forward-mode differentiation.

    Source: Shazeer, GLU Variants Improve Transformer (2020), equation 6.
    """
    return _apply("swiglu", gate, up, "silu", backend)


def geglu(
    gate: Tensor, up: Tensor, *, approximate: str = "none", backend: str | None = None
) -> Tensor:
    """out = gelu(gate) * up, gelu(z) = z Phi(z), or its tanh approximation.

    Args:
        gate, up: as in `swiglu`.
        approximate: "none" (erf) or "tanh", as in `torch.nn.functional.gelu`.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns, raises: as `swiglu`.

    Source: Shazeer, GLU Variants Improve Transformer (2020), equation 6; Hendrycks and Gimpel (2016).
    """
    if approximate not in ("none", "tanh"):
        fail("geglu", "approximate", "'none' or 'tanh'", repr(approximate))
    return _apply("geglu", gate, up, "gelu" if approximate == "none" else "gelu_tanh", backend)
