"""Hooks of mkdocs.yml: pages that lie outside docs/ join the site, and links between the two lead there."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# The README is the first page; the others keep their names.
PAGES = {"README.md": "index.md"} | {
    name: name for name in ("README.tr.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md") if (ROOT / name).exists()
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the repository's root."""
    for name, address in PAGES.items():
        files.append(File.generated(config, address, content=(ROOT / name).read_text(encoding="utf-8")))
    # The icon of the page in the browser is that of the site.
    icon = ROOT / "video_llama" / "demo" / "favicon.png"
    files.append(File.generated(config, icon.name, abs_src_path=str(icon)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as they hold in the repository, as they hold on the site."""
    place = "" if page.file.src_uri in PAGES.values() else "docs"
    fenced = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    # Every second part is a block of code, which has no links.
    fenced[::2] = [LINK.sub(lambda link: _on_site(link, place), text) for text in fenced[::2]]
    return "".join(fenced)


def _on_site(link: re.Match[str], place: str) -> str:
    image, text, target = link.groups()
    path, _, anchor = target.partition("#")
    if "://" in target or target.startswith("mailto:") or not path:
        return link[0]
    inside = posixpath.normpath(posixpath.join(place, path))
    if not (ROOT / inside).exists():
        # As it stands: the strict build then names the page and the link.
        return link[0]
    if inside in PAGES:
        address = PAGES[inside]
    elif inside.startswith("docs/"):
        address = inside.removeprefix("docs/")
    else:
        # A file of the source code is not on the site.
        return text
    return f"{image}[{text}]({address}{'#' + anchor if anchor else ''})"
