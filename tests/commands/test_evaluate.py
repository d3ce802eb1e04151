"""`fedra evaluate`: what a run came to, measured again, on its own data and on others."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.commands.evaluate import main
from fedra_engine.commands.export import main as export
from fedra_engine.runtime.errors import InputError
from tests.data.tokenizers import WORDS, save_decoder_tokenizer
from tests.running import run_experiment

FEW: dict[str, Any] = {
    "data": {"domains": ["clean", "inverted"], "clients_per_domain": 1},
    "clients": {"capacities": [12, 3]},
    "rounds": 1,
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(tmp_path_factory.mktemp("runs"), **FEW)


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    main([*arguments, "--json"])
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


def test_it_gives_the_figures_of_the_summary(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in digits.rglob("*")}
    found = evaluated(capsys, str(digits))
    assert found["rounds"] == 1
    assert found["accuracy"] == json.loads((digits / "summary.json").read_text())["tuned"]
    measures = json.loads((digits / "summary.json").read_text())["measures"]
    assert set(measures) == {"test_loss", "macro_f1", "calibration_error"}
    assert found == {
        "rounds": 1,
        "accuracy": found["accuracy"],
        **{name: of["tuned"] for name, of in measures.items()},
    }
    assert {file: file.stat().st_mtime_ns for file in digits.rglob("*")} == before


@pytest.mark.parametrize("method", ["fedsalora", "depthfl", "allsmall"])
def test_it_predicts_as_the_method_does(tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    run = run_experiment(tmp_path, **FEW, method={"name": method})
    assert evaluated(capsys, str(run))["accuracy"] == json.loads((run / "summary.json").read_text())["tuned"]


def test_a_table_is_for_people(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((digits / "summary.json").read_text())
    capsys.readouterr()
    main([str(digits)])
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch("after 1 round, on [0-9,]+ test samples", lines[0])
    rows = [line.split() for line in lines[-4:]]
    assert [row[0] for row in rows] == ["accuracy", "test", "macro-F1", "calibration"]
    assert rows[0][:4] == ["accuracy", "(%)", *(f"{100 * share:.1f}" for share in summary["tuned"].values())]
    macro_f1 = summary["measures"]["macro_f1"]["tuned"]
    assert rows[2][:4] == ["macro-F1", "(%)", *(f"{100 * share:.1f}" for share in macro_f1.values())]


def test_other_data_of_as_many_classes_are_evaluated(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(capsys, str(digits), "--data.domains", "noisy,clean")
    own = evaluated(capsys, str(digits))
    assert list(found["accuracy"]) == ["noisy", "clean"]
    assert found["accuracy"]["clean"] == own["accuracy"]["clean"]
    assert found["accuracy"]["noisy"] < own["accuracy"]["clean"]


@pytest.mark.parametrize("domains", [["noisy"], ["edges", "clean", "noisy"]])
def test_other_data_may_have_fewer_domains_or_more(
    domains: list[str], digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(capsys, str(digits), f"--data.domains={','.join(domains)}")
    assert list(found["accuracy"]) == domains


def test_clients_models_meet_the_domain_of_their_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_experiment(tmp_path, **FEW, method={"name": "fedsalora"})
    own, other = (evaluated(capsys, str(run), *more) for more in ((), ("--data.domains=noisy,inverted",)))
    assert other["accuracy"]["inverted"] == own["accuracy"]["inverted"]
    for measure in ("test_loss", "macro_f1", "calibration_error"):
        assert other[measure]["inverted"] == pytest.approx(own[measure]["inverted"], rel=1e-5)


def test_the_other_executor_measures_the_same(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(capsys, str(digits), "--execution.executor", "sequential")
    assert found == evaluated(capsys, str(digits)) == evaluated(capsys, "--execution.executor", "sweep", str(digits))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"^evaluate: found no run, expected the folder of one run: fedra evaluate <folder>$"),
        (["--data.domains", "clean"], r"^evaluate: found no run, expected the folder of one run"),
        (
            ["RUN", "--data.image_size", "14"],
            r"^data\.image_size: found it as an option, expected none: it is the run's$",
        ),
        (
            ["RUN", "--data.partition=iid"],
            r"^data\.partition: found it as an option, expected none: it changes training",
        ),
        (
            ["RUN", "--execution.cuda_graphs=on"],
            r"^execution\.cuda_graphs: found it as an option, expected none: it changes training alone$",
        ),
        (["--run", "RUN"], r"^--run: found an unknown option"),
        (["RUN", "--execution.lane", "3"], r"^--execution\.lane: .*did you mean --execution\.lanes\?"),
        (["RUN", "other"], r"^evaluate: found .*, other, expected the folder of one run"),
        (["RUN", "--rounds", "3"], r"^evaluate: found --rounds, expected options of data and execution alone$"),
        (["RUN", "--lora.rank=2"], r"^evaluate: found --lora\.rank, expected options of data and execution alone$"),
        (["RUN", "--config", "x.yaml"], r"^evaluate: found --config, expected options of data and execution alone$"),
        (
            ["RUN", "--data.classes", "5"],
            r"^data: found the classes .* for image_classification, expected those of the run",
        ),
        (["RUN", "--best"], r"^.*/run/best: found no round, expected one of a run that had keep_best$"),
        (["RUN", "--best", "--model", "x"], r"^best: found true with --model x, expected one of the two$"),
        (["RUN/none"], r"none"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(digits: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        main([argument.replace("RUN", str(digits)) for argument in arguments])
    assert "\n" not in str(refused.value)


def test_a_merged_model_of_quantized_blocks_is_not_quantized_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_experiment(tmp_path, **FEW, model={"load_in": "4bit"})
    export([str(run)])
    found, merged = evaluated(capsys, str(run)), evaluated(capsys, str(run), "--model", str(run / "model"))
    assert found["accuracy"] == merged["accuracy"] == json.loads((run / "summary.json").read_text())["tuned"]
    for domain, loss in found["test_loss"].items():
        assert merged["test_loss"][domain] == pytest.approx(loss, rel=1e-4)


def test_a_merged_model_has_the_norm_that_was_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora, model = {"modules_to_save": ["layernorm"]}, {"head_init": "class_means"}
    run = run_experiment(tmp_path, **FEW, lora=lora, model=model)
    export([str(run)])
    found, merged = evaluated(capsys, str(run)), evaluated(capsys, str(run), "--model", str(run / "model"))
    assert found["accuracy"] == merged["accuracy"] == json.loads((run / "summary.json").read_text())["tuned"]
    for domain, loss in found["test_loss"].items():
        assert merged["test_loss"][domain] == pytest.approx(loss, rel=1e-4)


def test_a_run_that_trained_no_round_is_refused(tmp_path: Path, digits: Path) -> None:
    config = (digits / "config.yaml").read_text()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config)
    with pytest.raises(InputError, match="found no checkpoint, expected a run that has trained a round"):
        main([str(RunFolder(tmp_path / "run").path)])


def test_a_language_model_has_a_perplexity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": len(WORDS)}
    shape = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "llama")
    save_decoder_tokenizer(tmp_path / "llama")
    text = " ".join("abcdefghijklmnopqrstuvwxyz")
    rows = [{"text": text[2 * (row % 9) :][:12], "domain": "xy"[row % 2]} for row in range(40)]
    files = tmp_path / "texts.jsonl", tmp_path / "others.jsonl"
    for file, kept in zip(files, (rows, rows[:20]), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    run = run_experiment(
        tmp_path / "runs",
        data={
            "source": "causal_lm",
            "root": str(files[0]),
            "partition": "iid",
            "clients_per_domain": 1,
            "min_samples": 1,
            "max_length": 8,
        },
        model={"path": str(tmp_path / "llama")},
        lora={"target_modules": ["q_proj"]},
        clients={"capacities": [2]},
        rounds=1,
    )
    found = evaluated(capsys, str(run))
    assert found["accuracy"] == json.loads((run / "summary.json").read_text())["tuned"]
    assert found["perplexity"] == {domain: math.exp(loss) for domain, loss in found["test_loss"].items()}
    assert 1 < found["perplexity"]["x"] < 2 * len(WORDS)
    others = evaluated(capsys, str(run), "--data.root", str(files[1]))
    assert list(others["perplexity"]) == ["x", "y"]
