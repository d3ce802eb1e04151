"""Instruction tuning of a causal language model, from a file of questions and answers to PEFT's adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fedra_engine.callbacks.saved_rounds import load_newest_intact
from fedra_engine.experiment import build_experiment
from fedra_engine.runtime.errors import InputError
from tests.data.tokenizers import WORDS, save_decoder_tokenizer
from tests.running import run_experiment, small_config


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A tiny LLaMA, and twenty questions in each of two domains whose answers go on with the alphabet."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    shape = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(WORDS),
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "llama")
    save_decoder_tokenizer(tmp_path / "llama")
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = [
        {"question": " ".join(letters[i : i + 1 + i % 3]), "response": " ".join(letters[i + 3 : i + 5]), "domain": name}
        for name in ("first", "second")
        for i in range(20)
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "data": {
            "source": "causal_lm",
            "root": str(file),
            "prompt": "q {question} a ",
            "partition": "iid",
            "clients_per_domain": 2,
            "min_samples": 2,
            "max_length": 16,
        },
        "model": {"path": str(tmp_path / "llama"), "dtype": "float64"},
        "lora": {"target_modules": ["q_proj", "v_proj", "down_proj"], "rank": 4, "dropout": 0.2},
        "clients": {"capacities": [4, 2], "sampling": "uniform"},
        "training": {"batch_size": 3, "max_local_steps": 3, "lr": 0.02},
    }


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = load_newest_intact(run)
    assert checkpoint is not None
    return checkpoint.tensors


def test_steps_on_texts_are_not_captured(setting: dict[str, Any], tmp_path: Path) -> None:
    config = small_config(tmp_path, **setting, execution={"cuda_graphs": "on"})
    with pytest.raises(InputError, match=r"^execution\.cuda_graphs: found on with texts, expected off$"):
        build_experiment(config, torch.device("cpu"))


def test_both_executors_tune_it_the_same_way(setting: dict[str, Any], tmp_path: Path) -> None:
    setting["training"] |= {"optimizer": "sgd"}
    sweep = final_tensors(run_experiment(tmp_path / "sweep", **setting))
    sequential = final_tensors(run_experiment(tmp_path / "alone", **setting, execution={"executor": "sequential"}))
    for name, tensor in sequential.items():
        # transformers' RMSNorm computes in float32 even here.
        torch.testing.assert_close(sweep[name], tensor, rtol=1e-4, atol=1e-7)


def test_it_learns_and_peft_loads_what_it_learnt(setting: dict[str, Any], tmp_path: Path) -> None:
    run = run_experiment(tmp_path / "run", **setting, rounds=12)
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.1
    base = AutoModelForCausalLM.from_pretrained(setting["model"]["path"], dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    tuned = PeftModel.from_pretrained(base, str(run / "adapters"))
    tokens = torch.arange(6, 12)[None]
    with torch.no_grad(), tuned.disable_adapter():
        plain = tuned(input_ids=tokens).logits
    with torch.no_grad():
        assert (tuned(input_ids=tokens).logits - plain).abs().max() > 1e-3
    assert torch.equal(before["lm_head.weight"], base.get_output_embeddings().weight)


@pytest.mark.parametrize("method", [{"name": "depthfl"}, {"name": "fedhello"}])
def test_methods_that_need_classes_are_refused(setting: dict[str, Any], tmp_path: Path, method: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"method\.name: found .* with a causal language model, expected a classifier"):
        run_experiment(tmp_path / "run", **setting, method=method)
