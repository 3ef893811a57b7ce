"""Flows by name, and as a directory: config.json and model.safetensors."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from warploom.models.directory import existing_directory, replace_directory
from warploom.models.flows.base import Flow
from warploom.models.flows.glow import Glow, GlowConfig
from warploom.models.flows.nice import NICE, NICEConfig
from warploom.models.flows.realnvp import RealNVP, RealNVPConfig
from warploom.models.flows.spline_flow import SplineFlow, SplineFlowConfig

#: Name -> (configuration, model).
FLOWS: dict[str, tuple[Any, Any]] = {
    config.name: (config, flow)
    for config, flow in (
        (NICEConfig, NICE),
        (RealNVPConfig, RealNVP),
        (GlowConfig, Glow),
        (SplineFlowConfig, SplineFlow),
    )
}


def make_flow(name: str, **fields: Any) -> Flow:
    """A flow with random weights from its name and its configuration's fields."""
    if name not in FLOWS:
        raise ValueError(f"flow: expected one of {', '.join(FLOWS)}, got {name!r}")
    config, flow = FLOWS[name]
    made: Flow = flow(config(**fields))
    return made


def save_flow(flow: Flow, directory: str | Path) -> None:
    """Write ``directory`` in one step: config.json (``flow``: the name, and the fields) and the weights."""
    config = {"flow": flow.config.name, **asdict(flow.config)}
    with replace_directory(directory) as staging:
        text = json.dumps(config, indent=2) + "\n"
        (staging / "config.json").write_text(text, encoding="utf-8")
        tensors = {name: tensor.contiguous() for name, tensor in flow.state_dict().items()}
        save_file(tensors, staging / "model.safetensors")


def load_flow(directory: str | Path) -> Flow:
    """The flow that ``save_flow`` wrote."""
    directory = existing_directory(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    flow = make_flow(config.pop("flow"), **config)
    flow.load_state_dict(load_file(directory / "model.safetensors"))
    return flow
