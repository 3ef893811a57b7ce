"""Mutation testing of a family's kernels: what can be broken without a test noticing?

    python tools/mutate.py norm [--constants 40] [--seed 0] [--minutes 20] [--files reduce.cuh]

Deletes each synchronisation statement of csrc/<family>/*.cuh and shifts a random sample of its
integer constants by one. For each mutation the kernel units that include the file are compiled anew
with the commands of the last `make build`, linked with that build's other objects into `_simt` and
`_simt_instrumented` of a copy of the tree, and the family's tests named `simt` are run there. A
mutation survives when they pass; survivors are printed with file and line. Exit status 1 when a
deleted synchronisation survived.
"""

from __future__ import annotations

import argparse
import os
import queue
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
NATIVE = ROOT / "build" / "native"
PACKAGE = Path("python") / "warploom"
MODULES = ("_simt", "_simt_instrumented")
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "out", "__pycache__", "*.new", "_simt*.so"
)

SYNCHRONISATION = re.compile(
    r"\b(?:device::)?(?:sync_threads|sync_warp|named_barrier_sync|named_barrier_arrive|thread_fence"
    r"|copy_async_commit|copy_async_wait<[^;()]*>)\([^;]*\);"
)
INTEGER = re.compile(r"(?<![\w.])\d+(?![\w.])")
INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"', re.MULTILINE)
#: Lines whose integers change nothing that a CPU could show, or that the compiler answers for.
NOT_MUTATED = re.compile(r"^\s*(#|static_assert|WARPLOOM_KERNEL)")


@dataclass(frozen=True)
class Mutation:
    kind: str  # "synchronisation" or "constant"
    path: Path  # relative to the root
    line: int
    start: int  # of the replaced text in the file
    end: int
    old: str
    new: str

    def __str__(self) -> str:
        change = (
            f"deleted {self.old}" if self.kind == "synchronisation" else f"{self.old} -> {self.new}"
        )
        return f"{self.path}:{self.line}: {change}"


def without_comments(text: str) -> str:
    """The text with comments blanked, every other character in its place."""
    return re.sub(
        r"//[^\n]*|/\*.*?\*/", lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=re.DOTALL
    )


def find_mutations(path: Path, rng: random.Random) -> list[Mutation]:
    text = (ROOT / path).read_text()
    code = without_comments(text)
    lines = code.split("\n")
    found = []
    for kind, pattern in (("synchronisation", SYNCHRONISATION), ("constant", INTEGER)):
        for match in pattern.finditer(code):
            line = code.count("\n", 0, match.start()) + 1
            if kind == "constant" and NOT_MUTATED.match(lines[line - 1]):
                continue
            new = ";" if kind == "synchronisation" else str(int(match[0]) + rng.choice((-1, 1)))
            found.append(Mutation(kind, path, line, match.start(), match.end(), match[0], new))
    return found


def included_from(unit: Path) -> set[Path]:
    """The files of csrc that a kernel unit includes, directly or not."""
    seen: set[Path] = set()
    pending = [unit]
    while pending:
        current = pending.pop()
        for name in INCLUDE.findall(current.read_text()):
            for base in (current.parent, CSRC):
                target = (base / name).resolve()
                if target.is_file() and target not in seen:
                    seen.add(target)
                    pending.append(target)
    return seen


def build_command(output: Path) -> str:
    """The command with which the last build made `output`."""
    ninja = (
        shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "ninja"
    )
    listed = subprocess.run(
        [ninja, "-C", str(NATIVE), "-t", "commands", "-s", str(output)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return listed.stdout.strip().splitlines()[-1]


class Workspace:
    """A copy of the tree in which one mutation at a time is built and tested."""

    def __init__(self, folder: Path, family: str, units: list[Path]) -> None:
        self.folder = folder
        self.family = family
        self.units = units
        self.tree = folder / "tree"
        shutil.copytree(ROOT, self.tree, symlinks=True, ignore=LEFT_OUT)
        self.suffix = {
            module: next((ROOT / PACKAGE).glob(f"{module}.*.so")).name.removeprefix(module)
            for module in MODULES
        }
        for module in MODULES:
            shutil.copy2(ROOT / PACKAGE / f"{module}{self.suffix[module]}", self.tree / PACKAGE)

    def run(self, command: list[str], seconds: float) -> int:
        """The exit status; -1 when the time ran out."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.tree / "python"),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        with subprocess.Popen(
            command, cwd=self.tree, env=environment, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                return -1

    def build(self, path: Path) -> bool:
        """Compile and link what includes `path`; False when the compiler refuses it."""
        for module in MODULES:
            link = shlex.split(build_command(NATIVE / module / f"{module}.so"))
            for unit in self.units:
                if ROOT / path not in included_from(unit):
                    continue
                built = NATIVE / module / f"{unit.stem}_kernel.o"
                mine = self.folder / module / built.name
                mine.parent.mkdir(exist_ok=True)
                command = build_command(built).replace(str(CSRC), str(self.tree / "csrc"))
                arguments = shlex.split(command)
                arguments[arguments.index("-o") + 1] = str(mine)
                arguments[arguments.index("-MF") + 1] = f"{mine}.d"
                if self.run(arguments, 300) != 0:
                    return False
                link = [str(mine) if argument == str(built) else argument for argument in link]
            target = self.tree / PACKAGE / f"{module}{self.suffix[module]}"
            link[link.index("-o") + 1] = str(target)
            target.unlink()
            if self.run(link, 300) != 0:
                raise RuntimeError(f"linking {module} failed: {shlex.join(link)}")
        return True

    def test(self, seconds: float) -> int:
        return self.run(
            [sys.executable, "-m", "pytest", f"tests/{self.family}", "-k", "simt", "-x", "-q",
             "-p", "no:cacheprovider", "-p", "no:xdist"],
            seconds,
        )  # fmt: skip

    def judge(self, mutation: Mutation, seconds: float) -> str:
        original = (ROOT / mutation.path).read_text()
        target = self.tree / mutation.path
        target.write_text(original[: mutation.start] + mutation.new + original[mutation.end :])
        try:
            if not self.build(mutation.path):
                return "refused by the compiler"
            status = self.test(seconds)
        finally:
            target.write_text(original)
        return {0: "SURVIVED", -1: "caught (time ran out)"}.get(status, "caught")


def mutate(arguments: argparse.Namespace, folder: Path) -> int:
    units = sorted((CSRC / arguments.family).glob("*.cu"))
    if not units:
        sys.exit(
            f"mutate: family: expected a folder of csrc with kernels, got {arguments.family!r}"
        )
    paths = sorted(
        path.relative_to(ROOT)
        for path in [*(CSRC / arguments.family).glob("*.cuh"), *(CSRC / "common").glob("*.cuh")]
        if (path.parent.name == arguments.family and not arguments.files)
        or path.name in arguments.files
    )
    rng = random.Random(arguments.seed)
    found = [mutation for path in paths for mutation in find_mutations(path, rng)]
    chosen = [mutation for mutation in found if mutation.kind == "synchronisation"]
    constants = [mutation for mutation in found if mutation.kind == "constant"]
    chosen += rng.sample(constants, min(arguments.constants, len(constants)))
    print(
        f"{arguments.family}: {len(chosen)} mutations of {len(found)} in {len(paths)} files",
        flush=True,
    )

    started = time.monotonic()
    deadline = started + 60 * arguments.minutes
    workspaces = [
        Workspace(folder / str(index), arguments.family, units) for index in range(arguments.jobs)
    ]
    if workspaces[0].test(600) != 0:
        sys.exit(f"mutate: tests/{arguments.family} -k simt must pass before anything is changed")
    seconds = 30 + 5 * (time.monotonic() - started)

    pending: queue.SimpleQueue[Mutation] = queue.SimpleQueue()
    for mutation in chosen:
        pending.put(mutation)
    verdicts: list[tuple[Mutation, str]] = []

    def work(workspace: Workspace) -> None:
        while time.monotonic() < deadline:
            try:
                mutation = pending.get_nowait()
            except queue.Empty:
                return
            verdict = workspace.judge(mutation, seconds)
            verdicts.append((mutation, verdict))
            print(f"[{len(verdicts)}/{len(chosen)}] {mutation}: {verdict}", flush=True)

    threads = [threading.Thread(target=work, args=(workspace,)) for workspace in workspaces]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    survivors = [mutation for mutation, verdict in verdicts if verdict == "SURVIVED"]
    print(f"\nsurvivors ({len(survivors)}):")
    for mutation in survivors:
        print(f"  {mutation}")
    for kind in ("synchronisation", "constant"):
        counts = Counter(verdict for mutation, verdict in verdicts if mutation.kind == kind)
        summary = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
        print(f"{kind}: {summary or 'none'}")
    print(f"not reached in {arguments.minutes} minutes: {len(chosen) - len(verdicts)}")
    return int(any(mutation.kind == "synchronisation" for mutation in survivors))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("family")
    parser.add_argument("--constants", type=int, default=40, help="integer constants to shift")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--files", nargs="*", default=[], help="only these, csrc/common's too")
    with tempfile.TemporaryDirectory(prefix="warploom-mutate-") as folder:
        return mutate(parser.parse_args(), Path(folder))


if __name__ == "__main__":
    sys.exit(main())
