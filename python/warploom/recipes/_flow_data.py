"""scikit-learn's own data for flows: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from warploom.recipes._extras import require

TABLES = ("iris", "wine", "breast_cancer", "diabetes")
DATA = ("digits", *TABLES)
#: Values of a pixel of the digits: 0 to 16.
DIGIT_LEVELS = 17
_SPLIT_SEED = 0


@dataclass(frozen=True)
class FlowData:
    """Parts of one data set, split at random but always alike: 70 %, 15 % and 15 %.

    Images are float32 levels [n, 1, 8, 8]; tables float32 [n, features], standardised with the training
    part's mean and standard deviation. Labels are int64 [n], or None for the regression table.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    train_labels: Tensor | None
    validation_labels: Tensor | None
    test_labels: Tensor | None

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.train.shape[1:])

    @property
    def num_classes(self) -> int:
        return 0 if self.train_labels is None else int(self.train_labels.max()) + 1


def load_data(name: str) -> FlowData:
    """``name``: one of ``DATA``."""
    if name not in DATA:
        raise ValueError(f"data: expected one of {', '.join(DATA)}, got {name!r}")
    source = getattr(require("sklearn.datasets"), f"load_{name}")()
    values = torch.as_tensor(source.data, dtype=torch.float32)
    labels = None if name == "diabetes" else torch.as_tensor(source.target, dtype=torch.int64)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    cuts = [len(values) * 70 // 100, len(values) * 85 // 100]
    train, validation, test = (values[rows] for rows in order.tensor_split(cuts))
    if name == "digits":
        parts = [part.unflatten(1, (1, 8, 8)) for part in (train, validation, test)]
    else:
        mean, deviation = train.mean(0), train.std(0)
        parts = [(part - mean) / deviation for part in (train, validation, test)]
    split_labels = [None if labels is None else labels[rows] for rows in order.tensor_split(cuts)]
    return FlowData(*parts, *split_labels)
