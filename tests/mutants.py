"""Changes single operators, constants and returned values of the engine, and looks whether tests notice.

`python -m tests.mutants --count 60 --seed 0` draws changes in methods/, federation/ and execution/. Each is made in a
copy of the checkout, and runs the tests of its module and the exactness tests. A mutant that no test notices is listed
as survived; some are harmless, the others show what is not tested.
"""

from __future__ import annotations

import argparse
import ast
import copy
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("methods", "federation", "execution")
EXACTNESS = tuple(f"tests/execution/test_{name}.py" for name in ("exactness", "assignments", "local_terms"))
"""A sweep equals sub-models trained alone, whatever is assigned to clients, and with any local loss."""
LIBRARIES = ("datasets", "hypothesis", "peft", "sklearn.cluster", "transformers.modeling_utils", "triton")
"""What takes long to import."""
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
    """The test files of the module's name, those of its package that import it, and those of exactness.

    Where there are none of the first two, all of its package. A test file may be in another package: local terms belong
    to the federation, and are tested in the executors.
    """
    of_package, dotted = ROOT / "tests" / module.parent.name, ".".join(module.relative_to(ROOT).with_suffix("").parts)
    named = [of_package / f"test_{module.stem}.py"]
    if not named[0].exists():
        named = sorted((ROOT / "tests").rglob(named[0].name))
    importing = [file for file in sorted(of_package.glob("test_*.py")) if re.search(rf"\b{dotted}\b", file.read_text())]
    found = [file.relative_to(ROOT).as_posix() for file in [*named, *importing] or [of_package]]
    return tuple(dict.fromkeys([*found, *EXACTNESS]))


def outcome(checkout: Path, tests: tuple[str, ...], limit: float) -> str:
    """`survived` if all tests pass in this checkout, `killed` if one does not, or `timed out` after `limit` seconds."""
    # Forked, so that the libraries need not be imported again.
    process = multiprocessing.get_context("fork").Process(target=_run, args=(checkout, tests))
    process.start()
    process.join(limit)
    if process.is_alive():
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return "timed out"
    return "killed" if process.exitcode else "survived"


def _run(checkout: Path, tests: tuple[str, ...]) -> None:
    """Run tests of another checkout in this process, and end it with their exit code."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    for name in list(sys.modules):
        if name.partition(".")[0] in ("tests", "fedra_engine", "fedra_kernels"):
            del sys.modules[name]
    paths = [str(checkout), str(checkout / "kernels")]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    os.chdir(checkout)
    sys.exit(pytest.main(["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests]))


@cache
def passes(checkout: Path, test: str) -> bool:
    """Whether the tests of a file pass without a change."""
    return outcome(checkout, (test,), limit=600) == "survived"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=60, help="mutants to try")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--limit", type=float, default=90, help="seconds for the tests of a mutant")
    chosen = parser.parse_args()
    # The first sets what the others read when they are imported.
    for name in ("tests.conftest", *LIBRARIES):
        import_module(name)
    # A file that is changed twice in a second must be read again.
    sys.dont_write_bytecode = True
    modules = [file for package in PACKAGES for file in sorted((ROOT / "fedra_engine" / package).glob("*.py"))]
    every = [mutant for module in modules for mutant in mutants(module)]
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        checkout = Path(folder)
        left_out = shutil.ignore_patterns(".*", "__pycache__", "runs")
        shutil.copytree(ROOT, checkout, ignore=left_out, dirs_exist_ok=True)
        for mutant in random.Random(chosen.seed).sample(every, min(chosen.count, len(every))):
            place, tests = mutant.module.relative_to(ROOT), tests_of(mutant.module)
            if all(passes(checkout, test) for test in tests):
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
