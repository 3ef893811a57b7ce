"""Glow's weights of other implementations as a ``warploom.models.flows.Glow``: the same function.

Names in this file are theirs, as their training scripts write them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from warploom.models.flows import Glow, GlowConfig


def glow_from_glow_pytorch(
    state: Mapping[str, Tensor], event_shape: tuple[int, int, int], **fields: Any
) -> Glow:
    """The Glow of glow-pytorch's state dict (rosinality), affine or additive, 1x1 weights as P L U or whole.

    Its depth, scales, width and kinds are read off the state dict. glow-pytorch is called with images - 1/2,
    in [-1/2, 1/2], this model with images in [0, 1]. A latent there is our noise times the standard deviation
    of its prior plus the mean.

    Args:
        state: names ``blocks.{i}.flows.{j}...`` and ``blocks.{i}.prior...``, also under ``module.``, as
            data-parallel training saves them.
        event_shape: of an image: (channels, height, width).
        fields: further ``GlowConfig`` fields, such as ``levels``.

    Raises:
        KeyError, RuntimeError: a missing entry, or one of another shape.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    blocks = _count(state, r"blocks\.(\d+)\.")
    last_kernel = state["blocks.0.flows.0.coupling.net.4.conv.weight"]
    config = GlowConfig(
        event_shape=event_shape,
        num_scales=blocks,
        depth=_count(state, r"blocks\.0\.flows\.(\d+)\."),
        hidden_channels=last_kernel.shape[1],
        affine=last_kernel.shape[0] == 4 * event_shape[0],
        # Its last block has triangular factors whatever the others have.
        lu=not any(name.endswith("invconv.weight") for name in state),
        layout="scale_shift",
        padding="ones",
        **fields,
    )
    mapped: dict[str, Tensor] = {}
    for block in range(blocks):
        for step in range(config.depth):
            theirs = _below(state, f"blocks.{block}.flows.{step}.")
            mapped |= _glow_pytorch_step(theirs, config.lu, *_step_prefixes(block, step))
        prior = _below(state, f"blocks.{block}.prior.")
        mapped |= _prefixed(f"scales.{block}.split.prior.conv.", prior)
    return _load(config, mapped)


def glow_from_openai(
    arrays: Mapping[str, Any], event_shape: tuple[int, int, int], **fields: Any
) -> Glow:
    """The Glow of openai/glow's variables, unconditional, with whole 1x1 weights and affine couplings.

    Their activation norms inside the couplings' networks, and the factors exp(3 logs), are multiplied into
    the weights: the same function, trained on along another path.

    Args:
        arrays: NumPy arrays or tensors by name without ``:0``: ``model/{level}/{step}/...``,
            ``model/pool{level}/conv/...`` and, with a learned top, ``model/prior/p/...``.
        event_shape: (channels, height, width); their images are [height, width, channels].
        fields: further ``GlowConfig`` fields; ``levels`` is their 2**n_bits_x.

    Raises:
        ValueError: a class-conditional model.
        KeyError, RuntimeError: a missing entry, or one of another shape.
    """
    state = {name.removeprefix("model/"): torch.as_tensor(value) for name, value in arrays.items()}
    if any(name.startswith("prior/y_emb") for name in state):
        raise ValueError("glow_from_openai: arrays: expected an unconditional model, got classes")
    levels = _count(state, r"(\d+)/\d+/")
    config = GlowConfig(
        event_shape=event_shape,
        num_scales=levels,
        depth=_count(state, r"0/(\d+)/"),
        hidden_channels=state["0/0/f1/l_2/W"].shape[3],
        lu=False,
        layout="interleaved",
        prior_layout="interleaved",
        padding="edge",
        **fields,
    )
    mapped: dict[str, Tensor] = {}
    for level in range(levels):
        for step in range(config.depth):
            theirs = _below(state, f"{level}/{step}/")
            mapped |= _openai_step(theirs, *_step_prefixes(level, step))
        top = level == levels - 1
        if top and "prior/p/W" not in state:
            continue
        conv = _openai_zero_conv(_below(state, "prior/p/" if top else f"pool{level}/conv/"))
        if top:  # theirs sees zeros in twice the channels, and the border in one more
            conv["conv.weight"] = conv["conv.weight"][:, conv["conv.weight"].shape[1] // 2 :]
        mapped |= _prefixed(f"scales.{level}.split.prior.conv.", conv)
    return _load(config, mapped)


def _glow_pytorch_step(
    theirs: Mapping[str, Tensor], lu: bool, product: str, coupling: str
) -> dict[str, Tensor]:
    """One actnorm, 1x1 product and coupling. A scale's sign is moved into the product's columns."""
    scale = theirs["actnorm.scale"].flatten()
    flip = scale.sign()
    mapped = {
        "actnorm.log_scale": scale.abs().log(),
        "actnorm.shift": theirs["actnorm.loc"].flatten(),
        "actnorm.initialized": theirs["actnorm.initialized"].bool(),
    }
    factors = _below(theirs, "invconv.")
    if lu:
        mapped |= {
            "lower": factors["w_l"].tril(-1),
            "upper": factors["w_u"].triu(1) * flip,
            "log_diagonal": factors["w_s"],
            "sign": factors["s_sign"] * flip,
            "permutation": factors["w_p"],
        }
    elif "weight" in factors:
        mapped["weight"] = factors["weight"].flatten(1) * flip
    else:
        diagonal = torch.diag(factors["s_sign"] * factors["w_s"].exp())
        lower = factors["w_l"].tril(-1) + torch.eye(len(diagonal), dtype=diagonal.dtype)
        upper = factors["w_u"].triu(1) + diagonal
        mapped["weight"] = factors["w_p"] @ lower @ upper * flip
    return _prefixed(product, mapped) | _prefixed(coupling, _below(theirs, "coupling.net."))


def _openai_step(theirs: Mapping[str, Tensor], product: str, coupling: str) -> dict[str, Tensor]:
    """One actnorm, 1x1 product (theirs multiplies from the right) and coupling."""
    mapped = {
        "actnorm.log_scale": 3.0 * theirs["actnorm_scale/logs"].flatten(),
        "actnorm.shift": theirs["actnorm_center/b"].flatten(),
        "actnorm.initialized": torch.tensor(True),
        "weight": theirs["invconv/W"].T,
    }
    network: dict[str, Tensor] = {}
    for index, name in ((0, "l_1"), (2, "l_2")):
        factor = (3.0 * theirs[f"f1/{name}/actnorm_scale/logs"]).exp().flatten()
        network[f"{index}.weight"] = _kernel(theirs[f"f1/{name}/W"]) * factor[:, None, None, None]
        network[f"{index}.bias"] = theirs[f"f1/{name}/actnorm_center/b"].flatten() * factor
    network |= _prefixed("4.", _openai_zero_conv(_below(theirs, "f1/l_last/")))
    return _prefixed(product, mapped) | _prefixed(coupling, network)


def _openai_zero_conv(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        "conv.weight": _kernel(theirs["W"]),
        "conv.bias": theirs["b"].flatten(),
        "scale": theirs["logs"].reshape(1, -1, 1, 1),
    }


def _kernel(weight: Tensor) -> Tensor:
    """[height, width, in, out] to [out, in, height, width]."""
    return weight.permute(3, 2, 0, 1)


def _step_prefixes(scale: int, step: int) -> tuple[str, str]:
    """Of the 1x1 product with its actnorm, and of the coupling's network; layer 0 is the squeeze."""
    layers = f"scales.{scale}.steps.layers."
    return f"{layers}{1 + 2 * step}.", f"{layers}{2 + 2 * step}.conditioner.net."


def _load(config: GlowConfig, mapped: Mapping[str, Tensor]) -> Glow:
    """In the weights' dtype. A prior that ``mapped`` leaves out stays at zero: a standard Gaussian."""
    dtype = next(value.dtype for value in mapped.values() if value.is_floating_point())
    flow = Glow(config).to(dtype)
    missing, unexpected = flow.load_state_dict(mapped, strict=False)
    missing = [name for name in missing if ".split.prior." not in name]
    if missing or unexpected:
        raise KeyError(f"glow: state: missing {missing}, unexpected {unexpected}")
    return flow


def _count(state: Mapping[str, Any], pattern: str) -> int:
    """One more than the largest index that the pattern finds at the start of a name."""
    found = [int(match[1]) for name in state if (match := re.match(pattern, name))]
    if not found:
        raise KeyError(f"glow: state: no name like {pattern}")
    return 1 + max(found)


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}
