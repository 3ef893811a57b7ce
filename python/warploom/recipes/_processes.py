"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

_WHOLE: dict[str, Any] = {"full_state_dict": True, "cpu_offload": True}


def choose_device(name: str) -> torch.device:
    """ "cpu", "cuda" and the like; "auto": this process's GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and dist.is_initialized():
        return torch.device("cuda", dist.get_node_local_rank())
    return torch.device(name)


@contextmanager
def joined_processes(device: str) -> Iterator[None]:
    """Inside, the processes that torchrun started are one group; elsewhere this one is alone."""
    if dist.is_initialized() or not dist.is_torchelastic_launched():
        yield
        return
    on_gpu = choose_device(device).type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(choose_device("cuda"))
    try:
        yield
    finally:
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_processes(value: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def from_all(value: Any) -> list[Any]:
    """What every process has, in the order of the ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Whole states of a sharded model's trained parameters and of its optimizer, on rank 0."""
    options = StateDictOptions(**_WHOLE, ignore_frozen_params=True)
    return get_state_dict(model, optimizer, options=options)


def spread_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, model_state: Any, optimizer_state: Any
) -> None:
    """Gives a sharded model and its optimizer the states that rank 0 has."""
    options = StateDictOptions(**_WHOLE, broadcast_from_rank0=True, strict=False)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=model_state,
        optim_state_dict=optimizer_state,
        options=options,
    )
