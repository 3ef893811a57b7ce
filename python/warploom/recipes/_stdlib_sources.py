"""The sources of the standard library, read and never imported."""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Installed packages are not the standard library, and the rest is tests, generated tables and
# vendored wheels.
_EXCLUDED_DIRECTORIES = frozenset(
    {"__pycache__", "_bundled", "dist-packages", "encodings", "idle_test", "lib2to3", "pydoc_data"}
    | {"site-packages", "test", "tests", "turtledemo"}
)


def stdlib_directory() -> Path:
    """The running interpreter's."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(root: Path) -> Iterator[Path]:
    """The .py files under ``root``, sorted by path."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _EXCLUDED_DIRECTORIES)
        for name in sorted(files):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder, name)


def module_name(path: Path, root: Path) -> str:
    """The module that the file ``path`` under ``root`` is."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def parse(path: Path) -> ast.Module | None:
    """The tree of a file, or None for a template or a deliberately broken one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the sources' own invalid escapes
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None
