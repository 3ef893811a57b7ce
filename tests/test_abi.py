"""What the binary uses of torch: its stable interface; its table of kernels; AVX-512 kept apart."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import warploom._C


def undefined_symbols() -> str:
    listing = subprocess.run(
        ["nm", "-DC", "--undefined-only", str(Path(warploom._C.__file__))],
        capture_output=True,
        text=True,
        check=True,
    )
    return listing.stdout


def test_no_unstable_torch_symbol():
    assert not re.findall(r" (?:at|c10|torch|caffe2)::.*", undefined_symbols())


def test_only_stable_interfaces_of_torch_and_python_are_bound():
    symbols = re.findall(r" [UwW] (\S+)", undefined_symbols())
    torch_symbols = {name for name in symbols if "torch" in name}
    assert torch_symbols, "the binary binds torch through its C interface"
    assert all(name.startswith(("aoti_torch_", "torch_")) for name in torch_symbols), torch_symbols
    python_symbols = {name for name in symbols if name.startswith(("Py", "_Py"))}
    assert python_symbols <= {
        "PyBool_FromLong",
        "PyModule_Create2",
        "PyObject_SetAttrString",
        "Py_DecRef",
        "_Py_Dealloc",
    }, python_symbols


def test_kernel_table_lists_every_unit_without_spills():
    table = json.loads(torch.ops.warploom.kernel_table())
    assert bool(table) == warploom._C.has_cuda
    for kernel in table:
        assert kernel["spill_bytes"] == 0, kernel
        assert 0 < kernel["registers"] <= 255, kernel
    families = {kernel["name"].split("::")[0] for kernel in table}
    units = (Path(__file__).parents[1] / "csrc").glob("*/*.cu")
    assert not table or families == {unit.parent.name for unit in units}


def test_units_of_an_instruction_set_share_no_function():
    """The linker keeps one of two inline functions of one name: AVX-512's could run without AVX-512."""
    objects = sorted((Path(__file__).parent.parent / "build").rglob("*_cpu_v4*.o"))
    if not objects:
        pytest.skip("no object files: the extension was built elsewhere")
    listing = subprocess.run(
        ["nm", "-AC", "--defined-only", *map(str, objects)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    shared = re.findall(r".* [WVu] (?!DW\.ref).*", listing)
    assert not [line for line in shared if "::v4" not in line]
