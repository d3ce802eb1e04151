"""Lists, and downloads, the wheels to carry to a machine that reaches no package registry.

python -m pip freeze > machine.txt                                    # on that machine
python launchers/offline_wheels.py machine.txt --download wheels      # here
python -m pip install --no-index --no-deps --target site wheels/*.whl # there, with the folder; then PYTHONPATH=site
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedra_engine.runtime.exit_codes import end, exit_code, unwound_by_signals

ROOT = Path(__file__).resolve().parents[1]
# The benchmarks lie beside the package and are not installed with it.
sys.path.insert(0, str(ROOT))


def main() -> None:
    """List the wheels; download them if asked to.

    Raises:
        InputError: the list of what is installed cannot be read, the folder is in use, or pip finds no wheels.
    """
    from benchmarks.offline_wheels import Target, download, missing_requirements, read_installed, resolve
    from fedra_engine.runtime.errors import InputError, one_line
    from fedra_engine.runtime.files import check_unused

    options = _parse(sys.argv[1:])
    if options.download is not None:
        check_unused("download", options.download)
    try:
        lines = options.installed.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"installed: cannot read {options.installed} ({one_line(error)}), expected a text") from error
    target = Target(read_installed(lines), options.python, tuple(options.platform))
    with unwound_by_signals():
        wheels = resolve(missing_requirements((ROOT / "pyproject.toml").read_text(), target.installed), target)
        sizes = {} if options.download is None else download(wheels, target, options.download)
    if options.download is None:
        for wheel in wheels:
            print(wheel)
        if not wheels:
            print("nothing is missing", file=sys.stderr)
        return
    for name, size in sizes.items():
        print(f"{size / 2**20:8.2f} MiB  {name}")
    print(f"{sum(sizes.values()) / 2**20:8.2f} MiB  in {len(sizes)} wheels in {options.download}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    from benchmarks.line_parser import LineParser, existing_file, path
    from benchmarks.offline_wheels import PLATFORMS

    parser = LineParser(description=__doc__)
    parser.add_argument("installed", type=existing_file, help="file with what `pip freeze` prints on that machine")
    parser.add_argument("--python", default="3.12", help="that machine's Python (3.12 if not given)")
    parser.add_argument(
        "--platform", nargs="+", default=list(PLATFORMS), help=f"its platform tags ({' '.join(PLATFORMS)})"
    )
    parser.add_argument(
        "--download", type=path, metavar="FOLDER", help="put the wheels into a new folder and print their sizes"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    end(exit_code(main))
