"""The shipped experiments: they say what was published, and run on data laid out as the published data are."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from fedra_engine import inputs
from fedra_engine.commands.dry_run import print_probe
from fedra_engine.commands.simulate import RunRequest, parse_request
from fedra_engine.config import ExperimentConfig
from fedra_engine.data import images
from fedra_engine.run import run as train_run
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.tables import PlainConsole
from tests.data.tokenizers import BYTES, WORDS, save_byte_tokenizer, save_encoder_tokenizer
from tests.data.trees import DOMAINNET, NICOPP, PACS, make_domainnet, make_nicopp, make_pacs
from tests.tiny_timm import timm_mixer

CONFIGS = Path(__file__).parents[2] / "configs" / "experiments"
MODELS = {"vit": "google/vit-base-patch16-224", "mixer": "timm/mixer_b16_224.goog_in21k_ft_in1k"}
TARGETS = {"vit": ["o_proj", "mlp.fc2"], "mixer": ["mlp_tokens.fc2", "mlp_channels.fc2"]}
SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
SMALL = ["--rounds=2", "--evaluate_every=2", "--training.batch_size=4", "--data.min_samples=1"]


def parsed(files: list[str], options: list[str]) -> RunRequest:
    return parse_request([f"--config={CONFIGS / name}.yaml" for name in files] + options, "")


def config(*files: str) -> ExperimentConfig:
    return parsed(list(files), []).config


def run(tmp_path: Path, files: list[str], options: list[str], name: str = "run") -> tuple[dict, str]:
    """Run an experiment. Returns its summary and what it said."""
    asked = parsed(files, [*SMALL, *options, f"--output_dir={tmp_path / 'runs'}", f"--name={name}"])
    result = train_run(asked.config, asked.resumed, accelerator=Accelerator(cpu=True))
    return result.summary, (result.folder / "run.log").read_text()


@pytest.fixture
def vit(tmp_path: Path) -> str:
    model = ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4))
    model.save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


@pytest.mark.parametrize("model", ["vit", "mixer"])
@pytest.mark.parametrize(("data", "domains", "classes"), [("domainnet", DOMAINNET, 100), ("nicopp", NICOPP, 60)])
def test_configurations_are_the_published_protocol(data: str, domains: list[str], classes: int, model: str) -> None:
    feature = config(f"{data}_{model}_b16")
    assert (feature.rounds, feature.data.partition) == (100, "domain")
    both = config(f"{data}_{model}_b16", "label_skew")
    assert (both.rounds, both.data.partition, both.data.clients_per_domain) == (150, "dirichlet", 5)
    assert (both.data.dirichlet_alpha, both.data.balanced, both.data.min_samples) == (0.5, True, 10)
    for found in (feature, both):
        assert (found.data.source, found.data.domains, found.data.classes) == (data, domains, classes)
        assert found.data.image_size == 224
        assert (found.method.name, found.clients.sampling) == ("fedra", "one_per_domain")
        training = found.training
        assert (training.optimizer, training.lr, training.momentum) == ("sgd", 0.01, 0.9)
        assert (training.batch_size, training.local_epochs, training.clip_norm) == (128, 1, 10.0)
        assert (training.max_local_steps, training.even_steps) == (None, True)
        assert (found.method.allocation, found.method.weighting) == ("reference", "uniform")
        assert (training.weight_decay, training.lr_schedule) == (1e-5, "constant")
        assert (found.lora.rank, found.lora.alpha, found.lora.dropout) == (8, 8, 0.1)
        assert found.clients.capacities == [12, 10, 8, 6, 5, 4]
        assert found.lora.target_modules == TARGETS[model]
        assert found.model.path == MODELS[model]


@pytest.fixture
def mixer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A Mixer of timm's shape in the place of the loaded model, since timm may not be installed."""
    model = timm_mixer(classes=3, channels=3)
    model.main_input_name = "pixel_values"
    model.config = PreTrainedConfig(num_channels=3)
    model.config.model_type = "timm_wrapper"
    monkeypatch.setattr(inputs, "load_pretrained", lambda *_, **__: model)
    return str(tmp_path)


@pytest.mark.parametrize("model", ["vit", "mixer"])
@pytest.mark.parametrize("data", ["domainnet", "nicopp"])
@pytest.mark.parametrize("skew", [[], ["label_skew"]])
def test_experiments_run_on_the_published_layout(
    tmp_path: Path, request: pytest.FixtureRequest, data: str, model: str, skew: list[str]
) -> None:
    make = {"domainnet": make_domainnet, "nicopp": make_nicopp}[data]
    root = make(tmp_path / "data set", ["aircraft carrier", "bus", "train"], train=10, test=2)
    options = [f"--data.root={root}", f"--model.path={request.getfixturevalue(model)}", "--data.image_size=8"]
    options.append("--clients.capacities=[4,3,2,2,1,1]")
    summary, said = run(tmp_path, [f"{data}_{model}_b16", *skew], options)
    assert list(summary["tuned"]) == {"domainnet": DOMAINNET, "nicopp": NICOPP}[data]
    assert f"{'30' if skew else '6'} in 6 domains" in said
    assert "180 training, " in said
    assert (tmp_path / "runs" / "run" / "partition.png").is_file()


def test_a_second_run_decodes_nothing_and_ends_the_same(
    tmp_path: Path, vit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_domainnet(tmp_path / "data", ["a", "b"])
    options = [f"--data.root={root}", f"--model.path={vit}", "--data.image_size=8"]
    options.append("--clients.capacities=[4,3,2,2,1,1]")
    first, said = run(tmp_path, ["domainnet_vit_b16"], options)
    assert " test; 96 preprocessed now" in said
    monkeypatch.setattr(images.PillowImage, "open", lambda *_, **__: pytest.fail("decoded again"))
    second, said = run(tmp_path, ["domainnet_vit_b16"], options, name="again")
    assert " test; all were in the cache" in said
    assert first == second


def test_a_size_that_the_model_does_not_take_is_reported_before_images_are_decoded(
    tmp_path: Path, vit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_domainnet(tmp_path / "data", ["a", "b"])
    monkeypatch.setattr(images.PillowImage, "open", lambda *_, **__: pytest.fail("decoded"))
    options = [f"--data.root={root}", f"--model.path={vit}", "--data.image_size=12"]
    options.append("--clients.capacities=[4,3,2,2,1,1]")
    with pytest.raises(InputError, match=r"model\.path: .* cannot take the data's inputs: .*12"):
        run(tmp_path, ["domainnet_vit_b16"], options)


def test_texts_run_with_clients_that_mix_domains(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    shape = BertConfig(**SIZES, vocab_size=len(WORDS), max_position_embeddings=64)
    BertForSequenceClassification(shape).save_pretrained(folder)
    save_encoder_tokenizer(folder)
    with (tmp_path / "texts.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label", "domain"])
        rows.writerows(
            [" ".join("abcdefgh"[: 1 + index % 8]), index % 3, ["news", "mail"][index % 2]] for index in range(120)
        )
    options = ["--data.source=text_classification", f"--data.root={tmp_path / 'texts.csv'}", f"--model.path={folder}"]
    options += ["--data.max_length=32", "--clients.capacities=[4,3,2]", "--data.clients=8", "--clients.participants=5"]
    summary, said = run(tmp_path, ["agnews_minilm"], options)
    assert list(summary["tuned"]) == ["mail", "news"]
    assert "8 in 2 domains" in said


def test_a_mixer_of_timm_itself_runs(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    shape = TimmWrapperConfig(architecture="mixer_s32_224", model_args={"img_size": 64}, num_labels=10)
    TimmWrapperForImageClassification(shape).save_pretrained(tmp_path / "mixer")
    root = make_domainnet(tmp_path / "data", ["bus", "train"], train=4)
    options = [f"--data.root={root}", f"--model.path={tmp_path / 'mixer'}", "--data.image_size=64", "--rounds=1"]
    summary, _ = run(tmp_path, ["domainnet_mixer_b16"], [*options, "--clients.capacities=[8,3,2,2,1,1]"])
    assert list(summary["tuned"]) == DOMAINNET


@pytest.mark.parametrize(("name", "clients"), [("pacs_vit_s14", 24), ("pacs_study", 4)])
def test_pacs_runs_on_a_bare_dinov2(tmp_path: Path, name: str, clients: int) -> None:
    sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2, image_size=42, patch_size=14)).save_pretrained(tmp_path / "dinov2")
    root = make_pacs(tmp_path / "pacs")
    options = [f"--data.root={root}", f"--model.path={tmp_path / 'dinov2'}", "--data.image_size=28"]
    options += ["--clients.capacities=[4,3,2,1]", "--data.min_samples=10", "--rounds=1"]
    summary, said = run(tmp_path, [name], options)
    assert list(summary["tuned"]) == PACS
    assert f"{clients} in 4 domains" in said


def test_ag_news_runs_on_a_bare_bert(tmp_path: Path) -> None:
    BertModel(BertConfig(**SIZES, vocab_size=len(WORDS), max_position_embeddings=128)).save_pretrained(tmp_path / "m")
    save_encoder_tokenizer(tmp_path / "m", max_length=128)
    names = ClassLabel(names=["World", "Sports", "Business", "Sci/Tech"])

    def split(count: int) -> Dataset:
        texts = [" ".join("abcdefgh"[: 1 + number % 8]) for number in range(count)]
        rows = {"text": texts, "label": [number % 4 for number in range(count)]}
        return Dataset.from_dict(rows, features=Features(text=Value("string"), label=names))

    DatasetDict(train=split(400), test=split(40)).save_to_disk(tmp_path / "ag_news")
    options = [f"--data.root={tmp_path / 'ag_news'}", f"--model.path={tmp_path / 'm'}", "--rounds=1"]
    summary, said = run(tmp_path, ["agnews_minilm"], [*options, "--clients.capacities=[4,3,2,1]", "--data.clients=20"])
    assert list(summary["tuned"]) == ["all"]
    assert "400 training, " in said


def test_dolly_tunes_a_qwen_to_an_adapter_that_peft_loads(tmp_path: Path) -> None:
    shape = Qwen2Config(
        **SIZES, num_key_value_heads=1, vocab_size=BYTES, max_position_embeddings=512, tie_word_embeddings=True
    )
    Qwen2ForCausalLM(shape).save_pretrained(tmp_path / "qwen")
    save_byte_tokenizer(tmp_path / "qwen")
    kinds = ["brainstorming", "closed_qa", "summarization"]
    with (tmp_path / "databricks-dolly-15k.jsonl").open("w", encoding="utf-8") as file:
        for number in range(90):
            row = {
                "instruction": f"Which letter comes after {'abcdefg'[number % 7]}?",
                "context": "" if number % 3 else "Letters have an order – an old one.",
                "response": "bcdefgh"[number % 7],
                "category": kinds[number % 3],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    options = [f"--data.root={tmp_path / 'databricks-dolly-15k.jsonl'}", f"--model.path={tmp_path / 'qwen'}"]
    options += ["--clients.capacities=[4]", "--data.clients=8", "--rounds=1"]
    console = PlainConsole(file=io.StringIO())
    print_probe(parsed(["dolly_qwen"], [*SMALL, *options]).config, torch.device("cpu"), console)
    assert isinstance(console.file, io.StringIO)
    assert "head       lm_head: 16 → 257, frozen and shared" in console.file.getvalue().splitlines()
    summary, said = run(tmp_path, ["dolly_qwen"], options)
    assert list(summary["tuned"]) == ["all"]
    assert "8 in 1 domains" in said
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen", dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(tmp_path / "runs" / "run" / "adapters"))
    trained = {name for name, tensor in tuned.state_dict().items() if "lora_B" in name and tensor.any()}
    assert len(trained) == 4 * len(["q_proj", "k_proj", "v_proj", "o_proj"])
