"""warploom: hand-written GPU kernels with a CPU path for each, and the models built on them.

Functions live in `warploom.ops.<family>`, drop-in modules in `warploom.nn`, models in `warploom.models`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from warploom._backends import BACKENDS, load_extensions, use_backend
from warploom._library import explain

__all__ = ["BACKENDS", "__version__", "explain", "use_backend"]

try:
    __version__ = version("warploom")
except PackageNotFoundError:  # a checkout on sys.path that was never installed
    __version__ = "0+unknown"

load_extensions()
