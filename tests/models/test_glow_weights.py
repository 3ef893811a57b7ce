"""Weights of glow-pytorch and of openai's Glow give, under their own formulas, the same density."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from warploom.convert.glow import glow_from_glow_pytorch, glow_from_openai

CHANNELS, SIZE, HIDDEN, DEPTH, SCALES = 3, 8, 5, 2, 2
SHAPE = (CHANNELS, SIZE, SIZE)


def glow_pytorch_state(*, affine: bool, lu: bool) -> dict[str, Tensor]:
    """Random weights under glow-pytorch's names; scales of both signs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)

    def zero_conv(name: str, before: int, after: int) -> dict[str, Tensor]:
        return {
            f"{name}.conv.weight": normal(after, before, 3, 3),
            f"{name}.conv.bias": normal(after),
            f"{name}.scale": normal(1, after, 1, 1),
        }

    state: dict[str, Tensor] = {}
    before = CHANNELS
    for block in range(SCALES):
        channels = 4 * before
        for step in range(DEPTH):
            name = f"blocks.{block}.flows.{step}"
            sign = torch.where(normal(channels) > 0, 1.0, -1.0)
            state[f"{name}.actnorm.loc"] = normal(1, channels, 1, 1)
            state[f"{name}.actnorm.scale"] = (sign * normal(channels).exp()).view(1, -1, 1, 1)
            state[f"{name}.actnorm.initialized"] = torch.tensor(1, dtype=torch.uint8)
            if lu or block == SCALES - 1:
                ones = torch.ones(channels, channels, dtype=torch.float64)
                order = torch.randperm(channels, generator=generator)
                state |= {
                    f"{name}.invconv.w_p": torch.eye(channels, dtype=torch.float64)[order],
                    f"{name}.invconv.w_l": normal(channels, channels),
                    f"{name}.invconv.w_u": normal(channels, channels),
                    f"{name}.invconv.w_s": normal(channels),
                    f"{name}.invconv.s_sign": normal(channels).sign(),
                    f"{name}.invconv.l_mask": ones.tril(-1),
                    f"{name}.invconv.u_mask": ones.triu(1),
                    f"{name}.invconv.l_eye": torch.eye(channels, dtype=torch.float64),
                }
            else:
                rotation = torch.linalg.qr(normal(channels, channels))[0]
                state[f"{name}.invconv.weight"] = rotation[..., None, None]
            half = channels // 2
            state[f"{name}.coupling.net.0.weight"] = normal(HIDDEN, half, 3, 3)
            state[f"{name}.coupling.net.0.bias"] = normal(HIDDEN)
            state[f"{name}.coupling.net.2.weight"] = normal(HIDDEN, HIDDEN, 1, 1)
            state[f"{name}.coupling.net.2.bias"] = normal(HIDDEN)
            after = channels if affine else half
            state |= zero_conv(f"{name}.coupling.net.4", HIDDEN, after)
        last = block == SCALES - 1
        kept = channels if last else channels // 2
        state |= zero_conv(f"blocks.{block}.prior", kept, 2 * kept)
        before = channels // 2
    return state


def glow_pytorch_log_prob(state: dict[str, Tensor], x: Tensor, *, affine: bool) -> Tensor:
    """Block by block as that model's forward is defined."""

    def zero_conv(name: str, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1), value=1.0)
        out = F.conv2d(padded, state[f"{name}.conv.weight"], state[f"{name}.conv.bias"])
        return out * torch.exp(3.0 * state[f"{name}.scale"])

    total = x.new_zeros(len(x))
    for block in range(SCALES):
        batch, channels, height, width = x.shape
        x = x.view(batch, channels, height // 2, 2, width // 2, 2)
        x = x.permute(0, 1, 3, 5, 2, 4).reshape(batch, 4 * channels, height // 2, width // 2)
        pixels = x.shape[2] * x.shape[3]
        for step in range(DEPTH):
            name = f"blocks.{block}.flows.{step}"
            scale = state[f"{name}.actnorm.scale"]
            x = scale * (x + state[f"{name}.actnorm.loc"])
            total = total + pixels * scale.abs().log().sum()
            weight = invconv_weight(state, f"{name}.invconv")
            x = torch.einsum("oi,bihw->bohw", weight, x)
            total = total + pixels * torch.linalg.slogdet(weight)[1]
            first, second = x.chunk(2, 1)
            net = f"{name}.coupling.net"
            h = F.conv2d(first, state[f"{net}.0.weight"], state[f"{net}.0.bias"], padding=1).relu()
            h = F.conv2d(h, state[f"{net}.2.weight"], state[f"{net}.2.bias"]).relu()
            h = zero_conv(f"{net}.4", h)
            if affine:
                raw, shift = h.chunk(2, 1)
                scale = torch.sigmoid(raw + 2.0)
                second = (second + shift) * scale
                total = total + scale.log().flatten(1).sum(1)
            else:
                second = second + h
            x = torch.cat([first, second], 1)
        if block == SCALES - 1:
            given, latent = torch.zeros_like(x), x
        else:
            given, latent = x.chunk(2, 1)
            x = given
        mean, log_deviation = zero_conv(f"blocks.{block}.prior", given).chunk(2, 1)
        total = total + gaussian(latent, mean, log_deviation)
    return total


def invconv_weight(state: dict[str, Tensor], name: str) -> Tensor:
    if f"{name}.weight" in state:
        return state[f"{name}.weight"].flatten(1)
    lower = state[f"{name}.w_l"] * state[f"{name}.l_mask"] + state[f"{name}.l_eye"]
    diagonal = torch.diag(state[f"{name}.s_sign"] * torch.exp(state[f"{name}.w_s"]))
    upper = state[f"{name}.w_u"] * state[f"{name}.u_mask"] + diagonal
    return state[f"{name}.w_p"] @ lower @ upper


def gaussian(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    squares = ((x - mean) / log_deviation.exp()).square()
    log_prob = -0.5 * (math.log(2 * math.pi) + squares) - log_deviation
    return log_prob.flatten(1).sum(1)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "additive"])
@pytest.mark.parametrize("lu", [True, False], ids=["lu", "full"])
@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "data-parallel"])
def test_glow_pytorch_weights_give_its_density(affine: bool, lu: bool, prefix: str) -> None:
    state = glow_pytorch_state(affine=affine, lu=lu)
    named = {prefix + name: value for name, value in state.items()}
    flow = glow_from_glow_pytorch(named, SHAPE, levels=32).eval()
    assert (flow.config.depth, flow.config.num_scales, flow.config.lu) == (DEPTH, SCALES, lu)
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = glow_pytorch_log_prob(state, x - 0.5, affine=affine)
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flow.decode(flow.encode(x)[0])[0], x, rtol=1e-6, atol=1e-6)


def openai_arrays(*, learned_top: bool) -> dict[str, Any]:
    """Random weights under openai's variable names."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)

    def zero_conv(name: str, before: int, after: int) -> dict[str, Tensor]:
        return {
            f"{name}/W": normal(3, 3, before + 1, after),
            f"{name}/b": normal(1, 1, 1, after),
            f"{name}/logs": normal(1, after),
        }

    arrays: dict[str, Tensor] = {}
    channels = 4 * CHANNELS
    for level in range(SCALES):
        for step in range(DEPTH):
            name = f"model/{level}/{step}"
            arrays |= {
                f"{name}/actnorm_center/b": normal(1, 1, 1, channels),
                f"{name}/actnorm_scale/logs": normal(1, 1, 1, channels),
                f"{name}/invconv/W": torch.linalg.qr(normal(channels, channels))[0],
                f"{name}/f1/l_1/W": normal(3, 3, channels // 2 + 1, HIDDEN),
                f"{name}/f1/l_2/W": normal(1, 1, HIDDEN, HIDDEN),
                **zero_conv(f"{name}/f1/l_last", HIDDEN, channels),
            }
            for layer in ("l_1", "l_2"):
                arrays[f"{name}/f1/{layer}/actnorm_center/b"] = normal(1, 1, 1, HIDDEN)
                arrays[f"{name}/f1/{layer}/actnorm_scale/logs"] = normal(1, 1, 1, HIDDEN)
        if level < SCALES - 1:
            arrays |= zero_conv(f"model/pool{level}/conv", channels // 2, channels)
            channels *= 2
    if learned_top:
        arrays |= zero_conv("model/prior/p", 2 * channels, 2 * channels)
    return {name: value.numpy() for name, value in arrays.items()}


def openai_log_prob(arrays: dict[str, Any], x: Tensor) -> Tensor:
    """The definition on x [B, H, W, C]; a convolution sees its input and a channel that marks the border."""
    weights = {name: torch.as_tensor(value) for name, value in arrays.items()}

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        if weight.shape[0] == 3:
            edge = F.pad(x.new_zeros(len(x), 1, *x.shape[1:3]), (1, 1, 1, 1), value=1.0)
            x = torch.cat([F.pad(x, (0, 0, 1, 1, 1, 1)), edge.movedim(1, -1)], 3)
        return F.conv2d(x.movedim(-1, 1), weight.permute(3, 2, 0, 1)).movedim(1, -1)

    def normalize(name: str, x: Tensor) -> Tensor:
        logs = 3.0 * weights[f"{name}actnorm_scale/logs"]
        return (x + weights[f"{name}actnorm_center/b"]) * logs.exp()

    def zero_conv(name: str, x: Tensor) -> Tensor:
        out = convolve(x, weights[f"{name}/W"]) + weights[f"{name}/b"]
        return out * torch.exp(3.0 * weights[f"{name}/logs"])

    def squeeze(x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 5, 2, 4)
        return x.reshape(batch, height // 2, width // 2, 4 * channels)

    total = x.new_zeros(len(x))
    x = squeeze(x)
    for level in range(SCALES):
        pixels = x.shape[1] * x.shape[2]
        for step in range(DEPTH):
            name = f"model/{level}/{step}/"
            x = normalize(name, x)
            total = total + pixels * 3.0 * weights[f"{name}actnorm_scale/logs"].sum()
            weight = weights[f"{name}invconv/W"]
            x = x @ weight
            total = total + pixels * torch.linalg.slogdet(weight)[1]
            first, second = x.chunk(2, 3)
            h = normalize(f"{name}f1/l_1/", convolve(first, weights[f"{name}f1/l_1/W"])).relu()
            h = normalize(f"{name}f1/l_2/", convolve(h, weights[f"{name}f1/l_2/W"])).relu()
            h = zero_conv(f"{name}f1/l_last", h)
            scale = torch.sigmoid(h[..., 1::2] + 2.0)
            x = torch.cat([first, (second + h[..., 0::2]) * scale], 3)
            total = total + scale.log().flatten(1).sum(1)
        if level < SCALES - 1:
            x, latent = x.chunk(2, 3)
            h = zero_conv(f"model/pool{level}/conv", x)
            total = total + gaussian(latent, h[..., 0::2], h[..., 1::2])
            x = squeeze(x)
    zeros = torch.zeros_like(torch.cat([x, x], 3))
    top = zero_conv("model/prior/p", zeros) if "model/prior/p/W" in weights else zeros
    return total + gaussian(x, *top.chunk(2, 3))


@pytest.mark.parametrize("learned_top", [True, False], ids=["learned-top", "standard-top"])
def test_openai_weights_give_its_density(learned_top: bool) -> None:
    arrays = openai_arrays(learned_top=learned_top)
    flow = glow_from_openai(arrays, SHAPE, levels=32).eval()
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = openai_log_prob(arrays, x.movedim(1, -1) - 0.5)
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=1e-9, atol=1e-9)


def test_missing_entries_and_classes_are_named() -> None:
    state = glow_pytorch_state(affine=True, lu=True)
    del state["blocks.1.flows.0.coupling.net.0.bias"]
    with pytest.raises(KeyError, match="net.0.bias"):
        glow_from_glow_pytorch(state, SHAPE)
    with pytest.raises(ValueError, match="unconditional"):
        glow_from_openai({"model/prior/y_emb/W": torch.zeros(1)}, SHAPE)
