"""Builds the native modules: one ninja file, one binary for every supported torch and Python.

Modules
    warploom._C                         what users run: the seam, the CPU kernels, the CUDA kernels where
                                        nvcc is found
    warploom._simt, _simt_instrumented  the CUDA kernels compiled for the host executor; in-place builds only

Environment (docs/environment.md): WARPLOOM_CUDA=auto|0|1, WARPLOOM_SIMT=auto|0|1, TORCH_CUDA_ARCH_LIST,
MAX_JOBS, CUDA_HOME, CXX, CC.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

#: The oldest torch that the binary runs on, 2.11: its stable interface is all that is used.
TORCH_TARGET = "0x020b000000000000"
#: sm_80 machine code and PTX, which every later chip can run, and machine code for Hopper.
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0a"

#: The instruction sets of CPU units (csrc/common/cpu.h) on x86; v3 stands for any other machine's only one.
CPU_ISAS = {
    "v3": "-march=x86-64-v3",
    "v4": "-march=x86-64-v4 -mprefer-vector-width=512",
    "v4_bf16": "-march=x86-64-v4 -mprefer-vector-width=512 -mavx512bf16",
}
#: The CPU units that are compiled with v4_bf16, too: those that declare WARPLOOM_DECLARE_CPU_BF16.
BF16_UNITS = (
    "attention_cpu",
    "attention_backward_cpu",
    "attention_decode_cpu",
    "mla_absorbed_backward_cpu",
    "mla_decode_cpu",
)


def fail(message: str) -> None:
    sys.exit(f"warploom: {message}")


def check_platform() -> None:
    if not sys.platform.startswith("linux"):
        fail(f"supported on Linux only, not on {sys.platform}")
    link = ROOT / "python" / "warploom" / "triton_kernels"
    if not link.is_dir():
        fail(
            f"{link} must be a symbolic link to ../../triton_kernels: check it out with symlinks on"
        )


def package_dir(name: str) -> Path | None:
    """Where an importable package lies, without importing it (torch takes seconds)."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def find_cuda_home() -> Path | None:
    """The CUDA toolkit's root: CUDA_HOME, CUDA_PATH, or what nvcc itself says (it may be a wrapper)."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if value := os.environ.get(variable):
            return Path(value)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        default = Path("/usr/local/cuda")
        return default if (default / "bin" / "nvcc").exists() else None
    dry = subprocess.run(
        [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"TOP=(\S+)", dry.stderr)
    return Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parent.parent


def cuda_headers(cuda_home: Path | None) -> Path | None:
    """cuda_bf16.h and its like for the host executor: the toolkit's, or the nvidia wheels'."""
    candidates = [cuda_home / "include"] if cuda_home else []
    if (nvidia := package_dir("nvidia")) is not None:
        candidates += sorted(nvidia.glob("cu*/include")) + sorted(nvidia.glob("*/include"))
    return next((path for path in candidates if (path / "cuda_bf16.h").exists()), None)


def architecture_flags(text: str) -> list[str]:
    """nvcc's -gencode flags from TORCH_CUDA_ARCH_LIST's grammar: '8.0;9.0a;8.6+PTX'."""
    flags = []
    for entry in re.split(r"[;\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            fail(
                f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 8.6+PTX, got {entry!r}"
            )
        assert match is not None
        number = match[1] + match[2] + match[3]
        codes = [f"sm_{number}", *([f"compute_{number}"] if match[4] else [])]
        flags.append(f"-gencode=arch=compute_{number},code=[{','.join(codes)}]")
    return flags


def switch(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        fail(f"{name}: expected auto, 0 or 1, got {value!r}")
    return value


def job_count() -> int:
    """MAX_JOBS, else the cores, as long as each job has 1 GiB (a kernel unit takes 0.2 to 0.5)."""
    if value := os.environ.get("MAX_JOBS"):
        return max(1, int(value))
    memory = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    gibibytes = int(memory[1]) // 2**20 if memory else 4
    return max(1, min(len(os.sched_getaffinity(0)), gibibytes))


class NinjaFile:
    """Collects rules and edges; paths are written as they are."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.5"]

    def rule(self, name: str, command: str, depfile: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def edge(self, rule: str, output: Path, inputs: list[Path], implicit: list[Path] = []) -> Path:  # noqa: B006
        after = f" | {' '.join(map(str, implicit))}" if implicit else ""
        self.lines.append(f"build {output}: {rule} {' '.join(map(str, inputs))}{after}")
        return output

    def write(self, path: Path) -> None:
        text = "\n".join(self.lines) + "\n"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


class BuildNative(build_ext):
    """Writes build/native/build.ninja and runs it; the objects stay there, so builds are incremental."""

    def run(self) -> None:
        # An editable install wants the modules in the source tree, as --inplace does.
        self.inplace = self.inplace or self.editable_mode
        work = ROOT / "build" / "native"
        work.mkdir(parents=True, exist_ok=True)
        modules = self.plan(work)
        ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if ninja is None:
            fail("ninja was not found: pip install ninja")
        if subprocess.run([str(ninja), "-C", str(work), f"-j{job_count()}"]).returncode:
            fail("the build failed: the first error above says where")
        for built, target in modules:
            target.parent.mkdir(parents=True, exist_ok=True)
            # A new file beside the old one and a rename: a running process keeps the old mapping.
            scratch = target.with_suffix(".new")
            shutil.copy2(built, scratch)
            scratch.replace(target)

    def plan(self, work: Path) -> list[tuple[Path, Path]]:
        """Write the ninja file; return (built module, where it is to be copied)."""
        torch = package_dir("torch")
        if torch is None:
            fail(
                "torch is needed to build: pip install 'torch>=2.11,<2.16', then use --no-build-isolation"
            )
            raise AssertionError
        cuda_home = find_cuda_home() if switch("WARPLOOM_CUDA") != "0" else None
        if switch("WARPLOOM_CUDA") == "1" and cuda_home is None:
            fail("WARPLOOM_CUDA=1, but nvcc was not found: set CUDA_HOME")
        headers = cuda_headers(cuda_home or find_cuda_home())
        pybind11 = package_dir("pybind11")
        simt = self.inplace and switch("WARPLOOM_SIMT") != "0"
        if switch("WARPLOOM_SIMT") == "1" and (headers is None or pybind11 is None):
            fail("WARPLOOM_SIMT=1 needs CUDA's headers and pybind11: pip install 'warploom[simt]'")
        simt = simt and headers is not None and pybind11 is not None

        ninja = NinjaFile()
        self.declare_rules(ninja, torch, cuda_home, headers, pybind11)
        package = (
            ROOT / "python" / "warploom" if self.inplace else Path(self.build_lib) / "warploom"
        )
        modules = [(self.plan_extension(ninja, work, cuda_home), package / "_C.abi3.so")]
        if simt:
            suffix = sysconfig.get_config_var("EXT_SUFFIX")
            executor = self.plan_executor(ninja, work)
            for name in ("_simt", "_simt_instrumented"):
                module = self.plan_simt(ninja, work, name, executor)
                modules.append((module, package / f"{name}{suffix}"))
        ninja.write(work / "build.ninja")
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
        print(
            f"warploom: torch >= 2.11 (headers: {torch.name}), "
            f"CUDA {cuda_home if cuda_home else 'off'}, architectures "
            f"{architectures if cuda_home else 'none'}, host executor {'on' if simt else 'off'}, "
            f"{job_count()} jobs",
            flush=True,
        )
        return modules

    def declare_rules(
        self,
        ninja: NinjaFile,
        torch: Path,
        cuda_home: Path | None,
        headers: Path | None,
        pybind11: Path | None,
    ) -> None:
        cxx, cc = os.environ.get("CXX", "g++"), os.environ.get("CC", "gcc")
        python = sysconfig.get_path("include")
        depends = "-MMD -MF $out.d"
        cuda = "-DWARPLOOM_WITH_CUDA" if cuda_home else ""
        # Paths in messages and in the binary start at the checkout, wherever that is.
        common = f"-fPIC -fvisibility=hidden -g0 -ffile-prefix-map={ROOT}/= -I{CSRC}"
        warnings = "-Wall -Wextra -Wno-unknown-pragmas"
        cxx_base = f"{cxx} -std=c++20 {common} {warnings} {depends}"
        seam = f"-DTORCH_TARGET_VERSION={TORCH_TARGET} -isystem {torch}/include"
        ninja.rule("module", f"{cc} -O2 {common} {cuda} {depends} -I{python} -c $in -o $out", True)
        ninja.rule("seam", f"{cxx_base} -O2 {seam} {cuda} -c $in -o $out", True)
        vector = "-O3 -fopenmp-simd -fno-math-errno -fno-trapping-math"
        on_x86 = platform.machine() == "x86_64"
        for isa, march in (CPU_ISAS if on_x86 else {"v3": "-DWARPLOOM_CPU_SINGLE"}).items():
            ninja.rule(
                f"cpu_{isa}",
                f"{cxx_base} {vector} {march} -DWARPLOOM_CPU_ISA={isa} -c $in -o $out",
                True,
            )
        libraries = f"-L{torch}/lib -Wl,--no-as-needed -ltorch -Wl,--as-needed -ltorch_cpu -lc10"
        cudart = ""
        if cuda_home:
            library = next(
                cuda_home / lib for lib in ("lib64", "lib") if (cuda_home / lib).is_dir()
            )
            cudart = f"-L{library} -lcudart_static -lrt -lpthread -ldl"
            architectures = architecture_flags(
                os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
            )
            nvcc = f"{cuda_home}/bin/nvcc -std=c++20 -O3 --expt-relaxed-constexpr -ccbin {cxx}"
            options = (
                "-lineinfo -Xcompiler=-fPIC,-fvisibility=hidden -Xptxas=-v --compress-mode=size"
            )
            hopper = "-gencode=arch=compute_90a,code=sm_90a"
            for rule, gencode in (("nvcc", " ".join(architectures)), ("nvcc_sm90", hopper)):
                # ptxas reports registers and spills on stderr: the kernel table is made from it.
                command = f"{nvcc} {options} {gencode} -I{CSRC} -MD -MF $out.d -c $in -o $out"
                ninja.rule(rule, f"{command} 2> $out.log || (cat $out.log >&2; false)", True)
        table = ROOT / "tools" / "kernel_table.py"
        ninja.rule("kernel_table", f"{sys.executable} {table} --output $out $in")
        ninja.rule("link", f"{cxx} -shared $in -o $out {libraries} {cudart} -s")
        ninja.rule("link_simt", f"{cxx} -shared $in -o $out {libraries}")
        executor_base = (
            f"{cxx_base.replace('-g0 ', '')} -DWARPLOOM_SIMT -isystem {headers} "
            f"-isystem {pybind11}/include -I{python}"
        )
        ninja.rule("executor", f"{executor_base} -O2 -c $in -o $out", True)
        for name, define, kernel in (
            ("_simt", "", "-O2 -g1 -gdwarf-4"),
            (
                "_simt_instrumented",
                "-DWARPLOOM_SIMT_INSTRUMENTED",
                "-O1 -g1 -gdwarf-4 -fsanitize=thread",
            ),
        ):
            base = f"{executor_base} {define} -DWARPLOOM_SIMT_MODULE={name}"
            ninja.rule(f"seam{name}", f"{base} -O2 {seam} -c $in -o $out", True)
            ninja.rule(f"kernel{name}", f"{base} {kernel} -x c++ -c $in -o $out", True)

    def plan_extension(self, ninja: NinjaFile, work: Path, cuda_home: Path | None) -> Path:
        """_C: every seam, every CPU unit once per instruction set, every kernel unit."""
        out = work / "_C"
        objects = [
            ninja.edge("module", out / "module.o", [CSRC / "module.c"]),
            ninja.edge("seam", out / "parallel.o", [CSRC / "common" / "parallel.cpp"]),
            ninja.edge("seam", out / "output_pool.o", [CSRC / "common" / "output_pool.cpp"]),
        ]
        for source in sorted(CSRC.glob("*/*_ops.cpp")):
            objects.append(ninja.edge("seam", out / f"{source.stem}.o", [source]))
        on_x86 = platform.machine() == "x86_64"
        for source in sorted(CSRC.glob("*/*_cpu.cpp")):
            for isa in CPU_ISAS if on_x86 else ("v3",):
                if isa == "v4_bf16" and source.stem not in BF16_UNITS:
                    continue
                objects.append(ninja.edge(f"cpu_{isa}", out / f"{source.stem}_{isa}.o", [source]))
        logs = []
        if cuda_home:
            for source in kernel_units():
                rule = "nvcc_sm90" if source.stem.endswith("_sm90") else "nvcc"
                kernel = ninja.edge(rule, out / f"{source.stem}_cuda.o", [source])
                objects.append(kernel)
                logs.append(kernel)
        table = ninja.edge(
            "kernel_table", out / "kernel_table.cpp", logs, [ROOT / "tools" / "kernel_table.py"]
        )
        objects.append(ninja.edge("seam", out / "kernel_table.o", [table]))
        return ninja.edge("link", out / "_C.abi3.so", objects)

    def plan_executor(self, ninja: NinjaFile, work: Path) -> list[Path]:
        """The host executor, shared by both of its modules."""
        sources = sorted((CSRC / "device" / "simt").glob("*.cpp"))
        return [
            ninja.edge("executor", work / "simt" / f"{source.stem}.o", [source])
            for source in sources
            if source.stem != "bindings"
        ]

    def plan_simt(self, ninja: NinjaFile, work: Path, name: str, executor: list[Path]) -> Path:
        """The same seams and kernel units, compiled by the host's compiler onto the executor."""
        out = work / name
        # The executor comes first: of a template that several objects hold (std::string's, say) the
        # linker keeps the first copy, and the executor must not run those of instrumented kernels.
        objects = list(executor)
        for source in sorted(CSRC.glob("*/*_ops.cpp")):
            objects.append(ninja.edge(f"seam{name}", out / f"{source.stem}.o", [source]))
        for source in kernel_units():
            objects.append(ninja.edge(f"kernel{name}", out / f"{source.stem}_kernel.o", [source]))
        bindings = CSRC / "device" / "simt" / "bindings.cpp"
        objects.append(ninja.edge(f"seam{name}", out / "bindings.o", [bindings]))
        return ninja.edge("link_simt", out / f"{name}.so", objects)

    def get_outputs(self) -> list[str]:
        return [] if self.inplace else [str(Path(self.build_lib) / "warploom" / "_C.abi3.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


def kernel_units() -> list[Path]:
    return [path for path in sorted(CSRC.glob("*/*.cu")) if path.parent.name != "device"]


check_platform()
setup(
    package_dir={"": "python"},
    packages=find_namespace_packages("python", include=["warploom*"]),
    package_data={"warploom": ["py.typed", "recipes/seed_tasks.jsonl"]},
    ext_modules=[Extension("warploom._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
