"""The public API: runs from Python, what watches them, and what they leave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PillowImage
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, ViTConfig, ViTForImageClassification

import fedra_engine
from fedra_engine import Callback, Evaluation, Experiment, InputError, Outcome, Round, Stop, build, load_run, simulate
from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.models.state import GlobalState
from fedra_engine.run import run
from tests.data.test_partition import ByColumn
from tests.data.tokenizers import WORDS, save_encoder_tokenizer
from tests.running import small_config
from tests.tiny import make_model

FEW: dict[str, Any] = {
    "data": {"domains": ["clean", "inverted"], "clients_per_domain": 1},
    "clients": {"capacities": [12, 3]},
}


class Recorder(Callback):
    """Remembers which hooks were called, and with what."""

    def __init__(self, stop_in: str = "", at: int | None = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._stop = (stop_in, at)

    def on_start(self, experiment: Experiment, state: GlobalState, first_round: int) -> None:
        self.calls.append(("start", first_round))

    def on_update(self, experiment: Experiment, update: fedra_engine.Update) -> None:
        self.calls.append(("update", update.round))

    def on_evaluate(self, experiment: Experiment, state: GlobalState, evaluation: Evaluation) -> Stop | None:
        round = None if evaluation.metrics is None else evaluation.metrics.round
        self.calls.append(("evaluate", round))
        return Stop("enough") if self._stop == ("evaluate", round) else None

    def on_round(self, experiment: Experiment, state: GlobalState, round: Round) -> Stop | None:
        self.calls.append(("round", round.metrics.round))
        return Stop("enough") if self._stop == ("round", round.metrics.round) else None

    def on_end(self, experiment: Experiment, state: GlobalState, outcome: Outcome) -> None:
        self.calls.append(("end", outcome.rounds, outcome.stopped))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_steps_are_captured_on_a_gpu_alone_but_what_only_looks_needs_none(tmp_path: Path) -> None:
    config = small_config(tmp_path, **FEW, execution={"cuda_graphs": "on"})
    assert build(config).config.execution.cuda_graphs == "on"
    with pytest.raises(InputError, match=r"^execution\.cuda_graphs: found on with the device cpu, expected off$"):
        simulate(config)
    assert list(tmp_path.iterdir()) == []


def test_callbacks_are_told_everything_in_order(tmp_path: Path) -> None:
    seen = Recorder()
    simulate(small_config(tmp_path, **FEW), callbacks=[seen], quiet=True)
    calls = list(dict.fromkeys(seen.calls))
    rounds = [("update", 0), ("round", 0), ("update", 1), ("evaluate", 1), ("round", 1)]
    assert calls == [("start", 0), ("evaluate", None), *rounds, ("end", 2, None)]


def test_a_callback_that_has_seen_enough_before_the_first_round_keeps_it_from_being_trained(tmp_path: Path) -> None:
    seen = Recorder("evaluate", at=None)
    result = simulate(small_config(tmp_path, **FEW), callbacks=[seen], quiet=True)
    assert seen.calls == [("start", 0), ("evaluate", None), ("end", 0, "enough")]
    assert result.accuracy == result.summary["frozen"]


@pytest.mark.parametrize("hook", ["evaluate", "round"])
def test_a_callback_stops_the_run_which_is_then_evaluated_and_exported(tmp_path: Path, hook: str) -> None:
    seen = Recorder(hook, at=1)
    config = small_config(tmp_path, **FEW, rounds=5, evaluate_every=2 if hook == "evaluate" else 5)
    result = simulate(config, callbacks=[seen], quiet=True)
    assert seen.calls[-1] == ("end", 2, "enough")
    assert ("evaluate", 1) in seen.calls
    assert result.summary["rounds"] == len(result.history) == 2
    assert result.summary["stopped"] == "enough"
    assert repr(result).startswith(f"Result({result.folder}, 2 rounds: average accuracy ")
    assert "stopped after round 2: enough" in (result.folder / "run.log").read_text()
    assert (result.folder / "adapters" / "adapter_model.safetensors").is_file()


def test_a_stopped_run_may_end_where_it_is_and_is_then_evaluated_there(tmp_path: Path) -> None:
    constant: dict[str, Any] = {"training": {"lr_schedule": "constant", "max_local_steps": 1}}
    config = small_config(tmp_path, **FEW, **constant, rounds=5, evaluate_every=5)
    stopped = simulate(config, callbacks=[Recorder("round", at=1)], quiet=True)
    assert "in 2 rounds of" in (stopped.folder / "adapters" / "README.md").read_text()
    seen = Recorder("evaluate", at=None)
    ended = run(replace(config, rounds=2), RunFolder(stopped.folder), callbacks=[seen])
    assert ended.accuracy == stopped.accuracy
    # Nothing was left to be stopped.
    assert seen.calls[-1] == ("end", 2, None)
    assert "stopped" not in ended.summary


def test_fewer_rounds_than_were_trained_are_refused_whatever_depends_on_them(tmp_path: Path) -> None:
    config = small_config(tmp_path, **FEW, training={"lr_schedule": "cosine", "max_local_steps": 1})
    trained = simulate(config, quiet=True)
    with pytest.raises(InputError, match=r"^rounds: found 1, expected at least the 2 done in"):
        run(replace(config, rounds=1), RunFolder(trained.folder))


def test_a_mistyped_field_is_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path, **FEW)
    config.training.learning_rate = 0.5  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"^training\.learning_rate: found no field .*did you mean training\.lr\?"):
        simulate(config, quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [Recorder, print, Recorder()], ids=["class", "function", "no list"])
def test_what_is_no_list_of_callbacks_is_refused_before_anything_is_loaded(tmp_path: Path, given: Any) -> None:
    with pytest.raises(InputError, match=r"^callbacks: found .*, expected a list of instances of Callback"):
        simulate(small_config(tmp_path, **FEW), callbacks=given if isinstance(given, Recorder) else [given])
    assert not list(tmp_path.iterdir())


class Wrong(Callback):
    """Answers with something else than `Stop`."""

    def on_round(self, experiment: Experiment, state: GlobalState, round: Round) -> Any:
        return True


def test_an_answer_that_is_no_stop_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^callbacks: found True as the answer of Wrong, expected a Stop"):
        simulate(small_config(tmp_path, **FEW, rounds=5), callbacks=[Wrong()], quiet=True)


class Failing(Callback):
    """Has a fault of its own."""

    def on_round(self, experiment: Experiment, state: GlobalState, round: Round) -> None:
        raise ZeroDivisionError


def test_a_fault_of_a_callback_comes_through_and_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        simulate(small_config(tmp_path, **FEW), callbacks=[Failing()], quiet=True)
    assert raised.value.__notes__ == [f"fedra simulate --resume {tmp_path / 'run'} resumes it"]


def test_a_quiet_run_shows_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    simulate(small_config(tmp_path, **FEW, rounds=1), quiet=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": {"rounds": 1}}, r"^config: found \{'rounds': 1\}, expected an ExperimentConfig"),
        ({"model": "google/vit"}, r"^model: found 'google/vit', expected a torch module"),
    ],
)
def test_values_of_other_types_are_refused_in_one_line(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulate(**{"config": small_config(tmp_path, **FEW), "quiet": True} | arguments)


def test_a_run_has_accuracies_a_history_a_state_and_an_adapter(tmp_path: Path) -> None:
    result = simulate(small_config(tmp_path / "runs", **FEW), quiet=True)
    assert list(result.accuracy) == ["clean", "inverted"]
    assert result.accuracy == json.loads((result.folder / "summary.json").read_text())["tuned"]
    assert result.history.loc[1, "accuracy.clean"] == result.accuracy["clean"]
    assert result.to_dataframe().equals(result.history)
    held = result.history.loc[1, "allocation"]
    assert {client: len(blocks) for client, blocks in held.items()} == {"0": 12, "1": 3}
    result.report(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == (result.folder / "report.html").read_text()
    assert result.state.adapters.shape[0] == 12
    result.save_adapter(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"^folder: found files in .*adapter, expected a new or empty folder$"):
        result.save_adapter(tmp_path / "adapter")
    found, expected = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "adapter", result.folder / "adapters")
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_loaded_run_is_the_one_that_was_trained(tmp_path: Path) -> None:
    trained = simulate(small_config(tmp_path / "runs", **FEW, method={"name": "fedsalora"}), quiet=True)
    loaded = load_run(trained.folder)
    assert loaded.accuracy == trained.accuracy
    assert loaded.history.equals(trained.history)
    assert torch.equal(loaded.state.adapters, trained.state.adapters)
    loaded.save_adapter(tmp_path / "adapter")
    for file in sorted((trained.folder / "adapters").iterdir()):
        assert (tmp_path / "adapter" / file.name).read_bytes() == file.read_bytes()


def test_a_run_that_is_not_finished_has_no_accuracy(tmp_path: Path) -> None:
    trained = simulate(small_config(tmp_path, **FEW, rounds=1), quiet=True)
    (trained.folder / "summary.json").unlink()
    with pytest.raises(InputError, match=r"summary\.json: found no readable file .* expected that of a finished run"):
        _ = load_run(trained.folder).accuracy


def digits(count: int) -> Dataset:
    rng = np.random.default_rng(0)
    features = Features({"picture": Image(), "kind": ClassLabel(names=["dark", "light"]), "place": Value("string")})
    kinds = np.arange(count) % 2
    pictures = [PillowImage.fromarray((rng.integers(0, 100, (8, 8)) + 100 * kind).astype(np.uint8)) for kind in kinds]
    places = [("north", "south")[row // 2 % 2] for row in range(count)]
    return Dataset.from_dict({"picture": pictures, "kind": kinds, "place": places}, features=features)


COLUMNS: dict[str, Any] = {
    "partition": "iid",
    "clients_per_domain": 1,
    "min_samples": 1,
    "columns": fedra_engine.config.ColumnsConfig(input="picture", label="kind", domain="place"),
}


@pytest.mark.parametrize("split", [True, False])
def test_a_data_set_in_memory_takes_the_place_of_the_source(tmp_path: Path, split: bool) -> None:
    data = DatasetDict(train=digits(40), test=digits(12)) if split else digits(40)
    config = small_config(tmp_path, data=COLUMNS, clients={"capacities": [12]}, rounds=1)
    result = simulate(config, dataset=data, quiet=True)
    assert list(result.accuracy) == ["north", "south"]
    assert len(result.experiment.test_samples.labels) == (12 if split else 8)
    assert load_run(result.folder, dataset=data).state.heads.shape == result.state.heads.shape
    with pytest.raises(InputError, match=r"data\.root"):
        _ = load_run(result.folder).state


def test_paths_and_numpys_numbers_are_taken(tmp_path: Path) -> None:
    given = small_config(tmp_path, **{**FEW, "clients": {"capacities": np.array([12, 3])}})
    given.output_dir, given.rounds, given.training.lr = tmp_path, np.int64(1), np.float32(0.5)  # type: ignore[assignment]
    config = simulate(given).config
    assert config.output_dir == str(tmp_path)
    assert (config.rounds, config.training.lr, config.clients.capacities) == (1, 0.5, [12, 3])
    assert isinstance(given.output_dir, Path)


def test_a_method_by_its_name(tmp_path: Path) -> None:
    result = simulate(small_config(tmp_path, **FEW, rounds=1), method="allsmall", quiet=True)
    assert result.config.method.name == "allsmall"
    assert len(result.summary["evaluated_blocks"]) == 3


def test_an_experiment_can_be_looked_at_before_it_is_trained(tmp_path: Path) -> None:
    experiment = build(small_config(tmp_path, **FEW))
    assert experiment.clients.capacities.tolist() == [12, 3]
    costs = experiment.costs()
    assert costs.blocks.tolist() == [12, 3]
    assert costs.memory[0] > costs.memory[1]
    assert not list(tmp_path.iterdir())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Plain(nn.Module):
    """A torch module that knows nothing of transformers; `pre_classifier` ends as the head's name does."""

    image_size, num_channels = 8, 1

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, kernel_size=4, stride=4)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.pre_classifier = nn.Linear(16, 16)
        self.classifier = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.pre_classifier(x.mean(1)))


def tiny_vit() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    return ViTForImageClassification(
        ViTConfig(**sizes, num_attention_heads=2, image_size=8, patch_size=4, num_channels=1, num_labels=10)
    )


MODELS = {"transformers": (tiny_vit, ["fc1", "q_proj"]), "torch": (Plain, ["up", "down"])}
IMAGES: dict[str, Any] = {**FEW, "clients": {"capacities": [4, 2]}, "rounds": 1}


def predictions(loaded: Any, experiment: Experiment) -> Tensor:
    """Classes of the test samples by the `logits` of `loaded`, the names that a card's lines define."""
    samples = experiment.test_samples
    batch = samples.batch(torch.arange(len(samples.labels)), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        return loaded["logits"](**batch.inputs).argmax(1)


@pytest.mark.parametrize("method", ["fedra", "allsmall"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_in_memory_is_tuned_and_stays_as_it_is(
    tmp_path: Path, kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of the card give its accuracy, also where the tuned model is shorter."""
    make, targets = MODELS[kind]
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = small_config(tmp_path, **IMAGES, lora={"target_modules": targets})
    result = simulate(config, model=model, method=method, quiet=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not torch.equal(result.state.adapters, result.experiment.initial_state.adapters)
    adapters = result.folder / "adapters"
    for file in (adapters / "README.md", adapters / "adapter_config.json"):
        assert "in-memory" not in file.read_text()
        assert "module." not in file.read_text()
    assert json.loads((adapters / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    monkeypatch.chdir(adapters)
    names: dict[str, Any] = {"my_model": model}
    exec((adapters / "README.md").read_text().split("```")[1].removeprefix("python"), names)
    samples = result.experiment.test_samples
    right = (predictions(names, result.experiment) == samples.labels).double()
    found = [float(right[samples.domains == domain].mean()) for domain in range(2)]
    assert found == pytest.approx(list(result.summary["exported_accuracy"].values()))


def test_a_run_of_a_model_in_memory_is_loaded_with_that_model(tmp_path: Path) -> None:
    make, targets = MODELS["torch"]
    model = make()
    result = simulate(
        small_config(tmp_path, **IMAGES, lora={"target_modules": targets}), model=model, method="fedit", quiet=True
    )
    assert load_run(result.folder).accuracy == result.accuracy
    assert torch.equal(load_run(result.folder, model=model).state.adapters, result.state.adapters)
    with pytest.raises(InputError, match=r"^model\.path: found a run of a model in memory, expected it to be handed"):
        _ = load_run(result.folder).state
    with pytest.raises(InputError, match=r"^model\.path: found other weights or settings of the model"):
        _ = load_run(result.folder, model=make()).state


def test_a_tokenizer_in_memory_reads_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(save_encoder_tokenizer(tmp_path / "tokenizer"))
    model = make_model("bert")
    model.resize_token_embeddings(len(WORDS))
    names = ["one", "two", "three", "four", "five"]
    rows = {"text": [" ".join("abcdefghij"[row % 7 :]) for row in range(60)], "label": [row % 5 for row in range(60)]}
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    config = small_config(
        tmp_path,
        data={"partition": "iid", "clients_per_domain": 2, "min_samples": 1, "max_length": 8},
        lora={"target_modules": ["query", "value"]},
        clients={"capacities": [4]},
        rounds=1,
    )
    data = Dataset.from_dict(rows, features=features)
    result = simulate(config, dataset=data, model=model, processor=tokenizer, quiet=True)
    tokens = result.experiment.train_samples.batch(torch.arange(1), torch.device("cpu"), torch.float32)
    assert tokens.inputs["input_ids"][0, 0] == WORDS.index("[CLS]")
    assert list(result.accuracy) == ["all"]
    assert "model.config.pad_token_id = 0" in (result.folder / "adapters" / "README.md").read_text()
    with pytest.raises(InputError, match=r"processor|tokenizer"):
        build(config, dataset=data, model=model)


@pytest.mark.usefixtures("own_names")
def test_a_partitioner_in_memory_makes_the_clients(tmp_path: Path) -> None:
    config = small_config(tmp_path, data={"domains": ["clean", "inverted"], "min_samples": 1}, rounds=1)
    config.clients.capacities = [6]
    result = simulate(config, partitioner=ByColumn("label"), quiet=True)
    clients, data = result.experiment.clients, result.experiment.train_data
    assert data.labels is not None
    assert len(clients) == 10
    for label, rows in enumerate(clients.samples):
        assert set(data.labels[rows].tolist()) == {label}
    assert torch.equal(load_run(result.folder, partitioner=ByColumn("label")).state.heads, result.state.heads)
    with pytest.raises(InputError, match=r"^data\.partition: found a partitioner in memory, expected it to be"):
        _ = load_run(result.folder).state
