from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from fedra_engine.config import LoraConfig
from fedra_engine.execution.evaluation import Evaluator, accuracies
from fedra_engine.execution.plan import plan_groups
from fedra_engine.execution.sweep_block import BankFactors
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.models.adapters import AdapterLayout, Target, initial_adapters
from fedra_engine.models.foundation import make_foundation
from fedra_engine.models.state import EvaluatedModel, GlobalState
from fedra_engine.models.structure import find_block_path, is_linear, is_target, matching_pattern
from fedra_engine.runtime.errors import InputError
from tests.tiny import CLASSES, CLASSIFIERS, DEPTH, TARGETS, make_model, make_samples, make_tiny

HEADS = {"roberta": "classifier.out_proj", "timm_vit": "head", "timm_mixer": "head"} | dict.fromkeys(
    ["gpt2", "llama", "qwen2", "qwen3", "gemma3"], "score"
)
CPU = torch.device("cpu")


def lora(family: str) -> LoraConfig:
    return LoraConfig(rank=3, target_modules=TARGETS[family])


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_blocks_and_classifier_are_found_and_frozen(family: str) -> None:
    foundation = make_tiny(family, lora(family))
    assert foundation.depth == DEPTH
    assert foundation.head_path == HEADS.get(family, "classifier")
    assert not any(parameter.requires_grad for parameter in foundation.model.parameters())


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_with_zero_b_and_all_blocks_held_logits_are_those_of_the_untouched_model(family: str) -> None:
    foundation, samples, rows = make_tiny(family, lora(family)), make_samples(family, 6), torch.arange(6)
    inputs = samples.inputs(rows, CPU, foundation.dtype)
    model = make_model(family, torch.float64).eval()
    with torch.no_grad():
        untouched = model(**inputs).logits
    sweep = SweepModel(foundation, lambda n: samples.inputs(torch.arange(n), CPU, foundation.dtype))
    adapters = initial_adapters(foundation.adapter_layout, DEPTH, seed=0, dtype=torch.float64)
    plan = plan_groups(foundation, [6], np.arange(DEPTH)[None])
    with torch.no_grad():
        logits = foundation.head(sweep.features(inputs, plan, BankFactors(foundation.adapter_layout, adapters)))
        again = foundation.model(**inputs).logits
    torch.testing.assert_close(logits, untouched, rtol=1e-12, atol=1e-12)
    # Building the sweep left the foundation itself as it was.
    torch.testing.assert_close(again, untouched, rtol=1e-12, atol=1e-12)


def test_accuracy_is_counted_per_domain() -> None:
    foundation, samples = make_tiny("vit", lora("vit")), make_samples("vit", 40)
    samples.domains[15:] = 1
    with torch.no_grad():
        predictions = foundation.model(**samples.inputs(torch.arange(40), CPU, torch.float64)).logits.argmax(1)
    right = (predictions == samples.labels).double()
    sweep = SweepModel(foundation, lambda n: samples.inputs(torch.arange(n), CPU, foundation.dtype))
    state = GlobalState(
        initial_adapters(foundation.adapter_layout, DEPTH, seed=0, dtype=torch.float64), foundation.initial_heads()
    )
    evaluator = Evaluator(foundation, sweep, samples, ["photo", "sketch"])
    accuracy = accuracies(evaluator.scores(state, EvaluatedModel(np.arange(DEPTH))))
    assert accuracy == pytest.approx({"photo": float(right[:15].mean()), "sketch": float(right[15:].mean())})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_predictions_that_are_not_finite_count_as_wrong_and_are_reported(
    value: float, caplog: pytest.LogCaptureFixture
) -> None:
    foundation, samples = make_tiny("vit", lora("vit")), make_samples("vit", 6)
    sweep = SweepModel(foundation, lambda n: samples.inputs(torch.arange(n), CPU, foundation.dtype))
    samples.domains[3:] = 1
    samples.tensors["pixel_values"][3:5] = value
    # Everything is of the class that argmax names where all is NaN, and is predicted as that.
    samples.labels[:] = 0
    heads = foundation.initial_heads()
    foundation.head_layout.bias(heads)[:, 0] = 100
    state = GlobalState(initial_adapters(foundation.adapter_layout, DEPTH, seed=0, dtype=torch.float64), heads)
    evaluator = Evaluator(foundation, sweep, samples, ["photo", "sketch"])
    everything = EvaluatedModel(np.arange(DEPTH))
    wanted = {"photo": 1.0, "sketch": pytest.approx(1 / 3)}
    assert accuracies(evaluator.scores(state, everything)) == wanted
    assert accuracies(evaluator.personal_scores({0: [state], 1: [state]}, ["a", "b"], state, everything)) == wanted
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        "sketch: 2 of 3 predictions count as wrong"
    ] * 2


def test_target_modules_follow_peft_rules() -> None:
    assert [t.path for t in make_tiny("bert", LoraConfig(target_modules=["output.dense"])).adapter_layout.targets] == [
        "attention.output.dense",
        "output.dense",
    ]
    by_pattern = make_tiny("vit", LoraConfig(target_modules=r".*\.fc[12]"))
    assert [target.path for target in by_pattern.adapter_layout.targets] == ["mlp.fc1", "mlp.fc2"]


@pytest.mark.parametrize("path", ["fc1", "mlp.fc1", "attention.q_proj", "mlp.xfc1", "a.mlp.fc1.b"])
def test_paths_are_matched_as_peft_matches_them(path: str) -> None:
    for targets in (["fc1"], ["mlp.fc1"], ["q_proj", "mlp"], "fc1", r".*\.fc[12]", r"mlp\.fc1", "q_proj|fc1"):
        settings = PeftLoraConfig(target_modules=targets)
        assert is_target(path, targets) == bool(check_target_module_exists(settings, path)), targets
    for patterns in (["fc1"], ["q_proj", "fc1"], [r"mlp\.fc\d", "fc1"], ["fc"], ["^fc1"], ["x?fc1|b"]):
        assert (matching_pattern(patterns, path) or path) == get_pattern_key(patterns, path), patterns


@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_all_linear_layers_of_a_block_can_be_targets(family: str) -> None:
    foundation = make_tiny(family, LoraConfig(target_modules="all-linear"))
    linears = {name for name, module in foundation.blocks[0].named_modules() if is_linear(module)}
    assert {target.path for target in foundation.adapter_layout.targets} == linears
    assert len(linears) == {"vit": 6, "gpt2": 4}[family]


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["fc2", "qkv"], "found 'qkv', which matches nothing"), (["mlp"], "expected Linear layers")],
)
def test_unfit_target_modules_are_refused(targets: list[str], message: str) -> None:
    with pytest.raises(InputError, match=rf"lora\.target_modules: .*{message}"):
        make_tiny("vit", LoraConfig(target_modules=targets))


RULES = [
    {"rank_pattern": {"q_proj": 2, "fc1": 5}},
    {"alpha_pattern": {r".*fc\d": 7.0}, "use_rslora": True},
    {"rank_pattern": {"attention.k_proj": 1, "k_proj": 6}, "alpha_pattern": {"k_proj": 0.5}},
]


@pytest.mark.parametrize("rules", RULES)
def test_ranks_and_scales_follow_peft_rules(rules: dict[str, Any]) -> None:
    settings = {"target_modules": ["q_proj", "k_proj", "fc1"], **rules}
    foundation = make_tiny("vit", LoraConfig(rank=4, alpha=6, **settings))
    model: Any = inject_adapter_in_model(PeftLoraConfig(r=4, lora_alpha=6, **settings), make_model("vit"))
    for target in foundation.adapter_layout.targets:
        layer = model.get_submodule(f"{foundation.block_path}.1.{target.path}")
        assert (target.rank, target.scale) == (layer.r["default"], pytest.approx(layer.scaling["default"]))


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"^lora\.{name}: found 'value', which matches no adapter target, expected"):
        make_tiny("vit", LoraConfig(target_modules=["q_proj", "k_proj"], **{name: {"q_proj": 2, "value": 2}}))


def test_a_model_without_blocks_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, CLASSES))
    with pytest.raises(InputError, match=r"no list of blocks"):
        make_foundation(model, LoraConfig(), classes=CLASSES)


def test_an_unknown_block_path_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"model\.block_path: found 'encoder', expected one of \['vit\.layers'\]"):
        make_foundation(make_model("vit"), lora("vit"), classes=CLASSES, block_path="encoder")


def test_a_given_block_path_is_taken() -> None:
    lists = {f"of {n}": nn.Sequential(*(nn.Sequential(nn.Linear(n, n)) for _ in range(2))) for n in (2, 9)}
    model = nn.ModuleDict(lists)
    assert find_block_path(model, None) == "of 9"
    assert find_block_path(model, "of 2") == "of 2"


def test_adapter_views_do_not_overlap_and_cover_the_slot() -> None:
    layout = AdapterLayout((Target("q", 3, 4, 2, 1.0), Target("fc", 5, 2, 2, 1.0)))
    bank = torch.zeros(3, layout.size)
    for index in range(2):
        layout.lora_a(bank, index).add_(1)
        layout.lora_b(bank, index).add_(1)
    assert layout.size == 2 * (3 + 4 + 5 + 2)
    assert (bank == 1).all()
    assert {name: tuple(factor.shape) for name, factor in layout.named_factors(bank[0])} == {
        "q.lora_A": (2, 3),
        "q.lora_B": (4, 2),
        "fc.lora_A": (2, 5),
        "fc.lora_B": (2, 2),
    }
