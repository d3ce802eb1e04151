"""Changes single operators, constants and returned values of the engine, and looks whether tests notice.

`python -m tests.mutants --count 60 --seed 0` draws changes in methods/, federation/ and execution/. Each is made in a
copy of the checkout, and runs the tests of its module and the exactness tests. A mutant that no test notices is listed
as survived; some are harmless, the others show what is not tested.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("methods", "federation", "execution")
EXACTNESS = "tests/execution/test_exactness.py"
SWAPS = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.Add, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
}


class Mutant(NamedTuple):
    """A change of one node: its module, place (line, and bytes of the file), and the texts before and after."""

    module: Path
    line: int
    start: int
    end: int
    before: str
    after: str


def changed(node: ast.AST) -> ast.AST | None:
    """A copy of the node with another operator, constant or returned value; None if there is nothing to change."""
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare) and type(new.ops[0]) in SWAPS:
        new.ops[0] = SWAPS[type(new.ops[0])]()
    elif isinstance(new, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(new.op) in SWAPS:
        new.op = SWAPS[type(new.op)]()
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, ast.Not | ast.USub):
        return new.operand
    elif isinstance(new, ast.Constant) and isinstance(new.value, bool):
        new.value = not new.value
    elif isinstance(new, ast.Constant) and isinstance(new.value, int | float):
        new.value = new.value + 1 if isinstance(new.value, int) else new.value * 2 or 1.0
    elif isinstance(new, ast.Return) and not (new.value is None or isinstance(new.value, ast.Constant)):
        new.value = ast.Constant(None)
    else:
        return None
    return new


def nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All below `node` that a test could notice: no annotations, decorators, texts, errors, checks and assertions."""
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            skipped = (
                name in ("annotation", "returns", "decorator_list")
                or isinstance(child, ast.JoinedStr | ast.Raise | ast.Assert)
                or (isinstance(child, ast.keyword) and child.arg == "strict")
            )
            if isinstance(child, ast.AST) and not skipped:
                yield child
                yield from nodes(child)


def mutants(module: Path) -> list[Mutant]:
    """All changes of a module."""
    source = module.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node in nodes(ast.parse(source)):
        if (new := changed(node)) is not None:
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            after = ast.unparse(new) if isinstance(new, ast.stmt | ast.Constant) else f"({ast.unparse(new)})"
            found.append(Mutant(module, node.lineno, start, end, ast.unparse(node), after))
    return found


def tests_of(module: Path) -> tuple[str, ...]:
    """The test file of a module's name, else those of its room that import it, else all of its room; and exactness.

    The file may stand in another room: local terms belong to the federation, and executors are what they are tested in.
    """
    of_room, name = ROOT / "tests" / module.parent.name, f"test_{module.stem}.py"
    own = [of_room / name] if (of_room / name).exists() else sorted((ROOT / "tests").rglob(name))
    if not own:
        dotted = ".".join(module.relative_to(ROOT).with_suffix("").parts)
        own = [file for file in sorted(of_room.glob("test_*.py")) if dotted in file.read_text()] or [of_room]
    return tuple(dict.fromkeys([*(file.relative_to(ROOT).as_posix() for file in own), EXACTNESS]))


def outcome(checkout: Path, tests: tuple[str, ...], limit: float) -> str:
    """`survived` if all tests pass in this checkout, `killed` if one does not, or `timed out` after `limit` seconds."""
    path = os.pathsep.join([str(checkout), str(checkout / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=checkout, env=environment, start_new_session=True, **quiet)
    try:
        return "killed" if process.wait(limit) else "survived"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "timed out"


outcome_without_a_change = cache(outcome)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=60, help="mutants to try")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--limit", type=float, default=90, help="seconds for the tests of a mutant")
    chosen = parser.parse_args()
    modules = [file for room in ROOMS for file in sorted((ROOT / "fedra_engine" / room).glob("*.py"))]
    every = [mutant for module in modules for mutant in mutants(module)]
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        checkout = Path(folder)
        left_out = shutil.ignore_patterns(".*", "__pycache__", "runs")
        shutil.copytree(ROOT, checkout, ignore=left_out, dirs_exist_ok=True)
        for mutant in random.Random(chosen.seed).sample(every, min(chosen.count, len(every))):
            place, tests = mutant.module.relative_to(ROOT), tests_of(mutant.module)
            if outcome_without_a_change(checkout, tests, 5 * chosen.limit) == "survived":
                source = mutant.module.read_bytes()
                (checkout / place).write_bytes(source[: mutant.start] + mutant.after.encode() + source[mutant.end :])
                result = outcome(checkout, tests, chosen.limit)
                (checkout / place).write_bytes(source)
            else:
                result = "not tried (its tests fail without a change)"
            counts[result] = counts.get(result, 0) + 1
            print(f"{result}  {place}:{mutant.line}  {mutant.before}  ->  {mutant.after}", flush=True)
    print(", ".join(f"{count} {result}" for result, count in counts.items()), f"of {len(every)} possible")


if __name__ == "__main__":
    main()
