"""The shipped experiments: they say what was published, and run on data laid out as the published data are."""

import csv
import json
from pathlib import Path

import pytest
from accelerate import Accelerator
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from fedra_engine.config import ExperimentConfig
from fedra_engine.data import images
from fedra_engine.reporting.console import Reporter
from fedra_engine.run_request import RunRequest, parse_request
from fedra_engine.simulation import Simulation
from tests.data.tokenizers import WORDS, save_encoder_tokenizer
from tests.data.trees import DOMAINNET, NICOPP, make_domainnet, make_nicopp

CONFIGS = Path(__file__).parents[2] / "configs" / "experiments"
SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
SMALL = ["--rounds=2", "--evaluate_every=2", "--training.batch_size=4", "--data.min_samples=1"]


def request(files: list[str], options: list[str]) -> RunRequest:
    return parse_request([f"--config={CONFIGS / name}.yaml" for name in files] + options, "")


def config(*files: str) -> ExperimentConfig:
    return request(list(files), []).config


def run(tmp_path: Path, files: list[str], options: list[str], name: str = "run") -> tuple[dict, str]:
    """Run an experiment. Returns its summary and what it said."""
    asked = request(files, [*SMALL, *options, f"--output_dir={tmp_path / 'runs'}", f"--name={name}"])
    with asked.open_folder() as folder, Reporter(folder.log_file) as reporter:
        Simulation(asked.config, folder, reporter, Accelerator(cpu=True)).run()
        return json.loads(folder.summary_file.read_text()), folder.log_file.read_text()


@pytest.fixture
def vit(tmp_path: Path) -> str:
    model = ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8))
    model.save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


@pytest.mark.parametrize("model", ["vit", "mixer"])
@pytest.mark.parametrize(("data", "domains", "classes"), [("domainnet", DOMAINNET, 100), ("nicopp", NICOPP, 60)])
def test_the_published_protocol(data: str, domains: list[str], classes: int, model: str) -> None:
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
        assert (training.weight_decay, training.lr_schedule) == (1e-5, "constant")
        assert (found.lora.rank, found.lora.alpha, found.lora.dropout) == (8, 8, 0.1)


@pytest.mark.parametrize("data", ["domainnet", "nicopp"])
@pytest.mark.parametrize("skew", [[], ["label_skew"]])
def test_vit_experiments_run_on_the_published_layout(tmp_path: Path, vit: str, data: str, skew: list[str]) -> None:
    make = {"domainnet": make_domainnet, "nicopp": make_nicopp}[data]
    root = make(tmp_path / "data set", ["aircraft carrier", "bus", "train"], train=10, test=2)
    options = [f"--data.root={root}", f"--model.path={vit}", "--data.image_size=16"]
    options.append("--clients.capacities=[4,3,2,2,1,1]")
    summary, said = run(tmp_path, [f"{data}_vit_b16", *skew], options)
    assert list(summary["tuned"]) == {"domainnet": DOMAINNET, "nicopp": NICOPP}[data]
    assert f"{'30' if skew else '6'} in 6 domains" in said
    assert "180 for training" in said
    assert (tmp_path / "runs" / "run" / "partition.png").is_file()


def test_a_second_run_decodes_nothing_and_ends_the_same(
    tmp_path: Path, vit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_domainnet(tmp_path / "data", ["a", "b"])
    options = [f"--data.root={root}", f"--model.path={vit}", "--data.image_size=16"]
    options.append("--clients.capacities=[4,3,2,2,1,1]")
    first, _ = run(tmp_path, ["domainnet_vit_b16"], options)
    monkeypatch.setattr(images.PillowImage, "open", lambda *_: pytest.fail("decoded again"))
    second, _ = run(tmp_path, ["domainnet_vit_b16"], options, name="again")
    assert first == second


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
