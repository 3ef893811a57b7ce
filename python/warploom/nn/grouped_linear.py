"""Experts as grouped products: rows sorted by expert, one call for all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from warploom.nn.assignments import Assignments, expert_load
from warploom.nn.sharded import own_part
from warploom.ops.activation import swiglu
from warploom.ops.grouped_linear import grouped_linear


class RoutedExperts(nn.Module):
    """SwiGLU experts of which every token visits a few: two grouped products, no loop over experts.

    The state dict is that of transformers' `DeepseekV2Experts`: gate_up_proj [E, 2 intermediate, hidden],
    down_proj [E, hidden, intermediate].
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size, **factory)
        )
        self.down_proj = nn.Parameter(
            torch.empty(num_experts, hidden_size, intermediate_size, **factory)
        )

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x [T, hidden], experts int64 [T, k], weights [T, k] -> [T, hidden], the weighted sum.

        An expert number of E or more is no expert: it adds nothing.
        """
        sorting = Assignments.of(experts)
        load = expert_load(experts.clamp(max=self.num_experts), self.num_experts + 1)[:-1]
        offsets = F.pad(load.cumsum(0, dtype=torch.int32), (1, 0))
        outs = sorting.collect(self.run(sorting.spread(x), offsets))
        total: Tensor = (outs * weights.unsqueeze(-1).to(outs.dtype)).sum(1)
        return total

    @property
    def num_experts(self) -> int:
        """Those that this module holds: a part of all where experts are spread over ranks."""
        return own_part(self.down_proj).shape[0]

    def run(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """rows [M, hidden] sorted by expert, offsets int32 [E + 1] -> [M, hidden]; 0 behind the last."""
        # FSDP's mixed precision casts all weights but those of experts that are spread over its mesh.
        gate_up, down = (
            own_part(weight).to(rows.dtype) for weight in (self.gate_up_proj, self.down_proj)
        )
        gate, up = grouped_linear(rows, gate_up, offsets).chunk(2, dim=-1)
        return grouped_linear(swiglu(gate, up), down, offsets)
