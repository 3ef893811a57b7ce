"""The ``warploom`` command. Its options are read with typer, which ``warploom[demo]`` installs."""

# No `from __future__ import annotations` here: typer evaluates the annotations of the commands, and
# typer itself is a local name, imported only when the command runs.
import inspect
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import warploom
from warploom.recipes._extras import MissingExtraError, make_console, require


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a mistake of the caller is one sentence and exit status 1, no traceback.

    Args:
        arguments: the words after ``warploom``; default, those of the process.
    """
    try:
        application()(args=arguments, prog_name="warploom")
    except (MissingExtraError, OSError, ValueError, FloatingPointError) as error:
        print(f"warploom: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def application() -> Any:
    """The typer application with all commands."""
    typer = require("typer")
    option = typer.Option
    app = typer.Typer(
        help="GPU kernels with a CPU path for each, and the models built on them.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def info() -> None:
        """Versions, compiled kernels, and what would serve each op here and why."""
        from warploom.recipes.info import print_info

        print_info()

    def demo(
        output: Annotated[Path, option(help="Folder for models, plots and tables.")] = Path("out"),
        steps: Annotated[int, option(min=1, help="Optimiser steps of the training.")] = 1100,
        op_tokens: Annotated[int, option(min=1, help="Size of the ops' inputs.")] = 1024,
    ) -> None:
        """Train small language models and a flow, generate, compare with transformers, measure."""
        from warploom.recipes.demo import run_demo

        run_demo(output, steps=steps, op_tokens=op_tokens)

    def generate(
        model: Annotated[Path, option(help="Hugging Face directory with a tokenizer.json.")],
        prompt: Annotated[str, option(help="Text to continue.")],
        adapter: Annotated[Path | None, option(help="Directory of an adapter on it.")] = None,
        max_new_tokens: Annotated[int, option(min=0, help="Most tokens to add.")] = 128,
        temperature: Annotated[float | None, option(help="Sample; 1 is as trained.")] = None,
        top_k: Annotated[int | None, option(help="Sample among the k likeliest.")] = None,
        top_p: Annotated[float | None, option(help="Sample among the likeliest p.")] = None,
        repetition_penalty: Annotated[float, option(help="Above 1: repeat less.")] = 1.0,
        stop: Annotated[list[str] | None, option(help="End after this text; repeatable.")] = None,
        seed: Annotated[int | None, option(help="Seed of the sampling.")] = None,
    ) -> None:
        """Continue a prompt, printed as it comes; greedy unless a sampling option is given."""
        from warploom.recipes.generate import generate_text

        def show(text: str) -> None:
            print(text, end="", flush=True)

        generate_text(
            model,
            prompt,
            adapter=adapter,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            stop=stop or (),
            seed=seed,
            on_text=show,
        )
        print()

    def kv_cache(
        model: Annotated[str, option(help="Hugging Face directory, or a published shape's name.")],
        context: Annotated[int, option(min=1, help="Tokens of a text.")] = 4096,
        batch: Annotated[int, option(min=1, help="Texts.")] = 1,
    ) -> None:
        """Size of a model's cache, and what it would be with other kinds of attention."""
        from warploom.recipes.kv_cache import cache_sizes, print_cache_sizes

        print_cache_sizes(cache_sizes(model, context, batch), make_console())

    def bench(
        arguments: Annotated[
            list[str] | None, typer.Argument(help="Passed to the benches.")
        ] = None,
    ) -> None:
        """In a source checkout run the benches; elsewhere measure the ops beside PyTorch."""
        run_bench(arguments or ())

    for command in (info, demo, generate):
        app.command()(command)
    app.command("kv-cache")(kv_cache)
    for name, recipe in _recipe_commands(option).items():
        app.command(name)(recipe)
    app.command("memory")(_memory_command(option))
    app.add_typer(_convert_commands(typer), name="convert")
    app.add_typer(_lora_commands(typer), name="lora")
    app.command(context_settings={"ignore_unknown_options": True})(bench)
    return app


def run_bench(arguments: Sequence[str]) -> None:
    """Run ``python -m bench`` of the source checkout, or print the op table where there is none."""
    checkout = Path(warploom.__file__).resolve().parents[2]
    if (checkout / "bench" / "__main__.py").is_file():
        command = [sys.executable, "-m", "bench", *arguments]
        raise SystemExit(subprocess.run(command, cwd=checkout, check=False).returncode)
    import torch

    from warploom.recipes.op_cases import CASES
    from warploom.recipes.op_table import measure, print_results

    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = [measure(case, torch.float32, device=device) for case in CASES]
    print_results(results, make_console())


def _convert_commands(typer: Any) -> Any:
    """The convert commands, one for each kind of attention."""
    option = typer.Option
    app = typer.Typer(help="Give a LLaMA another kind of attention.", no_args_is_help=True)
    Directory = Annotated[Path, option(help="Hugging Face directory of a LLaMA or a relative.")]
    Target = Annotated[Path, option(help="New directory, with the same tokenizer.")]
    Text = Annotated[Path | None, option(help="UTF-8 file to measure both models' perplexity on.")]
    Context = Annotated[
        int, option(min=2, help="Tokens of a window of the text, and of the cache.")
    ]

    def gqa(
        model: Directory,
        output: Target,
        kv_heads: Annotated[int, option(min=1, help="Key/value heads, a divisor of the model's.")],
        text: Text = None,
        context: Context = 2048,
    ) -> None:
        """Fewer key/value heads, each the mean of several: a start for further training."""
        from warploom.recipes.convert import convert_to_gqa, print_measured

        console = make_console()
        measured = convert_to_gqa(model, output, kv_heads, text=text, context=context)
        print_measured(measured, console)

    def mla(
        model: Directory,
        output: Target,
        latent: Annotated[int | None, option(help="Features of the latent; else all.")] = None,
        rope: Annotated[int | None, option(help="Features of the rotary key; else all.")] = None,
        calibration: Annotated[
            Path | None, option(help="UTF-8 file; what it excites in the model is kept first.")
        ] = None,
        text: Text = None,
        context: Context = 2048,
    ) -> None:
        """Latent attention: the same function with the whole sizes, close to it with smaller ones."""
        from warploom.recipes.convert import convert_to_mla, print_measured

        console = make_console()
        measured = convert_to_mla(
            model,
            output,
            d_latent=latent,
            d_rope=rope,
            calibration=calibration,
            text=text,
            context=context,
        )
        print_measured(measured, console)

    for command in (gqa, mla):
        app.command()(command)
    return app


def _lora_commands(typer: Any) -> Any:
    """The commands on adapters."""
    option = typer.Option
    app = typer.Typer(help="Low-rank adapters of models.", no_args_is_help=True)

    @app.callback()  # type: ignore[untyped-decorator]
    def group() -> None:
        """Low-rank adapters of models."""

    def extract(
        base: Annotated[Path, option(help="Hugging Face directory of the model before.")],
        tuned: Annotated[Path, option(help="The same model, fine-tuned as a whole.")],
        output: Annotated[Path, option(help="Directory of the adapter.")],
        rank: Annotated[int | None, option(min=1, help="Most rank of a layer.")] = None,
        energy: Annotated[
            float | None, option(help="Or the share of each layer's change to keep, such as 0.99.")
        ] = None,
        text: Annotated[
            Path | None, option(help="UTF-8 file to measure the perplexity on.")
        ] = None,
        context: Annotated[int, option(min=2, help="Tokens of a window of the text.")] = 2048,
    ) -> None:
        """What a full fine-tuning changed as an adapter, by singular value decomposition."""
        from warploom.recipes.lora_extract import extract, print_extracted

        extracted = extract(
            base, tuned, output, rank=rank, energy=energy, text=text, context=context
        )
        print_extracted(extracted, make_console())

    app.command()(extract)
    return app


def _memory_command(option: Callable[..., Any]) -> Callable[..., None]:
    """The memory command."""

    def memory(
        model: Annotated[str, option(help="Hugging Face directory, or a published shape's name.")],
        batch_size: Annotated[int, option(min=1, help="Texts of a forward pass.")] = 1,
        sequence_length: Annotated[int, option(min=1, help="Tokens of a text.")] = 512,
        precision: Annotated[
            str, option(help="mixed, mixed-without-master, bfloat16, float32 or autocast.")
        ] = "mixed",
        lora_r: Annotated[int, option(min=1, help="Rank of the adapters.")] = 16,
        gradient_checkpointing: Annotated[
            bool, option(help="Recompute each layer in the backward pass.")
        ] = False,
        fused_loss: Annotated[bool, option(help="Never store all logits.")] = True,
    ) -> None:
        """Bytes of a training step: full fine-tuning, LoRA and QLoRA."""
        from warploom.recipes.memory import METHODS, print_memory, training_memory

        memories = {
            method: training_memory(
                model,
                method,
                batch_size=batch_size,
                sequence_length=sequence_length,
                precision=precision,
                lora_r=lora_r,
                gradient_checkpointing=gradient_checkpointing,
                fused_loss=fused_loss,
            )
            for method in METHODS
        }
        print_memory(memories, make_console())

    return memory


def _config_command(
    option: Callable[..., Any], config: Any, run: Callable[[Any], Path], text: str
) -> Callable[..., None]:
    """A command with one option for each field of a recipe's config, with its text."""

    def command(**values: Any) -> None:
        print(run(config(**values)))

    hints = get_type_hints(config, include_extras=True)
    parameters = []
    for field in fields(config):
        annotated, explanation = get_args(hints[field.name])
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=Annotated[annotated, option(help=explanation)],
            )
        )
    command.__doc__ = text
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _recipe_commands(option: Callable[..., Any]) -> dict[str, Callable[..., None]]:
    """The commands that run a recipe from its config."""
    from warploom.recipes.alpaca import FineTuneConfig, fine_tune
    from warploom.recipes.flows import FlowRunConfig, train_flow
    from warploom.recipes.pretrain import PretrainConfig, pretrain
    from warploom.recipes.self_instruct import SelfInstructConfig, self_instruct
    from warploom.recipes.spp_net import SPPNetConfig, spp_net
    from warploom.recipes.tabular_flows import TabularConfig, compare_tables

    recipes: dict[str, tuple[Any, Callable[[Any], Path], str]] = {
        "pretrain": (
            PretrainConfig,
            pretrain,
            "Train a language model from random weights on a text, as in the LLaMA paper.",
        ),
        "sft": (
            FineTuneConfig,
            fine_tune,
            "Fine-tune a language model on instructions, as Stanford Alpaca: whole, LoRA or QLoRA.",
        ),
        "self-instruct": (
            SelfInstructConfig,
            self_instruct,
            "Let a language model make instructions, from a few of one's own.",
        ),
        "flow": (
            FlowRunConfig,
            train_flow,
            "Train a normalizing flow on scikit-learn's digits or one of its tables.",
        ),
        "flow-tables": (
            TabularConfig,
            compare_tables,
            "Held-out likelihoods of flows on scikit-learn's tables, beside zuko's.",
        ),
        "spp-net": (
            SPPNetConfig,
            spp_net,
            "Train SPP-Net: digits of several sizes, or the detection of coins in a photograph.",
        ),
    }
    return {name: _config_command(option, *recipe) for name, recipe in recipes.items()}
