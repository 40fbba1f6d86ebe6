"""What others have written reaches the terminal as it is."""

from __future__ import annotations

import io
import warnings

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from prunelab.errors import DataWarning
from prunelab.pages.console import console, escaped, warnings_shown


@given(
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)
    | st.text("[]\\\\/a ", max_size=9)
)
@example(r"bad \[/x]")
@example("\\")
@example(r"[red]\\[/red]\[")
@example("[/]")
def test_no_text_is_markup(text: str) -> None:
    shown = Text.from_markup(f"[b]warning:[/b] {escaped(text)} .", emoji=False)
    assert shown.plain == f"warning: {text} ."


def test_the_console_makes_no_pictures_of_words() -> None:
    out = io.StringIO()
    Console(file=out, emoji=console._emoji).print(escaped("client :smile: [x]"))
    assert out.getvalue() == "client :smile: [x]\n"


def test_what_is_warned_of_twice_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings_shown():
        for word in ("sizes", "sizes", "gray"):
            warnings.warn(word, DataWarning, stacklevel=1)
    assert capsys.readouterr().err.splitlines() == ["warning: sizes", "warning: gray"]
