"""A DeepSeek on two ranks computes what it computes on one: loss, gradients, a step, tokens, files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from warploom.models.deepseek_v2 import DeepseekV2
from warploom.models.deepseek_v2_config import DeepseekV2Config

from tests.distributed.ranks import both_ranks
from tests.distributed.test_parallel import (
    PROMPTS,
    compare_training,
    parallelize,
    tokens,
)

pytestmark = pytest.mark.xdist_group("distributed")

CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "initializer_range": 0.1,
}
V3 = {
    "model_type": "deepseek_v3",
    "topk_method": "noaux_tc",
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "q_lora_rank": None,
    "n_shared_experts": 0,
}


def make(**changes: Any) -> DeepseekV2:
    torch.manual_seed(1)
    return DeepseekV2(DeepseekV2Config(**{**CONFIG, **changes}))


def train(kind: str, changes: dict[str, Any], checkpointing: bool = False) -> None:
    models: list[Any] = [make(**changes), make(**changes)]
    models[1], mine = parallelize(models[1], kind)
    for model in models:
        model.gradient_checkpointing = checkpointing
    compare_training(models, mine)


KINDS = ["tp", "tp and sequence", "1 x 2", "2 x 1", "fsdp", "experts"]


@pytest.mark.parametrize("kind", KINDS)
def test_training(ranks, kind):
    ranks.run(train, kind, {})


@pytest.mark.parametrize("kind", ["tp and sequence", "experts"])
def test_training_of_v3_with_checkpointing(ranks, kind):
    ranks.run(train, kind, V3, True)


@pytest.mark.parametrize("kind", ["tp", "tp and sequence"])
def test_balance_losses(ranks, kind):
    """All ranks see all tokens, and so the same losses as one process."""
    groups = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
    ranks.run(train, kind, {**groups, "balance_alphas": (0.1, 0.2, 0.3)})


def to_one_rank() -> None:
    """Every token chooses the experts of the first rank: the second receives none."""
    models: list[Any] = [make(model_type="deepseek_v3", num_hidden_layers=2) for _ in range(2)]
    for model in models:
        bias = model.model.layers[1].mlp.gate.e_score_correction_bias
        bias[: CONFIG["n_routed_experts"] // 2] = 10.0
    models[1], mine = parallelize(models[1], "experts")
    compare_training(models, mine)


def test_a_rank_without_tokens(ranks):
    ranks.run(to_one_rank)


def mixed_precision() -> None:
    batch = tokens()
    model, mine = parallelize(
        make(), "experts", param_dtype=torch.bfloat16, reduce_dtype=torch.float32
    )
    logits = model(batch[mine, :-1])
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_mixed_precision(ranks):
    ranks.run(mixed_precision)


def count_collectives(kind: str) -> dict[str, int]:
    """Collectives of the forward pass that one more layer of experts adds."""
    from torch.distributed.tensor.debug import CommDebugMode

    counts = []
    for layers in (2, 3):
        model, _ = parallelize(make(num_hidden_layers=layers), kind)
        with CommDebugMode() as mode, torch.no_grad():
            model(tokens()[:, :-1])
        counts.append({str(op).rpartition(".")[2]: n for op, n in mode.get_comm_counts().items()})
    fewer, more = counts
    return {op: n - fewer.get(op, 0) for op, n in more.items() if n != fewer.get(op, 0)}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("tp", {"all_reduce": 2}),
        ("tp and sequence", {"all_gather_into_tensor": 2, "reduce_scatter_tensor": 2}),
        # Counts, tokens, weights, outputs; and the other parameters.
        ("experts", {"all_to_all_single": 4, "_allgather_base_": 1}),
    ],
)
def test_collectives_of_a_layer(ranks, kind, expected):
    assert ranks.run(count_collectives, kind) == [expected] * 2


def generate(kind: str, cache: str) -> None:
    model = make(initializer_range=0.5, eos_token_id=None)
    expected = model.generate(PROMPTS, 6)
    model, _ = parallelize(model, kind)
    assert model.generate(PROMPTS, 6, cache=cache) == expected


@pytest.mark.parametrize(
    ("kind", "cache"), [("tp", "paged"), ("tp", "static"), ("experts", "paged")]
)
def test_generation(ranks, kind, cache):
    ranks.run(generate, kind, cache)


def save(kind: str, directory: str) -> None:
    from warploom.models.parallel import save_pretrained

    model, _ = parallelize(make(**V3), kind)
    save_pretrained(model, directory)


@pytest.mark.parametrize("kind", ["tp", "2 x 1", "experts"])
def test_save_pretrained(ranks, kind, tmp_path):
    ranks.run(save, kind, str(tmp_path / "model"))
    loaded = DeepseekV2.from_pretrained(tmp_path / "model").state_dict()
    expected = make(**V3).state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


def refuse(kind: str) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from warploom.models.parallel import expert_parallel, fully_shard_model, tensor_parallel

    try:
        if kind == "count":
            expert_parallel(make(n_routed_experts=7), both_ranks())
        if kind == "twice":
            tensor_parallel(expert_parallel(make(), both_ranks()), both_ranks())
        if kind == "another mesh":
            mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("experts", "data"))
            fully_shard_model(expert_parallel(make(), mesh["experts"]), mesh["data"])
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("count", "n_routed_experts 7"),
        ("twice", "not distributed yet"),
        ("another mesh", "the one that the experts are spread over"),
    ],
)
def test_refusals(ranks, kind, expected):
    for message in ranks.run(refuse, kind):
        assert expected in message
