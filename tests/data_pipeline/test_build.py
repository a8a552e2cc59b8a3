"""From the datasets section of a configuration to batches."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.data_pipeline.conftest import NUM_CLIPS, WriteText, write_picture
from video_llama.config import Config, load_config
from video_llama.data.build import build_batch_reader, build_datasets, index_shards, load_prompts
from video_llama.data.features import FeatureStore
from video_llama.data.mixture import MixtureBatchSampler
from video_llama.data.sample_processor import SampleProcessor
from video_llama.errors import ConfigError, DatasetError
from video_llama.processor.processing_video_llama import VideoLlamaProcessor

ROOT = Path(__file__).parents[2]
YAML = """
model: {{max_txt_len: 48, end_sym: "###", model_type: pretrain_vicuna}}
datasets:
  webvid:
    data_type: video
    build_info: {{anno_dir: {0}/train/webvid/annotations, videos_dir: {0}/train/webvid/videos}}
    valid_build_info: {{anno_dir: {0}/validation/webvid/annotations, videos_dir: {0}/validation/webvid/videos}}
    sample_ratio: 3
  laion:
    data_type: images
    build_info: {{storage: {0}/train/laion}}
    sample_ratio: 1
  audio_caption:
    data_type: audio
    build_info: {{anno_dir: {0}/train/audio_caption, videos_dir: {0}/train/audio_caption/audio}}
    sample_ratio: 1
run: {{batch_size_train: 3, iters_per_epoch: 20, max_epoch: 2}}
"""


@pytest.fixture
def make_config(corpus: Path, write: WriteText) -> Any:
    """The configuration above, with overrides."""
    path = write("train.yaml", YAML.format(corpus))
    return lambda *options: load_config(path, options)


def encoders(config: Config, processor: VideoLlamaProcessor, **settings: Any) -> dict[str, SampleProcessor]:
    settings = {"training": True, **settings}
    return {dataset.name: dataset.encoder for dataset in build_datasets(config, processor, **settings)}


def test_each_process_indexes_its_share_of_the_shards_and_what_is_wrong_is_told_later(
    make_config: Any, corpus: Path, processor: VideoLlamaProcessor, tmp_path: Path
) -> None:
    shards = [tmp_path / "shards" / f"{number}.tar" for number in range(5)]
    shards[0].parent.mkdir()
    for path in shards:
        path.write_bytes(next((corpus / "train" / "laion").glob("*.tar")).read_bytes())
    shards[3].write_text("no tar file")
    config = make_config(f"datasets.laion.build_info.storage={shards[0].parent}")

    def indexed() -> list[str]:
        return sorted(path.name.partition(".")[0] for path in (tmp_path / "shards" / ".index").glob("*"))

    index_shards(config, rank=1, world_size=3)
    assert indexed() == ["1", "4"]
    index_shards(config, rank=0, world_size=3)
    assert indexed() == ["0", "1", "4"]
    with pytest.raises(DatasetError, match=r"3\.tar: not a whole tar file"):
        build_datasets(config, processor, training=True)


def test_training_takes_the_training_splits_and_validation_those_that_there_are(
    make_config: Any, processor: VideoLlamaProcessor
) -> None:
    training = build_datasets(make_config(), processor, training=True)
    assert [dataset.name for dataset in training] == ["webvid", "laion", "audio_caption"]
    assert len(training[0].examples) == NUM_CLIPS
    [validation] = build_datasets(make_config(), processor, training=False)
    assert (validation.name, len(validation.examples)) == ("webvid", 3)


def test_only_training_without_a_cache_is_augmented(
    make_config: Any, processor: VideoLlamaProcessor, tmp_path: Path
) -> None:
    store = FeatureStore(tmp_path, "float32", {})
    augmented = encoders(make_config(), processor)
    assert augmented["webvid"].media.crop_scale is not None
    assert augmented["laion"].media.crop_scale is not None
    assert augmented["audio_caption"].media.crop_scale is None
    for settings in ({"features": store}, {"training": False}):
        for encoder in encoders(make_config(), processor, **settings).values():
            assert encoder.media.crop_scale is None
            assert encoder.media.sampling == "uniform"


def test_settings_of_the_section_go_before_those_of_the_model(make_config: Any, processor: VideoLlamaProcessor) -> None:
    processor = copy.copy(processor)
    processor.media_processor = dataclasses.replace(processor.media_processor, num_audio_segments=3)
    config = make_config(
        "datasets.webvid.vis_processor.train={n_frms: 5, min_scale: 0.7, mean: [0.1, 0.2, 0.3], video_reader: decord}"
    )
    media = encoders(config, processor)["webvid"].media
    assert (media.num_frames, media.image_size, tuple(media.mean)) == (5, 28, (0.1, 0.2, 0.3))
    assert media.crop_scale is not None
    assert media.crop_scale[0] == 0.7
    assert media.log_mel == processor.media_processor.log_mel
    assert media.num_audio_segments == 3
    plain = encoders(make_config(), processor)["webvid"].media
    assert (media.video_reader, plain.video_reader) == ("decord", "pyav")
    assert plain.num_frames == processor.media_processor.num_frames


def test_validation_reads_videos_as_the_section_of_training_says(
    make_config: Any, processor: VideoLlamaProcessor
) -> None:
    config = make_config("datasets.webvid.vis_processor.train={name: alpro_video_train, n_frms: 5}")
    assert encoders(config, processor, training=False)["webvid"].media.num_frames == 5


def test_an_image_size_that_is_not_the_models_is_a_config_error(
    make_config: Any, processor: VideoLlamaProcessor
) -> None:
    with pytest.raises(ConfigError, match="image_size is 224, but the model's is 28"):
        encoders(make_config("datasets.webvid.vis_processor.train.image_size=224"), processor)


def test_the_text_follows_the_model_section(make_config: Any, processor: VideoLlamaProcessor, corpus: Path) -> None:
    messages = f"datasets.messages.build_info.anno_dir={corpus}/train/messages"
    text = encoders(make_config(messages), processor)["webvid"].text
    assert (text.max_txt_len, text.end_sym, text.template, text.prompts) == (48, "###", "instruct_vicuna", [])
    assert text.caption_processor("A DOG!") == "a dog"
    # Without a key, the template of the language model's family.
    text = encoders(make_config(messages, "model.model_type=null"), processor)["webvid"].text
    assert text.template == "video_llama_2"
    with pytest.raises(ConfigError, match=r"datasets.messages.model_type is 'llama_v2', but model.model_type is"):
        encoders(make_config(messages, "datasets.messages.model_type=llama_v2"), processor)
    config = make_config("datasets.webvid.text_processor.train={name: blip_caption, max_words: 1, prompt: see }")
    assert encoders(config, processor)["webvid"].text.caption_processor("two dogs").startswith("see")


def test_a_cleaner_of_captions_is_found_by_its_name(make_config: Any, processor: VideoLlamaProcessor) -> None:
    with pytest.raises(ConfigError, match="unknown processor 'blip_captions'"):
        encoders(make_config("datasets.webvid.text_processor.train.name=blip_captions"), processor)


def test_pictures_stand_in_for_sound_but_sounds_and_messages_do_not(
    make_config: Any, processor: VideoLlamaProcessor, corpus: Path
) -> None:
    config = make_config(f"datasets.messages:mine.build_info.anno_dir={corpus}/train/messages")
    as_sound = {name: e.images_as_audio for name, e in encoders(config, processor, images_as_audio=True).items()}
    assert as_sound == {"webvid": True, "laion": True, "audio_caption": False, "messages:mine": False}
    assert not any(encoder.images_as_audio for encoder in encoders(make_config(), processor).values())


@pytest.mark.parametrize(("name", "right", "wrong"), [("webvid", 5, 3), ("audio_caption", 3, 5)])
def test_a_number_of_query_tokens_that_is_not_the_branchs_is_a_config_error(
    name: str, right: int, wrong: int, make_config: Any, processor: VideoLlamaProcessor
) -> None:
    encoders(make_config(f"datasets.{name}.num_video_query_token={right}"), processor)
    with pytest.raises(ConfigError, match=rf"{name}\.num_video_query_token is {wrong}.* has {right} query tokens"):
        encoders(make_config(f"datasets.{name}.num_video_query_token={wrong}"), processor)


def test_sounds_need_an_audio_branch(make_config: Any, processor: VideoLlamaProcessor) -> None:
    deaf = copy.copy(processor)
    deaf.use_audio = False
    with pytest.raises(ConfigError, match=r"datasets\.audio_caption is of audio"):
        encoders(make_config(), deaf)


def test_no_dataset_and_an_unknown_one_are_config_errors(make_config: Any, processor: VideoLlamaProcessor) -> None:
    with pytest.raises(ConfigError, match="names no dataset"):
        build_datasets(dataclasses.replace(make_config(), datasets={}), processor, training=True)
    with pytest.raises(ConfigError, match=r"unknown dataset 'web_vid'.*webvid_instruct"):
        build_datasets(make_config("datasets.web_vid.data_type=video"), processor, training=True)


def test_a_dataset_that_is_not_there_is_a_dataset_error(
    make_config: Any, processor: VideoLlamaProcessor, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match="no such file or folder"):
        encoders(make_config(f"datasets.webvid.build_info.anno_dir={tmp_path}/absent"), processor)


def test_batches_mix_the_datasets_by_their_ratios(make_config: Any, processor: VideoLlamaProcessor) -> None:
    config = make_config("datasets.audio_caption.sample_ratio=0")
    reader = build_batch_reader(config, build_datasets(config, processor, training=True), processor)
    assert len(reader) == 40
    batches = [reader[number] for number in range(12)]
    names = [{id_.partition("/")[0] for id_ in batch.ids} for batch in batches]
    assert all(len(batch.ids) == 3 for batch in batches)
    assert {"webvid"} in names
    assert {"laion"} in names
    assert {"audio_caption"} not in names


def test_ranks_share_the_batches(make_config: Any, processor: VideoLlamaProcessor) -> None:
    config, double = make_config(), make_config("run.batch_size_train=6")
    datasets = build_datasets(config, processor, training=True)
    whole = build_batch_reader(double, datasets, processor)
    ranks = [build_batch_reader(config, datasets, processor, rank=rank, world_size=2) for rank in (0, 1)]
    for number in range(4):
        assert [id_ for reader in ranks for id_ in reader[number].ids] == whole[number].ids


def test_shards_are_read_in_blocks_of_neighbours(
    make_config: Any, processor: VideoLlamaProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks: list[Any] = []

    class Plan(MixtureBatchSampler):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            blocks.append(settings["block_sizes"])
            super().__init__(*arguments, **settings)

    monkeypatch.setattr("video_llama.data.build.MixtureBatchSampler", Plan)
    config = make_config()
    build_batch_reader(config, build_datasets(config, processor, training=True), processor)
    assert blocks == [[0, 1000, 0]]


def test_ratios_must_make_sense(make_config: Any, processor: VideoLlamaProcessor) -> None:
    config = make_config("datasets.laion.sample_ratio=-1")
    datasets = build_datasets(config, processor, training=True)
    with pytest.raises(ConfigError, match=r"datasets\.laion\.sample_ratio must be 0 or more"):
        build_batch_reader(config, datasets, processor)


def test_detailed_captions_are_taken_as_they_are_unless_a_key_asks_for_cleaning(
    make_config: Any, processor: VideoLlamaProcessor, corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def cleans(*options: str) -> dict[str, bool]:
        storage = corpus / "train/cc_sbu_align"
        aligned = f"datasets.cc_sbu_align={{data_type: images, build_info: {{storage: {storage}}}}}"
        built = encoders(make_config(aligned, *options), processor)
        return {name: built[name].text.caption_processor is not None for name in ("webvid", "cc_sbu_align")}

    assert cleans() == {"webvid": True, "cc_sbu_align": False}
    keys = ["datasets.webvid.clean_captions=False", "datasets.cc_sbu_align.clean_captions=True"]
    assert cleans(*keys) == {"webvid": False, "cc_sbu_align": True}
    assert "text_processor" not in caplog.text
    # The original's files name a cleaner here, and the original does not use it.
    assert not cleans("datasets.cc_sbu_align.text_processor.train.name=blip_caption")["cc_sbu_align"]
    assert "datasets.cc_sbu_align.text_processor has no effect" in caplog.text


def test_the_small_models_captions_stay_cleaned() -> None:
    config = load_config(ROOT / "configs/train/tiny_visionbranch_stage1_pretrain.yaml")
    assert config.datasets["cc_sbu_align"].clean_captions is True


@pytest.mark.parametrize("branch", ["vision", "audio"])
def test_the_shipped_stage_2_learns_captions_with_an_instruction(
    branch: str, processor: VideoLlamaProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    write_picture(tmp_path / "image/1.jpg")
    caption = 'A dog, "Rex" (age 3), runs. ' * 11
    content = {"annotations": [{"image_id": "1", "caption": caption}]}
    (tmp_path / "filter_cap.json").write_text(json.dumps(content), encoding="utf-8")
    storage = f"datasets.cc_sbu_align.build_info.storage={tmp_path}"
    config = load_config(ROOT / f"configs/train/{branch}branch_stage2_finetune.yaml", [storage])
    for name in ("llava_instruct", "webvid_instruct"):
        del config.datasets[name]
    config.datasets["cc_sbu_align"].vis_processor.train.image_size = None
    [dataset] = build_datasets(config, processor, training=True, images_as_audio=branch == "audio")
    sample = dataset.encoder(dataset.examples[0])
    media = [token for token in sample.input_ids if token >= len(processor.tokenizer)]
    assert len(media) == {"vision": 5, "audio": 3}[branch]
    start = sample.input_ids.index(media[0])
    before, behind = sample.input_ids[:start], sample.input_ids[start + len(media) :]
    assert str(processor.tokenizer.decode(before)).endswith("<Image>")
    words = str(processor.tokenizer.decode(behind))
    instructions = (ROOT / "prompts/alignment_image.txt").read_text(encoding="utf-8").splitlines()
    asked, _, answer = words.partition(" [/INST] ")
    assert f"<Image><ImageHere>{asked}" in instructions
    # Neither in lower case nor cut at 50 words.
    assert answer.strip().removesuffix("</s>").split() == caption.split()


def test_a_template_without_prompts_is_a_config_error(make_config: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.prompt_template is set and model\.prompt_path is not"):
        load_prompts(make_config("model.prompt_template='{} '").model)


def test_prompts_are_the_lines_with_a_place_for_media_in_their_template(make_config: Any, write: WriteText) -> None:
    path = write("prompts.txt", "<Image><ImageHere></Image> Describe it.\n\nno place\n<ImageHere> What?\n")
    config = make_config(f"model.prompt_path={path}", "model.prompt_template='###Human: {} ###Assistant: '").model
    assert load_prompts(config) == [
        "###Human: <Image><ImageHere></Image> Describe it. ###Assistant: ",
        "###Human: <ImageHere> What? ###Assistant: ",
    ]
    assert load_prompts(make_config().model) == []


@pytest.mark.parametrize(
    ("content", "template", "cause"),
    [
        ("Describe it.", "{}", "no line of"),
        ("<ImageHere>", "Human:", "does not hold"),
        ("<ImageHere><ImageHere>", "{}", "once"),
        (None, "{}", "cannot be read"),
    ],
)
def test_prompts_that_are_none_are_config_errors(
    content: str | None, template: str, cause: str, make_config: Any, write: WriteText, tmp_path: Path
) -> None:
    path = tmp_path / "absent.txt" if content is None else write("prompts.txt", content)
    config = make_config(f"model.prompt_path={path}")
    config.model.prompt_template = template
    with pytest.raises(ConfigError, match=cause):
        load_prompts(config.model)
