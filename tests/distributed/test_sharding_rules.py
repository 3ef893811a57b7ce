"""Every rule of every op: a sharded call gives what the whole call gives, and is placed as the rule says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from warploom import _sharding
from warploom._library import OPS
from warploom.reference import spp as spp_reference

from tests.distributed.ranks import both_ranks
from tests.samples import OP_ARGS

# One worker runs them all, so that the ranks are started once.
pytestmark = pytest.mark.xdist_group("distributed")

Make = Callable[..., Tensor]


def _replaced(name: str, make: Make, **changes: Any) -> tuple[Any, ...]:
    """The op's sample arguments with some changed by name."""
    names = [argument.name for argument in OPS[name].overloads["reference"]._schema.arguments]
    values = dict(zip(names, OP_ARGS[name](make), strict=True))
    assert changes.keys() <= values.keys()
    return tuple({**values, **changes}.values())


def _int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


WITHOUT_DROPOUT = {"dropout_seed": None, "dropout_p": 0.0}
PACKED = {
    **WITHOUT_DROPOUT,
    "bias": None,
    "key_padding_mask": None,
    "cu_seqlens_q": _int32(0, 2, 5),
    "cu_seqlens_k": _int32(0, 3, 7),
}
PAGED = {**PACKED, "block_table": torch.tensor([[2, 0], [1, 0]], dtype=torch.int32)}
DENSE = {"block_table": None}


def _packed_backward(make: Make, **changes: Any) -> tuple[Any, ...]:
    shapes = {"grad_out": (5, 4, 16), "q": (5, 4, 16), "k": (7, 2, 16), "v": (7, 2, 16)}
    shapes.update(out=(5, 4, 16), lse=(4, 5), grad_lse=(4, 5))
    tensors = {name: make(*shape) for name, shape in shapes.items()}
    flags = {"needs_bias": False}
    return _replaced("attention_backward", make, **tensors, **PACKED, **flags, **changes)


def _pyramid(make: Make) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments forward and backward for planes whose places are int32: gloo sends no int16."""
    x, options = make(2, 3, 182, 182), ([1, 1, 2, 3], "max", "adaptive", False)
    out, argmax = spp_reference.spatial_pyramid_pool(x, None, None, *options, True)
    forward = (x, None, None, *options, True)
    return forward, (torch.randn_like(out), x, argmax, None, None, *options)


#: case -> (op, its arguments, the dimensions of the rule that may be sharded).
#: Ops without a rule: of families lora, vocab and coupling, whose arguments FSDP gathers.
REPLICATED = [
    name
    for name in OPS
    if name.startswith(("lora_", "cross_entropy", "linear_cross", "lcs", "affine_coupling"))
    or "shrink" in name
]

CASES: dict[str, tuple[str, Callable[[Make], tuple[Any, ...]], str]] = {
    **{
        name: (name, OP_ARGS[name], "...0")
        for name in OPS
        if "norm" in name and "shrink" not in name
    },
    **{name: (name, OP_ARGS[name], "") for name in REPLICATED},
    "norm of four dimensions": (
        "rms_norm",
        lambda make: (make(2, 3, 4, 8), make(8), 1e-6),
        "...0 ...1 ...2",
    ),
    **{
        name: (name, OP_ARGS[name], "")
        for name in (
            "cross_entropy_rows",
            "cross_entropy_block",
            "linear_cross_entropy",
            "lcs_lengths",
        )
    },
    **{name: (name, OP_ARGS[name], "A") for name in OPS if "spline" in name},
    "gated_activation": ("gated_activation", OP_ARGS["gated_activation"], "...0 ...1"),
    "gated_activation_backward": (
        "gated_activation_backward",
        OP_ARGS["gated_activation_backward"],
        "...0 ...1",
    ),
    "apply_rotary": ("apply_rotary", OP_ARGS["apply_rotary"], "B H"),
    "apply_rotary, positions": (
        "apply_rotary",
        lambda make: _replaced("apply_rotary", make, positions=torch.randint(9, (2, 5))),
        "B S H",
    ),
    "attention, dropout": ("attention", OP_ARGS["attention"], ""),
    "attention": (
        "attention",
        lambda make: _replaced("attention", make, **WITHOUT_DROPOUT),
        "B H",
    ),
    "attention, plain": (
        "attention",
        lambda make: (
            make(2, 5, 4, 16),
            make(2, 7, 2, 16),
            make(2, 7, 2, 8),
            *(None,) * 8,
            *(0.25, -1, 0, 0.0, 0.0, 5, 7),
        ),
        "B H",
    ),
    "attention, one key/value head": (
        "attention",
        lambda make: _replaced(
            "attention", make, k=make(2, 7, 1, 16), v=make(2, 7, 1, 16), **WITHOUT_DROPOUT
        ),
        "B",
    ),
    "attention, three key/value heads": (
        "attention",
        lambda make: (
            make(2, 5, 6, 16),
            make(2, 7, 3, 16),
            make(2, 7, 3, 16),
            *(None,) * 8,
            *(0.25, -1, 0, 0.0, 0.0, 5, 7),
        ),
        "B",
    ),
    "attention, packed": (
        "attention",
        lambda make: _replaced(
            "attention", make, q=make(5, 4, 16), k=make(7, 2, 16), v=make(7, 2, 16), **PACKED
        ),
        "H",
    ),
    "attention, paged": (
        "attention",
        lambda make: _replaced(
            "attention", make, q=make(5, 4, 16), k=make(3, 4, 2, 16), v=make(3, 4, 2, 16), **PAGED
        ),
        "H",
    ),
    "attention_backward": (
        "attention_backward",
        lambda make: _replaced("attention_backward", make, **WITHOUT_DROPOUT),
        "B H",
    ),
    "attention_backward, no bias": (
        "attention_backward",
        lambda make: _replaced(
            "attention_backward",
            make,
            bias=None,
            alibi_slopes=None,
            needs_bias=False,
            needs_distance=False,
            **WITHOUT_DROPOUT,
        ),
        "B H",
    ),
    "attention_backward, packed": ("attention_backward", _packed_backward, "H"),
    "attention_decode": ("attention_decode", OP_ARGS["attention_decode"], "B H"),
    "attention_decode, dense": (
        "attention_decode",
        lambda make: _replaced(
            "attention_decode", make, k_cache=make(2, 6, 2, 16), v_cache=make(2, 6, 2, 16), **DENSE
        ),
        "B H",
    ),
    "attention_cache_append": (
        "attention_cache_append",
        OP_ARGS["attention_cache_append"],
        "H",
    ),
    "attention_cache_append, dense": (
        "attention_cache_append",
        lambda make: _replaced(
            "attention_cache_append",
            make,
            k_cache=make(2, 9, 2, 16),
            v_cache=make(2, 9, 2, 16),
            **DENSE,
        ),
        "B H",
    ),
    "merge_attention": ("merge_attention", OP_ARGS["merge_attention"], "B S H"),
    "sppf": ("sppf", OP_ARGS["sppf"], "B"),
    "sppf_backward": ("sppf_backward", OP_ARGS["sppf_backward"], "B"),
    "roi_align": ("roi_align", OP_ARGS["roi_align"], "C"),
    "roi_align_backward": ("roi_align_backward", OP_ARGS["roi_align_backward"], "C"),
    "merge_attention_backward": (
        "merge_attention_backward",
        OP_ARGS["merge_attention_backward"],
        "B S H",
    ),
    "grouped_linear": ("grouped_linear", OP_ARGS["grouped_linear"], "K N"),
    "grouped_linear_backward": (
        "grouped_linear_backward",
        OP_ARGS["grouped_linear_backward"],
        "N K",
    ),
    "grouped_linear_backward, frozen": (
        "grouped_linear_backward",
        lambda make: _replaced("grouped_linear_backward", make, needs_weight=False),
        "N K",
    ),
    "mla_decode": ("mla_decode", OP_ARGS["mla_decode"], "B H"),
    "mla_decode, dense": (
        "mla_decode",
        lambda make: _replaced("mla_decode", make, kv_cache=make(2, 6, 48), **DENSE),
        "B H",
    ),
    "mla_absorbed_backward": ("mla_absorbed_backward", OP_ARGS["mla_absorbed_backward"], "B H"),
    "mla_cache_append": ("mla_cache_append", OP_ARGS["mla_cache_append"], ""),
    "mla_cache_append, dense": (
        "mla_cache_append",
        lambda make: _replaced("mla_cache_append", make, kv_cache=make(2, 9, 48), **DENSE),
        "B",
    ),
    "channel_affine": ("channel_affine", OP_ARGS["channel_affine"], "B C L"),
    "channel_affine_backward": (
        "channel_affine_backward",
        OP_ARGS["channel_affine_backward"],
        "B C L",
    ),
    "squeeze": ("squeeze", OP_ARGS["squeeze"], "B"),
    "spatial_pyramid_pool": ("spatial_pyramid_pool", lambda make: _pyramid(make)[0], "B"),
    "spatial_pyramid_pool, inference": (
        "spatial_pyramid_pool",
        lambda make: _replaced("spatial_pyramid_pool", make, needs_index=False),
        "B",
    ),
    "spatial_pyramid_pool_backward": (
        "spatial_pyramid_pool_backward",
        lambda make: _pyramid(make)[1],
        "B",
    ),
}


def _outputs(results: Any) -> list[Any]:
    if results is None:
        return []
    return list(results) if isinstance(results, list | tuple) else [results]


def check(case: str, backend: str) -> int:
    """Run the case with every placement that its rule offers; returns how many there are."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    mesh = both_ranks()
    name, build, _ = CASES[case]
    overload = OPS[name].overloads[backend]
    args = build(lambda *shape: torch.randn(*shape, dtype=torch.float64))
    whole = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    expected = _outputs(overload(*whole))
    rules = [_sharding.Rule.parse(rule) for rule in OPS[name].sharding]

    def distributed(placements: list[Any]) -> list[Any]:
        return [
            distribute_tensor(arg.clone(), mesh, [placement]) if isinstance(arg, Tensor) else arg
            for arg, placement in zip(args, placements, strict=True)
        ]

    mutated = [arg for arg in overload._schema.arguments if arg.alias_info is not None]
    schema = overload._schema
    replicated = distributed([Replicate()] * len(args))
    specs = [arg._spec if isinstance(arg, DTensor) else arg for arg in replicated]
    offered = _sharding.placements(rules, schema, specs)
    for outputs, inputs in offered:
        sharded = distributed(inputs)
        results = _outputs(overload(*sharded))
        for result, placement, want in zip(results, outputs, expected, strict=True):
            assert isinstance(result, DTensor)
            assert result.placements == (placement,), (inputs, result.placements, placement)
            torch.testing.assert_close(result.full_tensor(), want, rtol=1e-12, atol=1e-12)
        for arg, want, argument in zip(sharded, whole, schema.arguments, strict=True):
            if argument in mutated:
                torch.testing.assert_close(arg.full_tensor(), want, rtol=0, atol=0)
    return len(offered)


@pytest.mark.parametrize("case", CASES)
def test_rule(ranks, case):
    dimensions = CASES[case][2].split()
    assert ranks.run(check, case, "reference") == [1 + len(dimensions)] * 2


def test_every_op_has_a_case():
    assert {name for name, _, _ in CASES.values()} == set(OPS)


def test_heads_are_cut_where_their_groups_are():
    assert _sharding._divides({8, 2}, (4, 2))  # over the second mesh dimension alone
    assert _sharding._divides({8, 4}, (2, 2))
    assert not _sharding._divides({12, 6}, (2, 2))  # six by four
    assert not _sharding._divides({8, 1}, (2,))
    assert _sharding._divides({3}, (2,))


def append_to_replicated_cache() -> str:
    """k and v are sharded on the heads, the caches are not: whatever is chosen, the caches are written."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = both_ranks()
    op = OPS["attention_cache_append"].overloads["reference"]
    args = CASES["attention_cache_append, dense"][1](torch.randn)
    whole = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    op(*whole)
    placements = [Shard(2), Shard(2)] + [Replicate()] * len(args)

    def place(arg: Any, placement: Any) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        return distribute_tensor(arg.clone(), mesh, [placement])

    sharded = [place(*pair) for pair in zip(args, placements)]
    op(*sharded)
    for got, want in zip(sharded[2:4], whole[2:4]):
        torch.testing.assert_close(got.to_local(), want, rtol=0, atol=0)
    sharded[2] = sharded[2].redistribute(placements=[Shard(1)])
    try:
        op(*sharded)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def test_a_cache_is_written_where_it_is(ranks):
    for message in ranks.run(append_to_replicated_cache):
        assert "k_cache: expected placements among" in message
