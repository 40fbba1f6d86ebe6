"""Links of the pages: rewritten on their way into the site, and followed once it is written."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)
_LINK_OR_CODE = re.compile(
    r"(?P<code>`+).+?(?P=code)|\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)",
    re.DOTALL,
)


def taken_in(root: Path) -> dict[str, str]:
    """Path in the repository -> place in the site, of the pages that lie outside of docs/."""
    named = {
        "README.md": "about/readme.md",
        "CONTRIBUTING.md": "about/contributing.md",
        "CHANGELOG.md": "about/changelog.md",
        "sparsemodel/codec/FORMAT.md": "reference/wire_format.md",
    }
    tables = sorted(path.name for path in (root / "simulations").glob("*.md"))
    return named | {f"simulations/{name}": f"simulations/{name}" for name in tables}


def for_the_site(markdown: str, *, page_path: str, root: Path) -> tuple[str, list[str]]:
    """A page's text with the links of the site, and the targets that the repository lacks.

    Args:
        page_path: the page's file, from the root of the repository.
    """
    taken, broken = taken_in(root), []
    own_folder = posixpath.dirname(_place(page_path, taken) or "")

    def rewritten(match: re.Match[str]) -> str:
        target = match["target"]
        if target is None or urlsplit(target).scheme or target.startswith("#"):
            return match[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page_path), path))
        if not (root / path).exists():
            broken.append(target)
            return match[0]
        place = _place(path, taken)
        if place is None:
            return _as_text(match["text"], path)
        here = posixpath.relpath(place, own_folder or ".")
        return f"[{match['text']}]({here}{'#' * bool(anchor)}{anchor})"

    parts = _FENCE.split(markdown)
    parts[::2] = [_LINK_OR_CODE.sub(rewritten, part) for part in parts[::2]]
    return "".join(parts), broken


def problems(site: Path) -> Iterator[str]:
    """What is wrong with the links of a site: pages and anchors that it lacks, files of others."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        for url in page.loaded:
            if urlsplit(url).netloc:
                yield f"{name} loads {url}: a page of the site needs nothing from elsewhere"
        for url in sorted(page.links | page.loaded):
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            start = site if parts.path.startswith("/") else path.parent
            target = (start / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                yield f"{name} links to {url}, which the site lacks"
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors | {""}:
                yield f"{name} links to {url}, whose page has no such anchor"


class _Page(HTMLParser):
    """What a page links to, what it loads, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if "href" in found and found.get("rel") != "canonical":
            (self.links if tag == "a" else self.loaded).add(found["href"])
        if "src" in found:
            self.loaded.add(found["src"])


def _place(path: str, taken: dict[str, str]) -> str | None:
    """Where a file of the repository is in the site, if it is."""
    if path in taken:
        return taken[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def _as_text(text: str, path: str) -> str:
    """A link to a file that is no page: its path, behind the words that said something else."""
    plain = text.strip("`").rstrip("/")
    return f"`{path}`" if path.endswith(plain) else f"{text} (`{path}`)"
