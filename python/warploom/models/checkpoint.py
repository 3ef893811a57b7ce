"""Weight and config files of model directories.

Reading opens every file first, compares names and shapes with the module, and only then takes
one tensor after the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Config = TypeVar("Config")

_SAFETENSORS = "model.safetensors"
_PYTORCH = "pytorch_model.bin"
_INDEX_SUFFIX = ".index.json"
_LISTED = 8  # tensors named in an error message
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class CheckpointError(ValueError):
    """A checkpoint that does not hold what it should; the message names files and tensors."""


class WeightSource(Protocol):
    """Named tensors of a checkpoint, read when they are asked for."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, without reading its data."""

    def where(self, name: str) -> str:
        """The file that holds `name`, for messages."""

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU; it may share memory with the file."""


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt", device="cpu")  # type: ignore[no-untyped-call]
            names = self._file.keys()
            self._shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise CheckpointError(f"{path}: truncated or no safetensors file: {error}") from error

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def where(self, name: str) -> str:
        return self.path.name

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


class _PyTorchFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = load_pytorch_file(path)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def where(self, name: str) -> str:
        return self.path.name

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


class _ShardedFiles:
    """The files that an index names; the index and the files must say the same."""

    def __init__(self, index: Path, open_file: Callable[[Path], WeightSource]) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: expected a 'weight_map' object, got {weight_map!r}")
        self._files: dict[str, WeightSource] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._holders: dict[str, WeightSource] = {}
        for file_name in sorted(set(weight_map.values())):
            path = index.parent / file_name
            if not path.is_file():
                raise FileNotFoundError(f"{path}: named by {index.name}, but not there")
            source = self._files[file_name] = open_file(path)
            listed = {name for name, holder in weight_map.items() if holder == file_name}
            absent = listed - source.shapes().keys()
            if absent:
                raise CheckpointError(
                    f"{path}: missing tensors that {index.name} lists: {_enumerate(absent)}"
                )
            for name, shape in source.shapes().items():
                self._holders[name], self._shapes[name] = source, shape

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def where(self, name: str) -> str:
        return self._holders[name].where(name)

    def read(self, name: str) -> Tensor:
        return self._holders[name].read(name)


def _enumerate(names: set[str] | Sequence[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else ""
    return ", ".join(ordered[:_LISTED]) + more


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError names the file when it is cut or no object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: truncated or no JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def read_config(path: Path, parse: Callable[[Mapping[str, Any]], Config]) -> Config:
    """A config file through `parse`; what `parse` refuses is said with the file's name."""
    values = read_json(path)
    try:
        return parse(values)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_pytorch_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch.save file, memory-mapped where its format allows, never unpickling
    anything but tensors and containers."""
    try:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: truncated or no PyTorch weights: {error}") from error
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: expected a dict of tensors, got {type(tensors).__name__}")
    return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, on the CPU."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or no safetensors file: {error}") from error
    return tensors


def compare_tensors(
    where: str | Path, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> None:
    """CheckpointError, naming tensors, where names or shapes differ."""
    problems = [f"missing tensor {name}" for name in sorted(expected.keys() - given.keys())]
    problems += [f"unexpected tensor {name}" for name in sorted(given.keys() - expected.keys())]
    problems += [
        f"{name}: expected shape {tuple(expected[name].shape)}, got {tuple(given[name].shape)}"
        for name in sorted(expected.keys() & given.keys())
        if expected[name].shape != given[name].shape
    ]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise CheckpointError(f"{where}: " + "; ".join(problems[:_LISTED]) + more)


def open_weights(directory: Path) -> WeightSource:
    """The weights of a transformers directory: safetensors before .bin, one file before many."""
    openers: list[tuple[str, Callable[[Path], WeightSource]]] = [
        (_SAFETENSORS, _SafetensorsFile),
        (_PYTORCH, _PyTorchFile),
    ]
    for name, open_file in openers:
        if (directory / name).is_file():
            return open_file(directory / name)
        index = directory / (name + _INDEX_SUFFIX)
        if index.is_file():
            return _ShardedFiles(index, open_file)
    raise FileNotFoundError(
        f"{directory}: expected {_SAFETENSORS}, {_PYTORCH} or the index of one, got "
        f"{_enumerate([entry.name for entry in directory.iterdir()]) or 'an empty directory'}"
    )


def assign_weights(
    module: nn.Module,
    source: WeightSource,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    aliases: Mapping[str, str] | None = None,
    ignored: Sequence[str] = (),
) -> None:
    """Gives every parameter and persistent buffer of a module on the meta device its tensor from `source`.

    Args:
        dtype: floating dtype of the parameters; None keeps what is stored, as buffers always do.
        aliases: second names of tied parameters; one is read only where the first is absent.
        ignored: patterns (whole names) of tensors that may be there and are not used.

    Raises:
        CheckpointError: naming missing, unexpected and wrongly shaped tensors; nothing has been
            assigned then.
    """
    aliases = aliases or {}
    shapes = dict(source.shapes())
    stored_name = {name: name for name in shapes}
    for alias, name in aliases.items():
        if alias in shapes:
            if name not in shapes:
                shapes[name], stored_name[name] = shapes[alias], alias
            del shapes[alias]
    parameters = dict(module.named_parameters())
    buffers = dict(module.named_buffers())
    persistent = buffers.keys() & module.state_dict().keys()
    expected = {**parameters, **{name: buffers[name] for name in sorted(persistent)}}
    missing = expected.keys() - shapes.keys()
    unexpected = {
        name
        for name in shapes.keys() - expected.keys()
        if not any(re.fullmatch(pattern, name) for pattern in ignored)
    }
    wrong = [
        f"{name} in {source.where(stored_name[name])}: expected shape "
        f"{tuple(expected[name].shape)}, got {shapes[name]}"
        for name in sorted(expected.keys() & shapes.keys())
        if tuple(expected[name].shape) != shapes[name]
    ]
    problems = []
    if missing:
        problems.append(f"missing tensors: {_enumerate(missing)}")
    if unexpected:
        holders = _enumerate({source.where(stored_name[name]) for name in unexpected})
        problems.append(f"unexpected tensors (in {holders}): {_enumerate(unexpected)}")
    if wrong:
        more = f" and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        problems.append("; ".join(wrong[:_LISTED]) + more)
    if problems:
        holders = _enumerate({source.where(name) for name in source.shapes()}) or "no tensors"
        raise CheckpointError(f"checkpoint ({holders}): " + "; ".join(problems))
    for name, held in expected.items():
        tensor = source.read(stored_name[name])
        cast = name in parameters and dtype is not None and tensor.is_floating_point()
        tensor = tensor.to(device=device, dtype=dtype if cast else None, copy=True).contiguous()
        owner, _, leaf = name.rpartition(".")
        value = nn.Parameter(tensor, held.requires_grad) if name in parameters else tensor
        setattr(module.get_submodule(owner), leaf, value)


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "200MiB" or a plain number; at least 1."""
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", size)
        unit = match and _UNITS.get(match[2].upper(), 1 if match[2] in ("", "B") else None)
        if not match or unit is None:
            raise ValueError(f"max_shard_size: expected bytes or a size as '5GB', got {size!r}")
        size = int(float(match[1]) * unit)
    if size < 1:
        raise ValueError(f"max_shard_size: expected a positive size, got {size}")
    return size


def write_config(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_safetensors(directory: Path, tensors: Mapping[str, Tensor], max_shard_size: int) -> None:
    """model.safetensors, or shards of at most `max_shard_size` bytes with their index.

    A tensor larger than that has a shard of its own.
    """
    shards: list[dict[str, Tensor]] = [{}]
    filled = total = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > max_shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled, total = filled + size, total + size
    count = len(shards)
    names = [_SAFETENSORS] if count == 1 else []
    names = names or [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        owned = {key: tensor.contiguous() for key, tensor in shard.items()}
        save_file(owned, directory / name, metadata={"format": "pt"})
    if count > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_config(directory / (_SAFETENSORS + _INDEX_SUFFIX), index)
