"""Tiny random encoders, connectors and language models in many combinations: built, trained in two stages, resumed,
saved, loaded by transformers, asked, and used for captions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import av
import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

from examples.tiny_world.world.corpus import WorldSettings, make_corpus
from tests.helpers.language_models import make_language_model
from tests.helpers.parts import make_audio_encoder, make_frame_encoder, yaml_keys
from tests.training.test_trainer import assert_same, trained
from video_llama.config import Config, load_config
from video_llama.inference.chat import Chat
from video_llama.inference.load import load_pretrained_model
from video_llama.training.checkpoints import list_checkpoints
from video_llama.training.trainer import Trainer

CONFIG = """
model:
  frozen_llama_proj: False
  frozen_video_Qformer: False
  max_txt_len: 400
  num_video_query_token: 6
  num_audio_query_token: 3
  num_query_token: 4
  dtype: float32
run:
  init_lr: 1e-3
  min_lr: 1e-4
  max_epoch: 1
  iters_per_epoch: 5
  batch_size_train: 2
  num_workers: 0
  save_freq: 2
  log_freq: 1
  amp: False
  device: cpu
"""
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
CONNECTORS = {
    "qformer": {"frame_layers": 2},
    "video_qformer": {"tokens_per_frame": 4},
    "perceiver": {"tokens_per_frame": 9},
    "mlp": {"frames": 2, "tokens_per_frame": 4},
}


class Combination(NamedTuple):
    """Names of one part of each kind."""

    frame_encoder: str
    audio_encoder: str
    language_model: str
    connector: str


# Every part occurs with every part of another kind somewhere, and each of the first eight shows what no other does.
SUITE = [
    Combination("siglip", "whisper", "qwen2", "perceiver"),
    Combination("clip", "ast", "gemma", "qformer"),
    Combination("dinov2", "clap", "phi3", "video_qformer"),
    Combination("timm", "whisper", "llama", "mlp"),
    Combination("siglip", "clap", "gemma", "mlp"),
    Combination("clip", "whisper", "phi3", "perceiver"),
    Combination("dinov2", "ast", "llama", "qformer"),
    Combination("timm", "clap", "qwen2", "video_qformer"),
]
OTHERS = [
    Combination("siglip", "ast", "phi3", "qformer"),
    Combination("siglip", "whisper", "llama", "video_qformer"),
    Combination("clip", "clap", "llama", "mlp"),
    Combination("clip", "ast", "qwen2", "video_qformer"),
    Combination("dinov2", "whisper", "gemma", "perceiver"),
    Combination("dinov2", "clap", "qwen2", "mlp"),
    Combination("timm", "ast", "gemma", "perceiver"),
    Combination("timm", "whisper", "phi3", "qformer"),
    Combination("siglip", "clap", "llama", "perceiver"),
    Combination("clip", "whisper", "gemma", "video_qformer"),
    Combination("dinov2", "ast", "phi3", "mlp"),
    Combination("timm", "clap", "qwen2", "qformer"),
]


def find_videos(data: Path, split: str) -> list[Path]:
    return sorted((data / split / "webvid" / "videos").rglob("*.mp4"))


def has_audio(video: Path) -> bool:
    with av.open(str(video)) as container:
        return bool(container.streams.audio)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few clips with audio, their captions, and questions about them."""
    folder = tmp_path_factory.mktemp("data") / "world"
    make_corpus(folder, WorldSettings(6, 1, 64, (4, 2, 0)))
    videos = [video for video in find_videos(folder, "train") if has_audio(video)][:2]
    lines = []
    for video in videos:
        media = [{"type": kind, "path": str(video)} for kind in ("video", "audio")]
        question = {"role": "user", "content": [*media, {"type": "text", "text": "What?"}]}
        lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": "Two rings."}]}))
    (folder / "talk.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


def configure(parts: Path, chosen: Combination, output: Path, *options: str) -> Config:
    """Return a configuration of these parts, which are made where they are not there yet."""
    file = parts / "train.yaml"
    file.write_text(CONFIG)
    places = [parts / name for name in chosen[:3]]
    keys = []
    for place, (section, make) in zip(
        places, {"frame_encoder": make_frame_encoder, "audio_encoder": make_audio_encoder}.items(), strict=False
    ):
        record = place.with_suffix(".json")
        if not record.exists():
            record.write_text(json.dumps(make(place.name, place)))
        keys += yaml_keys(f"model.{section}", json.loads(record.read_text()))
    if not places[2].exists():
        make_language_model(places[2].name, places[2])
    keys += yaml_keys("model.connector", {"name": chosen.connector, **SIZES, **CONNECTORS[chosen.connector]})
    return load_config(file, [*keys, f"model.llama_model={places[2]}", f"run.output_dir={output}", *options])


def stage_options(number: int, chosen: Combination, data: Path, first: Path) -> list[str]:
    """Return the options of a stage: captions of videos, then questions about videos with their audio."""
    learns_frames = ["frame_qformer"] if chosen.connector == "qformer" else []
    if number == 1:
        webvid = data / "train" / "webvid"
        learnt = ",".join([*learns_frames, "video_qformer", "video_projection"])
        return [
            f"model.unfreeze=[{learnt}]",
            "model.equip_audio_branch=False",
            f"datasets.webvid.build_info.anno_dir={webvid / 'annotations'}",
            f"datasets.webvid.build_info.videos_dir={webvid / 'videos'}",
            "datasets.webvid.vis_processor.train.n_frms=3",
        ]
    options = [
        "model.unfreeze=[video_qformer,video_projection,audio_qformer,audio_projection]",
        "model.equip_audio_branch=True",
        f"model.ckpt={first}",
        f"datasets.messages.build_info.anno_dir={data / 'talk.jsonl'}",
        "datasets.messages.vis_processor.train.n_frms=3",
    ]
    return options


def run_stages(chosen: Combination, parts: Path, data: Path, folder: Path) -> Path:
    """Train both stages, the second with a feature cache and once more from its middle; return its folder."""
    first, second, again = (folder / name for name in ("first", "second", "again"))
    Trainer(configure(parts, chosen, first, *stage_options(1, chosen, data, first))).train()
    options = [*stage_options(2, chosen, data, first), f"features.dir={folder / 'features'}"]
    Trainer(configure(parts, chosen, second, *options)).train()
    middle = list_checkpoints(second / "checkpoints")[0]
    shutil.copytree(middle, again / "checkpoints" / middle.name)
    trainer = Trainer(configure(parts, chosen, again, *options, "run.resume_ckpt_path=auto"))
    assert 0 < trainer.state.iteration < 5
    trainer.train()
    assert_same(trained(second), trained(again))
    return second


def check_combination(chosen: Combination, parts: Path, data: Path, folder: Path) -> None:
    run = run_stages(chosen, parts, data, folder)
    model = load_pretrained_model(run, device="cpu", half=False, verbose=False)
    model.model.save_pretrained(folder / "saved")
    model.processor.save_pretrained(folder / "saved")
    # By transformers alone: the same weights, and the same features of the same file.
    loaded = AutoModelForMultimodalLM.from_pretrained(folder / "saved")
    assert_same(dict(model.model.state_dict()), dict(loaded.state_dict()))
    # Some with audio and some without.
    clips = sorted([*find_videos(data, "train"), *find_videos(data, "validation")], key=has_audio, reverse=True)
    clips = [clips[0], clips[1], clips[-1]]
    processor = AutoProcessor.from_pretrained(folder / "saved")
    frames, audio = processor.media_processor.process_video(clips[0])
    same_frames, same_audio = model.processor.media_processor.process_video(clips[0])
    assert torch.equal(frames.pixel_values, same_frames.pixel_values)
    assert torch.equal(audio.values, same_audio.values)
    video_tokens = loaded.get_video_features(frames.pixel_values[None])
    assert torch.equal(video_tokens, model.model.get_video_features(frames.pixel_values[None]))
    assert torch.equal(
        loaded.get_audio_features(audio.values[None]), model.model.get_audio_features(audio.values[None])
    )

    whole = load_pretrained_model(folder / "saved", device="cpu", half=False, verbose=False)
    chat = Chat(whole)
    chat.upload_video(clips[0])
    chat.ask("What is it?")
    assert isinstance(chat.answer(max_new_tokens=4), str)
    options = {"max_new_tokens": 6, "num_frames": 3}
    together = list(whole.caption(clips, batch_size=3, **options))
    alone = list(whole.caption(clips, batch_size=1, **options))
    assert together == alone


@pytest.mark.parametrize("chosen", SUITE, ids="-".join)
def test_a_combination_trains_resumes_saves_loads_chats_and_captions(
    chosen: Combination, parts: Path, data: Path, tmp_path: Path
) -> None:
    check_combination(chosen, parts, data, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", OTHERS, ids="-".join)
def test_further_combinations_do_the_same(chosen: Combination, parts: Path, data: Path, tmp_path: Path) -> None:
    check_combination(chosen, parts, data, tmp_path)
