"""Adapters on disk: to peft and back, what files say that is not served, and files that are broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from warploom import lora
from warploom.models.checkpoint import CheckpointError
from warploom.models.llama import Llama
from warploom.nn.lora_layer import LoRALayer

from tests.integrations.tiny_models import VOCABULARY, build
from tests.lora.test_peft_parity import assert_close

FIELDS: dict[str, Any] = {
    "r": 5,
    "lora_alpha": 7,
    "init_lora_weights": False,
    "task_type": "CAUSAL_LM",
}
CASES: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": "all-linear", "lora_dropout": 0.1},
    "rsLoRA": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "DoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "a module trained as a whole": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "ranks of their own": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {r"1\.self_attn\.v_proj": 2},
    },
}  # fmt: skip


def base() -> Any:
    return build("qwen2").double()


def tokens() -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (2, 9))


@torch.no_grad()
def train(model: nn.Module) -> None:
    """Moves every parameter that is trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn_like(parameter))


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Of an adapter alone: peft adds an embedding's base."""
    named = load_file(directory / "adapter_model.safetensors")
    return {name: value for name, value in named.items() if not name.endswith("base_layer.weight")}


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_what_is_saved_here(case, tmp_path):
    options = {**FIELDS, **CASES[case]}
    ours = lora.get_lora_model(base(), lora.LoraConfig(**options), autocast_adapter_dtype=False)
    train(ours)
    lora.save_adapter(ours.eval(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path, autocast_adapter_dtype=False).eval()
    ids = tokens()
    assert_close(ours(ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize("case", CASES)
def test_what_peft_has_saved_is_read_here_and_saved_again_the_same(case, tmp_path):
    options = {**FIELDS, **CASES[case]}
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**options), autocast_adapter_dtype=False)
    train(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = base()
    config = lora.load_adapter(ours, tmp_path / "theirs", autocast_adapter_dtype=False)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    ids = tokens()
    assert_close(ours.eval()(ids).logits, theirs(input_ids=ids).logits)
    lora.save_adapter(ours, tmp_path / "ours")
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert lora.LoraConfig.from_pretrained(tmp_path / "ours") == config


@pytest.mark.parametrize("scaling", [{}, {"use_rslora": True}], ids=["LoRA", "rsLoRA"])
@pytest.mark.parametrize("method", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_was_a_part_of_the_base_is_saved_as_a_change_of_it(
    method, scaling, tmp_path
):
    options = {
        **FIELDS, **scaling, "target_modules": ["q_proj", "embed_tokens", "down_proj"],
        "init_lora_weights": method, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3},
    }  # fmt: skip
    ours = lora.get_lora_model(base(), lora.LoraConfig(**options))
    train(ours)
    lora.save_adapter(ours, tmp_path)
    ids = tokens()
    with torch.no_grad():
        expected = ours.eval()(ids).logits
        again = base().eval()
        lora.load_adapter(again, tmp_path)
        assert_close(again(ids).logits, expected)
        theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
        assert_close(theirs(input_ids=ids).logits, expected)


def test_a_llama_of_ours_trains_and_peft_reads_its_adapter(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    ours = Llama.from_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"r": 5, "lora_alpha": 7, "target_modules": "all-linear"}
    lora.get_lora_model(ours, lora.LoraConfig(**options, lora_dropout=0.1))
    ids = tokens()
    optimizer = torch.optim.AdamW(lora.lora_plus_groups(ours, lr=3e-3, ratio=4))
    losses = []
    for _ in range(15):
        logits = ours(ids)[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    lora.save_adapter(ours.eval(), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        again = Llama.from_pretrained(tmp_path / "base").eval()
        lora.load_adapter(again, tmp_path / "adapter")
        assert torch.equal(again(ids), ours(ids))
        merged = lora.merge_and_unload(again)
        merged.save_pretrained(tmp_path / "merged")
        reloaded = Llama.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(reloaded(ids), ours(ids), rtol=1e-4, atol=1e-4)


def saved(directory: Path) -> None:
    config = lora.LoraConfig(**FIELDS, target_modules=["q_proj"])
    lora.save_adapter(lora.get_lora_model(base(), config), directory)


def test_an_adapter_takes_the_place_of_the_one_before_and_leaves_other_files(tmp_path):
    saved(tmp_path)
    (tmp_path / "README.md").write_text("notes")
    saved(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_tensors_that_do_not_fit_are_named_and_nothing_is_loaded(change, tmp_path):
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    named = load_file(path)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    if change == "missing":
        del named[key]
    elif change == "unexpected":
        key = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
        named[key] = torch.zeros(5, 32)
    else:
        named[key] = torch.zeros(6, 32)
    save_file(named, path)
    model = base()
    with pytest.raises(CheckpointError, match=key):
        lora.load_adapter(model, tmp_path)
    assert lora.adapter_configs(model) == {}
    layers = [module for module in model.modules() if isinstance(module, LoRALayer)]
    assert all(not layer.r and not list(layer.lora_A.parameters()) for layer in layers)


def test_files_that_are_cut_or_absent_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        lora.load_adapter(base(), tmp_path / "nowhere")
    saved(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
        lora.load_adapter(base(), tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        lora.load_adapter(base(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        lora.load_adapter(base(), tmp_path)


def test_an_old_file_of_pytorchs_is_read(tmp_path):
    saved(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter_model.bin")
    model, old = base(), base()
    lora.load_adapter(model, tmp_path)
    weights.unlink()
    lora.load_adapter(old, tmp_path)
    ids = tokens()
    assert torch.equal(model(ids).logits, old(ids).logits)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("target_parameters", ["experts.down_proj"]),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [1]),
        ("a_field_of_a_later_version", 3),
        ("peft_type", "VERA"),
        ("init_lora_weights", "eva"),
    ],
)
def test_what_is_not_served_is_refused_by_name(field, value, tmp_path):
    saved(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(CheckpointError, match=field):
        lora.load_adapter(base(), tmp_path)


def test_every_field_that_peft_writes_by_default_is_accepted():
    written = json.loads(json.dumps(peft.LoraConfig(target_modules=["a"]).to_dict(), default=list))
    ours = lora.LoraConfig.from_dict(written)
    assert ours == lora.LoraConfig(target_modules=["a"])
    theirs = peft.LoraConfig(
        **{name: value for name, value in ours.to_dict().items() if name != "peft_type"}
    )
    assert (theirs.r, theirs.lora_alpha, theirs.lora_dropout) == (
        ours.r,
        ours.lora_alpha,
        ours.lora_dropout,
    )
