"""Parts by name: others' parts, what they are given, and what is said where one is missing."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ASTFeatureExtractor, SiglipImageProcessor, SiglipModel, WhisperFeatureExtractor, WhisperModel

from tests.helpers.language_models import make_language_model
from tests.helpers.parts import make_audio_encoder, make_frame_encoder
from tests.parts.test_combinations import CONNECTORS, SIZES
from video_llama import registry
from video_llama.checkpoints.convert import write_original_folder
from video_llama.checkpoints.weight_files import open_weights
from video_llama.config import FeaturesConfig, ModelConfig
from video_llama.demo.shared_model import SharedModel
from video_llama.errors import CheckpointError, ConfigError
from video_llama.inference.engine import VideoLlama
from video_llama.inference.load import build_model, build_model_processor, load_pretrained_model
from video_llama.model.connectors.mlp import _time_shares
from video_llama.processor.builders import load_processor
from video_llama.training.features import open_feature_store

ROOT = Path(__file__).parents[2]
OWN = {
    "plugins": ["tests.parts.own_encoder"],
    "frame_encoder": {"name": "own_patches"},
    "audio_encoder": {"name": "own_bins"},
    "connector": {"name": "own_mlp", **SIZES, **CONNECTORS["mlp"]},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders by the name of a part."""
    folder = tmp_path_factory.mktemp("parts")
    for name in ("siglip", "dinov2"):
        make_frame_encoder(name, folder / name)
    for name in ("whisper", "ast"):
        make_audio_encoder(name, folder / name)
    for name in ("gemma", "llama"):
        make_language_model(name, folder / name)
    return folder


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Registries without the entries of the test's own module, as in a process that has not imported it."""
    tables = (registry.FRAME_ENCODERS, registry.AUDIO_ENCODERS, registry.CONNECTORS)
    kept = [dict(table._entries) for table in tables]
    for table in tables:
        for name in [name for name in table._entries if name.startswith("own_")]:
            del table._entries[name]
    sys.modules.pop("tests.parts.own_encoder", None)
    yield
    for table, entries in zip(tables, kept, strict=True):
        table._entries.update(entries)


def section(parts: Path, **changes: Any) -> ModelConfig:
    keys: dict[str, Any] = {
        "frame_encoder": {"name": "transformers", "path": str(parts / "siglip")},
        "audio_encoder": {"name": "transformers", "path": str(parts / "whisper")},
        "connector": {"name": "perceiver", **SIZES, **CONNECTORS["perceiver"]},
        "llama_model": str(parts / "llama"),
        "num_video_query_token": 6,
        "dtype": "float32",
    }
    return ModelConfig(**keys | changes)


def build(parts: Path, **changes: Any) -> VideoLlama:
    return build_model(section(parts, **changes), device="cpu", for_training=True)


def test_parts_of_a_package_of_others_are_used_saved_and_found_again(parts: Path, tmp_path: Path) -> None:
    model = build(parts, **OWN)
    assert type(model.model.video_branch).__name__ == "OwnBranch"
    media = model.processor.media_processor
    assert (media.image_size, media.mean, media.std) == (32, (0.5,) * 3, (0.25,) * 3)
    assert (media.log_mel.num_mel_bins, media.num_audio_segments) == (20, 3)
    frames = torch.randn(1, 4, 3, 32, 32)
    audio = torch.randn(1, 3, 1, 20, 50)
    model.save_pretrained(tmp_path / "saved")
    again = load_pretrained_model(tmp_path / "saved", device="cpu", half=False, verbose=False)
    assert torch.equal(model.model.get_video_features(frames), again.model.get_video_features(frames))
    assert torch.equal(model.model.get_audio_features(audio), again.model.get_audio_features(audio))
    assert again.processor.media_processor == media


@pytest.mark.slow
def test_a_process_without_their_module_is_told_so_and_one_with_it_loads(parts: Path, tmp_path: Path) -> None:
    build(parts, **OWN).save_pretrained(tmp_path / "saved")
    program = (
        "from video_llama.inference.load import load_pretrained_model\n"
        f"model = load_pretrained_model({str(tmp_path / 'saved')!r}, device='cpu', half=False, verbose=False)\n"
        "print(type(model.model.video_branch).__name__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    without = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "registered by the Python module tests.parts.own_encoder, which is not imported" in without.stderr
    environment["VIDEO_LLAMA_PLUGINS"] = "tests.parts.own_encoder"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "OwnBranch", done.stderr


def test_a_missing_module_is_named_and_a_saved_folder_imports_nothing(
    parts: Path, tmp_path: Path, forgotten: None
) -> None:
    build(parts, **OWN).save_pretrained(tmp_path / "saved")
    for table in (registry.FRAME_ENCODERS, registry.AUDIO_ENCODERS, registry.CONNECTORS):
        for name in [name for name in table._entries if name.startswith("own_")]:
            del table._entries[name]
    message = r"connector 'own_mlp' was registered by the Python module tests\.parts\.own_encoder"
    with pytest.raises(ConfigError, match=message):
        load_pretrained_model(tmp_path / "saved", device="cpu", half=False, verbose=False)
    with pytest.raises(ConfigError, match=r"model.plugins: 'no_such_module' cannot be imported"):
        build(parts, plugins=["no_such_module"])


def test_entry_points_of_installed_packages_are_imported_when_a_name_is_unknown(
    monkeypatch: pytest.MonkeyPatch, forgotten: None
) -> None:
    asked: list[str] = []

    def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
        asked.append(group)
        return [importlib.metadata.EntryPoint("own", "tests.parts.own_encoder", group)]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert registry.FRAME_ENCODERS.get("timm").__name__ == "TimmFrameEncoder"
    assert not asked
    assert registry.FRAME_ENCODERS.get("own_patches").__name__ == "OwnFrameEncoder"
    assert asked == ["video_llama.plugins"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame_encoder": {"name": "tim", "model": "vit"}}, r"unknown frame encoder 'tim'; did you mean 'timm'"),
        ({"frame_encoder": {"path": "x"}}, r"model.frame_encoder needs the key name"),
        ({"frame_encoder": {"name": "timm"}}, r"needs the key model"),
        ({"frame_encoder": {"name": "timm", "model": "no_such_vit"}}, r"timm's model 'no_such_vit'"),
        ({"frame_encoder": {"name": "timm", "model": "resnet18"}}, r"timm.*resnet18|no tokens"),
        ({"frame_encoder": {"name": "transformers", "path": "nowhere"}}, r"nowhere: no such file or folder"),
        ({"audio_encoder": {"name": "transformers", "file": "x"}}, r"unknown keys file; known: path"),
        ({"connector": {"name": "perceiver", "depth": 3}}, r"unknown keys depth"),
        ({"connector": {"name": "resampler"}}, r"unknown connector 'resampler'"),
        ({"connector": {"name": "mlp", "frames": 3, "tokens_per_frame": 5}}, r"square"),
    ],
)
def test_wrong_keys_are_named(parts: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=message):
        build(parts, **changes)


def test_frames_and_audio_are_those_of_the_encoders_own_processors(parts: Path) -> None:
    processor = build_model_processor(section(parts))
    media = processor.media_processor
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 56, 3), np.uint8))
    theirs = SiglipImageProcessor.from_pretrained(parts / "siglip")(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(media.process_image(image).pixel_values, theirs, atol=1e-6, rtol=0)
    samples = np.random.default_rng(1).standard_normal(32000).astype(np.float32) / 8
    for name, kind in (("whisper", WhisperFeatureExtractor), ("ast", ASTFeatureExtractor)):
        keys = {"name": "transformers", "path": str(parts / name), "num_segments": 1}
        media = build_model_processor(section(parts, audio_encoder=keys)).media_processor
        own = kind.from_pretrained(parts / name)
        audio = media.process_audio((samples, 16000))
        piece = samples[: round(media.log_mel.segment_seconds * 16000)]
        expected = next(iter(own(piece, sampling_rate=16000, return_tensors="pt").values()))
        assert audio.values.shape[0] == 1
        # Segments are spread to the end of the audio: one begins at its start.
        torch.testing.assert_close(audio.values[0, 0], expected[0].float(), atol=1e-5, rtol=0)


def test_encoders_give_what_transformers_own_models_give(parts: Path) -> None:
    model = build(parts, connector={"name": "perceiver", **SIZES, "tokens_per_frame": 16}).model
    frames = torch.randn(1, 2, 3, 56, 56)
    theirs = SiglipModel.from_pretrained(parts / "siglip").vision_model(pixel_values=frames[0]).last_hidden_state
    expected = torch.nn.functional.layer_norm(theirs, theirs.shape[-1:])
    torch.testing.assert_close(model.video_branch.encode_frames(frames)[0], expected)
    values = torch.randn(1, 2, 1, 16, 200)
    states = WhisperModel.from_pretrained(parts / "whisper").get_encoder()(values[0, :, 0]).last_hidden_state
    pooled = torch.nn.functional.adaptive_avg_pool1d(states.transpose(1, 2), 8).transpose(1, 2)
    torch.testing.assert_close(model.audio_branch.encode_segments(values)[0], pooled)


def test_frames_that_another_processor_has_read_are_normalised_anew(parts: Path) -> None:
    model = build(parts)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 56, 3), np.uint8))
    own = model.processor.media_processor.process_image(image)
    other = load_processor("alpro_video_eval", image_size=56).process_image(image)
    assert not torch.allclose(own.pixel_values, other.pixel_values, atol=0.1)
    torch.testing.assert_close(model.prepare_values(other), model.prepare_values(own), atol=1e-5, rtol=0)


def test_embeddings_that_a_language_model_scales_are_scaled_once(parts: Path) -> None:
    """Gemma multiplies embeddings by the root of its width: text gives the same logits through ours and by itself."""
    model = build(parts, llama_model=str(parts / "gemma")).model
    ids = torch.randint(3, 200, (2, 9))
    torch.testing.assert_close(model(input_ids=ids).logits, model.language_model(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["perceiver", "video_qformer", "mlp"])
def test_attention_is_shown_where_a_connector_has_some(parts: Path, name: str) -> None:
    shared = SharedModel(build(parts, connector={"name": name, **SIZES, **CONNECTORS[name]}))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 56, 3), np.uint8))
    encoded = shared.encode(shared.processor.media_processor.process_image(image))
    if name == "mlp":
        assert shared.shares(encoded) == []
    else:
        assert shared.shares(encoded) == pytest.approx([1.0], abs=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
def test_frames_are_averaged_over_time_as_adaptive_pooling_does(length: int) -> None:
    frames = torch.randn(1, 8, 4, 6)
    mask = (torch.arange(8) < length).repeat_interleave(4)[None]
    cells = torch.einsum("vcf,vftw->vctw", _time_shares(frames, mask, 3), frames)
    series = frames[:, :length].permute(0, 2, 3, 1).flatten(0, 1)
    expected = torch.nn.functional.adaptive_avg_pool1d(series, 3).unflatten(0, (1, 4)).permute(0, 3, 1, 2)
    torch.testing.assert_close(cells, expected)


def test_cached_features_are_those_of_one_encoder_and_one_way_of_keeping_them(parts: Path, tmp_path: Path) -> None:
    found = set()
    for changes in (
        {},
        {"frame_encoder": {"name": "transformers", "path": str(parts / "dinov2")}},
        {"connector": {"name": "perceiver", **SIZES, "tokens_per_frame": 4}},
        {"frame_encoder": {"name": "transformers", "path": str(parts / "siglip"), "image_size": 28}},
    ):
        model = build(parts, **changes).model.requires_grad_(False)
        store = open_feature_store(FeaturesConfig(dir=str(tmp_path / "cache")), model, images_as_audio=False)
        assert store is not None
        found.add(store.fingerprints["pixel_values"])
    assert len(found) == 4


def test_the_original_layout_is_refused_in_one_line(parts: Path, tmp_path: Path) -> None:
    model = build(parts)
    model.save_pretrained(tmp_path / "saved")
    message = "cannot hold the connector 'perceiver' and the frame encoder 'transformers' and the audio encoder"
    with pytest.raises(CheckpointError, match=message):
        write_original_folder(
            open_weights(tmp_path / "saved"), model.model.config, tmp_path, language_model_files=parts, name="x"
        )


def test_a_folder_is_not_loaded_as_one_of_other_parts(parts: Path, tmp_path: Path) -> None:
    build(parts).save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"model.connector.name is mlp, but there it is perceiver"):
        build(parts, ckpt=str(tmp_path / "saved"), connector={"name": "mlp"}, num_video_query_token=32)


def test_a_part_that_a_connector_lacks_cannot_train(parts: Path) -> None:
    with pytest.raises(ConfigError, match=r"frame_qformer would train, but model.connector 'perceiver' has none"):
        build(parts, unfreeze=["frame_qformer"])
