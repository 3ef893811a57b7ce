"""Instructions about the standard library, made of the documentation that ships with CPython.

Each public function, class and method with a docstring gives a few questions whose answers are in its
source: what it does, its signature, its parameters, its name from what it does. Sources are read, not
imported, in the order of their paths, so that one version of Python always gives one list.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from warploom.recipes._stdlib_sources import module_name, parse, source_files, stdlib_directory
from warploom.recipes.instruction_data import Instruction

_LONGEST_SENTENCE = 200  # characters
_SHORTEST_SENTENCE = 15
_LONGEST_SIGNATURE = 120
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Documented:
    """A function, method or class: its full name, the kind of thing, its first sentence, and its parameters,
    of a class None."""

    name: str
    kind: str
    sentence: str
    parameters: tuple[str, ...] | None

    @property
    def signature(self) -> str:
        return f"{self.name}({', '.join(self.parameters or ())})"


def documented(root: Path | None = None) -> list[Documented]:
    """What the standard library documents, each name once."""
    root = stdlib_directory() if root is None else root
    found: dict[str, Documented] = {}
    for path in source_files(root):
        module = module_name(path, root)
        tree = parse(path)
        if tree is not None and not any(part.startswith("_") for part in module.split(".")):
            for entry in _members(tree, module):
                found.setdefault(entry.name, entry)
    return list(found.values())


def docs_instructions(root: Path | None = None, limit: int | None = None) -> list[Instruction]:
    """Instructions with their answers, one or more for each documented name.

    Args:
        root: the folder of standard library sources; default, the running interpreter's.
        limit: most examples; of more, those that a hash of their text puts first. The order of the sources
            stays.
    """
    examples = [example for entry in documented(root) for example in _questions(entry)]
    if limit is None or len(examples) <= limit:
        return examples
    chosen = sorted(examples, key=_hash)[:limit]
    kept = set(chosen)
    return [example for example in examples if example in kept]


def _hash(example: Instruction) -> bytes:
    return hashlib.sha256(f"{example.instruction}\0{example.input}".encode()).digest()


def _questions(entry: Documented) -> Iterator[Instruction]:
    yield Instruction(f"What does `{entry.name}` do?", "", entry.sentence)
    named = f"Name the {entry.kind} of the standard library that this describes."
    yield Instruction(named, entry.sentence, entry.name)
    if entry.parameters is None or len(entry.signature) > _LONGEST_SIGNATURE:
        return
    yield Instruction(f"Write the signature of `{entry.name}`.", "", entry.signature)
    names = [re.split("[=:]", parameter)[0] for parameter in entry.parameters]
    names = [name for name in names if name not in ("*", "/")]
    answer = ", ".join(names) if names else "It takes no parameters."
    yield Instruction("List the parameters of this function.", entry.name, answer)


def _members(tree: ast.Module | ast.ClassDef, prefix: str) -> Iterator[Documented]:
    """The public functions and classes of a module or class that have a docstring, with what is in them."""
    in_class = isinstance(tree, ast.ClassDef)
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | _Function) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        sentence = _first_sentence(ast.get_docstring(node))
        if isinstance(node, ast.ClassDef):
            if sentence:
                yield Documented(name, "class", sentence, None)
            yield from _members(node, name)
        elif sentence:
            parameters = _parameters(node.args)
            if in_class and parameters and parameters[0] in ("self", "cls"):
                parameters = parameters[1:]
            yield Documented(name, "method" if in_class else "function", sentence, parameters)


def _first_sentence(docstring: str | None) -> str:
    """Up to the first full stop, on one line; "" where that is no sentence of a usual length."""
    paragraph = re.split(r"\n\s*\n", docstring or "")[0]
    text = re.sub(r"\s+", " ", paragraph).strip()
    sentence = re.split(r"(?<=[.!?])\s", text)[0]
    usual = _SHORTEST_SENTENCE <= len(sentence) <= _LONGEST_SENTENCE
    return sentence if usual and sentence[0].isupper() else ""


def _parameters(arguments: ast.arguments) -> tuple[str, ...]:
    """As they stand in the source, defaults included, annotations left out."""
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    shown = []
    for index, argument in enumerate(positional):
        has_default = index >= first_default
        default = arguments.defaults[index - first_default] if has_default else None
        shown.append(_parameter(argument, default))
        if index + 1 == len(arguments.posonlyargs):
            shown.append("/")
    if arguments.vararg is not None:
        shown.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        shown.append("*")
    keywords: Sequence[ast.expr | None] = arguments.kw_defaults
    shown += [_parameter(*pair) for pair in zip(arguments.kwonlyargs, keywords)]
    if arguments.kwarg is not None:
        shown.append(f"**{arguments.kwarg.arg}")
    return tuple(shown)


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    return argument.arg if default is None else f"{argument.arg}={ast.unparse(default)}"
