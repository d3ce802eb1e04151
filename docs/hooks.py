"""What the site makes while it is built: its front page from the README, and the pages of options from the engine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from fedra_engine.commands import COMMANDS
from fedra_engine.config import DeviceConfig, ExperimentConfig
from fedra_engine.config.help import Row, field_rows, own_rows
from fedra_engine.config.parsing import Parser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OPTIONS = "<!-- options -->"
"""Where a page gets what the engine knows of them."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
"""A link or a picture: its mark, text, path and heading. Addresses elsewhere have a colon."""
UNPARSED = "bench"
"""The command whose options the benchmarks read."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the front page."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the options, and turn links to what the site does not have into links to the repository, or into text."""
    if page.file.src_uri == "configuration.md":
        markdown = markdown.replace(OPTIONS, "\n".join(configuration()))
    elif page.file.src_uri == "commands.md":
        markdown = markdown.replace(OPTIONS, "\n".join(commands()))
    beside = ROOT if page.file.src_uri == "index.md" else (DOCS / page.file.src_uri).parent
    parts = re.split(r"(^ *```.*?^ *```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    # The others are code.
    parts[::2] = [LINK.sub(lambda link: _link(link, beside, page, config), part) for part in parts[::2]]
    return "".join(parts)


def _link(link: re.Match[str], beside: Path, page: Page, config: MkDocsConfig) -> str:
    """A relative link or picture of a page whose source is in the folder `beside`, as the site has it."""
    mark, text, path, anchor = link.groups(default="")
    target = (beside / path).resolve()
    if target == ROOT / "README.md":
        target = DOCS / "index.md"
    if target.is_relative_to(DOCS) and target.suffix and target.suffix != ".py":
        if text.endswith(".md") and target.is_file():
            # The name of a file says enough in the repository, its title here.
            text = target.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        return f"{mark}[{text}]({os.path.relpath(target, (DOCS / page.file.src_uri).parent)}{anchor})"
    inside = target.relative_to(ROOT)
    return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{inside}{anchor})" if config.repo_url else text


def configuration() -> Iterator[str]:
    """Lines of the reference of all fields, a heading for each."""
    rows = list(field_rows(Parser(ExperimentConfig)))
    devices = [row._replace(name=f"clients.devices[i].{row.name}") for row in field_rows(Parser(DeviceConfig))]
    place = next(index for index, row in enumerate(rows) if row.name == "clients.devices")
    rows[place + 1 : place + 1] = devices
    group = ""
    for row in rows:
        first = row.name.rpartition(".")[0].partition(".")[0]
        if first != group:
            group = first
            yield f"\n## `{group}`\n"
        yield from _option(row)


def commands() -> Iterator[str]:
    """Lines of the reference of what each command does and which options it has beside the fields."""
    for name, purpose in COMMANDS.items():
        yield f"\n## `fedra {name}`\n"
        if name == UNPARSED:
            yield f"To {purpose}: `fedra {name} --help` lists them."
            continue
        parser = import_module(f"fedra_engine.commands.{name}").PARSER
        yield from _description(parser.description)
        yield "\n| option | value | what it does |\n|---|---|---|"
        for row in own_rows(parser):
            takes = f" ({row.takes})" if row.takes else ""
            yield f"| `--{row.name}` | {_cell(row.value)} | {_prose(row.meaning + takes, in_table=True)} |"


def _description(text: str) -> Iterator[str]:
    """A command's description; its examples are the lines that are indented."""
    for part in text.strip().split("\n\n"):
        if part.startswith("  "):
            lines = "\n".join(line.strip() for line in part.splitlines())
            yield f"\n```sh\n{lines}\n```\n"
        else:
            yield f"{_prose(part)}\n"


def _option(row: Row) -> Iterator[str]:
    yield f"\n### `{row.name}` {{#{row.name}}}\n"
    yield f"{_prose(row.meaning[:1].upper() + row.meaning[1:])}.\n"
    yield f"Default: `{row.value}` · {_prose(row.takes)}"


def _prose(text: str, *, in_table: bool = False) -> str:
    """A text of the engine as Markdown: what looks like HTML is none, and pages are links."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [
        re.sub(r"docs/([\w/]+)\.md", r"[\g<0>](\1.md)", part.replace("<", "&lt;").replace("*", r"\*"))
        for part in parts[::2]
    ]
    joined = "".join(parts)
    return joined.replace("|", r"\|") if in_table else joined


def _cell(value: str) -> str:
    return f"`{value}`" if value else ""
