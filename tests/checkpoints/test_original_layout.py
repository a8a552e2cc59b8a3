"""Finding the files of a published checkpoint, in its folder or elsewhere, and saying what is absent."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.checkpoints import AL, VL, assert_equal_tensors, load_checkpoint
from video_llama.checkpoints import hub
from video_llama.checkpoints.original_layout import (
    OriginalFiles,
    configured_files,
    find_original_files,
    is_transformers_folder,
    resolve_checkpoint,
    resolve_language_model,
)
from video_llama.config import ModelConfig
from video_llama.errors import CheckpointError

EVA, BLIP2, IMAGEBIND = "eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth", "imagebind_huge.pth"


def all_files(folder: Path) -> OriginalFiles:
    return OriginalFiles(
        language_model=folder / "language_model",
        vision_encoder=folder / EVA,
        qformer=folder / BLIP2,
        video_branch=folder / VL,
        audio_branch=folder / AL,
        imagebind=folder / IMAGEBIND,
        config=folder / "config.json",
    )


def without_sound(files: OriginalFiles) -> OriginalFiles:
    return dataclasses.replace(files, audio_branch=None, imagebind=None)


@pytest.fixture
def downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that web addresses are downloaded to."""

    def download(address: str, path: str) -> None:
        Path(path).write_text(address)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return tmp_path / "torch" / "checkpoints"


@pytest.mark.parametrize("name", ["", VL, AL])
def test_all_files_are_found_from_the_folder_or_a_file_in_it(original_folder: Path, name: str) -> None:
    assert find_original_files(original_folder / name) == all_files(original_folder)


def test_without_sound_its_files_are_not_needed(original_folder: Path) -> None:
    (original_folder / IMAGEBIND).unlink()
    assert find_original_files(original_folder, audio=False) == without_sound(all_files(original_folder))
    (original_folder / AL).unlink()
    assert find_original_files(original_folder) == without_sound(all_files(original_folder))


def test_a_hub_id_is_downloaded_without_what_only_sound_needs(
    original_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        hub, "snapshot_download", lambda name, allow_patterns: asked.append(allow_patterns) or str(original_folder)
    )
    assert find_original_files("owner/name") == all_files(original_folder)
    find_original_files("owner/name", audio=False)
    assert resolve_checkpoint("owner/name") == original_folder
    assert [patterns.count("*.pth") for patterns in asked] == [1, 0, 1]


def test_files_that_lie_elsewhere_can_be_named(original_folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in (EVA, BLIP2, IMAGEBIND, "language_model"):
        shutil.move(original_folder / name, elsewhere / name)
    (elsewhere / EVA).rename(elsewhere / "my_eva.pth")
    found = find_original_files(
        original_folder,
        language_model=elsewhere / "language_model",
        vision_encoder=elsewhere / "my_eva.pth",
        qformer=elsewhere,
        imagebind=elsewhere,
    )
    assert found == dataclasses.replace(
        all_files(original_folder),
        language_model=elsewhere / "language_model",
        vision_encoder=elsewhere / "my_eva.pth",
        qformer=elsewhere / BLIP2,
        imagebind=elsewhere / IMAGEBIND,
    )


def test_what_the_published_folders_lack_comes_from_its_public_address(original_folder: Path, downloaded: Path) -> None:
    for name in (EVA, BLIP2):
        (original_folder / name).unlink()
    found = find_original_files(original_folder)
    assert (found.vision_encoder, found.qformer) == (downloaded / EVA, downloaded / BLIP2)
    assert found.vision_encoder.read_text().endswith("/BLIP2/eva_vit_g.pth")
    assert found.qformer.read_text().endswith("/BLIP2/blip2_pretrained_flant5xxl.pth")


def test_the_sizes_of_a_foreign_config_json_are_not_ours(original_folder: Path) -> None:
    (original_folder / "config.json").write_text('{"model_type": "llama"}')
    assert find_original_files(original_folder).config is None
    (original_folder / "config.json").unlink()
    assert find_original_files(original_folder).config is None


def copy_file(source: str, target: str) -> Callable[[Path], Any]:
    return lambda folder: shutil.copy(folder / source, folder / target)


def remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (remove(VL), r"original: no VL\*\.pth, which holds the video Q-Former; put it here"),
        (remove(AL), r"original: no AL\*\.pth, which holds the audio Q-Former and projection; put it here"),
        (remove(IMAGEBIND), r"imagebind_huge\.pth: no such file .* it should be .*\(imagebind_ckpt_path\)"),
        (remove("language_model"), r"original: no language model; put its folder here .* model_base .* llama_model"),
        (copy_file(VL, "VL_2.pth"), r"several checkpoints \(VL_2\.pth, VL_random_tiny\.pth\) of the .*; give the path"),
        (copy_file(AL, "AL_2.pth"), r"several checkpoints \(AL_2\.pth, AL_random_tiny\.pth\) of the .*; give the path"),
        (
            lambda folder: shutil.copytree(folder / "language_model", folder / "vicuna"),
            r"several language models \(language_model, vicuna\); say which one with llama_model",
        ),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            r"config\.json: damaged or cut off, .* download it again",
        ),
    ],
)
def test_what_is_absent_or_ambiguous_is_named(
    original_folder: Path, change: Callable[[Path], Any], sentence: str
) -> None:
    change(original_folder)
    with pytest.raises(CheckpointError, match=sentence):
        find_original_files(original_folder, audio=True)


def test_of_several_checkpoints_the_path_chooses(original_folder: Path) -> None:
    shutil.copy(original_folder / VL, original_folder / "VL_2.pth")
    assert find_original_files(original_folder / "VL_2.pth").video_branch == original_folder / "VL_2.pth"


def test_a_checkpoint_of_2023_has_any_name(original_folder: Path) -> None:
    (original_folder / VL).rename(original_folder / "finetune-vicuna7b.pth")
    found = find_original_files(original_folder / "finetune-vicuna7b.pth", audio=False)
    assert found.video_branch == original_folder / "finetune-vicuna7b.pth"


def test_branches_of_2023_are_told_apart_by_their_weights(
    original_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    video, audio = original_folder / "finetune-vicuna7b-v2.pth", original_folder / "finetune_vicuna7b_audiobranch.pth"
    (original_folder / VL).rename(video)
    (original_folder / AL).rename(audio)
    for path in (original_folder, video, audio):
        found = find_original_files(path, audio=True)
        assert (found.video_branch, found.audio_branch) == (video, audio)
    # With two audio branches nothing says which belongs to the video branch.
    shutil.copy(audio, original_folder / "pretrain_vicuna7b_audiobranch.pth")
    assert find_original_files(video).audio_branch is None
    assert "several checkpoints of the audio Q-Former" in caplog.text
    for path in (video, original_folder):
        with pytest.raises(CheckpointError, match=r"several checkpoints \(finetune_.*, pretrain_.*\) of the audio"):
            find_original_files(path, audio=True)


def test_a_folder_of_2023_loads_beside_a_language_model_elsewhere(
    original_folder: Path, tmp_path: Path, make_video: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from video_llama.cli.demo_video import main

    expected = load_checkpoint(original_folder).state_dict()
    (original_folder / VL).rename(original_folder / "finetune-vicuna7b-v2.pth")
    (original_folder / AL).rename(original_folder / "finetune_vicuna7b_audiobranch.pth")
    base = (original_folder / "language_model").rename(tmp_path / "vicuna-7b")
    with pytest.raises(CheckpointError, match="say where it is with model_base"):
        load_checkpoint(original_folder)
    loaded = load_checkpoint(original_folder, model_base=base)
    assert loaded.has_audio
    assert_equal_tensors(loaded.state_dict(), expected)
    clip = str(make_video("clip.mp4", audio=True))
    arguments = ["--model", str(original_folder), "--model-base", str(base), "--device", "cpu", "--input", clip]
    assert main([*arguments, "--question", "What?", "--max-new-tokens", "4"]) == 0
    assert "audio: all of its" in capsys.readouterr().out


def test_the_file_that_is_named_counts_not_one_beside_it(original_folder: Path) -> None:
    mine = shutil.copy(original_folder / VL, original_folder / "mine.pth")
    assert find_original_files(mine, audio=False).video_branch == Path(mine)


def test_a_language_model_folder_must_hold_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a language model: the folder must hold config\.json and one of"):
        resolve_language_model(tmp_path)


def test_llama_in_metas_own_format_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").touch()
    with pytest.raises(CheckpointError, match="LLaMA in Meta's own format; take the release for transformers"):
        resolve_language_model(tmp_path)


def test_pickled_shards_of_a_hub_repository_are_only_downloaded_where_there_is_nothing_else(
    original_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = tmp_path / "download", []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append("*.bin" in allow_patterns)
        folder.mkdir(exist_ok=True)
        (folder / "config.json").touch()
        if "*.bin" in allow_patterns:
            (folder / "pytorch_model.bin").touch()
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve_language_model("lmsys/vicuna-7b") == folder
    assert asked == [False, True]


def test_folders_of_transformers_are_told_apart(original_folder: Path, hf_folder: Path) -> None:
    assert is_transformers_folder(hf_folder)
    assert not is_transformers_folder(original_folder)  # it has our sizes, but not the weights
    assert not is_transformers_folder(original_folder / "language_model")
    assert not is_transformers_folder(original_folder / VL)
    (hf_folder / "model.safetensors").unlink()
    assert not is_transformers_folder(hf_folder)


def section(folder: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(**{"ckpt": str(folder / VL), "ckpt_2": str(folder / AL), **settings})


def test_a_configuration_that_names_two_checkpoints_finds_the_rest_beside_them(original_folder: Path) -> None:
    assert configured_files(section(original_folder)) == all_files(original_folder)


def test_a_configuration_may_name_folders(original_folder: Path) -> None:
    by_folder = section(original_folder, ckpt=str(original_folder), ckpt_2=str(original_folder))
    assert configured_files(by_folder) == all_files(original_folder)


def test_every_path_of_a_configuration_counts(original_folder: Path, tmp_path: Path) -> None:
    names = {"vit_ckpt": EVA, "q_former_model": BLIP2, "imagebind_ckpt_path": IMAGEBIND, "llama_proj_model": VL}
    paths = {key: tmp_path / f"{key}.pth" for key in names}
    for key, name in names.items():
        shutil.copy(original_folder / name, paths[key])
    language_model = shutil.copytree(original_folder / "language_model", tmp_path / "llama")
    settings = {key: str(path) for key, path in paths.items()} | {"llama_model": str(language_model)}
    assert configured_files(section(original_folder, **settings)) == dataclasses.replace(
        all_files(original_folder),
        language_model=language_model,
        vision_encoder=paths["vit_ckpt"],
        qformer=paths["q_former_model"],
        imagebind=paths["imagebind_ckpt_path"],
        projection=paths["llama_proj_model"],
    )


def test_a_configuration_without_audio_branch_ignores_its_files(original_folder: Path) -> None:
    for name in (AL, IMAGEBIND):
        (original_folder / name).unlink()
    files = configured_files(section(original_folder, equip_audio_branch=False))
    assert files == without_sound(all_files(original_folder))


def test_a_configuration_without_checkpoints_looks_here(original_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(original_folder)
    files = configured_files(ModelConfig())
    expected = dataclasses.replace(all_files(original_folder), video_branch=None, audio_branch=None)
    assert files == expected


@pytest.mark.parametrize("key", ["ckpt", "ckpt_2", "llama_proj_model"])
def test_a_path_of_a_configuration_that_is_absent_is_named_with_its_key(original_folder: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"/absent/x\.pth: no such file or folder; it should be model\.{key}$"):
        configured_files(section(original_folder, **{key: "/absent/x.pth"}))
