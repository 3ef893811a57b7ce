"""What an adapter is: peft's `LoraConfig`, as far as it is served, and its adapter_config.json."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warploom.models.checkpoint import read_config, write_config

CONFIG_NAME = "adapter_config.json"
ALL_LINEAR = "all-linear"
#: Fields of peft's file that change nothing here, whatever they hold.
_IGNORED = {
    "auto_mapping", "inference_mode", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "revision", "runtime_config",
}  # fmt: skip
#: Initialisations that change the base's weight.
BASE_CHANGING = ("pissa", "olora", "loftq")


@dataclass
class LoraConfig:
    """An adapter; names, meanings and defaults are those of peft's `LoraConfig`.

    Attributes:
        r: the rank.
        target_modules: modules that get an adapter: names or their last parts, a regular expression for whole
            names, or "all-linear": every linear layer but the output layer.
        exclude_modules: names or a regular expression of modules that do not.
        lora_alpha: the update is scaled by lora_alpha / r, with `use_rslora` by lora_alpha / sqrt(r).
        lora_dropout: probability with which an element of an update's input is dropped in training.
        bias: which biases are trained: "none", "all", or "lora_only", those of the target modules.
        use_rslora: arXiv:2312.03732.
        use_dora: arXiv:2402.09353.
        modules_to_save: modules that are trained as a whole, and saved with the adapter.
        init_lora_weights: True: B is zero; False: neither; "gaussian"; "pissa" or "pissa_niter_N"
            (arXiv:2404.02948), "olora" (arXiv:2406.01775), "loftq" (arXiv:2310.08659).
        layers_to_transform: only these layers, by their number; beside a list of `target_modules`.
        layers_pattern: what stands before that number in a module's name (default: anything).
        rank_pattern, alpha_pattern: other r and lora_alpha for modules whose names end in a match of the key.
        loftq_config: {"loftq_bits": 4 or 8, "loftq_iter": 1}.
        task_type, base_model_name_or_path: notes for other readers of the file.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    loftq_config: dict[str, int] = field(default_factory=dict)
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                setattr(self, name, list(value))
        self._expect("r", self.r >= 1, "1 or more")
        self._expect("lora_dropout", 0 <= self.lora_dropout < 1, "a probability in [0, 1)")
        self._expect("bias", self.bias in ("none", "all", "lora_only"), "none, all or lora_only")
        known = r"gaussian|olora|loftq|pissa(_niter_\d+)?"
        init = self.init_lora_weights
        self._expect(
            "init_lora_weights",
            isinstance(init, bool) or re.fullmatch(known, init) is not None,
            "True, False, gaussian, pissa, pissa_niter_N, olora or loftq",
        )
        self._expect(
            "target_modules", bool(self.target_modules), f"names, an expression or {ALL_LINEAR!r}"
        )
        by_expression = isinstance(self.target_modules, str)
        self._expect(
            "layers_to_transform",
            self.layers_to_transform is None or not by_expression,
            "None beside an expression",
        )

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(
                f"LoraConfig: {name}: expected {expected}, got {getattr(self, name)!r}"
            )

    @property
    def changes_base(self) -> bool:
        """Whether the initialisation takes something from the base's weight."""
        return str(self.init_lora_weights).startswith(BASE_CHANGING)

    def targets(self, name: str) -> bool:
        """Whether the module of this name gets an adapter; "all-linear" says yes to every name."""
        if self.exclude_modules and matches(self.exclude_modules, name):
            return False
        if any(_is_part(saved, name) for saved in self.modules_to_save or ()):
            return False
        assert self.target_modules is not None
        if isinstance(self.target_modules, str):
            return self.target_modules == ALL_LINEAR or matches(self.target_modules, name)
        return matches(self.target_modules, name) and self._transforms(name)

    def saves(self, name: str) -> bool:
        """Whether the module of this name is trained as a whole."""
        return any(
            name == saved or name.endswith(f".{saved}") for saved in self.modules_to_save or ()
        )

    def rank(self, name: str) -> int:
        rank: int = _pattern_value(self.rank_pattern, name, self.r)
        return rank

    def alpha(self, name: str) -> float:
        alpha: float = _pattern_value(self.alpha_pattern, name, self.lora_alpha)
        return alpha

    def _transforms(self, name: str) -> bool:
        if self.layers_to_transform is None or self.layers_to_transform == []:
            return True
        patterns = (
            [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        )
        for pattern in patterns or [r"[^.]*"]:
            prefix = r"(?:^|.*?\.)" if patterns else r".*?\."
            match = re.match(rf"{prefix}{pattern}\.(\d+)\.", name)
            if match:
                layers = self.layers_to_transform
                return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
        return False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """From peft's fields.

        Raises:
            ValueError: another kind of adapter, or a field that is not served and holds anything but its
                default.
        """
        kind = values.get("peft_type", "LORA")
        if kind != "LORA":
            raise ValueError(f"peft_type: expected LORA, got {kind!r}")
        own = {known.name for known in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in own and name not in _IGNORED and value not in (None, False, [], {}):
                raise ValueError(f"{name}: expected its default, it is not served, got {value!r}")
        given = {name: values[name] for name in own & values.keys() if values[name] is not None}
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """peft's fields."""
        return {"peft_type": "LORA", **dataclasses.asdict(self)}

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> LoraConfig:
        """From the adapter_config.json of a directory; `CheckpointError` names the file."""
        return read_config(Path(directory) / CONFIG_NAME, cls.from_dict)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes adapter_config.json."""
        write_config(Path(directory) / CONFIG_NAME, self.to_dict())


def matches(patterns: str | Iterable[str], name: str) -> bool:
    """Whether the expression matches the whole name, or one of the names is it or its last parts."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _is_part(saved: str, name: str) -> bool:
    """Whether the module `name` is, or lies in, one called `saved`."""
    return re.match(rf"(^|.*\.){saved}($|\..*)", name) is not None


def _pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first key that matches the end of the name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
