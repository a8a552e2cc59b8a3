"""Fixtures of the tests of documents."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.documents.pages import ROOT


@pytest.fixture
def commands(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs, first in the path: `python` and `video-llama` of this environment and this repository."""
    folder = tmp_path_factory.mktemp("bin")
    for name, command in {"python": "", "video-llama": "-m video_llama"}.items():
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n', encoding="utf-8")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return folder
