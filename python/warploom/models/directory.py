"""A model directory that changes in one step, so that no crash leaves half of one."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_WEIGHT_FILE = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|config\.json|params\.json|consolidated\.\d+\.pth"
)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h


def existing_directory(directory: str | Path) -> Path:
    """`directory`, or FileNotFoundError."""
    directory = Path(os.path.realpath(directory))
    previous = _previous(directory)
    if directory.is_dir():
        return directory
    hint = f"; an interrupted save left the last one at {previous}" if previous.is_dir() else ""
    raise FileNotFoundError(f"{directory}: no such directory{hint}")


def is_weight_file(name: str) -> bool:
    """Whether `name` is a file of a model in any layout, which a new one takes the place of."""
    return _WEIGHT_FILE.fullmatch(name) is not None


@contextmanager
def replace_directory(
    directory: str | Path, drop: Callable[[str], bool] = is_weight_file
) -> Iterator[Path]:
    """Yields an empty directory that becomes `directory` when the block ends without an error.

    Everything is flushed to disk, then the two change places in one step (renameat2 with
    RENAME_EXCHANGE), so that a reader or a crash at any moment meets the old contents or the new,
    never a mixture. Entries of the old directory for which `drop(name)` is false are kept, as
    hard links. What a killed run has left beside `directory` is removed by the next.
    """
    directory = Path(os.path.realpath(directory))
    directory.parent.mkdir(parents=True, exist_ok=True)
    if _previous(directory).is_dir() and not directory.exists():
        _previous(directory).rename(directory)
    for leftover in directory.parent.glob(f"*.{glob.escape(directory.name)}.saving-*"):
        if not Path("/proc", leftover.name.rpartition("-")[2]).exists():
            shutil.rmtree(leftover, ignore_errors=True)
    staging = directory.with_name(f".{directory.name}.saving-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)  # from a killed run that had this process's number
    staging.mkdir()
    try:
        yield staging
        if directory.is_dir():
            shutil.copymode(directory, staging)
            _keep_entries(directory, staging, drop)
        _flush(staging)
        _take_place(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _previous(directory: Path) -> Path:
    """Where the old contents are for the moment between two renames."""
    return directory.with_name(f".{directory.name}.previous")


def _keep_entries(old: Path, new: Path, drop: Callable[[str], bool]) -> None:
    for entry in old.iterdir():
        if drop(entry.name) or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, new / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _flush(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for path in [*(os.path.join(folder, name) for name in names), folder]:
            if not os.path.islink(path):
                _fsync(path)


def _fsync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_place(staging: Path, directory: Path) -> None:
    """After this `directory` is what `staging` was; the old contents are left at `staging`."""
    if not directory.exists():
        staging.rename(directory)
    else:
        library = ctypes.CDLL(None, use_errno=True)
        old, new = os.fsencode(directory), os.fsencode(staging)
        if library.renameat2(_AT_FDCWD, new, _AT_FDCWD, old, _RENAME_EXCHANGE) != 0:
            code = ctypes.get_errno()
            if code not in (errno.EINVAL, errno.ENOSYS):
                raise OSError(code, f"{os.strerror(code)}: saving to {directory}")
            # A file system without the exchange: two renames, the old contents kept until the end.
            shutil.rmtree(_previous(directory), ignore_errors=True)
            directory.rename(_previous(directory))
            staging.rename(directory)
            shutil.rmtree(_previous(directory))
    _fsync(directory.parent)
