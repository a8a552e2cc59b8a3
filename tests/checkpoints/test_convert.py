"""Writing checkpoints in either layout: bit for bit, a shard at a time, and never half."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoints.test_weight_mapping import SMALL_VISION_TRUNK
from tests.helpers.checkpoints import (
    AL,
    VL,
    HeldWeights,
    assert_equal_tensors,
    edit_tensors,
    load_checkpoint,
    read_tensors,
    saved_weights,
)
from tests.helpers.tiny_model import make_tiny_config
from video_llama.checkpoints import convert
from video_llama.checkpoints.convert import (
    language_model_files,
    open_original,
    open_transformers_folder,
    prepare_output_folder,
    write_original_folder,
    write_shards,
    write_transformers_folder,
)
from video_llama.checkpoints.load import build_processor, original_config
from video_llama.checkpoints.original_layout import find_original_files, is_transformers_folder
from video_llama.checkpoints.weight_files import open_weights
from video_llama.errors import CheckpointError
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.precision import kept_dtype
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.processor.processing_video_llama import VideoLlamaProcessor


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def some_weights(count: int = 6) -> HeldWeights:
    torch.manual_seed(0)
    return HeldWeights("held", {f"layer.{number}": torch.randn(10, 25) for number in range(count)})  # 1000 bytes each


def same_names(weights: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: name for name in weights}


def to_hf(source: Path, target: Path, **options: Any) -> Path:
    files = find_original_files(source)
    config = original_config(files)
    processor = build_processor(config, files.language_model)
    target.mkdir()
    options = {"language_model_files": files.language_model, **options}
    write_transformers_folder(open_original(files, config), config, processor, target, **options)
    return target


def to_original(source: Path, target: Path, **options: Any) -> Path:
    config = VideoLlamaConfig.from_pretrained(source)
    target.mkdir()
    options = {"language_model_files": source / "language_model", "name": "random_tiny", **options}
    write_original_folder(open_transformers_folder(source), config, target, **options)
    return target


def sizes_of(config: Path) -> dict[str, Any]:
    notes = ("architectures", "dtype")  # of a folder for transformers
    return {key: value for key, value in json.loads(config.read_text()).items() if key not in notes}


def assert_same_files(left: Path, right: Path) -> None:
    """The same names, the same tensors, and all other files the same bytes (but for what only one layout notes)."""
    files = [
        sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) for folder in (left, right)
    ]
    assert files[0] == files[1]
    for name in files[0]:
        if name.suffix in (".pth", ".safetensors"):
            assert_equal_tensors(read_tensors(left / name), read_tensors(right / name))
        elif name == Path("config.json"):
            assert sizes_of(left / name) == sizes_of(right / name)
        else:
            assert (left / name).read_bytes() == (right / name).read_bytes(), name


def test_there_and_back_gives_the_original_files(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    back = to_original(to_hf(checkpoints["original"], tmp_path / "hf"), tmp_path / "back")
    assert_same_files(back, checkpoints["original"])


def test_back_and_there_gives_the_folder_of_transformers(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    again = to_hf(to_original(checkpoints["hf"], tmp_path / "original"), tmp_path / "again")
    assert_same_files(again, checkpoints["hf"])


def test_shards_hold_the_same_bits_in_both_layouts(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    sharded = to_hf(checkpoints["original"], tmp_path / "hf", max_shard_size="200KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 5
    assert_equal_tensors(open_weights(sharded), open_weights(checkpoints["hf"]))
    back = to_original(sharded, tmp_path / "back", max_shard_size="200KB")
    assert len(list(back.glob("language_model/model-*.safetensors"))) > 1
    models = [load_checkpoint(path).model.state_dict() for path in (sharded, back, checkpoints["original"])]
    assert_equal_tensors(models[0], models[2])
    assert_equal_tensors(models[1], models[2])


def test_a_checkpoint_without_sound_is_converted_both_ways(original_folder: Path, tmp_path: Path) -> None:
    for name in (AL, "imagebind_huge.pth"):
        (original_folder / name).unlink()
    hf = to_hf(original_folder, tmp_path / "hf")
    assert not load_checkpoint(hf).has_audio
    back = to_original(hf, tmp_path / "back")
    assert sorted(path.name for path in back.glob("*.pth")) == sorted(
        path.name for path in original_folder.glob("*.pth")
    )
    assert not load_checkpoint(back).has_audio


def test_weights_of_several_files_know_which_file_each_is_from(original_folder: Path) -> None:
    files = find_original_files(original_folder)
    weights = open_original(files, original_config(files))
    assert weights.file_of("video_branch.video_query_tokens") == original_folder / VL
    assert weights.file_of("audio_branch.audio_query_tokens") == original_folder / AL


def test_imagebinds_vision_trunk_goes_to_imagebinds_file(out: Path) -> None:
    model = VideoLlamaForConditionalGeneration(make_tiny_config(imagebind_vision_config=SMALL_VISION_TRUNK))
    (out / "small").mkdir()
    weights = HeldWeights("model", saved_weights(model))
    write_original_folder(weights, model.config, out, language_model_files=out / "small", name="x")
    names = set(read_tensors(out / "imagebind_huge.pth"))
    assert {"modality_trunks.vision.blocks.1.norm_1.bias", "modality_trunks.audio.blocks.1.norm_1.bias"} <= names
    assert not any(name.startswith("audio_encoder.") for name in names)


def test_the_files_have_the_form_of_the_published_ones(checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["original"]
    assert set(torch.load(folder / VL, weights_only=True)) == {"model"}
    assert set(torch.load(folder / "blip2_pretrained_flant5xxl.pth", weights_only=True)) == {"model"}
    assert "cls_token" in torch.load(folder / "eva_vit_g.pth", weights_only=True)
    assert "modality_heads.audio.2.weight" in torch.load(folder / "imagebind_huge.pth", weights_only=True)
    assert "llama_proj.weight" in read_tensors(folder / VL)
    assert "audio_llama_proj.weight" in read_tensors(folder / AL)


def test_weights_are_converted_on_request(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    half = to_hf(checkpoints["original"], tmp_path / "half", dtype=torch.bfloat16)
    full = open_weights(checkpoints["hf"])
    assert_equal_tensors(open_weights(half), {name: full[name].to(kept_dtype(name, torch.bfloat16)) for name in full})
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    files = to_original(checkpoints["hf"], tmp_path / "original", dtype=torch.float16)
    for name, tensor in read_tensors(files / VL).items():
        assert tensor.dtype == (torch.float32 if "Qformer" in name else torch.float16), name
    assert {tensor.dtype for tensor in read_tensors(files / "language_model/model.safetensors").values()} == {
        torch.float16
    }


def test_whole_numbers_are_not_converted(out: Path) -> None:
    weights = HeldWeights("held", {"table": torch.arange(3), "weight": torch.ones(2)})
    write_shards(weights, same_names(weights), out, dtype=torch.bfloat16)
    assert_equal_tensors(
        read_tensors(out / "model.safetensors"), {"table": torch.arange(3), "weight": torch.ones(2).bfloat16()}
    )


def test_shards_keep_to_their_size_and_rename(out: Path) -> None:
    weights = some_weights()
    written: list[int] = []
    write_shards(weights, {f"new.{name}": name for name in weights}, out, max_shard_size=2500, advance=written.append)
    assert [path.stat().st_size < 2500 + 1000 for path in sorted(out.glob("*.safetensors"))] == [True] * 3
    assert_equal_tensors(open_weights(out), {f"new.{name}": weights[name] for name in weights})
    assert written == [1000] * 6


def test_never_more_than_one_shard_is_in_memory(out: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Watched(HeldWeights):
        def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
            nonlocal most
            tensor = super().read(name, dtype)
            alive.append(weakref.ref(tensor))
            most = max(most, sum(reference() is not None for reference in alive))
            return tensor

    held = some_weights(12)
    write_shards(Watched("held", dict(held)), same_names(held), out, max_shard_size=3000)
    assert len(alive) == 12
    assert most <= 4  # a shard of three, and the last tensor of the one before


def test_an_interrupted_conversion_leaves_nothing_that_looks_finished(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = convert.save_file, []

    def run_out_of_space(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        calls.append(path)
        save(tensors, path, **options)
        if len(calls) == 3:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "save_file", run_out_of_space)
    with pytest.raises(OSError, match="No space left"):
        to_hf(checkpoints["original"], tmp_path / "hf", max_shard_size="200KB")
    files = sorted(path.name for path in (tmp_path / "hf").rglob("*"))
    assert [name[:11] for name in files] == ["model-00001", "model-00002"]  # whole; the third is gone
    assert all(name.endswith(".safetensors") for name in files)
    assert not is_transformers_folder(tmp_path / "hf")


def test_only_an_empty_folder_is_written_to(tmp_path: Path) -> None:
    assert prepare_output_folder(tmp_path / "a" / "b").is_dir()
    assert prepare_output_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    for path in (tmp_path / "a", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match=f"{path}: exists already and is not empty; choose another folder"):
            prepare_output_folder(path)


def test_a_folder_of_another_model_is_not_converted(hf_folder: Path) -> None:
    edit_tensors(hf_folder / "model.safetensors", lambda tensors: tensors.update({"score.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"1 names are not Video-LLaMA's, the first is score\.weight"):
        open_transformers_folder(hf_folder)


def test_the_language_models_own_files_are_kept_or_taken_out_of_the_model(hf_folder: Path, tmp_path: Path) -> None:
    config = VideoLlamaConfig.from_pretrained(hf_folder)
    assert language_model_files(hf_folder, config, tmp_path) == hf_folder / "language_model"
    shutil.rmtree(hf_folder / "language_model")  # as in a folder that save_pretrained wrote
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert language_model_files(hf_folder, config, scratch) == scratch
    assert json.loads((scratch / "config.json").read_text())["model_type"] == "llama"
    back = to_original(hf_folder, tmp_path / "back", language_model_files=scratch)
    text = "What is in this video?"
    tokenizers = [load_checkpoint(path).processor.tokenizer for path in (back, hf_folder)]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]


def test_a_saved_folder_names_nothing_of_this_machine(checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["hf"]
    for path in folder.rglob("*.json"):
        assert str(folder.parent) not in path.read_text(), path
        assert "/tmp" not in path.read_text(), path
    assert isinstance(VideoLlamaProcessor.from_pretrained(folder), VideoLlamaProcessor)
