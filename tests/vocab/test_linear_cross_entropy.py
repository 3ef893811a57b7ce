"""Linear cross-entropy in chunks on every backend, against all logits in float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from warploom.nn import LinearCrossEntropy
from warploom.ops import _cross_entropy_blocks, vocab
from warploom.ops.vocab import linear_cross_entropy

from tests import plain
from tests.backends import BACKENDS, DEVICE, SLOW_BACKENDS, every_backend, every_dtype
from tests.numerics import check_against_float64, inside_larger

REDUCTIONS = ("mean", "sum", "none")
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@dataclass(frozen=True)
class Case:
    """`rows` tokens, of which `ignored` are; bias and an adapter of rank 3 where asked for."""

    rows: int = 10
    classes: int = 101
    features: int = 24
    ignored: tuple[int, ...] = ()
    bias: bool = False
    lora: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def targets(self):
        targets = torch.randint(self.classes, (self.rows,), device=DEVICE)
        targets[list(self.ignored)] = self.options.get("ignore_index", -100)
        return targets

    def tensors(self, dtype):
        shapes = [(self.rows, self.features), (self.classes, self.features)]
        shapes += [(self.classes,)] * self.bias
        shapes += [(3, self.features), (self.classes, 3)] * self.lora
        scales = [1.0, self.features**-0.5, 1.0, self.features**-0.5, 1.0]
        tensors = [torch.randn(*shape) * scale for shape, scale in zip(shapes, scales)]
        return [tensor.to(DEVICE, dtype) for tensor in tensors]

    def bind(self, function, targets, **options):
        def bound(hidden, weight, *rest):
            arguments = {**self.options, **options}
            if self.bias:
                arguments["bias"], *rest = rest
            if self.lora:
                arguments["lora"] = (*rest, 0.5)
            return function(hidden, weight, targets, **arguments)

        return bound

    def check(self, backend, dtype=torch.float32, reduction="mean", gradients=True):
        targets = self.targets()
        check_against_float64(
            self.bind(linear_cross_entropy, targets, reduction=reduction, backend=backend),
            self.bind(plain.linear_cross_entropy, targets, reduction=reduction),
            self.tensors(dtype),
            gradients=gradients,
        )


CASES = {
    "plain": Case(),
    "one token": Case(rows=1),
    "some tokens are ignored": Case(ignored=(0, 3, 4, 9)),
    "another ignore_index": Case(ignored=(2,), options={"ignore_index": 7}),
    "smoothed": Case(options={"label_smoothing": 0.1}),
    "z-loss": Case(options={"z_loss": 0.02}),
    "soft-cap": Case(options={"softcap": 3.0}),
    "bias": Case(bias=True),
    "adapter": Case(lora=True),
    "everything": Case(
        ignored=(1, 8),
        bias=True,
        lora=True,
        options={"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 4.0},
    ),
    "one class": Case(classes=1),
    "1000 classes": Case(rows=3, classes=1000),
    "1003 classes": Case(rows=3, classes=1003, bias=True),
}


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(vocab, "_chunk_rows", lambda hidden, *_: min(4, len(hidden)))
    monkeypatch.setattr(
        _cross_entropy_blocks,
        "_block_size",
        lambda hidden, classes: (min(4, len(hidden)), min(40, classes)),
    )


@every_backend
@every_dtype
@every_reduction
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("small_chunks")
def test_values_and_gradients(backend, dtype, reduction, case):
    if case.lora and backend in SLOW_BACKENDS and reduction != "mean":
        pytest.skip("the adapter's part is PyTorch's on every backend")
    case.check(backend, dtype, reduction)


@pytest.mark.parametrize("backend", ["cpu", "reference"] if DEVICE == "cpu" else BACKENDS)
@every_dtype
@every_reduction
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("small_chunks")
def test_a_frozen_head(backend, dtype, reduction, case):
    """Values, and the gradients of hidden and of an adapter's lora_a, in blocks of classes too."""
    targets = case.targets()
    tensors = case.tensors(dtype)
    trained = [0] + [len(tensors) - 2] * case.lora

    def freeze(function, **options):
        bound = case.bind(function, targets, reduction=reduction, **options)

        def frozen(*leaves):
            arguments = [tensor.to(leaves[0].dtype) for tensor in tensors]
            for index, leaf in zip(trained, leaves):
                arguments[index] = leaf
            return bound(*arguments)

        return frozen

    check_against_float64(
        freeze(linear_cross_entropy, backend=backend),
        freeze(plain.linear_cross_entropy),
        [tensors[index] for index in trained],
    )


@every_dtype
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.usefixtures("small_chunks")
def test_gradients_of_confident_tokens(dtype, trained):
    """Where a token is all but certain, its small gradient does not drown in what the target's row rounds
    off."""
    case = Case(rows=6, features=32)
    _, weight = case.tensors(torch.float32)
    targets = case.targets()
    hidden = (9.0 * weight[targets]).to(dtype)
    weight = weight.to(dtype)
    grads = []
    for function, of in ((plain.linear_cross_entropy, torch.double), (linear_cross_entropy, dtype)):
        leaf = hidden.to(of).requires_grad_()
        matrix = weight.to(of).requires_grad_(trained)
        loss = function(leaf, matrix, targets, reduction="sum")
        grads.append(torch.autograd.grad(loss, leaf)[0].double())
    exact, got = grads
    assert exact.abs().max() < 0.2
    # A logit near 9 is rounded, and in float32 1 - p near 0.
    tolerance = 16 * torch.finfo(dtype).eps + 1e-5
    assert (got - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("wanted", range(5), ids=["hidden", "weight", "bias", "lora_a", "lora_b"])
@every_backend
@every_reduction
@pytest.mark.usefixtures("small_chunks")
def test_only_one_gradient_is_asked_for(backend, reduction, wanted):
    """Of a frozen head, of its adapter alone: the same as beside the others."""
    case, targets = CASES["everything"], CASES["everything"].targets()
    if case.lora and backend in SLOW_BACKENDS and reduction == "sum":
        pytest.skip("as mean")
    function = case.bind(linear_cross_entropy, targets, reduction=reduction, backend=backend)
    tensors = case.tensors(torch.float32)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    loss = function(*leaves)
    upstream = torch.randn_like(loss)
    together = torch.autograd.grad(loss, leaves, upstream)
    tensors[wanted].requires_grad_()
    (alone,) = torch.autograd.grad(function(*tensors), tensors[wanted], upstream)
    torch.testing.assert_close(alone, together[wanted])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_chunks_as_they_are_chosen(dtype):
    """More rows than a chunk has, the last one with fewer; weight with and without its gradient."""
    case = Case(rows=600, classes=2000, features=16, ignored=(0, 256, 599))
    hidden, weight = case.tensors(dtype)
    assert vocab._chunk_rows(hidden, weight, True) == 256
    case.check(None, dtype)
    case.check(None, dtype, "none")


def test_the_size_of_blocks():
    """512 rows, or all of fewer, of 512 to 1024 classes; more of few rows."""
    sizes = {
        (1, 512, 152000): (1, 32768),
        (128, 2048, 32000): (128, 512),
        (512, 512, 32000): (512, 512),
        (2048, 1024, 32000): (512, 1024),
        (2048, 1024, 700): (512, 700),
        (65536, 4096, 128000): (512, 1024),
    }
    for (rows, features, classes), expected in sizes.items():
        hidden = torch.empty(rows, features, device="meta")
        assert _cross_entropy_blocks._block_size(hidden, classes) == expected


def test_the_size_of_chunks():
    """As many logits as numbers of hidden or half of the weight's gradient, 256 rows or all at
    the least."""
    sizes = {
        (100, 64, 1000, False): 100,
        (2048, 1024, 32000, False): 256,
        (2048, 1024, 32000, True): 512,
        (65536, 4096, 128000, False): 2097,
    }
    for (rows, features, classes, needs_weight), expected in sizes.items():
        hidden = torch.empty(rows, features, device="meta")
        weight = torch.empty(classes, features, device="meta")
        assert vocab._chunk_rows(hidden, weight, needs_weight) == expected


@every_backend
@every_reduction
def test_all_tokens_are_ignored(backend, reduction):
    """The mean is NaN, as torch's; gradients are 0."""
    case = Case(rows=3, ignored=(0, 1, 2), bias=True)
    targets = case.targets()
    leaves = [tensor.requires_grad_() for tensor in case.tensors(torch.float32)]
    function = case.bind(linear_cross_entropy, targets, reduction=reduction, backend=backend)
    theirs = case.bind(plain.linear_cross_entropy, targets, reduction=reduction)(*leaves)
    loss = function(*leaves)
    assert torch.equal(loss.nan_to_num(nan=7.0), theirs.nan_to_num(nan=7.0))
    grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    assert not any(grad.any() for grad in grads)


@every_backend
@every_reduction
def test_no_tokens(backend, reduction):
    case = Case(rows=0, bias=True)
    leaves = [tensor.requires_grad_() for tensor in case.tensors(torch.float32)]
    function = case.bind(linear_cross_entropy, case.targets(), reduction=reduction, backend=backend)
    loss = function(*leaves)
    assert loss.shape == ((0,) if reduction == "none" else ())
    if reduction == "mean":
        assert torch.isnan(loss)
    grads = torch.autograd.grad(loss.sum(), leaves)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
    assert not any(grad.any() for grad in grads)


@every_reduction
def test_leading_dimensions(reduction):
    hidden, weight = torch.randn(2, 3, 8), torch.randn(11, 8)
    targets = torch.randint(11, (2, 3))
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    expected = F.cross_entropy(
        (hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction=reduction
    )
    torch.testing.assert_close(loss, expected.view(loss.shape))
    assert loss.shape == (targets.shape if reduction == "none" else ())
    one = linear_cross_entropy(hidden[0, 0], weight, targets[0, 0], reduction="none")
    assert one.shape == ()


@every_backend
@pytest.mark.usefixtures("small_chunks")
def test_slices_of_larger_buffers(backend):
    case = CASES["bias"]
    targets = case.targets()
    tensors = [inside_larger(tensor) for tensor in case.tensors(torch.bfloat16)]
    check_against_float64(
        case.bind(linear_cross_entropy, targets, backend=backend, reduction="sum"),
        case.bind(plain.linear_cross_entropy, targets, reduction="sum"),
        tensors,
    )


@every_backend
@every_dtype
@every_reduction
@pytest.mark.usefixtures("small_chunks")
def test_two_runs_agree_to_the_bit(backend, dtype, reduction):
    case = CASES["bias"]
    leaves = [tensor.requires_grad_() for tensor in case.tensors(dtype)]
    function = case.bind(linear_cross_entropy, case.targets(), reduction=reduction, backend=backend)
    runs = []
    for _ in range(2):
        loss = function(*leaves)
        runs.append((loss, *torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.5))))
    assert all(torch.equal(first, second) for first, second in zip(*runs))


def count_products(run):
    """What `run` returns, and how many matrix products it has taken."""
    with torch.profiler.profile() as profile:
        result = run()
    return result, sum(event.name in PRODUCTS for event in profile.events())


PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")


@pytest.mark.parametrize(
    ("trained", "reduction", "forward", "backward"),
    [
        ("", "mean", 1, 0),
        ("hidden", "mean", 2, 0),
        ("hidden weight", "mean", 3, 0),
        ("hidden", "none", 2, 0),
        ("hidden weight", "none", 1, 3),
    ],
)
def test_products_and_when_they_are_taken(trained, reduction, forward, backward):
    hidden, weight = Case().tensors(torch.float32)
    leaves = {"hidden": hidden, "weight": weight}
    wanted = [leaves[name].requires_grad_() for name in trained.split()]
    targets = Case().targets()
    loss, products = count_products(
        lambda: linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    )
    assert products == forward and loss.requires_grad == bool(trained)
    if trained:
        assert count_products(lambda: torch.autograd.grad(loss.sum(), wanted))[1] == backward


def test_no_gradients_are_made_without_grad_mode():
    hidden, weight = (tensor.requires_grad_() for tensor in Case().tensors(torch.float32))
    with torch.no_grad():
        _, products = count_products(lambda: linear_cross_entropy(hidden, weight, Case().targets()))
    assert products == 1


def test_gradients_take_the_memory_they_were_saved_in():
    """The weight's gradient is the buffer that the forward summed it in: no second one is made."""
    hidden, weight = (tensor.requires_grad_() for tensor in Case().tensors(torch.float32))
    loss = linear_cross_entropy(hidden, weight, Case().targets(), reduction="sum")
    saved = [tensor.data_ptr() for tensor in loss.grad_fn.saved_tensors[:2]]
    loss.backward()
    assert [hidden.grad.data_ptr(), weight.grad.data_ptr()] == saved


def test_a_second_backward():
    """Raises as everywhere in torch, or gives the same where the graph was kept."""
    leaves = [tensor.requires_grad_() for tensor in Case().tensors(torch.float32)]
    loss = linear_cross_entropy(*leaves, Case().targets())
    first = torch.autograd.grad(loss, leaves, torch.tensor(2.0), retain_graph=True)
    second = torch.autograd.grad(loss, leaves, torch.tensor(2.0))
    assert all(torch.equal(*pair) for pair in zip(first, second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@every_reduction
def test_autocast_casts_the_inputs(reduction):
    case = CASES["everything"]
    targets = case.targets()
    tensors = case.tensors(torch.float32)
    function = case.bind(linear_cross_entropy, targets, reduction=reduction)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = function(*leaves)
    grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    assert loss.dtype == torch.float32
    assert all(grad.dtype == torch.float32 for grad in grads)
    narrow = [tensor.bfloat16() for tensor in tensors[:3]]
    assert torch.equal(loss, function(*narrow, *tensors[3:]))


@pytest.mark.parametrize("classes", [32000, 151936])
def test_large_vocabularies(classes):
    Case(rows=40, classes=classes, features=16, ignored=(3,)).check(None)


def test_float64_on_the_cpu():
    case = CASES["everything"]
    targets, tensors = case.targets().cpu(), [x.cpu() for x in case.tensors(torch.float64)]
    got = case.bind(linear_cross_entropy, targets, reduction="mean", backend="cpu")(*tensors)
    want = case.bind(plain.linear_cross_entropy, targets, reduction="mean")(*tensors)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("trained", "reduction"), [([0], "none"), ([1], "sum")])
def test_compiled_training_steps(trained, reduction):
    """One graph, forward and backward, of a frozen head and of the head alone."""
    torch.compiler.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    tensors, targets = Case().tensors(torch.float32), Case().targets()
    leaves = [tensors[index].requires_grad_() for index in trained]
    results = []
    for function in (compiled, linear_cross_entropy):
        loss = function(*tensors, targets, reduction=reduction)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


def test_the_module_is_torchs_loss_of_the_logits():
    hidden, weight, bias = Case(bias=True).tensors(torch.float32)
    targets = Case(ignored=(2,), options={"ignore_index": 3}).targets()
    arguments = {"ignore_index": 3, "label_smoothing": 0.1, "reduction": "sum"}
    ours, theirs = LinearCrossEntropy(**arguments), torch.nn.CrossEntropyLoss(**arguments)
    logits = F.linear(hidden, weight, bias)
    torch.testing.assert_close(ours(hidden, weight, targets, bias), theirs(logits, targets))
    assert "label_smoothing=0.1" in repr(ours) and not list(ours.parameters())
    capped = LinearCrossEntropy(softcap=3.0, z_loss=0.1)(hidden, weight, targets)
    expected = linear_cross_entropy(hidden, weight, targets, softcap=3.0, z_loss=0.1)
    assert torch.equal(capped, expected)


def test_errors_name_the_argument():
    hidden, weight = Case().tensors(torch.float32)
    targets, call = Case().targets(), functools.partial(linear_cross_entropy)
    with pytest.raises(ValueError, match="linear_cross_entropy: hidden: expected shape"):
        call(hidden[:, 1:], weight, targets)
    with pytest.raises(TypeError, match="linear_cross_entropy: weight: expected hidden's dtype"):
        call(hidden, weight.half(), targets)
    with pytest.raises(ValueError, match="linear_cross_entropy: weight: expected at least 1 row"):
        call(hidden, weight[:0], targets)
    with pytest.raises(
        TypeError, match="linear_cross_entropy: targets: expected dtype torch.int64"
    ):
        call(hidden, weight, targets.int())
    with pytest.raises(ValueError, match="linear_cross_entropy: targets: expected shape"):
        call(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match="linear_cross_entropy: bias: expected shape"):
        call(hidden, weight, targets, bias=torch.ones(3, device=DEVICE))
    with pytest.raises(
        ValueError, match="linear_cross_entropy: label_smoothing: expected a number"
    ):
        call(hidden, weight, targets, label_smoothing=1.5)
    with pytest.raises(ValueError, match="linear_cross_entropy: softcap: expected a number >= 0"):
        call(hidden, weight, targets, softcap=-1.0)
    with pytest.raises(ValueError, match="linear_cross_entropy: reduction: expected one of mean"):
        call(hidden, weight, targets, reduction="average")
    with pytest.raises(ValueError, match="linear_cross_entropy: lora_b: expected shape"):
        call(hidden, weight, targets, lora=(weight[:3], weight[:, :2], 1.0))
