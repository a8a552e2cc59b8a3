"""docs/cli.md has every option that `--help` of a command prints, and what `--help` says of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts import document_commands
from video_llama.cli import COMMANDS, main

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_page_is_what_the_script_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert document_commands.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_help_is_on_the_page(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = capsys.readouterr().out
    [section] = re.findall(rf"^## video-llama {name}$(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    # The explanation is on the option's line, or below an option that is long.
    options = dict(re.findall(r"^ {2}(--[\w-]+)\b[^\n]*?(?: {2,}|\n {10,})(\S.*)$", shown, re.M))
    assert options.keys() == set(re.findall(r"^ {2}(--[\w-]+)", shown, re.M))
    rows = {row[1]: row[2] for row in re.finditer(r"^\| `(--[\w-]+)[^`]*` \| (.*) \|$", section, re.M)}
    assert {name: text.replace("\\|", "|") for name, text in rows.items()} == options
