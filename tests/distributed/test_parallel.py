"""A Llama on two ranks computes what it computes on one: loss, gradients, a step, tokens, files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from warploom.models.llama import Llama
from warploom.models.llama_config import LlamaConfig

from tests.distributed.ranks import both_ranks

# One worker runs them all, so that the ranks are started once.
pytestmark = pytest.mark.xdist_group("distributed")

CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make(**changes: Any) -> Llama:
    torch.manual_seed(1)
    return Llama(LlamaConfig(**{**CONFIG, **changes}))


def tokens(batch: int = 4, length: int = 8) -> Tensor:
    return torch.randint(96, (batch, length + 1), generator=torch.Generator().manual_seed(2))


def loss_of(model: Any, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def parallelize(model: Any, kind: str, **options: Any) -> tuple[Any, slice]:
    """The model made parallel, and this rank's rows of the batch."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from warploom.models.parallel import expert_parallel, fully_shard_model, tensor_parallel

    rank = dist.get_rank()
    mine = slice(2 * rank, 2 * rank + 2)
    if kind == "fsdp":
        return fully_shard_model(model, both_ranks(), **options), mine
    if kind == "experts":
        expert_parallel(model, both_ranks())
        return fully_shard_model(model, both_ranks(), **options), mine
    if kind == "tp":
        return tensor_parallel(model, both_ranks()), slice(None)
    if kind == "tp and sequence":
        return tensor_parallel(model, both_ranks(), sequence_parallel=True), slice(None)
    if kind == "fsdp, replicated":
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        return fully_shard_model(model, mesh, **options), slice(None)
    shape = (1, 2) if kind == "1 x 2" else (2, 1)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    tensor_parallel(model, mesh["tp"], sequence_parallel=True)
    fully_shard_model(model, mesh["dp"], **options)
    return model, slice(None) if kind == "1 x 2" else mine


def train(kind: str, changes: dict[str, Any]) -> None:
    models: list[Any] = [make(**changes), make(**changes)]
    models[1], mine = parallelize(models[1], kind)
    for model in models:
        model.gradient_checkpointing = bool(changes.get("num_hidden_layers"))
    compare_training(models, mine)


def compare_training(models: list[Any], mine: slice) -> None:
    """Loss, gradients, clipping and one step of AdamW of the parallel model, the second, which is given the
    rows `mine`, against the model on one process."""
    import torch.distributed as dist

    batch = tokens()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in models]
    want = loss_of(models[0], batch)
    got = loss_of(models[1], batch[mine])
    want.backward()
    got.backward()
    mean = got.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / 2, want.detach(), rtol=1e-5, atol=1e-5)
    names = [name for name, _ in models[0].named_parameters()]
    assert [name for name, _ in models[1].named_parameters()] == names
    pairs = list(zip(models[0].parameters(), models[1].parameters(), strict=True))
    for name, (one, many) in zip(names, pairs, strict=True):
        torch.testing.assert_close(
            whole(many.grad),
            one.grad,
            rtol=1e-5,
            atol=1e-5,
            msg=lambda text, n=name: f"{n}: {text}",
        )
    norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1) for model in models]
    torch.testing.assert_close(whole(norms[1]), norms[0], rtol=1e-5, atol=1e-5)
    for optimizer in optimizers:
        optimizer.step()
    for one, many in pairs:
        torch.testing.assert_close(whole(many.detach()), one.detach(), rtol=1e-3, atol=1e-4)


KINDS = ["fsdp", "fsdp, replicated", "tp", "tp and sequence", "1 x 2", "2 x 1"]


@pytest.mark.parametrize("kind", KINDS)
def test_training(ranks, kind):
    ranks.run(train, kind, {})


@pytest.mark.parametrize("kind", ["fsdp", "tp and sequence", "2 x 1"])
def test_training_with_tied_embeddings_biases_and_checkpointing(ranks, kind):
    changes = {"tie_word_embeddings": True, "attention_bias": True, "num_hidden_layers": 1}
    changes["vocab_size"] = 97  # the ranks' parts are unequal
    ranks.run(train, kind, changes)


@pytest.mark.parametrize("kind", ["fsdp", "tp", "tp and sequence"])
def test_training_with_norms_of_queries_and_keys(ranks, kind):
    ranks.run(train, kind, {"model_type": "qwen3"})


def packed(kind: str) -> None:
    """Documents packed into one row, of lengths that no rank's part of the sequence ends with."""
    bounds = torch.tensor([0, 3, 8], dtype=torch.int32)
    batch = tokens(batch=1)[:, :8]
    expected = make()(batch, None, bounds, 5)
    model, _ = parallelize(make(), kind)
    torch.testing.assert_close(model(batch, None, bounds, 5), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["fsdp", "tp and sequence"])
def test_packed_documents(ranks, kind):
    ranks.run(packed, kind)


def count_collectives(kind: str) -> dict[str, int]:
    """Collectives of forward and backward that one more layer adds."""
    from torch.distributed.tensor.debug import CommDebugMode

    counts = []
    for layers in (2, 3):
        model, _ = parallelize(make(num_hidden_layers=layers), kind)
        with CommDebugMode() as mode:
            loss_of(model, tokens()).backward()
        counts.append({str(op).rpartition(".")[2]: n for op, n in mode.get_comm_counts().items()})
    fewer, more = counts
    return {op: n - fewer.get(op, 0) for op, n in more.items() if n != fewer.get(op, 0)}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("tp", {"all_reduce": 4}),
        ("tp and sequence", {"all_gather_into_tensor": 4, "reduce_scatter_tensor": 4}),
    ],
)
def test_collectives_of_a_layer(ranks, kind, expected):
    assert ranks.run(count_collectives, kind) == [expected] * 2


def mixed_precision() -> torch.dtype:
    model, mine = parallelize(
        make(), "fsdp", param_dtype=torch.bfloat16, reduce_dtype=torch.float32
    )
    batch = tokens()[mine]
    logits = model(batch[:, :-1])
    logits.float().square().mean().backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    return logits.dtype


def test_mixed_precision(ranks):
    assert ranks.run(mixed_precision) == [torch.bfloat16] * 2


PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]


def generate(kind: str, cache: str) -> None:
    model = make(initializer_range=0.5, eos_token_id=None)
    expected = model.generate(PROMPTS, 6)
    model, _ = parallelize(model, kind)
    assert model.generate(PROMPTS, 6, cache=cache) == expected


@pytest.mark.parametrize(("kind", "cache"), [("fsdp", "paged"), ("tp", "paged"), ("tp", "static")])
def test_generation(ranks, kind, cache):
    ranks.run(generate, kind, cache)


def save(kind: str, directory: str, changes: dict[str, Any]) -> None:
    from warploom.models.parallel import save_pretrained

    model, _ = parallelize(make(**changes), kind)
    save_pretrained(model, directory)


@pytest.mark.parametrize("kind", ["fsdp", "tp", "2 x 1"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_save_pretrained(ranks, kind, tied, tmp_path):
    changes = {"tie_word_embeddings": tied}
    ranks.run(save, kind, str(tmp_path / "model"), changes)
    loaded = Llama.from_pretrained(tmp_path / "model").state_dict()
    expected = make(**changes).state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


def refuse() -> str:
    try:
        parallelize(make(num_key_value_heads=1), "tp")
    except ValueError as error:
        return str(error)
    return ""


def test_heads_that_do_not_divide_are_refused(ranks):
    for message in ranks.run(refuse):
        assert "num_key_value_heads 1" in message
