"""What users named is shown as it is: it is no markup, and cannot steer a terminal."""

import io

import pytest
from rich.table import Table

from fedra_engine.runtime.errors import printable
from fedra_engine.runtime.tables import (
    PlainConsole,
    duration_text,
    markdown_code,
    markdown_table,
    markdown_text,
    rich_table,
    table_text,
)

NAMES = ["[/red]", "[bold]x[/bold]", "[link=a]", ":smile:", "\\[a]", "$x$", "a|b"]


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_that_is_printed_is_markup(terminal: bool) -> None:
    output = io.StringIO()
    console = PlainConsole(file=output, force_terminal=terminal, width=200)
    table = Table(*NAMES, title=" ".join(NAMES))
    table.add_row(*NAMES)
    console.print(table)
    console.print(*NAMES, 12, sep="\n")
    assert all(output.getvalue().count(name) >= 4 for name in NAMES)


def test_control_characters_are_shown() -> None:
    output = io.StringIO()
    console = PlainConsole(file=output, force_terminal=True, width=200)
    console.print("a\x1b[31m\nb\r", "\x07\udcff", "\u202edcba")
    assert output.getvalue() == "a\\x1b[31m\nb\\r \\x07\\udcff \\u202edcba\n"
    assert table_text(rich_table([["a\nb"], ["c\x1b[1A"]])) == "a\\nb\nc\\x1b[1A"
    assert printable("中文\u3000é a\u200cb") == "中文\u3000é a\u200cb"


def test_markdown_shows_names_as_they_are() -> None:
    assert markdown_text("a_b_c [50%] 1.0 ±") == "a_b_c [50%] 1.0 ±"
    assert markdown_text("_a_ *b* `c` <d> [e](f) $g$ h|i\nj") == (r"\_a\_ \*b\* \`c\` \<d\> [e\](f) \$g\$ h\|i\\nj")
    assert len(markdown_table([["a\n|", "b"], ["|\n| c", "d"]]).splitlines()) == 3
    assert markdown_code("a ``` b\n````") == "`````\na ``` b\n````\n`````"


def test_a_table_has_no_colours_whatever_the_environment_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert table_text(rich_table([["a"], ["b"]])) == "a\nb"
    assert not PlainConsole(file=io.StringIO()).can_redraw
    assert PlainConsole(file=io.StringIO(), force_terminal=True).can_redraw
    assert not PlainConsole(file=io.StringIO(), force_terminal=True, quiet=True).can_redraw


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12 s"), (9.96, "10 s"), (99.6, "100 s"), (119, "119 s"), (7100, "118 min"), (9000, "2.5 h")],
)
def test_a_duration_has_no_exponent(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_text_is_text_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert table_text(rich_table([["a"], ["b"]])) == "a\nb"
    output = io.StringIO()
    PlainConsole(file=output).print("text")
    assert output.getvalue() == "text\n"
