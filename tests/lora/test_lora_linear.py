"""A linear map with a low-rank update on every backend, against the formulas in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from warploom.ops.lora import (
    QuantizedWeight,
    lora_linear,
    lora_shrink,
    lora_weight_norm,
    weight_squares,
)
from warploom.reference.dropout import keep_mask

from tests import plain
from tests.backends import DEVICE, every_backend, every_dtype
from tests.numerics import check_against_float64, inside_larger

SCALING = 1.7


@dataclass(frozen=True)
class Case:
    rows: int
    in_features: int
    out_features: int
    rank: int

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """x, weight, bias, lora_a and lora_b, such that base and update are of one size."""
        shapes = [
            (self.rows, self.in_features),
            (self.out_features, self.in_features),
            (self.out_features, 1),
            (self.rank, self.in_features),
            (self.out_features, self.rank),
        ]
        x, weight, bias, lora_a, lora_b = (
            (torch.randn(shape) * shape[1] ** -0.5).to(DEVICE, dtype) for shape in shapes
        )
        return [x * self.in_features**0.5, weight, bias[:, 0], lora_a, lora_b]

    def keep(self, seed: Tensor, dropout_p: float) -> Tensor:
        return keep_mask(seed, dropout_p, 0, 1, self.rows, self.in_features)[0]


#: Kernels have tiles of 64 rows or 128 columns; a CPU's of ranks are 4 and 64.
CASES = {
    "one row, rank 1": Case(1, 40, 24, 1),
    "odd features, rank 3": Case(5, 33, 7, 3),
    "4-byte units, rank 7": Case(9, 34, 22, 7),
    "more than a tile, rank 16": Case(67, 136, 40, 16),
    "wide, rank 33": Case(3, 24, 136, 33),
    "no rows": Case(0, 16, 8, 4),
}
SMALL = Case(6, 32, 24, 4)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def ours(backend: str, **options: Any) -> Callable[..., Tensor]:
    return functools.partial(lora_linear, scaling=SCALING, backend=backend, **options)


exactly = functools.partial(plain.lora_linear, scaling=SCALING)


def seed_of(number: int) -> Tensor:
    return torch.tensor([number], dtype=torch.int64, device=DEVICE)


def gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of those tensors that require one."""
    out = function(*tensors)
    grad_out = torch.arange(out.numel(), device=DEVICE).view(out.shape).cos().to(out.dtype)
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    return [out, *torch.autograd.grad(out, leaves, grad_out)]


@every_backend
@every_case
def test_values_and_gradients(backend, case):
    check_against_float64(ours(backend), exactly, case.tensors())


@every_backend
@every_dtype
def test_every_dtype(backend, dtype):
    check_against_float64(ours(backend), exactly, SMALL.tensors(dtype))


@pytest.mark.skipif(DEVICE != "cpu", reason="the tiles of the CPU kernels")
@every_dtype
def test_more_ranks_than_the_sums_of_a_cpu_kernel(dtype):
    check_against_float64(ours("cpu"), exactly, Case(37, 264, 200, 256).tensors(dtype))


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU's choice of a product")
@pytest.mark.parametrize("rank", [63, 64])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_ranks_around_those_of_the_blas(rank, dropout_p):
    """Both ways to the same, and dropout, which the BLAS would need a second x for, at either rank."""
    case, seed = Case(37, 70, 50, rank), seed_of(9)
    options = {"dropout_p": dropout_p}
    expected = functools.partial(exactly, keep=case.keep(seed, dropout_p), **options)
    tensors = case.tensors()
    check_against_float64(ours("cpu", seed=seed, **options), expected, tensors)
    column_scale = [*tensors, torch.rand(case.out_features) + 0.5]
    plainly = functools.partial(plain.dora_linear, scaling=SCALING)
    check_against_float64(dora("cpu"), plainly, column_scale)
    apart = [inside_larger(tensor) for tensor in tensors]
    check_against_float64(ours("cpu"), exactly, apart)


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU's choice of a product")
def test_the_blas_takes_many_ranks_in_the_input_s_own_type():
    """Of 64 ranks in float32 x A^T is one more product of PyTorch's, in bfloat16 it is not."""
    counts = {}
    for rank, dtype in ((63, torch.float32), (64, torch.float32), (64, torch.bfloat16)):
        tensors = [tensor.requires_grad_() for tensor in Case(8, 24, 16, rank).tensors(dtype)]
        with torch.profiler.profile() as profile:
            ours("cpu")(*tensors).sum().backward()
        counts[rank, dtype] = sum(event.name == "aten::mm" for event in profile.events())
    base, many = counts[63, torch.float32], counts[64, torch.float32]
    assert many == base + 1 and counts[64, torch.bfloat16] == base


@every_backend
def test_float32_adapters_beside_a_bfloat16_base(backend):
    x, weight, bias, lora_a, lora_b = SMALL.tensors(torch.bfloat16)
    tensors = [x, weight, bias, lora_a.float(), lora_b.float()]
    check_against_float64(ours(backend), exactly, tensors)


@every_backend
def test_slices_of_larger_buffers(backend):
    """Rows a stride apart that no vector fits, NaN around them."""
    tensors = [inside_larger(tensor) for tensor in Case(5, 33, 7, 3).tensors()]
    check_against_float64(ours(backend), exactly, tensors)


@every_backend
def test_batches_and_columns_apart(backend):
    x, *rest = SMALL.tensors()
    batches = torch.stack((x, x + 1))
    check_against_float64(ours(backend), exactly, [batches, *rest])
    apart = torch.stack((x, x), dim=-1)[..., 0]
    check_against_float64(ours(backend), exactly, [apart, *rest], gradients=False)


@every_backend
@pytest.mark.parametrize("scaling", [0.0, -0.5])
def test_scaling(backend, scaling):
    function = functools.partial(lora_linear, scaling=scaling, backend=backend)
    expected = functools.partial(plain.lora_linear, scaling=scaling)
    check_against_float64(function, expected, SMALL.tensors())


@every_backend
def test_without_an_update_it_is_a_linear_map(backend):
    x, weight, bias, _, _ = SMALL.tensors()
    check_against_float64(
        lambda x, weight, bias: lora_linear(x, weight, bias, None, None, 1.0, backend=backend),
        lambda x, weight, bias: x @ weight.mT + bias,
        [x, weight, bias],
    )


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_dropout_is_the_reference_s_in_both_directions(backend, dtype):
    case, seed = Case(5, 33, 24, 4), seed_of(2**40 + 3)
    check_against_float64(
        ours(backend, dropout_p=0.4, seed=seed),
        functools.partial(exactly, keep=case.keep(seed, 0.4), dropout_p=0.4),
        case.tensors(dtype),
    )


@every_backend
def test_dropout_is_drawn_anew(backend):
    tensors = SMALL.tensors()
    torch.manual_seed(3)
    first, second = (ours(backend, dropout_p=0.5)(*tensors) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, ours(backend, dropout_p=0.5)(*tensors))
    assert not torch.equal(first, second)


@every_backend
def test_torch_s_own_dropout(backend):
    tensors = SMALL.tensors()

    def function(*tensors: Tensor) -> Tensor:
        torch.manual_seed(11)
        return ours(backend, dropout_p=0.4, dropout_rng="torch")(*tensors)

    torch.manual_seed(11)
    keep = F.dropout(torch.ones_like(tensors[0]), 0.4) != 0
    expected = functools.partial(exactly, keep=keep, dropout_p=0.4)
    check_against_float64(function, expected, tensors)


def dora(backend: str, **options: Any) -> Callable[..., Tensor]:
    def function(*tensors: Tensor) -> Tensor:
        *others, magnitude = tensors
        return ours(backend, magnitude=magnitude, **options)(*others)

    return function


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_dora(backend, dtype):
    tensors = [*SMALL.tensors(dtype), (torch.rand(SMALL.out_features) + 0.5).to(DEVICE, dtype)]
    check_against_float64(
        dora(backend), functools.partial(plain.dora_linear, scaling=SCALING), tensors
    )


@every_backend
def test_dora_with_dropout(backend):
    tensors = [*SMALL.tensors(), torch.rand(SMALL.out_features, device=DEVICE) + 0.5]
    seed = seed_of(5)
    expected = functools.partial(
        plain.dora_linear, scaling=SCALING, keep=SMALL.keep(seed, 0.3), dropout_p=0.3
    )
    check_against_float64(dora(backend, dropout_p=0.3, seed=seed), expected, tensors)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_the_row_norms_of_dora(quantized):
    _, weight, _, lora_a, lora_b = Case(1, 128, 24, 4).tensors()
    stored = QuantizedWeight.quantize(weight, "nf4") if quantized else weight
    made = stored.dequantize() if isinstance(stored, QuantizedWeight) else weight
    exact = (made.double() + SCALING * lora_b.double() @ lora_a.double()).norm(dim=1)
    got = lora_weight_norm(stored, lora_a, lora_b, SCALING)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)
    cached = lora_weight_norm(stored, lora_a, lora_b, SCALING, squares=weight_squares(stored))
    assert torch.equal(cached, got)


@every_backend
def test_one_shrink_of_two_updates(backend):
    """Two linear maps of one input share its product with their lora_a, stacked; each has its slice."""
    x, weight, bias, lora_a, lora_b = SMALL.tensors()
    other_a, other_b = lora_a.flip(0) + 0.1, lora_b - 0.2

    def shared(x: Tensor, *adapters: Tensor) -> tuple[Tensor, Tensor]:
        first_a, first_b, second_a, second_b = adapters
        shrunk = lora_shrink(x, torch.cat((first_a, second_a)), backend=backend)
        return tuple(
            ours(backend, shrunk=part)(x, weight, bias, None, b)
            for part, b in zip(shrunk.split(SMALL.rank, -1), (first_b, second_b))
        )

    def alone(x: Tensor, *adapters: Tensor) -> tuple[Tensor, Tensor]:
        first, second = adapters[:2], adapters[2:]
        base = weight.to(x.dtype), bias.to(x.dtype)
        return exactly(x, *base, *first), exactly(x, *base, *second)

    check_against_float64(shared, alone, [x, lora_a, lora_b, other_a, other_b])


@every_backend
def test_shrink_with_dropout(backend):
    case, seed = Case(5, 33, 24, 3), seed_of(77)
    x, _, _, lora_a, _ = case.tensors()
    check_against_float64(
        functools.partial(lora_shrink, dropout_p=0.4, seed=seed, backend=backend),
        lambda x, lora_a: plain.dropped(x, case.keep(seed, 0.4), 0.4) @ lora_a.mT,
        [x, lora_a],
    )


@every_backend
@pytest.mark.parametrize("weight_format", ["nf4", "int8", "fp8_e4m3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_quantized_weights(backend, weight_format, dtype):
    """The product reads the weight in x's dtype."""
    case = Case(6, 48, 24, 4)
    x, weight, *rest = case.tensors(dtype)
    stored = QuantizedWeight.quantize(weight, weight_format, block_size=16)
    made = stored.dequantize(dtype)
    check_against_float64(
        lambda x, *rest: ours(backend)(x, stored, *rest),
        lambda x, *rest: exactly(x, made.to(x.dtype), *rest),
        [x, *rest],
    )


@pytest.mark.skipif(DEVICE != "cpu", reason="the blocks of the CPU's products")
@every_dtype
def test_a_quantized_weight_in_several_blocks(dtype):
    case = Case(3, 2048, 1088, 2)
    x, weight, *rest = case.tensors(dtype)
    stored = QuantizedWeight.quantize(weight, "nf4")
    made = stored.dequantize(dtype)
    check_against_float64(
        lambda x, *rest: ours("cpu")(x, stored, *rest),
        lambda x, *rest: exactly(x, made.to(x.dtype), *rest),
        [x, *rest],
    )


@every_backend
@pytest.mark.parametrize(
    "wanted", [{0}, {3}, {4}, {2, 3, 4}], ids=["x", "lora_a", "lora_b", "all but x and weight"]
)
def test_only_the_gradients_asked_for(backend, wanted):
    """As with a frozen base, or LoRA-FA's frozen lora_a (arXiv:2308.03303)."""
    function = ours(backend, dropout_p=0.3, seed=seed_of(1))
    tensors = SMALL.tensors()
    together = gradients(function, [tensor.detach().requires_grad_() for tensor in tensors])[1:]
    some = [tensor.detach().requires_grad_(i in wanted) for i, tensor in enumerate(tensors)]
    for got, index in zip(gradients(function, some)[1:], sorted(wanted)):
        assert torch.equal(got, together[index])


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_two_runs_agree_to_the_bit(backend, dtype):
    tensors = [tensor.requires_grad_() for tensor in Case(67, 40, 24, 3).tensors(dtype)]
    magnitude = torch.rand(24, device=DEVICE).requires_grad_()
    function = dora(backend, dropout_p=0.3, seed=seed_of(9))
    runs = [gradients(function, [*tensors, magnitude]) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs))


@every_backend
def test_autocast_leaves_adapters_in_float32(backend):
    tensors = [tensor.requires_grad_() for tensor in SMALL.tensors()]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out, *grads = gradients(ours(backend), tensors)
    x, weight, bias, lora_a, lora_b = tensors
    cast = [x.bfloat16(), weight.bfloat16(), bias.bfloat16(), lora_a, lora_b]
    assert out.dtype == torch.bfloat16
    # The reference is made of PyTorch's products, which autocast casts once more.
    tolerance = 0.05 if backend == "reference" else 0.0
    torch.testing.assert_close(out, ours(backend)(*cast), rtol=tolerance, atol=tolerance)
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize("with_magnitude", [False, True], ids=["LoRA", "DoRA"])
def test_compiles_with_dropout(with_magnitude):
    torch.compiler.reset()
    function = functools.partial(lora_linear, scaling=SCALING, dropout_p=0.3, seed=seed_of(4))
    if with_magnitude:
        function = functools.partial(function, magnitude=torch.ones(24, device=DEVICE))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    tensors = [tensor.requires_grad_() for tensor in SMALL.tensors()]
    for got, want in zip(gradients(compiled, tensors), gradients(function, tensors)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dropout_rng", ["philox", "torch"])
def test_checkpointing_draws_the_mask_again(dropout_rng):
    def function(*tensors: Tensor) -> Tensor:
        torch.manual_seed(8)
        return again(*tensors)

    layer = functools.partial(lora_linear, scaling=SCALING, dropout_p=0.4, dropout_rng=dropout_rng)
    tensors = [tensor.requires_grad_() for tensor in SMALL.tensors()]
    again: Callable[..., Tensor] = layer
    expected = gradients(function, tensors)
    again = functools.partial(checkpoint, layer, use_reentrant=False)
    assert all(torch.equal(got, want) for got, want in zip(gradients(function, tensors), expected))


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is the CPU's")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_float64_is_exact_and_passes_gradcheck(backend):
    case, seed = Case(5, 33, 7, 3), seed_of(6)
    magnitude = torch.rand(case.out_features, dtype=torch.float64) + 0.5
    tensors = [tensor.requires_grad_() for tensor in (*case.tensors(torch.float64), magnitude)]
    function = dora(backend, dropout_p=0.3, seed=seed)
    exact = plain.dora_linear(*tensors, SCALING, case.keep(seed, 0.3), 0.3)
    torch.testing.assert_close(function(*tensors), exact, rtol=1e-13, atol=1e-13)
    plainly = ours(backend, dropout_p=0.3, seed=seed)
    assert torch.autograd.gradcheck(plainly, tensors[:5])


def test_errors_name_the_argument():
    x, weight, bias, lora_a, lora_b = SMALL.tensors()
    with pytest.raises(ValueError, match="lora_linear: x: expected shape"):
        lora_linear(x[:, 1:], weight, bias, lora_a, lora_b, 1.0)
    with pytest.raises(ValueError, match="lora_linear: lora_a: expected shape"):
        lora_linear(x, weight, bias, lora_a[1:], lora_b, 1.0)
    with pytest.raises(ValueError, match="lora_linear: lora_a: expected either"):
        lora_linear(x, weight, bias, None, lora_b, 1.0)
    with pytest.raises(ValueError, match="lora_linear: lora_b: expected a matrix"):
        lora_linear(x, weight, bias, lora_a, None, 1.0)
    with pytest.raises(TypeError, match="lora_linear: lora_b: expected dtype"):
        lora_linear(x, weight, bias, lora_a, lora_b.half(), 1.0)
    with pytest.raises(ValueError, match="lora_linear: dropout_p: expected"):
        lora_linear(x, weight, bias, lora_a, lora_b, 1.0, dropout_p=1.0)
    with pytest.raises(ValueError, match="lora_linear: dropout_rng: expected"):
        lora_linear(x, weight, bias, lora_a, lora_b, 1.0, dropout_rng="numpy")
    with pytest.raises(ValueError, match="QuantizedWeight.quantize: block_size: expected"):
        QuantizedWeight.quantize(weight, "nf4", 3)
