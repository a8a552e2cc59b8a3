"""The command `video-llama`: its subcommands, its first messages, and the scripts that hand on to it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import video_llama
from video_llama.cli import COMMANDS, main
from video_llama.cli.command import CommandParser

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
# The command of each script that bears another name.
DOORS = {
    "train.py": "train",
    "scripts/caption_videos.py": "caption",
    "scripts/check_dataset.py": "check_data",
    "scripts/convert_checkpoint.py": "convert",
    "scripts/estimate_memory.py": "memory",
    "scripts/evaluate.py": "evaluate",
}


def run(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, **settings
    )


def test_the_installed_command_is_this_one() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, _, function = scripts["video-llama"].partition(":")
    assert getattr(importlib.import_module(module), function) is main


def test_help_lists_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, json\nfrom video_llama.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: print(json.dumps(list(sys.modules)))"
    )
    shown = run("-c", code)
    *lines, modules = shown.stdout.splitlines()
    assert shown.returncode == 0
    assert {line.split()[0] for line in lines if line.startswith("    ") and line[4] != " "} >= set(COMMANDS)
    assert not {"torch", "transformers", "av", "numpy", "yaml"} & set(json.loads(modules))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_a_command_loads_no_torch(name: str) -> None:
    code = (
        "import sys\nfrom video_llama.cli import main\n"
        f"try: main([{name!r}, '--help'])\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    )
    shown = run("-c", code)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"usage: video-llama {name} ")


@pytest.mark.parametrize("script", DOORS)
def test_a_script_has_the_options_of_its_command(script: str, tmp_path: Path) -> None:
    shown = run(str(ROOT / script), "--help", cwd=tmp_path)
    command = run("-m", "video_llama", DOORS[script].replace("_", "-"), "--help", cwd=tmp_path)
    assert shown.returncode == command.returncode == 0
    options = [
        {word.strip(",[]") for word in text.split() if word.startswith(("--", "[--"))}
        for text in (shown.stdout, command.stdout)
    ]
    assert options[0] == options[1] != set()
    assert shown.stdout.startswith(f"usage: {Path(script).name} ")


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"video_llama {video_llama.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chatt"], "unknown command chatt; did you mean chat?"),
        (["xyz"], "unknown command xyz"),
        (["train", "--cfg-pth", "a.yaml"], "unknown option --cfg-pth; did you mean --cfg-path?"),
        (["caption", "a", "--modle=b"], "unknown option --modle; did you mean --model?"),
        (["train"], "the following arguments are required: --cfg-path/--config"),
        (["memory"], "the following arguments are required: config"),
    ],
)
def test_a_mistake_is_one_line_before_anything_else(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message} (all options: video-llama")


def test_values_that_look_like_options_are_left_to_argparse() -> None:
    parser = CommandParser(prog="x")
    parser.add_argument("--question")
    parser.add_argument("rest", nargs="*")
    assert parser.parse_args(["--ques", "-- a dash first"]).question == "-- a dash first"
    assert parser.parse_args(["--", "--modle"]).rest == ["--modle"]
