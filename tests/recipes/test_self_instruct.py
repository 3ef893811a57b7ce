"""Self-Instruct and Alpaca's way: prompts, parsing, what is kept, and going on after a kill."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from warploom.recipes import _task_text as texts
from warploom.recipes import self_instruct as recipe
from warploom.recipes._rouge import InstructionPool
from warploom.recipes.self_instruct import Completion, SelfInstructConfig, self_instruct


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (
            "Sort the list of numbers in ascending order.",
            "Sort the numbers of the list in descending order!",
            0.5882352941176471,
        ),
        ("Write a haiku about rain", "write a HAIKU about: rain", 1.0),
        ("What is 2+2?", "What is two plus two?", 0.4444444444444445),
        ("Don't translate naïve café", "Do not translate naive cafe", 0.1818181818181818),
        ("...", "Explain gravity to a child", 0.0),
        ("a b a b a", "b a b", 0.75),
    ],
)
def test_similarity_is_that_of_rouge_score(first: str, second: str, expected: float) -> None:
    """The values are rouge_score 0.1.2's, rougeL's fmeasure without a stemmer."""
    for one, other in ((first, second), (second, first)):
        [score] = InstructionPool([one]).similarities(other).tolist()
        assert score == pytest.approx(expected, abs=1e-15)


def longest_common_subsequence(first: list[str], second: list[str]) -> int:
    @lru_cache(None)
    def length(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return 0
        if first[i - 1] == second[j - 1]:
            return length(i - 1, j - 1) + 1
        return max(length(i - 1, j), length(i, j - 1))

    return length(len(first), len(second))


def test_similarities_are_with_each_of_the_pool() -> None:
    draw = random.Random(0)
    sentences = [" ".join(draw.choices("abcde", k=draw.randrange(1, 90))) for _ in range(20)]
    pool = InstructionPool(sentences[:10])
    for sentence in sentences[10:]:
        expected = []
        for other in pool.instructions:
            one, two = sentence.split(), other.split()
            expected.append(2 * longest_common_subsequence(one, two) / (len(one) + len(two)))
        assert pool.similarities(sentence).tolist() == pytest.approx(expected, abs=1e-15)
        pool.add(sentence)


@pytest.mark.parametrize(
    ("instruction", "usable"),
    [
        ("Name three large rivers", True),
        ("Name three rivers", False),
        ("word " * 150, True),
        ("word " * 151, False),
        ("Describe the picture in detail", False),
        ("Describe the PICTURES in detail", False),
        ("Tell me where to go to tonight", False),
        ("Describe what a mapping function does", True),
        ("Write a program that sorts numbers", False),
        ("Please Write a program that sorts numbers", True),
        ('"Translate this sentence into French"', False),
        ("Écrire une phrase en français", False),
        ("Write a naïve sentence about cafés", True),
    ],
)
def test_rules_of_thumb(instruction: str, usable: bool) -> None:
    assert texts.is_usable(instruction) is usable


def test_a_prompt_for_tasks_numbers_its_examples() -> None:
    tasks = [
        {"instruction": "Add the\n numbers:", "input": "1 2", "output": "3"},
        {"instruction": "Say hello.", "input": "", "output": "Hello."},
    ]
    prompt = texts.tasks_prompt(tasks)
    assert "list of 20" in prompt
    assert prompt.endswith(
        "###\n1. Instruction: Add the numbers\n1. Input:\n1 2\n1. Output:\n3\n"
        "###\n2. Instruction: Say hello.\n2. Input:\n<noinput>\n2. Output:\nHello.\n"
        "###\n3. Instruction:"
    )


ANSWER = """ Name a colour.
4. Input:
<NoInput>
4. Output:
Blue.
###
5. Instruction: Translate the word.
5. Input:
chat
5. Output:
cat
###
6. Instruction: No input follows.
6. Output:
nothing
###
7. Instruction: The number is wrong.
8. Input:
a
7. Output:
b
###
8. Instruction: Count the words.
8. Input:
one two
8. Output:
2
"""


def test_tasks_are_read_by_their_numbers() -> None:
    colour = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
    word = {"instruction": "Translate the word.", "input": "chat", "output": "cat"}
    count = {"instruction": "Count the words.", "input": "one two", "output": "2"}
    assert texts.parse_tasks(ANSWER, 4) == [colour, word, count]
    assert texts.parse_tasks(ANSWER, 4, truncated=True) == [colour, word]
    assert texts.parse_tasks(ANSWER, 5) == []


def test_instructions_are_read_from_a_numbered_list() -> None:
    prompt = texts.instructions_prompt(["Add  the numbers:", "Say hello."])
    assert prompt.endswith("1. Add the numbers\n2. Say hello.\n3.")
    answer = " name a colour\n4. Count\n the words.\n5 . Explain 3. Planck units"
    found = ["Name a colour", "Count the words.", "Explain 3. Planck units"]
    assert texts.parse_instructions(answer) == found
    assert texts.parse_instructions(answer, truncated=True) == found[:-1]


@pytest.mark.parametrize(
    ("answer", "expected"), [(" Yes", True), ("yes, it is", True), (" No", False), ("", False)]
)
def test_a_classification_is_a_yes(answer: str, expected: bool) -> None:
    assert texts.parse_classification(answer) is expected


def test_inputs_come_first_or_outputs_do() -> None:
    given = "Example 1\nInput: one\nand more\nOutput: 1\nExample 2\nInput: <noinput>\nOutput: 2\n\nTask: next"
    expected = [{"input": "one\nand more", "output": "1"}, {"input": "", "output": "2"}]
    assert texts.parse_instances(given, output_first=False) == expected
    labels = "Class label: good\nI like it.\nClass label: bad\nI do\nnot.\n"
    expected = [{"input": "I like it.", "output": "good"}, {"input": "I do\nnot.", "output": "bad"}]
    assert texts.parse_instances(labels, output_first=True) == expected
    assert texts.parse_instances(labels, output_first=True, truncated=True) == expected[:1]


def test_instances_that_teach_nothing_are_left_out() -> None:
    answer = (
        "Input: a\nOutput: 1\nInput: a\nOutput: 2\nInput: b\nOutput: b\nInput: c\nOutput:\nInput: d"
    )
    assert texts.parse_instances(answer, output_first=False) == [{"input": "a", "output": "1"}]


def test_the_seed_tasks_are_usable_and_unlike_each_other() -> None:
    tasks = recipe.read_seed_tasks()
    assert len(tasks) == 24
    assert [task["id"] for task in tasks] == [f"seed_task_{index}" for index in range(24)]
    assert 6 <= sum(task["is_classification"] for task in tasks) <= 16
    pool = InstructionPool([])
    for task in tasks:
        assert task.keys() == {"id", "name", "instruction", "instances", "is_classification"}
        assert texts.is_usable(task["instruction"])
        assert all(instance["output"] for instance in task["instances"])
        scores = pool.similarities(task["instruction"])
        assert not len(scores) or scores.max() <= 0.7
        pool.add(task["instruction"])


def test_a_seed_file_that_lacks_something_is_named(tmp_path: Path) -> None:
    (tmp_path / "seeds.jsonl").write_text('{"instruction": "a", "instances": []}\n')
    with pytest.raises(ValueError, match=r"seeds\.jsonl: line 1: expected instruction, instances"):
        recipe.read_seed_tasks(tmp_path / "seeds.jsonl")


VERBS = ("Describe", "Compare", "Translate", "Count", "Explain", "Improve", "Invent", "Order")
THINGS = ("apples", "rivers", "poems", "engines", "tax forms", "planets", "proverbs", "knots")


def write_tasks(prompts: list[str]) -> list[Completion]:
    """A model that writes three tasks for a prompt, a function of it, the last one cut off."""
    answers = []
    for prompt in prompts:
        draw = random.Random(prompt)
        parts = []
        for number in range(4, 7):
            words = " ".join(draw.sample(THINGS, 3))
            parts.append(
                f"{number}. Instruction: {draw.choice(VERBS)} {words}.\n{number}. Input:\n<noinput>\n"
                f"{number}. Output:\n{draw.random()}\n"
            )
        text = "###\n".join(parts).removeprefix("4. Instruction:")
        answers.append(Completion(text, truncated=True))
    return answers


def config(output: Path, **changes: Any) -> SelfInstructConfig:
    settings = {"model": Path("none"), "count": 20, "batch_size": 2, **changes}
    return SelfInstructConfig(output=output, **settings)


def test_kept_tasks_are_unlike_each_other(tmp_path: Path) -> None:
    path = self_instruct(config(tmp_path), write_tasks)
    tasks = json.loads(path.read_text())
    assert len(tasks) == 20
    assert {task.keys() == {"instruction", "input", "output"} for task in tasks} == {True}
    pool = InstructionPool(task["instruction"] for task in recipe.read_seed_tasks())
    for task in tasks:
        assert pool.similarities(task["instruction"]).max() <= 0.7
        pool.add(task["instruction"])
    records = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    assert all(record["candidates"] == 4 for record in records)  # two of three, for two prompts
    assert any(len(record["tasks"]) < 4 for record in records)
    for task in records[0]["tasks"]:
        assert len(task["most_similar"]) == 10
        assert task["average_similarity"] <= max(task["most_similar"].values()) <= 0.7


def test_an_instruction_as_similar_as_the_threshold_is_kept(tmp_path: Path) -> None:
    """7 words in common of 10 and 10: exactly 0.7."""
    first = "one two three four five six seven eight nine ten"
    second = "one two three four five six seven red green blue"
    third = "one two three four five six seven eight green blue"
    answers = " " + "\n9. ".join([first, second, third])

    def write(prompts: list[str]) -> list[str]:
        return [answers if "list of different tasks" in prompt else "" for prompt in prompts]

    settings = {"style": "self-instruct", "max_requests": 1, "batch_size": 1}
    self_instruct(config(tmp_path, **settings), write)
    [record] = [json.loads(line) for line in (tmp_path / "instructions.jsonl").open()]
    kept = [task["instruction"].lower() for task in record["tasks"]]
    assert kept == [first, second]


class KilledError(Exception):
    """Stands for the end of the process."""


def killed_after(generate: Callable[..., Any], calls: int) -> Callable[..., Any]:
    def answer(prompts: list[str]) -> Any:
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise KilledError
        return generate(prompts)

    return answer


def write_steps(prompts: list[str]) -> list[str]:
    """A model that serves all three requests of Self-Instruct."""
    answers = []
    for prompt in prompts:
        draw = random.Random(prompt)
        if prompt.startswith("Write a list"):
            lines = [f"{draw.choice(VERBS)} {' '.join(draw.sample(THINGS, 3))}" for _ in range(3)]
            answers.append("\n9. ".join(lines))
        elif prompt.endswith("Is it classification?"):
            answers.append(draw.choice([" Yes", " No"]))
        elif "Class label:" in prompt:
            answers.append("Class label: a\nfirst\nClass label: b\nsecond\n")
        else:
            answers.append("Example 1\nInput: third\nOutput: c\n\nTask: more")
    return answers


@pytest.mark.parametrize(
    ("style", "generate"), [("alpaca", write_tasks), ("self-instruct", write_steps)]
)
@pytest.mark.parametrize("calls", [0, 1, 5, 9, 14])
def test_a_killed_run_goes_on_with_the_next_request(
    style: str, generate: Callable[..., Any], calls: int, tmp_path: Path
) -> None:
    expected = self_instruct(config(tmp_path / "straight", style=style), generate).read_text()
    killed = config(tmp_path / "killed", style=style)
    try:
        self_instruct(killed, killed_after(generate, calls))
    except KilledError:
        for log in killed.output.glob("*.jsonl"):
            with log.open("a") as file:
                file.write('{"step": 99, "tas')  # a record that was cut short
    assert self_instruct(killed, generate).read_text() == expected


def test_classifications_get_their_classes_first(tmp_path: Path) -> None:
    tasks = json.loads(
        self_instruct(config(tmp_path, style="self-instruct"), write_steps).read_text()
    )
    by_instruction: dict[str, list[Any]] = {}
    for task in tasks:
        by_instruction.setdefault(task["instruction"], []).append((task["input"], task["output"]))
    assert len(by_instruction) == 20
    kinds = {tuple(instances) for instances in by_instruction.values()}
    assert kinds == {(("first", "a"), ("second", "b")), (("third", "c"),)}


def test_a_model_answers_prompts_alike_each_time(base_model: Path, tmp_path: Path) -> None:
    generate = recipe.model_generator(config(tmp_path, model=base_model, max_new_tokens=6))
    both = generate(["Repeat the number", "Below is"])
    assert generate(["Below is"]) == both[1:]
    assert any(answer.truncated for answer in both) and any(answer.text for answer in both)
    other = recipe.model_generator(config(tmp_path, model=base_model, max_new_tokens=6, seed=1))
    assert other(["Below is"]) != both[1:]


def test_answers_are_as_many_as_prompts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="generate: expected 2 texts, got 1"):
        self_instruct(config(tmp_path), lambda prompts: [""])


def test_an_unknown_style_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="style: expected one of alpaca, self-instruct, got 'x'"):
        config(tmp_path, style="x")


def test_the_pool_takes_any_number() -> None:
    assert InstructionPool([]).similarities("a b").shape == (0,)
    assert torch.equal(InstructionPool(["a"]).similarities("!"), torch.zeros(1).double())
