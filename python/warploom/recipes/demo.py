"""The whole library on real input in minutes: train, save, reload, generate, compare, measure."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from warploom.recipes._extras import make_console, require
from warploom.recipes.fine_tune_demo import fine_tune_demo, print_fine_tune_demo
from warploom.recipes.flows_demo import flows_demo, print_flows_demo
from warploom.recipes.generate import generate_text
from warploom.recipes.kv_cache import cache_sizes
from warploom.recipes.op_cases import CASES
from warploom.recipes.op_table import measure, print_results, write_results
from warploom.recipes.pretrain import PretrainConfig, pretrain
from warploom.recipes.spp_demo import spp_demo

PROMPT = "Return the"
_NEW_TOKENS = 48
_EXTRAS = ("rich", "tokenizers", "matplotlib", "transformers", "sklearn", "skimage")


class DemoError(ValueError):
    """Something that the demo shows did not come out as it must."""


def run_demo(output: Path, *, steps: int = 1100, op_tokens: int = 1024) -> None:
    """Train a small LLaMA and a small DeepSeek-V2 on CPython's documentation, and show what they do.

    The LLaMA is fine-tuned, too, with LoRA on instructions. Last, a normalizing flow learns digits.

    Writes ``output/pretrain`` and ``output/pretrain-deepseek-v2`` (log, checkpoint, ``loss.png``,
    ``model/``) and ``output/fine-tuning`` (instructions, log, ``loss.png``, adapter), replacing what
    an earlier demo left there, ``output/ops.json``, ``output/ops.png``, ``output/flow``,
    ``output/flow_samples.png`` and ``output/spp.png``.

    Args:
        output: the folder for all files.
        steps: optimiser steps of the LLaMA's training; the DeepSeek-V2 takes a third of them, the flow a
            fifth.
        op_tokens: tokens of the inputs on which the ops are measured.

    Raises:
        DemoError: the command or transformers generated other tokens from the checkpoint than the
            library.
    """
    for package in _EXTRAS:
        require(package)
    console = make_console()
    start = time.perf_counter()

    bfloat16 = bfloat16_is_faster()
    console.rule("1. Pretraining a LLaMA on the documentation that ships with CPython")
    run_directory = output / "pretrain"
    model = _pretrain(run_directory, steps=steps, bfloat16=bfloat16)
    console.rule("2. The saved model, reloaded by `warploom generate`, and by transformers")
    _show(model, console)
    console.rule("3. A DeepSeek-V2: latent attention, experts, a cache of latents")
    latent_directory = output / "pretrain-deepseek-v2"
    latent_model = _pretrain(
        latent_directory,
        steps=max(1, steps // 3),
        bfloat16=bfloat16,
        architecture="deepseek-v2",
        intermediate_size=512,
    )
    _show(latent_model, console)
    console.print("bytes that a token takes in the cache, in 16 bits:")
    for name, directory in (("LLaMA", model), ("DeepSeek-V2", latent_model)):
        sizes = cache_sizes(directory, context=1)
        own = next(size for size in sizes if size.is_own)
        whole = sizes[0].bytes_per_token
        console.print(
            f"  {name}: {own.bytes_per_token:,} ({own.kind}; with all heads' keys and values "
            f"{whole:,})",
            highlight=False,
        )
    console.rule("4. LoRA on instructions made of the standard library's documentation")
    tuned_directory = output / "fine-tuning"
    shutil.rmtree(tuned_directory, ignore_errors=True)
    tuned = fine_tune_demo(model, tuned_directory, steps=max(1, steps // 7), bfloat16=bfloat16)
    print_fine_tune_demo(tuned, console)
    trained = time.perf_counter()

    console.rule("5. The ops on this machine")
    results = []
    progress = require("rich.progress")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        for case in progress.track(CASES, f"measuring in {dtype}", console=console):
            results.append(measure(case, dtype, size=op_tokens, device=device))
    print_results(results, console)
    write_results(results, output)
    measured = time.perf_counter()

    console.rule("6. A RealNVP on scikit-learn's digits")
    flow = flows_demo(output, steps=max(1, steps // 5))
    print_flows_demo(flow, console)
    console.rule("7. SPP-Net: digits of several sizes, coins in a photograph")
    pyramids = spp_demo(output, console, steps=max(1, steps // 16))
    end = time.perf_counter()

    console.rule("Done")
    console.print(
        f"{trained - start:.0f} s training, generation and comparison, {measured - trained:.0f} s ops, "
        f"{end - measured:.0f} s vision: {end - start:.0f} s in all"
    )
    runs = (run_directory, latent_directory, tuned_directory / "lora")
    pictures = [directory / "loss.png" for directory in runs]
    pictures += [flow.samples, pyramids, output / "ops.png"]
    models = (model, latent_model, tuned.adapter, flow.model)
    for path in (*pictures, output / "ops.json", *models):
        console.print(f"  {path}", highlight=False)


def _pretrain(directory: Path, *, steps: int, **settings: Any) -> Path:
    """The model of a fresh run in a folder."""
    shutil.rmtree(directory, ignore_errors=True)
    warmup_steps = max(1, steps // 20)
    config = PretrainConfig(output=directory, steps=steps, warmup_steps=warmup_steps, **settings)
    return pretrain(config)


def _show(model: Path, console: Any) -> None:
    """Prints continuations of a saved model, and checks them against transformers'."""
    greedy = _run_generate(model)
    console.print(greedy, markup=False, highlight=False)
    console.rule("sampled: --temperature 0.7 --top-p 0.9", characters="-")
    sampled = _run_generate(model, "--temperature", "0.7", "--top-p", "0.9", "--seed", "1")
    console.print(sampled, markup=False, highlight=False)
    compare_with_transformers(model, greedy)
    console.print("transformers generates the same tokens from the same folder")


def bfloat16_is_faster(repeats: int = 30) -> bool:
    """Whether this machine multiplies the demo's matrices faster in bfloat16: not all CPUs do."""
    if torch.cuda.is_available():
        return True
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(1024, 256, dtype=dtype), torch.ones(256, 704, dtype=dtype)
        torch.mm(left, right)
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(left, right)
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


def compare_with_transformers(model: Path, printed: str) -> None:
    """Check that transformers continues ``PROMPT`` as the library and its command do.

    Args:
        model: the Hugging Face directory.
        printed: what ``warploom generate`` printed for the prompt.

    Raises:
        DemoError: naming the tokens or texts that differ.
    """
    transformers = require("transformers")
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    peer = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        tokens = peer.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)[0].tolist()
    ours = generate_text(model, PROMPT, max_new_tokens=_NEW_TOKENS)
    if tokens != ours.prompt_ids + ours.new_ids:
        raise DemoError(
            f"tokens: transformers generated {tokens}, warploom {ours.prompt_ids + ours.new_ids}"
        )
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if text.strip() != printed.strip():
        raise DemoError(f"warploom generate printed {printed!r}, transformers' text is {text!r}")


def _run_generate(model: Path, *options: str) -> str:
    """What the command prints for ``PROMPT``."""
    command: list[Any] = [sys.executable, "-m", "warploom", "generate", "--model", model]
    command += ["--prompt", PROMPT, "--max-new-tokens", str(_NEW_TOKENS), *options]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise DemoError(f"warploom generate failed:\n{finished.stderr}")
    return finished.stdout
