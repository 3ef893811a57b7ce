"""The pretraining recipe: its schedule, its data order, its files, and what survives a kill."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from warploom.models.llama import Llama
from warploom.models.llama_config import LlamaConfig
from warploom.recipes import pretrain as recipe
from warploom.recipes._checkpoints import Checkpoints
from warploom.recipes._pretrain_models import scale_residual_matrices
from warploom.recipes._windows import Windows, spread_windows
from warploom.recipes.pretrain import PretrainConfig, learning_rate_at, pretrain

from tests.recipes.conftest import TINY

Make = Callable[..., PretrainConfig]
STEPS = 12


def read_log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def curve(output: Path) -> list[tuple[Any, ...]]:
    """What must be equal, bit for bit, in two runs: all of the log but the speed."""
    names = ("step", "loss", "learning_rate", "grad_norm", "validation_loss")
    return [tuple(record.get(name) for name in names) for record in read_log(output)]


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def assert_same_run(output: Path, expected: Path) -> None:
    assert curve(output) == curve(expected)
    expected_weights = weights(expected / "model")
    assert weights(output / "model").keys() == expected_weights.keys()
    for name, tensor in weights(output / "model").items():
        assert torch.equal(tensor, expected_weights[name]), name


@pytest.fixture(scope="module")
def straight_run(tiny_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run of 12 steps that nothing interrupted."""
    output = tmp_path_factory.mktemp("straight") / "run"
    pretrain(tiny_config(output, steps=STEPS, checkpoint_every=3, validate_every=4))
    return output


def test_learning_rate_warms_up_and_falls_to_a_tenth(tmp_path: Path) -> None:
    config = PretrainConfig(output=tmp_path, steps=100, warmup_steps=10, learning_rate=1.0)
    rates = {step: learning_rate_at(config, step) for step in range(1, 101)}
    assert rates[1] == pytest.approx(0.1)
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)  # half way down: the mean of 1 and 0.1
    assert rates[100] == pytest.approx(0.1)
    assert all(rates[step] > rates[step + 1] for step in range(10, 100))


def test_weight_decay_is_for_matrices_only() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    matrices, vectors = recipe.parameter_groups(model, 0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert [tuple(parameter.shape) for parameter in matrices["params"]] == [(4, 3)]
    assert len(vectors["params"]) == 3


def test_only_matrices_that_write_to_the_residual_stream_are_scaled() -> None:
    shape = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    model = Llama(LlamaConfig(num_hidden_layers=2, **shape))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scale_residual_matrices(model)
    for name, tensor in model.state_dict().items():
        writes = name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight"))
        assert torch.equal(tensor, before[name] / 2 if writes else before[name]), name


def test_windows_visit_every_part_once_an_epoch() -> None:
    windows = Windows(torch.arange(107, dtype=torch.int32), length=10, seed=3)
    assert windows.per_epoch == 9
    for epoch in range(3):
        batch = windows.batch(epoch * 9, 9)
        assert batch.dtype == torch.int64
        assert torch.equal(batch - batch[:, :1], torch.arange(11).expand(9, 11))
        starts = sorted(batch[:, 0].tolist())
        assert starts == list(range(starts[0], starts[0] + 90, 10))


def test_windows_are_a_function_of_the_position() -> None:
    tokens = torch.arange(200)
    read = Windows(tokens, length=10, seed=0)
    in_order = torch.cat([read.batch(position, 5) for position in range(0, 60, 5)])
    fresh = Windows(tokens, length=10, seed=0)
    assert torch.equal(fresh.batch(37, 9), in_order[37:46])
    assert not torch.equal(Windows(tokens, length=10, seed=1).batch(0, 9), in_order[:9])


def test_validation_windows_spread_over_the_stream() -> None:
    assert spread_windows(torch.arange(101), 10, 5)[:, 0].tolist() == [0, 20, 40, 60, 80]
    assert len(spread_windows(torch.arange(31), 10, 5)) == 3
    with pytest.raises(ValueError, match="expected at least 11, got 10"):
        spread_windows(torch.arange(10), 10, 5)


def test_log_has_one_complete_record_per_step(straight_run: Path) -> None:
    records = read_log(straight_run)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in records:
        assert {"loss", "learning_rate", "grad_norm", "tokens_per_second"} <= record.keys()
        assert ("validation_loss" in record) == (record["step"] % 4 == 0)
    assert records[0]["loss"] == pytest.approx(math.log(TINY["vocab_size"]), rel=0.05)


def test_run_leaves_picture_model_and_one_checkpoint(straight_run: Path) -> None:
    assert (straight_run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (straight_run / "checkpoints").iterdir()] == ["step-00000012"]
    names = {path.name for path in (straight_run / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_training_learns(trained_model: Path) -> None:
    losses = [record["loss"] for record in read_log(trained_model.parent)]
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]


def test_transformers_loads_the_result(trained_model: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(trained_model)("The first function", return_tensors="pt")
    theirs = AutoModelForCausalLM.from_pretrained(trained_model)
    ours = Llama.from_pretrained(trained_model)
    with torch.no_grad():
        expected = theirs(**tokens).logits
        torch.testing.assert_close(ours(tokens.input_ids), expected, rtol=0, atol=1e-5)


def test_two_runs_are_equal(straight_run: Path, tiny_config: Make, tmp_path: Path) -> None:
    pretrain(tiny_config(tmp_path, steps=STEPS, checkpoint_every=12, validate_every=4))
    assert_same_run(tmp_path, straight_run)


def test_killed_run_continues_as_if_nothing_happened(
    straight_run: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    options = {
        **TINY,
        "text": text_file,
        "steps": STEPS,
        "checkpoint_every": 3,
        "validate_every": 4,
    }
    command = [sys.executable, "-m", "warploom", "pretrain", "--output", str(output)]
    for name, value in options.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    kill_after = random.SystemRandom().randrange(1, STEPS)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    log = output / "log.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not log.exists() or log.read_text().count("\n") < kill_after:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "the run wrote no log"
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, "--resume"], env=environment, check=True, timeout=120)
    assert_same_run(output, straight_run)


class KilledError(Exception):
    """Stands for the end of the process at a chosen point."""


@pytest.mark.parametrize("step", [1, 3, 4, 11])
@pytest.mark.parametrize("point", ["before the checkpoint", "while saving", "after the checkpoint"])
def test_run_stopped_anywhere_continues_as_if_nothing_happened(
    point: str,
    step: int,
    straight_run: Path,
    tiny_config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"steps": STEPS, "checkpoint_every": 1, "validate_every": 4}
    save = Checkpoints.save

    def save_and_die(self: Any, number: int, state: dict[str, Any]) -> None:
        if number == step and point == "before the checkpoint":
            raise KilledError
        if number == step and point == "while saving":
            half = self.directory / f".step-{step:08d}.saving-999999999"
            half.mkdir(parents=True)
            (half / "state.pt").write_bytes(b"half of a file")
            raise KilledError
        save(self, number, state)
        if number == step:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(KilledError):
            pretrain(tiny_config(tmp_path, **options))
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 1, "lo')  # a record that was cut short
    pretrain(tiny_config(tmp_path, **options, resume=True))
    assert_same_run(tmp_path, straight_run)


def test_finished_run_is_left_alone(straight_run: Path, tiny_config: Make) -> None:
    config = tiny_config(
        straight_run, steps=STEPS, checkpoint_every=3, validate_every=4, resume=True
    )
    written = (straight_run / "model" / "model.safetensors").stat().st_mtime_ns
    assert pretrain(config) == straight_run / "model"
    assert (straight_run / "model" / "model.safetensors").stat().st_mtime_ns == written
    assert len(read_log(straight_run)) == STEPS


def test_accumulated_steps_see_the_same_batches(tiny_config: Make, tmp_path: Path) -> None:
    pretrain(tiny_config(tmp_path / "one", steps=4, batch_size=4))
    pretrain(tiny_config(tmp_path / "two", steps=4, batch_size=2, accumulation_steps=2))
    for one, two in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_activation_checkpointing_changes_no_loss(
    straight_run: Path, tiny_config: Make, tmp_path: Path
) -> None:
    pretrain(tiny_config(tmp_path, steps=STEPS, validate_every=4, activation_checkpointing=True))
    assert curve(tmp_path) == curve(straight_run)


def test_bfloat16_autocast_stays_near_float32(
    straight_run: Path, tiny_config: Make, tmp_path: Path
) -> None:
    model = pretrain(tiny_config(tmp_path, steps=STEPS, validate_every=4, bfloat16=True))
    for half, full in zip(read_log(tmp_path), read_log(straight_run), strict=True):
        assert half["loss"] == pytest.approx(full["loss"], rel=0.01)
    assert read_log(tmp_path)[-1]["loss"] != read_log(straight_run)[-1]["loss"]
    assert {tensor.dtype for tensor in weights(model).values()} == {torch.float32}


def test_gradient_is_clipped(tiny_config: Make, tmp_path: Path) -> None:
    """With clipping to almost nothing, AdamW's epsilon keeps the weights where they are."""
    config = {"steps": 3, "weight_decay": 0.0, "epsilon": 1.0, "learning_rate": 1.0}
    pretrain(tiny_config(tmp_path / "clipped", clip_norm=1e-9, **config))
    losses = [record["loss"] for record in read_log(tmp_path / "clipped")]
    pretrain(tiny_config(tmp_path / "free", clip_norm=1e9, **config))
    free = [record["loss"] for record in read_log(tmp_path / "free")]
    assert losses[0] == free[0]
    assert abs(losses[-1] - free[-1]) > 1e-3


def test_existing_run_is_not_overwritten(straight_run: Path, tiny_config: Make) -> None:
    with pytest.raises(FileExistsError, match="holds a run; resume it or name another folder"):
        pretrain(tiny_config(straight_run, steps=STEPS))


@pytest.mark.parametrize(
    ("field", "value"), [("learning_rate", 0.5), ("steps", 99), ("hidden_size", 64), ("seed", 7)]
)
def test_resume_refuses_other_settings(
    field: str, value: float, straight_run: Path, tiny_config: Make
) -> None:
    options = {"steps": STEPS, "validate_every": 4, "resume": True, field: value}
    with pytest.raises(ValueError, match=f"pretrain: {field}: .* got {value}"):
        pretrain(tiny_config(straight_run, **options))


def test_resume_refuses_another_text(
    straight_run: Path, tiny_config: Make, text_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text() + "\n\nOne more paragraph.")
    with pytest.raises(ValueError, match="pretrain: text:"):
        pretrain(tiny_config(straight_run, text=other, steps=STEPS, validate_every=4, resume=True))


def test_unreadable_checkpoint_is_named(tiny_config: Make, tmp_path: Path) -> None:
    pretrain(tiny_config(tmp_path, steps=2))
    state = tmp_path / "checkpoints" / "step-00000002" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"step-00000002/state\.pt: cannot be read"):
        pretrain(tiny_config(tmp_path, steps=2, resume=True))


def test_divergence_stops_the_run(tiny_config: Make, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"step \d+: loss .* expected finite numbers"):
        pretrain(tiny_config(tmp_path, steps=20, learning_rate=1e38, warmup_steps=0))


@pytest.mark.parametrize("field", ["steps", "batch_size", "accumulation_steps", "hidden_size"])
def test_sizes_below_one_are_refused(field: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"pretrain: {field}: expected at least 1, got 0"):
        PretrainConfig(output=tmp_path, **{field: 0})


def test_every_setting_is_explained() -> None:
    for field in fields(PretrainConfig):
        assert field.type.startswith("Annotated["), field.name
