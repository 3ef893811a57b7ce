"""attn_implementation="warploom": transformers' models give what they give with their own eager attention."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.generation.configuration_utils import CompileConfig
from warploom.integrations import transformers as route

from tests.integrations.tiny_models import DECODERS, VOCABULARY, WINDOW, build

LENGTH = 12
Calls = list[tuple[str, dict[str, Any]]]


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Registers for the test; every call that reaches our functions, with its options."""
    seen: Calls = []
    for name in ("attention", "attention_varlen"):
        ours = getattr(route, name)

        def record(*args: Any, ours: Any = ours, name: str = name, **options: Any) -> Any:
            if not torch.compiler.is_compiling():
                seen.append((name, options))
            return ours(*args, **options)

        monkeypatch.setattr(route, name, record)
    route.register()
    yield seen
    route.unregister()


def tokens(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length))


def padded(side: str) -> Tensor | None:
    """[2, LENGTH], 1 for a real token; the first row has four that are not."""
    if side == "none":
        return None
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if side != "ones":
        mask[0, slice(0, 4) if side == "left" else slice(LENGTH - 4, LENGTH)] = 0
    return mask


def assert_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    bound = 1e-5 * max(1.0, expected.abs().max().item())
    # Written so that a NaN fails.
    assert (actual - expected).abs().max() <= bound, what


def check_model(model: Any, real: Tensor, inputs: dict[str, Any]) -> None:
    """Logits of the real tokens, and the gradients of all parameters, on eager and on warploom."""
    weights = torch.randn(*real.shape, 1)
    results = []
    for implementation in ("eager", "warploom"):
        model.set_attn_implementation(implementation)
        logits = model(**inputs).logits[real]
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loss = (logits.square() * weights[real]).mean()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        results.append((logits.detach(), grads))
    assert_equal(results[1][0], results[0][0], "logits")
    for (name, _), actual, expected in zip(model.named_parameters(), results[1][1], results[0][1]):
        assert (actual is None) == (expected is None), name
        if expected is not None:
            assert_equal(actual, expected, f"gradient of {name}")


@pytest.mark.parametrize("side", ["none", "ones", "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name: str, side: str, calls: Calls) -> None:
    mask = padded(side)
    real = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    check_model(
        build(name), real, {"input_ids": tokens(), "attention_mask": mask, "use_cache": False}
    )
    assert len(calls) == 2
    for function, options in calls:
        assert function == "attention" and options["causal"] and "bias" not in options
        assert ("key_padding_mask" in options) == (side in ("left", "right"))
        assert (options["softcap"] > 0) == (name == "gemma2")
        assert (options["sinks"] is not None) == (name == "gpt_oss")
    windows = sum(options.get("window") == (WINDOW - 1, 0) for _, options in calls)
    assert windows == {"mistral": 2, "gemma2": 1, "gpt_oss": 1, "qwen2_moe": 1}.get(name, 0)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["llama4", "bert", "modernbert", "t5"])
def test_other_patterns(name: str, side: str, calls: Calls) -> None:
    mask = padded(side)
    real = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    if name == "t5":
        inputs["decoder_input_ids"] = tokens(2, LENGTH)
        real = torch.ones_like(real)
    check_model(build(name), real, inputs)
    assert len(calls) == (6 if name == "t5" else 2)
    tables = sum("bias" in options for _, options in calls)
    assert tables == {"llama4": 1, "bert": 0, "modernbert": 1, "t5": 6}[name]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens(name: str, cache: str, calls: Calls) -> None:
    model, prompt = build(name), tokens()
    for mask in (padded("ones"), padded("left")):
        generated = []
        for implementation in ("eager", "warploom"):
            model.set_attn_implementation(implementation)
            generated.append(
                model.generate(
                    prompt,
                    attention_mask=mask,
                    max_new_tokens=8,
                    do_sample=False,
                    cache_implementation=cache,
                )
            )
        assert torch.equal(*generated)
    assert len(calls) == 2 * 2 * 8
    assert all("bias" not in options for _, options in calls)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_prompt_in_pieces(name: str, cache: str, calls: Calls) -> None:
    """Queries fewer than the keys, at the end of a growing cache and in the midst of a static one."""
    model, prompt = build(name), tokens()
    with torch.no_grad():
        expected = model(prompt, use_cache=False).logits
        model.set_attn_implementation("warploom")
        past = (
            DynamicCache(config=model.config)
            if cache == "dynamic"
            else StaticCache(model.config, 20)
        )
        pieces = [
            model(piece, past_key_values=past, use_cache=True).logits
            for piece in prompt.split([7, 4, 1], 1)
        ]
    assert_equal(torch.cat(pieces, dim=1), expected, "logits")
    assert all("bias" not in options for _, options in calls)


@pytest.mark.parametrize(
    ("name", "side"),
    [("llama", "none"), ("qwen2", "left"), ("mistral", "left"), ("gemma2", "right")],
)
def test_compiled(name: str, side: str) -> None:
    model, prompt, mask = build(name), tokens(), padded(side)
    real = slice(None) if mask is None else mask.bool()
    with torch.no_grad():
        expected = model(prompt, attention_mask=mask, use_cache=False).logits[real]
        model.set_attn_implementation("warploom")
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        actual = compiled(prompt, attention_mask=mask, use_cache=False).logits[real]
    assert_equal(actual, expected, "logits")


def test_compiled_decoding() -> None:
    """`generate` compiles the steps of a static cache."""
    model, prompt, mask = build("mistral"), tokens(), padded("left")
    options = {
        "attention_mask": mask,
        "max_new_tokens": 4,
        "do_sample": False,
        "cache_implementation": "static",
    }
    expected = model.generate(prompt, **options)
    model.set_attn_implementation("warploom")
    torch._dynamo.reset()
    compilation = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compilation._compile_all_devices = True
    assert torch.equal(model.generate(prompt, **options, compile_config=compilation), expected)


def pack(documents: list[Tensor]) -> dict[str, Any]:
    """The inputs that transformers' collator of packed documents makes."""
    lengths = torch.tensor([len(document) for document in documents])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    return {
        "input_ids": torch.cat(documents).unsqueeze(0),
        "position_ids": positions.unsqueeze(0),
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
        "use_cache": False,
    }


# GPT-OSS makes its masks without a look at the position ids, whatever runs its attention.
@pytest.mark.parametrize(
    ("name", "told"),
    [(name, "cu_seq_lens") for name in DECODERS]
    + [(name, "position_ids") for name in DECODERS if name != "gpt_oss"],
)
def test_packed_documents(name: str, told: str, calls: Calls) -> None:
    model = build(name)
    documents = [tokens(1, length)[0] for length in (7, 1, 9)]
    expected = torch.cat(
        [model(document[None], use_cache=False).logits[0] for document in documents]
    )
    inputs = pack(documents)
    if told == "position_ids":
        inputs = {key: inputs[key] for key in ("input_ids", "position_ids", "use_cache")}
    model.set_attn_implementation("warploom")
    actual = model(**inputs).logits[0]
    assert_equal(actual, expected, "logits")
    assert [function for function, _ in calls] == ["attention_varlen"] * 2
    weights = torch.randn_like(actual)
    wanted = torch.autograd.grad(
        (expected * weights).sum(), list(model.parameters()), allow_unused=True
    )
    grads = torch.autograd.grad(
        (actual * weights).sum(), list(model.parameters()), allow_unused=True
    )
    for grad, want in zip(grads, wanted):
        if want is not None:
            assert_equal(grad, want, "gradient")


def test_packed_rows() -> None:
    """Documents in a batch of two rows, which begin where a row begins."""
    model = build("mistral")
    documents = [tokens(1, length)[0] for length in (7, 5, 4, 8)]
    expected = torch.cat(
        [model(document[None], use_cache=False).logits[0] for document in documents]
    )
    inputs = pack(documents)
    model.set_attn_implementation("warploom")
    rows = {key: inputs[key].view(2, 12) for key in ("input_ids", "position_ids")}
    assert_equal(model(**rows, use_cache=False).logits.flatten(0, 1), expected, "logits")


def test_packed_documents_compiled() -> None:
    model = build("mistral")
    documents = [tokens(1, length)[0] for length in (7, 1, 9)]
    with torch.no_grad():
        expected = torch.cat([model(one[None], use_cache=False).logits[0] for one in documents])
        model.set_attn_implementation("warploom")
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_equal(compiled(**pack(documents)).logits[0], expected, "logits")


@pytest.mark.parametrize("form", ["bool", "additive"])
def test_a_mask_of_the_caller(form: str, calls: Calls) -> None:
    seen = torch.rand(2, 1, LENGTH, LENGTH) < 0.5
    seen |= torch.eye(LENGTH, dtype=torch.bool)
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    model, prompt = build("llama"), tokens()
    with torch.no_grad():
        expected = model(prompt, attention_mask=additive, use_cache=False).logits
        model.set_attn_implementation("warploom")
        mask = seen if form == "bool" else additive
        assert_equal(model(prompt, attention_mask=mask, use_cache=False).logits, expected, "logits")
    assert all("bias" in options for _, options in calls)


def test_a_bias_beside_a_mask() -> None:
    """position_bias is added to a mask of either kind, as far as the mask's keys go."""
    query, key, value = torch.randn(3, 2, 4, 6, 8)
    bias = torch.randn(1, 4, 6, 6, requires_grad=True)
    padding = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    padding[0, ..., :2] = False
    table = torch.zeros(2, 1, 6, 6).masked_fill(~padding, float("-inf"))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, bias + table)
    (wanted,) = torch.autograd.grad(expected.square().sum(), bias)
    for mask in (padding, padding.expand(2, 1, 6, 6), table):
        actual, _ = route.attend(torch.nn.Module(), query, key, value, mask, position_bias=bias)
        assert_equal(actual.transpose(1, 2), expected, "output")
        (grad,) = torch.autograd.grad(actual.square().sum(), bias)
        assert_equal(grad, wanted, "gradient")


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "modernbert"])
def test_a_row_of_padding(name: str) -> None:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0] = 0
    model = build(name)
    model.set_attn_implementation("warploom")
    logits = model(tokens(), attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    grads = torch.autograd.grad(logits.sum(), list(model.parameters()), allow_unused=True)
    assert all(torch.isfinite(grad).all() for grad in grads if grad is not None)


def test_dropout(calls: Calls) -> None:
    model, prompt = build("llama", attention_dropout=0.3).train(), tokens()
    model.set_attn_implementation("warploom")
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model(prompt, use_cache=False).logits.detach())
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert all(options["dropout_p"] == 0.3 for _, options in calls)


def test_registration() -> None:
    route.register()
    assert "warploom" in AttentionInterface() and "warploom" in AttentionMaskInterface()
    with pytest.raises(ValueError, match="name: expected one that is not taken, got 'sdpa'"):
        route.register("sdpa")
    route.register("another")
    assert "another" in AttentionInterface()
    route.unregister("another")
    route.unregister("another")
    route.unregister("sdpa")
    assert "another" not in AttentionMaskInterface() and "sdpa" in AttentionInterface()
    route.unregister()
    with pytest.raises(ValueError, match="warploom"):
        build("llama").set_attn_implementation("warploom")


def test_nothing_happens_on_import() -> None:
    code = (
        "import sys, warploom, warploom.integrations.transformers, warploom.integrations.torch_attention\n"
        "assert 'transformers' not in sys.modules\n"
        "import torch\n"
        "assert 'warploom' not in torch.nn.attention.list_flash_attention_impls()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("argument", ["cache", "output_attentions", "sinks"])
def test_refuses(argument: str) -> None:
    states = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match=f"attend: {argument}: expected none"):
        route.attend(torch.nn.Module(), states, states, states, None, **{argument: True})


def test_refuses_a_mask_of_no_known_form() -> None:
    states = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match=r"attention_mask: .*int64 \(1, 3\)"):
        route.attend(torch.nn.Module(), states, states, states, torch.ones(1, 3, dtype=torch.long))
    padding = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="attention_mask: expected none beside cu_seq_lens_q"):
        route.attend(
            torch.nn.Module(), states, states, states, padding, cu_seq_lens_q=torch.tensor([0, 3])
        )
