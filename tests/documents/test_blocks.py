"""Every block of shell and Python in the documents runs as it stands there, and prints what is printed below it.

A block that cannot run here carries a comment with the reason. Some pages have tests of their own.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import MakeVideo, draw_frame
from tests.documents.pages import PAGES, ROOT, read_blocks

# Pages whose blocks need more than the folder below.
RUN_ELSEWHERE = {
    "docs/migrate.md": "tests/compat/test_scripts.py",
    "docs/ecosystem.md": "tests/ecosystem/test_docs.py",
    "docs/data.md": "tests/data_pipeline/test_docs.py",
    "docs/own_data.md": "tests/data_pipeline/test_docs.py",
}
LINKED = (
    "benchmarks",
    "configs",
    "eval_configs",
    "examples",
    "prompts",
    "scripts",
    "video_llama",
    "train.py",
    "demo_video.py",
)
# In the place of weights that cannot be shipped: random ones of a tiny model, in the same layout.
WEIGHTS = {
    "Video-LLaMA-2-7B-Finetuned": "hf",
    "video-llama-2-7b-hf": "hf",
    "llama-2-7b-chat-hf": "hf",
}
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCKS = [block for name in NAMES for block in read_blocks(name) if block.language in ("bash", "python")]
PAGES_TO_RUN = {
    name: blocks
    for name, blocks in ((name, list(group)) for name, group in groupby(BLOCKS, key=lambda block: block.page))
    if name not in RUN_ELSEWHERE and any(block.reason is None for block in blocks)
}


@pytest.fixture
def place(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    make_video: MakeVideo,
    monkeypatch: pytest.MonkeyPatch,
    commands: Path,
) -> Path:
    """The current folder: it looks like this repository, with the files that the documents name."""
    folder = tmp_path / "place"
    folder.mkdir()
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    (folder / "checkpoints").mkdir()
    for name, layout in WEIGHTS.items():
        (folder / "checkpoints" / name).symlink_to(checkpoints[layout], target_is_directory=True)
    clip = make_video("clip.mp4", audio=True)
    (folder / "clips").mkdir()
    for name in ("clip.mp4", "klip.mp4", "lecture.mp4", "a.mp4", "b.mp4", "clips/a.mp4", "clips/b.mp4"):
        shutil.copy(clip, folder / name)
    Image.fromarray(draw_frame(0, 64, 48)).save(folder / "c.png")
    monkeypatch.chdir(folder)
    return folder


def same(text: str) -> str:
    """Printed text without what differs from run to run: seconds, and spaces at the ends of lines."""
    return "\n".join(re.sub(r"\d+\.\d+ s\b", "T s", line).rstrip() for line in text.strip().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_TO_RUN)
def test_the_blocks_of_a_page_run(page: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in PAGES_TO_RUN[page]:
        if block.reason is not None:
            continue
        if block.language == "python":
            exec(compile(block.code, f"{page}, block {block.number}", "exec"), names)
            printed = capsys.readouterr().out
        else:
            command = ["bash", "-euo", "pipefail", "-c", block.code]
            done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
            assert done.returncode == 0, f"{block.code}\n{done.stdout}{done.stderr}"
            printed = done.stdout
        if block.shown is not None:
            assert same(printed) == same(block.shown)


def test_every_block_is_run_or_says_why_not() -> None:
    for name, test in RUN_ELSEWHERE.items():
        assert Path(name).name in (ROOT / test).read_text(encoding="utf-8")
    reasons = [block.reason for block in BLOCKS if block.reason is not None]
    assert all(len(reason.split()) >= 3 for reason in reasons)
    # Most must run, or the documents promise what nobody has tried.
    assert len(reasons) < len(BLOCKS) / 2
