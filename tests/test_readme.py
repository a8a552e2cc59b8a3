"""What the README promises: its code runs as it stands, its commands and links exist, its figures are counted."""

from __future__ import annotations

import dataclasses
import io
import re
import runpy
import subprocess
import sys
import token
import tokenize
from pathlib import Path

import pytest

from video_llama.checkpoints.memory import estimate_memory
from video_llama.cli import COMMANDS, memory_tables
from video_llama.config import ModelConfig
from video_llama.errors import ConfigError
from video_llama.inference.chat import Chat

ROOT = Path(__file__).parents[1]
README, TURKISH = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.tr.md"))
MIGRATE = (ROOT / "docs" / "migrate.md").read_text(encoding="utf-8")
BOTH = pytest.mark.parametrize("readme", [README, TURKISH], ids=["English", "Turkish"])


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def table(text: str, columns: int, header: str) -> list[list[str]]:
    """Rows of the table whose header begins like this."""
    lines = text[text.index(f"| {header} |") :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert all(len(row) == columns for row in rows)
    return rows


# Two languages


def words_of(block: str, language: str) -> list[str]:
    """The code without its comments: what a translation leaves as it is."""
    if language == "bash":
        return re.sub(r" *#.*", "", block).splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(block).readline)
    return [t.string for t in tokens if t.type not in (token.NL, tokenize.COMMENT)]


@pytest.mark.parametrize("language", ["bash", "python"])
def test_the_turkish_examples_are_the_english_ones(language: str) -> None:
    english, turkish = code_blocks(README, language), code_blocks(TURKISH, language)
    assert [words_of(block, language) for block in turkish] == [words_of(block, language) for block in english]


def test_the_turkish_text_has_the_same_parts() -> None:
    for pattern in (r"^#+ ", r"^\|", r"^- ", r"^```"):
        counts = [len(re.findall(pattern, text, re.MULTILINE)) for text in (README, TURKISH)]
        assert counts[0] == counts[1] > 0, pattern
    names = [{word for word in re.findall(r"`([\w./*-]+)`", text) if "." in word} for text in (README, TURKISH)]
    assert names[0] == names[1]


# Commands, links, names


def scripts_of(text: str) -> set[str]:
    """Files that the text runs with Python or bash."""
    return set(re.findall(r"(?:python|bash) ((?:scripts/)?\w+\.(?:py|sh))", text))


@BOTH
def test_every_subcommand_exists(readme: str) -> None:
    named = set(re.findall(r"video-llama ([a-z][a-z-]+)", readme))
    assert {"chat", "demo", "caption", "convert", "memory"} <= named <= set(COMMANDS)


@BOTH
def test_every_command_exists_and_the_python_ones_explain_themselves(
    readme: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = scripts_of(readme)
    assert {"scripts/demo.sh", "scripts/test.sh", "scripts/make_random_checkpoint.py"} <= found
    for name in sorted(found):
        if name.endswith(".sh"):
            assert subprocess.run(["bash", "-n", ROOT / name], check=False).returncode == 0, name
            continue
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        assert end.value.code == 0, name
        assert "usage: " in capsys.readouterr().out, name


@pytest.mark.parametrize("path", ["README.md", "README.tr.md", "docs/architecture.md", "docs/migrate.md"])
def test_every_file_that_is_named_exists(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    named = re.findall(r"\b((?:scripts|tests|docs|configs|eval_configs)/[\w./]*\w)", text)
    for name in named:
        assert (ROOT / name).exists(), name


def test_what_replaces_the_original_exists() -> None:
    rows = table(MIGRATE, 2, "there | here")
    assert len(rows) > 10
    for _, here in rows:
        for statement in re.findall(r"`(from video_llama[^`]*)`", here):
            exec(statement, {})
        for method in re.findall(r"`chat\.(\w+)", here):
            assert callable(getattr(Chat, method))
    keys = set(re.findall(r"`(?:--options )?model\.(\w+)[`=]", MIGRATE)) - {"generate"}
    assert {"ckpt", "llama_model", "vit_ckpt"} <= keys <= {field.name for field in dataclasses.fields(ModelConfig)}


# Figures


@BOTH
@pytest.mark.slow
def test_the_memory_table_is_what_the_script_counts(readme: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(readme, 3, {README: "precision | 7B | 13B", TURKISH: "duyarlık | 7B | 13B"}[readme])
    for column, size in ((1, "7b"), (2, "13b")):
        config = memory_tables.read_config(size, use_audio=True)
        counted = [
            f"{estimate_memory(config, num_frames=8, context_length=1024, **precision).total / 2**30:.1f} GiB"
            for precision in memory_tables.PRECISIONS.values()
        ]
        assert [row[column].replace(",", ".") for row in rows] == counted


def test_memory_is_counted_of_saved_models_only(tiny_checkpoint: Path, tmp_path: Path) -> None:
    read_config = memory_tables.read_config
    assert read_config(str(tiny_checkpoint), use_audio=False).vision_config.hidden_size == 64
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for wrong in (tmp_path, tmp_path / "absent", ROOT / "README.md"):
        with pytest.raises(ConfigError, match="neither one of 7b, 13b nor a folder"):
            read_config(str(wrong), use_audio=True)


def test_a_folder_that_needs_no_conversion_is_said_to_need_none(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert = runpy.run_path(str(ROOT / "scripts" / "convert_checkpoint.py"))["main"]
    assert convert([str(tiny_checkpoint), str(tmp_path / "new")]) == 1
    assert "--to original turns it back" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
