"""What mkdocs calls while it builds the site; mkdocs.yml names this file.

A page of the site is a file of docs/, or one of `links.taken_in()`. Links between them work in the
repository and in the site alike; a link to any other file of the repository becomes its path.
"""

from __future__ import annotations

import logging
from pathlib import Path

import generated
import links
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LOG = logging.getLogger("mkdocs.hooks")  # its warnings end a strict build


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of docs/."""
    for path, uri in links.taken_in(ROOT).items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is generated, and point links at pages of the site."""
    uri = page.file.src_uri
    taken = {uri: path for path, uri in links.taken_in(ROOT).items()}
    page_path = taken.get(uri, f"docs/{uri}")
    filled = generated.fill(markdown, ROOT)
    text, broken = links.for_the_site(filled, page_path=page_path, root=ROOT)
    for target in broken:
        LOG.warning("%s links to %s, which is not there", page_path, target)
    return text


def on_post_build(config: MkDocsConfig) -> None:
    """Follow every link and anchor of the pages that were written."""
    for problem in links.problems(Path(config.site_dir)):
        LOG.warning("%s", problem)
