"""Runs the benches and writes JSON and PNG.

python -m bench [--family norm ...] [--device cpu|cuda] [--rounds 15] [--seconds S] [--without PEER ...]
                [--output DIR]

--seconds: how long all may take; each family has an equal share of what is left, and begins no row after it.
--without: peers to leave out, such as those that torch.compile builds anew for every row.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import platform
import time
from pathlib import Path

import torch

from bench.harness import Row, measure

FAMILIES = (
    "norm", "rope", "activation", "grouped_linear", "attention", "mla", "lora", "vocab", "coupling", "spp",
)  # fmt: skip


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def show(row: Row) -> None:
    peers = "  ".join(f"{ratio:5.2f} x {name}" for name, ratio in row.ratio_to_peer.items())
    rate = (
        f"{row.teraflops_per_second:7.3f} TFLOP/s"
        if row.floor == "product"
        else f"{row.gigabytes_per_second:7.1f} GB/s   "
    )
    print(
        f"{row.op:34s} {row.dtype:9s} {row.shape:28s} {row.seconds * 1e3:9.3f} ms {rate} "
        f"{row.ratio_to_floor:6.2f} x {row.floor} floor  host {row.host_seconds * 1e6:5.0f} us  {peers}",
        flush=True,
    )


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Time as a multiple of the floor, ours and each peer's: 1 is the best there can be."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    peers = sorted({name for row in rows for name in row.ratio_to_peer})
    labels = [f"{row.op}\n{row.dtype} {row.shape}" for row in rows]
    series = {"warploom": [row.ratio_to_floor for row in rows]}
    for name in peers:
        series[name] = [
            row.ratio_to_floor / row.ratio_to_peer[name] if name in row.ratio_to_peer else 0.0
            for row in rows
        ]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.55 * len(rows)), layout="constrained")
    height = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        axes.barh([y + index * height for y in range(len(rows))], values, height, label=name)
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(rows))], labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time as a multiple of the measured floor (less is better)")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--without", nargs="*", default=[])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    output = options.output or Path(__file__).parent / "results" / options.device
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    for index, family in enumerate(options.family):
        rows = []
        began = time.monotonic()
        share = (end - began) / (len(options.family) - index)
        for case in importlib.import_module(f"bench.{family}.cases").cases(options.device):
            if time.monotonic() - began > share:
                print(f"{family}: stopped after {share:.0f} s, {len(rows)} rows", flush=True)
                break
            for name in options.without:
                case.peers.pop(name, None)
            try:
                row = measure(case, options.device, options.rounds)
            except (AssertionError, RuntimeError) as error:
                kind = "wrong" if isinstance(error, AssertionError) else "failed"
                print(f"{case.op} {case.dtype} {case.shape}: {kind}, not reported: {error}")
                continue
            show(row)
            rows.append(row)
        if not rows:
            continue
        result = {
            "machine": machine(options.device),
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
            "rounds": options.rounds,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        (output / f"{family}.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(rows, f"{family} on {machine(options.device)}", output / f"{family}.png")


if __name__ == "__main__":
    main()
