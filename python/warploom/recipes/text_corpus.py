"""Real English text that ships with CPython, and a byte-level BPE tokenizer trained on it.

The documents are the language reference pages of ``pydoc_data.topics`` and the docstrings of the
standard library, read from its source files with ``ast`` (nothing but ``pydoc_data.topics`` is
imported). The order is that of the sorted paths and of the lines within a file, so one version of
Python always gives one corpus.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from warploom.recipes._extras import require
from warploom.recipes._stdlib_sources import (
    module_name,
    parse,
    source_files,
    stdlib_directory,
)

BEGIN_TOKEN = "<s>"
END_TOKEN = "</s>"
PADDING_TOKEN = "<pad>"

_SHORTEST_DOCSTRING = 20  # characters; shorter ones are not sentences
_Documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Document:
    """One text with the name that it is found under, such as ``argparse`` or ``topics:for``."""

    name: str
    text: str


@dataclass(frozen=True)
class TokenStreams:
    """The two splits, each one int32 [tokens]: every document is <s>, its tokens, </s>.

    ``digest`` names the texts and the tokenizer that they were made of.
    """

    train: torch.Tensor
    validation: torch.Tensor
    digest: str


def standard_library_documents(root: Path | None = None) -> list[Document]:
    """The documentation that ships with this Python, about two megabytes of it, without repeated
    texts.

    Args:
        root: the folder of standard library sources; default, the running interpreter's.

    Returns: first the topics, then one document for each module that has docstrings.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for name in sorted(topics):
        text = topics[name].strip()
        if text not in seen:
            seen.add(text)
            documents.append(Document(f"topics:{name}", text))

    root = stdlib_directory() if root is None else root
    for path in source_files(root):
        docstrings = []
        for docstring in _docstrings(path):
            if len(docstring) >= _SHORTEST_DOCSTRING and docstring not in seen:
                seen.add(docstring)
                docstrings.append(docstring)
        if docstrings:
            documents.append(Document(module_name(path, root), "\n\n".join(docstrings)))
    return documents


def file_documents(path: Path) -> list[Document]:
    """The UTF-8 text file ``path``: one document for each paragraph, up to a blank line."""
    paragraphs = path.read_text(encoding="utf-8").split("\n\n")
    return [
        Document(f"{path.name}:{index}", paragraph.strip())
        for index, paragraph in enumerate(paragraphs)
        if paragraph.strip()
    ]


def split_documents(
    documents: Sequence[Document], validation_share: float = 0.05
) -> tuple[list[Document], list[Document]]:
    """Train and validation documents; a document's side depends on nothing but its own text."""
    if not 0.0 < validation_share < 1.0:
        raise ValueError(
            f"split_documents: validation_share: expected 0 < share < 1, got {validation_share}"
        )
    train: list[Document] = []
    validation: list[Document] = []
    for document in documents:
        digest = hashlib.sha256(document.text.encode()).digest()
        fraction = int.from_bytes(digest[:8], "big") / 2**64
        (validation if fraction < validation_share else train).append(document)
    if not train or not validation:
        raise ValueError(
            f"split_documents: documents: expected enough for both splits, got {len(documents)} "
            f"({len(train)} train, {len(validation)} validation)"
        )
    return train, validation


def train_tokenizer(texts: Iterable[str], directory: Path, vocab_size: int = 4096) -> Any:
    """Train a byte-level BPE and save it as a Hugging Face tokenizer directory.

    Writes ``tokenizer.json`` and ``tokenizer_config.json``; ``transformers.AutoTokenizer`` loads
    the folder.
    Encoding puts <s> in front, as LLaMA's tokenizers do.

    Args:
        texts: the texts to train on.
        directory: where the two files go; made when it is missing.
        vocab_size: entries in all: 3 special tokens, the 256 bytes, and merges.

    Returns: the ``tokenizers.Tokenizer``.
    """
    tokenizers = require("tokenizers")
    special_tokens = [BEGIN_TOKEN, END_TOKEN, PADDING_TOKEN]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    least = len(special_tokens) + len(alphabet)
    if vocab_size < least:
        raise ValueError(
            f"train_tokenizer: vocab_size: expected at least {least}, got {vocab_size}"
        )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BEGIN_TOKEN} $A",
        pair=f"{BEGIN_TOKEN} $A {BEGIN_TOKEN} $B",
        special_tokens=[(BEGIN_TOKEN, tokenizer.token_to_id(BEGIN_TOKEN))],
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN_TOKEN,
        "eos_token": END_TOKEN,
        "pad_token": PADDING_TOKEN,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return tokenizer


def load_tokenizer(directory: Path) -> Any:
    """The ``tokenizers.Tokenizer`` of a Hugging Face directory; FileNotFoundError without one."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: expected a tokenizer.json, found none")
    return require("tokenizers").Tokenizer.from_file(str(path))


def token_streams(
    train: Sequence[Document], validation: Sequence[Document], tokenizer: Any, cache: Path
) -> TokenStreams:
    """Tokenise both splits, or read them from ``cache`` if it holds the tokens of these inputs.

    Args:
        train, validation: the documents of each split.
        tokenizer: a ``tokenizers.Tokenizer`` with <s> and </s>.
        cache: a safetensors file; replaced when it was made of other texts or another tokenizer.
    """
    digest = hashlib.sha256(tokenizer.to_str().encode())
    for documents in (train, validation):
        digest.update(f"\0{len(documents)}".encode())
        for document in documents:
            digest.update(b"\0" + document.text.encode())
    key = digest.hexdigest()

    cached = _read_cache(cache, key)
    if cached is not None:
        return cached
    streams = TokenStreams(_encode(train, tokenizer), _encode(validation, tokenizer), key)
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_name(cache.name + ".partial")
    save_file(
        {"train": streams.train, "validation": streams.validation},
        str(partial),
        metadata={"digest": key},
    )
    os.replace(partial, cache)
    return streams


def _docstrings(path: Path) -> list[str]:
    """The docstrings of the module, its classes and its functions, in the order of their lines."""
    tree = parse(path)
    if tree is None:
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, _Documented):
            docstring = ast.get_docstring(node, clean=False)
            if docstring is not None:
                found.append((getattr(node, "lineno", 0), inspect.cleandoc(docstring)))
    return [docstring for _, docstring in sorted(found, key=lambda entry: entry[0])]


def _encode(documents: Sequence[Document], tokenizer: Any) -> torch.Tensor:
    """int32 [tokens]: the documents one after the other, each between <s> and </s>."""
    begin, end = (tokenizer.token_to_id(token) for token in (BEGIN_TOKEN, END_TOKEN))
    if begin is None or end is None:
        raise ValueError(
            f"tokenizer: expected the tokens {BEGIN_TOKEN} and {END_TOKEN}, got neither or one"
        )
    encodings = tokenizer.encode_batch(
        [document.text for document in documents], add_special_tokens=False
    )
    return torch.cat(
        [torch.tensor([begin, *encoding.ids, end], dtype=torch.int32) for encoding in encodings]
    )


def _read_cache(cache: Path, key: str) -> TokenStreams | None:
    """The streams in ``cache``, or None where it is missing, unreadable or made of other inputs."""
    if not cache.is_file():
        return None
    try:
        with safe_open(str(cache), framework="pt") as file:
            if (file.metadata() or {}).get("digest") != key:
                return None
            return TokenStreams(file.get_tensor("train"), file.get_tensor("validation"), key)
    except SafetensorError:
        return None
