"""Normalizing flows for images and tables: NICE, RealNVP, Glow, neural spline flow."""

from warploom.models.flows.base import Flow, FlowConfig
from warploom.models.flows.checkpoint import FLOWS, load_flow, make_flow, save_flow
from warploom.models.flows.glow import Glow, GlowConfig
from warploom.models.flows.nice import NICE, NICEConfig
from warploom.models.flows.realnvp import RealNVP, RealNVPConfig
from warploom.models.flows.spline_flow import SplineFlow, SplineFlowConfig
from warploom.models.flows.transform import FlowTransform

__all__ = [
    "FLOWS",
    "NICE",
    "Flow",
    "FlowConfig",
    "FlowTransform",
    "Glow",
    "GlowConfig",
    "NICEConfig",
    "RealNVP",
    "RealNVPConfig",
    "SplineFlow",
    "SplineFlowConfig",
    "load_flow",
    "make_flow",
    "save_flow",
]
