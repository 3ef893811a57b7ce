"""What only the CUDA kernels of lora_linear have, on the host executor: tiles, decoded weights, masks.

A block of the large products makes 128 x 128 of a result from 64 terms (float32: 32) at a time, one of the
products with the rank 64 x 64 (float32: 64 x 32).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from warploom._library import OPS
from warploom.ops import _lora_ops  # noqa: F401 - defines the operators
from warploom.reference import lora as reference
from warploom.reference.dropout import keep_mask
from warploom.reference.quantization import quantize

from tests.backends import every_dtype
from tests.conftest import HAS_GPU
from tests.numerics import FORWARD, GRADIENT, assert_within, inside_larger

pytestmark = pytest.mark.skipif(HAS_GPU, reason="the general tests run the kernels on a GPU")

SEED = 1234567890123
GRADIENTS = ("x", "weight", "bias", "lora_a", "lora_b", "column_scale", "shrunk")


@pytest.fixture(params=["simt", "simt_instrumented"])
def backend(request):
    return request.param


@pytest.fixture
def executor(backend):
    module = importlib.import_module(f"warploom._{backend}")
    yield module
    module.reset()


def operator(name: str, backend: str) -> Any:
    return OPS[name].overloads[backend]


@dataclass(frozen=True)
class Case:
    """x [rows, in_features] -> [rows, out_features] with an adapter of `rank`; quantised in blocks."""

    rows: int
    in_features: int
    out_features: int
    rank: int
    format: str = "dense"
    block: int = 0
    dropout_p: float = 0.0
    scaled: bool = False
    misaligned: bool = False

    def arguments(self, dtype: torch.dtype) -> list[Any]:
        """All arguments of lora_linear, column_scale and bias where the case is `scaled`."""

        def make(*shape: int) -> Tensor:
            tensor = torch.randn(shape).to(dtype)
            return inside_larger(tensor) if self.misaligned and len(shape) == 2 else tensor

        weight, scale = make(self.out_features, self.in_features), None
        if self.format != "dense":
            weight, scale = quantize(weight.contiguous(), self.format, self.block)
            weight = weight.view(torch.uint8)
        seed = torch.tensor([SEED]) if self.dropout_p else None
        column_scale = torch.rand(self.out_features) + 0.5 if self.scaled else None
        bias = make(self.out_features) if self.scaled else None
        x = make(self.rows, self.in_features)
        lora_a, lora_b = make(self.rank, self.in_features), make(self.out_features, self.rank)
        factors = (bias, lora_a, lora_b, column_scale, None, seed)
        return [x, weight, scale, *factors, self.format, 0.5, self.dropout_p]

    def grad_out(self, dtype: torch.dtype) -> Tensor:
        grad = torch.randn(self.rows, self.out_features).to(dtype)
        return inside_larger(grad) if self.misaligned else grad

    @property
    def needs(self) -> list[bool]:
        """All gradients but the weight's and the bias', which are PyTorch's."""
        return [True, False, False, True, True, self.scaled, True]


def both_ways(
    forward: Any, backward: Any, arguments: list[Any], grad_out: Tensor, needs: list[bool]
) -> dict[str, Tensor]:
    """The outputs of lora_linear and those gradients that are needed, by name."""
    out, shrunk, unscaled = forward(*arguments)
    x, weight, scale, _, lora_a, lora_b, column_scale, _, seed, *rest = arguments
    saved = (x, weight, scale, lora_a, lora_b, column_scale, shrunk, seed, unscaled)
    grads = backward(grad_out, *saved, *rest, *needs)
    named = {"out": out, "shrunk": shrunk, "unscaled": unscaled}
    return named | {
        f"gradient of {name}": grad for name, grad, asked in zip(GRADIENTS, grads, needs) if asked
    }


def ours(backend: str, *call: Any) -> dict[str, Tensor]:
    operators = (operator("lora_linear", backend), operator("lora_linear_backward", backend))
    return both_ways(*operators, *call)


def check(case: Case, backend: str, dtype: torch.dtype) -> None:
    """Against the reference in float64; the yardstick is its error in the dtype."""
    call = (case.arguments(dtype), case.grad_out(dtype), case.needs)
    arguments, grad_out, needs = call
    wide = [
        value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in arguments
    ]
    wide[2] = arguments[2]  # weight_scale is float32 always
    formulas = (reference.lora_linear, reference.lora_linear_backward)
    exact = both_ways(*formulas, wide, grad_out.double(), needs)
    plain = both_ways(*formulas, *call)
    for name, got in ours(backend, *call).items():
        factor = GRADIENT if name.startswith("gradient") else FORWARD
        assert_within(got, exact[name], plain[name], factor=factor, what=name)


EDGES = {
    "one row, rank 1": Case(1, 8, 8, 1),
    "one short of every tile": Case(127, 63, 127, 63, scaled=True),
    "whole tiles": Case(128, 64, 128, 64),
    "one more than every tile": Case(129, 65, 129, 65, scaled=True),
    "more steps than stages": Case(3, 450, 24, 130),
    "steps of the update alone": Case(5, 0, 24, 16),
    "no rank": Case(5, 72, 24, 0),
    "addresses that no vector fits": Case(66, 72, 40, 16, misaligned=True, scaled=True),
}


@every_dtype
@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES)
def test_edges_of_tiles(backend, dtype, case):
    if dtype == torch.float16 and case.rows > 100:
        pytest.skip("bfloat16's kernels have the same tiles")
    check(case, backend, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("format", ["nf4", "int8", "fp8_e4m3"])
@pytest.mark.parametrize(
    ("in_features", "block"),
    [(192, 64), (256, 8), (70, 10), (66, 2)],
    ids=["a chunk has one scale", "a scale each chunk", "scales change within chunks", "of two"],
)
def test_quantised_weights(backend, format, dtype, in_features, block):
    """Forward along the rows of the weight, backward along its columns."""
    check(Case(5, in_features, 130, 8, format, block), backend, dtype)


def test_every_code(backend):
    """All 256 bytes of a weight, NaN of fp8 included, as the reference reads them."""
    weight = torch.arange(256, dtype=torch.uint8).view(4, 64)
    for format in ("nf4", "int8", "fp8_e4m3"):
        columns = 128 if format == "nf4" else 64
        scale = torch.rand(4, 2) + 0.5
        arguments = [torch.eye(columns), weight, scale, *[None] * 6, format, 1.0, 0.0]
        out = operator("lora_linear", backend)(*arguments)[0]
        expected = reference.lora_linear(*arguments)[0]
        bad = expected.isnan().any(0)
        assert torch.equal(out[:, ~bad], expected[:, ~bad])
        assert out[:, bad].isnan().any(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [128, 131])
def test_the_mask_element_by_element(backend, dtype, columns):
    """Identities in the place of one factor show drop() itself, over the edges of every kernel's tiles."""
    rows, seed, p = 129, torch.tensor([SEED]), 0.375
    kept = keep_mask(seed, p, 0, 1, rows, columns)[0]
    expected = kept / (1.0 - p)
    ones = torch.ones(rows, columns, dtype=dtype)
    shrunk = operator("lora_shrink", backend)(ones, torch.eye(columns, dtype=dtype), seed, p)
    assert torch.equal(shrunk, expected.to(dtype))
    grad_x, grad_a = operator("lora_shrink_backward", backend)(
        torch.eye(rows, dtype=dtype), ones, torch.ones(rows, columns), seed, p, True, True
    )
    assert torch.equal(grad_x, expected.to(dtype))
    torch.testing.assert_close(grad_a, expected.float(), rtol=1e-6, atol=0)


def test_dropout_with_an_update(backend):
    check(Case(130, 136, 72, 24, dropout_p=0.5), backend, torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 63, 130])
@pytest.mark.parametrize("columns", [7, 1032], ids=["elements", "vectors, two blocks"])
def test_gradient_of_column_scale(backend, rows, columns):
    check(Case(rows, 8, columns, 1, scaled=True), backend, torch.bfloat16)


@pytest.mark.parametrize("order", ["backward", "random"])
@pytest.mark.parametrize("policy", ["early", "random"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_order_of_lanes_and_copies_matters(executor, backend, dtype, policy, order):
    case = Case(5, 200, 130, 72, "nf4", 20, dropout_p=0.25, scaled=True)
    call = (case.arguments(dtype), case.grad_out(dtype), case.needs)
    usual = ours(backend, *call)
    executor.set_lane_order(order)
    executor.set_async_policy(policy)
    executor.set_seed(3)
    again = ours(backend, *call)
    assert all(torch.equal(usual[name], again[name]) for name in usual)


def test_patches_of_blocks_cover_every_tile(backend):
    """9 tiles of rows: one more than a patch has."""
    check(
        replace(EDGES["one row, rank 1"], rows=8 * 128 + 1, out_features=264),
        backend,
        torch.bfloat16,
    )
