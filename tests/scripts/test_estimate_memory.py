"""The memory script counts what YAML configurations describe, whether or not their files are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from video_llama.cli.memory import main

ROOT = Path(__file__).parents[2]
TRAINING = sorted((ROOT / "configs" / "train").glob("[!t]*branch_stage*.yaml"))


def lines_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_an_evaluation_configuration_is_counted_as_the_size_that_its_language_model_is_named_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    by_name = lines_of(capsys, "7b")
    found, *table = lines_of(capsys, str(ROOT / "eval_configs" / "video_llama_eval_withaudio.yaml"))
    assert "is not there: counted as LLaMA-2 of 7b" in found
    assert table == by_name
    deaf = lines_of(capsys, str(ROOT / "eval_configs" / "video_llama_eval_only_vl.yaml"))
    assert deaf[1:] == lines_of(capsys, "7b", "--no-audio")


def test_a_model_of_the_package_is_found_by_name_and_by_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    table = lines_of(capsys, "video-llama-tiny")
    assert "MiB |" in table[-1]
    assert lines_of(capsys, str(ROOT / "eval_configs" / "tiny.yaml"))[1:] == table


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
@pytest.mark.slow
def test_a_training_configuration_is_counted_with_gradients_and_optimizer(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = lines_of(capsys, str(path), "--batch-size", "2")
    assert "2 samples of" in shown[1]
    half, checkpointed = ([cell.strip() for cell in line.split("|")[2:]] for line in shown[6:8])
    trained, gradients, optimizer, activations = (float(cell) for cell in half[1:5])
    assert 0.07 < trained < 0.1
    assert gradients == trained
    assert optimizer == pytest.approx(2 * trained, abs=0.011)
    assert float(checkpointed[4]) < activations


@pytest.mark.slow
def test_the_configuration_for_24_gb_is_counted_as_the_documentation_says(capsys: pytest.CaptureFixture[str]) -> None:
    shown = lines_of(capsys, str(ROOT / "configs" / "train" / "visionbranch_qlora_24gb.yaml"))
    totals = {cells[1].strip(): float(cells[-2].split()[0]) for cells in (line.split("|") for line in shown[4:])}
    documented = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for precision, row in (
        ("half, language model 4 bit", "| 4 bit, as configured |"),
        ("half, language model 8 bit", "| 8 bit (`load_in_8bit`) |"),
        ("half (bfloat16, float16)", "| bfloat16 |"),
    ):
        total = totals[f"{precision}, use_grad_checkpoint"]
        [line] = [line for line in documented.splitlines() if line.startswith(row)]
        assert line.endswith(f"| {total:.1f} GiB |")
        assert total < 24


def test_the_language_model_that_is_there_is_counted(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoints["original"]
    language_model = next(path.parent for path in folder.glob("*/config.json"))
    options = f"model: {{llama_model: {language_model}, ckpt: {next(folder.glob('VL*'))}, equip_audio_branch: False}}"
    (tmp_path / "run.yaml").write_text(options)
    found, _, _, *rows = lines_of(capsys, str(tmp_path / "run.yaml"))
    assert found == f"language model of {language_model}"
    assert "MiB |" in rows[0]


@pytest.mark.parametrize(("model", "words"), [("null", "is not set"), ("some/model", "its name gives no size")])
def test_a_language_model_that_nobody_knows_is_an_error(
    tmp_path: Path, model: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(f"model: {{llama_model: {model}, frozen_llama_proj: False}}")
    assert main([str(tmp_path / "run.yaml")]) == 1
    assert words in capsys.readouterr().err


def test_a_broken_configuration_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("model: {lama_model: x}")
    assert main([str(tmp_path / "run.yaml")]) == 1
    assert "llama_model" in capsys.readouterr().err
