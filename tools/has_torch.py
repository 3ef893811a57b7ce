"""Exits 0 if a supported torch can be imported, else 1."""

import importlib.metadata
import re
import sys

try:
    version = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    sys.exit(1)
major, minor = (int(part) for part in re.findall(r"\d+", version)[:2])
sys.exit(0 if (2, 11) <= (major, minor) < (2, 16) else 1)
