"""Latent attention from grouped-query attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from warploom.convert._build import build_model
from warploom.convert._factors import (
    activation_norms,
    joint_factors,
    keep_pairs,
    moment_roots,
    separate_pairs,
)
from warploom.models.deepseek_v2 import DeepseekV2
from warploom.models.deepseek_v2_config import DeepseekV2Config
from warploom.models.llama import Llama
from warploom.models.llama_config import LlamaConfig
from warploom.nn.rope import inverse_frequencies

#: Kernels take latents and rotary keys whose features are a multiple of this.
_MULTIPLE = 16


@torch.no_grad()
def gqa_to_mla(
    model: Llama,
    *,
    d_latent: int | None = None,
    d_rope: int | None = None,
    calibration: Tensor | None = None,
) -> DeepseekV2:
    """The model with latent attention: a token is kept as d_latent + d_rope numbers a layer.

    After MHA2MLA (arXiv:2502.14837) and TransMLA (2502.07864):

    - The shared rotary key holds rotary pairs of all key/value heads side by side, each with its frequency
      (rope_type "explicit"); a query is zero in other heads' places. That is exact.
    - Pairs beyond d_rope lose their rotation. Kept are those with the largest ||q pair|| ||k pair||
      (MHA2MLA's S_2-norm). As all layers share one table, a frequency is kept by equally many heads in
      every layer, but not by the same ones.
    - The rest of the keys and the values are one matrix [W_K / a; W_V], a their ratio of norms, cut to rank
      d_latent by a singular value decomposition. Its left singular vectors make keys and values of the
      latent, which has no norm (`DeepseekV2Config.latent_norm`).
    - Scales of the softmax and the rotation that differ are moved into the query's weights.

    Exact but for rounding with all pairs and the full rank, the defaults; with fewer pairs where the others
    do not turn.

    Args:
        model: left as it is; without biases in its attention, norms of q and k, or windows.
        d_latent: features of the latent, rounded up to a multiple of 16 and at most the full rank's; None:
            those. Kernels serve 512 at most.
        d_rope: likewise of the rotary key, at most those of all key heads. Kernels serve 256 at most.
        calibration: int64 [B, S] on the model's device: norms are those of the activations that these
            tokens cause (each layer's input is weighed by its second moment) and not of the weights.
            Takes hidden_size^2 float64 numbers a layer.
    """
    config = model.config
    _check(config)
    heads, rotary_dim = config.num_key_value_heads, model.model.rotary_emb.dim
    kept = heads * rotary_dim
    d_rope = _size("d_rope", d_rope, kept)
    kept = min(kept, d_rope)
    full_rank = min(config.hidden_size, 2 * heads * config.head_dim - kept)
    d_latent = _size("d_latent", d_latent, full_rank)

    roots: Sequence[Tensor | None] = [None] * config.num_hidden_layers
    if calibration is not None:
        roots = moment_roots(model, calibration)
    scores = [
        _Projections.of(model, i).pair_scores(rotary_dim, root) for i, root in enumerate(roots)
    ]
    pair, owner = keep_pairs(torch.stack(scores), kept // 2)
    fewest = min(int(row.bincount(minlength=heads).min()) for row in owner)
    d_nope = max(config.head_dim - 2 * fewest, 1)  # `mla_prefill` takes no heads without this part
    frequencies, rotary_factor = inverse_frequencies(
        rotary_dim,
        config.rope_parameters,
        max_position_embeddings=config.max_position_embeddings,
    )
    angles = F.pad(frequencies[pair.cpu()], (0, d_rope // 2 - len(pair)))
    changed = _latent_config(
        config,
        rope_parameters={"rope_type": "explicit", "inverse_frequencies": angles.tolist()},
        kv_lora_rank=d_latent,
        qk_nope_head_dim=_round_up(d_nope),
        qk_rope_head_dim=d_rope,
    )
    query_scale = torch.ones((config.head_dim, 1), dtype=torch.float64, device=pair.device)
    query_scale[:rotary_dim] = rotary_factor**2
    query_scale *= config.head_dim**-0.5 / changed.softmax_scale
    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith((".q_proj.weight", ".k_proj.weight", ".v_proj.weight"))
    }
    for index, root in enumerate(roots):
        layer = _Projections.of(model, index)
        layer = dataclasses.replace(layer, q=layer.q * query_scale)
        for name, weight in layer.to_latent(changed, pair, owner[index], rotary_dim, root).items():
            place = f"model.layers.{index}.self_attn.{name}.weight"
            tensors[place] = weight.to(model.lm_head.weight.dtype)
    return build_model(DeepseekV2, changed, tensors, like=model)


@dataclass(frozen=True)
class _Projections:
    """A layer's weights in float64: q [G, J, D, hidden], k and v [G, 1, D, hidden] for G key/value heads,
    each of J query heads."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, model: Llama, index: int) -> _Projections:
        attention, config = model.model.layers[index].self_attn, model.config
        shape = (config.num_key_value_heads, -1, config.head_dim)
        names = ("q_proj", "k_proj", "v_proj")
        weights = [getattr(attention, name).weight.detach().double() for name in names]
        return cls(*(weight.unflatten(0, shape) for weight in weights))

    def pair_scores(self, rotary_dim: int, root: Tensor | None) -> Tensor:
        """||q pair|| ||k pair|| of each key head, the norm over all its queries: [G, rotary_dim / 2]."""

        def pair_norms(weight: Tensor) -> Tensor:
            norms = activation_norms(weight, root)[..., :rotary_dim].unflatten(-1, (2, -1))
            joined: Tensor = torch.linalg.vector_norm(norms, dim=(1, 2))
            return joined

        return pair_norms(self.q) * pair_norms(self.k)

    def to_latent(
        self,
        config: DeepseekV2Config,
        pair: Tensor,
        owner: Tensor,
        rotary_dim: int,
        root: Tensor | None,
    ) -> dict[str, Tensor]:
        """Weights of `MultiheadLatentAttention` by the names of their modules."""
        (q_nope, q_rope), (k_nope, k_rope) = (
            separate_pairs(
                weight, pair, owner, rotary_dim, config.qk_nope_head_dim, config.qk_rope_head_dim
            )
            for weight in (self.q, self.k)
        )
        keys, values = k_nope.flatten(0, 2), self.v.flatten(0, 2)
        down, *ups = joint_factors(keys, values, config.kv_lora_rank, root)
        groups, per_group = self.q.shape[:2]
        up = torch.cat([part.unflatten(0, (groups, -1)) for part in ups], dim=1)
        return {
            "q_proj": torch.cat((q_nope, q_rope), dim=2).flatten(0, 2),
            "kv_a_proj_with_mqa": torch.cat((down, k_rope.sum((0, 1)))),
            "kv_b_proj": up.repeat_interleave(per_group, dim=0).flatten(0, 1),
        }


def _check(config: LlamaConfig) -> None:
    """ValueError for what latent attention has no place for, by its name in the config."""
    windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
    reasons = {
        "attention_bias: expected false, got true": config.attention_bias,
        f"model_type: expected one without norms of q and k, got {config.model_type!r}": (
            config.qk_norm_eps is not None
        ),
        f"sliding_window: expected None, got {config.sliding_window}": {*windows} != {(-1, -1)},
        "rope_type: expected frequencies that do not depend on the length, got 'dynamic'": (
            config.rope_parameters["rope_type"] == "dynamic"
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"gqa_to_mla: {reason}")


def _round_up(size: int) -> int:
    return -(-size // _MULTIPLE) * _MULTIPLE


def _size(name: str, given: int | None, most: int) -> int:
    """`given` or `most`, whichever is less, rounded up."""
    if given is not None and given < 1:
        raise ValueError(f"gqa_to_mla: {name}: expected 1 or more, got {given}")
    return _round_up(most if given is None else min(given, most))


def _latent_config(config: LlamaConfig, **shape: Any) -> DeepseekV2Config:
    """The fields that both kinds of config have, and the given ones; no experts."""
    names = {known.name for known in dataclasses.fields(DeepseekV2Config)} - {"model_type"}
    fields = {name: value for name, value in vars(config).items() if name in names}
    fields |= {"q_lora_rank": None, "v_head_dim": config.head_dim, "latent_norm": False}
    return DeepseekV2Config(
        **{**fields, "first_k_dense_replace": config.num_hidden_layers, **shape}
    )
