"""replace_directory: a directory is the old one or the new one, whatever happens in between."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from warploom.models import checkpoint, directory
from warploom.models.directory import existing_directory, replace_directory
from warploom.models.llama import Llama
from warploom.models.llama_config import LlamaConfig


def filled_model(value, vocab_size=32):
    """A LLaMA whose every weight is `value`, so that a mixture of two saves shows."""
    model = Llama(LlamaConfig(vocab_size, 16, 24, 1, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def values_in(path):
    return {float(v) for p in Llama.from_pretrained(path).parameters() for v in p.detach().unique()}


def names_in(path):
    return sorted(entry.name for entry in path.iterdir())


def run_and_kill_at(event, action):
    """Runs `action` in a child that gets SIGKILL at its `event`-th file operation.

    Returns whether the child was killed, rather than done before that.
    """
    child = os.fork()
    if child == 0:
        seen = 0

        def kill(name, _):
            nonlocal seen
            if name == "open" or name.startswith(("os.", "shutil.", "ctypes.")):
                seen += 1
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("shard", ["5GB", 1000], ids=["one-file", "sharded"])
def test_a_run_killed_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path, shard):
    target = tmp_path / "model"
    filled_model(1.0).save_pretrained(target, max_shard_size=1000)
    (target / "tokenizer.json").write_text("{}")
    # Another vocabulary: a config.json beside the other's weights would not load.
    other = filled_model(2.0, vocab_size=40)
    states, event = [], 0
    while True:
        event += 1
        killed = run_and_kill_at(event, lambda: other.save_pretrained(target, max_shard_size=shard))
        states.append(values_in(target))
        assert (target / "tokenizer.json").exists()
        if not killed:
            break
        if states[-1] == {2.0}:
            filled_model(1.0).save_pretrained(target, max_shard_size=1000)
    assert event > 20
    assert {1.0} in states
    assert states[-1] == {2.0}
    assert all(state in ({1.0}, {2.0}) for state in states)
    assert names_in(tmp_path) == ["model"], "what killed runs left is removed"


def test_a_run_killed_on_the_first_save_leaves_nothing_that_looks_like_a_checkpoint(tmp_path):
    target, model = tmp_path / "model", filled_model(1.0)
    event = 1
    while run_and_kill_at(event, lambda: model.save_pretrained(target)):
        if target.exists():
            assert values_in(target) == {1.0}
            break
        event += 1
    assert event > 5


def test_an_error_while_writing_leaves_the_old_directory_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "model"
    filled_model(1.0).save_pretrained(target)

    def full_disk(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        filled_model(2.0).save_pretrained(target)
    assert values_in(target) == {1.0}
    assert names_in(tmp_path) == ["model"]


def test_files_of_the_old_model_go_and_others_stay(tmp_path):
    target = tmp_path / "model"
    filled_model(1.0).save_pretrained(target, max_shard_size=1000)
    (target / "tokenizer.json").write_text("{}")
    (target / "runs").mkdir()
    (target / "runs" / "loss.jsonl").write_text("1\n")
    filled_model(2.0).save_pretrained(target)
    assert names_in(target) == ["config.json", "model.safetensors", "runs", "tokenizer.json"]
    assert (target / "runs" / "loss.jsonl").read_text() == "1\n"


def test_changing_the_layout_leaves_one_layout(tmp_path):
    target = tmp_path / "model"
    filled_model(1.0).save_pretrained(target)
    filled_model(2.0).save_pretrained(target, layout="meta")
    assert names_in(target) == ["consolidated.00.pth", "params.json"]
    assert values_in(target) == {2.0}


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to("disk")
    filled_model(1.0).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").is_symlink()
    assert values_in(tmp_path / "disk") == {1.0}


def test_several_files_and_a_model_change_together(tmp_path):
    target = tmp_path / "model"
    filled_model(1.0).save_pretrained(target)
    with replace_directory(target) as staging:
        filled_model(2.0).save_pretrained(staging)
        (staging / "tokenizer.json").write_text("{}")
        assert values_in(target) == {1.0}
    assert values_in(target) == {2.0}
    assert names_in(tmp_path) == ["model"]


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(tmp_path):
    (tmp_path / f".model.saving-{os.getpid()}").mkdir()
    filled_model(1.0).save_pretrained(tmp_path / "model")
    assert names_in(tmp_path) == ["model"]


def test_parents_are_made(tmp_path):
    filled_model(1.0).save_pretrained(tmp_path / "a" / "b")
    assert values_in(tmp_path / "a" / "b") == {1.0}


@pytest.fixture
def no_exchange(monkeypatch):
    """A file system whose renameat2 refuses RENAME_EXCHANGE."""

    def refuse(*_):
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(
        directory.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=refuse)
    )


def test_without_the_exchange_two_renames_do(tmp_path, no_exchange):
    target = tmp_path / "model"
    filled_model(1.0).save_pretrained(target)
    filled_model(2.0).save_pretrained(target)
    assert values_in(target) == {2.0}
    assert names_in(tmp_path) == ["model"]


def test_a_run_killed_between_two_renames_is_repaired_by_the_next_save(tmp_path, no_exchange):
    target = tmp_path / "model"
    filled_model(1.0).save_pretrained(target)
    (target / "tokenizer.json").write_text("{}")
    target.rename(tmp_path / ".model.previous")
    with pytest.raises(
        FileNotFoundError, match=r"interrupted save left the last one at .*previous"
    ):
        existing_directory(target)
    with replace_directory(target) as staging:
        assert values_in(target) == {1.0}
        (staging / "note").write_text("new")
    assert names_in(target) == ["note", "tokenizer.json"]
