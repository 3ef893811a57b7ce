"""What holds for every op alike: schemas, fakes, compilation, derivatives, refusals."""

from __future__ import annotations

import pytest
import torch
import warploom
from torch.func import grad, vmap
from warploom import _backends
from warploom._library import OPS

from tests.backends import BACKENDS, DEVICE
from tests.samples import OP_ARGS, PUBLIC

every_function = pytest.mark.parametrize("name", PUBLIC)
OVERLOADS = [
    (name, backend) for name in OP_ARGS for backend in BACKENDS if backend in OPS[name].overloads
]


def make(dtype):
    return lambda *shape: torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def leaves(name, dtype=torch.float32):
    return [make(dtype)(*shape).requires_grad_() for shape in PUBLIC[name][1]]


def total(outputs):
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum(
        (out * out * torch.arange(out.numel(), device=out.device).view(out.shape).cos()).sum()
        for out in outputs
    )


def test_every_op_has_a_sample():
    assert set(OP_ARGS) == set(OPS)


@pytest.mark.parametrize(("name", "backend"), OVERLOADS, ids=lambda value: value)
def test_opcheck(name, backend):
    assert not _backends.unavailable(backend, DEVICE)  # loads the module that implements it
    overload = OPS[name].overloads[backend]
    for dtype in (torch.float32, torch.bfloat16):
        args = OP_ARGS[name](make(dtype))
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if backend in ("reference", "cpu", "cuda"):
            tests.append("test_aot_dispatch_dynamic")
        result = torch.library.opcheck(overload, args, test_utils=tests)
        assert set(result.values()) == {"SUCCESS"}


@every_function
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("reference", "cpu")])
def test_gradcheck_in_float64(name, backend):
    function = PUBLIC[name][0]
    assert torch.autograd.gradcheck(
        lambda *tensors: function(*tensors, backend=backend), leaves(name, torch.float64)
    )


@every_function
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_compiles_into_one_graph(name, training):
    torch.compiler.reset()
    function = PUBLIC[name][0]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    tensors = leaves(name)
    if not training:
        tensors = [tensor.detach() for tensor in tensors]
    eager, traced = total(function(*tensors)), total(compiled(*tensors))
    torch.testing.assert_close(traced, eager)
    if training:
        for got, want in zip(
            torch.autograd.grad(traced, tensors), torch.autograd.grad(eager, tensors)
        ):
            torch.testing.assert_close(got, want)


def test_use_backend_compiles_into_one_graph():
    torch.compiler.reset()
    with warploom.use_backend("reference"):
        compiled = torch.compile(PUBLIC["rms_norm"][0], fullgraph=True, backend="aot_eager")
        x, weight = leaves("rms_norm")
        torch.testing.assert_close(compiled(x, weight), PUBLIC["rms_norm"][0](x, weight))


def test_one_tensor_in_two_places_compiles():
    torch.compiler.reset()
    compiled = torch.compile(PUBLIC["swiglu"][0], fullgraph=True, backend="aot_eager")
    x = make(torch.float32)(3, 8).requires_grad_()
    torch.testing.assert_close(compiled(x, x), PUBLIC["swiglu"][0](x, x))


@every_function
def test_functorch_gradients(name):
    function, tensors = PUBLIC[name][0], leaves(name)
    expected = torch.autograd.grad(total(function(*tensors)), tensors[0])[0]
    detached = [tensor.detach() for tensor in tensors]
    got = grad(lambda first: total(function(first, *detached[1:])))(detached[0])
    torch.testing.assert_close(got, expected)


@every_function
def test_vmap_of_gradients(name):
    """Per-sample gradients, the usual reason to combine the two."""
    function = PUBLIC[name][0]
    first, *rest = (tensor.detach() for tensor in leaves(name))
    batch = torch.stack([first, first + 1])
    per_sample = vmap(grad(lambda x: total(function(x, *rest))))(batch)
    alone = torch.stack([grad(lambda x: total(function(x, *rest)))(x) for x in batch])
    torch.testing.assert_close(per_sample, alone)


@every_function
def test_forward_mode_is_refused(name):
    function = PUBLIC[name][0]
    tensors = tuple(tensor.detach() for tensor in leaves(name))
    with pytest.raises(
        RuntimeError, match=r"forward-mode differentiation \(jvp\) is not supported"
    ):
        torch.func.jvp(lambda *args: total(function(*args)), tensors, tensors)


@every_function
def test_double_backward_is_refused(name):
    tensors = leaves(name)
    gradient = torch.autograd.grad(total(PUBLIC[name][0](*tensors)), tensors[0], create_graph=True)[
        0
    ]
    # Beside another term too: a gradient without a history would be dropped without a word.
    for loss in (gradient.sum(), gradient.sum() + tensors[0].sum()):
        with pytest.raises(RuntimeError, match="differentiated once only"):
            loss.backward()


@every_function
def test_nested_functorch_gradients_are_refused(name):
    function, tensors = PUBLIC[name][0], [tensor.detach() for tensor in leaves(name)]

    def slope(first):
        return grad(lambda x: total(function(x, *tensors[1:])))(first).sum()

    with pytest.raises(RuntimeError, match="differentiated once only"):
        grad(slope)(tensors[0])


@every_function
def test_each_input_alone_may_need_a_gradient(name):
    function, tensors = PUBLIC[name][0], leaves(name)
    together = torch.autograd.grad(total(function(*tensors)), tensors)
    for index, want in enumerate(together):
        alone = [tensor.detach() for tensor in tensors]
        alone[index].requires_grad_()
        torch.testing.assert_close(
            torch.autograd.grad(total(function(*alone)), alone[index])[0], want
        )


@every_function
def test_gradients_of_an_expanded_upstream(name):
    """`.sum()` sends back a gradient whose strides are all 0."""
    tensors = leaves(name)
    outputs = PUBLIC[name][0](*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    dense = torch.autograd.grad(
        outputs, tensors, [torch.ones_like(out) for out in outputs], retain_graph=True
    )
    expanded = torch.autograd.grad(sum(out.sum() for out in outputs), tensors)
    for got, want in zip(expanded, dense):
        torch.testing.assert_close(got, want)


@every_function
def test_meta_tensors_carry_shapes(name):
    tensors = [tensor.detach() for tensor in leaves(name)]
    real = PUBLIC[name][0](*tensors)
    meta = PUBLIC[name][0](*(tensor.to("meta") for tensor in tensors))
    pairs = zip(real, meta) if isinstance(real, tuple) else [(real, meta)]
    for want, got in pairs:
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


def test_explain_says_who_serves_and_why_not_the_others():
    text = warploom.explain("rms_norm", torch.ones(2, 4), torch.ones(4), 1e-6)
    first, *rest = text.splitlines()
    assert first.endswith("-> cpu") or first.endswith("-> cuda")
    assert any("reference: can serve" in line for line in rest)
    assert len(rest) == len(warploom.BACKENDS)


def test_explain_names_the_ops_it_knows():
    with pytest.raises(ValueError, match="explain: op: expected one of .*rms_norm"):
        warploom.explain("softmax", torch.ones(2))


def test_unknown_backend_is_refused():
    with (
        pytest.raises(ValueError, match="backend: expected one of cuda"),
        warploom.use_backend("gpu"),
    ):
        pass
