"""One tree of dataclasses: the whole experiment. Every field is a command-line option (`--data.root …`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedra_engine.config.options import (
    CLIENTS,
    COUNT,
    DECAY,
    FOLDER_NAME,
    FRACTION,
    LINES,
    NATURAL,
    NON_NEGATIVE,
    PATH,
    PIXELS,
    POSITIVE,
    PROBABILITY,
    RANK,
    RATE,
    SAMPLES,
    SHARE,
    SOMETHING,
    SPREAD,
    STEPS,
    TEXT,
    Need,
    group,
    number,
    option,
    whole,
)

_TABLES: Need = {"data.source": ("hf_dataset", "text_classification", "causal_lm")}
_FILES: Need = {
    "data.source": ("image_folder", "domainnet", "nicopp", "hf_dataset", "text_classification", "causal_lm")
}
_IMAGES: Need = {"data.source": ("digits", "image_folder", "domainnet", "nicopp", "hf_dataset")}
_DRAWN_TEST: Need = {"data.source": ("image_folder", "hf_dataset", "text_classification", "causal_lm")}
_DIVIDED: Need = {"data.partition": ("iid", "dirichlet", "shards", "quantity", "bootstrap")}
_ADAPTIVE: Need = {"server.optimizer": ("fedadam", "fedyogi")}
_SWEEP: Need = {"execution.executor": ("sweep",)}


@dataclass
class ColumnsConfig:
    """What the columns of a table or data set are called (docs/data.md).

    Args:
        input: the image or text of a sample; `image` or `text` when null.
        response: the text that a causal language model learns to write after `data.prompt`; `response` when null.
        label: the class; `label` when null, if there is such a column.
        domain: the domain; `domain` when null, if there is such a column.
        client: who owns a sample under the `natural` partition; `client` when null, if there is such a column.
    """

    input: str | None = option(
        None, TEXT, needs=[_TABLES, {"data.source": ("hf_dataset", "text_classification"), "data.prompt": (None,)}]
    )
    response: str | None = option(None, TEXT, needs=[{"data.source": ("causal_lm",)}, {"data.prompt": (SOMETHING,)}])
    label: str | None = option(None, TEXT, needs=[_TABLES])
    domain: str | None = option(None, TEXT, needs=[_TABLES])
    client: str | None = option(None, TEXT, needs=[_TABLES, {"data.partition": ("natural",)}])


@dataclass
class DataConfig:
    """Where the samples come from and how they are divided among the clients (docs/data.md).

    Args:
        source: `digits` (embedded, six domains), `image_folder` (`<root>/<domain>/<class>/*`), `domainnet` and
            `nicopp` (lists of paths and labels), `text_classification` and `causal_lm` (files or a data set),
            or `hf_dataset` (labelled images or texts).
        root: folder or file of the source; for the last three sources also the name of a data set on the hub.
        subset: configuration of a data set on the hub; its only one when null.
        encoding: encoding of csv, tsv, jsonl and txt files, by Python's name (such as `cp1252`); a byte order mark in a
            file goes before it.
        columns: what the columns of a table or data set are called.
        domains: domains to use, in the order that client capacities follow; all, sorted, when empty.
        classes: use only the first N classes, where there are more; all when null.
        prompt: the text before the response of `causal_lm`, with columns in braces (`{instruction}`); plain text
            when null.
        image_size: side in pixels to which images are resized (bicubic); the model's own size when null.
        max_length: longest text in tokens (longer ones are cut); when null, the model's limit, at most 512.
        unreadable: treat an image that cannot be decoded, or a text without words, as an `error`, or `skip` it.
        augmentation: random changes to the training images, drawn anew in every step: `none`, `flip` (left to right
            with probability 1/2), or `crop_flip` (also a crop of random place, area and shape, resized back).
        crop_scale: smallest fraction of an image's area that `crop_flip` keeps.
        test_fraction: fraction of each domain's and class's samples held out if the source has no test set.
        partition: `domain` (each domain is one client), `iid`, `dirichlet` (label skew), `shards` (few classes per
            client), `quantity` (log-normal skew of the sample counts), `natural` (a column names the client) or
            `bootstrap` (each client draws samples of one domain with replacement; nothing is stored).
        clients_per_domain: number of clients that share each domain's training samples.
        clients: number of clients that share all training samples, whatever their domain; null keeps every client
            to one domain. Under `bootstrap`, the number of clients, to which domains are assigned in turn.
        dirichlet_alpha: concentration of the per-class Dirichlet draws of `dirichlet`; smaller is more skewed.
        balanced: `dirichlet` gives no more to clients that already have the average number of samples.
        shards_per_client: shards (mostly of one label) that `shards` gives each client.
        quantity_sigma: standard deviation of the logarithm of the sample counts under `quantity`.
        samples_per_client: samples that a client draws under `bootstrap`.
        min_samples: fewest training samples a client may have; the split is redrawn until all have them.
    """

    source: Literal[
        "digits", "image_folder", "domainnet", "nicopp", "hf_dataset", "text_classification", "causal_lm"
    ] = "digits"
    root: str | None = option(None, PATH, needs=[_FILES])
    subset: str | None = option(None, TEXT, needs=[_TABLES])
    encoding: str = option("utf-8", TEXT, needs=[{"data.source": ("text_classification", "causal_lm")}])
    columns: ColumnsConfig = group(ColumnsConfig)
    domains: list[str] = option([], TEXT)
    classes: int | None = option(None, COUNT)
    prompt: str | None = option(None, LINES, needs=[{"data.source": ("causal_lm",)}])
    image_size: int | None = option(None, PIXELS, needs=[_IMAGES])
    max_length: int | None = option(None, whole(1, 10**6), needs=[_TABLES])
    unreadable: Literal["error", "skip"] = option("error", needs=[_FILES])
    augmentation: Literal["none", "flip", "crop_flip"] = option("none", needs=[_IMAGES])
    crop_scale: float = option(0.08, SHARE, needs=[{"data.augmentation": ("crop_flip",)}])
    test_fraction: float = option(0.2, FRACTION, needs=[_DRAWN_TEST])
    partition: Literal["domain", "iid", "dirichlet", "shards", "quantity", "natural", "bootstrap"] = "dirichlet"
    clients_per_domain: int = option(5, CLIENTS, needs=[_DIVIDED, {"data.clients": (None,)}])
    clients: int | None = option(None, CLIENTS, needs=[_DIVIDED])
    dirichlet_alpha: float = option(0.5, number(1e-4, 1e6), needs=[{"data.partition": ("dirichlet",)}])
    balanced: bool = option(True, needs=[{"data.partition": ("dirichlet",)}])
    shards_per_client: int = option(2, SAMPLES, needs=[{"data.partition": ("shards",)}])
    quantity_sigma: float = option(1.0, SPREAD, needs=[{"data.partition": ("quantity",)}])
    samples_per_client: int = option(100, SAMPLES, needs=[{"data.partition": ("bootstrap",)}])
    min_samples: int = option(
        10, SAMPLES, needs=[{"data.partition": ("domain", "iid", "dirichlet", "shards", "quantity", "natural")}]
    )


@dataclass
class ModelConfig:
    """The frozen foundation model.

    Args:
        path: `digits_vit` (ships with the package), a Hugging Face model directory, or a hub name.
        dtype: precision of the frozen weights and of the computation.
        attention: which attention implementation of transformers to use.
        block_path: dotted path of the block list inside the model; found by structure when null.
        pooling: which output the classifier reads: whatever the model's own classification layers read (`auto`; see
            docs/models.md for models without any), the model's own pooled output (`pooler`), the `first` token, the
            `mean` over tokens, or the `last` token.
        head_init: where the classifier starts: as `loaded` (random where the model had none for these classes),
            `zeros` (all classes equally likely), or `class_means` (the class with the nearest mean of the frozen
            model's features, taken over equally many training samples of every class).
    """

    path: str = option("digits_vit", PATH)
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager"] = "sdpa"
    block_path: str | None = option(None, TEXT)
    pooling: Literal["auto", "pooler", "first", "mean", "last"] = "auto"
    head_init: Literal["loaded", "zeros", "class_means"] = "loaded"


@dataclass
class LoraConfig:
    """The adapters.

    Args:
        rank: inner dimension r of A [r, in] and B [out, r].
        alpha: the adapter's product is scaled by alpha / rank.
        dropout: probability of zeroing an input feature of the adapter path during training.
        target_modules: Linear layers inside a block that get an adapter, by PEFT's rules: a list of name
            endings, or one string that is a regular expression for the whole path inside the block, or all-linear.
    """

    rank: int = option(8, RANK)
    alpha: float = option(16.0, number(0, 1e6, above=True))
    dropout: float = option(0.0, DECAY)
    target_modules: list[str] | str = option(["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"], TEXT)

    @property
    def scale(self) -> float:
        """Factor of the adapter's product, alpha / rank."""
        return self.alpha / self.rank


@dataclass
class InclusiveFLConfig:
    """Options of `inclusivefl`.

    Args:
        momentum: weight β of what deeper groups learnt in the change of a shallower group's last block.
    """

    momentum: float = option(0.2, DECAY)


@dataclass
class DepthFLConfig:
    """Options of `depthfl`.

    Args:
        exit_every: blocks between exits.
        ramp_up_rounds: rounds over which the weight of the mutual distillation rises to 1.
        predict: by the mean of all exits' logits (`ensemble`), or by the `last` exit.
    """

    exit_every: int = option(3, COUNT)
    ramp_up_rounds: int = option(500, COUNT)
    predict: Literal["ensemble", "last"] = "ensemble"


@dataclass
class HetLoraConfig:
    """Options of `hetlora`.

    Args:
        keep_ratio: fraction γ of its ranks that a client keeps when it prunes itself; 1 for no pruning.
        penalty: weight λ of the term that pulls the other ranks towards zero.
    """

    keep_ratio: float = option(0.99, SHARE)
    penalty: float = option(0.01, NON_NEGATIVE)


@dataclass
class FedHelloConfig:
    """Options of `fedhello`.

    Args:
        selection: how a client's trainable blocks are chosen: drawn with equal probability (`random`); the `first`,
            the `last`, half of them first and half last (`bottleneck`) or `spread` evenly; or drawn with
            probabilities that rise with each block's Fisher information (`fisher`).
        fisher_every: rounds between measurements of the Fisher information (and before the first).
        fisher_samples: training samples that it is measured on.
    """

    selection: Literal["random", "first", "last", "bottleneck", "spread", "fisher"] = "fisher"
    fisher_every: int = option(10, COUNT, needs=[{"method.fedhello.selection": ("fisher",)}])
    fisher_samples: int = option(100, SAMPLES, needs=[{"method.fedhello.selection": ("fisher",)}])


@dataclass
class LoraFairConfig:
    """Options of `lorafair`.

    Args:
        weight: weight λ of the term that keeps the correction of B small.
        steps: gradient steps that compute the correction.
        lr: their size, relative to the one at which the descent is stable.
    """

    weight: float = option(0.01, NON_NEGATIVE)
    steps: int = option(200, STEPS)
    lr: float = option(0.5, RATE)


@dataclass
class MethodConfig:
    """The federated algorithm.

    Args:
        name: one of the methods in docs/methods.md.
        allocation: which blocks a client holds, for methods that leave it open: `uniform` (each client draws
            independently; the default), `reference` (drawn as FedRA's published code draws, from one legacy NumPy
            stream over all rounds, but not its rows: there other draws move the stream on in between), `covered`
            (repaired so that every block has a holder if the capacities allow it), `prefix` (the first blocks) or
            `full` (all blocks).
        ignore_capacities: allow full-depth methods even if no client can hold all blocks.
        weighting: weight of a client in the averages: `uniform`, or its number of `samples`.
        inclusivefl: options of `inclusivefl`.
        depthfl: options of `depthfl`.
        fedhello: options of `fedhello`.
        hetlora: options of `hetlora`.
        lorafair: options of `lorafair`.
    """

    name: str = option("fedra", TEXT)
    allocation: Literal["uniform", "reference", "covered", "prefix", "full"] | None = None
    ignore_capacities: bool = option(False, needs=[{"method.name": ("alllarge",), "method.allocation": ("full",)}])
    weighting: Literal["uniform", "samples"] = "uniform"
    inclusivefl: InclusiveFLConfig = group(InclusiveFLConfig, needs=[{"method.name": ("inclusivefl",)}])
    depthfl: DepthFLConfig = group(DepthFLConfig, needs=[{"method.name": ("depthfl",)}])
    fedhello: FedHelloConfig = group(FedHelloConfig, needs=[{"method.name": ("fedhello",)}])
    hetlora: HetLoraConfig = group(HetLoraConfig, needs=[{"method.name": ("hetlora",)}])
    lorafair: LoraFairConfig = group(LoraFairConfig, needs=[{"method.name": ("lorafair",)}])


@dataclass
class ServerConfig:
    """How the server uses the mean of a round's updates.

    Args:
        optimizer: `fedavg` (takes it as the new state), `fedavgm` (momentum), `fedadam` or `fedyogi` (adaptive).
        lr: server learning rate; when null, 1 for `fedavg`, 1 − momentum for `fedavgm`, and 0.01 for the adaptive
            optimizers.
        betas: decay rates of the moments of `fedadam` and `fedyogi`; the first is the momentum of `fedavgm`.
        tau: adaptivity τ in the denominator of `fedadam` and `fedyogi`.
    """

    optimizer: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = "fedavg"
    lr: float | None = option(None, RATE)
    betas: tuple[float, float] = option(
        (0.9, 0.99), DECAY, needs=[{"server.optimizer": ("fedavgm", "fedadam", "fedyogi")}]
    )
    tau: float = option(1e-3, RATE, needs=[_ADAPTIVE])

    @property
    def rate(self) -> float:
        """The server learning rate."""
        if self.lr is not None:
            return self.lr
        return {"fedavg": 1.0, "fedavgm": 1 - self.betas[0], "fedadam": 0.01, "fedyogi": 0.01}[self.optimizer]


@dataclass
class DeviceConfig:
    """A kind of device that clients train on (docs/devices.md). A null field takes no time, or sets no limit.

    Args:
        compute: speed that training reaches, in GFLOP/s.
        upload: speed to the server, in Mbit/s.
        download: speed from the server, in Mbit/s.
        memory: GiB that training may use; determines capacities if `clients.capacities` is `memory`.
        availability: probability that a client is available in a round.
        dropout: probability that a participant drops out, so that its update is lost.
        variation: standard deviation of the logarithm of a participant's time, drawn anew every round.
    """

    compute: float | None = option(None, number(1e-6, 1e12))
    upload: float | None = option(None, number(1e-6, 1e12))
    download: float | None = option(None, number(1e-6, 1e12))
    memory: float | None = option(None, number(0, 1e6, above=True), needs=[{"clients.capacities": ("memory",)}])
    availability: float = option(1.0, SHARE)
    dropout: float = option(0.0, PROBABILITY)
    variation: float = option(0.0, SPREAD)


@dataclass
class ClientsConfig:
    """Who takes part.

    Args:
        capacities: number of blocks a client can hold, one entry per domain in domain order (or one for all); or
            `memory`: as many as fit the memory of its device.
        capacity_schedule: capacities stay `fixed`, or are `drawn`: every round, each client gets the capacity of a
            random client.
        ranks: LoRA rank of a client's adapters, at most lora.rank, one entry per domain (or one for all); lora.rank
            for all when empty.
        sampling: `one_per_domain`, or `uniform` draws of `participants` clients without replacement.
        participants: clients per round under `uniform` sampling; all clients when null.
        devices: kinds of devices; when empty, devices are not simulated.
        device_schedule: a client has the device of its `domain` (one entry per domain in domain order, or one for all),
            or one `drawn` uniformly before the first round.
        deadline: simulated seconds after which the server accepts no more updates in a round; none when null.
    """

    capacities: list[int] | Literal["memory"] = option([12, 10, 8, 6, 4, 3], whole(1, 10**6))
    capacity_schedule: Literal["fixed", "drawn"] = "fixed"
    ranks: list[int] = option([], RANK)
    sampling: Literal["one_per_domain", "uniform"] = "one_per_domain"
    participants: int | None = option(None, CLIENTS, needs=[{"clients.sampling": ("uniform",)}])
    devices: list[DeviceConfig] = option([])
    device_schedule: Literal["domain", "drawn"] = option("domain", needs=[{"clients.devices": (SOMETHING,)}])
    deadline: float | None = option(None, POSITIVE, needs=[{"clients.devices": (SOMETHING,)}])


@dataclass
class TrainingConfig:
    """What a client does in a round.

    Args:
        optimizer: `sgd` (with momentum) or `adamw`; its state is reset every round.
        lr: learning rate of the first round.
        lr_schedule: how the learning rate changes over the rounds: `constant`, `linear` or `cosine` decay towards 0.
        momentum: momentum of `sgd`.
        betas: decay rates of the moments of `adamw`.
        eps: denominator term of `adamw`.
        weight_decay: L2 term of `sgd`, decoupled decay of `adamw`.
        proximal_mu: weight μ of FedProx's term μ/2 ‖w − w₀‖², which keeps a client near the state it received.
        clip_norm: each client's gradient is scaled to at most this norm; no clipping when null.
        batch_size: samples of a client in one local step.
        local_epochs: passes over a client's samples in a round.
        max_local_steps: upper limit of a client's local steps in a round; none when null.
        even_steps: cap local steps at one more than the smallest client takes, as in FedRA's published code.
        on_bad_update: what happens when the loss, a gradient or a value of a client's update is not finite: `drop`
            leaves the client out of the round, as if its update had not arrived, and says so; `error` ends the run.
            A round in which every update is bad ends it in either case.
    """

    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = option(0.005, number(0, 1e30, above=True))
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    momentum: float = option(0.9, DECAY, needs=[{"training.optimizer": ("sgd",)}])
    betas: tuple[float, float] = option((0.9, 0.999), DECAY, needs=[{"training.optimizer": ("adamw",)}])
    eps: float = option(1e-8, SHARE, needs=[{"training.optimizer": ("adamw",)}])
    weight_decay: float = option(1e-5, number(0, 1e4))
    proximal_mu: float = option(0.0, NON_NEGATIVE)
    clip_norm: float | None = option(10.0, number(1e-6, 1e12))
    batch_size: int = option(16, whole(1, 10**6))
    local_epochs: int = option(3, STEPS)
    max_local_steps: int | None = option(5, COUNT)
    even_steps: bool = False
    on_bad_update: Literal["drop", "error"] = "drop"


@dataclass
class ExecutionConfig:
    """How participants are trained; none of these changes the results.

    Args:
        executor: `sweep` (many clients in one pass over the blocks) or `sequential` (one PEFT sub-model
            per client, one after another; slow, the oracle of the tests).
        lanes: clients that `sweep` trains at the same time; bounds memory, whatever the number of clients. `auto`
            uses as many as help and fit into free memory, and halves them if memory still runs out.
        fused_blocks: fuse norms, gathers, scatters and activations in blocks of known families; `auto` fuses on a
            GPU, where memory traffic matters most, unless the model is sharded.
        checkpoint_blocks: keep only the inputs of blocks for the backward pass, which then runs each block again: less
            memory, but about half as much computation again.
        deterministic: repeat a run, or go on with it, to the last bit (docs/scale.md): sums do not depend on the order
            in which clients finish, clients are divided among processes by counted cost rather than measured speed, and
            a resumed run keeps its lanes.
    """

    executor: Literal["sweep", "sequential"] = "sweep"
    lanes: int | Literal["auto"] = option("auto", whole(1, 10**5), needs=[_SWEEP])
    fused_blocks: Literal["auto", "on", "off"] = "auto"
    checkpoint_blocks: bool = option(
        # FedHello measures gradients of the sweep's model, whoever trains.
        False,
        needs=[{"execution.executor": ("sweep",), "method.name": ("fedhello",)}],
    )
    deterministic: bool = False


@dataclass
class ExperimentConfig:
    """A federated LoRA tuning experiment; the default values are the embedded experiment.

    Args:
        rounds: federated rounds.
        seed: the seed from which every random draw is derived.
        evaluate_every: rounds between evaluations; the last round is always evaluated.
        name: name of the run folder; made from the method, model and time when null.
        output_dir: folder that receives run folders.
        trace: also write everything needed to recompute each round with other code (needs lora.dropout 0).
        data: samples and their partition.
        model: frozen foundation model.
        lora: adapters.
        method: federated algorithm.
        server: server optimizer.
        clients: capacities and sampling.
        training: local training.
        execution: executor and its resources.
    """

    rounds: int = option(80, COUNT)
    seed: int = option(0, NATURAL)
    evaluate_every: int = option(20, COUNT)
    name: str | None = option(None, FOLDER_NAME)
    output_dir: str = option("runs", PATH)
    trace: bool = False
    data: DataConfig = group(DataConfig)
    model: ModelConfig = group(ModelConfig)
    lora: LoraConfig = group(LoraConfig)
    method: MethodConfig = group(MethodConfig)
    server: ServerConfig = group(ServerConfig)
    clients: ClientsConfig = group(ClientsConfig)
    training: TrainingConfig = group(TrainingConfig)
    execution: ExecutionConfig = group(ExecutionConfig)
