"""The only reader of the process environment.

Read once at import, so that nothing changes underneath a compiled graph. `docs/environment.md` lists
every variable, the build's too.
"""

from __future__ import annotations

import os

#: The backend that serves every call that names none: "auto" or a name from `warploom.BACKENDS`.
DEFAULT_BACKEND: str | None = os.environ.get("WARPLOOM_BACKEND", "auto")
if DEFAULT_BACKEND == "auto":
    DEFAULT_BACKEND = None
