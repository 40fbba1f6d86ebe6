"""How links are rewritten for the site, and what its written pages are checked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def links() -> ModuleType:
    spec = importlib.util.spec_from_file_location("links", ROOT / "docs" / "tools" / "links.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("page", "written", "shown"),
    [
        ("docs/sparse.md", "[a](plan.md#growing)", "[a](plan.md#growing)"),
        ("docs/sparse.md", "[a](../simulations/LOG.md)", "[a](simulations/LOG.md)"),
        ("docs/reference/summary.md", "[a](../messages.md)", "[a](../messages.md)"),
        ("README.md", "[a](docs/runs.md#installing)", "[a](../runs.md#installing)"),
        ("CONTRIBUTING.md", "[a](README.md)", "[a](readme.md)"),
        ("simulations/LOG.md", "[a](uplink_bytes.md)", "[a](uplink_bytes.md)"),
        ("README.md", "[fedprox.py](fedprune/methods/fedprox.py)", "`fedprune/methods/fedprox.py`"),
        ("docs/rooms.md", "[it](../fedprune/front.py)", "it (`fedprune/front.py`)"),
        ("docs/rooms.md", "[`tests/`](../tests)", "`tests`"),
        ("docs/rooms.md", "![a](pictures/round.svg)", "![a](pictures/round.svg)"),
        (
            "docs/rooms.md",
            "[a](https://flower.ai), [b](#here)",
            "[a](https://flower.ai), [b](#here)",
        ),
        ("docs/rooms.md", "`x[0](gone.md)`", "`x[0](gone.md)`"),
        ("docs/rooms.md", "```\n[a](gone.md)\n```", "```\n[a](gone.md)\n```"),
    ],
)
def test_a_link_leads_to_the_page_or_is_a_path(
    links: ModuleType, page: str, written: str, shown: str
) -> None:
    assert links.for_the_site(written, page_path=page, root=ROOT) == (shown, [])


def test_a_link_to_nothing_is_told(links: ModuleType) -> None:
    _, broken = links.for_the_site("[a](gone.md) [b](runs.md)", page_path="docs/a.md", root=ROOT)
    assert broken == ["gone.md"]


def test_links_of_written_pages_are_followed(links: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text(
        '<h1 id="top">a</h1><a href="sub/b.html#here">1</a><a href="sub/b.html#gone">2</a>'
        '<a href="none.html">3</a><a href="#top">4</a><a href="https://flower.ai">5</a>'
        '<script src="https://cdn.example.org/x.js"></script><img src="none.svg">'
    )
    (tmp_path / "sub" / "b.html").write_text('<a id="here"></a><a href="../index.html#top">1</a>')
    assert list(links.problems(tmp_path)) == [
        "index.html loads https://cdn.example.org/x.js: a page of the site needs nothing from "
        "elsewhere",
        "index.html links to none.html, which the site lacks",
        "index.html links to none.svg, which the site lacks",
        "index.html links to sub/b.html#gone, whose page has no such anchor",
    ]
