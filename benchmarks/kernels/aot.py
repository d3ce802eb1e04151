"""Compile kernels for GPUs that are not there, through the real launch path, and read what they need.

Under `compile_only` every launch is compiled for the given architecture and nothing runs: registers, stack,
spills, shared memory and tensor-core instructions of each configuration can be checked on any machine.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from fedra_kernels.dispatch import StandIn, launches_taken_by


@dataclass(frozen=True)
class Architecture:
    """A column of the configuration tables and what its GPUs offer.

    shared_limit: bytes of shared memory a program may use. tensor_core: pattern of its matrix instruction.
    """

    target: GPUTarget
    shared_limit: int
    tensor_core: str


ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 166_912, r"\bHMMA\b"),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 232_448, r"\bHGMMA\b"),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), 232_448, r"\bUTC[A-Z]*MMA\b"),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 65_536, r"\bv_mfma"),
    # GPUs with little shared memory: sm_86, sm_89 and sm_120.
    "small": Architecture(GPUTarget("cuda", 89, 32), 101_376, r"\bHMMA\b"),
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs.

    registers: per thread. stack, shared: bytes. spills: instructions (sm) or registers (gfx) that spill.
    dots: matrix instructions in the program. half_dots: whether its source multiplies 16-bit blocks.
    wide_loads, wide_stores: of the bytes that the program's instructions load from and store to global memory, the
        share that moves 16 bytes an instruction (LDG.E.128, STG.E.128); TMA loads are left out.
    """

    kernel: str
    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    dots: int
    half_dots: bool
    wide_loads: float
    wide_stores: float


class _CompilingDriver:
    """Stands in for a GPU driver: the architecture's name is the device, so caches never mix."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return ARCHITECTURES[self.name].target


class Compilation(StandIn):
    """Compiles each launch.

    Attributes:
        kernels: the name and the compiled kernel of each launch.
    """

    def __init__(self, architecture: str) -> None:
        super().__init__(architecture)
        self.kernels: list[tuple[str, Any]] = []

    def take(self, kernel: Any, grid: tuple[int, ...], args: Sequence[Any], options: Mapping[str, Any]) -> None:
        """Compile the launch and keep the kernel."""
        self.kernels.append((kernel.fn.__name__, kernel.warmup(*args, grid=grid, **options)))


@contextmanager
def compile_only(name: str) -> Iterator[Compilation]:
    """Compile launches for the architecture `name` and collect the kernels; tensors stay on the CPU."""
    driver = triton.runtime.driver
    previous = driver._active
    compilation = Compilation(name)
    driver.set_active(_CompilingDriver(name))
    try:
        with launches_taken_by(compilation):
            yield compilation
    finally:
        driver.set_active(previous)


def build_launcher(compiled: Any) -> None:
    """Build the host code that launches a kernel, into Triton's cache on disk, where Triton has it built by gcc.

    Triton 3.6 does for every signature, at the first launch; later versions have one launcher for all. For NVIDIA's
    GPUs and on a machine that has libcuda.so.1.
    """
    make_launcher = getattr(nvidia, "make_launcher", None)
    if make_launcher is None:
        return
    tensor_maps = getattr(compiled.metadata, "tensordesc_meta", None)
    nvidia.compile_module_from_src(
        src=make_launcher(compiled.src.constants, dict(enumerate(compiled.src.signature.values())), tensor_maps),
        name="__triton_launcher",
        library_dirs=nvidia.library_dirs(),
        include_dirs=nvidia.include_dirs,
        libraries=nvidia.libraries,
    )


def resources(name: str, kernel: str, compiled: Any) -> Resources:
    """Read a compiled kernel's needs from its binary."""
    architecture = ARCHITECTURES[name]
    half_dots = re.search(r"tt\.dot\b.*xb?f16>", compiled.asm["ttir"]) is not None
    if architecture.target.backend == "hip":
        registers, stack, spills, program = _amd(compiled)
        loads, stores = (_amd_widths(program, access) for access in ("load", "store"))
    else:
        registers, stack, spills, program = _nvidia(compiled, half_dots)
        loads, stores = _nvidia_widths(compiled.asm["ptx"], "ld"), _nvidia_widths(compiled.asm["ptx"], "st")
    dots = len(re.findall(architecture.tensor_core, program))
    metadata = compiled.metadata
    return Resources(
        kernel, metadata.num_warps, registers, stack, spills, metadata.shared, dots, half_dots,
        _wide_share(loads), _wide_share(stores),
    )  # fmt: skip


def _nvidia(compiled: Any, half_dots: bool) -> tuple[int, int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump: found no register count in {usage!r}")
        registers, stack, local = (int(figure) for figure in found.groups())
        # Half a second each: without local memory nothing spills, and only products have matrix instructions.
        program = _cuobjdump("--dump-sass", file.name) if half_dots or stack or local else ""
    return registers, stack, len(re.findall(r"\b(?:LDL|STL)\b", program)), program


def _wide_share(widths: list[int]) -> float:
    """The share of wide instructions' bytes in all bytes; `widths` are the bytes of each instruction."""
    return sum(width for width in widths if width >= 16) / max(sum(widths), 1)


def _nvidia_widths(ptx: str, access: str) -> list[int]:
    """Bytes of each instruction of PTX that accesses global memory; the assembler keeps their widths."""
    plain = re.findall(rf"\b{access}\.global\b[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    widths = [int(count or 1) * int(bits) // 8 for count, bits in plain]
    if access == "ld":
        widths += [int(size, 16) for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global\b[^;]*?,\s*(0x\w+)", ptx)]
    return widths


def _amd_widths(program: str, access: str) -> list[int]:
    """Bytes of each instruction that accesses global memory."""
    kinds = re.findall(rf"\b(?:global|buffer)_{access}_(?:[us]?(byte|short)|dword(?:x(\d))?)", program)
    sizes = {"byte": 1, "short": 2, "": 4}
    return [sizes[small] * int(count or 1) for small, count in kinds]


def _amd(compiled: Any) -> tuple[int, int, int, str]:
    program = compiled.asm["amdgcn"]

    def field(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", program)
        if found is None:
            raise RuntimeError(f"amdgcn: found no .{key}")
        return int(found[1])

    return field("vgpr_count"), field("private_segment_fixed_size"), field("vgpr_spill_count"), program


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), option, path], capture_output=True, text=True, check=True).stdout
