"""The command line: `fedra <command>`, each command in the module of its name.

`main` runs a command; `PARSER` has its description and options (`bench` has none: its benchmarks parse their own
options). What cannot be used is an InputError. Commands may import everything else of the package, but torch only
after the arguments have been read, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module, metadata
from typing import NoReturn

from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.exit_codes import end, exit_code

COMMANDS = {
    "simulate": "train a foundation model with many clients, or resume an earlier run",
    "compare": "run methods with several seeds, and put their accuracies and costs side by side",
    "scale": "measure rounds of more and more clients, on one or several processes",
    "evaluate": "measure the accuracy of an earlier run",
    "export": "write the model of an earlier run, its adapters merged",
    "report": "make a page of what came of one or several runs",
    "bench": "measure executors, methods and kernels (in a clone of the repository)",
}


def main() -> NoReturn:
    """Run the command named by the arguments of this process, and end with its exit code."""
    end(exit_code(run))


def run() -> None:
    """Run the command named by the arguments of this process, or answer `--help` or `--version`."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        import_module(f"fedra_engine.commands.{name}").main(arguments)
    elif name in ("-h", "--help"):
        print("fedra <command> [--option value …]: federated LoRA tuning by many heterogeneous clients\n")
        print("\n".join(f"  {command:9} {text}" for command, text in COMMANDS.items()))
        print("\nfedra <command> --help lists the options of a command; fedra --version says which one this is.")
    elif name == "--version":
        version = "(a clone that is not installed)"
        with suppress(metadata.PackageNotFoundError):
            version = metadata.version("fedra-engine")
        print(f"fedra-engine {version}")
    else:
        from fedra_engine.config.fields import did_you_mean

        near = did_you_mean(name, list(COMMANDS))
        raise InputError(f"fedra: found no command {name!r}, expected one of {', '.join(COMMANDS)}{near}")
