"""The ``warploom`` command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import warploom
from warploom import cli
from warploom.models.llama import Llama
from warploom.models.llama_config import LlamaConfig
from warploom.recipes import info, text_corpus
from warploom.recipes.alpaca import FineTuneConfig
from warploom.recipes.flows import FlowRunConfig
from warploom.recipes.pretrain import PretrainConfig
from warploom.recipes.self_instruct import SelfInstructConfig
from warploom.recipes.spp_net import SPPNetConfig
from warploom.recipes.tabular_flows import TabularConfig

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in this process: (exit status, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
            raise SystemExit(0)
        printed = capsys.readouterr()
        code = stop.value.code
        return (0 if code is None else int(code)), printed.out, printed.err

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights and its tokenizer."""
    directory = tmp_path_factory.mktemp("model") / "model"
    torch.manual_seed(0)
    Llama(
        LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=0.5,
            eos_token_id=None,
        )
    ).save_pretrained(directory)
    text_corpus.train_tokenizer(["Return the value of the function."] * 9, directory, 300)
    return directory


def test_help_names_every_command(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    recipes = ("pretrain", "sft", "self-instruct", "flow", "flow-tables", "memory")
    for command in ("info", "demo", "generate", *recipes, "kv-cache", "convert", "lora", "bench"):
        assert re.search(rf"\b{command}\b", out)


def test_info_says_what_serves_each_op_and_why(run: Run) -> None:
    status, out, _ = run("info")
    assert status == 0
    assert re.search(rf"warploom\W+{re.escape(warploom.__version__)}", out)
    assert re.search(rf"torch\W+{re.escape(torch.__version__)}", out)
    for backend in warploom.BACKENDS:
        assert re.search(rf"\b{backend}\b", out)
    assert "no cpu tensors, only cuda" in out
    for op in ("rms_norm", "layer_norm", "apply_rotary", "swiglu", "geglu", "attention"):
        assert re.search(rf"{op}.*(cpu|reference)", out)


def test_info_shows_the_compiled_kernels(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [
        {
            "name": "rms_norm_kernel",
            "architecture": "sm_80",
            "registers": 40,
            "static_shared_bytes": 4096,
        },
        {
            "name": "attention_kernel",
            "architecture": "sm_90a",
            "registers": 168,
            "unknown_field": "x",
        },
    ]
    monkeypatch.setattr(info, "kernel_table", lambda: kernels)
    _, out, _ = run("info")
    assert "compiled for sm_80, sm_90a" in out
    assert re.search(r"rms_norm_kernel\W+sm_80\W+40\W+4096", out)
    assert re.search(r"attention_kernel\W+sm_90a\W+168\W+x", out)


def test_kernel_table_is_what_the_extension_reports() -> None:
    for kernel in info.kernel_table():
        assert "name" in kernel and "registers" in kernel


def test_generate_prints_prompt_and_continuation(run: Run, model: Path) -> None:
    status, out, _ = run(
        "generate", "--model", model, "--prompt", "Return", "--max-new-tokens", "7"
    )
    tokenizer = text_corpus.load_tokenizer(model)
    ids = tokenizer.encode("Return").ids
    expected = Llama.from_pretrained(model).generate([ids], 7)[0]
    assert status == 0
    assert out == "Return" + tokenizer.decode(expected[len(ids) :]) + "\n"


def test_generate_samples_by_seed(run: Run, model: Path) -> None:
    common = ("generate", "--model", model, "--prompt", "Return", "--max-new-tokens", "12")
    sampling = ("--temperature", "3", "--top-k", "200", "--top-p", "0.99")
    penalty = ("--repetition-penalty", "1.1")
    texts = [run(*common, *sampling, *penalty, "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_generate_stops_at_the_string(run: Run, model: Path) -> None:
    common = ("generate", "--model", model, "--prompt", "Return", "--max-new-tokens", "12")
    whole = run(*common)[1].rstrip("\n").removeprefix("Return")
    stopped = run(*common, "--stop", whole[2])[1].rstrip("\n").removeprefix("Return")
    assert whole.startswith(stopped)
    assert len(stopped) < len(whole)
    assert whole[2] in stopped


@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("pretrain", PretrainConfig),
        ("sft", FineTuneConfig),
        ("self-instruct", SelfInstructConfig),
        ("flow", FlowRunConfig),
        ("flow-tables", TabularConfig),
        ("spp-net", SPPNetConfig),
    ],
)
def test_every_setting_of_a_recipe_is_an_option(run: Run, command: str, config: Any) -> None:
    _, out, _ = run(command, "--help")
    for field in fields(config):
        assert f"--{field.name.replace('_', '-')}" in out


def test_pretrain_trains_and_resumes(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"This is paragraph {index} of the text." for index in range(99)))
    options = ["--output", tmp_path / "run", "--text", text, "--steps", "2", "--batch-size", "1"]
    options += ["--vocab-size", "280", "--hidden-size", "16", "--intermediate-size", "16"]
    options += ["--num-attention-heads", "2", "--num-key-value-heads", "1"]
    options += ["--sequence-length", "8", "--device", "cpu"]
    status, out, _ = run("pretrain", *options)
    assert status == 0
    assert out.splitlines()[-1] == str(tmp_path / "run" / "model")
    records = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(record)["step"] for record in records] == [1, 2]

    status, _, err = run("pretrain", *options)
    assert status == 1
    assert "resume it or name another folder" in err
    assert run("pretrain", *options, "--resume")[0] == 0


def test_memory_has_a_line_for_each_method(run: Run, model: Path) -> None:
    status, out, _ = run("memory", "--model", "llama-7b", "--gradient-checkpointing")
    assert status == 0
    assert re.search(r"full\W+13\.48\W+26\.95\W+13\.48\W+53\.91\W+0\.35\W+108\.16", out)
    assert re.search(r"lora\W+13\.56", out) and re.search(r"qlora\W+4\.25", out)
    assert run("memory", "--model", model)[0] == 0


def perplexities(table: str) -> list[float]:
    """The last column of the two lines of a convert command's table."""
    return [float(number) for number in re.findall(r"([\d.e+]+) *│\n", table)]


def test_convert_mla_keeps_the_model_and_its_tokenizer(
    run: Run, model: Path, tmp_path: Path
) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "latent"
    text.write_text("Return the value of the function. The function has a value. " * 9)
    options = ("--model", model, "--text", text, "--context", "32", "--output", output)
    status, out, _ = run("convert", "mla", *options)
    assert status == 0
    before, after = perplexities(out)
    assert before == pytest.approx(after, rel=1e-3)
    assert re.search(r"MHA\W+64\W+128", out) and re.search(r"MLA\W+64\W+128", out)
    prompt = ("--prompt", "Return", "--max-new-tokens", "9")
    assert run("generate", "--model", output, *prompt) == run("generate", "--model", model, *prompt)

    cut = ("--latent", "16", "--rope", "16", "--calibration", text)
    status, out, _ = run("convert", "mla", *options, *cut)
    assert status == 0 and re.search(r"MLA\W+32\W+64", out)
    before, after = perplexities(out)
    assert before != pytest.approx(after, rel=1e-3)


def test_convert_gqa_pools_heads(run: Run, model: Path, tmp_path: Path) -> None:
    options = ("--model", model, "--output", tmp_path / "pooled", "--kv-heads", "1")
    status, out, _ = run("convert", "gqa", *options)
    assert status == 0 and re.search(r"MHA\W+64\W+128", out) and re.search(r"MQA\W+32\W+64", out)
    assert perplexities(out) == []
    assert Llama.from_pretrained(tmp_path / "pooled").config.num_key_value_heads == 1
    assert (tmp_path / "pooled" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("gqa", "--kv-heads", "3", "--output", "{new}"), "expected a divisor of 2, got 3"),
        (("mla", "--latent", "0", "--output", "{new}"), "d_latent: expected 1 or more, got 0"),
        (("mla", "--output", "{model}"), "output: expected another directory than the model's"),
        (("mla", "--text", "{new}", "--output", "{new}"), "No such file"),
    ],
    ids=["heads", "latent", "output", "text"],
)
def test_a_conversions_mistake_is_one_sentence(
    run: Run, model: Path, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    words = [word.format(model=model, new=tmp_path / "new") for word in arguments]
    status, _, err = run("convert", words[0], "--model", model, *words[1:])
    assert status == 1 and err.count("\n") == 1 and sentence in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("generate", "--model", "nowhere", "--prompt", "a"), "nowhere"),
        (("pretrain", "--output", "x", "--steps", "0"), "steps: expected at least 1, got 0"),
    ],
    ids=["no such model", "no steps"],
)
def test_a_mistake_is_one_sentence(run: Run, arguments: tuple[str, ...], sentence: str) -> None:
    status, _, err = run(*arguments)
    assert status == 1
    assert err.startswith("warploom: ") and err.count("\n") == 1
    assert sentence in err


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("typer", ("info",)),
        ("rich", ("info",)),
        ("tokenizers", ("generate", "--model", "{model}", "--prompt", "a")),
        ("transformers", ("demo", "--output", "{model}/out")),
        ("matplotlib", ("demo", "--output", "{model}/out")),
        ("matplotlib", ("pretrain", "--output", "{model}/out")),
    ],
)
def test_missing_extra_is_named(
    missing: str,
    arguments: tuple[str, ...],
    run: Run,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [missing, *(name for name in sys.modules if name.startswith(f"{missing}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    status, _, err = run(*(argument.format(model=model) for argument in arguments))
    assert status == 1
    assert err == (
        f'warploom: {missing} is not installed; it comes with: pip install "warploom[demo]"\n'
    )


def test_bench_runs_the_checkouts_benches(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__main__.py").write_text(
        "import pathlib, sys; pathlib.Path('seen').write_text(' '.join(sys.argv[1:])); sys.exit(3)"
    )
    monkeypatch.setattr(warploom, "__file__", str(tmp_path / "python" / "warploom" / "__init__.py"))
    assert run("bench", "norm", "--quick")[0] == 3
    assert (tmp_path / "seen").read_text() == "norm --quick"


def test_module_is_the_command() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "warploom", "--help"], capture_output=True, text=True, check=True
    )
    assert "Usage: warploom" in finished.stdout
