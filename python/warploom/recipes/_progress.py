"""A progress bar on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from warploom.recipes._extras import make_console, require


class Advance(Protocol):
    """Counts ``count`` more as done, shows ``text`` beside the bar, and prints ``line`` if there is one."""

    def __call__(self, text: str = "", line: str | None = None, count: int = 1) -> None: ...


@contextmanager
def progress_bar(
    description: str, total: int, done: int = 0, silent: bool = False
) -> Iterator[Advance]:
    """Yields what counts the steps. ``silent`` shows nothing, as all but one of several processes do."""
    console = make_console()
    progress = require("rich.progress")
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[text]}"),
        progress.TimeRemainingColumn(),
    )
    hidden = silent or not console.is_terminal
    with progress.Progress(*columns, console=console, disable=hidden) as bar:
        task = bar.add_task(description, total=total, completed=done, text="")

        def advance(text: str = "", line: str | None = None, count: int = 1) -> None:
            bar.update(task, advance=count, text=text)
            if line is not None and not silent:
                console.print(line, highlight=False)

        yield advance
