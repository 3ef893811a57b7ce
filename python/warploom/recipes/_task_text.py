"""What Self-Instruct and Alpaca ask a model for, and how its answers are read.

Wang et al., Self-Instruct (arXiv:2212.10560), section 2.2 and appendix A; Taori et al., Stanford Alpaca
(2023). The layouts are theirs, the words of the requests our own.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

Task = dict[str, Any]

TASKS_OF_A_PROMPT = 20  # that Alpaca's prompt asks for, its examples included
_NO_INPUT = "<noinput>"
_REQUEST = f"""\
Write a list of {TASKS_OF_A_PROMPT} different tasks for a language model that reads and writes text.

- Vary the verbs, the subjects and the kinds of task: questions, rewriting, classification, open writing.
- An instruction is one or two sentences in English, a command or a question, about nothing but text.
- An input is a concrete example of at most a hundred words, never a placeholder.
- A task that needs no input has "{_NO_INPUT}" in its place.
- An output answers the instruction and the input in less than a hundred words.

List of {TASKS_OF_A_PROMPT} tasks:
"""
_NOT_FOR_TEXT = (
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps"),
    *("draw", "plot", "go to", "video", "audio", "music", "flowchart", "diagram"),
)
_NOT_FOR_TEXT_PATTERN = re.compile(rf"\b({'|'.join(_NOT_FOR_TEXT)})\b", re.IGNORECASE)


def is_usable(instruction: str) -> bool:
    """Self-Instruct's rules of thumb: 4 to 150 words, about text alone, no "Write a program", beginning with
    an ASCII character that is not punctuation."""
    if not 3 < len(instruction.split()) <= 150:
        return False
    if _NOT_FOR_TEXT_PATTERN.search(instruction) or instruction.startswith("Write a program"):
        return False
    return instruction[0].isascii() and instruction[0] not in string.punctuation


def one_line(instruction: str) -> str:
    return re.sub(r"\s+", " ", instruction).strip().rstrip(":")


def tasks_prompt(examples: Sequence[Task]) -> str:
    """Alpaca's: one request for whole tasks, that begins with examples {instruction, input, output}."""
    parts = [_REQUEST]
    for number, task in enumerate(examples, 1):
        parts.append(
            f"###\n{number}. Instruction: {one_line(task['instruction'])}\n"
            f"{number}. Input:\n{task['input'] or _NO_INPUT}\n"
            f"{number}. Output:\n{task['output']}\n"
        )
    return "".join(parts) + f"###\n{len(examples) + 1}. Instruction:"


def parse_tasks(text: str, first: int, truncated: bool = False) -> list[Task]:
    """The tasks in the answer to ``tasks_prompt``; what has not the three parts in order is left out.

    Args:
        text: the answer; it continues the line "``first``. Instruction:".
        first: number of its first task.
        truncated: the answer ended for want of room, so that its last task is not whole.
    """
    sections = f"{first}. Instruction:{text}".split("###")
    tasks = []
    for number, section in enumerate(sections[:-1] if truncated else sections, first):
        parts = re.split(rf"{number}\.\s+(Instruction|Input|Output):", section)
        if parts[1::2] == ["Instruction", "Input", "Output"]:
            instruction, given, output = (part.strip() for part in parts[2::2])
            given = "" if given.lower() == _NO_INPUT else given
            tasks.append({"instruction": instruction, "input": given, "output": output})
    return tasks


def instructions_prompt(instructions: Sequence[str]) -> str:
    """Self-Instruct's first request: a numbered list of instructions that goes on."""
    lines = [f"{number}. {one_line(text)}\n" for number, text in enumerate(instructions, 1)]
    return "Write a list of different tasks:\n" + "".join(lines) + f"{len(lines) + 1}."


def parse_instructions(text: str, truncated: bool = False) -> list[str]:
    """The instructions in the answer to ``instructions_prompt``; none of a truncated one's last."""
    lines = re.split(r"\n\d+\s?\.\s", text)
    found = (one_line(line) for line in (lines[:-1] if truncated else lines))
    return [line[0].upper() + line[1:] for line in found if line]


def classification_prompt(examples: Sequence[Task], instruction: str) -> str:
    """Self-Instruct's second request: whether a task has few possible answers."""
    shown = [
        f"Task: {one_line(task['instruction'])}\nIs it classification? "
        f"{'Yes' if task['is_classification'] else 'No'}\n\n"
        for task in examples
    ]
    return (
        "Is the task a classification, with a small set of possible answers?\n\n"
        + "".join(shown)
        + f"Task: {one_line(instruction)}\nIs it classification?"
    )


def parse_classification(text: str) -> bool:
    return text.strip().lower().startswith("yes")


def instances_prompt(examples: Sequence[Task], instruction: str, *, output_first: bool) -> str:
    """Self-Instruct's third request: inputs with outputs, or (classification) outputs with inputs.

    An input made first leans towards one class; a class given first gets an input of its own.
    """
    parts = ["Give examples for each task.\n\n"]
    for task in examples:
        parts.append(f"Task: {one_line(task['instruction'])}\n")
        for number, instance in enumerate(task["instances"], 1):
            given, output = instance["input"] or _NO_INPUT, instance["output"]
            parts.append(
                f"Class label: {output}\n{given}\n"
                if output_first
                else f"Example {number}\nInput: {given}\nOutput: {output}\n"
            )
        parts.append("\n")
    return "".join(parts) + f"Task: {one_line(instruction)}\n"


def parse_instances(
    text: str, *, output_first: bool, truncated: bool = False
) -> list[dict[str, str]]:
    """The instances {input, output} in the answer to ``instances_prompt``.

    One without output, with the output of its input, or with an input that an earlier one has, is left out.
    """
    text = text.split("\nTask:")[0]
    if output_first:
        sections = re.split(r"Class label:", text)[1:]
        pairs = [section.strip().partition("\n")[::-2] for section in sections]
    else:
        sections = re.split(r"(?:^|\n)Input:", text)[1:]
        pairs = [re.split(r"\nOutput:", section, maxsplit=1) for section in sections]
        pairs = [(given, re.split(r"\nExample \d+", *rest)[0]) for given, *rest in pairs if rest]
    if truncated:
        pairs = pairs[:-1]
    kept: dict[str, str] = {}
    for given, output in pairs:
        given, output = given.strip(), output.strip()
        given = "" if given.lower() == _NO_INPUT else given
        if output and given != output:
            kept.setdefault(given, output)
    return [{"input": given, "output": output} for given, output in kept.items()]
