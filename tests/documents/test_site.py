"""The documents as a site: it builds without a warning, holds every page, and no link of any page is broken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import video_llama
from tests.documents.pages import PAGES, ROOT, read_anchors, read_links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in read_links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in read_anchors(target), link


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        # The theme prints an advertisement for its successor otherwise.
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = {path.name for path in tmp_path.glob("*.html")}
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} | {"index.html"} <= pages
    reference = (tmp_path / "reference.html").read_text(encoding="utf-8")
    for name in video_llama.__all__:
        assert re.search(rf'id="[\w.]*\b{name}"', reference) or name in ("__version__", "conv_templates"), name
    assert 'rel="icon" href="favicon.png"' in reference
    assert (tmp_path / "favicon.png").read_bytes() == (ROOT / "video_llama" / "demo" / "favicon.png").read_bytes()
    # Links between the README and docs/ hold on the site, too.
    assert 'href="training.html"' in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert (tmp_path / "search" / "search_index.json").stat().st_size > 100_000
