"""Other language models: the template that is learnt teaches their end token, and is the one that is asked later."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.language_models import FAMILIES, make_language_model
from tests.training.conftest import MakeConfig
from video_llama.config import Config
from video_llama.conversation import conv_templates
from video_llama.data.build import EncodedDataset, build_datasets
from video_llama.errors import ConfigError
from video_llama.inference.chat import Chat
from video_llama.inference.load import build_model_processor, load_pretrained_model
from video_llama.training.trainer import Trainer

WITH_TEMPLATE = [family for family in FAMILIES if FAMILIES[family]["chat_template"]]
ANSWER = "Two red rings."


@pytest.fixture(scope="module")
def language_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders by family. Their names tell nothing of the model, as after a download by hand."""
    folder = tmp_path_factory.mktemp("language_models")
    for number, family in enumerate(FAMILIES):
        (folder / family).symlink_to(make_language_model(family, folder / f"language_model_{number}"))
    return folder


@pytest.fixture
def make_dialogues(make_config: MakeConfig, language_models: Path, tmp_path: Path) -> MakeConfig:
    """A configuration of two dialogues on a still, with a language model by its family."""
    Image.new("RGB", (40, 30), (200, 40, 90)).save(tmp_path / "a.jpg")
    question = {"role": "user", "content": [{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "What?"}]}
    turns = [question, {"role": "assistant", "content": ANSWER}]
    line = json.dumps({"messages": [*turns, {"role": "user", "content": "And?"}, turns[1]]})
    (tmp_path / "talk.jsonl").write_text(f"{line}\n{line}\n")

    def make(family: str, *options: str) -> Config:
        return make_config(
            f"model.llama_model={(language_models / family).resolve()}",
            "model.max_txt_len=400",
            f"datasets.messages.build_info.anno_dir={tmp_path / 'talk.jsonl'}",
            "datasets.webvid.sample_ratio=0",
            "datasets.cc_sbu_align.sample_ratio=0",
            "datasets.messages.sample_ratio=1",
            "run.max_epoch=1",
            "run.iters_per_epoch=1",
            *options,
        )

    return make


def build(config: Config) -> EncodedDataset:
    datasets = build_datasets(config, build_model_processor(config.model), training=True)
    return next(dataset for dataset in datasets if dataset.name == "messages")


@pytest.mark.parametrize("family", WITH_TEMPLATE)
def test_labels_teach_what_ends_an_answer_in_the_models_own_chat_template(
    family: str, make_dialogues: MakeConfig
) -> None:
    dataset = build(make_dialogues(family))
    tokenizer = dataset.encoder.text.tokenizer
    sample = dataset.encoder(dataset.examples[0])
    learnt = tokenizer.decode([token for token in sample.labels if token >= 0])
    ending = FAMILIES[family]["ending"]
    first_ending = ending.partition("\n")[0]
    assert learnt == f"{ANSWER}{first_ending}{ANSWER}{ending}"
    # Its own text, as the tokenizer itself writes it, around what the messages say.
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": said} for role, said in (("user", "@"), ("assistant", ANSWER))], tokenize=False
    )
    whole = tokenizer.decode([token for token in sample.input_ids if token < len(tokenizer)])
    assert whole.startswith(text.partition("@")[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", WITH_TEMPLATE)
def test_a_trained_folder_is_asked_in_the_template_that_was_learnt(
    family: str, make_dialogues: MakeConfig, tmp_path: Path
) -> None:
    config = make_dialogues(family)
    trainer = Trainer(config)
    trainer.train()
    dataset = next(dataset for dataset in trainer.datasets if dataset.name == "messages")
    sample = dataset.encoder(dataset.examples[0])
    model = load_pretrained_model(config.run.output_dir, device="cpu", half=False, verbose=False)
    assert model.processor.conv_template == "tokenizer"
    chat = Chat(model)
    chat.upload_img(tmp_path / "a.jpg")
    chat.ask("What?")
    prompt = model.prepare(chat.conversation(), chat.turns[0].uploads[0].encoded)
    ids = [key if isinstance(key, int) else model.processor.image_token_id for key in prompt.keys]
    first_answer = next(number for number, label in enumerate(sample.labels) if label >= 0)
    assert ids == sample.input_ids[:first_answer]
    # Generation stops at what the labels teach.
    end = FAMILIES[family]["ending"].partition("\n")[0]
    assert model.processor.tokenizer.convert_tokens_to_ids(end) in model.model.generation_config.eos_token_id


@pytest.mark.parametrize("option", ["model.model_type=vicuna", "datasets.messages.model_type=vicuna"])
def test_one_key_set_by_hand_is_enough_and_an_end_token_that_is_not_taught_is_told(
    option: str, make_dialogues: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        dataset = build(make_dialogues("qwen2", option))
    assert dataset.encoder.text.template == "instruct_vicuna"
    assert "no label teaches the tokenizer's end token '<|im_end|>'" in caplog.text


def test_two_keys_that_contradict_each_other_are_an_error(make_dialogues: MakeConfig) -> None:
    config = make_dialogues("qwen2", "model.model_type=tokenizer", "datasets.messages.model_type=llama_v2")
    sentence = r"datasets.messages.model_type is 'llama_v2', but model.model_type is 'tokenizer'.*leave one of the keys"
    with pytest.raises(ConfigError, match=sentence):
        build(config)
    named = make_dialogues("qwen2", "datasets.messages.model_type=llama_2", "datasets.webvid.model_type=llama_v2")
    with pytest.raises(ConfigError, match=r"a run has one conversation template"):
        build(named)


def test_a_family_and_one_of_its_templates_do_not_contradict_each_other(make_dialogues: MakeConfig) -> None:
    config = make_dialogues("qwen2", "model.model_type=pretrain_llama_v2", "datasets.messages.model_type=llama_2")
    assert build(config).encoder.text.template == "llama_2"


def test_a_tokenizer_without_chat_template_needs_the_key(make_dialogues: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"'<\|endoftext\|>'.*no chat template.*set model.model_type to one of"):
        Trainer(make_dialogues("gpt2"))
    with pytest.raises(ConfigError, match=r"needs the tokenizer's chat template, but the tokenizer has no chat"):
        Trainer(make_dialogues("gpt2", "datasets.messages.model_type=tokenizer"))
    named = build(make_dialogues("gpt2", "model.model_type=vicuna"))
    assert named.encoder.text.template == "instruct_vicuna"


def test_captions_alone_need_no_template(make_dialogues: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    config = make_dialogues("gpt2", "model.end_sym=<|endoftext|>")
    del config.datasets["messages"]
    with caplog.at_level(logging.WARNING):
        [dataset, _] = build_datasets(config, build_model_processor(config.model), training=True)
    sample = dataset.encoder(dataset.examples[0])
    assert sample.labels[-1] == dataset.encoder.text.tokenizer.eos_token_id
    assert "end token" not in caplog.text
    config.model.end_sym = "\n"
    build_datasets(config, build_model_processor(config.model), training=True)
    assert r"captions end with '\n' (model.end_sym), so no label teaches the end token" in caplog.text


def test_the_template_of_a_run_is_recorded_by_its_name(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config("run.max_epoch=1", "run.iters_per_epoch=1"))
    assert trainer.config.model.model_type == "llama_2"
    assert set(conv_templates) <= set(CHOICES)


CHOICES = Config().model.__dataclass_fields__["model_type"].metadata["choices"]
