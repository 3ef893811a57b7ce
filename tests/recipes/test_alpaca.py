"""Fine-tuning on instructions: what is trained, what is written, and what survives a kill."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from warploom.lora import load_adapter
from warploom.models.llama import Llama
from warploom.recipes._checkpoints import Checkpoints
from warploom.recipes.alpaca import FineTuneConfig, fine_tune
from warploom.recipes.generate import generate_text

STEPS = 6
TINY: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 2,
    "accumulation_steps": 2,
    "learning_rate": 5e-3,
    "validate_every": 3,
    "checkpoint_every": 2,
    "device": "cpu",
}
RESULTS = {"full": "model/model.safetensors", "lora": "adapter/adapter_model.safetensors"}
METHODS = ("full", "lora", "qlora")


@pytest.fixture
def make(base_model: Path, instruction_file: Path) -> Any:
    def config(output: Path, method: str = "lora", **changes: Any) -> FineTuneConfig:
        files = {"model": base_model, "data": instruction_file, "validation": instruction_file}
        return FineTuneConfig(output=output, method=method, **{**files, **TINY, **changes})

    return config


@pytest.fixture(scope="module")
def straight(
    base_model: Path, instruction_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The output folders of runs that nothing interrupted, one for each method."""
    outputs = {}
    for method in METHODS:
        outputs[method] = tmp_path_factory.mktemp("straight") / method
        files = {"data": instruction_file, "validation": instruction_file}
        fine_tune(
            FineTuneConfig(model=base_model, output=outputs[method], method=method, **files, **TINY)
        )
    return outputs


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in records(output)]


def result(output: Path, method: str) -> dict[str, torch.Tensor]:
    return load_file(output / RESULTS["full" if method == "full" else "lora"])


def assert_same_run(output: Path, expected: Path, method: str) -> None:
    names = ("step", "loss", "learning_rate", "grad_norm", "validation_loss")
    curves = [
        [[record.get(name) for name in names] for record in records(folder)]
        for folder in (output, expected)
    ]
    assert curves[0] == curves[1]
    given, wanted = result(output, method), result(expected, method)
    assert given.keys() == wanted.keys()
    assert all(torch.equal(given[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_leaves_its_files(method: str, straight: dict[str, Path]) -> None:
    output = straight[method]
    assert [record["step"] for record in records(output)] == list(range(1, STEPS + 1))
    assert losses(output)[0] == pytest.approx(math.log(400), rel=0.05)
    assert losses(output)[-1] < 0.95 * losses(output)[0]
    validated = [record["validation_loss"] for record in records(output)[2::3]]
    assert validated[1] < validated[0]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000006"]


def test_the_learning_rate_warms_up_and_falls_to_zero(make: Any, tmp_path: Path) -> None:
    config = make(tmp_path, steps=10, warmup_ratio=0.2, learning_rate=None, accumulation_steps=1)
    fine_tune(config)
    rates = [record["learning_rate"] for record in records(tmp_path)]
    assert rates[:2] == [1e-4, 2e-4]
    assert rates[5] == pytest.approx(1e-4)  # half way down
    assert rates[-1] == 0.0


def test_epochs_count_the_steps(make: Any, tmp_path: Path) -> None:
    """40 examples, 16 a step: one and a half epochs take 60 / 16 steps, rounded up."""
    config = make(tmp_path, steps=None, epochs=1.5, batch_size=4, accumulation_steps=4)
    fine_tune(config)
    assert len(records(tmp_path)) == 4


def test_transformers_loads_the_model(straight: dict[str, Path]) -> None:
    directory = straight["full"] / "model"
    tokens = AutoTokenizer.from_pretrained(directory)("Repeat the", return_tensors="pt").input_ids
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        ours = Llama.from_pretrained(directory)(tokens)
        torch.testing.assert_close(ours, theirs(tokens).logits, rtol=0, atol=1e-4)


def test_peft_loads_the_adapter(straight: dict[str, Path], base_model: Path) -> None:
    directory = straight["lora"] / "adapter"
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base_model)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(directory)
    model = Llama.from_pretrained(base_model).eval()
    load_adapter(model, directory)
    tokens = torch.randint(400, (1, 9))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-4)
        assert (expected - Llama.from_pretrained(base_model)(tokens)).abs().max() > 1e-2


def test_generation_takes_the_adapter(straight: dict[str, Path], base_model: Path) -> None:
    prompt = "### Response:"
    without = generate_text(base_model, prompt, max_new_tokens=8)
    with_it = generate_text(
        base_model, prompt, adapter=straight["lora"] / "adapter", max_new_tokens=8
    )
    assert without.prompt_ids == with_it.prompt_ids
    assert without.new_ids != with_it.new_ids


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "changes",
    [
        {"fused_loss": False},
        {"packing": False, "lora_dropout": 0.0},
        {"gradient_checkpointing": True},
        {"batch_size": 4, "accumulation_steps": 1, "lora_dropout": 0.0},
    ],
    ids=["plain loss", "padding", "gradient checkpointing", "one batch"],
)
def test_how_a_step_is_computed_changes_no_loss(
    method: str, changes: dict[str, Any], straight: dict[str, Path], make: Any, tmp_path: Path
) -> None:
    """Dropout is drawn by a row's place, so that runs of other places are compared without."""
    expected = straight[method]
    if changes.get("lora_dropout") == 0.0:
        expected = tmp_path / "expected"
        fine_tune(make(expected, method, lora_dropout=0.0, steps=3))
    fine_tune(make(tmp_path / "run", method, **{"steps": 3, **changes}))
    if "lora_dropout" in changes:
        assert losses(tmp_path / "run") == pytest.approx(losses(expected), rel=1e-4)
    else:  # another number of steps has another learning rate: the first loss alone is the same
        assert losses(tmp_path / "run")[0] == pytest.approx(losses(expected)[0], rel=1e-6)


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"use_rslora": True}, {"bfloat16": True}])
def test_variants_train(changes: dict[str, Any], make: Any, tmp_path: Path) -> None:
    fine_tune(make(tmp_path, **changes))
    assert losses(tmp_path)[-1] < 0.95 * losses(tmp_path)[0]


def test_a_head_with_an_adapter_has_the_fused_loss_too(make: Any, tmp_path: Path) -> None:
    targets = {"lora_target_modules": "q_proj,lm_head", "lora_dropout": 0.0}
    fine_tune(make(tmp_path / "fused", **targets))
    fine_tune(make(tmp_path / "plain", **targets, fused_loss=False))
    assert losses(tmp_path / "fused") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    tensors = result(tmp_path / "fused", "lora")
    assert tensors["base_model.model.lm_head.lora_B.weight"].abs().max() > 0
    assert {name.split(".")[-3] for name in tensors} == {"q_proj", "lm_head"}


def test_weights_in_sixteen_bits_keep_adapters_in_thirty_two(make: Any, tmp_path: Path) -> None:
    fine_tune(make(tmp_path, dtype="bfloat16"))
    assert {tensor.dtype for tensor in result(tmp_path, "lora").values()} == {torch.float32}


def test_frozen_weights_are_in_no_checkpoint(straight: dict[str, Path]) -> None:
    state = Checkpoints(straight["qlora"] / "checkpoints").load(STEPS)
    assert state["model"] and all(".lora_" in name for name in state["model"])


class KilledError(Exception):
    """Stands for the end of the process at a chosen point."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("point", ["before the checkpoint", "after the checkpoint"])
def test_a_stopped_run_continues_as_if_nothing_happened(
    point: str,
    method: str,
    straight: dict[str, Path],
    make: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = Checkpoints.save

    def save_and_die(self: Any, step: int, state: dict[str, Any]) -> None:
        if step == 4 and point == "before the checkpoint":
            raise KilledError
        save(self, step, state)
        if step == 4:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(KilledError):
            fine_tune(make(tmp_path, method))
    torch.rand(7)
    fine_tune(make(tmp_path, method, resume=True))
    assert_same_run(tmp_path, straight[method], method)


def command(config: FineTuneConfig) -> list[str]:
    words = ["--model", config.model, "--data", config.data, "--validation", config.validation]
    words += ["--output", config.output, "--method", config.method]
    for name, value in TINY.items():
        words += ["--" + name.replace("_", "-"), value]
    return ["-m", "warploom", "sft", *map(str, words)]


def test_a_killed_command_continues_as_if_nothing_happened(
    straight: dict[str, Path], make: Any, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words = [sys.executable, *command(make(output))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    kill_after = random.SystemRandom().randrange(1, STEPS)
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    log = output / "log.jsonl"
    try:
        deadline = time.monotonic() + 180
        while not log.exists() or log.read_text().count("\n") < kill_after:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "the run wrote no log"
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = subprocess.run(
        [*words, "--resume"], env=environment, check=True, capture_output=True, text=True
    )
    assert finished.stdout.splitlines()[-1] == str(output / "adapter")
    assert_same_run(output, straight["lora"], "lora")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_take_the_steps_of_one(method: str, make: Any, tmp_path: Path) -> None:
    """Sharded by torchrun, stopped after 3 steps and resumed; each process reads half of the examples."""
    settings = {"lora_dropout": 0.0, "batch_size": 4, "accumulation_steps": 1}
    fine_tune(make(tmp_path / "one", method, **settings))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = command(make(tmp_path / "two", method))[1:]
    words += ["--lora-dropout", "0", "--accumulation-steps", "1", "--batch-size", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for more in ([], ["--resume"]):
        run = subprocess.run(
            [sys.executable, *launcher, "-m", *words, *more],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert run.returncode == 0, run.stderr
        if not more:  # as if the end had not come: the checkpoint of step 4 and no result
            (tmp_path / "two" / RESULTS["full" if method == "full" else "lora"]).parent.rename(
                tmp_path / "first"
            )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    given, wanted = result(tmp_path / "two", method), result(tmp_path / "one", method)
    assert given.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(given[name], tensor, rtol=1e-2, atol=1e-3)


def test_existing_run_is_not_overwritten(straight: dict[str, Path], make: Any) -> None:
    with pytest.raises(FileExistsError, match="sft: output: .* holds a run; resume it"):
        fine_tune(make(straight["lora"]))


@pytest.mark.parametrize(("name", "value"), [("lora_r", 4), ("steps", 9), ("packing", False)])
def test_resume_refuses_other_settings(
    name: str, value: Any, straight: dict[str, Path], make: Any
) -> None:
    with pytest.raises(ValueError, match=f"sft: {name}: .* got {value}"):
        fine_tune(make(straight["lora"], resume=True, **{name: value}))


def test_resume_refuses_other_data(straight: dict[str, Path], make: Any, tmp_path: Path) -> None:
    other = tmp_path / "data.json"
    other.write_text('[{"instruction": "a", "output": "b"}]')
    with pytest.raises(ValueError, match="sft: data: "):
        fine_tune(make(straight["lora"], resume=True, data=other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "half"}, "method: expected one of full, lora, qlora, got 'half'"),
        ({"dtype": "float8"}, "dtype: expected one of auto, float32, bfloat16, got 'float8'"),
        ({"quantization": "dense"}, "quantization: expected one of nf4, int8, fp8_e4m3"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"epochs": 0.0}, r"epochs, warmup_ratio: expected more than 0 and a share in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(
    changes: dict[str, Any], message: str, make: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"sft: {message}"):
        make(tmp_path, **changes)
