"""What is imported by a run, and that what is left out works where it is used after all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedra_engine.runtime import quick_imports as module
from fedra_engine.runtime.quick_imports import quick_imports

HEAVY = {
    *("peft", "bitsandbytes", "datasets", "pandas", "pyarrow", "sklearn", "scipy", "sympy", "deepspeed", "networkx"),
    *("torch._dynamo.convert_frame", "torch._inductor", "torch.distributed.tensor", "torch.onnx", "torchvision"),
    *("transformers.trainer", "transformers.generation.utils", "wandb", "mlflow", "torch.utils.tensorboard"),
}
"""Modules that take long to import, and that a run of the embedded experiment has no use for."""

RUN = """
import json, sys
from fedra_engine.commands.simulate import main
main(sys.argv[1:])
print(json.dumps(sorted(sys.modules)))
"""

USE = """
import json, sys
from types import ModuleType
from fedra_engine.runtime.quick_imports import quick_imports

with quick_imports():
    import torch
    from transformers import ViTConfig, ViTForImageClassification

def is_loaded():
    return "torch._dynamo.convert_frame" in sys.modules

compiling, graphs = [], []

@torch.compiler.disable(recursive=False)
def apart(x):
    compiling.append(torch.compiler.is_compiling())
    return x + 1

@torch.compiler.allow_in_graph
def kept(x):
    return x * 3

@torch._dynamo.assume_constant_result
def three():
    return 3

def function(x):
    return apart(kept(x) - three()) * 2

def keep_graph(graph, inputs):
    graphs.append([getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes])
    return graph.forward

x = torch.arange(4.0)
model = ViTForImageClassification(ViTConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
)).eval()
images = torch.rand(2, 3, 8, 8)
found = {"plain": function(x).tolist(), "loaded before": is_loaded() or "sympy" in sys.modules}
with torch.no_grad():
    expected = model(images).logits
    found["compiled"] = torch.compile(function, backend=keep_graph)(x).tolist()
    same = torch.compile(model, backend="eager")(images).logits
found |= {"loaded after": is_loaded(), "graphs": graphs, "compiling": compiling}
found["same logits"] = torch.allclose(same, expected, atol=1e-6)
names = "torch._dynamo", "torch.fx.experimental.symbolic_shapes"
found["types"] = [type(sys.modules[name]) is ModuleType for name in names]

import scipy.optimize
from torch.distributed.tensor import DTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
found["others"] = torch.distributed.is_available() and scipy.optimize.linear_sum_assignment is not None
print(json.dumps(found))
"""


def last_line(code: str, *arguments: str) -> Any:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_imports_nothing_heavy_that_it_does_not_use(tmp_path: Path) -> None:
    imported = set(last_line(RUN, "--rounds", "1", "--output_dir", str(tmp_path)))
    assert imported >= {"torch", "transformers.modeling_utils"}
    assert imported & HEAVY == set()


def test_what_is_left_out_works_once_it_is_used() -> None:
    found = last_line(USE)
    assert found["plain"] == found["compiled"] == [-4.0, 2.0, 8.0, 14.0]
    assert (found["loaded before"], found["loaded after"]) == (False, True)
    # Without the decorators there would be one graph, without `kept` by name.
    assert len(found["graphs"]) == 2
    assert "kept" in found["graphs"][0]
    assert found["compiling"] == [False, False]
    assert found["same logits"]
    assert found["types"] == [True, True]
    assert found["others"]


@pytest.mark.parametrize("variable", [("WORLD_SIZE", "2"), ("ACCELERATE_USE_DEEPSPEED", "true")])
def test_processes_of_a_job_import_everything(variable: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*variable)
    for name in ("import_compiler_late", "_leave_out_of_transformers"):
        monkeypatch.setattr(module, name, lambda: pytest.fail("left out"))
    with quick_imports():
        pass
