"""The machine and the libraries of a race, for the head of its page."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

from benchmarks.peers.environments import version_of

_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16")
"""Those that decide how fast matrix products are."""
_CPU_INFO = Path("/proc/cpuinfo")


def processor() -> str:
    """Its name, as the operating system has it."""
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def instructions() -> list[str]:
    """Sets of instructions that it has, of those that matter here; empty where this is not known."""
    flags = _cpu_info().get("flags", "").split()
    return [name for name in _INSTRUCTIONS if name in flags]


def has_amx() -> bool:
    """Whether it multiplies matrices of bfloat16 by AMX."""
    return "amx_bf16" in instructions()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that contestants use."""
    ours = {name: version(name) for name in ("torch", "transformers", "peft")}
    others = {"pfl": version_of("pfl", "pfl"), "flwr": version_of("flower", "flwr"), "ray": version_of("flower", "ray")}
    return {"Python": platform.python_version()} | ours | others


def _cpu_info() -> dict[str, str]:
    """The fields of the first core."""
    if not _CPU_INFO.is_file():
        return {}
    first = _CPU_INFO.read_text(encoding="utf-8").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
