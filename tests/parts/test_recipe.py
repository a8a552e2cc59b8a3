"""The three runs of docs/recipe.md, one after another, with tiny random parts in the places of the large ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.language_models import make_language_model
from tests.helpers.parts import make_audio_encoder, make_frame_encoder
from tests.parts.test_combinations import SIZES, data, find_videos, has_audio
from video_llama.config import Config, load_config
from video_llama.inference.chat import Chat
from video_llama.inference.load import load_pretrained_model
from video_llama.training.trainer import Trainer

__all__ = ["data"]

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parents[2] / "configs/recipes"
RUNS = ("stage1_vision", "stage1_audio", "stage2")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_frame_encoder("siglip", folder / "siglip")
    make_audio_encoder("whisper", folder / "whisper")
    make_language_model("qwen2", folder / "qwen2")
    return folder


def write_data(folder: Path, corpus: Path) -> None:
    """Write small files with the columns that the recipe names, where it looks for them."""
    videos = [video for video in find_videos(corpus, "train") if has_audio(video)]
    images = sorted((corpus / "train/cc_sbu_align/image").iterdir())
    tables = {
        "openvid/OpenVid-1M.csv": ("video,caption", videos),
        "pixelprose/captions.csv": ("image,vlm_caption", images),
        "audiosetcaps/captions.csv": ("audio,caption", videos),
    }
    for name, (head, files) in tables.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("\n".join([head, *(f"{file},A shape." for file in files)]) + "\n")
    (folder / "dialogues").mkdir()
    for name in ("train", "held_out"):
        (folder / f"dialogues/{name}.jsonl").write_text((corpus / "talk.jsonl").read_text())


def configure(name: str, parts: Path, folder: Path) -> Config:
    """Return a run of the recipe with tiny parts, a few steps, and all files in a folder."""
    options = [
        f"model.frame_encoder.path={parts / 'siglip'}",
        f"model.llama_model={parts / 'qwen2'}",
        *(f"model.connector.{key}={value}" for key, value in {**SIZES, "tokens_per_frame": 4}.items()),
        *("run.iters_per_epoch=2", "run.batch_size_train=2", "run.batch_size_eval=2", "run.num_workers=0"),
        *("run.device=cpu", f"run.output_dir={folder / name}", f"features.dir={folder / 'features'}"),
    ]
    if name != "stage1_vision":
        options += [f"model.audio_encoder.path={parts / 'whisper'}", f"model.ckpt={folder / 'stage1_vision'}"]
    if name == "stage2":
        options.append(f"model.ckpt_2={folder / 'stage1_audio'}")
    config = load_config(FOLDER / f"{name}.yaml", options)
    for section in config.datasets.values():
        for info in (section.build_info, section.valid_build_info):
            if info.anno_dir is not None:
                info.anno_dir = str(folder / info.anno_dir).replace(".parquet", ".csv")
                # The tables of this test name whole paths.
                info.videos_dir = str(folder)
    return config


def test_the_recipe_runs_from_stage_to_stage_with_tiny_parts(parts: Path, data: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "data", data)
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(RUNS)
    for name in RUNS:
        config = configure(name, parts, tmp_path)
        state = Trainer(config).train()
        assert state.iteration == 2 * config.run.max_epoch
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert state.samples_bad == 0
        assert any(line["event"] == "valid" for line in lines) == (name == "stage2")
    model = load_pretrained_model(tmp_path / "stage2", device="cpu", half=False, verbose=False)
    assert model.has_audio
    clip = next(video for video in find_videos(data, "train") if has_audio(video))
    chat = Chat(model)
    chat.upload_video(clip)
    chat.ask("What is it?")
    assert isinstance(chat.answer(max_new_tokens=4), str)
