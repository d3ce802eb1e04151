"""The command line: what the options make, and one clear line for what they cannot."""

import re
import subprocess
import sys
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import pytest

from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.commands.simulate import RunRequest, parse_request
from fedra_engine.config import DeviceConfig, ExperimentConfig, LoraConfig
from fedra_engine.config.fields import ALIASES, describe_type, field_names
from fedra_engine.config.options import whole
from fedra_engine.config.parsing import Parser, parse_option, split_positional
from fedra_engine.runtime.errors import InputError, first_few

DEVICES = [DeviceConfig(compute=1.0), DeviceConfig(upload=3.0)]
CONFIGS = Path(__file__).parents[2] / "configs" / "experiments"


def parse(*arguments: str) -> RunRequest:
    return parse_request(arguments, "")


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (list[int], "a list of whole numbers"),
        (dict[str, float], "a mapping from texts to numbers"),
        (tuple[float, float], "a list of 2 numbers"),
        (list[Literal["a", "b"]], "a list of a, b"),
        (list[bool], "a list of entries (true or false each)"),
    ],
)
def test_types_are_told_in_words(kind: Any, words: str) -> None:
    assert describe_type(kind) == words


def test_no_options_are_the_defaults() -> None:
    assert parse().config == ExperimentConfig()
    assert parse().resumed is None


def test_options_reach_their_fields_and_come_after_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "rounds: 7\ntraining:\n  lr: 1e-3\n  clip_norm: null\n  betas: [0.5, 0.6]\n")
    config = parse("--config", path, "--rounds", "5", "--lora.target_modules", "[a, b]", "--method.name=fedit").config
    assert (config.rounds, config.lora.target_modules, config.method.name) == (5, ["a", "b"], "fedit")
    assert (config.training.lr, config.training.clip_norm, config.training.betas) == (1e-3, None, (0.5, 0.6))


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--training.batch-size", "4"], "training.batch_size", 4),
        (["--evaluate-every=3"], "evaluate_every", 3),
        (["--trace"], "trace", True),
        (["--training.even-steps", "--rounds", "3"], "training.even_steps", True),
        (["--data.balanced", "false"], "data.balanced", False),
        (["--trace", "yes"], "trace", True),
        (["--clients.capacities", "12,10, 8"], "clients.capacities", [12, 10, 8]),
        (["--clients.capacities", "4"], "clients.capacities", [4]),
        (["--clients.capacities", "memory"], "clients.capacities", "memory"),
        (["--training.betas", "0,0.5"], "training.betas", (0.0, 0.5)),
        (["--data.domains", "photo,sketch"], "data.domains", ["photo", "sketch"]),
        (["--data.domains", "1,2"], "data.domains", ["1", "2"]),
        (["--data.domains", "[photo, '2']"], "data.domains", ["photo", "2"]),
        (["--lora.target_modules", "q_proj,fc1"], "lora.target_modules", ["q_proj", "fc1"]),
        (["--lora.target_modules", r".*\.(q|v),?"], "lora.target_modules", r".*\.(q|v),?"),
        (["--lora.target_modules", "all-linear"], "lora.target_modules", "all-linear"),
        (["--data.domains", "[a]", "--data.domains+", "b"], "data.domains", ["a", "b"]),
        (["--clients.ranks+=3", "--clients.ranks+", "[2, 1]"], "clients.ranks", [3, 2, 1]),
        (["--clients.devices=[{compute: 1}]", "--clients.devices+={upload: 3}"], "clients.devices", DEVICES),
        (["--lora", "{rank: 4, alpha: 2}", "--lora.rank", "5"], "lora", LoraConfig(rank=5, alpha=2.0)),
        (["--lora.rank_pattern", "{q_proj: 16, 'fc.*': 4}"], "lora.rank_pattern", {"q_proj": 16, "fc.*": 4}),
        (["--lora.alpha_pattern={fc1: 2}"], "lora.alpha_pattern", {"fc1": 2.0}),
        (["--rounds", "5", "--rounds", "6"], "rounds", 6),
        (["--training.clip_norm", "null"], "training.clip_norm", None),
        (["--training.lr", "3"], "training.lr", 3.0),
        (["--name", "3"], "name", "3"),
        (["--data.prompt", "Q: {a}"], "data.prompt", "Q: {a}"),
        (["--model.path", "'a'"], "model.path", "'a'"),
    ],
)
def test_values_are_typed_in_the_ways_people_type_them(arguments: list[str], field: str, value: object) -> None:
    config = Parser(ExperimentConfig).parse(arguments)
    found = reduce(getattr, field.split("."), config)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--training.learning_rate", "training.lr"),
        ("--learning-rate", "training.lr"),
        ("--lr", "training.lr"),
        ("--server.learning_rate", "server.lr"),
        ("--epochs", "training.local_epochs"),
        ("--batch_size", "training.batch_size"),
        ("--dataset", "data.source"),
        ("--rank", "lora.rank"),
        ("--num_rounds", "rounds"),
        ("--num-clients", "data.clients"),
        ("--participants", "clients.participants"),
        ("--model.rank", "lora.rank"),
        ("--dirichlet_alfa", "data.dirichlet_alpha"),
        ("--resum", "resume"),
    ],
)
def test_an_unknown_option_comes_with_the_one_that_was_meant(typed: str, meant: str) -> None:
    expected = "expected one that --help_all lists"
    check_error([typed, "3"], f"{typed}: found an unknown option, {expected} (did you mean --{meant}?)")


def test_every_alias_stands_for_an_option_and_is_none() -> None:
    names = list(field_names(ExperimentConfig))
    assert set(ALIASES.values()) <= set(names)
    assert not set(ALIASES) & set(names)


@pytest.mark.parametrize("name", ["method", "model", "data"])
def test_a_word_for_a_group_is_a_word_for_the_field_that_names_it(name: str) -> None:
    check_error(
        [f"--{name}", "x"], f"{name}: found no file 'x'; expected .*, or options --{name}.<field> (did you mean"
    )


def test_files_and_options_count_in_the_order_they_are_given(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1.yaml", "rounds: 1\nseed: 1\n"), write(tmp_path / "2.yaml", "rounds: 2\n")
    group = write(tmp_path / "lora.yaml", "rank: 2\n")
    config = parse("--config", one, "--seed=9", "--config", two, "--lora", group, "--lora.alpha", "3").config
    assert (config.rounds, config.seed, config.lora.rank, config.lora.alpha) == (2, 9, 2, 3.0)
    assert parse("--rounds=7", "--config", two).config.rounds == 2


def test_a_shipped_configuration_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in CONFIGS.glob("*.yaml"):
        by_name, by_path = (Parser(ExperimentConfig).parse(["--config", given]) for given in (path.stem, str(path)))
        assert by_name == by_path
    write(tmp_path / "pacs_vit_s14", "rounds: 3\n")
    assert Parser(ExperimentConfig).parse(["--config", "pacs_vit_s14"]).rounds == 3


@pytest.mark.parametrize("printed", ["--print_config", "--print_config=skip_default", "--print-config=skip-default"])
def test_the_printed_configuration_reads_back(printed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--rounds=3", "--clients.devices=[{compute: 1}]", "--training.betas=0.5,0.6", "--data.domains=a,'no'"]
    with pytest.raises(SystemExit):
        Parser(ExperimentConfig).parse([*given, printed])
    text = capsys.readouterr().out
    assert ("seed" in text) == ("default" not in printed)
    file = write(tmp_path / "c.yaml", text)
    again = Parser(ExperimentConfig).parse(["--config", file])
    assert again == Parser(ExperimentConfig).parse(given)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    root = ["--data.root", "images"] if "image_folder" in path.read_text() else []
    assert parse("--config", str(path), *root).config.rounds > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--foo", "3"], "--foo: found an unknown option, expected one that --help_all lists"),
        (["--round", "3"], "--round: found an unknown option, expected .* (did you mean --rounds?)"),
        (["--data.rot=x"], "--data.rot: found an unknown option, expected .* (did you mean --data.root?)"),
        (["--rounds", "x"], "rounds: found 'x', expected a whole number"),
        (["--rounds", "1.5"], "rounds: found 1.5, expected a whole number"),
        (["--rounds", "0"], "rounds: found 0, expected a whole number from 1 to"),
        (["--rounds"], "rounds: found no value, expected one"),
        (["--data.image_size", "x"], "data.image_size: found 'x', expected a whole number from 1 to 4,096 or null"),
        (
            ["--clients.capacities", "[a]"],
            "clients.capacities: found 'a', expected a whole number from 1 to 1,000,000",
        ),
        (
            ["--clients.capacities=x"],
            "clients.capacities: found 'x', expected a list of whole numbers from 1 to .* or memory",
        ),
        (["--clients.devices=5"], "clients.devices: found 5, expected a list of mappings with compute, upload, "),
        (["--clients.devices=[null]"], "clients.devices: found null, expected fields compute, upload, "),
        (
            ["--clients.devices=[{speed: 1}]"],
            "clients.devices: found an unknown field speed, expected fields ",
        ),
        (
            ["--clients.devices=[{compute: fast}]"],
            "clients.devices[0].compute: found 'fast', expected a number from .* or null",
        ),
        (
            ["--training.betas", "[1]"],
            "training.betas: found [1.0], expected a list of 2 numbers from ",
        ),
        (
            ["--lora.rank_pattern", "16"],
            "lora.rank_pattern: found 16, expected a mapping from texts to whole numbers from",
        ),
        (["--lora.rank_pattern={q: x}"], "lora.rank_pattern: found 'x', expected a whole number from 1 to 128"),
        (["--lora.rank_pattern={'q(': 1}"], "lora.rank_pattern: found 'q(' (.*), expected a regular expression"),
        (
            ["--lora.rank_pattern={q: 1}", "--clients.ranks", "4"],
            "lora.rank_pattern: found {'q': 1} with clients.ranks [4], expected one rank for all targets",
        ),
        (
            ["--lora.rank_pattern={q: 1}", "--method.name", "hetlora"],
            "lora.rank_pattern: found {'q': 1} with method.name hetlora, expected one rank for all targets",
        ),
        (["--data.source", "x"], "data.source: found 'x', expected one of digits, image_folder"),
        (["--trace", "maybe"], "trace: found 'maybe', expected true or false"),
        (
            ["--lora", "3"],
            "lora: found no file '3'; expected a YAML file of fields and values, or options --lora.<field>",
        ),
        (["--config", "none.yaml"], "config: found no file 'none.yaml'; expected a YAML file of fields and values"),
        (["--rounds", "--seed", "3"], "rounds: found no value, expected one"),
        (["--model.path", "null"], "model.path: found null, expected a path"),
        (["--rounds+", "3"], "--rounds+: found an unknown option"),
        (["--lora.target_modules", "q", "--lora.target_modules+", "v"], "lora.target_modules: found 'q' to append to"),
        (["--clients.ranks+", "x"], "clients.ranks: found 'x', expected a whole number from 1 to 128"),
        (["--clients.devices+", "[null]"], "clients.devices: found null, expected fields compute, upload, "),
        (["--clients.capacities", "12;10"], "clients.capacities: found '12;10', expected a list"),
        (["--clients.ranks", "4,x"], "clients.ranks: found 'x', expected a whole number from 1 to 128"),
        (
            ["--config", "pacs_vit_s"],
            "config: found no file 'pacs_vit_s', expected one, or one of .*label_skew.* (did you mean pacs_vit_s14?)",
        ),
        (["---seed", "3"], "---seed: found an unknown option, expected .* (did you mean --seed?)"),
        (["foo"], "foo: found an argument without an option, expected one that --help_all lists"),
        (["seed=3"], "seed: found an argument without an option, expected .* (did you mean --seed?)"),
        (["config=pacs_vit_s14"], "config: found an argument without an option"),
        (["--method.name", "fedar"], "method.name: found 'fedar', expected one of fedra, .* (did you mean fedra?)"),
        (
            ["--method.name", "randomprefix"],
            "method.name: found 'randomprefix', .* (--import MODULE adds names of your own)",
        ),
        (["resume=none"], "resume: found an argument without an option"),
        (["--import="], "import: found '' (Empty module name), expected a module of yours"),
        (["--resume"], "resume: found no value, expected one"),
        (["--resume", "none"], "none: found no config.yaml, expected the folder of an earlier run"),
        (
            ["--resume", "none", "--seed", "1"],
            "resume: found --seed beside it, expected no other option than",
        ),
    ],
)
def test_unusable_options_are_reported(arguments: list[str], message: str) -> None:
    check_error(arguments, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rouds: 3\n", "rouds: found an unknown field in .*bad.yaml, expected .* (did you mean rounds?)"),
        (
            "data:\n  rot: x\n",
            "data.rot: found an unknown field in .*bad.yaml, expected .* (did you mean data.root?)",
        ),
        ("data: 3\n", "data: found 3, expected fields of it: source, root"),
        ("rounds: 3\ndata:\n", "data: found null, expected fields of it: source, root"),
        ("rounds: null\n", "rounds: found null, expected a whole number"),
        ("training:\n  lr: fast\n", "training.lr: found 'fast', expected a number"),
        ("lora:\n  target_modules: [a, 3]\n", "lora.target_modules: found 3, expected text"),
        ("", "config: found nothing in .*bad.yaml', expected a YAML file of fields and values"),
        ("- a\n", "config: found no fields in .*bad.yaml', expected a YAML file of fields and values"),
        ("a: b: c\n", "config: .*bad.yaml: mapping values are not allowed here (line 1); expected a YAML file"),
        (
            b"\xff\xfe\x00",
            "config: .*bad.yaml: 'utf-8' codec can't decode byte 0xff in position 0: .*; expected a YAML file",
        ),
    ],
)
def test_unusable_files_are_reported(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    check_error(["--config", str(path)], message)


@pytest.mark.parametrize("text", ["{}", "{name: }", "name:\n"])
def test_a_file_may_say_nothing(tmp_path: Path, text: str) -> None:
    assert parse("--config", write(tmp_path / "a.yaml", text)) == parse()


def test_a_file_reads_as_it_looks(tmp_path: Path) -> None:
    text = "rounds: 010\nname: no\ndata: {source: causal_lm, root: 2026-01-01, domains: ['1e3', 1:30]}\n"
    config = parse("--config", write(tmp_path / "a.yaml", text)).config
    assert (config.rounds, config.name) == (10, "no")
    assert (config.data.root, config.data.domains) == ("2026-01-01", ["1e3", "1:30"])


def test_the_configuration_in_a_run_folder_reads_back_as_it_was(tmp_path: Path) -> None:
    text = (
        "data: {source: causal_lm, root: '~x', columns: {label: '1e3'}, domains: ['no', '010', '.5', 'a: b', 'null']}\n"
    )
    config = parse("--config", write(tmp_path / "a.yaml", text.replace("~x", "x"))).config
    folder = RunFolder.create(replace(config, output_dir=str(tmp_path), name="run"))
    again = parse("--config", str(folder.config_file)).config
    assert again == replace(config, output_dir=str(tmp_path))


def test_homes_are_found_wherever_a_path_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.yaml", "output_dir: ~/out\nmodel: {path: ~/model}\n")
    config = parse("--config=~/a.yaml", "--data.source=image_folder", "--data.root=~/images").config
    assert config.output_dir == f"{tmp_path}/out"
    assert (config.model.path, config.data.root) == (f"{tmp_path}/model", f"{tmp_path}/images")
    RunFolder.create(ExperimentConfig(output_dir=config.output_dir, name="run"))
    assert parse("--resume", "~/out/run").resumed is not None


def test_the_help_says_what_a_field_takes_and_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help_all")
    shown = " ".join(capsys.readouterr().out.split())
    assert "local_epochs" in shown
    assert "passes over a client's samples in a round (a whole number from 1 to 100,000)" in shown
    assert "a number from 0 to below 1; only with training.optimizer sgd)" in shown
    assert "only with method.name hetlora)" in shown


def test_an_error_is_one_line_whatever_it_quotes() -> None:
    text = str(InputError(f"name: found a\n\r\x1b[2Jb\u202e{'x' * 100_000}, expected\ta name"))
    assert text.isprintable()
    assert text.startswith("name: found a \\x1b[2Jb\\u202exxx")
    assert text.endswith("xxx, expected a name")
    assert len(text) < 2100


def check_error(arguments: list[str], message: str) -> None:
    """Parsing fails with one line that begins with `message`, in which `.*` is anything."""
    with pytest.raises(InputError) as caught:
        parse(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    assert re.match(".*".join(map(re.escape, message.split(".*"))), text), text


@pytest.mark.parametrize(
    ("count", "text"), [(0, ""), (2, "a, b"), (3, "a, b and 1 other"), (1002, "a, b and 1,000 others")]
)
def test_of_many_names_a_message_has_the_first(count: int, text: str) -> None:
    assert first_few([*"ab", *["x"] * count][:count], 2) == text


@pytest.mark.parametrize("text", ["1_0", "\N{ARABIC-INDIC DIGIT THREE}", "9" * 5000, "0", "ten", "1e2", ""])
def test_a_launchers_number_is_one_as_it_looks(text: str) -> None:
    with pytest.raises(InputError, match=r"^jobs: found '.*expected a whole number from 1 to 1,000$"):
        parse_option("jobs", text, int, whole(1, 1000))


def test_help_explains_every_field_without_waiting_for_torch() -> None:
    program = (
        "import sys\n"
        "from fedra_engine.commands.simulate import parse_request\n"
        "try:\n    parse_request(['--help_all'], '')\n"
        "finally:\n    assert not {'torch', 'datasets', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for text in ("--training.max_local_steps", "upper limit of a client's local steps", "--resume FOLDER"):
        assert text in done.stdout


def test_a_folder_may_have_an_equals_sign() -> None:
    folders = split_positional(["runs/fedra-training.lr=0.01-seed0", "--data.root", "there"])
    assert folders == (["runs/fedra-training.lr=0.01-seed0"], ["--data.root", "there"])
