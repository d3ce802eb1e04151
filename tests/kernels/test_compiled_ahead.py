"""What is compiled ahead of time, without a GPU, is what a launch on such a GPU finds in Triton's cache on disk."""

from types import SimpleNamespace

import pytest
import torch
import triton

from benchmarks.kernels import aot, aot_cases
from benchmarks.kernels.aot import ARCHITECTURES, build_launcher, compile_only
from fedra_kernels import dispatch


class Gpu:
    """Triton's driver on a machine with a GPU, whose launches run nothing."""

    def __init__(self, architecture):
        self._target = ARCHITECTURES[architecture].target
        self.launcher_cls = lambda source, metadata: lambda *arguments: None
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": ARCHITECTURES[architecture].shared_limit},
            load_binary=lambda name, binary, shared, device: (None, None, 0, 0, 1024),
        )

    def get_current_device(self):
        return f"GPU of {self._target.arch}"

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self._target


def _case(name):
    (case,) = (case for case in aot_cases.cases() if case.name == name)
    return case


# Large matrices by tensor descriptor (TMA), and pointers alone.
@pytest.mark.parametrize("name", ["lora_linear bf16 r16 frozen A", "low_rank_add bf16 r32"])
def test_a_launch_looks_for_what_was_compiled_without_a_gpu(name, monkeypatch):
    calls, warmup = [], triton.JITFunction.warmup

    def recorded(kernel, *arguments, **options):
        calls.append((kernel, arguments, options))
        return warmup(kernel, *arguments, **options)

    monkeypatch.setattr(triton.JITFunction, "warmup", recorded)
    with compile_only("sm_90") as compilation:
        _case(name).call()
    monkeypatch.setattr(triton.runtime.driver, "_active", Gpu("sm_90"))
    assert calls
    for (kernel, arguments, options), (_, ahead) in zip(calls, compilation.kernels, strict=True):
        launched = kernel.run(*arguments, warmup=False, **options)
        assert launched is not ahead
        assert launched.hash == ahead.hash


def test_the_host_code_that_a_launch_would_build_is_built_ahead(monkeypatch):
    """One module a signature before Triton 3.7, none since."""
    built = []

    def build(**options):
        built.append(options)
        return SimpleNamespace(launch=None)

    monkeypatch.setattr(aot.nvidia, "compile_module_from_src", build)
    monkeypatch.setattr(aot.nvidia, "libcuda_dirs", lambda: [])
    with compile_only("sm_90") as compilation:
        _case("low_rank_add bf16 r32").call()
    (_, compiled), *_ = compilation.kernels
    build_launcher(compiled)
    ahead, built[:] = list(built), []
    if hasattr(aot.nvidia, "make_launcher"):
        aot.nvidia.CudaLauncher(compiled.src, compiled.metadata)
    assert ahead == built


@pytest.fixture(name="allow_tf32", params=[False, True])
def _allow_tf32(request):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = before


def test_the_precision_of_products_is_the_gpus(allow_tf32):
    single, half = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert dispatch.dot_precision(single) == dispatch.dot_precision(half) == "ieee"
    with compile_only("sm_90"):
        assert dispatch.dot_precision(single) == ("tf32" if allow_tf32 else "ieee")
        assert dispatch.dot_precision(half) == "ieee"
