"""What pretraining and fine-tuning share: steps, log, checkpoints, the picture, and going on after a kill."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from warploom.recipes import _processes as processes
from warploom.recipes._checkpoints import Checkpoints
from warploom.recipes._extras import require
from warploom.recipes._progress import progress_bar
from warploom.recipes._training_log import Record, TrainingLog, plot_losses, read_log


def warmup_cosine(
    step: int, steps: int, *, peak: float, warmup_steps: int, final_ratio: float
) -> float:
    """The learning rate of optimiser step ``step`` (from 1): linear warmup, then half a cosine.

    It is the peak at the end of the warmup and ``final_ratio`` of the peak at step ``steps``.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (final_ratio + (1.0 - final_ratio) * cosine)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups: weight decay on matrices, none on vectors (the norms' weights)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class TrainingRun(ABC):
    """A training run between its start, or its last checkpoint, and its end.

    It writes into ``config.output``: ``log.jsonl`` (a record per step), ``loss.png``, ``checkpoints/`` and,
    at the end, the result. A recipe makes ``model`` and ``optimizer`` after this class's ``__init__``.

    Args:
        config: a dataclass with output, resume, learning_rate, clip_norm, validate_every,
            checkpoint_every and seed.
        result: name in the output folder of what is there at the end.
    """

    #: The recipe's name, for messages, and the title of the picture.
    name: ClassVar[str]
    title: ClassVar[str]
    #: Fields of the config that may differ when a run is resumed: they do not change what it computes.
    free_fields: ClassVar[frozenset[str]]
    #: What the loss is, what a step reads, and the packages that the run needs.
    loss_label: ClassVar[str] = "cross entropy (nats per token)"
    counted: ClassVar[str] = "tokens"
    packages: ClassVar[tuple[str, ...]] = ("tokenizers", "rich", "matplotlib")

    model: Any
    optimizer: torch.optim.Optimizer
    device: torch.device
    steps: int

    def __init__(self, config: Any, result: str) -> None:
        for package in self.packages:
            require(package)  # a run must not end for want of what draws its picture
        self.config = config
        self.rank, self.world_size = processes.place()
        self.checkpoints = Checkpoints(config.output / "checkpoints")
        self.log_path = config.output / "log.jsonl"
        self.result = config.output / result
        if not config.resume and (self.log_path.exists() or self.checkpoints.latest() is not None):
            raise FileExistsError(
                f"{self.name}: output: {config.output} holds a run; resume it or name another folder"
            )
        processes.wait()
        config.output.mkdir(parents=True, exist_ok=True)
        self.position = 0  # samples read so far

    @abstractmethod
    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""

    @abstractmethod
    def accumulate(self) -> tuple[Tensor, int]:
        """The forward and backward passes of a step: (mean loss without gradient, tokens or samples read)."""

    @abstractmethod
    def validate(self) -> float | None:
        """The validation loss, where there is one."""

    @abstractmethod
    def inputs(self) -> dict[str, Any]:
        """What names the run's data and models, beside its settings."""

    @abstractmethod
    def save_result(self) -> None:
        """Put the result in place in one step: then the run is complete."""

    def train(self) -> Path:
        config = self.config
        with torch.random.fork_rng():
            torch.manual_seed(config.seed + 1_000_003 * self.rank)
            done = self._restore()
            result: Path = self.result
            if result.exists():
                return result
            is_first = self.rank == 0
            with (
                closing(TrainingLog(self.log_path, done)) if is_first else nullcontext() as log,
                progress_bar(self.title, self.steps, done, silent=not is_first) as advance,
            ):
                for step in range(done + 1, self.steps + 1):
                    record = self._train_step(step)
                    if step % config.validate_every == 0 or step == self.steps:
                        validated = self.validate()
                        if validated is not None:
                            record["validation_loss"] = validated
                    if log is not None:
                        log.append(record)
                    if step % config.checkpoint_every == 0 or step == self.steps:
                        self._save(step, log)
                    advance(*self._shown(record))
        if self.rank == 0:
            picture = config.output / "loss.png"
            plot_losses(read_log(self.log_path), picture, self.title, self.loss_label)
        self.save_result()
        return result

    def _train_step(self, step: int) -> Record:
        """One optimiser step; returns its record for the log."""
        start = time.perf_counter()
        rate = self.learning_rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, count = self.accumulate()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, self.config.clip_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        mean_loss, grad_norm = loss.item(), norm.item()
        if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
            raise FloatingPointError(
                f"{self.name}: step {step}: loss {mean_loss}, gradient norm {grad_norm}: "
                f"expected finite numbers; lower the learning rate ({rate:g})"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {
            "step": step,
            "loss": mean_loss,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            f"{self.counted}_per_second": round(count / (time.perf_counter() - start), 1),
        }

    def _shown(self, record: Record) -> tuple[str, str | None]:
        """A record beside the progress bar, and on a line of its own where there was a validation."""
        loss = f"loss {record['loss']:.3f}"
        speed = f"{record[f'{self.counted}_per_second']:.0f} {self.counted}/s"
        line = None
        if record["step"] % self.config.validate_every == 0 or record["step"] == self.steps:
            validated = record.get("validation_loss")
            more = "" if validated is None else f"validation {validated:.3f}, "
            line = f"step {record['step']}/{self.steps}: {loss}, {more}{speed}"
        return f"{loss}, {speed}", line

    def trained_tensors(self) -> dict[str, Tensor]:
        """What of the model's state changes in training."""
        state: dict[str, Tensor] = self.model.state_dict()
        return state

    def _save(self, step: int, log: TrainingLog | None) -> None:
        """All that the rest of the run depends on; the learning rate is a function of the step."""
        if self.world_size > 1:
            model, optimizer = processes.gather_state(self.model, self.optimizer)
        else:
            model, optimizer = self.trained_tensors(), self.optimizer.state_dict()
        on_gpu = self.device.type == "cuda"
        rng = (torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if on_gpu else None)
        state = {
            "step": step,
            "position": self.position,
            "model": model,
            "optimizer": optimizer,
            "rng": processes.from_all(rng),
            "settings": self._settings(),
        }
        if log is not None:
            log.sync()
            self.checkpoints.save(step, state)
        processes.wait()

    def _settings(self) -> dict[str, Any]:
        settings = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self.config).items()
            if name not in self.free_fields
        }
        processes_now = {} if self.world_size == 1 else {"processes": self.world_size}
        return settings | processes_now | self.inputs() | {"device": self.device.type}

    def _restore(self) -> int:
        """Take up the newest checkpoint, if there is one; returns the number of steps done."""
        step = self.checkpoints.latest()
        if step is None:
            return 0
        state = self.checkpoints.load(step)
        settings = self._settings()
        for name in settings.keys() | state["settings"].keys():
            saved, given = state["settings"].get(name), settings.get(name)
            if saved != given:
                raise ValueError(
                    f"{self.name}: {name}: {self.config.output} began with {saved!r}, got {given!r}"
                )
        if self.world_size > 1:
            processes.spread_state(self.model, self.optimizer, state["model"], state["optimizer"])
        else:
            self.model.load_state_dict(state["model"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
        cpu, cuda = state["rng"][self.rank]
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self.device)
        self.position = state["position"]
        return step
