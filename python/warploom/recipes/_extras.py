"""Packages of the ``demo`` extra, imported when first needed."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtraError(ImportError):
    """A package of an optional extra is not installed; the message names the extra."""


def require(module: str) -> Any:
    """Import ``module``, or raise ``MissingExtraError`` with the command that installs it.

    Only the absence of the package itself is turned into that error: a package that is there but
    fails to import raises what it raises.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingExtraError(
            f'{package} is not installed; it comes with: pip install "warploom[demo]"', name=package
        ) from None


def make_console() -> Any:
    """A ``rich`` console for standard output, wide enough for the tables where no terminal is."""
    console = require("rich.console").Console()
    return console if console.is_terminal else require("rich.console").Console(width=120)
