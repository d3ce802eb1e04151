"""The options of every command as users know them: a change of one changes a file beside this test.

`python tests/commands/test_command_line.py` writes the files anew.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

OPTIONS = Path(__file__).parent / "options"
PARSED = ("simulate", "compare", "scale", "evaluate", "export", "report")
"""Commands whose options the engine's parser reads."""
BENCHMARKS = (
    "executors",
    "peers",
    "methods",
    "lanes",
    "batches",
    "watching",
    "profile",
    "start",
    "kernels",
    "step",
    "resources",
)
PROGRAM = """
import sys
from importlib import import_module

from fedra_engine.config import help

parser = import_module(f"fedra_engine.commands.{sys.argv[1]}").PARSER
for row in (*help.own_rows(parser), *help.field_rows(parser)):
    print(" ".join(f"--{row.name} {row.value}: {row.takes}".split()).rstrip(" :"))
"""


def run(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, where no other test has registered anything."""
    environment = os.environ | {"COLUMNS": "1000"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=folder)


def fedra(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return run("-m", "fedra_engine", *arguments, folder=folder)


def options_of(command: str) -> str:
    """Name, default and values of each option, a line each."""
    if command != "bench":
        return run("-c", PROGRAM, command).stdout
    shown = {name: fedra("bench", name, "--help").stdout.splitlines() for name in BENCHMARKS}
    return "".join(
        f"{name} {' '.join(line.split())}\n" for name, lines in shown.items() for line in lines if line[:4] == "  --"
    )


@pytest.mark.parametrize("command", [*PARSED, "bench"])
def test_the_options_of_a_command_are_those_on_record(command: str) -> None:
    assert options_of(command).splitlines() == (OPTIONS / f"{command}.txt").read_text().splitlines()


def test_the_commands_are_listed_and_the_version_is_told() -> None:
    shown = fedra("--help")
    assert shown.returncode == 0
    for command in (*PARSED, "bench"):
        assert f"\n  {command} " in shown.stdout
    assert fedra().stdout == shown.stdout
    assert fedra("--version").stdout.startswith("fedra-engine ")


def test_bench_lists_the_benchmarks() -> None:
    shown = fedra("bench")
    assert shown.returncode == 0
    assert set(BENCHMARKS) <= {line.split()[0] for line in shown.stdout.splitlines() if line.startswith("    ")}


def test_an_unknown_command_is_one_line_with_the_nearest() -> None:
    done = fedra("simulat")
    assert done.returncode == 2
    assert done.stderr.startswith("error: fedra: found no command 'simulat', expected one of simulate, compare")
    assert done.stderr.endswith("(did you mean simulate?)\n")


def test_the_short_help_has_what_is_set_first_and_says_where_the_rest_is() -> None:
    short, whole = fedra("simulate", "--help").stdout, fedra("simulate", "--help_all").stdout
    assert "fedra simulate --config pacs_vit_s14" in short
    assert "--method.name fedra" in short
    assert "--method.hetlora.penalty" not in short
    assert "--help_all lists all" in short
    for name in ("data.image_size", "lora.target_modules", "model.head_init", "name", "evaluate_every", "report_to"):
        assert f"\n  --{name} " in short
    # A path is a path, whatever its limits are.
    assert "--output_dir runs\n        folder that receives run folders (a path)\n" in short
    assert "255 bytes" not in whole
    assert "--dry-run" not in whole
    assert "--method.hetlora.penalty 0.01" in whole


@pytest.mark.parametrize(
    ("command", "refused"),
    [
        ("compare", ["seed", "name", "method.name"]),
        ("scale", ["data.clients", "early_stopping.patience"]),
        ("evaluate", ["data.image_size", "data.partition", "data.min_samples", "data.augmentation"]),
    ],
)
def test_the_help_lists_no_field_that_the_command_refuses(command: str, refused: list[str]) -> None:
    shown = fedra(command, "--help_all").stdout
    assert "\n  --data.source " in shown
    assert not [name for name in refused if f"\n  --{name} " in shown]


def test_fields_that_replace_those_of_a_run_have_no_default_of_their_own() -> None:
    shown = fedra("evaluate", "--help").stdout
    assert "\nFields that replace the run's:\n  --data.source VALUE\n" in shown
    assert "digits\n" not in shown


@pytest.mark.parametrize("command", ["report", "export"])
def test_a_command_without_fields_has_one_help(command: str) -> None:
    shown = fedra(command, "--help").stdout
    assert "--help_all" not in shown
    assert fedra(command, "--help_all").stdout == shown


MODULE = """
from dataclasses import dataclass

from fedra_engine.config import register_choice, register_method_options
from fedra_engine.config.options import number, option


@dataclass
class Options:
    \"\"\"Options of a method.

    Args:
        weight: how much of it.
    \"\"\"

    weight: float = option(0.5, number(0, 1))


register_method_options("mine", Options)
register_choice("data.source", "shelf")
"""


def test_what_an_imported_module_registers_are_options_like_any_others(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    begin = ["simulate", "--import", "mine"]
    shown = fedra(*begin, "--help_all", folder=tmp_path).stdout
    assert (
        "--method.mine.weight 0.5\n        how much of it (a number from 0 to 1; only with method.name mine)" in shown
    )
    given = ["--method.name=mine", "--method.mine.weight=0.25", "--data.source=shelf", "--data.root=x"]
    printed = fedra(*begin, *given, "--print_config", folder=tmp_path).stdout
    assert "  mine:\n    weight: 0.25\n" in printed
    (tmp_path / "c.yaml").write_text(printed)
    assert fedra(*begin, "--config=c.yaml", "--print_config", folder=tmp_path).stdout == printed
    refused = fedra(*begin, "--method.mine.weight=2", folder=tmp_path)
    assert refused.stderr == "error: method.mine.weight: found 2.0, expected a number from 0 to 1\n"
    refused = fedra(*begin, "--method.mine.weight=0.25", folder=tmp_path)
    assert "with method.name fedra, where it does nothing" in refused.stderr
    assert "found an unknown field" in fedra("simulate", "--config=c.yaml", folder=tmp_path).stderr


WITHOUT_TRACKERS = """
import sys
from importlib import import_module

from fedra_engine.config import validation

validation.find_spec = lambda name: None
try:
    import_module(f"fedra_engine.commands.{sys.argv[1]}").main(["--report_to", "wandb", *sys.argv[2:]])
except ValueError as error:
    print(error, "torch" in sys.modules)
"""


@pytest.mark.parametrize("command", [["simulate"], ["compare", "--methods", "fedra"]])
def test_a_missing_tracker_is_refused_before_torch_is_imported(command: list[str], tmp_path: Path) -> None:
    done = run("-c", WITHOUT_TRACKERS, *command, folder=tmp_path)
    assert done.stdout == (
        "report_to: found wandb, which is not installed, expected one that is (pip install wandb, or "
        "'fedra-engine[trackers]' for all) False\n"
    )


REFUSED = """
import sys
from importlib import import_module

try:
    import_module(f"fedra_engine.commands.{sys.argv[1]}").main(sys.argv[2:])
except ValueError as error:
    print(error, "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["simulate", "--name", "taken"],
            "name: found a run in runs/taken, expected a new name (or --resume runs/taken)",
        ),
        (
            ["simulate", "--data.source", "image_folder", "--data.root", "{here}/potos"],
            "data.root: found nothing at '{here}/potos', expected a folder or file (did you mean '{here}/photos'?)",
        ),
        (
            ["simulate", "--data.source", "image_folder", "--data.root", "./tool/photos"],
            "data.root: found nothing at './tool/photos', expected a folder or file",
        ),
        (
            ["compare", "--methods", "fedra", "--model.path", "./nowhere"],
            "model.path: found nothing at './nowhere', expected a folder or file",
        ),
    ],
)
def test_what_a_look_at_the_disk_shows_is_refused_before_torch_is_imported(
    command: list[str], message: str, tmp_path: Path
) -> None:
    for folder in ("runs/taken", "photos"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "tool").touch(mode=0o755)
    done = run("-c", REFUSED, *(each.format(here=tmp_path) for each in command), folder=tmp_path)
    assert done.stdout == f"{message.format(here=tmp_path)} False\n"


def test_a_dry_run_reports_to_no_tracker(tmp_path: Path) -> None:
    done = run("-c", WITHOUT_TRACKERS, "simulate", "--dry_run", "--log_level", "warning", folder=tmp_path)
    assert (done.stdout.count("report_to"), done.returncode) == (0, 0)
    assert "capacity" in done.stdout


def test_a_dry_run_refuses_cuda_graphs_before_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    done = fedra("simulate", "--dry_run", "--quiet", "--execution.cuda_graphs=on", folder=tmp_path)
    expected = "error: execution.cuda_graphs: found on with the device cpu, expected off\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


if __name__ == "__main__":
    for name in (*PARSED, "bench"):
        (OPTIONS / f"{name}.txt").write_text(options_of(name))
