"""A layer against its peer: same parameters and inputs give the same outputs and gradients in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[..., tuple[Tensor, Any]]


def awake(module: nn.Module) -> nn.Module:
    """The module in float64, with its parameters away from initial values, where couplings are identities."""
    module = module.double()
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return module


def results(call: Call, module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """z, log_det [B], and the gradients of a loss of both in the inputs and the parameters."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    z, log_det = call(module, *inputs)
    log_det = torch.as_tensor(log_det, dtype=z.dtype).expand(len(z))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, dtype=z.dtype, generator=generator) for out in (z, log_det)]
    loss = (z * weights[0]).sum() + (log_det * weights[1]).sum()
    leaves = [*inputs, *(value for value in module.parameters() if value.requires_grad)]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [
        z.detach(),
        log_det.detach(),
        *(torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads)),
    ]


def assert_parity(
    ours: nn.Module,
    peer: nn.Module,
    inputs: Sequence[Tensor],
    calls: Sequence[Call] | dict[str, Call],
    tolerance: float = 1e-9,
) -> None:
    """The same state dict gives the same results in each of `calls`, of the peer and ours alike."""
    ours = awake(ours)
    peer.double().load_state_dict(ours.state_dict(), strict=True)
    assert list(peer.state_dict()) and set(peer.state_dict()) == set(ours.state_dict())
    names = [name for name, value in ours.named_parameters() if value.requires_grad]
    expected_names = [name for name, value in peer.named_parameters() if value.requires_grad]
    assert sorted(names) == sorted(expected_names)
    order = [expected_names.index(name) for name in names]
    labels = ["z", "log_det", *(f"gradient of input {i}" for i in range(len(inputs))), *names]
    for call in calls if not isinstance(calls, dict) else calls.values():
        got, want = results(call, ours, inputs), results(call, peer, inputs)
        fixed = 2 + len(inputs)
        want = [*want[:fixed], *(want[fixed + index] for index in order)]
        for label, actual, expected in zip(labels, got, want):
            torch.testing.assert_close(
                actual,
                expected,
                rtol=tolerance,
                atol=tolerance,
                msg=lambda text, label=label: f"{label}: {text}",
            )


def mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, outputs, 3, padding=1)
    )


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)
