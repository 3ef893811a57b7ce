"""RMSNorm and SwiGLU that emit the rank-r product of their output, on every backend against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from warploom._library import OPS
from warploom.ops.lora import rms_norm_shrink, swiglu_shrink
from warploom.reference import lora as reference

from tests import plain
from tests.backends import DEVICE, ORDER_FOLLOWS_STRIDES, every_backend, every_dtype
from tests.numerics import check_against_float64, inside_larger


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


@dataclass(frozen=True)
class Form:
    """One of the functions, as one of its tensors alone, the adapter last; `row_inputs` are of x's shape."""

    ours: Callable[..., tuple[Tensor, ...]]
    exactly: Callable[..., tuple[Tensor, ...]]
    row_inputs: int
    has_weight: bool = True

    def on(self, backend: str) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *tensors: self.ours(*tensors, backend=backend)

    def tensors(self, shape: tuple[int, ...], rank: int, dtype: torch.dtype) -> list[Tensor]:
        columns = shape[-1]
        rows = [normal(*shape, dtype=dtype) for _ in range(self.row_inputs)]
        weight = [normal(columns, dtype=dtype)] if self.has_weight else []
        return [*rows, *weight, normal(rank, columns, dtype=dtype) / columns**0.5]


FORMS = {
    "rms_norm": Form(rms_norm_shrink, plain.shrinking(plain.rms_norm), 1),
    "rms_norm of a sum": Form(
        lambda x, residual, weight, lora_a, backend: rms_norm_shrink(
            x, weight, lora_a, residual, backend=backend
        ),
        plain.shrinking(plain.add_rms_norm),
        2,
    ),
    "swiglu": Form(swiglu_shrink, plain.shrinking(plain.swiglu), 2, has_weight=False),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)

#: Shape of x and rank. CUDA kernels have blocks of 16 rows, 8 warps of 16 or 32 columns, passes of 32 or 64
#: ranks; the CPU's have blocks of 16 rows, chunks of 256 columns, passes of 256 ranks, and other code for
#: fewer than 24 rows.
CASES = {
    "one row, rank 1": ((1, 40), 1),
    "rows of odd length, rank 3": ((2, 7, 37), 3),
    "a block and a row, rank 16": ((17, 64), 16),
    "a chunk and a column, rank 33": ((25, 257), 33),
    "many ranks": ((31, 24), 72),
}
every_case = pytest.mark.parametrize(("shape", "rank"), CASES.values(), ids=CASES)


@every_backend
@every_dtype
@every_form
@every_case
def test_values_and_gradients(backend, dtype, form, shape, rank):
    check_against_float64(form.on(backend), form.exactly, form.tensors(shape, rank, dtype))


@every_backend
@every_form
def test_several_passes_over_the_ranks(backend, form):
    check_against_float64(
        form.on(backend),
        form.exactly,
        form.tensors((26, 16), 300, torch.float32),
        gradients=False,
    )


@every_backend
def test_the_statistic_is_the_norm_s(backend):
    x, residual = normal(9, 72, dtype=torch.bfloat16), normal(9, 72, dtype=torch.bfloat16)
    arguments = normal(72), normal(5, 72), 1e-6
    overload = OPS["rms_norm_shrink"].overloads[backend]
    for added in (None, residual):
        rstd = overload(x, added, *arguments)[2]
        want = reference.rms_norm_shrink(x, added, *arguments)[2]
        torch.testing.assert_close(rstd, want, rtol=1e-6, atol=0)


@every_backend
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_the_op_has_every_activation(backend, activation):
    gate, up, lora_a = normal(3, 40), normal(3, 40), normal(4, 40)
    got = OPS["gated_activation_shrink"].overloads[backend](gate, up, lora_a, activation)
    want = reference.gated_activation_shrink(gate, up, lora_a, activation)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@every_backend
@every_form
def test_float32_parameters_beside_16_bit_rows(backend, form):
    """The adapter is rounded in the product; its gradient, the weight's too, is in float32."""
    tensors = form.tensors((7, 72), 5, torch.bfloat16)
    rows, parameters = tensors[: form.row_inputs], tensors[form.row_inputs :]
    wide = [parameter.float() for parameter in parameters]
    check_against_float64(form.on(backend), form.exactly, [*rows, *wide])


@every_backend
@every_dtype
@every_form
def test_slices_of_larger_buffers(backend, dtype, form):
    """Unaligned addresses, row strides of no particular size, NaN all around."""
    tensors = form.tensors((3, 3, 72), 5, dtype)
    check_against_float64(
        form.on(backend), form.exactly, [inside_larger(tensor) for tensor in tensors]
    )


@every_backend
@every_form
@pytest.mark.parametrize(
    "arrange",
    [
        pytest.param(lambda x: x.mT.contiguous().mT, id="columns first"),
        pytest.param(lambda x: torch.stack((x, x), -1)[..., 0], id="columns apart"),
        pytest.param(lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]], id="rows apart"),
    ],
)
def test_any_strides(backend, form, arrange):
    tensors = form.tensors((7, 40), 6, torch.float32)
    strided = form.on(backend)(*(arrange(t) if t.dim() > 1 else t for t in tensors))
    for got, want in zip(strided, form.on(backend)(*tensors)):
        if backend in ORDER_FOLLOWS_STRIDES:
            torch.testing.assert_close(got, want)
        else:
            assert torch.equal(got, want)


@every_backend
@every_form
@pytest.mark.parametrize("shape", [(0, 8), (4, 0, 8)], ids=["0x8", "4x0x8"])
def test_no_rows(backend, form, shape):
    leaves = [t.requires_grad_() for t in form.tensors(shape, 3, torch.float32)]
    outputs = form.on(backend)(*leaves)
    assert [out.shape[-1] for out in outputs] == [8] * (len(outputs) - 1) + [3]
    grads = torch.autograd.grad(sum(out.sum() for out in outputs), leaves)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, leaves))


@every_backend
@every_form
def test_a_bad_row_spoils_no_other(backend, form):
    """Nor does a bad row of the adapter spoil another rank."""
    tensors = form.tensors((8, 40), 5, torch.float32)
    want = form.on(backend)(*tensors)
    tensors[0][1], tensors[0][3, 7] = float("inf"), float("nan")
    tensors[-1][2] = float("nan")
    *rows, shrunk = form.on(backend)(*tensors)
    good, ranks = [0, 2, 4, 5, 6, 7], [0, 1, 3, 4]
    for got, exact in zip(rows, want):
        assert torch.equal(got[good], exact[good])
    assert torch.equal(shrunk[good][:, ranks], want[-1][good][:, ranks])
    assert shrunk[3].isnan().all() and shrunk[:, 2].isnan().all()


@every_backend
@every_form
def test_outputs_without_a_gradient_add_nothing(backend, form):
    """The gradients of all outputs together are the sums of those of each alone."""
    leaves = [t.requires_grad_() for t in form.tensors((6, 24), 4, torch.float32)]
    outputs = form.on(backend)(*leaves)
    upstream = [torch.randn_like(out) for out in outputs]
    parts = [
        torch.autograd.grad(out, leaves, grad, retain_graph=True, materialize_grads=True)
        for out, grad in zip(outputs, upstream)
    ]
    together = torch.autograd.grad(outputs, leaves, upstream)
    for got, *alone in zip(together, *parts):
        torch.testing.assert_close(got, sum(alone), rtol=1e-5, atol=1e-5)


@every_backend
@every_dtype
@every_form
def test_two_runs_agree_to_the_bit(backend, dtype, form):
    leaves = [t.requires_grad_() for t in form.tensors((26, 136), 9, dtype)]
    runs = []
    for _ in range(2):
        outputs = form.on(backend)(*leaves)
        grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs])
        runs.append((*outputs, *grads))
    assert all(torch.equal(first, second) for first, second in zip(*runs))


@every_backend
@every_form
def test_autocast_casts_the_product_alone(backend, form):
    tensors = form.tensors((6, 40), 4, torch.float32)
    *rows, shrunk = form.on(backend)(*tensors)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        *cast_rows, cast_shrunk = form.on(backend)(*tensors)
    assert all(torch.equal(got, want) for got, want in zip(cast_rows, rows))
    assert torch.equal(cast_shrunk, shrunk.bfloat16())


@every_form
@pytest.mark.parametrize("rows", [3, 37], ids=["few rows", "blocks of rows"])
def test_float64_on_the_cpu(form, rows):
    tensors = [tensor.cpu() for tensor in form.tensors((rows, 300), 20, torch.float64)]
    for got, want in zip(form.on("cpu")(*tensors), form.exactly(*tensors)):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_the_weight_is_ones_by_default():
    x, lora_a = normal(3, 8), normal(2, 8)
    for got, want in zip(
        rms_norm_shrink(x, None, lora_a), rms_norm_shrink(x, torch.ones_like(x[0]), lora_a)
    ):
        assert torch.equal(got, want)


ROWS, ADAPTER = torch.ones(2, 4), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rms_norm_shrink(torch.ones(()), None, ADAPTER), ValueError,
         "rms_norm_shrink: x: expected at least 1 dimension"),
        (lambda: rms_norm_shrink(ROWS.int(), None, ADAPTER), TypeError,
         "rms_norm_shrink: x: expected dtype float32.*got int32"),
        (lambda: rms_norm_shrink(ROWS, None, ADAPTER[:, 1:]), ValueError,
         r"rms_norm_shrink: lora_a: expected shape \(3, 4\), got \(3, 3\)"),
        (lambda: rms_norm_shrink(ROWS, None, ADAPTER[:0]), ValueError,
         r"rms_norm_shrink: lora_a: expected shape \(1, 4\), got \(0, 4\)"),
        (lambda: rms_norm_shrink(ROWS, None, ADAPTER[0]), ValueError,
         r"rms_norm_shrink: lora_a: expected 2 dimensions \[R, K\]"),
        (lambda: rms_norm_shrink(ROWS, None, ADAPTER.half()), TypeError,
         "rms_norm_shrink: lora_a: expected dtype"),
        (lambda: rms_norm_shrink(ROWS, torch.ones(5), ADAPTER), ValueError,
         "rms_norm_shrink: weight: expected shape"),
        (lambda: rms_norm_shrink(ROWS, None, ADAPTER, eps=-1.0), ValueError,
         "rms_norm_shrink: eps: expected"),
        (lambda: rms_norm_shrink(ROWS, None, ADAPTER, ROWS[:1]), ValueError,
         "rms_norm_shrink: residual: expected shape"),
        (lambda: rms_norm_shrink(ROWS, None, ADAPTER.to("meta")), ValueError,
         "rms_norm_shrink: lora_a: expected x's device"),
        (lambda: swiglu_shrink(ROWS, ROWS.half(), ADAPTER), TypeError,
         "swiglu_shrink: up: expected gate's dtype"),
        (lambda: swiglu_shrink(ROWS, ROWS[:, 1:], ADAPTER), ValueError,
         "swiglu_shrink: up: expected shape"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
