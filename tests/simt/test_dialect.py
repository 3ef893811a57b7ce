"""The two sides of the dialect have the same names, and every name is documented and tested."""

from __future__ import annotations

import re

import pytest

from tests.simt.executor import ROOT

PTX = ROOT / "csrc/device/ptx"
SIMT = ROOT / "csrc/device/simt"
INTERNAL = re.compile(r"namespace (detail|simt) \{.*?\n\}  // namespace \1", re.DOTALL)
FUNCTION = re.compile(
    r"^WARPLOOM_DEVICE [\w:&<> ]+?(\w+)\(|^(?:inline )?void (launch)\(", re.MULTILINE
)
MACRO = re.compile(r"^#define (WARPLOOM_\w+)", re.MULTILINE)


def names(folder_pattern: str) -> set[str]:
    """The public functions and macros that the headers declare."""
    found: set[str] = set()
    for path in ROOT.glob(folder_pattern):
        text = INTERNAL.sub("", path.read_text())
        found |= {first or second for first, second in FUNCTION.findall(text)}
        found |= set(MACRO.findall(text))
    return found


ON_THE_GPU = names("csrc/device/ptx/*.cuh")
ON_THE_HOST = names("csrc/device/simt/types.h") | names("csrc/device/simt/dialect*.h")


def test_both_sides_declare_the_same_names() -> None:
    assert len(ON_THE_GPU) > 40
    assert ON_THE_GPU == ON_THE_HOST


@pytest.mark.parametrize("name", sorted(ON_THE_GPU))
def test_name_is_documented_and_has_a_conformance_kernel(name: str) -> None:
    document = (ROOT / "docs/dialect.md").read_text()
    assert name in document or re.sub(r"^load_matrix", "", name) in document
    kernels = "".join(path.read_text() for path in (ROOT / "tests/device").glob("*.cu*"))
    if not name.startswith("WARPLOOM_") and name != "bit_cast":
        assert re.search(rf"\b{name}\b", kernels)


def test_every_wrapper_names_its_ptx_isa_section() -> None:
    for path in PTX.glob("*.cuh"):
        lines = path.read_text().split("\n")
        for number, line in enumerate(lines):
            if re.search(r"\basm\b", line):
                before = "\n".join(lines[:number])
                section = before.rfind("// PTX ISA, ")
                function = before.rfind("WARPLOOM_DEVICE")
                previous_end = before.rfind("\n}\n", 0, function)
                assert section > previous_end, f"{path.name}:{number + 1}"
