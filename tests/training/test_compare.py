"""`video-llama compare`: several trainings alike, each measured in a process of its own, in one table."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from video_llama.cli import main
from video_llama.cli.comparison import ComparedRun, draw_plot, format_results
from video_llama.config import load_config

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs/compare").glob("*.yaml"))


def result(name: str, seed: int, right: float, **changes: Any) -> dict[str, Any]:
    sizes = {"trained_parameters": 12_345, "memory_bytes": 3 << 29, "cache_bytes": 5 << 20}
    times = {"seconds_per_step": 0.5, "cpu_seconds_per_step": 0.25}
    return {"name": name, "seed": seed, **sizes, **times, "figures": {"exact_match": right, "rouge_l": 1.0}, **changes}


def test_a_row_holds_the_means_of_the_seeds_and_the_largest_memory() -> None:
    results = [
        result("b", 2, 0.5, seconds_per_step=1.5, memory_bytes=2 << 30),
        result("a", 1, 0.25, cache_bytes=None, memory_bytes=None),
        result("b", 1, 0.75),
    ]
    _, _, first, second = format_results(results, "exact_match").splitlines()
    assert first == "| a | 25.0% | 25.0% | 12,345 | 0.500 | 0.250 |  |  |"
    assert second == "| b | 62.5% | 75.0%, 50.0% | 12,345 | 1.000 | 0.250 | 2.00 GiB | 5.00 MiB |"


def test_a_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_plot([result("a", 1, 0.25), result("b", 1, 0.5)], "exact_match", tmp_path / "plot.svg")
    assert "CPU seconds per step" in (tmp_path / "plot.svg").read_text() or (tmp_path / "plot.svg").stat().st_size


def test_a_change_of_any_setting_is_another_run() -> None:
    config, asked = load_config(SHIPPED[0]), argparse.Namespace(data=Path("x"), limit=None)
    run = ComparedRun("a", config, asked)
    assert run.identity == ComparedRun("a", load_config(SHIPPED[0]), argparse.Namespace(**vars(asked))).identity
    changed = load_config(SHIPPED[0], ["run.batch_size_train=31"])
    assert run.identity["settings"] != ComparedRun("a", changed, asked).identity["settings"]
    other = argparse.Namespace(data=Path("x"), limit=5)
    assert run.identity["settings"] != ComparedRun("a", config, other).identity["settings"]


def test_the_shipped_choices_differ_in_the_connector_alone() -> None:
    assert len(SHIPPED) == 6
    configs = [load_config(path) for path in SHIPPED]
    assert len({json.dumps([c.model.connector, c.model.fusion_head_layers], sort_keys=True) for c in configs}) == 6
    for config in configs:
        config.model.connector, config.model.fusion_head_layers, config.model.num_video_query_token = {}, 2, 12
    assert all(config == configs[0] for config in configs)


def test_two_files_of_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(SHIPPED[0]), str(tmp_path / SHIPPED[0].name)]
    assert main(["compare", *files, "--data", "x", "--output", str(tmp_path / "out")]) == 1
    assert "two configurations have the same file name" in capsys.readouterr().err


@pytest.mark.slow
def test_trainings_are_made_once_measured_and_asked(
    config_file: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = next((corpus / "train/webvid/videos").rglob("*.mp4"))
    content = [{"type": "video", "path": str(video)}, {"type": "text", "text": "What?"}]
    talk = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A shape."}]}
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps(talk) + "\n")
    # EVA's frames through another connector, whose sizes are not those of the config.json beside the weights.
    perceiver = tmp_path / "perceiver.yaml"
    keys = "connector: {name: perceiver, tokens_per_frame: 4, hidden_size: 32}\n  fusion_head_layers: 1"
    perceiver.write_text(config_file.read_text().replace("model:", f"model:\n  {keys}", 1))
    output = tmp_path / "compared"
    common = ["--data", str(held_out), "--dataset", "messages", "--workers", "0", "--output", str(output)]
    common += ["--options", "run.max_epoch=1", f"features.dir={tmp_path / 'unused'}", "--seeds", "3"]
    assert main(["compare", str(config_file), *common]) == 0
    [first] = (output / "results.jsonl").read_text().splitlines()
    # What is there is not done again.
    assert main(["compare", str(config_file), str(perceiver), *common]) == 0
    lines = (output / "results.jsonl").read_text().splitlines()
    assert lines[0] == first
    results = [json.loads(line) for line in lines]
    assert [(line["name"], line["seed"]) for line in results] == [("train", 3), ("perceiver", 3)]
    assert results[1]["trained_parameters"] < results[0]["trained_parameters"]
    for line in results:
        assert (line["steps"], line["questions"]) == (4, 1)
        assert min(line[key] for key in ("cpu_seconds_per_step", "seconds_per_step", "memory_bytes")) > 0
        features = [file for file in (output / line["name"] / "features").rglob("*") if file.is_file()]
        assert line["cache_bytes"] == sum(file.stat().st_size for file in features) > 0
    assert not (tmp_path / "unused").exists()
    shown = capsys.readouterr().out
    assert shown.count(", seed 3\n") == 2
    assert "| perceiver | 0.0%" in shown

    assert main(["compare", str(config_file), *common, "--limit", "1"]) == 1
    assert "train, seed 3 was made with other settings" in capsys.readouterr().err


def test_the_memory_of_a_run_is_its_own_and_not_that_of_what_started_it() -> None:
    ballast = np.ones(3 * 2**27)  # 3 GiB
    code = "import torch; from video_llama.cli.comparison import peak_memory as p; print(p(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**26 < int(done.stdout) < ballast.nbytes
