"""What all flows share: scales of invertible steps, the latent they leave, densities, samples, bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warploom.models.flows.latent import LatentSplit
from warploom.models.flows.preprocessing import PREPROCESSING, Preprocessing
from warploom.nn.reversible_stack import reversible

_PRIORS = ("normal", "logistic")


@dataclass(kw_only=True)
class FlowConfig:
    """Fields of every flow.

    Args:
        event_shape: of a sample: (channels, height, width), or (features,) for a table.
        context_features: length of the vector that conditions the flow; 0: unconditional.
        num_classes: classes whose embeddings, of context_features, condition it; 0: the context is a vector.
        levels: values a pixel takes, 0 to levels - 1; 2**bits, for ``bits_per_dim``.
        preprocessing: what is done to data first: "none", "center" or "logit" (``Preprocessing``).
        alpha: margin of "logit".
        prior: of the latent: "normal" or "logistic".
        reversible: train in memory that does not grow with the number of steps (``warploom.nn.reversible``).
    """

    name: ClassVar[str]

    event_shape: tuple[int, ...]
    context_features: int = 0
    num_classes: int = 0
    levels: int = 256
    preprocessing: str = "none"
    alpha: float = 0.05
    prior: str = "normal"
    reversible: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(getattr(self, field.name), list):  # as JSON has tuples
                setattr(self, field.name, tuple(getattr(self, field.name)))
        if len(self.event_shape) not in (1, 3) or min(self.event_shape) < 1:
            raise ValueError(
                f"event_shape: expected (features,) or (channels, height, width), got "
                f"{self.event_shape}"
            )
        for name, choices in (("preprocessing", PREPROCESSING), ("prior", _PRIORS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if self.num_classes and not self.context_features:
            raise ValueError("context_features: expected the embedding's length of the classes")

    def check_squeezes(self, num_scales: int) -> None:
        """Errors unless the image can be squeezed ``num_scales`` times."""
        factor = 2**num_scales
        if len(self.event_shape) != 3 or any(size % factor for size in self.event_shape[1:]):
            raise ValueError(
                f"event_shape: expected an image with sides that {factor} divides, got "
                f"{self.event_shape}"
            )


class Chain(nn.Module):
    """Invertible layers one after another, with the interface and the names of ``reversible``."""

    layers: Any

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run((layer for layer in self.layers), x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run((layer.inverse for layer in reversed(self.layers)), z, context)

    @staticmethod
    def _run(
        maps: Iterable[Callable[..., tuple[Tensor, Tensor]]], x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        total = None
        for function in maps:
            x, log_det = function(x, context)
            total = log_det if total is None else total + log_det
        assert total is not None
        return x, total


class Scale(nn.Module):
    """Steps, then a part of the result that leaves as latent; the rest goes on to the next scale.

    Args:
        steps: modules with forward(x, context) -> (z, log_det) and inverse.
        split: what leaves.
        shape: of one sample of what leaves, [channels, *spatial].
    """

    steps: Any

    def __init__(
        self, steps: Iterable[nn.Module], split: LatentSplit, shape: Sequence[int], *, thrifty: bool
    ) -> None:
        super().__init__()
        self.steps = reversible(steps) if thrifty else Chain(steps)
        self.split = split
        self.shape = torch.Size(shape)

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x to (what goes on, latent [B, numel], log_det [B])."""
        x, log_det = self.steps(x, context)
        kept, latent, change = self.split(x, context)
        return kept, latent.flatten(1), log_det + change

    def inverse(
        self, kept: Tensor, latent: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, change = self.split.inverse(kept, latent.unflatten(1, self.shape), context)
        x, log_det = self.steps.inverse(x, context)
        return x, log_det + change


class Flow(nn.Module):
    """A density as the image of independent noise z [B, D] under an invertible map.

    ``log_prob(x) = log_prior(z) + log_det``, with (z, log_det) = encode(x) and log_det the logarithm of
    |det dz/dx|. Learned priors of factored-out parts belong to the map: z is standard noise in every model.

    x is [B, *event_shape], floating. A context is float [B, context_features], or int64 [B] where the
    configuration has num_classes; one without the batch dimension holds for all samples.
    """

    scales: Any

    def __init__(self, config: FlowConfig, scales: Iterable[Scale]) -> None:
        super().__init__()
        self.config = config
        self.preprocessing = Preprocessing(config.preprocessing, config.alpha)
        self.scales = nn.ModuleList(scales)
        if config.num_classes:
            self.classes = nn.Embedding(config.num_classes, config.context_features)
        self.latent_sizes = [scale.shape.numel() for scale in self.scales]
        self.num_features = math.prod(config.event_shape)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``log_prob``."""
        return self.log_prob(x, context)

    def encode(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data x [B, *event_shape] to (z [B, D], log |det dz/dx| [B])."""
        if x.shape[1:] != self.config.event_shape:
            raise ValueError(
                f"encode: x: expected [batch, {', '.join(map(str, self.config.event_shape))}], "
                f"got {list(x.shape)}"
            )
        context = self._context(context, len(x))
        x, log_det = self.preprocessing(x)
        latents = []
        for scale in self.scales:
            x, latent, change = scale(x, context)
            latents.append(latent)
            log_det = log_det + change
        return torch.cat(latents, 1), log_det

    def decode(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise z [B, D] to (data [B, *event_shape], log |det dx/dz| [B]): the inverse of ``encode``."""
        if z.dim() != 2 or z.shape[1] != self.num_features:
            raise ValueError(
                f"decode: z: expected [batch, {self.num_features}], got {list(z.shape)}"
            )
        context = self._context(context, len(z))
        latents = z.split(self.latent_sizes, 1)
        x = z.new_empty(len(z), 0, *self.scales[-1].shape[1:])
        log_det = z.new_zeros(len(z))
        for scale, latent in zip(reversed(self.scales), reversed(latents), strict=True):
            x, change = scale.inverse(x, latent, context)
            log_det = log_det + change
        x, change = self.preprocessing.inverse(x)
        return x, log_det + change

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Logarithm of the density at x [B, *event_shape], in nats: [B]."""
        z, log_det = self.encode(x, context)
        if self.config.prior == "normal":
            log_prior = -0.5 * (z.square() + math.log(2.0 * math.pi))
        else:
            log_prior = -F.softplus(z) - F.softplus(-z)
        return log_prior.sum(1) + log_det

    @torch.no_grad()
    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``n`` samples [n, *event_shape]; the noise is multiplied by ``temperature`` (Glow, section 6)."""
        like = next(self.parameters())
        shape = (n, self.num_features)
        options: dict[str, Any] = {
            "generator": generator,
            "dtype": like.dtype,
            "device": like.device,
        }
        if self.config.prior == "normal":
            z = torch.randn(shape, **options)
        else:
            z = torch.rand(shape, **options).clamp(torch.finfo(like.dtype).tiny).logit()
        return self.decode(temperature * z, context)[0]

    def bits_per_dim(
        self,
        x: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Bits that a level of x takes: [B], one draw of the upper bound.

        x [B, *event_shape] holds levels 0 to config.levels - 1, of any dtype. A level is the mass of an
        interval, and with u uniform in [0, 1) the mean of

            log2(levels) - log_prob((x + u) / levels) / (D ln 2)

        bounds the bits from above (Theis et al., arXiv:1511.01844, section 3.1). The preprocessing is part
        of log_prob.
        """
        return self.bits(self.log_prob(self.dequantize(x, generator), context))

    def dequantize(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Levels to [0, 1): (x + u) / levels with u uniform in [0, 1)."""
        like = next(self.parameters())
        noise = torch.rand(x.shape, generator=generator, dtype=like.dtype, device=like.device)
        return (x.to(like) + noise) / self.config.levels

    def quantize(self, x: Tensor) -> Tensor:
        """Samples in [0, 1] to the levels they lie in: int64."""
        levels = self.config.levels
        return (x * levels).floor().clamp(0, levels - 1).long()

    def bits(self, log_prob: Tensor) -> Tensor:
        """log_prob of data in [0, 1] as bits per dimension of its levels."""
        return math.log2(self.config.levels) - log_prob / (self.num_features * math.log(2.0))

    def _context(self, context: Tensor | None, batch: int) -> Tensor | None:
        """The context's vector [B, context_features]."""
        config = self.config
        if not config.context_features:
            if context is not None:
                raise ValueError("context: expected None, as the flow is unconditional")
            return None
        if context is None:
            raise ValueError("context: expected one, as the flow is conditional")
        if config.num_classes:
            context = self.classes(context)
        if context.shape[-1:] != (config.context_features,):
            raise ValueError(
                f"context: expected [batch, {config.context_features}], got {list(context.shape)}"
            )
        return context.expand(batch, -1)
