"""A flow as a ``torch.distributions.Transform``."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from warploom.models.flows.base import Flow


class FlowTransform(Transform):
    """Noise z [*batch, D] to data [*batch, *event_shape].

    ``TransformedDistribution(base, [FlowTransform(flow)])``, with ``base`` over vectors of D, is the flow's
    distribution with another prior. The log-determinant of the last map is kept with its two tensors.

    Args:
        flow: any flow.
        context: for a conditional flow: of one sample, or of all samples of a batch.
    """

    bijective = True

    def __init__(self, flow: Flow, context: Tensor | None = None) -> None:
        super().__init__(cache_size=1)
        self.flow = flow
        self.context = context
        event_dims = len(flow.config.event_shape)
        self.domain = constraints.independent(constraints.real, 1)
        self.codomain = constraints.independent(constraints.real, event_dims)
        self._ladj: tuple[Tensor, Tensor, Tensor] | None = None

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, FlowTransform)
            and other.flow is self.flow
            and other.context is self.context
        )

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        return self

    def call_and_ladj(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(data, log |det d data / dz|)."""
        x, ladj = self.flow.decode(z.reshape(-1, z.shape[-1]), self.context)
        batch = z.shape[:-1]
        x, ladj = x.reshape(batch + self.flow.config.event_shape), ladj.reshape(batch)
        self._ladj = (z, x, ladj)
        return x, ladj

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Of noise x and the data y that it became, as the base class names them."""
        kept = self._ladj
        if kept is not None and kept[0] is x and kept[1] is y:
            return kept[2]
        return self.call_and_ladj(x)[1]

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], *self.flow.config.event_shape)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        event_dims = len(self.flow.config.event_shape)
        return (*shape[: len(shape) - event_dims], self.flow.num_features)

    def _call(self, z: Tensor) -> Tensor:
        return self.call_and_ladj(z)[0]

    def _inverse(self, x: Tensor) -> Tensor:
        event_shape = self.flow.config.event_shape
        batch = x.shape[: x.dim() - len(event_shape)]
        z, log_det = self.flow.encode(x.reshape(-1, *event_shape), self.context)
        z = z.reshape(*batch, -1)
        self._ladj = (z, x, -log_det.reshape(batch))
        return z
