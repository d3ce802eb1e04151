"""What the documentation, configurations, docstrings and comments name is there: files, modules, classes, options.

Also, what no test runs of the documentation's code is read and checked; `test_documented_code.py` runs the rest.
"""

from __future__ import annotations

import ast
import io
import os
import re
import runpy
import sys
import tokenize
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import microbench
from fedra_engine.commands.compare import parse_comparison
from fedra_engine.commands.scale import parse_scaling
from fedra_engine.commands.simulate import parse_request
from fedra_engine.config import ExperimentConfig
from fedra_engine.config.parsing import Parser
from fedra_engine.runtime.errors import InputError
from tests.documented import (
    BLOCKS,
    LANGUAGES,
    NOT_RUN,
    ROOT,
    RUN_ELSEWHERE,
    Started,
    engine_command,
    reason_not_to_run,
    started,
)

PICTURES: dict[str, Callable[[], str]] = runpy.run_path(str(ROOT / "docs" / "pictures" / "draw.py"))["PICTURES"]
CODE = ("fedra_engine", "kernels", "benchmarks", "launchers", "tests", "examples", "docs")
PACKAGES = {"fedra_engine": ROOT, "benchmarks": ROOT, "fedra_kernels": ROOT / "kernels"}
FOLDERS = ("", "fedra_engine", "kernels", "kernels/fedra_kernels", "docs", "configs", "configs/experiments")
"""Where a path may start, beside the folder of the file that names it."""

ELSEWHERE = {"PurePosixPath", "v_lin", "pre_classifier"}
"""Names of other libraries that stand in no code of this project."""
NO_OPTIONS = {"clients.samples", "training.learning_rate", "server.learning_rate", "method.sparse.weight"}
"""A variable, what others call an option, and an option of a method that an example registers."""
EXAMPLES = ("docs/results/h100/",)
"""A folder that is an example."""

Text = tuple[str, str]
"""Where it stands (file and line), and what it says."""

START = r"(?<![\w<>./*{-])"
PATH = rf"{START}[\w./-]+\.py\b|{START}(?:tests|docs|configs|benchmarks|launchers|fedra_engine|kernels)/[\w./-]+"

PYTHON = sorted(file for folder in CODE for file in (ROOT / folder).rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in PYTHON}
MARKDOWN = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTIONS = {
    line.split()[0].lstrip("-")
    for file in sorted((ROOT / "tests/commands/options").glob("*.txt"))
    for line in file.read_text(encoding="utf-8").splitlines()
    if line.startswith("--")
}


def place(file: Path, line: int) -> str:
    return f"{file.relative_to(ROOT)}:{line}"


def written() -> Iterator[Text]:
    """Lines of pages and configurations; docstrings and comments of the code."""
    for file in [*MARKDOWN, *sorted((ROOT / "configs").rglob("*.yaml")), *sorted((ROOT / "docs").rglob("*.ipynb"))]:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            yield place(file, number), line
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                yield place(file, node.lineno), node.value.value
        for token in tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline):
            if token.type == tokenize.COMMENT:
                yield place(file, token.start[0]), token.string


WRITTEN = list(written())


def quoted_in(texts: list[Text]) -> list[Text]:
    """What stands between backticks."""
    return [(where, name.strip()) for where, text in texts for name in re.findall(r"`+([^`]+)`+", text)]


QUOTED = quoted_in(WRITTEN)


def known_names() -> tuple[set[str], dict[str, set[str]], dict[str, set[str]]]:
    """All identifiers of the code; of every class, what stands in it; and its bases."""
    names, members, bases = set[str](), dict[str, set[str]](), dict[str, set[str]]()
    for tree in TREES.values():
        for node in ast.walk(tree):
            here = identifiers(node)
            names |= here
            if isinstance(node, ast.ClassDef):
                members.setdefault(node.name, set()).update(*(identifiers(part) for part in ast.walk(node)))
                bases.setdefault(node.name, set()).update(*(identifiers(base) for base in node.bases))
    return names, members, bases


def identifiers(node: ast.AST) -> set[str]:
    """The names that a node itself has, and a string that could be one."""
    found = [getattr(node, field, None) for field in ("name", "id", "attr", "arg", "asname")]
    if isinstance(node, ast.Constant):
        found.append(node.value)
    return {part for name in found if isinstance(name, str) for part in name.split(".") if part.isidentifier()}


NAMES, MEMBERS, BASES = known_names()


def has_member(owner: str, name: str) -> bool:
    """Whether the class, or one of its bases, has the name. Bases from elsewhere may have any."""
    if owner not in MEMBERS:
        return owner not in ("ABC", "Generic", "Protocol")
    return name in MEMBERS[owner] or any(has_member(base, name) for base in BASES[owner] if base != owner)


def exists(path: str, beside: Path) -> bool:
    """Whether a file or folder has this path from one of `FOLDERS`, or the end of its path is this one."""
    starts = [beside, *(ROOT / folder for folder in FOLDERS)]
    return any((start / path).exists() for start in starts) or (
        path.endswith(".py") and any(file.as_posix().endswith(f"/{path}") for file in PYTHON)
    )


def module_has(dotted: str) -> bool:
    """Whether `fedra_engine.models.task.Task` (a package, module, or a name in one) is there."""
    first, *rest = dotted.split(".")
    here = PACKAGES[first] / first
    for index, part in enumerate(rest):
        if (here / part).is_dir():
            here = here / part
            continue
        file = here / f"{part}.py"
        if file.exists():
            rest = rest[index + 1 :]
        else:
            file, rest = here / "__init__.py", rest[index:]
        top = {name for node in ast.walk(TREES[file]) for name in identifiers(node)}
        return all(name in top for name in rest)
    return here.is_dir()


def missing_files() -> Iterator[str]:
    for where, quoted in QUOTED:
        beside = (ROOT / where.rpartition(":")[0]).parent
        for path in re.findall(PATH, quoted):
            if path not in EXAMPLES and not exists(path, beside):
                yield f"{where}: {path}"


def missing_links() -> Iterator[str]:
    for where, text in WRITTEN:
        file = ROOT / where.rpartition(":")[0]
        if file.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            page = file if not path else file.parent / path
            if path.startswith(("http:", "https:")):
                continue
            if not page.exists() or (anchor and anchor not in anchors(page)):
                yield f"{where}: {target}"


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_names() -> Iterator[str]:
    for where, quoted in QUOTED:
        for dotted in re.findall(r"(?<![\w./-])(?:fedra_engine|fedra_kernels|benchmarks)(?:\.\w+)+(?![\w/])", quoted):
            if not module_has(dotted):
                yield f"{where}: {dotted}"
        if re.fullmatch(r"[a-z]+(?:_[a-z]+)+(?:\(\))?", quoted) and quoted.rstrip("()") not in NAMES | ELSEWHERE:
            yield f"{where}: {quoted}"
        if match := re.fullmatch(r"(_?[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*)(?:\.(\w+))?(?:\(.*\))?", quoted):
            owner, member = match.groups()
            if owner in MEMBERS and member and not has_member(owner, member):
                yield f"{where}: {owner}.{member}"
            if owner not in NAMES | ELSEWHERE and re.search("[a-z][A-Z]", owner):
                yield f"{where}: {owner}"


def missing_options() -> Iterator[str]:
    groups = {option.partition(".")[0] for option in OPTIONS if "." in option}
    for where, quoted in QUOTED:
        for option in re.findall(r"(?<![\w./-])(?:--)?([a-z]\w*(?:\.[a-z]\w*)+)(?![\w./(])", quoted):
            is_group = any(known.startswith(f"{option}.") for known in OPTIONS)
            if option.partition(".")[0] in groups and option not in OPTIONS | NO_OPTIONS and not is_group:
                yield f"{where}: {option}"


@pytest.mark.parametrize("missing", [missing_files, missing_links, missing_names, missing_options])
def test_what_is_named_exists(missing: Callable[[], Iterator[str]]) -> None:
    assert list(missing()) == []


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        (missing_files, "`fedra_engine/execution/no_such_module.py`"),
        (missing_files, "as `pytest tests/no_such_folder` does"),
        (missing_links, "[page](no_such_page.md)"),
        (missing_links, "[heading](design.md#no-such-heading)"),
        (missing_names, "`fedra_engine.config.NoSuchConfig`"),
        (missing_names, "`NoSuchReporter`"),
        (missing_names, "`Method.no_such_hook`"),
        (missing_names, "`no_such_function()`"),
        (missing_options, "`--training.no_such_option 3`"),
    ],
)
def test_what_is_missing_is_found(
    missing: Callable[[], Iterator[str]], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "WRITTEN", [("docs/page.md:1", text)])
    monkeypatch.setitem(globals(), "QUOTED", quoted_in([("docs/page.md:1", text)]))
    assert len(list(missing())) == 1


PARSERS: dict[str, Callable[[list[str]], object]] = {
    "simulate": lambda rest: parse_request(rest, ""),
    "compare": parse_comparison,
    "scale": parse_scaling,
    "bench": microbench._parse,
}
"""What reads the arguments of a command; those of the others need a finished run."""
SHELL = [block for block in BLOCKS if block.language in ("sh", "bash")]


@pytest.fixture
def page_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: what the shell of a page looks for, and folders with the names of the reader's."""
    for name in (".venv/bin", "wheels", "examples", "PACK", "PACS", "VIT", "EARLIER"):
        (tmp_path / name).mkdir(parents=True)
    for name in (".venv/bin/activate", "wheels/some.whl"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    # Launchers set both for the processes that they start.
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return tmp_path


def test_every_block_of_code_says_its_language() -> None:
    assert [str(block) for block in BLOCKS if block.language not in LANGUAGES] == []


def test_what_is_not_run_is_read_and_checked(page_folder: Path) -> None:
    """Every entry of `NOT_RUN` stands on a page, and so does every one of `RUN_ELSEWHERE`."""
    reasons = set()
    for block in SHELL:
        for command in started(block.code, page_folder):
            if (reason := reason_not_to_run(command)) is not None:
                reasons.add(reason)
                check(command)
    for block in BLOCKS:
        if block.language == "yaml":
            reasons |= set(map(reason_not_to_run, block.code.split("\n"))) - {None}
            (page_folder / "block.yaml").write_text(block.code)
            Parser(ExperimentConfig).parse(["--config", "block.yaml"])
    assert reasons == set(NOT_RUN.values())
    for begin, test in RUN_ELSEWHERE.items():
        assert any(block.code.startswith(begin) for block in BLOCKS), begin
        assert (ROOT / test).is_file()


def test_whole_commands_in_the_text_are_checked_too(page_folder: Path) -> None:
    whole = [text.split() for where, text in QUOTED if ".md:" in where and not set("<…") & set(text)]
    commands = [words for words in whole if len(words) > 1 and not words[-1].startswith("-")]
    checked = [each for each in commands if each[0] == "make" or engine_command(each)]
    for each in checked:
        check(Started(each, page_folder))
    assert len(checked) > 10


def check(command: Started) -> None:
    """Read the options of a command as the program itself does; SystemExit or InputError if one cannot be used."""
    program, *arguments = command.command
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
    for name, value in pairwise(arguments):
        assert name != "--config_file" or (ROOT / value).is_file(), command
    if (found := engine_command(command.command)) is not None:
        name, rest = found
        if name in PARSERS and rest:
            PARSERS[name](rest)
    elif program == "python" and arguments[0].startswith("launchers/"):
        runpy.run_path(str(ROOT / arguments[0]))["_parse"](arguments[1:])


@pytest.mark.parametrize(
    "wrong", ["make no-such-target", "fedra bench no-such-benchmark", "srun launchers/simulate.py --rounds none"]
)
def test_what_cannot_be_used_is_found(wrong: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, InputError, SystemExit)):
        check(Started(wrong.split(), tmp_path))


@pytest.mark.parametrize("file", PICTURES)
def test_a_picture_is_as_its_script_draws_it(file: str) -> None:
    assert (ROOT / "docs" / "pictures" / file).read_text(encoding="utf-8") == PICTURES[file]()
