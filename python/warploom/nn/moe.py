"""Mixture of experts: routers, shared and routed experts, balance losses; DeepSeek-V2's and V3's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from warploom.nn.activation import SwiGLU
from warploom.nn.assignments import expert_load
from warploom.nn.grouped_linear import RoutedExperts
from warploom.nn.sharded import own_part


class Routing(NamedTuple):
    """Where T tokens go: experts int64 [T, k], their weights [T, k], all affinities [T, E] float32."""

    experts: Tensor
    weights: Tensor
    affinities: Tensor


class TopKRouter(nn.Module):
    """Chooses k experts a token by its affinity to each, within the best groups of experts.

    DeepSeek-V2 (arXiv:2405.04434), section 2.2: affinities are a softmax, a group counts as much as its
    best expert. DeepSeek-V3 (2412.19437), section 2.1.2: a sigmoid, a group counts its best two, and a
    bias, which balances the load and is no parameter, is added for the choice but not for the weights.
    The state dict is that of transformers' `DeepseekV2TopkRouter` and `DeepseekV3TopkRouter`.

    Args:
        hidden_size: features of a token.
        num_experts: experts E.
        top_k: experts of a token.
        scoring: "softmax" (V2) or "sigmoid" (V3).
        num_groups: groups that the experts form; 1: no limit to groups.
        top_groups: groups that a token may reach.
        normalize: weights of a token are divided by their sum.
        scale: what weights are multiplied with.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: str = "softmax",
        num_groups: int = 1,
        top_groups: int = 1,
        normalize: bool = False,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if scoring not in ("softmax", "sigmoid"):
            raise ValueError(f"TopKRouter: scoring: expected softmax or sigmoid, got {scoring!r}")
        if num_experts % num_groups or not 1 <= top_groups <= num_groups:
            raise ValueError(
                f"TopKRouter: num_groups, top_groups: expected a divisor of {num_experts} and at "
                f"most that many, got {num_groups}, {top_groups}"
            )
        if not 1 <= top_k <= num_experts // num_groups * top_groups:
            raise ValueError(
                f"TopKRouter: top_k: expected experts that a token reaches, got {top_k}"
            )
        self.top_k = top_k
        self.scoring = scoring
        self.num_groups, self.top_groups = num_groups, top_groups
        self.normalize, self.scale = normalize, scale
        self.weight = nn.Parameter(
            torch.empty(num_experts, hidden_size, device=device, dtype=dtype)
        )
        bias = torch.zeros(num_experts, device=device) if scoring == "sigmoid" else None
        self.e_score_correction_bias: Tensor | None
        self.register_buffer("e_score_correction_bias", bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} experts, top {self.top_k}, {self.scoring}"

    def forward(self, x: Tensor) -> Routing:
        """x [T, hidden_size]; the affinities are computed in float32 (float64 for float64)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), own_part(self.weight).to(wide))
        affinities = logits.softmax(-1) if self.scoring == "softmax" else logits.sigmoid()
        choice = affinities
        if self.e_score_correction_bias is not None:
            choice = affinities + self.e_score_correction_bias
        if self.top_groups < self.num_groups:
            grouped = choice.unflatten(-1, (self.num_groups, -1))
            best = 1 if self.scoring == "softmax" else min(2, grouped.shape[-1])
            groups = grouped.topk(best, -1)[0].sum(-1).topk(self.top_groups, -1, sorted=False)[1]
            reached = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, groups, True)
            choice = grouped.masked_fill(~reached.unsqueeze(-1), float("-inf")).flatten(-2)
        experts = choice.topk(self.top_k, -1, sorted=False)[1]
        weights = affinities.gather(-1, experts)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts, weights * self.scale, affinities)

    @torch.no_grad()
    def update_bias(self, experts: Tensor, speed: float) -> None:
        """Moves the correction bias towards an even load: up for experts below the mean, else down.

        DeepSeek-V3, section 2.1.2 (auxiliary-loss-free balancing). Call it after a step, with the step's
        `Routing.experts`; several ranks add up their loads first.
        """
        if self.e_score_correction_bias is None:
            raise ValueError("TopKRouter: update_bias: expected scoring 'sigmoid', got 'softmax'")
        load = expert_load(experts, self.weight.shape[0]).float()
        self.e_score_correction_bias += speed * torch.sign(load.mean() - load)


class BalanceLoss(NamedTuple):
    """Factors of DeepSeek-V2's three balance losses (equations 23 to 31), 0: without.

    Attributes:
        expert: every expert of a layer gets as many tokens as any other.
        device: every group of experts does.
        communication: every group is reached by as many tokens as any other.
        num_groups: groups of experts (devices) D.
        top_groups: groups that a token may reach, M.
    """

    expert: float = 0.0
    device: float = 0.0
    communication: float = 0.0
    num_groups: int = 1
    top_groups: int = 1

    def __call__(self, routing: Routing) -> Tensor:
        """A scalar; all tokens of the call count as one sequence."""
        tokens, num_experts = routing.affinities.shape
        top_k = routing.experts.shape[1]
        chosen = torch.zeros_like(routing.affinities).scatter(1, routing.experts, 1.0)
        frequency = chosen.mean(0) * num_experts / top_k  # f_i
        affinity = routing.affinities.mean(0)  # P_i
        by_group = affinity.view(self.num_groups, -1).sum(1)
        reached = chosen.view(tokens, self.num_groups, -1).amax(2).mean(0)
        losses = (
            self.expert * (frequency * affinity).sum(),
            self.device * (frequency.view(self.num_groups, -1).mean(1) * by_group).sum(),
            self.communication * (reached * self.num_groups / self.top_groups * by_group).sum(),
        )
        return losses[0] + losses[1] + losses[2]


class _WithLoss(torch.autograd.Function):
    """x itself, whose backward also sends a gradient of 1 into `loss`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_shape, ctx.loss_dtype = loss.shape, loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(ctx.loss_shape, dtype=ctx.loss_dtype)


class MixtureOfExperts(nn.Module):
    """DeepSeekMoE: shared experts that every token visits, and routed ones (arXiv:2401.06066).

    The state dict is that of transformers' `DeepseekV2Moe` and `DeepseekV3MoE`: gate, experts,
    shared_experts (one SwiGLU as wide as all of them).

    Args:
        router: says where tokens go.
        hidden_size, intermediate_size: features of a token, and inside one expert.
        num_shared_experts: 0: none.
        balance: in training its loss joins the backward pass of the output; what the caller minimises
            need not name it.
    """

    def __init__(
        self,
        router: TopKRouter,
        hidden_size: int,
        intermediate_size: int,
        num_shared_experts: int,
        *,
        balance: BalanceLoss | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate = router
        self.experts = RoutedExperts(
            hidden_size, intermediate_size, router.weight.shape[0], **factory
        )
        self.shared_experts = None
        if num_shared_experts:
            width = intermediate_size * num_shared_experts
            self.shared_experts = SwiGLU(hidden_size, width, **factory)
        self.balance = balance

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> [..., hidden_size]."""
        tokens = x.flatten(0, -2)
        routing = self.gate(tokens)
        weights = routing.weights
        if self.balance is not None and self.training and torch.is_grad_enabled():
            with_loss: Any = _WithLoss
            weights = with_loss.apply(weights, self.balance(routing))
        out: Tensor = self.experts(tokens, routing.experts, weights).view(x.shape)
        return out if self.shared_experts is None else out + self.shared_experts(x)
