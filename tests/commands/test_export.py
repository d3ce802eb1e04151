"""`fedra export`: a run's model, or a client's, as transformers loads it, and as accurate as the run says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, BertConfig, BertForSequenceClassification, ViTConfig, pipeline
from transformers import ViTForImageClassification as ViT

from fedra_engine.commands import evaluate, export
from fedra_engine.models.loading import resolve_model_path
from fedra_engine.runtime.errors import InputError
from tests.data.tokenizers import WORDS, save_encoder_tokenizer
from tests.running import run_experiment

pytestmark = pytest.mark.usefixtures("quick_runs")

FEW: dict[str, Any] = {
    "data": {"domains": ["clean", "inverted"], "clients_per_domain": 2},
    "clients": {"capacities": [12, 3]},
    "training": {"lr": 0.05},
}
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_labels": 5,
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(tmp_path_factory.mktemp("runs"), **FEW, trace=True)


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    evaluate.main([*arguments, "--json"])
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


def test_the_model_has_the_exported_accuracy(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export.main([str(digits), "--output", str(tmp_path / "model")])
    assert capsys.readouterr().out.splitlines()[-1] == f"model: {tmp_path / 'model'}"
    found, run = (evaluated(capsys, str(digits), *more) for more in (["--model", str(tmp_path / "model")], []))
    assert found["accuracy"] == pytest.approx(summary_of(digits)["exported_accuracy"], abs=1e-6)
    assert found["test_loss"] == pytest.approx(run["test_loss"], rel=1e-4)
    assert found["model"] == str(tmp_path / "model")


@pytest.mark.parametrize("method", ["allsmall", "depthfl", "fedsalora"])
def test_so_it_has_where_the_run_predicts_by_more_or_by_fewer_blocks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    """Also where blocks that the model lacks would have adapters."""
    run = run_experiment(tmp_path, **FEW, method={"name": method}, lora={"layers_to_transform": [1, 10]})
    export.main([str(run)])
    found = evaluated(capsys, str(run), "--model", str(run / "model"))
    assert found["accuracy"] == pytest.approx(summary_of(run)["exported_accuracy"], abs=1e-6)


def test_other_models_of_the_classes_are_evaluated_too(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluated(capsys, str(digits), "--model", "digits_vit")["accuracy"] == summary_of(digits)["frozen"]
    other = evaluated(capsys, str(digits), "--model", "digits_vit", "--data.domains", "noisy")
    assert list(other["accuracy"]) == ["noisy"]


def test_a_clients_sub_model_has_the_blocks_that_it_held_last(digits: Path, tmp_path: Path) -> None:
    """By the trace of the run; its weights are those after the last round."""
    rounds = sorted((digits / "trace").glob("round_*"))
    participants = [[each["client"] for each in json.loads((r / "participants.json").read_text())] for r in rounds]
    client = next(number for number in (2, 3) if number in participants[0])
    last = max(number for number, there in enumerate(participants) if client in there)
    held = np.flatnonzero(np.load(rounds[last] / "allocation.npy")[participants[last].index(client)])
    assert len(held) == 3
    export.main([str(digits), "--client", str(client), f"--output={tmp_path / 'model'}"])
    model, after = (
        load_file(tmp_path / "model" / "model.safetensors"),
        load_file(rounds[-1] / "global_after.safetensors"),
    )
    found = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    frozen = AutoModelForImageClassification.from_pretrained(resolve_model_path("digits_vit"))
    assert len(found.vit.layers) == 3
    for position, block in enumerate(held.tolist()):
        a, b = (after[f"blocks.{block}.mlp.fc1.lora_{factor}"] for factor in "AB")
        expected = frozen.vit.layers[block].mlp.fc1.weight + 2 * b @ a
        torch.testing.assert_close(found.vit.layers[position].mlp.fc1.weight, expected)
    torch.testing.assert_close(model["classifier.weight"], after["head.weight"])
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"The sub-model of client {client} " in card
    assert ", ".join(str(block + 1) for block in held) in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"^export: found no run, expected the folder of one run: fedra export <folder>$"),
        (["RUN", "RUN"], r"^export: found .*, expected the folder of one run"),
        (["RUN/none"], r"none: found no config\.yaml, expected the folder of an earlier run$"),
        (["RUN", "--output", "RUN"], r"^output: found .*, expected a new folder$"),
        (["RUN", "--client", "4"], r"^client: found 4, expected a client from 0 to 3$"),
        (["RUN", "--client", "one"], r"^client: found 'one', expected a whole number"),
        (["RUN", "--rounds", "3"], r"^--rounds: found an unknown option"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(digits: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        export.main([argument.replace("RUN", str(digits)) for argument in arguments])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "fedstandin"}, r"^client: found method\.name fedstandin, whose sub-models have maps in place of"),
        ({"allocation": "importance"}, r"^client: found method\.allocation importance, which depends on the adapters"),
    ],
)
def test_sub_models_that_are_not_known_are_refused(tmp_path: Path, method: dict[str, Any], message: str) -> None:
    run = run_experiment(tmp_path, **FEW, rounds=1, method=method)
    with pytest.raises(InputError, match=message):
        export.main([str(run), "--client", "0"])
    assert not (run / "model_client_0").exists()


def test_a_model_of_other_classes_is_not_evaluated(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(resolve_model_path("digits_vit"), folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["id2label"]["3"] = "three"
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"^model: found the classes '0', '1', '2', 'three'.*, expected those of the"):
        evaluate.main([str(digits), "--model", str(folder)])


def test_a_pipeline_of_texts_takes_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which was pretrained for another number of classes, of which a text could have several."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    shape = BertConfig(**SIZES, vocab_size=len(WORDS), problem_type="multi_label_classification")
    BertForSequenceClassification(shape).save_pretrained(tmp_path / "bert")
    save_encoder_tokenizer(tmp_path / "bert")
    rows = [{"text": " ".join("abcdefgh"[row % 5 :]), "label": ["no", "yes", "so"][row % 3]} for row in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few: dict[str, Any] = {"partition": "iid", "clients_per_domain": 2, "min_samples": 1, "max_length": 8}
    run = run_experiment(
        tmp_path / "runs",
        data={"source": "text_classification", "root": str(tmp_path / "texts.jsonl"), **few},
        model={"path": str(tmp_path / "bert")},
        lora={"target_modules": ["query", "value"]},
        clients={"capacities": [4]},
    )
    export.main([str(run)])
    found = evaluated(capsys, str(run), "--model", str(run / "model"))
    assert found["accuracy"] == pytest.approx(summary_of(run)["exported_accuracy"], abs=1e-6)
    assert found["test_loss"] == pytest.approx(evaluated(capsys, str(run))["test_loss"], rel=1e-5)
    assert len({file.stat().st_mode for file in (run / "model").iterdir()}) == 1
    merged = pipeline("text-classification", model=str(run / "model"))("a b c", top_k=None)
    assert {each["label"] for each in merged} == {"no", "yes", "so"}
    assert sum(each["score"] for each in merged) == pytest.approx(1)
    for mine, other in zip(pipelines_of(run / "adapters", monkeypatch)("a b c", top_k=None), merged, strict=True):
        assert mine == pytest.approx(other, abs=1e-5)
    assert front_matter(run / "adapters")["pipeline_tag"] == "text-classification"


def test_a_pipeline_of_images_takes_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    ViT(ViTConfig(**SIZES, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    levels = np.random.default_rng(0)
    for domain in ("day", "night"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / domain / name
            folder.mkdir(parents=True)
            for number in range(10):
                Image.fromarray(levels.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(folder / f"{number}.png")
    run = run_experiment(
        tmp_path / "runs",
        data={"source": "image_folder", "root": str(tmp_path / "images"), "clients_per_domain": 1, "min_samples": 1},
        model={"path": str(tmp_path / "vit")},
        clients={"capacities": [4, 2]},
    )
    export.main([str(run)])
    picture = str(tmp_path / "images" / "day" / "cat" / "0.png")
    merged = pipeline("image-classification", model=str(run / "model"))(picture)
    assert {each["label"] for each in merged} == {"cat", "dog"}
    for mine, other in zip(pipelines_of(run / "adapters", monkeypatch)(picture), merged, strict=True):
        assert mine == pytest.approx(other, abs=1e-5)
    facts = front_matter(run / "model")
    assert (facts["library_name"], facts["pipeline_tag"]) == ("transformers", "image-classification")
    assert "base_model" not in facts
    shown = (run / "model" / "README.md").read_text()
    assert "| data | `image_folder`, `images`: 2 classes, 32 training samples |" in shown
    assert str(tmp_path / "images") not in shown


def pipelines_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pipeline that the card in `folder` makes."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for code in (folder / "README.md").read_text().split("```python\n")[1:]:
        exec(code.split("```")[0], names)
    return names["predict"]


def front_matter(folder: Path) -> dict[str, Any]:
    return ModelCard.load(folder / "README.md").data.to_dict()
