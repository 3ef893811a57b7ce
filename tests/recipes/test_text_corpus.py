"""The corpus that ships with CPython, its splits, its tokenizer and its token cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from warploom.recipes import text_corpus
from warploom.recipes.text_corpus import Document

TEXTS = ["Return the value.", "Naïve text: caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{SNOWMAN}"]


@pytest.fixture
def tokenizer_directory(tmp_path: Path) -> Path:
    text_corpus.train_tokenizer(TEXTS * 5, tmp_path / "tokenizer", vocab_size=300)
    return tmp_path / "tokenizer"


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A standard library of three modules, one of them broken, beside installed packages."""
    root = tmp_path / "lib"
    for folder in ("package", "site-packages", "test"):
        (root / folder).mkdir(parents=True)
    (root / "b.py").write_text(
        "import does_not_exist\n\ndef g():\n"
        '    """The first function of b.\n\n    More:\n      indented."""\n'
        'class C:\n    """The class of module b."""\n    def m(self):\n        """Short."""\n'
    )
    (root / "package" / "__init__.py").write_text('"""The package, documented at length."""')
    (root / "a.py").write_text("def broken(:\n")
    (root / "site-packages" / "c.py").write_text('"""An installed package, not the library."""')
    (root / "test" / "d.py").write_text('"""A test module, not documentation."""')
    return root


def test_documents_are_the_topics_and_then_the_docstrings_by_module(library: Path) -> None:
    documents = text_corpus.standard_library_documents(library)
    topics = [document for document in documents if document.name.startswith("topics:")]
    assert documents[: len(topics)] == topics
    assert {"topics:for", "topics:class"} <= {document.name for document in topics}
    assert documents[len(topics) :] == [
        Document("b", "The first function of b.\n\nMore:\n  indented.\n\nThe class of module b."),
        Document("package", "The package, documented at length."),
    ]


def test_every_text_is_there_once() -> None:
    texts = [document.text for document in text_corpus.standard_library_documents()]
    assert len(texts) == len(set(texts))
    assert sum(map(len, texts)) > 1_000_000


def test_split_depends_on_each_text_alone() -> None:
    documents = [Document(str(index), f"text {index}") for index in range(200)]
    train, validation = text_corpus.split_documents(documents, 0.2)
    assert sorted(train + validation, key=lambda document: int(document.name)) == documents
    assert 20 <= len(validation) <= 60
    train_of_half, validation_of_half = text_corpus.split_documents(documents[::2], 0.2)
    assert set(train_of_half) <= set(train)
    assert set(validation_of_half) <= set(validation)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_split_refuses_an_empty_side(share: float) -> None:
    with pytest.raises(ValueError, match="validation_share: expected 0 < share < 1"):
        text_corpus.split_documents([Document("a", "b")] * 3, share)


@pytest.mark.parametrize("text", [*TEXTS, "", "  spaces\n\n\tand tabs ", "日本語"])
def test_tokenizer_gives_back_any_text(tokenizer_directory: Path, text: str) -> None:
    tokenizer = text_corpus.load_tokenizer(tokenizer_directory)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_transformers_reads_the_same_tokens(tokenizer_directory: Path) -> None:
    ours = text_corpus.load_tokenizer(tokenizer_directory)
    theirs = AutoTokenizer.from_pretrained(tokenizer_directory)
    assert theirs(TEXTS[1])["input_ids"] == ours.encode(TEXTS[1]).ids
    assert theirs(TEXTS[1])["input_ids"][0] == ours.token_to_id("<s>") == theirs.bos_token_id
    assert theirs.eos_token_id == ours.token_to_id("</s>")


def test_tokenizer_needs_room_for_the_bytes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size: expected at least 259, got 100"):
        text_corpus.train_tokenizer(TEXTS, tmp_path, vocab_size=100)


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a tokenizer\.json"):
        text_corpus.load_tokenizer(tmp_path)


def test_streams_are_documents_between_begin_and_end(tokenizer_directory: Path) -> None:
    tokenizer = text_corpus.load_tokenizer(tokenizer_directory)
    documents = [Document(text, text) for text in TEXTS]
    cache = tokenizer_directory / "tokens.safetensors"
    streams = text_corpus.token_streams(documents, documents[:1], tokenizer, cache)
    begin, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    inner = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert streams.train.tolist() == [begin, *inner[0], end, begin, *inner[1], end]
    assert streams.validation.tolist() == [begin, *inner[0], end]
    assert streams.train.dtype == torch.int32


def test_cache_serves_the_same_inputs_and_no_others(tokenizer_directory: Path) -> None:
    tokenizer = text_corpus.load_tokenizer(tokenizer_directory)
    one, two = ([Document("", text)] for text in TEXTS)
    cache = tokenizer_directory / "tokens.safetensors"
    first = text_corpus.token_streams(one, two, tokenizer, cache)
    written = cache.stat().st_mtime_ns
    again = text_corpus.token_streams(one, two, tokenizer, cache)
    assert cache.stat().st_mtime_ns == written
    assert torch.equal(again.train, first.train)
    other = text_corpus.token_streams(two, one, tokenizer, cache)
    assert torch.equal(other.train, first.validation)
    cache.write_bytes(cache.read_bytes()[:20])
    repaired = text_corpus.token_streams(one, two, tokenizer, cache)
    assert torch.equal(repaired.train, first.train)
