"""The rules of the architecture (docs/architecture.md), read off the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "warploom"
CSRC = ROOT / "csrc"
#: In the order of the design: a family may use those before it.
FAMILIES = [
    "norm", "rope", "activation", "grouped_linear", "attention", "mla", "lora", "vocab", "coupling", "spp",
]  # fmt: skip
#: Who may import whom, lowest first.
LAYERS = {
    "reference": 0, "triton_kernels": 0, "_C": 0, "env": 0,
    "_backends": 1, "_sharding": 1, "_library": 2, "ops": 3, "nn": 4, "models": 5, "integrations": 5,
    "convert": 6, "lora": 6, "recipes": 7, "demo": 8, "cli": 9,
}  # fmt: skip


def tracked(pattern: str) -> list[Path]:
    """Files that git knows or would add; every file where there is no git (an sdist)."""
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", pattern],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        return sorted(ROOT.glob(pattern))
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


PYTHON_FILES = [path for path in PACKAGE.rglob("*.py") if "triton_kernels" not in path.parts]


def test_imports_run_one_way():
    for path in PYTHON_FILES:
        layer = layer_of(path)
        if layer not in LAYERS:
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "warploom" and len(parts) > 1 and parts[1] in LAYERS:
                assert LAYERS[parts[1]] <= LAYERS[layer], f"{path}: {layer} imports {name}"


def test_the_reference_imports_only_torch():
    for path in (PACKAGE / "reference").glob("*.py"):
        foreign = {
            name
            for name in imports(path)
            if name.split(".")[0] not in ("torch", *sys.stdlib_module_names)
        }
        assert all(name.startswith("warploom.reference") for name in foreign), (path, foreign)


def test_no_family_is_shadowed_by_a_function():
    for init in ("ops", "reference", "nn"):
        text = (PACKAGE / init / "__init__.py").read_text()
        for family in FAMILIES:
            assert not re.search(rf"^from \S+ import .*\b{family}\b", text, re.M), (init, family)


def test_only_env_reads_the_environment():
    for path in PYTHON_FILES:
        if path.name != "env.py":
            assert not re.search(r"os\.(environ|getenv)", path.read_text()), path


def test_environment_variables_are_documented():
    page = (ROOT / "docs" / "environment.md").read_text()
    sources = (PACKAGE / "env.py").read_text() + (ROOT / "setup.py").read_text()
    for name in set(re.findall(r'environ(?:\.get\(|\[)"(\w+)"', sources)) - {"PATH"}:
        assert f"`{name}`" in page, name


def test_triton_kernels_has_no_package_root():
    assert not (ROOT / "triton_kernels" / "__init__.py").exists()
    assert (PACKAGE / "triton_kernels").resolve() == ROOT / "triton_kernels"


def test_triton_products_go_through_numerics():
    for path in (ROOT / "triton_kernels").rglob("*.py"):
        if path.name != "numerics.py":
            assert not re.search(r"\btl\.dot\b", path.read_text()), path


def test_torch_is_seen_by_the_seam_alone():
    for path in CSRC.rglob("*"):
        if path.suffix not in (".h", ".cuh", ".cu", ".cpp", ".c"):
            continue
        allowed = path.name.endswith("_ops.cpp") or path.name in (
            "torch.h",
            "checks.h",
            "parallel.cpp",
        )
        if not allowed:
            assert not re.search(r"#include [<\"](torch|ATen|c10)/", path.read_text()), path


def test_inline_assembly_lives_in_ptx_and_the_fibre():
    for path in CSRC.rglob("*"):
        if path.is_file() and re.search(r"\basm\b\s*(volatile)?\s*\(", path.read_text()):
            assert path.parent.name == "ptx" or path.stem == "fibre", path


def test_kernel_files_keep_to_the_dialect():
    for path in [*CSRC.glob("*/*.cu"), *CSRC.glob("*/*.cuh")]:
        if path.parent.name in ("device", "common"):
            continue
        text = path.read_text()
        for banned in (
            "<<<",
            "extern __shared__",
            "__CUDA_ARCH__",
            "__activemask",
            "__syncthreads",
        ):
            assert banned not in text, f"{path}: {banned}"
        for header in re.findall(r'#include "([^"]+)"', text):
            if "/" not in header:
                continue  # a neighbour of its own family
            family = header.split("/")[0]
            known = header == "device/device.cuh" or family in ("common", *FAMILIES)
            assert known, f"{path} includes {header}"
            if family in FAMILIES:
                own = path.parent.name
                assert FAMILIES.index(family) <= FAMILIES.index(own), f"{path} includes {header}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_one_name_in_every_tree(family):
    for path in (
        CSRC / family / f"{family}_ops.cpp",
        ROOT / "triton_kernels" / family,
        PACKAGE / "reference" / f"{family}.py",
        PACKAGE / "ops" / f"{family}.py",
        PACKAGE / "nn" / f"{family}.py",
        ROOT / "tests" / family,
        ROOT / "docs" / "kernels" / f"{family}.md",
    ):
        assert path.exists(), path


def test_files_stay_short():
    limits = {".cu": 400, ".cuh": 400, ".py": 400}
    for suffix, limit in limits.items():
        for path in [*CSRC.rglob(f"*{suffix}"), *(ROOT / "triton_kernels").rglob(f"*{suffix}")]:
            assert len(path.read_text().splitlines()) <= limit, path
    for path in (PACKAGE / "models").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 320, path


def test_nothing_is_left_open():
    for path in [*CSRC.rglob("*"), *(ROOT / "triton_kernels").rglob("*.py"), *PYTHON_FILES]:
        if path.is_file() and path.suffix in (".h", ".cuh", ".cu", ".cpp", ".c", ".py"):
            found = re.search(r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError", path.read_text())
            assert not found, f"{path}: {found}"


def test_constraints_leave_torch_and_triton_alone():
    names = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    assert names and not {"torch", "triton"} & {name.lower() for name in names}
