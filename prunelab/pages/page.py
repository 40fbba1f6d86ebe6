"""The kit of report pages: what a page is made of, and how it becomes one HTML file.

A page is plain data: facts, and sections of parts. The templates beside this file show it. The
file holds its styles, charts and pictures, loads nothing, runs no script, and follows the
reader's light or dark mode. All text is escaped; markup is what `plots.svg` draws, and
nothing else. Equal pages give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from prunelab.errors import RunError
from prunelab.pages.units import NOTHING
from prunelab.runs.settings import flattened
from sparsemodel.storage.files import write_atomically


class Fact(NamedTuple):
    """A number that stands at the head of a page, as text with its unit."""

    label: str
    value: str
    note: str = ""

    @property
    def line(self) -> str:
        """Value and note in one line."""
        return f"{self.value}, {self.note}" if self.note else self.value


class Part:
    """What a section is made of; `kind` names the macro that shows it."""

    kind: ClassVar[str]


@dataclass(frozen=True)
class Text(Part):
    """A paragraph; a note is set in small, muted letters."""

    kind = "text"
    text: str
    is_note: bool = False


@dataclass(frozen=True)
class Figure(Part):
    """A chart (an <svg> element) with a caption."""

    kind = "figure"
    chart: Markup
    note: str = ""


@dataclass(frozen=True)
class Table(Part):
    """A table of text.

    Attributes:
        marked: which row stands out.
        scrolls: a name for the table, which then has a height of its own. Any table that is
            wider than its card scrolls inside it.
    """

    kind = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    marked: int | None = None
    scrolls: str = ""


@dataclass(frozen=True)
class Settings(Part):
    """Small tables in columns; `settings` makes them."""

    kind = "settings"
    tables: Sequence[Table]


@dataclass(frozen=True)
class Command(Part):
    """What to type, as it is."""

    kind = "command"
    text: str


class Picture(NamedTuple):
    """One picture.

    Attributes:
        source: a data: URL.
        caption: a word or two below it.
        alt: all about it, for those who do not see it and where a pointer rests on it.
    """

    source: str
    caption: str
    alt: str


class GalleryRow(NamedTuple):
    """A label and as many groups of pictures as the gallery has columns."""

    label: str
    groups: Sequence[Sequence[Picture]]


@dataclass(frozen=True)
class Gallery(Part):
    """Pictures in columns, a label before each row; columns stand below each other on a phone."""

    kind = "gallery"
    header: Sequence[str]
    rows: Sequence[GalleryRow]


@dataclass(frozen=True)
class Pair(Part):
    """Two parts side by side where the page is wide enough."""

    kind = "pair"
    left: Part
    right: Part


@dataclass(frozen=True)
class Folded(Part):
    """A part that opens when its title is clicked."""

    kind = "folded"
    title: str
    part: Part


@dataclass(frozen=True)
class Section:
    """A card of the page, half a line wide or `wide`."""

    title: str
    parts: Sequence[Part]
    wide: bool = False


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        product, kind: who made it, and what it is: "fedprune", "run report".
        heading, subtitle: whose report it is.
        sections: cards in reading order; None stands for one that has nothing to show.
        banner: a warning above all else.
        note: a remark on the facts.
    """

    product: str
    kind: str
    heading: str
    subtitle: str
    facts: Sequence[Fact]
    sections: Sequence[Section | None]
    footer: str
    banner: str = ""
    note: str = ""

    def html(self) -> str:
        """The page as the text of one HTML file."""
        return _templates().get_template("page.html.j2").render(page=self)

    def write(self, path: Path) -> Path:
        """Write the page, whole or not at all, and return its path.

        Raises:
            RunError: it cannot be written.
        """
        try:
            # A lone surrogate, from a file name that is no UTF-8, is shown as a question mark.
            write_atomically(path, self.html().encode("utf-8", "replace"))
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}") from None
        return path


def settings(values: Mapping[str, Any], *, top: str) -> Settings:
    """Nested settings as one small table for each group, a dash for what is not set.

    Args:
        values: setting -> value, or group -> settings; names with dots are in groups already.
        top: caption of those in no group.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, value in flattened(values).items():
        group, _, name = key.rpartition(".")
        text = NOTHING if value in (None, "") else str(value)
        groups.setdefault(group or top, []).append((name, text))
    return Settings([Table(("setting", "value"), rows, group) for group, rows in groups.items()])


@lru_cache
def _templates() -> Environment:
    def source(name: str) -> str:
        return (files("prunelab.pages") / "templates" / name).read_text(encoding="utf-8")

    return Environment(
        loader=FunctionLoader(source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
