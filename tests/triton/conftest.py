"""What every launcher test shares: guarded outputs, inputs in poisoned buffers, one error rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from warploom.triton_kernels.common.launch import INTERPRETED

# Where the kernels run: on the CPU under Triton's interpreter, else on a GPU.
DEVICE = "cpu" if INTERPRETED else "cuda"

GUARD_ELEMENTS = 64
GUARD_VALUE = 12345.0

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def default_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(20)


@pytest.fixture
def random(generator: torch.Generator) -> Callable[..., Tensor]:
    """Normal values of a shape and dtype."""

    def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    return draw


@pytest.fixture
def embedded() -> Callable[[Tensor], Tensor]:
    """The same values as a slice of a larger buffer that is NaN everywhere else."""

    def embed(x: Tensor) -> Tensor:
        buffer = x.new_full([size + 3 for size in x.shape], math.nan)
        inner = buffer[tuple(slice(1, 1 + size) for size in x.shape)]
        inner.copy_(x)
        return inner

    return embed


@pytest.fixture(autouse=True)
def guarded_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Launchers get memory that is NaN inside, between guards that nothing may overwrite."""
    plain_full = torch.full
    buffers: list[Tensor] = []

    def empty(*size: int | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        shape = torch.Size(size[0] if isinstance(size[0], tuple) else size)
        total = shape.numel() + 2 * GUARD_ELEMENTS
        buffer = plain_full((total,), GUARD_VALUE, dtype=dtype, device=device)
        buffers.append(buffer)
        inner = buffer[GUARD_ELEMENTS : total - GUARD_ELEMENTS].view(shape)
        return inner.fill_(math.nan)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(
        torch, "empty_like", lambda x, **_: empty(x.shape, dtype=x.dtype, device=x.device)
    )
    yield
    for buffer in buffers:
        guard = torch.full_like(buffer[:1], GUARD_VALUE).item()
        assert (buffer[:GUARD_ELEMENTS] == guard).all(), "written before the start of an output"
        assert (buffer[-GUARD_ELEMENTS:] == guard).all(), "written past the end of an output"


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """The error against the float64 reference is at most `factor` times that of the reference run
    on the same inputs, plus the floor that adding and subtracting 0.3 in the dtype leaves.

    The floor is at least the rounding of the largest value: where a result has few elements, the
    reference may be exact by luck.
    """

    def check(
        actual: tuple[Tensor, ...],
        reference: Callable[..., tuple[Tensor, ...] | Tensor],
        *args: object,
        factor: float,
    ) -> None:
        def results(values: tuple[object, ...]) -> tuple[Tensor, ...]:
            value = reference(*values)
            return value if isinstance(value, tuple) else (value,)

        def widen(value: object) -> object:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.double() if floating else value

        exact = results(tuple(widen(arg) for arg in args))
        rounded = results(args)
        assert len(actual) == len(exact)
        for position, (got, want, same_dtype) in enumerate(
            zip(actual, exact, rounded, strict=True)
        ):
            assert got.dtype == same_dtype.dtype, f"result {position}: dtype"
            assert got.shape == want.shape, f"result {position}: shape"
            assert got.is_contiguous(), f"result {position}: strides {got.stride()}"
            finite = torch.isfinite(want)
            assert torch.equal(got[~finite].double(), want[~finite]), (
                f"result {position}: infinities"
            )
            if not finite.any():
                continue
            want = want[finite]
            low = want.to(got.dtype)
            floor = ((low + 0.3) - 0.3).double().sub(want).abs().max()
            floor = floor.maximum(want.abs().max() * torch.finfo(got.dtype).eps / 2)
            error = (got[finite].double() - want).abs().max()
            reference_error = (same_dtype[finite].double() - want).abs().max()
            bound = factor * reference_error + 2 * floor
            assert error <= bound, f"result {position}: error {error:.3g} > {bound:.3g}"

    return check
