"""What keeps the code readable: short modules and functions, few modules at the top, docstrings where users look."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("fedra_engine", "kernels", "benchmarks", "launchers")
MODULE_LINES, FUNCTION_LINES, TOP_LEVEL_MODULES = 400, 60, 6

Function = (ast.FunctionDef, ast.AsyncFunctionDef)
TREES = {
    file: ast.parse(file.read_text(encoding="utf-8"))
    for folder in FOLDERS
    for file in sorted((ROOT / folder).rglob("*.py"))
}


def place(file: Path, node: ast.AST | None = None) -> str:
    line = "" if node is None else f":{node.lineno}"
    return f"{file.relative_to(ROOT)}{line}"


def last_name(node: ast.expr) -> str:
    """`Method` of `Method`, `base.Method`, `Method[int]` and `Method()`."""
    while isinstance(node, ast.Subscript | ast.Call):
        node = node.value if isinstance(node, ast.Subscript) else node.func
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def decorators(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    return {last_name(decorator) for decorator in node.decorator_list}


def bases_by_class() -> dict[str, tuple[set[str], set[str]]]:
    """Of every class of the project, by name: the names of its bases, and its methods that have a docstring."""
    classes: dict[str, tuple[set[str], set[str]]] = {}
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases, documented = classes.setdefault(node.name, (set(), set()))
                bases |= {last_name(base) for base in node.bases}
                documented |= {
                    part.name for part in node.body if isinstance(part, Function) and ast.get_docstring(part)
                }
    return classes


CLASSES = bases_by_class()


def documented_above(name: str, method: str, seen: frozenset[str] = frozenset()) -> bool:
    """Whether a base of class `name`, near or far, has `method` with a docstring."""
    bases = CLASSES.get(name, (set(), set()))[0] - seen
    return any(
        method in CLASSES.get(base, (set(), set()))[1] or documented_above(base, method, seen | bases) for base in bases
    )


def undocumented(body: list[ast.stmt], owner: str = "", path: str = "") -> Iterator[tuple[ast.stmt, str]]:
    """Public definitions in a module's or class's body, and in its public classes', without a docstring."""
    for node in body:
        if not isinstance(node, (ast.ClassDef, *Function)) or node.name.startswith("_"):
            continue
        inherits = isinstance(node, Function) and (
            (owner and (node.name == "forward" or documented_above(owner, node.name)))
            or decorators(node) & {"overload", "setter"}
        )
        if not inherits and not (ast.get_docstring(node) or "").strip():
            yield node, path + node.name
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, node.name, f"{path}{node.name}.")


def test_modules_can_be_read_in_one_go() -> None:
    lengths = {place(file): len(file.read_text(encoding="utf-8").splitlines()) for file in TREES}
    assert {name: lines for name, lines in lengths.items() if lines > MODULE_LINES} == {}


def test_functions_do_one_thing() -> None:
    """Triton's kernels are the exception: what they call is inlined, and their parameters alone fill a page."""
    assert [
        f"{place(file, node)} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, Function)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= FUNCTION_LINES
        and "jit" not in decorators(node)
    ] == []


def test_all_that_is_public_has_a_docstring() -> None:
    """Overrides of a method that its base documents, and `forward`, have that of their base."""
    modules = [place(file) for file, tree in TREES.items() if not ast.get_docstring(tree)]
    definitions = [
        f"{place(file, node)} {name}" for file, tree in TREES.items() for node, name in undocumented(tree.body)
    ]
    assert modules + definitions == []


def test_few_modules_stand_beside_the_rooms() -> None:
    modules = {path.name for path in (ROOT / "fedra_engine").glob("*.py")} - {"__init__.py"}
    assert len(modules) <= TOP_LEVEL_MODULES, sorted(modules)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("class A:\n    def f(self): ...", ["A", "A.f"]),
        ("def _private(): ...", []),
        ('class A(Callback):\n    """Doc."""\n    def on_round(self): ...\n    def other(self): ...', ["A.other"]),
        ('class A:\n    """Doc."""\n    def forward(self): ...\n    def __len__(self): ...', []),
        ("def forward(): ...", ["forward"]),
    ],
)
def test_what_lacks_a_docstring_is_found(source: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLASSES, "A", ({"Callback"} if "Callback" in source else set(), set()))
    assert [name for _, name in undocumented(ast.parse(source).body)] == found
