"""How modules of the language models are cut over a mesh: DTensor's styles for what it has none for."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import (
    all_to_all_single,
    all_to_all_single_autograd,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from warploom.nn.assignments import Assignments, expert_load
from warploom.nn.grouped_linear import RoutedExperts
from warploom.nn.sharded import shared_whole


class NormParallel(ParallelStyle):
    """A norm whose weight is replicated, of local tensors x or (x, residual) placed as `layout`.

    The normalised tensor leaves as `output_layout`, its sum with the residual as it came. The first stays a
    DTensor unless `use_local_output`: gradients of several projections of it are then summed before they
    are reduced, once.
    """

    def __init__(
        self, layout: Placement, output_layout: Placement, *, use_local_output: bool = True
    ) -> None:
        super().__init__()
        self.layout = layout
        self.output_layout = output_layout
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def distribute(_: Any, inputs: tuple[Any, ...], mesh: DeviceMesh) -> Any:
            return tuple(
                DTensor.from_local(tensor, mesh, [self.layout], run_check=False)
                for tensor in inputs
            )

        def place(_: Any, outputs: Any, mesh: DeviceMesh) -> Any:
            normed, *total = outputs if isinstance(outputs, tuple) else (outputs,)
            normed = normed.redistribute(placements=[self.output_layout])
            if self.use_local_output:
                normed = normed.to_local()
            return (normed, total[0].to_local()) if total else normed

        return distribute_module(module, device_mesh, None, distribute, place)


class Replicated(ParallelStyle):
    """Parameters that every rank has, of a module that is called with DTensors."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh)


class PlacedOutput(ParallelStyle):
    """The output, a DTensor, leaves as a local tensor placed as `layout`; parameters stay as they are."""

    def __init__(self, layout: Placement) -> None:
        super().__init__()
        self.layout = layout

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def place(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
            placed: Tensor = output.redistribute(placements=[self.layout]).to_local()
            return placed

        module.register_forward_hook(place)
        return module


class RouterParallel(ParallelStyle):
    """A router that every rank runs on all tokens, a replicated DTensor; what it says are local tensors."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _distribute_parameters(module, device_mesh, Replicate())
        for name, buffer in module.named_buffers(recurse=False):
            whole = distribute_tensor(buffer, device_mesh, [Replicate()])
            module.register_buffer(name, whole.to_local())
        module.register_forward_pre_hook(lambda _, inputs: (inputs[0].to_local(),))
        return module


class ExpertsOfAllTokens(ParallelStyle):
    """Experts spread over the ranks, each of which has all tokens: a rank's output is a part of the sum.

    Inputs are the tokens, a replicated DTensor, and the local tensors of a `RouterParallel`.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def take_own(experts: Any, inputs: tuple[Any, ...], mesh: DeviceMesh) -> Any:
            x, numbers, weights = inputs
            own = numbers - mesh.get_local_rank() * experts.num_experts
            own = own.masked_fill(own < 0, experts.num_experts)  # no expert of this rank
            weights = DTensor.from_local(weights, mesh, [Replicate()], run_check=False)
            return shared_whole(x), own, shared_whole(weights)

        def is_part(_: Any, output: Any, mesh: DeviceMesh) -> Any:
            return DTensor.from_local(output, mesh, [Partial()], run_check=False)

        _distribute_parameters(module, device_mesh, Shard(0))
        return distribute_module(module, device_mesh, None, take_own, is_part)


class ExpertsOfOwnTokens(ParallelStyle):
    """Experts spread over ranks that have tokens of their own: tokens travel to experts and back.

    A rank's loss is the mean over its own tokens, the loss of all is the mean of those. So what the ranks'
    losses sum up in the gradient of an expert is divided by their number.
    """

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> Any:
        _distribute_parameters(module, device_mesh, Shard(0))
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda grad: grad / device_mesh.size())
        module.forward = functools.partial(_exchange, module, device_mesh)
        return module


def _exchange(
    module: RoutedExperts, mesh: DeviceMesh, x: Tensor, experts: Tensor, weights: Tensor
) -> Tensor:
    """`RoutedExperts.forward` for the tokens of this rank, x [T, hidden], and experts of all ranks."""
    group, ranks = mesh.get_group(), mesh.size()
    sorting = Assignments.of(experts)
    load = expert_load(experts, ranks * module.num_experts)
    # [rank that sends, expert here]: how many rows come.
    coming = all_to_all_single(load, None, None, group).view(ranks, -1)
    # The one read by the host: how many rows go to each rank and come from it.
    sent, received = torch.stack((load.view(ranks, -1).sum(1), coming.sum(1))).tolist()

    def travel(rows: Tensor, arriving: list[int], leaving: list[int]) -> Tensor:
        there: Tensor = all_to_all_single_autograd(rows, arriving, leaving, group)
        return there

    numbers = torch.arange(module.num_experts, device=x.device).repeat(ranks)
    numbers = numbers.repeat_interleave(coming.flatten(), output_size=sum(received))
    rows = travel(sorting.spread(x), received, sent)
    factors = travel(sorting.spread(weights.unsqueeze(-1)), received, sent)
    outs = RoutedExperts.forward(module, rows, numbers.unsqueeze(-1), factors)
    return sorting.collect(travel(outs, sent, received)).sum(1)


def _distribute_parameters(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        placed = distribute_tensor(parameter, mesh, [placement])
        module.register_parameter(name, nn.Parameter(placed, requires_grad=parameter.requires_grad))
