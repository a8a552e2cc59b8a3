"""The reference data: numbers recorded from the original implementation (see its README)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DEFAULT_REFERENCE = Path(__file__).parents[1] / "data" / "reference"


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of reference data: `VIDEO_LLAMA_REFERENCE`, or the compact copy in the repository."""
    folder = Path(os.environ.get("VIDEO_LLAMA_REFERENCE", DEFAULT_REFERENCE))
    assert folder.is_dir(), f"VIDEO_LLAMA_REFERENCE names no folder: {folder}"
    return folder


@pytest.fixture(scope="session")
def reference_json(reference: Path) -> Callable[[str], Any]:
    """Read one of the folder's JSON files by its relative name."""

    def read(name: str) -> Any:
        return json.loads((reference / name).read_text(encoding="utf-8"))

    return read
