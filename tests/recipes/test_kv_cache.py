"""Sizes of caches, against the numbers that DeepSeek-V2's report and others publish."""

from __future__ import annotations

import pytest
from warploom.models.llama_config import LlamaConfig
from warploom.recipes.kv_cache import CacheShape, cache_sizes

from tests.models.tiny_deepseek import tiny_deepseek


def test_table_1_of_deepseek_v2():
    """Elements a token: 2 n_h d_h l, 2 n_g d_h l, 2 d_h l, and 9/2 d_h l."""
    layers, heads, dim = 32, 32, 128
    shape = CacheShape(layers, heads, dim, kv_heads=4)
    assert shape.elements("MHA") == 2 * heads * dim * layers
    assert shape.elements("GQA") == 2 * 4 * dim * layers
    assert shape.elements("MQA") == 2 * dim * layers
    assert shape.elements("MLA") == 9 * dim * layers / 2


@pytest.mark.parametrize(
    ("shape", "mha", "mla"),
    [
        (CacheShape(27, 16, 128, d_latent=512, d_rope=64), 110_592, 15_552),
        (CacheShape(60, 56, 128, d_latent=512, d_rope=64), 860_160, 34_560),
    ],
    ids=["small", "large"],
)
def test_table_9_of_deepseek_v2(shape, mha, mla):
    assert (shape.elements("MHA"), shape.elements("MLA")) == (mha, mla)


@pytest.mark.parametrize(
    ("name", "kind", "size"),
    [
        ("deepseek-v2", "MLA", 69_120),
        ("deepseek-v2-lite", "MLA", 31_104),
        ("deepseek-v3", "MLA", 70_272),
        ("llama-2-7b", "MHA", 524_288),
        ("llama-3-70b", "GQA", 327_680),
        ("llama-3.1-405b", "GQA", 516_096),
    ],
)
def test_published_bytes_a_token(name, kind, size):
    (own,) = (entry for entry in cache_sizes(name, 1) if entry.is_own)
    assert (own.kind, own.bytes_per_token) == (kind, size)


def test_a_context_of_128k_takes_8_44_gib():
    (own,) = (entry for entry in cache_sizes("deepseek-v2", 131_072) if entry.is_own)
    assert own.total_bytes / 2**30 == pytest.approx(8.44, abs=0.005)


def test_a_compressed_row_of_deepseek_takes_656_bytes():
    assert cache_sizes("deepseek-v2", 1)[-1].bytes_per_token == 60 * 656


def test_a_directory_and_a_batch(tmp_path):
    model = tiny_deepseek()
    model.save_pretrained(tmp_path)
    (own,) = (entry for entry in cache_sizes(tmp_path, 100, batch=3) if entry.is_own)
    assert own.kind == "MLA" and own.total_bytes == 2 * 2 * (32 + 16) * 100 * 3


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match="model: expected a model directory or one of llama-7b"):
        cache_sizes("gpt-9", 1)
    with pytest.raises(ValueError, match="context, batch: expected 1 or more, got 0, 1"):
        cache_sizes("llama-7b", 0)


def test_every_llama_preset_has_a_kind():
    shape = CacheShape.of(LlamaConfig.preset("llama-7b"))
    assert shape.own == "MHA" and shape.kv_heads == 32
