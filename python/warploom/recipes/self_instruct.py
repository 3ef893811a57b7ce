"""Instructions made by a language model from a few of one's own: Self-Instruct, and Alpaca's shorter way.

Wang et al., Self-Instruct (arXiv:2212.10560), asks three times: for instructions, for which of them are
classifications, and for instances of each. Taori et al., Stanford Alpaca (2023), asks once, for a list of
whole tasks. Both keep an instruction whose ROUGE-L with every other, seeds included, is at most 0.7.

A run may be killed at any moment: what a request gave is one line of a log, and the next run goes on with the
request after the last whole one. A request's examples are drawn by its number, so that a generator that gives
the same text for the same prompt gives the same tasks, stopped or not.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch

from warploom.models.auto import load_model
from warploom.ops._check import check_choice
from warploom.recipes import _task_text as texts
from warploom.recipes._config import check_whole_numbers
from warploom.recipes._progress import progress_bar
from warploom.recipes._rouge import InstructionPool
from warploom.recipes._task_text import Task
from warploom.recipes._training_log import TrainingLog, read_log
from warploom.recipes.text_corpus import load_tokenizer

SEED_TASKS = Path(__file__).with_name("seed_tasks.jsonl")
STYLES = ("alpaca", "self-instruct")
_EXAMPLES = {"alpaca": 3, "self-instruct": 6}  # seed tasks of a prompt
_OWN_EXAMPLES = 2  # instructions made before, of a prompt of Self-Instruct
_SHOTS = 8  # seed tasks that show what a classification or an instance is


class Completion(NamedTuple):
    """A model's answer; ``truncated`` if it ended for want of room."""

    text: str
    truncated: bool = False


#: Prompts to answers, one for each; a string is an answer that is whole.
Generate = Callable[[list[str]], Sequence[str | Completion]]


@dataclass(frozen=True)
class SelfInstructConfig:
    """What a run depends on; ``warploom self-instruct`` has an option for each field."""

    model: Annotated[Path, "Hugging Face directory with a tokenizer.json: the model that is asked."]
    output: Annotated[Path, "Folder of the run; at the end tasks.json is there."]
    count: Annotated[int, "Tasks to make."] = 100
    max_requests: Annotated[int, "End after so many requests, whatever they gave."] = 1000
    style: Annotated[str, "alpaca: whole tasks in one answer; self-instruct: three steps."] = (
        "alpaca"
    )
    seed_tasks: Annotated[Path, "JSONL of one's own tasks, in the published format."] = SEED_TASKS
    batch_size: Annotated[int, "Prompts of a request."] = 5
    max_new_tokens: Annotated[int, "Most tokens of an answer."] = 3072
    temperature: Annotated[float, "Of the sampling."] = 1.0
    top_p: Annotated[float, "Sample among the likeliest p."] = 1.0
    threshold: Annotated[float, "Drop instructions whose ROUGE-L with one is above this."] = 0.7
    seed: Annotated[int, "Seed of the examples and of the sampling."] = 0

    def __post_init__(self) -> None:
        check_choice("self-instruct", "style", self.style, STYLES)
        check_whole_numbers("self-instruct", self)


def read_seed_tasks(path: Path = SEED_TASKS) -> list[Task]:
    """Tasks {id, name, instruction, instances [{input, output}], is_classification}, one a line."""
    tasks = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        task = json.loads(line)
        missing = {"instruction", "instances", "is_classification"} - task.keys()
        if missing or not task["instances"]:
            raise ValueError(
                f"{path}: line {number}: expected instruction, instances and is_classification, got "
                f"{', '.join(sorted(task))}"
            )
        tasks.append(task)
    return tasks


def self_instruct(config: SelfInstructConfig, generate: Generate | None = None) -> Path:
    """Make tasks from the seed tasks, and write them as Alpaca's JSON.

    Args:
        config: the settings.
        generate: who answers the prompts; None asks ``config.model``.

    Returns: ``tasks.json`` in the output folder, a list of {instruction, input, output}.
    """
    if generate is None:
        generate = model_generator(config)
    run = _Run(config, generate)
    config.output.mkdir(parents=True, exist_ok=True)
    tasks = run.whole_tasks() if config.style == "alpaca" else run.tasks_in_steps()
    path = config.output / "tasks.json"
    path.write_text(json.dumps(tasks, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def model_generator(config: SelfInstructConfig) -> Generate:
    """Answers of the model of a directory, sampled; a prompt's answer is a function of it and the seed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(config.model, device=device)
    tokenizer = load_tokenizer(config.model)
    # An answer is over where the list is, or a new task of a prompt with examples begins.
    stops = [f"\n{texts.TASKS_OF_A_PROMPT + 1}.", "\nTask:"]

    def answer(prompts: list[str]) -> list[Completion]:
        generators = []
        for prompt in prompts:
            digest = hashlib.sha256(f"{config.seed}\0{prompt}".encode()).digest()
            seed = int.from_bytes(digest[:8], "big", signed=True)
            generators.append(torch.Generator(device).manual_seed(seed))
        pieces: list[list[str]] = [[] for _ in prompts]
        truncated = [False] * len(prompts)
        for token in model.stream(
            [tokenizer.encode(prompt).ids for prompt in prompts],
            config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            stop_strings=stops,
            tokenizer=tokenizer,
            generator=generators,
        ):
            pieces[token.row].append(token.text or "")
            truncated[token.row] |= token.finish == "length"
        return [Completion("".join(text), cut) for text, cut in zip(pieces, truncated)]

    return answer


class _Run:
    def __init__(self, config: SelfInstructConfig, generate: Generate) -> None:
        self.config = config
        self.generate = generate
        self.seeds = read_seed_tasks(config.seed_tasks)
        if len(self.seeds) < _EXAMPLES[config.style]:
            raise ValueError(
                f"{config.seed_tasks}: expected at least {_EXAMPLES[config.style]} tasks, got "
                f"{len(self.seeds)}"
            )

    def whole_tasks(self) -> list[Task]:
        """Alpaca's way: every answer is a list of tasks."""
        examples = [
            {"instruction": task["instruction"], **task["instances"][0]} for task in self.seeds
        ]
        count = _EXAMPLES["alpaca"]

        def prompt(draw: random.Random, _: list[Task]) -> str:
            return texts.tasks_prompt(draw.sample(examples, count))

        def parse(answer: Completion) -> list[Task]:
            return texts.parse_tasks(answer.text, count + 1, answer.truncated)

        made = self._different_tasks("tasks.jsonl", prompt, parse)
        return [{name: task[name] for name in ("instruction", "input", "output")} for task in made]

    def tasks_in_steps(self) -> list[Task]:
        """Self-Instruct's way: instructions; which are classifications; instances of each."""
        seeds = [task["instruction"] for task in self.seeds]

        def prompt(draw: random.Random, made: list[Task]) -> str:
            own = [task["instruction"] for task in made]
            shown = draw.sample(own, min(_OWN_EXAMPLES, len(own)))
            shown += draw.sample(seeds, _EXAMPLES["self-instruct"])
            draw.shuffle(shown)
            return texts.instructions_prompt(shown)

        def parse(answer: Completion) -> list[Task]:
            found = texts.parse_instructions(answer.text, answer.truncated)
            return [{"instruction": instruction} for instruction in found]

        made = self._different_tasks("instructions.jsonl", prompt, parse)
        instructions = [task["instruction"] for task in made]
        answers = self._ask_each(
            "classification.jsonl",
            [texts.classification_prompt(self._shots(), text) for text in instructions],
        )
        labels = [texts.parse_classification(answer.text) for answer in answers]
        answers = self._ask_each(
            "instances.jsonl",
            [
                texts.instances_prompt(self._shots(label), text, output_first=label)
                for text, label in zip(instructions, labels)
            ],
        )
        tasks = []
        for instruction, label, answer in zip(instructions, labels, answers):
            for instance in texts.parse_instances(
                answer.text, output_first=label, truncated=answer.truncated
            ):
                tasks.append({"instruction": instruction, **instance})
        return tasks

    def _shots(self, is_classification: bool | None = None) -> list[Task]:
        """Seed tasks of one kind, or of both in turn."""
        if is_classification is not None:
            kind = [task for task in self.seeds if task["is_classification"] == is_classification]
            return kind[:_SHOTS]
        return [task for pair in zip(self._shots(True), self._shots(False)) for task in pair]

    def _different_tasks(
        self,
        log_name: str,
        prompt: Callable[[random.Random, list[Task]], str],
        parse: Callable[[Completion], list[Task]],
    ) -> list[Task]:
        """Requests until there are ``count`` tasks whose instructions differ; each record of the log is
        a request's."""
        config = self.config
        path = config.output / log_name
        records = read_log(path)
        made: list[Task] = [task for record in records for task in record["tasks"]]
        pool = InstructionPool(task["instruction"] for task in [*self.seeds, *made])
        done = records[-1]["step"] if records else 0
        with (
            closing(TrainingLog(path, done)) as log,
            progress_bar("tasks", config.count, min(len(made), config.count)) as advance,
        ):
            for step in range(done + 1, config.max_requests + 1):
                if len(made) >= config.count:
                    break
                draws = [
                    random.Random(f"{config.seed} {step} {place}")
                    for place in range(config.batch_size)
                ]
                answers = self._ask([prompt(draw, made) for draw in draws])
                candidates = [task for answer in answers for task in parse(answer)]
                kept = self._admit(candidates, pool)
                log.append({"step": step, "candidates": len(candidates), "tasks": kept})
                made += kept
                advance(f"request {step}: {len(kept)} of {len(candidates)}", count=len(kept))
        return made[: config.count]

    def _admit(self, candidates: list[Task], pool: InstructionPool) -> list[Task]:
        """The candidates that are usable and unlike what the pool holds; they join it."""
        kept = []
        for task in candidates:
            instruction = task["instruction"]
            if not texts.is_usable(instruction):
                continue
            scores = pool.similarities(instruction)
            if scores.max() > self.config.threshold:
                continue
            nearest = scores.topk(min(10, len(scores)))
            similar = {
                pool.instructions[place]: round(score, 4)
                for score, place in zip(nearest.values.tolist(), nearest.indices.tolist())
            }
            average = round(scores.mean().item(), 4)
            kept.append({**task, "most_similar": similar, "average_similarity": average})
            pool.add(instruction)
        return kept

    def _ask_each(self, log_name: str, prompts: list[str]) -> list[Completion]:
        """An answer for each prompt, those in the log first."""
        path = self.config.output / log_name
        answers = [Completion(*answer) for record in read_log(path) for answer in record["answers"]]
        done = len(read_log(path))
        size = self.config.batch_size
        with (
            closing(TrainingLog(path, done)) as log,
            progress_bar(path.stem, len(prompts), len(answers)) as advance,
        ):
            for start in range(len(answers), len(prompts), size):
                new = self._ask(prompts[start : start + size])
                done += 1
                log.append({"step": done, "answers": [list(answer) for answer in new]})
                answers += new
                advance(count=len(new))
        return answers

    def _ask(self, prompts: list[str]) -> list[Completion]:
        answers: list[Any] = list(self.generate(prompts))
        if len(answers) != len(prompts):
            raise ValueError(
                f"self-instruct: generate: expected {len(prompts)} texts, got {len(answers)}"
            )
        return [Completion(answer) if isinstance(answer, str) else answer for answer in answers]
