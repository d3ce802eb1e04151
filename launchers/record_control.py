"""Keeps the accuracies of a full-depth run, for the `control` row of later runs with the same setting.

python launchers/simulate.py --method.name alllarge --name control
python launchers/record_control.py runs/control
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fedra_engine.cli import read_config
from fedra_engine.exit_codes import end, exit_code
from fedra_engine.reporting.control import record_control
from fedra_engine.reporting.run_folder import RunFolder


def main() -> None:
    """Record the run that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a finished run with method.name alllarge")
    folder = RunFolder.open(parser.parse_args().run)
    record_control(read_config(folder.config_file), folder)


if __name__ == "__main__":
    end(exit_code(main))
