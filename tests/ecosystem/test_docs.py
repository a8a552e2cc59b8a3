"""The examples of docs/ecosystem.md run as they stand there, and print what they say."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import transformers
from packaging.version import Version

from tests.conftest import needs_compiler
from video_llama.utils.extras import is_installed

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "ecosystem.md").read_text(encoding="utf-8")
BEGINNING, *BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
# What a text in a block needs.
NEEDED = {"BitsAndBytes": "bitsandbytes", "from datasets": "datasets", "from peft": "peft", "from trl": "trl"}
SERVING = [block for block in BLOCKS if "my-model" in block]


def parameters() -> Iterator[Any]:
    for number, block in enumerate(BLOCKS):
        if block not in SERVING:
            title = re.findall(r"^##+ (.+)$", TEXT[: TEXT.index(block)], re.MULTILINE)[-1]
            marks = [needs_compiler] if ".compile(" in block else []
            yield pytest.param(block, marks=[pytest.mark.slow, *marks], id=f"{number} {title}")


def run(block: str) -> None:
    exec(compile(BEGINNING + block, "docs/ecosystem.md", "exec"), {})


def check_printed(block: str, printed: str) -> None:
    """What a line prints stands behind it."""
    expected = re.findall(r"^( *)print\(.*\)  # (.+)$", block, re.MULTILINE)
    assert len(expected) == block.count("print(")
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    for indented, text in expected:
        assert text in lines
        # Within a loop, each round prints it.
        assert not indented or set(lines) == {text}


@pytest.mark.parametrize("block", parameters())
def test_an_example_runs_and_prints_what_it_says(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, package in NEEDED.items():
        if text in block:
            pytest.importorskip(package)
    if "assistant_only_loss" in block and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("TRL asks for transformers 5.18")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    try:
        run(block)
    except ImportError as error:
        # Earlier versions of transformers want a package for audio that this model does not need.
        if "librosa" not in str(error):
            raise
        pytest.skip(" ".join(str(error).split()))
    check_printed(block, capsys.readouterr().out)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command of the document, with the model that it saves before."""
    monkeypatch.chdir(tmp_path)
    run(SERVING[0])
    [command] = re.findall(r"^transformers (serve .*)$", TEXT, re.MULTILINE)
    start = "import sys; from transformers.cli.transformers import main; main()"
    process = subprocess.Popen([sys.executable, "-c", start, *shlex.split(command)])
    try:
        for _ in range(1200):
            assert process.poll() is None, "the server has ended"
            try:
                urlopen("http://localhost:8123/health", timeout=5).close()
                break
            except URLError:
                time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("openai"), reason="transformers[serving] is not installed")
@pytest.mark.usefixtures("server")
def test_transformers_serves_a_saved_folder_to_who_asks_as_the_document_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(SERVING[1])
    check_printed(SERVING[1], capsys.readouterr().out)
