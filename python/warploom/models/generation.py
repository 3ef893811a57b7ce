"""Batched text generation for every model that maps (tokens, cache) to hidden states.

Prompts of unequal length are packed one after another: one pass without padding fills the cache,
then every row continues at its own length. A row's tokens do not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from warploom.models.sampling import Sampling
from warploom.nn.paged_cache import PagedCache
from warploom.nn.token_cache import CacheKind, TokenCache

Prompts = Tensor | Sequence[int] | Sequence[Sequence[int]]
Generators = torch.Generator | Sequence[torch.Generator] | None
_PROMPT_TAIL = 8
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """What is used of a tokenizer: `tokenizers.Tokenizer` and transformers' classes have it."""

    def decode(self, ids: list[int], skip_special_tokens: bool = ...) -> str: ...


class LanguageModel(Protocol):
    """What is used of a model, and of its config: num_hidden_layers, vocab_size, pad_token_id and
    eos_token_ids."""

    @property
    def config(self) -> Any: ...

    @property
    def lm_head(self) -> nn.Linear: ...

    @property
    def model(self) -> nn.Module: ...

    def make_cache(self, kind: CacheKind, batch_size: int, capacity: int) -> TokenCache: ...


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        row: the prompt that it continues.
        id: the token.
        text: what it adds to the row's text, "" while a character is incomplete; None without a
            tokenizer.
        finish: why the row ends with this token ("eos", "stop", "length"), or None.
    """

    row: int
    id: int
    text: str | None
    finish: Literal["eos", "stop", "length"] | None


class TextTail:
    """Text of a growing token list, piece by piece: O(1) tokens are decoded for each new one.

    A tokenizer may render a token differently at the start of a text (without its space), so a
    piece is the difference of two decodings that start at the same earlier token; for the first
    piece that is one of the prompt's.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_PROMPT_TAIL:])
        self._start, self._shown = 0, len(self._ids)

    def push(self, token: int, last: bool = False) -> str:
        """The text that is certain now and was not before; `last` gives up incomplete bytes."""
        self._ids.append(token)
        shown = self._decode(self._ids[self._start : self._shown])
        text = self._decode(self._ids[self._start :])
        if len(text) <= len(shown) or (text.endswith(_REPLACEMENT) and not last):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(shown) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class _Row:
    """One prompt and what has been generated for it."""

    def __init__(self, index: int, prompt: list[int], tokenizer: Tokenizer | None) -> None:
        self.index = index
        self.prompt = prompt
        self.tail = None if tokenizer is None else TextTail(tokenizer, prompt)
        self.text = ""

    def take(self, token: int, eos: Sequence[int], stops: Sequence[str], is_last: bool) -> Token:
        finish: Literal["eos", "stop", "length"] | None = None
        if token in eos:
            finish = "eos"
        elif is_last:
            finish = "length"
        piece = None
        if self.tail is not None:
            piece = self.tail.push(token, last=finish is not None)
            # A stop string that ends in this piece starts at most its own length before it.
            self.text = self.text[-max(map(len, stops), default=0) :] if stops else ""
            self.text += piece
            if finish != "eos" and any(stop in self.text for stop in stops):
                finish = "stop"
        return Token(self.index, token, piece, finish)


@torch.inference_mode()
def stream(
    model: LanguageModel,
    input_ids: Prompts,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
    generator: Generators = None,
    cache: CacheKind = "paged",
) -> Iterator[Token]:
    """Yields each row's tokens as they are generated; `generate` documents the arguments."""
    prompts = read_prompts(input_ids, attention_mask, model.config.vocab_size)
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens: expected >= 0, got {max_new_tokens}")
    stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
    if stops and tokenizer is None:
        raise ValueError("generate: stop_strings: expected a tokenizer beside them, got None")
    if "" in stops:
        raise ValueError("generate: stop_strings: expected non-empty strings, got ''")
    if cache not in ("paged", "static"):
        raise ValueError(f"generate: cache: expected 'paged' or 'static', got {cache!r}")
    if isinstance(generator, Sequence) and len(generator) != len(prompts):
        raise ValueError(
            f"generate: generator: expected one or {len(prompts)} (one a row), got {len(generator)}"
        )
    eos = (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id
    eos = model.config.eos_token_ids if eos is None else tuple(eos)
    sampling = Sampling(do_sample, temperature, top_k, top_p, repetition_penalty)
    if not prompts or max_new_tokens == 0:
        return
    rows = [_Row(index, prompt, tokenizer) for index, prompt in enumerate(prompts)]
    device = model.lm_head.weight.device
    held = model.make_cache(cache, len(prompts), max(map(len, prompts)) + max_new_tokens)
    seen = _seen_tokens(rows, model.config.vocab_size, device) if repetition_penalty != 1 else None
    lengths = [len(prompt) for prompt in prompts]
    packed = [token for prompt in prompts for token in prompt]
    tokens = torch.tensor([packed], dtype=torch.int64, device=device)
    cu_seqlens, max_seqlen = held.pack(lengths)
    hidden = model.model(tokens, held, cu_seqlens, max_seqlen)[0, cu_seqlens[1:].long() - 1]
    held.advance(lengths)
    going = list(range(len(rows)))  # places in the batch
    for step in range(max_new_tokens):
        chosen = sampling.choose(sampling.scores(model.lm_head(hidden), seen), generator)
        if seen is not None:
            seen.scatter_(1, chosen[:, None], True)
        is_last = step + 1 == max_new_tokens
        ids = chosen.tolist()
        taken = [rows[place].take(ids[place], eos, stops, is_last) for place in going]
        yield from taken
        going = [place for place, token in zip(going, taken, strict=True) if token.finish is None]
        if not going:
            return
        if len(going) < len(rows) and isinstance(held, PagedCache):
            rows = [rows[place] for place in going]
            if isinstance(generator, Sequence):
                generator = [generator[place] for place in going]
            kept = torch.tensor(going, device=device)
            chosen = chosen[kept]
            seen = None if seen is None else seen[kept]
            held.select(going)
            going = list(range(len(rows)))
        hidden = model.model(chosen[:, None], held)[:, 0]
        held.advance(1)


def generate(
    model: LanguageModel,
    input_ids: Prompts,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    pad_token_id: int | None = None,
    streamer: Any = None,
    **options: Any,
) -> Tensor | list[list[int]]:
    """Continues every prompt until it ends or has `max_new_tokens` more tokens.

    Args:
        model: a model of `warploom.models`.
        input_ids: int [B, S], or lists of token ids of any lengths (one list: one prompt).
        max_new_tokens: most tokens a row gets.
        attention_mask: [B, S] beside a tensor, 0 where it is padding, on either side.
        do_sample, temperature, top_k, top_p, repetition_penalty: `warploom.models.sampling`.
        eos_token_id: token or tokens that end a row; default the config's; () for none.
        stop_strings: a row ends with the token that completes one of them in its new text.
        tokenizer: anything with `decode(ids, skip_special_tokens=...)`; stop strings need it.
        generator: source of the draws, one for the batch or a list of one for each row; None is
            torch's default generator.
        cache: "paged" (grows as needed; rows that end leave the batch) or "static": the shapes stay
            those of the first step until every row has ended, so that `model.model.compile(
            fullgraph=True)` before the call compiles decoding once for a batch size and capacity.
        pad_token_id: fills rows of a tensor that ended early; default the config's, else the
            first eos token, else 0.
        streamer: an object with `put(tensor)` and `end()`, as transformers' `TextStreamer`; for one
            prompt.

    Returns:
        Prompts and continuations, what ended a row included. For a tensor the int64 tensor
        [B, S + longest continuation] on its device, the prompts as they were given; for lists
        lists without padding.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, a parameter out of range.
    """
    prompts = read_prompts(input_ids, attention_mask, model.config.vocab_size)
    if streamer is not None:
        if len(prompts) != 1:
            raise ValueError(
                f"generate: streamer: expected one prompt beside it, got {len(prompts)}"
            )
        streamer.put(torch.tensor(prompts))
    new: list[list[int]] = [[] for _ in prompts]
    for token in stream(model, prompts, max_new_tokens, **options):
        new[token.row].append(token.id)
        if streamer is not None:
            streamer.put(torch.tensor([token.id]))
    if streamer is not None:
        streamer.end()
    if not isinstance(input_ids, Tensor):
        return [[*prompt, *more] for prompt, more in zip(prompts, new, strict=True)]
    if pad_token_id is None:
        pad_token_id = model.config.pad_token_id
    if pad_token_id is None:
        pad_token_id = next(iter(model.config.eos_token_ids), 0)
    longest = max(map(len, new), default=0)
    filled = [more + [pad_token_id] * (longest - len(more)) for more in new]
    added = torch.tensor(filled, dtype=torch.int64, device=input_ids.device)
    return torch.cat((input_ids.long(), added.view(len(prompts), longest)), 1)


def read_prompts(
    input_ids: Prompts, attention_mask: Tensor | None, vocab_size: int
) -> list[list[int]]:
    """Host lists of the prompts' tokens without padding; ValueError names the row at fault."""
    if isinstance(input_ids, Tensor):
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(
                "generate: input_ids: expected integers [batch, sequence], got "
                f"{input_ids.dtype} {tuple(input_ids.shape)}"
            )
        prompts = input_ids.tolist()
    else:
        rows: Any = [input_ids] if len(input_ids) and isinstance(input_ids[0], int) else input_ids
        prompts = [list(row) for row in rows]
    if attention_mask is not None:
        if not isinstance(input_ids, Tensor) or attention_mask.shape != input_ids.shape:
            raise ValueError(
                "generate: attention_mask: expected the shape of a tensor input_ids, got "
                f"{tuple(attention_mask.shape)}"
            )
        masks = attention_mask.bool().tolist()
        prompts = [
            [token for token, kept in zip(row, mask, strict=True) if kept]
            for row, mask in zip(prompts, masks, strict=True)
        ]
    for index, row in enumerate(prompts):
        if not row:
            raise ValueError(f"generate: input_ids: row {index}: expected tokens, got none")
        for token in row:
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"generate: input_ids: row {index}: expected tokens in [0, {vocab_size}), "
                    f"got {token}"
                )
    return prompts


def _seen_tokens(rows: list[_Row], vocab_size: int, device: torch.device) -> Tensor:
    """bool [B, V]: the tokens that are in each row's prompt."""
    seen = torch.zeros(len(rows), vocab_size, dtype=torch.bool, device=device)
    for place, row in enumerate(rows):
        seen[place, row.prompt] = True
    return seen
