"""RMSNorm and LayerNorm on every backend against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from warploom.ops.norm import layer_norm, rms_norm

from tests import plain
from tests.backends import DEVICE, ORDER_FOLLOWS_STRIDES, every_backend, every_dtype
from tests.numerics import check_against_float64, inside_larger

SHAPES = [(1, 1), (5, 7), (3, 32), (2, 33), (9, 128), (4, 1000), (2, 3, 65), (2, 4099)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(DEVICE)


@every_backend
@every_dtype
@every_shape
def test_rms_norm_and_its_gradients(backend, dtype, shape):
    check_against_float64(
        lambda x, w: rms_norm(x, w, backend=backend),
        plain.rms_norm,
        [normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype)],
    )


@every_backend
@every_dtype
@pytest.mark.parametrize(
    "shape", [(5, 7), (3, 128), (2, 3, 1000)], ids=["5x7", "3x128", "2x3x1000"]
)
def test_rms_norm_of_a_residual_sum(backend, dtype, shape):
    def fused(x, residual, weight):
        return rms_norm(x, weight, residual=residual, backend=backend)

    check_against_float64(
        fused,
        plain.add_rms_norm,
        [normal(*shape, dtype=dtype), normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype)],
    )


@every_backend
@every_dtype
@every_shape
def test_layer_norm_and_its_gradients(backend, dtype, shape):
    if shape[-1] == 1 and dtype == torch.float32:
        shape = (1, 2)  # one column has no variance: its gradient is 0 and its error has no scale
    check_against_float64(
        lambda x, w, b: layer_norm(x, w, b, backend=backend),
        plain.layer_norm,
        [normal(*shape, dtype=dtype), *(normal(shape[-1], dtype=dtype) for _ in range(2))],
    )


@every_backend
def test_float32_weight_on_a_16_bit_stream(backend):
    check_against_float64(
        lambda x, w: rms_norm(x, w, backend=backend),
        plain.rms_norm,
        [normal(6, 72, dtype=torch.bfloat16), normal(72)],
    )


@every_backend
def test_slices_of_larger_buffers(backend):
    """Unaligned addresses, row strides of no particular size, NaN all around."""
    check_against_float64(
        lambda x, w: rms_norm(x, w, backend=backend),
        plain.rms_norm,
        [inside_larger(normal(3, 5, 136, dtype=torch.bfloat16)), inside_larger(normal(136))],
    )
    check_against_float64(
        lambda x, w, b: layer_norm(x, w, b, backend=backend),
        plain.layer_norm,
        [inside_larger(normal(5, 72)), inside_larger(normal(72)), inside_larger(normal(72))],
    )


@every_backend
@pytest.mark.parametrize(
    "arrange",
    [
        pytest.param(lambda x: x.t(), id="transposed"),
        pytest.param(lambda x: x[:, ::2], id="every-other-column"),
        pytest.param(lambda x: x[:1].expand(7, -1), id="expanded"),
    ],
)
def test_any_strides(backend, arrange):
    x = arrange(normal(12, 24))
    weight = normal(x.shape[-1])
    strided = rms_norm(x, weight, backend=backend)
    dense = rms_norm(x.clone(memory_format=torch.contiguous_format), weight, backend=backend)
    if backend in ORDER_FOLLOWS_STRIDES:
        torch.testing.assert_close(strided, dense)
    else:
        assert torch.equal(strided, dense)


@every_backend
@pytest.mark.parametrize("shape", [(0, 8), (4, 0, 8)], ids=["0x8", "4x0x8"])
def test_no_rows(backend, shape):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    out = rms_norm(x, weight, backend=backend)
    assert out.shape == shape
    out.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    layer_norm(x, weight, weight, backend=backend).sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@every_backend
def test_a_bad_row_spoils_no_other(backend):
    x = normal(5, 40)
    x[1], x[3, 7] = float("inf"), float("nan")
    good = [0, 2, 4]
    for norm in (rms_norm, layer_norm):
        whole, alone = norm(x, backend=backend), norm(x[good], backend=backend)
        assert torch.equal(whole[good], alone)
        assert not torch.isfinite(whole[3]).any()


@every_backend
def test_layer_norm_of_rows_with_a_large_mean(backend):
    """The variance is that of the deviations: 1e4 +- 1 keeps its digits."""
    check_against_float64(
        lambda x, w, b: layer_norm(x, w, b, backend=backend),
        plain.layer_norm,
        [normal(3, 512) + 1e4, normal(512), normal(512)],
        gradients=False,
    )


@every_backend
def test_two_runs_agree_bit_for_bit(backend):
    x, weight = normal(37, 264, dtype=torch.bfloat16), normal(264, dtype=torch.bfloat16)

    def run():
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = rms_norm(*leaves, backend=backend)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    for first, second in zip(run(), run()):
        assert torch.equal(first, second)


def test_agrees_with_torch():
    x, weight, bias = normal(6, 48), normal(48), normal(48)
    torch.testing.assert_close(rms_norm(x, weight, eps=1e-5), F.rms_norm(x, (48,), weight, 1e-5))
    torch.testing.assert_close(layer_norm(x, weight, bias), F.layer_norm(x, (48,), weight, bias))
    torch.testing.assert_close(rms_norm(x, eps=1e-5), F.rms_norm(x, (48,), eps=1e-5))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rms_norm(torch.ones(2, 4), torch.ones(5)), ValueError,
         r"rms_norm: weight: expected shape \(4,\), got \(5,\)"),
        (lambda: rms_norm(torch.ones(2, 4, dtype=torch.int32)), TypeError,
         "rms_norm: x: expected dtype float32.*got int32"),
        (lambda: rms_norm(torch.ones(2, 4), torch.ones(4, dtype=torch.float16)), TypeError,
         "rms_norm: weight: expected dtype"),
        (lambda: rms_norm(torch.ones(())), ValueError, "rms_norm: x: expected at least 1 dimension"),
        (lambda: rms_norm(torch.ones(3, 0)), ValueError, "rms_norm: x: expected at least 1 dimension"),
        (lambda: rms_norm(torch.ones(2, 4), eps=-1.0), ValueError, "rms_norm: eps: expected"),
        (lambda: rms_norm(torch.ones(2, 4), residual=torch.ones(2, 3)), ValueError,
         "rms_norm: residual: expected shape"),
        (lambda: rms_norm(None), TypeError, "rms_norm: x: expected a tensor, got NoneType"),
        (lambda: rms_norm(torch.ones(2, 4), torch.ones(4, device="meta")), ValueError,
         "rms_norm: weight: expected x's device"),
        (lambda: rms_norm(torch.ones(2, 4), backend="fast"), ValueError, "backend: expected one of"),
        (lambda: rms_norm(torch.ones(2, 4), backend="cuda"), RuntimeError,
         r"rms_norm: backend 'cuda' cannot serve this call: .*float32\[2, 4\]"),
        (lambda: layer_norm(torch.ones(2, 4), bias=torch.ones(1)), ValueError,
         "layer_norm: bias: expected shape"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
