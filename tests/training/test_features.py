"""Training from the feature cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_model import make_tiny_config
from tests.training.conftest import MakeConfig
from tests.training.test_trainer import assert_same, read_log, trained
from video_llama.data.features import Encoding, FeatureStore
from video_llama.data.sample_processor import MediaInput
from video_llama.errors import ConfigError
from video_llama.model.imagebind import ImageBindTrunk
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.training import features
from video_llama.training.features import FeatureFiller
from video_llama.training.trainer import Trainer

pytestmark = pytest.mark.slow


@pytest.fixture
def tiny_model() -> VideoLlamaForConditionalGeneration:
    torch.manual_seed(0)
    return VideoLlamaForConditionalGeneration(make_tiny_config()).eval()


# With a cache nothing is augmented; without one the same is had from the processors for evaluation.
EVAL = [
    "datasets.webvid.vis_processor.train.name=alpro_video_eval",
    "datasets.cc_sbu_align.vis_processor.train.name=blip2_image_eval",
]


LENGTHS = (1, 8, 5, 17, 3)


def clips(*lengths: int) -> list[MediaInput]:
    """Frames for the cache; those of each clip are its own."""
    return [
        MediaInput(
            "pixel_values", torch.randn(length, 3, 28, 28, generator=torch.Generator().manual_seed(seed)), str(seed)
        )
        for seed, length in enumerate(lengths)
    ]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder) if line["event"] == "train"]


def stored(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "features").rglob("*") if path.is_file())


def test_cached_features_give_the_losses_of_encoding_anew(make_config: MakeConfig, tmp_path: Path) -> None:
    plain = Trainer(make_config(*EVAL, f"run.output_dir={tmp_path / 'plain'}"))
    plain.train()
    cached = [f"features.dir={tmp_path / 'cache'}", "features.encoding=float32"]
    for name in ("filling", "filled"):
        trainer = Trainer(make_config(*cached, f"run.output_dir={tmp_path / name}"))
        trainer.train()
        assert losses(trainer.folder) == pytest.approx(losses(plain.folder), rel=1e-5)
    assert_same(trained(tmp_path / "filling"), trained(tmp_path / "filled"))


def test_a_filled_cache_is_read_and_nothing_is_encoded_or_decoded(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(f"features.dir={tmp_path / 'cache'}", "run.output_dir=" + str(tmp_path / "one"))
    trainer = Trainer(config)
    encoded, bad = trainer.cache_features()
    assert (encoded, bad) == (len(stored(tmp_path / "cache")), 0) != (0, 0)
    assert trainer.cache_features() == (0, 0)

    def fail(*args: object) -> None:
        raise AssertionError("encoded although it is cached")

    monkeypatch.setattr(FeatureFiller, "_encode", fail)
    monkeypatch.setattr("video_llama.processor.media_processor.decode_video", fail)
    trainer.train()


def test_a_damaged_entry_is_computed_again(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(f"features.dir={tmp_path / 'cache'}")
    trainer = Trainer(config)
    trainer.cache_features()
    whole = {path: path.read_bytes() for path in stored(tmp_path / "cache")}
    damaged = next(iter(whole))
    damaged.write_bytes(whole[damaged][:-5])
    assert trainer.cache_features() == (1, 0)
    assert {path: path.read_bytes() for path in stored(tmp_path / "cache")} == whole


@pytest.mark.parametrize(("encoding", "tolerance"), [("bfloat16", 1e-2), ("int8", 1e-2)])
def test_cheaper_encodings_change_the_loss_little(
    encoding: str, tolerance: float, make_config: MakeConfig, tmp_path: Path
) -> None:
    folders = {}
    for name in ("float32", encoding):
        folders[name] = tmp_path / name
        options = [f"features.dir={tmp_path / 'cache'}", f"features.encoding={name}", f"run.output_dir={folders[name]}"]
        Trainer(make_config(*options)).train()
    assert losses(folders[encoding]) == pytest.approx(losses(folders["float32"]), rel=tolerance)
    assert losses(folders[encoding]) != losses(folders["float32"])


def test_sound_and_pictures_in_its_place_are_cached_too(make_config: MakeConfig, corpus: Path, tmp_path: Path) -> None:
    folder = corpus / "train" / "audio_caption"
    config = make_config(
        "model.equip_audio_branch=True",
        "model.frozen_audio_Qformer=False",
        "model.frozen_video_Qformer=True",
        "model.frozen_llama_proj=True",
        "datasets.audio_caption.data_type=audio",
        f"datasets.audio_caption.build_info.anno_dir={folder / 'captions.csv'}",
        f"datasets.audio_caption.build_info.videos_dir={folder / 'audio'}",
        "datasets.audio_caption.sample_ratio=2",
        f"features.dir={tmp_path / 'cache'}",
    )
    trainer = Trainer(config)
    assert isinstance(trainer.model.audio_branch.vision_encoder, ImageBindTrunk)  # type: ignore[union-attr]
    trainer.train()
    inputs = [trainer.batches()[number].model_inputs("cpu") for number in range(trainer.num_iterations)]
    assert all("segment_vectors" in batch for batch in inputs)
    assert all(torch.isfinite(torch.tensor(losses(trainer.folder))))


def test_features_have_the_same_bits_whatever_was_encoded_with_them(
    tiny_model: VideoLlamaForConditionalGeneration, tmp_path: Path
) -> None:
    filler = FeatureFiller(tiny_model, FeatureStore(tmp_path, "float32", {}), torch.device("cpu"))
    together, alone = clips(*LENGTHS), clips(*LENGTHS)
    assert filler(together) == len(LENGTHS)
    for item, by_itself in zip(together, alone, strict=True):
        filler([by_itself])
        assert torch.equal(item.values, by_itself.values)


def test_batches_of_a_fixed_size_hold_the_frames_of_several_items(
    tiny_model: VideoLlamaForConditionalGeneration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(features.FIXED_BATCH, "cpu", 8)  # as on a GPU
    filler = FeatureFiller(tiny_model, FeatureStore(tmp_path, "float32", {}), torch.device("cpu"))
    seen: list[int] = []
    tiny_model.video_branch.vision_encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    items, plain = clips(*LENGTHS), clips(*LENGTHS)
    filler(items)
    assert seen == [8] * 5  # 34 frames
    for item, unencoded in zip(items, plain, strict=True):
        expected = tiny_model.video_branch.encode_frames(unencoded.values[None])[0]
        torch.testing.assert_close(item.values, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("encoding", "dtype"), [("bfloat16", torch.bfloat16), ("int8", torch.float32)])
def test_features_are_used_as_they_are_stored(
    tiny_model: VideoLlamaForConditionalGeneration, encoding: Encoding, dtype: torch.dtype, tmp_path: Path
) -> None:
    store = FeatureStore(tmp_path, encoding, {})
    items = clips(3, 9)
    FeatureFiller(tiny_model, store, torch.device("cpu"))(items)
    for item in items:
        loaded = store.load(item.key or "")
        assert loaded is not None
        assert torch.equal(loaded.values, item.values)
        assert item.values.dtype == dtype


def test_an_entry_that_cannot_be_written_stops_the_filling(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FeatureStore, key: str, features: object) -> None:
        raise ConfigError("the disk is full")

    trainer = Trainer(make_config(f"features.dir={tmp_path / 'cache'}"))
    monkeypatch.setattr(FeatureStore, "save", refuse)
    with pytest.raises(ConfigError, match="the disk is full"):
        trainer.cache_features()


def test_caching_without_a_cache_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"features\.dir must be set"):
        Trainer(make_config()).cache_features()


@pytest.mark.parametrize("key", ["features.dir", "run.output_dir"])
def test_a_file_in_the_place_of_a_folder_is_told_with_the_key_that_names_it(
    key: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ConfigError, match=rf"{key}: the folder {tmp_path / 'taken'}"):
        Trainer(make_config(f"{key}={tmp_path / 'taken'}"))


def test_sharded_encoders_cannot_fill_a_cache(make_config: MakeConfig, tmp_path: Path) -> None:
    trainer = Trainer(make_config(f"features.dir={tmp_path / 'cache'}"))
    assert trainer._filler is not None
    trainer._filler._is_sharded = True
    with pytest.raises(ConfigError, match="--cache-features without FSDP"):
        trainer.train()
