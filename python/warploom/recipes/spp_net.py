"""SPP-Net on data that ships with scikit-learn and scikit-image: digits of several sizes, and coins.

He et al. (arXiv:1406.4729). Both are small: the digits show that one network serves sizes it was never
trained on, the coins (24 objects in one photograph) that the whole detector learns; neither is a benchmark.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors.torch import save_file
from torch import nn

from warploom.ops._check import check_choice
from warploom.recipes._config import check_whole_numbers
from warploom.recipes._extras import require
from warploom.recipes._processes import choose_device
from warploom.recipes._progress import progress_bar
from warploom.recipes._spp_coins import CoinsTask
from warploom.recipes._spp_digits import DigitsTask
from warploom.recipes._training_log import Record, TrainingLog, read_log
from warploom.recipes._training_run import parameter_groups, warmup_cosine

TASKS = ("digits", "coins")
Task = DigitsTask | CoinsTask


@dataclass(frozen=True)
class SPPNetConfig:
    """All that a run depends on; ``warploom spp-net`` has one option for each field."""

    output: Annotated[Path, "Folder of the run: log, picture, result, weights."]
    task: Annotated[str, "digits: classify at several sizes; coins: detect."] = "digits"
    steps: Annotated[int, "Optimiser steps."] = 400
    sizes: Annotated[str, "digits: sides to train on, with commas between them."] = "8,12,16"
    unseen_sizes: Annotated[str, "digits: sides to test on only."] = "10,20"
    batch_size: Annotated[int, "digits: images of a step."] = 64
    regions: Annotated[int, "coins: proposals of a step."] = 128
    learning_rate: Annotated[float, "Peak learning rate of AdamW."] = 2e-3
    weight_decay: Annotated[float, "AdamW's weight decay, of the matrices only."] = 0.05
    clip_norm: Annotated[float, "Greatest norm of the gradient."] = 5.0
    validate_every: Annotated[int, "Steps between two evaluations."] = 100
    seed: Annotated[int, "Seed of the weights, the split and the order of the data."] = 0
    device: Annotated[str, "cpu, cuda, or auto: cuda where there is one."] = "auto"

    def __post_init__(self) -> None:
        check_choice("spp-net", "task", self.task, TASKS)
        check_whole_numbers("spp-net", self)
        sides(self.sizes, "sizes")
        if self.unseen_sizes:
            sides(self.unseen_sizes, "unseen_sizes")


def sides(text: str, name: str) -> list[int]:
    """ "8,12" -> [8, 12]."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"spp-net: {name}: expected sides such as 8,12,16, got {text!r}")
    return [int(part) for part in parts]


def spp_net(config: SPPNetConfig) -> Path:
    """Train a network on a task and test it.

    Writes into ``config.output``: ``log.jsonl`` (a record per step: step, loss, learning_rate, grad_norm,
    steps_per_second, and the test's figures where there was a test), ``result.json`` (the settings, and the
    figures at the end), ``model.safetensors`` and ``spp.png``.

    Returns: ``spp.png``.

    Raises:
        FileExistsError: the output folder holds a run.
        FloatingPointError: the loss or the gradient is no longer finite.
    """
    task, results = train(config)
    pyplot = _pyplot()
    figure, (losses, shown) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    records = read_log(config.output / "log.jsonl")
    losses.plot([record["step"] for record in records], [record["loss"] for record in records])
    losses.set(xlabel="step", ylabel="training loss", title=task.title)
    losses.grid(alpha=0.3)
    task.draw(shown, results)
    picture = config.output / "spp.png"
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    return picture


def train(config: SPPNetConfig) -> tuple[Task, dict[str, float]]:
    """As `spp_net`, without the picture: the trained task, and its figures."""
    for package in ("rich", "matplotlib", "sklearn" if config.task == "digits" else "skimage"):
        require(package)  # a run must not end for want of what draws its picture
    log_path = config.output / "log.jsonl"
    if log_path.exists():
        raise FileExistsError(f"spp-net: output: {config.output} holds a run; name another folder")
    config.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, float] = {}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        task = _make_task(config)
        optimizer = torch.optim.AdamW(parameter_groups(task.model, config.weight_decay))
        with (
            closing(TrainingLog(log_path)) as log,
            progress_bar(task.title, config.steps) as advance,
        ):
            for step in range(1, config.steps + 1):
                record = _train_step(config, task, optimizer, step)
                line = None
                if step % config.validate_every == 0 or step == config.steps:
                    task.model.eval()
                    results = task.evaluate()
                    task.model.train()
                    record |= results
                    figures = ", ".join(f"{name} {value:.3f}" for name, value in results.items())
                    line = f"step {step}/{config.steps}: loss {record['loss']:.3f}, {figures}"
                log.append(record)
                advance(f"loss {record['loss']:.3f}", line)
    task.model.eval()
    save_file(task.model.state_dict(), config.output / "model.safetensors")
    written = {"settings": asdict(config), "results": results}
    text = json.dumps(written, indent=1, default=str)
    (config.output / "result.json").write_text(text + "\n", encoding="utf-8")
    return task, results


def _make_task(config: SPPNetConfig) -> Task:
    device = choose_device(config.device)
    if config.task == "coins":
        return CoinsTask(config.regions, config.seed, device)
    unseen = sides(config.unseen_sizes, "unseen_sizes") if config.unseen_sizes else []
    return DigitsTask(sides(config.sizes, "sizes"), unseen, config.batch_size, config.seed, device)


def _train_step(
    config: SPPNetConfig, task: Task, optimizer: torch.optim.Optimizer, step: int
) -> Record:
    """One optimiser step; returns its record for the log."""
    start = time.perf_counter()
    rate = warmup_cosine(
        step,
        config.steps,
        peak=config.learning_rate,
        warmup_steps=config.steps // 20,
        final_ratio=0.01,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = task.loss()
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(task.model.parameters(), config.clip_norm)
    value, grad_norm = loss.item(), norm.item()
    if not (math.isfinite(value) and math.isfinite(grad_norm)):
        raise FloatingPointError(
            f"spp-net: step {step}: loss {value}, gradient norm {grad_norm}: expected finite "
            f"numbers; lower the learning rate ({rate:g})"
        )
    optimizer.step()
    optimizer.zero_grad()
    return {
        "step": step,
        "loss": value,
        "learning_rate": rate,
        "grad_norm": grad_norm,
        "steps_per_second": round(1 / (time.perf_counter() - start), 2),
    }


def _pyplot() -> Any:
    require("matplotlib").use("Agg")
    return require("matplotlib.pyplot")
