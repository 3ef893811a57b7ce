"""The record of a training run: one JSON object per line and step, and the picture of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

from warploom.recipes._extras import require

Record = dict[str, Any]


def read_log(path: Path) -> list[Record]:
    """The records of a log; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class TrainingLog:
    """Appends one record per step to a file that a resumed run continues."""

    def __init__(self, path: Path, last_step: int = 0) -> None:
        """Open ``path`` for appending, after dropping the records of steps after ``last_step``."""
        kept = [record for record in read_log(path) if record["step"] <= last_step]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(partial, path)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def append(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Have everything appended so far on the disk, as a checkpoint that follows needs it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def plot_losses(records: list[Record], path: Path, title: str, label: str) -> None:
    """Draw training loss (``label``; with its running mean), validation loss and learning rate as a PNG."""
    require("matplotlib").use("Agg")
    figure, losses = require("matplotlib.pyplot").subplots(figsize=(8, 4.5), layout="constrained")
    steps = [record["step"] for record in records]
    values = [record["loss"] for record in records]
    losses.plot(
        steps, values, color="tab:blue", alpha=0.3, linewidth=0.8, label="training, each step"
    )
    losses.plot(steps, _running_mean(values), color="tab:blue", label="training, running mean")
    validated = [record for record in records if "validation_loss" in record]
    losses.plot(
        [record["step"] for record in validated],
        [record["validation_loss"] for record in validated],
        color="tab:red",
        marker="o",
        markersize=3,
        label="validation",
    )
    losses.set(xlabel="step", ylabel=label, title=title)
    losses.grid(alpha=0.3)
    rates = losses.twinx()
    rates.plot(
        steps, [record["learning_rate"] for record in records], color="tab:gray", linestyle=":"
    )
    rates.set(ylabel="learning rate (dotted)", ylim=(0, None))
    losses.legend()
    figure.savefig(path, dpi=120)
    require("matplotlib.pyplot").close(figure)


def _running_mean(values: list[float], memory: float = 0.95) -> list[float]:
    """Exponential mean without the start's bias."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total = memory * total + (1.0 - memory) * value
        weight = memory * weight + (1.0 - memory)
        means.append(total / weight)
    return means
