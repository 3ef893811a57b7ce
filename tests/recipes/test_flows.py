"""The flow recipes: what a run writes, that it learns, that it resumes, and tables beside zuko."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from warploom.models.flows import load_flow
from warploom.recipes import _flow_data as flow_data
from warploom.recipes.flows import FlowRunConfig, train_flow
from warploom.recipes.flows_demo import flows_demo
from warploom.recipes.tabular_flows import TabularConfig, compare_tables

SMALL = {
    "batch_size": 16,
    "hidden": 8,
    "warmup_steps": 2,
    "learning_rate": 1e-2,
    "validate_every": 5,
    "device": "cpu",
}
Make = Callable[..., FlowRunConfig]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def config(name: str = "run", **changes: Any) -> FlowRunConfig:
        return FlowRunConfig(output=tmp_path / name, **{**SMALL, **changes})

    return config


def log_of(config: FlowRunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.output / "log.jsonl").read_text().splitlines()]


def result_of(config: FlowRunConfig) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((config.output / "result.json").read_text())
    return result


@pytest.mark.parametrize("name", flow_data.DATA)
def test_data_are_split_whole_and_alike(name: str) -> None:
    data, again = flow_data.load_data(name), flow_data.load_data(name)
    parts = [data.train, data.validation, data.test]
    assert all(
        torch.equal(*pair) for pair in zip(parts, (again.train, again.validation, again.test))
    )
    total = sum(map(len, parts))
    assert (
        total
        == {"digits": 1797, "iris": 150, "wine": 178, "breast_cancer": 569, "diabetes": 442}[name]
    )
    assert 0.69 * total <= len(data.train) <= 0.71 * total
    if name == "digits":
        assert data.event_shape == (1, 8, 8) and data.train.unique().tolist() == list(range(17))
    else:
        torch.testing.assert_close(
            data.train.mean(0), torch.zeros(data.event_shape), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(data.train.std(0), torch.ones(data.event_shape))
    assert (
        data.num_classes
        == {"digits": 10, "iris": 3, "wine": 3, "breast_cancer": 2, "diabetes": 0}[name]
    )


@pytest.mark.parametrize("model", ["nice", "realnvp", "glow", "spline"])
def test_a_few_steps_lower_the_bits_per_dimension(model: str, make: Make) -> None:
    config = make(model=model, steps=15, depth=2)
    directory = train_flow(config)
    validated = [r["validation_loss"] for r in log_of(config) if "validation_loss" in r]
    assert len(validated) == 3 and validated[-1] < validated[0]
    assert validated[-1] < log_of(config)[0]["loss"]
    result = result_of(config)
    assert result["unit"] == "bits per dimension"
    assert result["validation"] == pytest.approx(validated[-1])
    for picture in ("samples.png", "interpolations.png", "loss.png"):
        assert (config.output / picture).read_bytes().startswith(b"\x89PNG")

    flow = load_flow(directory).eval()
    data = flow_data.load_data("digits")
    bits = flow.bits_per_dim(data.test, generator=torch.Generator().manual_seed(0)).mean()
    assert bits.item() == pytest.approx(result["test"], abs=0.1)


@pytest.mark.parametrize("data", flow_data.TABLES)
def test_tables_are_learned_in_nats(data: str, make: Make) -> None:
    config = make(data=data, model="spline", steps=10)
    train_flow(config)
    log = log_of(config)
    assert log[-1]["validation_loss"] < log[0]["loss"]
    assert result_of(config)["unit"] == "nats per sample"
    assert not (config.output / "samples.png").exists()


def test_classes_can_condition(make: Make) -> None:
    config = make(steps=2, conditional=True, depth=1)
    flow = load_flow(train_flow(config))
    assert flow.config.num_classes == 10
    assert flow.sample(10, context=torch.arange(10)).shape == (10, 1, 8, 8)


def test_a_resumed_run_equals_one_that_was_not_stopped(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = make("straight", steps=6, checkpoint_every=2, model="glow", depth=1)
    train_flow(straight)
    broken = make("broken", steps=6, checkpoint_every=2, model="glow", depth=1)
    with monkeypatch.context() as patch:
        patch.setattr("warploom.recipes.flows.warmup_cosine", stop_at(5))
        with pytest.raises(KeyboardInterrupt):
            train_flow(broken)
    assert len(log_of(broken)) == 4
    with pytest.raises(FileExistsError, match="resume it"):
        train_flow(broken)
    train_flow(make("broken", steps=6, checkpoint_every=2, model="glow", depth=1, resume=True))
    names = ("step", "loss", "grad_norm", "learning_rate")
    curves = [[[r[n] for n in names] for r in log_of(config)] for config in (straight, broken)]
    assert curves[0] == curves[1]
    weights = [load_file(c.output / "model" / "model.safetensors") for c in (straight, broken)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def stop_at(step: int) -> Callable[..., float]:
    """A schedule that is interrupted at a step."""
    from warploom.recipes._training_run import warmup_cosine

    def schedule(now: int, *args: Any, **settings: Any) -> float:
        if now == step:
            raise KeyboardInterrupt
        return warmup_cosine(now, *args, **settings)

    return schedule


def test_a_reversible_run_gives_the_losses_of_the_plain_one(make: Make) -> None:
    configs = [
        make(str(way), steps=3, model="glow", depth=2, reversible=way) for way in (False, True)
    ]
    for config in configs:
        train_flow(config)
    plain, thrifty = ([record["loss"] for record in log_of(config)] for config in configs)
    assert thrifty == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "maf"}, "flow: model: expected one of nice"),
        ({"data": "mnist"}, "flow: data: expected one of digits"),
        ({"steps": 0}, "flow: steps: expected at least 1"),
        ({"data": "iris", "model": "glow"}, "flow: model: expected one of nice, realnvp, spline"),
        ({"data": "diabetes", "conditional": True}, "diabetes has no classes"),
    ],
    ids=["model", "data", "steps", "glow-of-a-table", "classes-of-a-regression"],
)
def test_wrong_settings_are_named(changes: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_tables_beside_zuko(tmp_path: Path) -> None:
    path = compare_tables(TabularConfig(output=tmp_path, steps=4, hidden=8, transforms=2, seeds=2))
    results = json.loads(path.read_text())
    assert len(results) == 4 * 4
    assert {(r["model"], r["library"]) for r in results} == {
        (model, library) for model in ("spline", "affine") for library in ("warploom", "zuko")
    }
    assert all(math.isfinite(r["mean"]) and r["deviation"] >= 0 for r in results)


def test_the_demos_section_leaves_a_picture(tmp_path: Path) -> None:
    found = flows_demo(tmp_path, steps=3)
    assert found.samples == tmp_path / "flow_samples.png"
    assert found.samples.read_bytes().startswith(b"\x89PNG")
    assert found.bits_per_dim > 0
