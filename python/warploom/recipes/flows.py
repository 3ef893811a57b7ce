"""Training of normalizing flows on scikit-learn's own data: digits in bits per dimension, tables in nats.

A run may be killed at any moment and resumed, as ``pretrain``'s.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from warploom.models.flows import FLOWS, Flow, make_flow, save_flow
from warploom.ops._check import check_choice
from warploom.recipes._config import check_whole_numbers
from warploom.recipes._extras import make_console
from warploom.recipes._flow_data import DATA, DIGIT_LEVELS, load_data
from warploom.recipes._flow_pictures import draw_images, interpolations
from warploom.recipes._processes import choose_device
from warploom.recipes._training_run import TrainingRun, parameter_groups, warmup_cosine

#: Fields of the configurations where the recipe differs from the models' defaults.
_IMAGES: dict[str, dict[str, Any]] = {
    "nice": {"couplings": 4, "preprocessing": "logit"},
    "realnvp": {"num_scales": 2, "couplings": 3, "num_blocks": 2, "preprocessing": "logit"},
    "glow": {"num_scales": 2, "depth": 8, "preprocessing": "center"},
    "spline": {"num_scales": 2, "depth": 4, "preprocessing": "center"},
}
_TABLES: dict[str, dict[str, Any]] = {
    "nice": {"couplings": 4, "prior": "normal"},
    "realnvp": {"couplings": 6},
    "spline": {"depth": 4},
}
_VALIDATION_DRAWS = 4
_ROWS = 8


@dataclass(frozen=True)
class FlowRunConfig:
    """All that a run depends on; ``warploom flow`` has one option for each field."""

    output: Annotated[Path, "Folder of the run: log, checkpoints, pictures, model."]
    model: Annotated[str, "nice, realnvp, glow or spline."] = "realnvp"
    data: Annotated[str, "digits, iris, wine, breast_cancer or diabetes."] = "digits"
    resume: Annotated[bool, "Continue the run that is in the output folder."] = False
    steps: Annotated[int, "Optimiser steps in all."] = 2000
    batch_size: Annotated[int, "Samples of a step."] = 64
    hidden: Annotated[int, "Width of the couplings' networks."] = 64
    depth: Annotated[int | None, "Couplings, or steps of a scale; default: the model's."] = None
    num_scales: Annotated[int | None, "Scales of an image; default: the model's."] = None
    conditional: Annotated[bool, "Give the flow the class of each sample."] = False
    reversible: Annotated[bool, "Memory that does not grow with the number of steps."] = False
    learning_rate: Annotated[float, "Peak learning rate."] = 1e-3
    final_learning_rate_ratio: Annotated[float, "Last learning rate as a share of the peak."] = 0.05
    warmup_steps: Annotated[int, "Steps of the linear warmup."] = 50
    weight_decay: Annotated[float, "AdamW's weight decay, of the matrices only."] = 1e-4
    clip_norm: Annotated[float, "Greatest norm of the gradient."] = 50.0
    temperature: Annotated[float, "Factor of the noise of the drawn samples."] = 0.8
    validate_every: Annotated[int, "Steps between two validations."] = 100
    checkpoint_every: Annotated[int, "Steps between two checkpoints."] = 500
    seed: Annotated[int, "Seed of the weights and of the order of the data."] = 0
    device: Annotated[str, "cpu, cuda, or auto: cuda where there is one."] = "auto"

    def __post_init__(self) -> None:
        check_whole_numbers("flow", self)
        check_choice("flow", "model", self.model, FLOWS)
        check_choice("flow", "data", self.data, DATA)
        if not self.is_image and self.model not in _TABLES:
            raise ValueError(f"flow: model: expected one of {', '.join(_TABLES)} for a table")
        if self.conditional and self.data == "diabetes":
            raise ValueError("flow: conditional: diabetes has no classes")

    @property
    def is_image(self) -> bool:
        return self.data == "digits"


def train_flow(config: FlowRunConfig) -> Path:
    """Train a flow.

    Writes into ``config.output``: ``log.jsonl`` (a record per step: step, loss, learning_rate, grad_norm,
    samples_per_second, and validation_loss where there was a validation), ``loss.png``, ``checkpoints/``,
    ``result.json`` and ``model/``; of digits ``samples.png`` and ``interpolations.png`` too. The losses are
    bits per dimension for digits and nats per sample for standardised tables. ``result.json`` holds those of
    the three parts of the data; of digits the mean over draws of the dequantisation.

    Returns: ``model/``, which ``warploom.models.flows.load_flow`` reads.

    Raises:
        FileExistsError: the output folder holds a run and ``config.resume`` is not set.
        ValueError: the run in the output folder was started with other settings.
        FloatingPointError: the loss or the gradient is no longer finite.
    """
    return _Run(config).train()


def build_flow(config: FlowRunConfig, event_shape: tuple[int, ...], num_classes: int) -> Flow:
    """The untrained flow of a run."""
    chosen: dict[str, Any] = dict((_IMAGES if config.is_image else _TABLES)[config.model])
    names = {field.name for field in fields(FLOWS[config.model][0])}
    if config.is_image:
        chosen["levels"] = DIGIT_LEVELS
    if config.depth is not None:
        chosen["depth" if "depth" in names else "couplings"] = config.depth
    if config.num_scales is not None and "num_scales" in names:
        chosen["num_scales"] = config.num_scales
    chosen |= {
        name: config.hidden for name in ("hidden_channels", "hidden_features") if name in names
    }
    if config.conditional:
        chosen |= {"num_classes": num_classes, "context_features": num_classes}
    return make_flow(config.model, event_shape=event_shape, reversible=config.reversible, **chosen)


class _Run(TrainingRun):
    name = "flow"
    title = "Flow"
    free_fields = frozenset({"output", "resume", "checkpoint_every", "temperature"})
    counted = "samples"
    packages = ("rich", "matplotlib", "sklearn")

    def __init__(self, config: FlowRunConfig) -> None:
        self.loss_label = "bits per dimension" if config.is_image else "nats per sample"  # type: ignore[misc]
        super().__init__(config, "model")
        self.steps = config.steps
        self.device = choose_device(config.device)
        self.data = load_data(config.data)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            flow = build_flow(config, self.data.event_shape, self.data.num_classes)
            self.model: Flow = flow.to(self.device).train()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay), lr=config.learning_rate
        )

    def learning_rate_at(self, step: int) -> float:
        config = self.config
        return warmup_cosine(
            step,
            config.steps,
            peak=config.learning_rate,
            warmup_steps=config.warmup_steps,
            final_ratio=config.final_learning_rate_ratio,
        )

    def accumulate(self) -> tuple[Tensor, int]:
        rows = torch.randint(len(self.data.train), (self.config.batch_size,))
        loss = self._loss(self.data.train[rows], _rows(self.data.train_labels, rows)).mean()
        loss.backward()
        return loss.detach(), len(rows)

    def validate(self) -> float:
        return self._mean_loss(self.data.validation, self.data.validation_labels)

    def inputs(self) -> dict[str, Any]:
        return {}

    def save_result(self) -> None:
        data, config = self.data, self.config
        result = {
            "train": self._mean_loss(data.train, data.train_labels),
            "validation": self._mean_loss(data.validation, data.validation_labels),
            "test": self._mean_loss(data.test, data.test_labels),
            "unit": self.loss_label,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }
        text = json.dumps(result, indent=2) + "\n"
        (config.output / "result.json").write_text(text, encoding="utf-8")
        if config.is_image:
            self._draw()
        save_flow(self.model, self.result)
        make_console().print(
            f"{self.loss_label}: training {result['train']:.3f}, validation "
            f"{result['validation']:.3f}, test {result['test']:.3f}",
            highlight=False,
        )

    def _loss(
        self, x: Tensor, labels: Tensor | None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Bits per dimension, or negative log-likelihood in nats: [B]."""
        x = x.to(self.device)
        context = labels.to(self.device) if self.config.conditional and labels is not None else None
        if self.config.is_image:
            return self.model.bits_per_dim(x, context, generator)
        return -self.model.log_prob(x, context)

    @torch.no_grad()
    def _mean_loss(self, x: Tensor, labels: Tensor | None) -> float:
        """Over all of x; of images with the same draws of the dequantisation each time."""
        self.model.eval()
        generator = torch.Generator(self.device).manual_seed(0)
        draws = _VALIDATION_DRAWS if self.config.is_image else 1
        losses = [
            self._loss(part, _rows(labels, rows), generator)
            for _ in range(draws)
            for rows, part in zip(torch.arange(len(x)).split(256), x.split(256), strict=True)
        ]
        self.model.train()
        return torch.cat(losses).mean().item()

    def _draw(self) -> None:
        """Samples, a class a column where there are classes, and the way from digits to others."""
        flow, config = self.model.eval(), self.config
        columns = 10
        labels = torch.arange(columns, device=self.device).repeat(_ROWS)
        context = labels if config.conditional else None
        generator = torch.Generator(self.device).manual_seed(config.seed)
        samples = flow.sample(_ROWS * columns, config.temperature, context, generator)
        draw_images(
            flow.quantize(samples),
            config.output / "samples.png",
            columns=columns,
            levels=DIGIT_LEVELS,
            title=f"{config.model}: samples, temperature {config.temperature:g}",
        )
        first, second = self.data.test.to(self.device)[: 2 * _ROWS].split(_ROWS)
        classes = None
        if config.conditional and self.data.test_labels is not None:
            classes = self.data.test_labels[:_ROWS].to(self.device)
        draw_images(
            interpolations(flow, first, second, classes),
            config.output / "interpolations.png",
            columns=9,
            levels=DIGIT_LEVELS,
            title=f"{config.model}: between held-out digits",
        )


def _rows(labels: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if labels is None else labels[rows]
