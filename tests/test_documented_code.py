"""Every block of code of README and docs is run, cut short.

`NOT_RUN` says which are not, and why; `test_documentation.py` reads and checks these.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    Dinov2Config,
    Dinov2Model,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fedra_engine import ClientsConfig, DataConfig, ExperimentConfig, TrainingConfig, simulate
from fedra_engine.commands.compare import parse_comparison
from tests.data.tokenizers import BYTES, WORDS, save_byte_tokenizer, save_encoder_tokenizer
from tests.data.trees import make_pacs, save_image
from tests.distributed.jobs import finish, start
from tests.documented import BLOCKS, ROOT, RUN_ELSEWHERE, Block, Started, engine_command, reason_not_to_run, started

pytestmark = pytest.mark.slow

MODELS = {"docs/quickstart/texts.md": "TEXT_MODEL", "docs/quickstart/language_model.md": "LANGUAGE_MODEL"}
"""What `MODEL` is on a page; a vision transformer on the others."""
NEEDED = {
    "source: text_classification": [
        *("--model.path=TEXT_MODEL", "--lora.target_modules=query,value", "--clients.capacities=6,3"),
    ],
    "source: causal_lm": [
        *("--model.path=LANGUAGE_MODEL", "--lora.target_modules=q_proj,v_proj", "--clients.capacities=24"),
        *("--data.partition=iid", "--data.clients_per_domain=2"),
    ],
}
"""What a configuration without a name needs beside what the page shows, by one of its lines."""
SHORT = {
    "simulate": ["--rounds=1", "--training.max_local_steps=1"],
    "compare": ["--rounds=1", "--training.max_local_steps=1", "--seeds=0", "--jobs=1", "--control=false"],
    "stopping": ["--rounds=3", "--evaluate_every=1", "--early_stopping.patience=1", "--training.max_local_steps=1"],
    "scale": ["--clients=6", "--processes=1", "--seconds=0.01"],
    "bench methods": ["--clients.participants=8", "--execution.lanes=8", "--data.image_size=28"],
    "bench watching": ["--rounds=1", "--training.max_local_steps=1"],
}
"""Options that cut a command short; what comes later wins."""


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that stands for something of the reader's, by its name on the pages."""
    folder = tmp_path_factory.mktemp("things")
    # Stand-ins have a rank of up to 128.
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 12, "mlp_ratio": 1}
    Dinov2Model(Dinov2Config(**shape, image_size=28, patch_size=14)).save_pretrained(folder / "VIT")
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertConfig(**sizes, num_hidden_layers=6, vocab_size=len(WORDS), max_position_embeddings=128)
    BertForSequenceClassification(bert).save_pretrained(folder / "TEXT_MODEL")
    save_encoder_tokenizer(folder / "TEXT_MODEL", max_length=128)
    qwen = Qwen2Config(**sizes, num_hidden_layers=24, num_key_value_heads=1, vocab_size=BYTES)
    Qwen2ForCausalLM(qwen).save_pretrained(folder / "LANGUAGE_MODEL")
    tokenizer = AutoTokenizer.from_pretrained(save_byte_tokenizer(folder / "LANGUAGE_MODEL"))
    tokenizer.chat_template = "{% for each in messages %}{{ each.role }}: {{ each.content }}\n{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer.save_pretrained(folder / "LANGUAGE_MODEL")
    make_pacs(folder / "PACS")
    rng = np.random.default_rng(0)
    for name in (f"{domain}/{kind}/{n}.png" for domain in ("photo", "sketch") for kind in "ab" for n in range(60)):
        save_image(folder / "PHOTOS" / name, rng)
    with (folder / "reviews.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["body", "stars", "shop"])
        rows.writerows([" ".join("abcdefgh"[: 1 + n % 8]), n // 2 % 2, "one" if n % 2 else "two"] for n in range(200))
    notes = [{"question": f"What follows {n}?", "answer": str(n + 1)} for n in range(200)]
    (folder / "notes.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))
    turns = [[{"role": "user", "content": n["question"]}, {"role": "assistant", "content": n["answer"]}] for n in notes]
    (folder / "conversations.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    images = rng.integers(256, size=(400, 8, 8), dtype=np.uint8)
    domains = np.repeat(["first", "second"], 200)
    np.savez(folder / "ARRAYS.npz", images=images, labels=np.arange(400) % 10, domains=domains)
    # All clients take part, so any of them can be exported.
    config = ExperimentConfig(1, data=DataConfig(partition="domain"), output_dir=str(folder / "runs"), name="NAME")
    config = replace(config, training=TrainingConfig(lr_schedule="constant", max_local_steps=1))
    for name in ("NAME", "OTHER"):
        simulate(replace(config, name=name, clients=ClientsConfig()), quiet=True)
    return folder


@pytest.fixture
def page_folder(
    things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_names: None, quick_runs: None
) -> Iterator[Path]:
    """A clone with all that the pages name; what `--import` leaves in the process is taken back."""
    for name in ("launchers", "configs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for path in things.iterdir():
        if path.name != "runs":
            (tmp_path / path.name).symlink_to(path)
            (tmp_path / "examples" / path.name).symlink_to(path)
    shutil.copytree(things / "runs", tmp_path / "runs")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "some.whl").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("FEDRA_IMPORT", "")
    before = set(sys.modules)
    yield tmp_path
    for name in {module for module in sys.modules if module.startswith("own_")} - before:
        del sys.modules[name]


PAGES = list(dict.fromkeys(block.page for block in BLOCKS if block.language != "text"))


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_one_after_another(
    page: str, page_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (page_folder / "MODEL").symlink_to(page_folder / MODELS.get(page, "VIT"))
    for block in BLOCKS:
        if block.page == page:
            monkeypatch.chdir(page_folder)
            run_block(block, page_folder, monkeypatch)


def run_block(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a block of a page in its `folder`, unless it is not to be run or run by another test."""
    if block.language in ("sh", "bash"):
        for each in started(block.code, folder):
            if reason_not_to_run(each) is None and each.command[0] != "scontrol":
                monkeypatch.chdir(each.folder)
                run_command(each, folder)
    elif block.language == "python":
        assert any(block.code.startswith(begin) for begin in RUN_ELSEWHERE), f"{block}: found no test that runs this"
    elif block.language == "yaml" and not any(map(reason_not_to_run, block.code.split("\n"))):
        if (first := block.code.split("\n")[0]).startswith("# "):
            (folder / first.removeprefix("# ")).write_text(block.code)
        else:
            (folder / "block.yaml").write_text(block.code)
            needed = [option for line, options in NEEDED.items() if line in block.code for option in options]
            call("simulate", ["--config", "block.yaml", *needed, *SHORT["simulate"]])


def run_command(command: Started, folder: Path) -> None:
    """Run what a block starts, cut short."""
    found = engine_command(command.command)
    assert found is not None, f"{command}: found what no test knows how to run, expected it in NOT_RUN"
    name, arguments = found
    if "--resume" in arguments:
        arguments = re.sub(r"--rounds \d+", "--rounds 2", " ".join(arguments)).split()
    elif "--help" not in arguments:
        if name == "compare":
            arguments = first_methods(arguments)
        arguments = [*arguments, *SHORT.get(kind_of(name, arguments), [])]
    if command.command[0] != "torchrun":
        call(name, arguments)
        return
    begin = command.command[1 : command.command.index("launchers/simulate.py")]
    launch = [sys.executable, "-m", "torch.distributed.run", *begin, str(ROOT / "launchers" / "simulate.py")]
    code, output, error = finish(start([*launch, *arguments, "--output_dir", str(folder / "job")]))
    assert code == 0, error
    assert "tuned  " in output


def kind_of(name: str, arguments: list[str]) -> str:
    """The key in `SHORT` of a command."""
    if name == "bench":
        return f"bench {arguments[0]}"
    # One round would leave nothing to save.
    return "stopping" if "--early_stopping.patience" in arguments else name


def first_methods(arguments: list[str]) -> list[str]:
    """Of a comparison that can be read as it stands, the first methods; `tests/methods/test_runs.py` runs every one."""
    comparison = parse_comparison(arguments)
    asked = arguments[arguments.index("--methods") + 1]
    entries = re.split(r",(?![^\[]*\])", asked)
    assert len(comparison.entries) in (len(entries), len(entries) + 1)
    grid = ["--grid=training.lr=0.01,0.02"] if "--grid" in arguments else []
    return [*arguments, f"--methods={','.join(entries[: 1 if grid else 2])}", *grid]


def call(name: str, arguments: list[str]) -> None:
    """Run a command of the engine in this process; SystemExit if it ends otherwise than well."""
    try:
        import_module(f"fedra_engine.commands.{name}").main(arguments)
    except SystemExit as end:
        if end.code:
            raise
