"""Affine coupling against its formula, compiled and eager, and against the modules of other libraries.

Of [64, 96, 64, 64] in float32: half of the channels under each convention and mask, and checkerboards;
forward, and forward with backward. The floor moves the bytes that no implementation can spare, in numbers of
x's elements N: 3 N forward (x and params read, z written) and 4.5 N backward, of a checkerboard 4 N and 7 N,
of one with packed parameters 3 N and 5 N.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from warploom.ops.coupling import PRESETS, affine_coupling, channel_slots

from bench.harness import Case, Run, close_to

SHAPE = (64, 96, 64, 64)
#: On a CPU the presets that differ in what is computed; the masks with the plainest scale.
CONVENTIONS = (
    "normflows", "normflows_sigmoid", "nflows", "freia", "freia_tanh", "freia_sigmoid", "freia_all_in_one",
    "freia_gin", "glow_pytorch", "openai_glow", "memcnn", "zuko",
)  # fmt: skip
Outputs = tuple[Tensor, Tensor]


def formula(x: Tensor, params: Tensor, **options: Any) -> Outputs:
    """What users write: split, map, concatenate."""
    passing, moved = x.chunk(2, dim=1)
    layout = options.get("layout", "shift_scale")
    if layout == "interleaved":
        shift, raw = params[:, 0::2], params[:, 1::2]
    else:
        shift, raw = params.chunk(2, dim=1)
        if layout == "scale_shift":
            shift, raw = raw, shift
    scale, factor = options.get("params_scale", 1.0), options.get("clamp", 1.0)
    shift, raw = scale * shift, scale * raw
    log_scale = {
        "exp": lambda: raw,
        "tanh": lambda: factor * torch.tanh(raw),
        "atan": lambda: factor * 0.636 * torch.atan(raw),
        "centered_sigmoid": lambda: factor * (2 * torch.sigmoid(raw) - 1),
        "sigmoid": lambda: (
            torch.log(torch.sigmoid(raw + 2) + options["eps"])
            if options.get("eps")
            else F.logsigmoid(raw + 2)
        ),
        "softclip": lambda: raw / (1 + torch.abs(raw / torch.log(raw.new_tensor(factor)))),
    }[options["scale"]]()
    if options.get("center") == "channel":
        log_scale = log_scale - log_scale.mean(1, keepdim=True)
    order = options.get("order", "mul_add")
    s = torch.exp(-log_scale if order == "div_add" else log_scale)
    z = (moved + shift) * s if order == "add_mul" else moved * s + shift
    log_det = log_scale.flatten(1).sum(1)
    return torch.cat((passing, z), dim=1), -log_det if order == "div_add" else log_det


def masked(x: Tensor, params: Tensor, moved: Tensor) -> Outputs:
    """Of a mask over pixels, in the full layout."""
    shift, log_scale = params.chunk(2, dim=1)
    log_scale = torch.where(moved, log_scale, 0.0)
    z = torch.where(moved, x * torch.exp(log_scale) + shift, x)
    return z, log_scale.flatten(1).sum(1)


def packed(x: Tensor, params: Tensor) -> Outputs:
    """Of a checkerboard, with parameters for the transformed pixels alone."""
    shift, log_scale = params.chunk(2, dim=1)
    z = x.clone()
    for row in (0, 1):
        moved = (..., slice(row, None, 2), slice(1 - row, None, 2))
        z[moved] = x[moved] * torch.exp(log_scale[:, :, row::2]) + shift[:, :, row::2]
    return z, log_scale.flatten(1).sum(1)


def selected(x: Tensor, params: Tensor, channels: Tensor) -> Outputs:
    """Of some channels."""
    shift, log_scale = params.chunk(2, dim=1)
    z = x.index_copy(1, channels, x[:, channels] * torch.exp(log_scale) + shift)
    return z, log_scale.flatten(1).sum(1)


class _Fixed(torch.nn.Module):
    """A conditioner that gives the same parameters for any input."""

    def __init__(self, params: Tensor) -> None:
        super().__init__()
        self.params = params

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return self.params


def module_of(name: str, x: Tensor, params: Tensor) -> Callable[..., Outputs] | None:
    """The layer of the library whose convention `name` is, on the same parameters, where it is installed."""
    library = {"normflows": "normflows", "nflows": "nflows"}.get(name)
    if library is None or importlib.util.find_spec(library) is None:
        return None
    conditioner = _Fixed(params)
    layer: torch.nn.Module
    if library == "normflows":
        layer = importlib.import_module("normflows").flows.AffineCouplingBlock(conditioner)
    else:
        coupling = importlib.import_module("nflows.transforms.coupling")
        mask = (torch.arange(x.shape[1]) >= x.shape[1] // 2).int()
        layer = coupling.AffineCouplingTransform(mask, lambda *_: conditioner)

    def run(x: Tensor, params: Tensor) -> Outputs:
        conditioner.params = params
        out: Outputs = layer(x)
        return out

    return run


def trained(function: Callable[..., Outputs], inputs: list[Tensor]) -> Run:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    upstream = torch.randn_like(inputs[0]), torch.randn(len(inputs[0]), device=inputs[0].device)
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


def cases(device: str) -> list[Case]:
    channels, *spatial = SHAPE[1:]
    x, params, more = (torch.randn(SHAPE, device=device) for _ in range(3))
    params, full = params / 2, torch.cat((params, more), dim=1) / 2
    alternate = torch.arange(channels, device=device) % 2 == 1
    generator = torch.Generator().manual_seed(0)
    random = torch.randperm(channels, generator=generator).to(device) < channels // 2
    pixels = (torch.arange(spatial[0])[:, None] + torch.arange(spatial[1])) % 2 == 1
    rows: list[tuple[str, dict[str, Any], Tensor, Callable[..., Outputs], tuple[float, float]]] = []
    for name in CONVENTIONS:
        options = dict(PRESETS[name])
        rows.append((name, options, params, lambda x, p, o=options: formula(x, p, **o), (3, 4.5)))
    for name, mask in (("alternate", alternate), ("random", random)):
        places = mask.nonzero()[:, 0]
        rows.append(
            (
                f"{name} channels",
                {"mask": channel_slots(mask)},
                params,
                lambda x, p, places=places: selected(x, p, places),
                (3, 4.5),
            )
        )
    moved = pixels.to(device)
    rows.append(
        (
            "checkerboard",
            {"mask": "checkerboard"},
            full,
            lambda x, p: masked(x, p, moved),
            (4, 7),
        )
    )
    half = params.view(SHAPE[0], 2 * channels, spatial[0], spatial[1] // 2)
    rows.append(("checkerboard, packed", {"mask": "checkerboard"}, half, packed, (3, 5)))
    found = []
    for name, options, parameters, theirs, (forward, backward) in rows:
        inputs = [x, parameters]

        def ours(x: Tensor, params: Tensor, options: dict[str, Any] = options) -> Outputs:
            out: Outputs = affine_coupling(x, params, **options)
            return out

        peers = {"eager": theirs, "compile": torch.compile(theirs)}
        layer = module_of(name, x, parameters)
        if layer is not None:
            peers[name] = layer
        for train in (False, True):
            start = trained if train else lambda function, inputs: lambda: function(*inputs)
            found.append(
                Case(
                    family="coupling",
                    op="affine_coupling" + (" training" if train else ""),
                    shape=f"{' x '.join(map(str, SHAPE))}, {name}",
                    dtype=x.dtype,
                    run=start(ours, inputs),
                    peers={peer: start(function, inputs) for peer, function in peers.items()},
                    verify=close_to(
                        lambda x, p, f=ours: f(x[:2], p[:2])[0],
                        lambda x, p, f=theirs: f(x[:2], p[:2])[0],
                        inputs,
                    ),
                    bytes=int(
                        (forward + (backward if train else 0)) * x.numel() * x.element_size()
                    ),
                )
            )
    return found
