"""The adapter nearest to what a full fine-tuning changed, by the singular values of each difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from warploom.lora.config import LoraConfig
from warploom.models.checkpoint import WeightSource, open_weights
from warploom.models.directory import existing_directory, replace_directory

_SMALL = 1024  # up to this the whole decomposition costs next to nothing
_OVERSAMPLING = 16
_ITERATIONS = 4
_WEIGHT = ".weight"


@dataclass(frozen=True)
class ExtractedLayer:
    """One matrix of the decoder's layers, or the head.

    Attributes:
        name: the module's.
        rank: of its part of the adapter; 0 where nothing changed.
        norm: Frobenius norm of the difference.
        energy: the share of norm^2 that the adapter has, 1 where nothing changed.
    """

    name: str
    rank: int
    norm: float
    energy: float


@dataclass(frozen=True)
class Extraction:
    """The layers, and the norms of the changes that the adapter leaves out (norms, embedding, experts)."""

    layers: list[ExtractedLayer]
    left_behind: dict[str, float]

    @property
    def energy(self) -> float:
        """The share of all matrices' squared differences that the adapter has."""
        total = sum(layer.norm**2 for layer in self.layers)
        kept = sum(layer.energy * layer.norm**2 for layer in self.layers)
        return kept / total if total else 1.0


def low_rank_factors(
    delta: Tensor, *, rank: int | None = None, energy: float | None = None
) -> tuple[Tensor, Tensor, float]:
    """The best approximation of a matrix by B A: A [R, K], B [N, R] of equal norms, and the energy kept.

    With singular values s the energy of rank R is sum_{i <= R} s_i^2 / ||delta||_F^2 (Eckart, Young 1936).
    A rank asked of a large matrix is found by a randomised decomposition with power iterations (Halko et
    al., arXiv:0909.4061, algorithm 4.4), drawn alike in every call; everything else by the whole one.

    Args:
        delta: [N, K], floating; computed in float32 or wider.
        rank: most rank R; the numerical rank where that is lower.
        energy: in (0, 1], the least energy of the lowest rank; exactly one of the two is given.
    """
    if (rank is None) == (energy is None):
        raise ValueError("low_rank_factors: rank, energy: expected one of them, got both or none")
    if rank is not None and rank < 1:
        raise ValueError(f"low_rank_factors: rank: expected 1 or more, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"low_rank_factors: energy: expected a share in (0, 1], got {energy}")
    delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
    shorter = min(delta.shape)
    if rank is not None and shorter > max(_SMALL, rank + _OVERSAMPLING):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            q = rank + _OVERSAMPLING
            left, values, right = torch.svd_lowrank(delta, q=q, niter=_ITERATIONS)
        right = right.mT
    else:
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
    squares = values.double().square()
    whole = delta.double().square().sum()
    if whole == 0:
        return delta.new_empty(0, delta.shape[1]), delta.new_empty(delta.shape[0], 0), 1.0
    tolerance = values[0] * shorter * torch.finfo(delta.dtype).eps
    numerical = int((values > tolerance).sum())
    if rank is None:
        assert energy is not None
        reached = squares.cumsum(0) >= energy * whole * (1 - 1e-12)
        rank = int(reached.int().argmax()) + 1 if bool(reached.any()) else numerical
    rank = min(rank, numerical)
    root = values[:rank].sqrt()
    kept = min(1.0, float(squares[:rank].sum() / whole))
    return root[:, None] * right[:rank], left[:, :rank] * root, kept


def extract_lora(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    device: torch.device | str = "cpu",
) -> Extraction:
    """Saves tuned - base as an adapter that `load_adapter` and peft read, one matrix in memory at a time.

    Taken are the matrices of the decoder's layers and the head where it is not the embedding's; a matrix that
    did not change gets no adapter. Every layer has the rank that it needs, and scaling 1.

    Args:
        base, tuned: model directories of one shape.
        output: the adapter's directory; files of other names in it stay.
        rank: of each layer, at most; or
        energy: the least share of each difference's energy.
        device: where the decompositions run.

    Raises:
        ValueError: tensors of other names or shapes, or models that do not differ in any matrix.
    """
    base, tuned = existing_directory(base), existing_directory(tuned)
    before, after = open_weights(base), open_weights(tuned)
    if before.shapes() != after.shapes():
        other = dict(before.shapes().items() ^ after.shapes().items())
        raise ValueError(
            f"extract_lora: tuned: expected the tensors of {base}, got others in {tuned}: "
            f"{', '.join(sorted(other)[:8])}"
        )
    layers: list[ExtractedLayer] = []
    tensors: dict[str, Tensor] = {}
    left_behind: dict[str, float] = {}
    for name, delta in _differences(before, after):
        module = name.removesuffix(_WEIGHT)
        if not _is_matrix(name, delta.shape):
            if norm := delta.norm().item():
                left_behind[name] = norm
            continue
        lora_a, lora_b, kept = low_rank_factors(delta.to(device), rank=rank, energy=energy)
        layers.append(ExtractedLayer(module, len(lora_a), delta.norm().item(), kept))
        if len(lora_a):
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = lora_a.cpu().contiguous()
            tensors[f"{prefix}.lora_B.weight"] = lora_b.cpu().contiguous()
    if not tensors:
        raise ValueError(
            f"extract_lora: tuned: expected other matrices than {base} has, got the same"
        )
    config = _config([layer for layer in layers if layer.rank], base)
    with replace_directory(output, drop=lambda name: name.startswith("adapter_")) as staging:
        config.save_pretrained(staging)
        save_file(tensors, staging / "adapter_model.safetensors", metadata={"format": "pt"})
    return Extraction(layers, left_behind)


def _differences(before: WeightSource, after: WeightSource) -> Iterator[tuple[str, Tensor]]:
    """tuned - base of every floating tensor, in float32 or wider."""
    for name in sorted(before.shapes()):
        old, new = before.read(name), after.read(name)
        if old.is_floating_point():
            wide = torch.promote_types(torch.promote_types(old.dtype, new.dtype), torch.float32)
            yield name, new.to(wide) - old.to(wide)


def _is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether this is a linear layer's: no embedding, router or expert."""
    other = ("embed", ".mlp.gate.", ".experts.")
    return len(shape) == 2 and name.endswith(_WEIGHT) and not any(part in name for part in other)


def _config(layers: Sequence[ExtractedLayer], base: Path) -> LoraConfig:
    """Every layer by its whole name, those of another rank than the most common one by a pattern."""
    ranks = [layer.rank for layer in layers]
    common = max(sorted(set(ranks)), key=ranks.count)
    other = {layer.name: layer.rank for layer in layers if layer.rank != common}
    return LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules=[layer.name for layer in layers],
        rank_pattern=other,
        alpha_pattern={name: float(rank) for name, rank in other.items()},
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    )
