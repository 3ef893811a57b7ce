"""What `gqa_to_mla` decides by norms: which rotary pairs stay, and what a latent is made of.

Weights are float64, their last dimension the layer's input. With a `root` R of the input's second moment
E[h h^T] = R R^T the norm of W R is that of the activations W h, root mean square; None: that of W.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from warploom.models.llama import Llama

#: Of the mean of a second moment's diagonal, added to it: few tokens do not reach every direction.
_RIDGE = 1e-4


def moment_roots(model: Llama, token_ids: Tensor) -> list[Tensor]:
    """R, float64 [hidden, hidden], of each layer's normalised input on token_ids int64 [B, S]."""
    if token_ids.dim() != 2 or not token_ids.numel():
        raise ValueError(
            f"calibration: expected tokens [batch, sequence], got {tuple(token_ids.shape)}"
        )
    size, weight = model.config.hidden_size, model.lm_head.weight
    layers = range(model.config.num_hidden_layers)
    moments = [weight.new_zeros((size, size), dtype=torch.float64) for _ in layers]

    def add(moment: Tensor, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, 1).double()
        moment.addmm_(rows.T, rows, alpha=1 / token_ids.numel())

    handles = [
        model.get_submodule(f"model.layers.{layer}.self_attn").register_forward_pre_hook(
            lambda _, inputs, moment=moment: add(moment, inputs)
        )
        for layer, moment in zip(layers, moments, strict=True)
    ]
    try:
        for row in token_ids:
            model.model(row.unsqueeze(0))
    finally:
        for handle in handles:
            handle.remove()
    for moment in moments:
        diagonal = moment.diagonal()
        diagonal += _RIDGE * diagonal.mean()
    return [torch.linalg.cholesky(moment) for moment in moments]


def activation_norms(weight: Tensor, root: Tensor | None) -> Tensor:
    """Norm of each row's activation, [...] of [..., hidden]."""
    norms: Tensor = torch.linalg.vector_norm(weight if root is None else weight @ root, dim=-1)
    return norms


def keep_pairs(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` rotary pairs that a table of frequencies common to all layers serves best.

    scores [layers, heads, pairs] -> pair [count] and owner [layers, count]: place p has the frequency of
    pair[p] and in each layer that pair of head owner[layer, p]. How many heads keep a pair is the same in
    all layers, which heads each layer's own, and the sum of the kept scores the largest that this allows.
    """
    ranked, heads = scores.sort(dim=1, descending=True)
    best = ranked.mean(0).flatten().topk(count).indices.sort().values
    rank, pair = best // scores.shape[2], best % scores.shape[2]
    return pair, heads[:, rank, pair]


def separate_pairs(
    weight: Tensor, pair: Tensor, owner: Tensor, rotary_dim: int, d_nope: int, d_rope: int
) -> tuple[Tensor, Tensor]:
    """Parts of a projection that are not rotated, and those that are, where the shared key has them.

    weight [G, J, D, hidden]: J heads that belong to key head G, of whose D features the first rotary_dim
    are pairs (i, i + rotary_dim / 2); pair, owner [P]. -> [G, J, d_nope, hidden], the others in their
    order, and [G, J, d_rope, hidden], neighbours (2p, 2p + 1) being the pair of place p for its owner and
    0 for other heads. Both are filled up with 0.
    """
    groups, members, size, hidden = weight.shape
    owner = owner.repeat_interleave(2)
    feature = torch.stack((pair, pair + rotary_dim // 2), dim=1).flatten()
    place = torch.arange(len(feature), device=weight.device)
    rope = weight.new_zeros((groups, members, d_rope, hidden))
    rope[owner, :, place] = weight[owner, :, feature]
    turned = torch.zeros((groups, size), dtype=torch.bool, device=weight.device)
    turned[owner, feature] = True
    order = turned.int().argsort(dim=1, stable=True)[:, None, :, None]
    nope = weight.masked_fill(turned[:, None, :, None], 0.0).take_along_dim(order, dim=2)
    return F.pad(nope, (0, 0, 0, d_nope - size)), rope


def joint_factors(
    keys: Tensor, values: Tensor, rank: int, root: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """down [rank, hidden] and up_keys, up_values with keys ~ up_keys down and values ~ up_values down.

    Of keys [M, hidden] / a and values [N, hidden] one above the other, a the ratio of their norms, the
    projection on the first `rank` left singular vectors: the best approximation of that rank.
    """
    key_norm, value_norm = (activation_norms(part, root).norm() for part in (keys, values))
    ratio = key_norm / value_norm if key_norm > 0 and value_norm > 0 else key_norm.new_ones(())
    joint = torch.cat((keys / ratio, values))
    vectors = torch.linalg.svd(joint if root is None else joint @ root, full_matrices=False).U
    vectors = vectors[:, :rank]
    vectors = F.pad(vectors, (0, rank - vectors.shape[1]))
    up_keys, up_values = vectors.split([len(keys), len(values)])
    return vectors.T @ joint, ratio * up_keys, up_values
