"""Llama's directories: transformers' layout both ways, Meta's layout, and damaged ones."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from warploom.models.checkpoint import CheckpointError
from warploom.models.llama import Llama
from warploom.models.llama_config import LlamaConfig
from warploom.reference.rope import apply_rotary

from tests.models.tiny_llama import ROPE, tiny_llama

IDS = torch.arange(60).view(2, 30) * 3 % 192


def same_weights(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# ---------------------------------------------------------------- transformers' layout


@pytest.mark.parametrize("shard", ["5GB", "60KB"], ids=["one-file", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_directory_saved_by_transformers_loads(peer_directory, shard, tied):
    peer, directory = peer_directory(shard=shard, tie_word_embeddings=tied)
    assert (directory / "model.safetensors.index.json").exists() == (shard != "5GB")
    ours = Llama.from_pretrained(directory)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    expected = peer.state_dict()
    assert expected.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("shard", ["5GB", 20_000], ids=["one-file", "sharded"])
@pytest.mark.parametrize("rope", ROPE)
def test_a_directory_saved_here_loads_in_transformers(tmp_path, rope, shard):
    ours = tiny_llama(
        rope_parameters=ROPE[rope], max_position_embeddings=128, initializer_range=0.1
    )
    ours.save_pretrained(tmp_path / "ours", max_shard_size=shard)
    peer = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert peer.config.rope_parameters == ours.config.rope_parameters
    torch.testing.assert_close(peer(IDS).logits, ours(IDS), rtol=0, atol=1e-5)


def test_no_shard_is_larger_than_asked_unless_it_is_one_tensor(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "m", max_shard_size=10_000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    for name in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "m" / name).values()
        assert len(tensors) == 1 or sum(t.numel() * 4 for t in tensors) <= 10_000
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in tiny_llama().parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None], ids=str)
def test_weights_keep_their_dtype_unless_one_is_named(tmp_path, dtype):
    model = tiny_llama().to(torch.float16)
    model.save_pretrained(tmp_path / "m")
    loaded = Llama.from_pretrained(tmp_path / "m", dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype or torch.float16}


def test_the_old_rope_fields_and_type_name_are_read():
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    config = LlamaConfig.from_dict({"model_type": "llama", **old})
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}


def test_old_pytorch_files_load_and_their_inverse_frequencies_are_ignored(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert same_weights(Llama.from_pretrained(tmp_path), model)


def test_a_tied_checkpoint_may_name_the_weight_twice_or_by_its_second_name(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in state
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    assert same_weights(Llama.from_pretrained(tmp_path), model)
    del state["model.embed_tokens.weight"]
    save_file(state, tmp_path / "model.safetensors")
    assert same_weights(Llama.from_pretrained(tmp_path), model)


def test_loaded_weights_do_not_depend_on_the_file(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    loaded = Llama.from_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 4096)
    assert same_weights(loaded, model)


@pytest.mark.parametrize(
    "values",
    [{"model_type": "gemma"}, {"hidden_act": "gelu"}, {"attention_dropout": 0.1}],
    ids=lambda values: next(iter(values)),
)
def test_a_config_that_means_another_model_is_refused(tmp_path, values):
    tiny_llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{next(iter(values))}: expected"):
        Llama.from_pretrained(tmp_path)


# ---------------------------------------------------------------- Meta's layout


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"intermediate_size": 256 * 3},
        {"rope_parameters": {**ROPE["llama3"], "original_max_position_embeddings": 8192}},
        {"tie_word_embeddings": True},
    ],
    ids=["plain", "multiple-of-256", "scaled-rope", "tied"],
)
def test_meta_layout_round_trip(tmp_path, changes, ranks):
    model = tiny_llama(**changes)
    model.save_pretrained(tmp_path / "m", layout="meta", model_parallel_size=ranks)
    assert len([*(tmp_path / "m").glob("consolidated.*.pth")]) == ranks
    loaded = Llama.from_pretrained(tmp_path / "m")
    assert loaded.config == model.config
    assert same_weights(loaded, model)


def test_meta_shards_are_split_by_output_by_input_or_not_at_all(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "m", layout="meta", model_parallel_size=2)
    shard = torch.load(tmp_path / "m" / "consolidated.01.pth", weights_only=True)
    shapes = {re.sub(r"layers\.\d+\.", "", k): tuple(v.shape) for k, v in shard.items()}
    assert shapes == {
        "tok_embeddings.weight": (192, 16),
        "output.weight": (96, 32),
        "norm.weight": (32,),
        "attention_norm.weight": (32,),
        "ffn_norm.weight": (32,),
        "attention.wq.weight": (16, 32),
        "attention.wk.weight": (8, 32),
        "attention.wv.weight": (8, 32),
        "attention.wo.weight": (32, 16),
        "feed_forward.w1.weight": (24, 32),
        "feed_forward.w3.weight": (24, 32),
        "feed_forward.w2.weight": (32, 24),
    }


def test_an_embedding_split_over_the_vocabulary_loads(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "m", layout="meta", model_parallel_size=2)
    for rank, part in enumerate(model.model.embed_tokens.weight.detach().chunk(2, 0)):
        path = tmp_path / "m" / f"consolidated.{rank:02d}.pth"
        shard = torch.load(path, weights_only=True)
        torch.save({**shard, "tok_embeddings.weight": part.clone()}, path)
    assert same_weights(Llama.from_pretrained(tmp_path / "m"), model)


def test_meta_weights_with_interleaved_rotation_score_like_ours_at_far_positions(tmp_path):
    """The rotary permutation: q k^T from Meta's rows turned in pairs equals ours half-split."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "m", layout="meta")
    meta = torch.load(tmp_path / "m" / "consolidated.00.pth", weights_only=True)
    x = torch.randn(1, 9, 32)
    positions = torch.arange(9)[None] + 411
    cos, sin = model.model.rotary_emb.table(420, "cpu")

    def scores(query, key, interleaved):
        q = (x @ query.T).view(1, 9, 4, 8)
        k = (x @ key.T).view(1, 9, 2, 8).repeat_interleave(2, 2)
        q, k = (apply_rotary(t, cos, sin, positions, interleaved, False) for t in (q, k))
        return torch.einsum("bqhd,bkhd->bhqk", q, k)

    attention = model.model.layers[1].self_attn
    ours = scores(attention.q_proj.weight, attention.k_proj.weight, False)
    theirs = scores(
        meta["layers.1.attention.wq.weight"], meta["layers.1.attention.wk.weight"], True
    )
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-7)
    unturned = torch.einsum(
        "bqhd,bkhd->bhqk",
        (x @ attention.q_proj.weight.T).view(1, 9, 4, 8),
        (x @ attention.k_proj.weight.T).view(1, 9, 2, 8).repeat_interleave(2, 2),
    )
    assert not torch.allclose(unturned, ours, rtol=1e-2)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"dim": 4096, "n_layers": 32, "n_heads": 32, "norm_eps": 1e-6}, "llama-7b"),
        (
            {
                "dim": 8192,
                "n_layers": 80,
                "n_heads": 64,
                "n_kv_heads": 8,
                "multiple_of": 4096,
                "ffn_dim_multiplier": 1.3,
                "norm_eps": 1e-5,
            },
            "llama-2-70b",
        ),
        (
            {
                "dim": 4096,
                "n_layers": 32,
                "n_heads": 32,
                "n_kv_heads": 8,
                "multiple_of": 1024,
                "ffn_dim_multiplier": 1.3,
                "norm_eps": 1e-5,
                "rope_theta": 500000.0,
                "use_scaled_rope": True,
            },
            "llama-3.1-8b",
        ),
    ],
    ids=["llama-7b", "llama-2-70b", "llama-3.1-8b"],
)
def test_published_params_json_give_the_published_shape(params, expected):
    preset = LlamaConfig.preset(expected)
    config = LlamaConfig.from_meta(
        {"vocab_size": -1, "multiple_of": 256, **params}, preset.vocab_size
    )
    config.max_position_embeddings = preset.max_position_embeddings
    assert config == preset


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_parameters": ROPE["yarn"]}, "rope_type 'yarn'"),
        ({"attention_bias": True}, "biases"),
        ({"head_dim": 16}, "head_dim 16"),
    ],
    ids=["yarn", "biases", "head-dim"],
)
def test_meta_layout_refuses_what_it_cannot_express(tmp_path, changes, named):
    with pytest.raises(ValueError, match=f"Meta's layout has no place for {named}"):
        tiny_llama(**changes).save_pretrained(tmp_path / "m", layout="meta")
    assert not (tmp_path / "m").exists()


def test_a_model_parallel_size_that_divides_no_heads_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model_parallel_size: expected a divisor of .* got 4"):
        tiny_llama().save_pretrained(tmp_path / "m", layout="meta", model_parallel_size=4)


# ---------------------------------------------------------------- damage


def cut(path, share=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def edit(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path)


DOWN = "model.layers.1.mlp.down_proj.weight"


def test_missing_tensors_are_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    edit(tmp_path / "model.safetensors", lambda state: state.pop(DOWN))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*missing tensors: {DOWN}$"):
        Llama.from_pretrained(tmp_path)


def test_unexpected_tensors_are_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    edit(tmp_path / "model.safetensors", lambda state: state.update(extra=torch.ones(2)))
    with pytest.raises(
        CheckpointError, match=r"unexpected tensors \(in model\.safetensors\): extra"
    ):
        Llama.from_pretrained(tmp_path)


def test_wrong_shapes_are_named_with_expected_and_got(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    edit(tmp_path / "model.safetensors", lambda s: s.update({DOWN: s[DOWN][:, :47].contiguous()}))
    message = rf"{DOWN} in model\.safetensors: expected shape \(32, 48\), got \(32, 47\)"
    with pytest.raises(CheckpointError, match=message):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.6], ids=["empty", "header", "data"])
def test_a_truncated_safetensors_file_is_named(tmp_path, share):
    tiny_llama().save_pretrained(tmp_path)
    cut(tmp_path / "model.safetensors", share)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        Llama.from_pretrained(tmp_path)


def test_a_truncated_shard_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size=20_000)
    shard = sorted(tmp_path.glob("model-00002-*.safetensors"))[0]
    cut(shard)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: truncated"):
        Llama.from_pretrained(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size=20_000)
    shard = sorted(tmp_path.glob("model-00002-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"{shard.name}: named by model\.safetensors\.index"
    ):
        Llama.from_pretrained(tmp_path)


def test_an_index_that_names_a_tensor_that_is_not_in_its_shard(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = index["weight_map"][DOWN]
    edit(tmp_path / shard, lambda state: state.pop(DOWN))
    with pytest.raises(CheckpointError, match=rf"{shard}: missing tensors that .* lists: {DOWN}"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_truncated_json_file_is_named(tmp_path, name):
    tiny_llama().save_pretrained(tmp_path, max_shard_size=20_000)
    cut(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: truncated or no JSON"):
        Llama.from_pretrained(tmp_path)


def test_a_directory_without_weights_says_what_it_holds(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"expected model\.safetensors, .* got config\.json"
    ):
        Llama.from_pretrained(tmp_path)


def test_no_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        Llama.from_pretrained(tmp_path / "nowhere")


def test_a_truncated_meta_file_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path, layout="meta", model_parallel_size=2)
    cut(tmp_path / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: truncated"):
        Llama.from_pretrained(tmp_path)


def test_a_missing_first_meta_file_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path, layout="meta", model_parallel_size=2)
    (tmp_path / "consolidated.00.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"consolidated\.00\.pth: no such file"):
        Llama.from_pretrained(tmp_path)


def test_a_missing_last_meta_file_shows_in_the_shapes(tmp_path):
    tiny_llama().save_pretrained(tmp_path, layout="meta", model_parallel_size=2)
    (tmp_path / "consolidated.01.pth").unlink()
    message = r"as layers\.0\.attention\.wo\.weight: expected shape \(32, 32\), got \(32, 16\)"
    with pytest.raises(CheckpointError, match=message):
        Llama.from_pretrained(tmp_path)


def test_a_file_that_runs_code_when_unpickled_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    tiny_llama().save_pretrained(tmp_path, layout="meta")
    torch.save({"tok_embeddings.weight": Payload()}, tmp_path / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: truncated or no PyTorch"):
        Llama.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", ["five", "5 parsecs", 0, -1], ids=str)
def test_a_wrong_shard_size_is_refused_before_anything_is_written(tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size: expected"):
        tiny_llama().save_pretrained(tmp_path / "m", max_shard_size=size)
    assert not (tmp_path / "m").exists()
