"""SPP-Net in half a minute: digits at several sizes, coins in a photograph, one picture of both."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from warploom.recipes._extras import require
from warploom.recipes.spp_net import SPPNetConfig, train


def spp_demo(output: Path, console: Any, *, steps: int = 70) -> Path:
    """Train a classifier of digits and a detector of coins, and draw what they do.

    Writes ``output/spp-digits`` and ``output/spp-coins``, replacing what an earlier demo left there, and
    ``output/spp.png``.

    Args:
        output: the folder for all files.
        console: a ``rich`` console.
        steps: optimiser steps of each.

    Returns: ``output/spp.png``.
    """
    runs = {}
    for name in ("coins", "digits"):
        directory = output / f"spp-{name}"
        shutil.rmtree(directory, ignore_errors=True)
        runs[name] = train(
            SPPNetConfig(output=directory, task=name, steps=steps, validate_every=steps)
        )
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for place, (task, results) in zip(axes, runs.values(), strict=True):
        task.draw(place, results)
    picture = output / "spp.png"
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    console.print(
        "digits: one network, sizes 10 and 20 were never trained on; coins: the lower half of the "
        "photograph was never trained on, 12 coins are no benchmark",
        highlight=False,
    )
    return picture
