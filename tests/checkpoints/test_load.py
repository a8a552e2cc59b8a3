"""From the original's files to a model: every bit of every weight, and nothing that is not in the files."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.checkpoints import AL, VL, assert_equal_tensors, edit_tensors, read_tensors, saved_weights
from tests.helpers.tokenizers import build_chat_tokenizer
from video_llama.checkpoints.load import build_processor, load_model, original_config
from video_llama.checkpoints.original_layout import OriginalFiles, find_original_files
from video_llama.checkpoints.weight_mapping import TRAINABLE_PARTS, part_of, to_our_name
from video_llama.errors import CheckpointError
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.eva_vit import interpolate_position_table
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration


@pytest.fixture
def files(checkpoints: dict[str, Path]) -> OriginalFiles:
    """Only to be read."""
    return find_original_files(checkpoints["original"])


def load_original(
    files: OriginalFiles, config: VideoLlamaConfig | None = None, dtype: torch.dtype = torch.float32, **options: Any
) -> VideoLlamaForConditionalGeneration:
    return load_model(files, config or original_config(files), dtype, **options)


def stored_weights(files: OriginalFiles) -> dict[str, Tensor]:
    """Every tensor of every file under our names."""
    paths = {
        "visual_encoder.": files.vision_encoder,
        "audio_encoder.": files.imagebind,
        "llama_model.": files.language_model / "model.safetensors",
    }
    named = {prefix + name: value for prefix, path in paths.items() for name, value in read_tensors(path).items()}
    for path in (files.qformer, files.video_branch, files.audio_branch):
        named |= read_tensors(path)
    return {to_our_name(name) or name: value for name, value in named.items()}


def is_trainable(name: str) -> bool:
    return part_of(name) in TRAINABLE_PARTS


def test_the_sizes_come_from_the_config_beside_the_files(files: OriginalFiles) -> None:
    config = original_config(files)
    assert (config.vision_config.hidden_size, config.text_config.hidden_size) == (64, 64)
    assert config.use_audio


def test_without_that_config_the_sizes_are_the_published_ones(files: OriginalFiles) -> None:
    config = original_config(dataclasses.replace(files, config=None, imagebind=None), num_query_tokens=7)
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (1408, 39)
    assert config.text_config.hidden_size == 64  # always of its own folder
    assert config.image_token_id == config.text_config.vocab_size
    assert config.num_query_tokens == 7
    assert not config.use_audio


def test_every_bit_of_every_file_arrives_and_nothing_else(files: OriginalFiles) -> None:
    model = load_original(files)
    assert_equal_tensors(saved_weights(model), stored_weights(files))
    assert not model.training


def test_weights_are_converted_and_what_trains_is_not_rounded(files: OriginalFiles) -> None:
    stored = stored_weights(files)
    model = load_original(files, dtype=torch.bfloat16, trainable_dtype=torch.float32)
    kept = {name: is_trainable(name) or name.endswith("log_logit_scale") for name in stored}
    expected = {name: value if kept[name] else value.bfloat16() for name, value in stored.items()}
    assert_equal_tensors(saved_weights(model), expected)


def test_a_folder_of_transformers_is_converted_in_the_same_way(
    checkpoints: dict[str, Path], files: OriginalFiles
) -> None:
    options = {"dtype": torch.bfloat16, "trainable_dtype": torch.float32}
    saved = load_model(checkpoints["hf"], original_config(files), **options)
    assert_equal_tensors(saved.state_dict(), load_original(files, **options).state_dict())


def test_the_position_table_is_interpolated_for_larger_pictures(files: OriginalFiles) -> None:
    config = original_config(files)
    config.vision_config.image_size = 84
    name = "video_branch.vision_encoder.pos_embed"
    table = saved_weights(load_original(files, config=config))[name]
    assert table.shape == (1, 37, 64)
    assert torch.equal(table, interpolate_position_table(stored_weights(files)[name], 36))


def test_branches_without_a_file_start_untrained(files: OriginalFiles) -> None:
    untrained = dataclasses.replace(files, video_branch=None, audio_branch=None)
    loaded, stored = saved_weights(load_original(untrained)), stored_weights(files)
    for name, value in loaded.items():
        assert value.isfinite().all(), name
        if not is_trainable(name):
            assert torch.equal(value, stored[name]), name
    assert not torch.equal(loaded["video_branch.video_query_tokens"], stored["video_branch.video_query_tokens"])


def test_a_projection_to_start_from_yields_to_the_checkpoint(
    files: OriginalFiles, original_folder: Path, tmp_path: Path
) -> None:
    torch.save({"model": {"llama_proj.weight": torch.ones(64, 64), "llama_proj.bias": torch.ones(64)}}, tmp_path / "p")
    start = dataclasses.replace(files, projection=tmp_path / "p")
    stored = stored_weights(files)["video_branch.projection.bias"]
    assert torch.equal(load_original(start).video_branch.projection.bias, stored)
    stage_1 = dataclasses.replace(start, video_branch=None)
    assert torch.equal(load_original(stage_1).video_branch.projection.bias, torch.ones(64))


def test_optimizer_state_and_stray_buffers_are_ignored_in_silence(
    files: OriginalFiles, original_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def add_strays(tensors: dict[str, Tensor]) -> None:
        tensors["Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
        tensors["llama_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["audio_encoder.modality_postprocessors.imu.1.log_logit_scale"] = torch.tensor(1.0)

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
    for name in (VL, AL):
        edit_tensors(original_folder / name, add_strays)
        content = torch.load(original_folder / name, weights_only=True)
        extra = {"optimizer": optimizer, "scaler": {"scale": 1.0}, "config": {"run": {"lr": 1e-4}}, "epoch": 3}
        torch.save({**content, **extra}, original_folder / name)
    edit_tensors(original_folder / "eva_vit_g.pth", lambda t: t.update({"blocks.39.norm1.weight": torch.ones(64)}))
    edit_tensors(
        original_folder / "imagebind_huge.pth",
        lambda t: t.update({"modality_trunks.text.blocks.0.norm_1.weight": torch.ones(64)}),
    )
    with caplog.at_level(logging.INFO, "video_llama"):
        model = load_original(find_original_files(original_folder))
    assert_equal_tensors(model.state_dict(), load_original(files).state_dict())
    [record] = caplog.records
    assert record.levelno == logging.INFO
    assert record.message.startswith("weights loaded: frame encoder (EVA ViT-g) 30, BLIP-2 Q-Former 47, ")


def test_names_that_mean_nothing_are_a_warning(original_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_tensors(original_folder / VL, lambda tensors: tensors.update({"ema.decay": torch.tensor(0.9)}))
    load_original(find_original_files(original_folder))
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "1 unknown names in VL_random_tiny.pth (ema.decay)" in record.message


def test_a_model_without_audio_branch_needs_none_of_its_files(files: OriginalFiles) -> None:
    model = load_original(dataclasses.replace(files, audio_branch=None, imagebind=None))
    expected = {name: value for name, value in stored_weights(files).items() if not name.startswith("audio_branch")}
    assert_equal_tensors(saved_weights(model), expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_another_language_model_is_loaded_from_its_folder(
    files: OriginalFiles, tmp_path: Path, kind: str, tied: bool
) -> None:
    language_model = save_language_model(tmp_path, kind, tied)
    model = load_original(dataclasses.replace(files, language_model=tmp_path))
    assert type(model.language_model) is type(language_model)
    assert_equal_tensors(model.language_model.state_dict(), language_model.state_dict())
    shares = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert shares is tied


def save_language_model(folder: Path, kind: str, tied: bool = False) -> torch.nn.Module:
    tokenizer = build_chat_tokenizer()
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer) + 8, num_key_value_heads=2, tie_word_embeddings=tied, **sizes
    )
    language_model = AutoModelForCausalLM.from_config(config)
    language_model.save_pretrained(folder)
    return language_model


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (None, r"1 weights are missing \(model\.norm\.weight, …\)"),
        (torch.ones(8), r"1 weights have another shape \(model\.norm\.weight, …\)"),
    ],
)
def test_a_gap_in_a_language_model_that_transformers_matches_is_an_error(
    files: OriginalFiles, tmp_path: Path, tensor: Tensor | None, sentence: str
) -> None:
    save_language_model(tmp_path, "qwen2")
    change = {} if tensor is None else {"model.norm.weight": tensor}
    file = tmp_path / "model.safetensors"
    edit_tensors(file, lambda tensors: (tensors.pop("model.norm.weight"), tensors.update(change)))
    with pytest.raises(CheckpointError, match=f"{tmp_path}: {sentence}"):
        load_original(dataclasses.replace(files, language_model=tmp_path))


def test_such_a_gap_is_an_error_in_a_saved_folder_too(files: OriginalFiles, tmp_path: Path) -> None:
    save_language_model(tmp_path / "qwen", "qwen2")
    model = load_original(dataclasses.replace(files, language_model=tmp_path / "qwen"))
    model.save_pretrained(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved", model.config, torch.float32)
    assert_equal_tensors(loaded.state_dict(), model.state_dict())
    edit_tensors(tmp_path / "saved/model.safetensors", lambda tensors: tensors.pop("language_model.model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"saved: 1 weights are missing \(model\.norm\.weight, …\)"):
        load_model(tmp_path / "saved", model.config, torch.float32)


def test_the_processor_has_the_sizes_of_the_model(files: OriginalFiles, tmp_path: Path) -> None:
    config = original_config(files, num_video_query_tokens=5, num_audio_query_tokens=3)
    processor = build_processor(config, files.language_model)
    assert processor.placeholder_ids == {"image": config.image_token_id, "audio": config.audio_token_id}
    assert processor.placeholder_lengths == {"image": 5, "audio": 3}
    assert processor.media_processor.image_size == 56
    assert processor.media_processor.log_mel.num_mel_frames == 204
    assert processor.use_audio
    assert processor.conv_template == "llama_2"
    assert build_processor(config, files.language_model, "v1").conv_template == "v1"


def test_the_processor_of_another_language_model_speaks_its_own_template(files: OriginalFiles, tmp_path: Path) -> None:
    save_language_model(tmp_path, "qwen2")
    config = original_config(dataclasses.replace(files, language_model=tmp_path))
    assert build_processor(config, tmp_path).conv_template == "tokenizer"
