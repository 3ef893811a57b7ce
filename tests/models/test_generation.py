"""Batched generation: unequal prompts, ends of rows, text pieces, streaming."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend
from warploom.models.generation import TextTail
from warploom.nn import PagedKeyValueCache

from tests.models.tiny_llama import tiny_llama


@pytest.fixture
def model():
    return make_model()


def make_model(**changes):
    return tiny_llama(seed=3, **{"initializer_range": 0.3, "eos_token_id": None, **changes})


PROMPTS = [[5, 9, 3], [7] * 11, [1], [20, 30, 40], list(range(100, 170))]


# ---------------------------------------------------------------- rows do not see each other


@pytest.mark.parametrize("penalty", [1.0, 1.5], ids=["plain", "repetition-penalty"])
def test_greedy_rows_of_a_batch_equal_the_rows_alone(model, penalty):
    batch = model.generate(PROMPTS, max_new_tokens=40, repetition_penalty=penalty)
    for prompt, row in zip(PROMPTS, batch, strict=True):
        assert row == model.generate([prompt], max_new_tokens=40, repetition_penalty=penalty)[0]


def test_sampled_rows_with_their_own_generators_equal_the_rows_alone(model):
    def generator(row):
        return torch.Generator().manual_seed(row)

    options = {"max_new_tokens": 25, "temperature": 1.0, "top_p": 0.95}
    own = [generator(row) for row in range(len(PROMPTS))]
    batch = model.generate(PROMPTS, generator=own, **options)
    for index, prompt in enumerate(PROMPTS):
        assert batch[index] == model.generate([prompt], generator=[generator(index)], **options)[0]


def test_rows_go_on_unchanged_after_others_have_ended(model):
    alone = [model.generate([prompt], max_new_tokens=40)[0] for prompt in PROMPTS]
    # A token that ends some rows early and leaves others going.
    ends = alone[1][len(PROMPTS[1]) + 2]
    batch = model.generate(PROMPTS, max_new_tokens=40, eos_token_id=ends)
    lengths = set()
    for prompt, whole, row in zip(PROMPTS, alone, batch, strict=True):
        new = whole[len(prompt) :]
        stop = new.index(ends) + 1 if ends in new else len(new)
        assert row == prompt + new[:stop]
        lengths.add(stop)
    assert len(lengths) > 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_tensor_with_its_mask_continues_every_row_at_its_own_end(model, side):
    rows = [[5, 9, 3], [7] * 6]
    filled = [([0] * 3 + rows[0]) if side == "left" else (rows[0] + [0] * 3), rows[1]]
    ids = torch.tensor(filled)
    padded = [0, 0, 0, 1, 1, 1] if side == "left" else [1, 1, 1, 0, 0, 0]
    mask = torch.tensor([padded, [1] * 6])
    out = model.generate(ids, max_new_tokens=12, attention_mask=mask)
    assert torch.equal(out[:, :6], ids)
    expected = model.generate(rows, max_new_tokens=12)
    assert out[:, 6:].tolist() == [expected[0][3:], expected[1][6:]]


def test_left_padding_gives_the_tokens_of_transformers(pair):
    peer, ours = pair("yarn")
    ids = torch.randint(1, 192, (2, 9))
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    expected = peer.generate(ids, pad_token_id=0, **options)
    assert torch.equal(ours.generate(ids, **options), expected)


@torch.no_grad()
def test_decoding_from_the_cache_gives_the_logits_of_a_whole_forward(model):
    ids = torch.randint(0, 192, (2, 90))
    cache = PagedKeyValueCache(2, 2)
    parts = []
    for piece in ids.split([33, 1, 1, 40, 15], 1):
        parts.append(model(piece, cache))
        cache.advance(piece.shape[1])
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=0, atol=2e-5)


# ---------------------------------------------------------------- the static cache


@pytest.mark.parametrize(
    "options",
    [{}, {"repetition_penalty": 1.5}, {"eos_token_id": list(range(0, 192, 9))}],
    ids=["plain", "repetition-penalty", "rows-that-end"],
)
def test_the_static_cache_gives_the_tokens_of_the_paged_one(model, options):
    options = {"max_new_tokens": 30, **options}
    expected = model.generate(PROMPTS, **options)
    assert model.generate(PROMPTS, cache="static", **options) == expected
    added = {len(row) - len(prompt) for row, prompt in zip(expected, PROMPTS, strict=True)}
    assert (len(added) > 1) == ("eos_token_id" in options)


def test_draws_from_own_generators_do_not_depend_on_the_cache(model):
    def run(cache):
        generators = [torch.Generator().manual_seed(row) for row in range(len(PROMPTS))]
        return model.generate(
            PROMPTS, 12, temperature=1.0, generator=generators, cache=cache, eos_token_id=[3, 60]
        )

    assert run("static") == run("paged")


def test_compiled_decoding_is_one_graph_for_all_steps(model):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    expected = model.generate(PROMPTS, max_new_tokens=20)
    model.model.compile(fullgraph=True, backend=counter)
    assert model.generate(PROMPTS, max_new_tokens=20, cache="static") == expected
    assert counter.frame_count == 2  # the prompts, and every step after them
    assert model.generate(PROMPTS, max_new_tokens=20, cache="static") == expected
    assert counter.frame_count == 2


# ---------------------------------------------------------------- results


def test_a_tensor_gives_a_tensor_and_lists_give_lists(model):
    ids = torch.tensor([[5, 9, 3], [7, 7, 7]])
    out = model.generate(ids, max_new_tokens=4)
    assert out.dtype == torch.int64
    assert out.shape == (2, 7)
    assert model.generate(ids.tolist(), max_new_tokens=4) == out.tolist()
    assert model.generate(ids[0].tolist(), max_new_tokens=4) == [out[0].tolist()]


def test_rows_of_a_tensor_that_end_early_are_filled_with_the_pad_token(model):
    ids = torch.tensor([[5, 9, 3], [7, 7, 7]])
    free = model.generate(ids, max_new_tokens=8)
    ends = int(free[0, 3])
    assert ends not in free[1, 3:]
    out = model.generate(ids, max_new_tokens=8, eos_token_id=ends, pad_token_id=11)
    assert out[0, 3:].tolist() == [ends] + [11] * 7
    assert torch.equal(out[1], free[1])


def test_several_eos_tokens_come_from_the_config():
    free = make_model().generate([PROMPTS[0]], max_new_tokens=12)[0][3:]
    ends = [free[5], free[2]]
    out = make_model(eos_token_id=ends).generate([PROMPTS[0]], max_new_tokens=12)[0][3:]
    first = min(free.index(end) for end in ends)
    assert out == free[: first + 1]
    assert make_model(eos_token_id=ends).generate(
        [PROMPTS[0]], max_new_tokens=12, eos_token_id=()
    ) == [PROMPTS[0] + free]


def test_no_new_tokens_and_no_rows(model):
    ids = torch.tensor([[5, 9, 3]])
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)
    assert model.generate([], max_new_tokens=5) == []
    assert model.generate(ids[:0], max_new_tokens=5).shape == (0, 3)


def test_the_same_generator_seed_draws_the_same_text(model):
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(PROMPTS, max_new_tokens=9, temperature=1.0, generator=generator)

    assert run(1) == run(1) != run(2)


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
@pytest.mark.parametrize("cache", ["paged", "static"])
def test_bfloat16_generates(model, cache, autocast):
    model = model if autocast else model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model.generate(PROMPTS, max_new_tokens=5, cache=cache)
    assert [len(row) for row in out] == [len(prompt) + 5 for prompt in PROMPTS]


# ---------------------------------------------------------------- text


def test_a_stop_string_ends_the_row_with_the_token_that_completes_it(model, tokenizer):
    options = {"max_new_tokens": 30, "tokenizer": tokenizer}
    whole = model.generate(PROMPTS, **options)
    texts = [tokenizer.decode(row[len(p) :]) for row, p in zip(whole, PROMPTS, strict=True)]
    stop = texts[0][6:11]  # spans tokens
    out = model.generate(PROMPTS, stop_strings=["never there", stop], **options)
    assert len(out[0]) < len(whole[0])
    for prompt, row, full, text in zip(PROMPTS, out, whole, texts, strict=True):
        new = row[len(prompt) :]
        assert row == full[: len(row)]
        assert (stop in tokenizer.decode(new)) == (stop in text)
        assert stop not in tokenizer.decode(new[:-1])


def test_stream_yields_the_tokens_and_text_of_generate(model, tokenizer):
    new = {row: [] for row in range(len(PROMPTS))}
    text = dict.fromkeys(new, "")
    for token in model.stream(PROMPTS, max_new_tokens=12, tokenizer=tokenizer):
        assert not new[token.row] or new[token.row][-1].finish is None
        new[token.row].append(token)
        text[token.row] += token.text
    expected = model.generate(PROMPTS, max_new_tokens=12)
    for row, prompt in enumerate(PROMPTS):
        ids = [token.id for token in new[row]]
        assert prompt + ids == expected[row]
        assert new[row][-1].finish == "length"
        assert tokenizer.decode(prompt) + text[row] == tokenizer.decode(prompt + ids)


def test_stream_says_why_a_row_ended(model, tokenizer):
    free = [token.id for token in model.stream(PROMPTS[:1], max_new_tokens=6)]
    ended = [*model.stream(PROMPTS[:1], max_new_tokens=6, eos_token_id=free[2])]
    assert [token.finish for token in ended] == [None] * free.index(free[2]) + ["eos"]
    stop = tokenizer.decode([free[1]])
    stopped = [*model.stream(PROMPTS[:1], max_new_tokens=6, tokenizer=tokenizer, stop_strings=stop)]
    assert stopped[-1].finish == "stop"


def test_stream_yields_a_token_before_it_computes_the_next(model):
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    steps = model.stream(PROMPTS[:1], max_new_tokens=5)
    next(steps)
    assert len(calls) == 1
    next(steps)
    assert len(calls) == 2


def test_a_character_of_several_tokens_comes_out_whole():
    class Bytes:
        def decode(self, ids, skip_special_tokens=True):
            return bytes(ids).decode("utf-8", errors="replace")

    tail = TextTail(Bytes(), prompt=list(b"so "))
    pieces = [tail.push(byte) for byte in "a€ ü".encode()]
    assert pieces == ["a", "", "", "€", " ", "", "ü"]
    tail = TextTail(Bytes())
    assert [tail.push("€".encode()[0]), tail.push("€".encode()[1], last=True)] == ["", "\ufffd"]


def test_the_space_before_the_first_new_word_is_kept():
    class Words:
        """As a SentencePiece decoder: a space before every word but the first."""

        def decode(self, ids, skip_special_tokens=True):
            return " ".join(f"word{i}" for i in ids)

    tail = TextTail(Words(), prompt=[1, 2])
    assert [tail.push(3), tail.push(4)] == [" word3", " word4"]


def test_a_transformers_streamer_prints_the_text(model, tokenizer, capsys):
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    streamer = transformers.TextStreamer(wrapped, skip_prompt=True)
    out = model.generate([PROMPTS[0]], max_new_tokens=10, streamer=streamer)
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(out[0][3:]).rstrip("\n")


# ---------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "input_ids: row 1: expected tokens, got none"),
        ([[1], [192]], {}, r"input_ids: row 1: expected tokens in \[0, 192\), got 192"),
        ([[-1]], {}, r"input_ids: row 0: expected tokens in \[0, 192\), got -1"),
        (torch.zeros(1, 3), {}, r"input_ids: expected integers \[batch, sequence\]"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens: expected >= 0, got -1"),
        ([[1]], {"top_p": 2.0}, "top_p: expected"),
        ([[1]], {"stop_strings": "x"}, "stop_strings: expected a tokenizer"),
        ([[1]], {"stop_strings": "", "tokenizer": object()}, "expected non-empty strings"),
        ([[1]], {"cache": "circular"}, "cache: expected 'paged' or 'static', got 'circular'"),
        ([[1]], {"generator": []}, r"generator: expected one or 1 \(one a row\), got 0"),
        ([[1], [2]], {"streamer": object()}, "streamer: expected one prompt beside it, got 2"),
        ([[1]], {"attention_mask": torch.ones(1, 1)}, "attention_mask: expected the shape of a"),
    ],
    ids=lambda value: None if not isinstance(value, str) else value[:24],
)
def test_wrong_arguments_are_named(model, prompts, options, message):
    with pytest.raises(ValueError, match=rf"generate: .*{message}"):
        model.generate(prompts, **{"max_new_tokens": 3, **options})
