"""The settings of the race: a frozen model, clients, and one round's work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from fedra_engine import ExperimentConfig, build
from fedra_engine.config import ClientsConfig, DataConfig, ExecutionConfig, LoraConfig, ModelConfig, TrainingConfig
from fedra_engine.experiment import Experiment

CLASSES = 2
"""Few, so that the fewest samples have all of them."""
FULL_DEPTH = (12,)
FEDRA = (12, 10, 8, 6, 4, 3)
"""FedRA's capacities, of which clients get one after another."""

_SIZES = {5: (8, 4), 17: (8, 2), 65: (32, 4), 197: (224, 16)}
"""Sides of an image and of a patch, by the number of tokens."""
_WORDS = 1000
EPS = 1e-3
"""Of AdamW, so that steps are nearly proportional to gradients. With 1e-8 the first step has their signs alone, which
in bfloat16 are often those of rounding errors (a cosine of 0.99 with float32, instead of 0.999)."""
_TEXT_TARGETS = ["query", "key", "value", "intermediate.dense", "output.dense"]
"""Six Linears: `output.dense` is the end of two paths."""


@dataclass(frozen=True)
class Scene:
    """One round on one model; the adapters, of rank 8, are on all six Linears of a block.

    Attributes:
        name: in the options and in file names.
        title: of its table.
        task: what the model reads; the other two are the model that ships with the package, in its default experiment
            and with random clients.
        capacities: blocks of the clients, in turn.
        clients, steps, batch: the round's work; not of `embedded_default`, which has its own.
        width, heads, tokens, depth: of the model; not of the embedded one.
        threads: of each contestant.
        idle: whether clients take no steps.
    """

    name: str
    title: str
    task: Literal["image", "text", "embedded_default", "embedded_clients"]
    capacities: tuple[int, ...] = FULL_DEPTH
    clients: int = 0
    steps: int = 1
    batch: int = 1
    width: int = 0
    heads: int = 0
    tokens: int = 0
    depth: int = 12
    threads: int = 1
    idle: bool = False

    @property
    def own_model(self) -> bool:
        """Whether the model is made for the scene."""
        return self.task in ("image", "text")


def make_model(scene: Scene, folder: Path) -> None:
    """Save the scene's model, in float32 and with random weights, and its tokenizer to `folder`."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": scene.width,
        "num_hidden_layers": scene.depth,
        "num_attention_heads": scene.heads,
        "intermediate_size": 4 * scene.width,
        "num_labels": CLASSES,
    }
    if scene.task == "image":
        side, patch = _SIZES[scene.tokens]
        ViTForImageClassification(ViTConfig(image_size=side, patch_size=patch, **sizes)).save_pretrained(folder)
        return
    words = {f"w{index}": index for index in range(_WORDS)} | {"[UNK]": _WORDS, "[PAD]": _WORDS + 1}
    settings = BertConfig(vocab_size=len(words), max_position_embeddings=scene.tokens, pad_token_id=_WORDS + 1, **sizes)
    BertForSequenceClassification(settings).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", model_max_length=scene.tokens
    ).save_pretrained(folder)


def build_scene(
    scene: Scene, folder: Path, dtype: str = "float32", attention: str = "sdpa", executor: str = "sweep"
) -> Experiment:
    """The experiment of a scene whose model, if it has its own, lies in `folder`."""
    execution: Any = ExecutionConfig(executor=executor)  # type: ignore[arg-type]
    model: Any = ModelConfig(dtype=dtype, attention=attention)  # type: ignore[arg-type]
    config = ExperimentConfig(model=model, execution=execution)
    if scene.task == "embedded_default":
        return build(config)
    config.clients = ClientsConfig(capacities=list(scene.capacities), sampling="uniform")
    config.training = TrainingConfig(batch_size=scene.batch, local_epochs=1, max_local_steps=scene.steps, eps=EPS)
    per_client = scene.steps * scene.batch
    if not scene.own_model:
        config.data = DataConfig(partition="bootstrap", clients=scene.clients, samples_per_client=per_client)
        return build(config)
    config.model.path = str(folder)
    config.data = DataConfig(partition="iid", clients=scene.clients, min_samples=per_client)
    if scene.task == "text":
        config.data.source = "text_classification"
        config.lora = LoraConfig(target_modules=_TEXT_TARGETS)
    return build(config, dataset=_samples(scene))


def _samples(scene: Scene) -> DatasetDict:
    """Random samples, as many as the clients use in a round, and a few for a test set that is not evaluated."""
    rng = np.random.default_rng(0)
    column, kind = ("image", Image()) if scene.task == "image" else ("text", Value("string"))
    features = Features({column: kind, "label": ClassLabel(names=[str(label) for label in range(CLASSES)])})

    def split(count: int) -> Dataset:
        if scene.task == "image":
            side, _ = _SIZES[scene.tokens]
            inputs: list[Any] = list(rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8))
        else:
            inputs = [" ".join(f"w{word}" for word in row) for row in rng.integers(0, _WORDS, (count, scene.tokens))]
        labels = np.resize(np.arange(CLASSES), count).tolist()
        return Dataset.from_dict({column: inputs, "label": labels}, features=features)

    return DatasetDict(train=split(scene.clients * scene.steps * scene.batch), test=split(CLASSES))


def _vit(name: str, width: int, tokens: int, capacities: tuple[int, ...], work: tuple[int, int, int]) -> Scene:
    title = f"ViT of width {width}, {tokens} tokens, {_text_of(capacities, work)}"
    return Scene(name, title, "image", capacities, *work, width=width, heads=width // 64, tokens=tokens)


def _bert(name: str, capacities: tuple[int, ...], work: tuple[int, int, int]) -> Scene:
    title = f"BERT of width 384, 64 tokens, {_text_of(capacities, work)}"
    return Scene(name, title, "text", capacities, *work, width=384, heads=12, tokens=64)


def _text_of(capacities: tuple[int, ...], work: tuple[int, int, int]) -> str:
    clients, steps, batch = work
    return f"{'full depth' if capacities == FULL_DEPTH else 'FedRA'}, {clients} clients × {steps} × {batch}"


def _idle(clients: int) -> Scene:
    return Scene(
        f"overhead-{clients}", f"{clients:,} clients without work", "embedded_clients", clients=clients, idle=True
    )


_NARROW_FEDRA = _vit("vit192-fedra", 192, 17, FEDRA, (32, 1, 8))
OVERHEAD = [_idle(clients) for clients in (32, 256, 1000, 10_000)]
"""Their clients take no steps."""
TRAINING = [
    _vit("vit192", 192, 17, FULL_DEPTH, (32, 1, 8)),
    _NARROW_FEDRA,
    replace(_NARROW_FEDRA, name="vit192-fedra-2threads", title=f"{_NARROW_FEDRA.title}, 2 threads", threads=2),
    _vit("vit384", 384, 65, FULL_DEPTH, (4, 1, 4)),
    _vit("vit384-fedra", 384, 65, FEDRA, (12, 1, 4)),
    _vit("vit768", 768, 197, FULL_DEPTH, (4, 1, 1)),
    _vit("vit768-fedra", 768, 197, FEDRA, (6, 1, 1)),
    _bert("bert384", FULL_DEPTH, (4, 1, 4)),
    _bert("bert384-fedra", FEDRA, (6, 1, 4)),
    Scene("embedded-default", "embedded default, one round", "embedded_default"),
    Scene("embedded-256", "embedded model, full depth, 256 clients × 1 × 1", "embedded_clients", clients=256),
]
_QUICK = Scene(
    "quick",
    "small ViT, 4 clients × 2 × 2",
    "image",
    capacities=(2, 1),
    clients=4,
    steps=2,
    batch=2,
    width=64,
    heads=2,
    tokens=17,
    depth=2,
)
QUICK = [_QUICK, _idle(8)]
"""What shows in seconds that the race works."""
SCENES = {scene.name: scene for scene in (*TRAINING, *OVERHEAD, *QUICK)}
