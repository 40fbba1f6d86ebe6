"""The kit of pages: all of its parts, and that text stays text."""

from __future__ import annotations

from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from markupsafe import Markup

from prunelab.errors import RunError
from prunelab.pages.page import (
    Command,
    Fact,
    Figure,
    Folded,
    Gallery,
    GalleryRow,
    Page,
    Pair,
    Part,
    Picture,
    Section,
    Settings,
    Table,
    Text,
    settings,
)

CHART = Markup("<svg><path d='M0 0'/></svg>")
HOSTILE = '</style></p>\'" onload="x <script>alert(1)</script> <b>&amp; {{ 7 * 7 }} {% raw %}'


class Tokens(HTMLParser):
    """Tags and names of attributes in order; values of attributes and text apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.structure: list[str] = []
        self.values: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.structure += [tag, *(name for name, _ in attrs)]
        self.values += [value or "" for _, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self.structure.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.values.append(data)


def page_of(text: str, *, sections: list[Section | None] | None = None) -> Page:
    """A page of every kind of part, with the same text wherever a page has text."""
    table = Table((text, text), [(text, text)] * 2, caption=text, marked=1, scrolls=text)
    parts = [
        Text(text),
        Text(text, is_note=True),
        Figure(CHART, text),
        table,
        settings({text: text, "group": {"name": text}}, top=text),
        Pair(Figure(CHART), table),
        Folded(text, table),
        Command(text),
        Gallery([text, text], [GalleryRow(text, [[Picture("data:,", text, text)], []])]),
    ]
    return Page(
        product=text,
        kind=text,
        heading=text,
        subtitle=text,
        facts=[Fact(text, text, text), Fact(text, text)],
        sections=[None, Section(text, parts), Section("", [], wide=True)]
        if sections is None
        else sections,
        footer=text,
        banner=text,
        note=text,
    )


# A dot in a setting's name would put it into a group.
@given(st.text(min_size=1).filter(lambda text: "." not in text))
def test_any_text_leaves_the_markup_as_it_is(text: str) -> None:
    """Tags and attributes are those of the same page with harmless text."""
    assert Tokens(page_of(text).html()).structure == Tokens(page_of("x").html()).structure


def test_hostile_text_is_shown_as_it_is() -> None:
    """As text and in attributes, in each of the more than forty places of the page."""
    found = Tokens(page_of(HOSTILE).html())
    assert "script" not in found.structure
    assert "onload" not in found.structure
    harmless = Tokens(page_of("harmless").html())
    assert found.values == [value.replace("harmless", HOSTILE) for value in harmless.values]
    assert sum("harmless" in value for value in harmless.values) > 40


def test_every_part_is_shown_and_no_other() -> None:
    source = page_of("x").html()
    assert source.startswith("<!DOCTYPE html>")
    kinds = {kind.kind for kind in Part.__subclasses__()}
    shown = {"text", "command", "figure", "table", "settings", "pair", "folded", "gallery"}
    assert kinds == shown
    for mark in ("<p>x", '<p class="note">x', "<figcaption>x", "<caption>x", 'class="winner"',
                 'class="settings"', 'class="pair"', "<summary>x", 'class="pictures"',
                 'role="region" aria-label="x"', '<section class="wide">', 'role="status"',
                 '<img alt="x" title="x" src="data:,"><figcaption>x', "<pre>x",
                 str(CHART)):  # fmt: skip
        assert mark in source, mark
    assert source.count("<section") == 2
    with pytest.raises(UndefinedError):
        page_of("x", sections=[Section("x", [Part()])]).html()


def test_settings_are_grouped_and_what_is_unset_is_a_dash() -> None:
    values = {
        "seed": 1,
        "model.name": "",
        "model.width": 0,
        "training": {"steps": None},
        "b": False,
    }
    assert settings(values, top="run") == Settings(
        [
            Table(("setting", "value"), [("seed", "1"), ("b", "False")], "run"),
            Table(("setting", "value"), [("name", "–"), ("width", "0")], "model"),
            Table(("setting", "value"), [("steps", "–")], "training"),
        ]
    )


def test_page_is_written_whole_or_refused(tmp_path: Path) -> None:
    """A name that is no UTF-8 reaches Python with lone surrogates."""
    path = page_of("a\udcff").write(tmp_path / "page.html")
    assert "<h1>a?</h1>" in path.read_text(encoding="utf-8")
    with pytest.raises(RunError, match=r"cannot write .*gone"):
        page_of("x").write(tmp_path / "gone" / "page.html")
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]


def test_templates_lie_in_the_installed_package() -> None:
    folder = files("prunelab.pages") / "templates"
    names = {entry.name for entry in folder.iterdir()}
    assert names == {"page.html.j2", "parts.html.j2", "style.css"}


def test_fact_in_one_line() -> None:
    assert (Fact("a", "1 kB", "of 2").line, Fact("a", "1 kB").line) == ("1 kB, of 2", "1 kB")
