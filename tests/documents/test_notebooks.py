"""The notebooks run from top to bottom, and say what is written in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.documents.pages import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_it_shows(path: Path, commands: Path, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    # As in the repository: the notebooks call scripts beside their folder.
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "examples").mkdir()
    kept = nbformat.read(path, as_version=4)
    ran = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(ran, timeout=600, resources={"metadata": {"path": tmp_path / "examples"}}).execute()
    for before, after in zip(kept.cells, ran.cells, strict=True):
        # What commands print has times in it.
        if before.cell_type == "code" and not before.source.startswith("!"):
            assert printed(after) == printed(before), before.source


def printed(cell: Any) -> str:
    """What a cell prints, warnings left out."""
    texts = [output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"]
    return "".join(texts)
