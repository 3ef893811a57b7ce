"""Spline flow and RealNVP beside zuko's on scikit-learn's tables, with one budget: held-out likelihood."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from warploom.models.flows import make_flow
from warploom.recipes._config import check_whole_numbers
from warploom.recipes._extras import make_console, require
from warploom.recipes._flow_data import TABLES, FlowData, load_data
from warploom.recipes._progress import progress_bar
from warploom.recipes._training_run import parameter_groups


@dataclass(frozen=True)
class TabularConfig:
    """What all models share; ``warploom flow-tables`` has one option for each field."""

    output: Annotated[Path, "Folder of tables.json."]
    steps: Annotated[int, "Optimiser steps of each model."] = 400
    batch_size: Annotated[int, "Rows of a step."] = 64
    transforms: Annotated[int, "Couplings of each model."] = 4
    hidden: Annotated[int, "Width of the two hidden layers of each coupling."] = 32
    bins: Annotated[int, "Bins of a spline."] = 8
    learning_rate: Annotated[float, "Adam's learning rate."] = 2e-3
    weight_decay: Annotated[float, "AdamW's weight decay, of the matrices only."] = 1e-3
    validate_every: Annotated[
        int, "Steps between two validations; the best one's weights count."
    ] = 25
    seeds: Annotated[int, "Trainings of each model, from other weights and batches."] = 3

    def __post_init__(self) -> None:
        check_whole_numbers("flow-tables", self)


@dataclass(frozen=True)
class TabularResult:
    """Held-out log-likelihood of standardised rows in nats: mean and standard deviation over the seeds."""

    data: str
    model: str
    library: str
    parameters: int
    mean: float
    deviation: float


def compare_tables(config: TabularConfig) -> Path:
    """Train each model on each table and print the results; without zuko only our own models.

    Every training has the same split, steps, batches, optimiser, hidden sizes and number of couplings, and is
    judged by the weights that were best on the validation part.

    Returns: ``config.output / "tables.json"``.
    """
    makers = _makers(config)
    trainings = len(TABLES) * len(makers) * config.seeds
    results = []
    with progress_bar("tables", trainings) as advance:
        for name in TABLES:
            data = load_data(name)
            for (model, library), make in makers.items():
                scores, parameters = [], 0
                for seed in range(config.seeds):
                    score, parameters = _train(config, data, make, seed)
                    scores.append(score)
                    advance(f"{name}, {library}: {score:.2f}")
                results.append(
                    TabularResult(name, model, library, parameters, *_statistics(scores))
                )
    print_results(results)
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / "tables.json"
    path.write_text(
        json.dumps([asdict(result) for result in results], indent=2) + "\n", encoding="utf-8"
    )
    return path


def print_results(results: list[TabularResult]) -> None:
    table = require("rich.table").Table(title="held-out log-likelihood, nats per row")
    for column in ("data", "model", "library", "parameters", "mean", "deviation"):
        table.add_column(
            column, justify="left" if column in ("data", "model", "library") else "right"
        )
    for result in results:
        table.add_row(
            result.data,
            result.model,
            result.library,
            f"{result.parameters:,}",
            f"{result.mean:.2f}",
            f"{result.deviation:.2f}",
        )
    make_console().print(table)


def _makers(config: TabularConfig) -> dict[tuple[str, str], Callable[[int], nn.Module]]:
    """(model, library) -> what makes one of a number of features."""
    shared = {"hidden_features": config.hidden, "hidden_layers": 2}

    def spline(features: int) -> nn.Module:
        return make_flow(
            "spline",
            event_shape=(features,),
            depth=config.transforms,
            num_bins=config.bins,
            tail_bound=5.0,
            **shared,
        )

    def realnvp(features: int) -> nn.Module:
        return make_flow("realnvp", event_shape=(features,), couplings=config.transforms, **shared)

    makers: dict[tuple[str, str], Callable[[int], nn.Module]] = {
        ("spline", "warploom"): spline,
        ("affine", "warploom"): realnvp,
    }
    if importlib.util.find_spec("zuko") is not None:
        peers = require("zuko.flows")
        widths = {
            "transforms": config.transforms,
            "hidden_features": (config.hidden, config.hidden),
        }
        # passes=2: couplings, as ours; zuko's default is autoregressive.
        makers["spline", "zuko"] = lambda features: peers.NSF(
            features, bins=config.bins, passes=2, randperm=True, **widths
        )
        makers["affine", "zuko"] = lambda features: peers.MAF(
            features, passes=2, randperm=True, **widths
        )
    return makers


def _train(
    config: TabularConfig, data: FlowData, make: Callable[[int], nn.Module], seed: int
) -> tuple[float, int]:
    """(held-out log-likelihood of the weights that were best in validation, number of parameters)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make(data.train.shape[1])
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay), lr=config.learning_rate
        )
        best, held_out = -math.inf, math.nan
        for step in range(1, config.steps + 1):
            rows = torch.randint(len(data.train), (config.batch_size,))
            loss = -_log_prob(model, data.train[rows]).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            if step % config.validate_every == 0 or step == config.steps:
                with torch.no_grad():
                    score = _log_prob(model, data.validation).mean().item()
                    if score > best:
                        best, held_out = score, _log_prob(model, data.test).mean().item()
    return held_out, sum(parameter.numel() for parameter in model.parameters())


def _log_prob(model: Any, x: Tensor) -> Tensor:
    """zuko's flows are called with the context and give a distribution."""
    result: Tensor = (model if hasattr(model, "log_prob") else model()).log_prob(x)
    return result


def _statistics(scores: list[float]) -> tuple[float, float]:
    values = torch.tensor(scores, dtype=torch.float64)
    return values.mean().item(), values.std(correction=0).item()
