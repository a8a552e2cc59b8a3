"""Folders of weights that are not what was written, and weights that are no numbers."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from video_llama.checkpoints.hub import PACKAGED_MODELS
from video_llama.checkpoints.integrity import CHECKSUMS, verify_folder, write_checksums
from video_llama.cli.convert import main as convert
from video_llama.errors import CheckpointError
from video_llama.inference.load import load_pretrained_model

NAME = "video_branch.projection.weight"


@pytest.fixture
def folder(hf_folder: Path) -> Path:
    write_checksums(hf_folder)
    assert verify_folder(hf_folder) == []
    return hf_folder


def weights_of(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def spoil(folder: Path, value: float) -> None:
    (path,) = (path for path in folder.glob("*.safetensors") if NAME in load_file(path))
    tensors = load_file(path)
    tensors[NAME][0, 0] = value
    save_file(tensors, path, metadata={"format": "pt"})


def test_the_packaged_model_is_whole() -> None:
    assert verify_folder(PACKAGED_MODELS / "video-llama-tiny") == []


def test_the_listing_is_what_sha256sum_reads(folder: Path) -> None:
    lines = (folder / CHECKSUMS).read_text().splitlines()
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert len(lines) == sum(path.is_file() for path in folder.rglob("*")) - 1


def test_one_flipped_bit_in_the_weights_is_found(folder: Path) -> None:
    path = weights_of(folder)
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    (problem,) = verify_folder(folder)
    assert str(path) in problem
    assert "changed since it was written" in problem


def test_files_that_are_missing_or_that_nobody_listed_are_found(folder: Path) -> None:
    (folder / "processor_config.json").rename(folder / "other.json")
    problems = verify_folder(folder)
    assert f"{folder / 'processor_config.json'}: missing, but listed in {CHECKSUMS}" in problems
    assert f"{folder / 'other.json'}: not listed in {CHECKSUMS}" in problems
    # The settings are not read either.
    assert len(problems) == 3


def test_a_note_beside_the_weights_is_no_problem(folder: Path) -> None:
    (folder / "README.md").write_text("A card.")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.json").write_text("{}")
    assert verify_folder(folder) == []


def test_a_damaged_listing_is_a_problem(folder: Path) -> None:
    (folder / CHECKSUMS).write_text("nothing of use\n")
    assert any("damaged" in problem for problem in verify_folder(folder))


def test_a_folder_without_checksums_is_read_all_the_same(hf_folder: Path) -> None:
    path = weights_of(hf_folder)
    path.write_bytes(path.read_bytes()[:-100])
    assert any(str(path) in problem for problem in verify_folder(hf_folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_a_problem_and_do_not_load(hf_folder: Path, value: float) -> None:
    spoil(hf_folder, value)
    (problem,) = verify_folder(hf_folder)
    assert "NaN or infinity in 1 weights" in problem
    assert NAME in problem
    with pytest.raises(CheckpointError, match="NaN or infinity in 1 weights"):
        load_pretrained_model(hf_folder, device="cpu", half=False)


def test_trained_weights_of_the_original_layout_that_are_no_numbers_do_not_load(original_folder: Path) -> None:
    path = next(original_folder.glob("VL_*.pth"))
    content = torch.load(path, weights_only=True)
    next(iter(content["model"].values())).view(-1)[0] = float("nan")
    torch.save(content, path)
    assert any(str(path) in problem for problem in verify_folder(original_folder))
    with pytest.raises(CheckpointError, match="NaN or infinity in 1 weights"):
        load_pretrained_model(original_folder, device="cpu", half=False)


def test_a_converted_folder_has_checksums(original_folder: Path, tmp_path: Path) -> None:
    assert convert([str(original_folder), str(tmp_path / "converted")]) == 0
    assert (tmp_path / "converted" / CHECKSUMS).exists()
    assert verify_folder(tmp_path / "converted") == []
    shutil.copy(tmp_path / "converted" / "config.json", tmp_path / "converted" / "generation_config.json")
    assert len(verify_folder(tmp_path / "converted")) == 1


def test_what_is_no_folder_is_a_problem(tmp_path: Path) -> None:
    assert verify_folder(tmp_path / "nowhere") == [f"{tmp_path / 'nowhere'}: not a folder"]
