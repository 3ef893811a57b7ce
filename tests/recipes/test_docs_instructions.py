"""Instructions about the standard library, from sources that are read and not imported."""

from __future__ import annotations

from pathlib import Path

import pytest
from warploom.recipes.docs_instructions import docs_instructions
from warploom.recipes.instruction_data import Instruction

SOURCE = '''
import does_not_exist

def join(first, /, second: int = 1, *rest, key=None, **more):
    """Join the pieces of a text. More is said
    elsewhere."""

def _hidden():
    """This one is not part of the interface."""

def terse():
    """Short."""

class Box:
    """A box that holds one thing."""

    def open(self):
        """Open the box and
        return what is in it.

        Details follow."""
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    (tmp_path / "_private").mkdir()
    (tmp_path / "_private" / "a.py").write_text('def f():\n    """A function of no interest."""\n')
    (tmp_path / "things.py").write_text(SOURCE)
    return tmp_path


def test_each_name_gives_its_questions(library: Path) -> None:
    named = "Name the {} of the standard library that this describes."
    listed = "List the parameters of this function."
    joins, opens = "Join the pieces of a text.", "Open the box and return what is in it."
    signature = "things.join(first, /, second=1, *rest, key=None, **more)"
    assert docs_instructions(library) == [
        Instruction("What does `things.join` do?", "", joins),
        Instruction(named.format("function"), joins, "things.join"),
        Instruction("Write the signature of `things.join`.", "", signature),
        Instruction(listed, "things.join", "first, second, *rest, key, **more"),
        Instruction("What does `things.Box` do?", "", "A box that holds one thing."),
        Instruction(named.format("class"), "A box that holds one thing.", "things.Box"),
        Instruction("What does `things.Box.open` do?", "", opens),
        Instruction(named.format("method"), opens, "things.Box.open"),
        Instruction("Write the signature of `things.Box.open`.", "", "things.Box.open()"),
        Instruction(listed, "things.Box.open", "It takes no parameters."),
    ]


def test_a_limit_chooses_by_the_text_alone(library: Path) -> None:
    everything = docs_instructions(library)
    few = docs_instructions(library, limit=4)
    assert len(few) == 4 and few == [example for example in everything if example in few]
    assert set(docs_instructions(library, limit=3)) < set(few)
