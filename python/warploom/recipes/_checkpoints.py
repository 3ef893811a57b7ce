"""The checkpoints of a training run: whole or absent, never fewer than one once there was one."""

from __future__ import annotations

import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from warploom.models.checkpoint import CheckpointError
from warploom.models.directory import replace_directory

_PREFIX = "step-"
_STATE_FILE = "state.pt"


class Checkpoints:
    """The folder of a run's checkpoints, ``step-<number>/state.pt``; the newest is kept."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return max(self._complete(), default=None)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write ``state`` as the checkpoint of ``step``, then drop the older ones."""
        with replace_directory(self._path(step)) as staging:
            torch.save(state, staging / _STATE_FILE)
        for older in self._complete():
            if older < step:
                shutil.rmtree(self._path(older))

    def load(self, step: int) -> dict[str, Any]:
        """The state saved at ``step``, on the CPU; an unreadable file is named."""
        path = self._path(step) / _STATE_FILE
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, UnpicklingError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        return state

    def _complete(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        suffixes = [
            entry.name.removeprefix(_PREFIX) for entry in self.directory.glob(_PREFIX + "*")
        ]
        return [int(suffix) for suffix in suffixes if suffix.isdecimal()]

    def _path(self, step: int) -> Path:
        return self.directory / f"{_PREFIX}{step:08d}"
