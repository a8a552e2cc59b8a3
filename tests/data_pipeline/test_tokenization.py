"""Training samples; the recorded ids, labels and losses are in tests/parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from tests.helpers.tokenizers import build_chat_tokenizer
from video_llama.constants import IGNORE_INDEX
from video_llama.data.tokenization import (
    Turn,
    build_caption_sample,
    build_dialogue_sample,
    collate_text,
    dialogue_template,
    llava_instruct_turns,
    video_instruct_turns,
)
from video_llama.errors import ConfigError, DatasetError
from video_llama.processor.tokenizer import load_tokenizer

MEDIA = (1000, 4)
PROMPT = "###Human: <Image><ImageHere></Image> Describe it. ###Assistant: "


@pytest.fixture(scope="module")
def llama() -> PreTrainedTokenizerBase:
    return load_tokenizer(Path(__file__).parents[1] / "data" / "reference" / "tokenizer")


def plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)


def spoken(sample: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode([label for label in sample["labels"] if label != IGNORE_INDEX]))


def caption(text: str, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> dict[str, list[int]]:
    settings = {"placeholder": MEDIA, "end_sym": "###", "max_txt_len": 32, **settings}
    return build_caption_sample(text, tokenizer, **settings)


def dialogue(
    turns: list[Turn], tokenizer: PreTrainedTokenizerBase, model_type: str = "vicuna", max_txt_len: int = 400
) -> dict[str, list[int]]:
    return build_dialogue_sample(
        turns,
        tokenizer,
        template=dialogue_template(model_type),
        placeholder=MEDIA,
        max_txt_len=max_txt_len,
    )


def test_a_caption_sample_is_bos_media_and_caption(llama: PreTrainedTokenizerBase) -> None:
    text = plain("two dogs###", llama)
    assert caption("two dogs", llama) == {
        "input_ids": [1, *[1000] * 4, *text],
        "labels": [*[IGNORE_INDEX] * 5, *text],
    }


def test_a_prompt_stands_around_the_media_and_is_tokenised_apart(llama: PreTrainedTokenizerBase) -> None:
    before, after = PROMPT.split("<ImageHere>")
    text = plain("two dogs###", llama)
    sample = caption("two dogs", llama, prompt=PROMPT)
    assert sample["input_ids"] == [1, *plain(before, llama), *[1000] * 4, *plain(after, llama), *text]
    assert sample["labels"][-len(text) :] == text
    assert set(sample["labels"][: -len(text)]) == {IGNORE_INDEX}


def test_a_long_caption_loses_its_end_but_none_of_the_prompt(llama: PreTrainedTokenizerBase) -> None:
    long = caption("two dogs jump over a fence", llama, prompt=PROMPT, max_txt_len=5)
    whole = caption("two dogs jump over a fence", llama, prompt=PROMPT)
    assert sum(label != IGNORE_INDEX for label in long["labels"]) == 5
    assert whole["input_ids"][: len(long["input_ids"])] == long["input_ids"]


def test_the_end_of_a_caption_may_be_a_special_token_but_not_its_text(llama: PreTrainedTokenizerBase) -> None:
    sample = caption("say </s> now", llama, end_sym="</s>")
    assert sample["input_ids"].count(2) == 1
    assert sample["labels"][-1] == 2
    assert spoken(sample, llama) == "say </s> now</s>"


@pytest.mark.parametrize("prompt", ["Describe it.", "<ImageHere><ImageHere>", ""])
def test_a_prompt_without_one_media_position_is_a_config_error(prompt: str, llama: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match="one media position"):
        caption("two dogs", llama, prompt=prompt)


def test_a_caption_with_nothing_to_learn_is_a_dataset_error(llama: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DatasetError, match="no training target"):
        caption("", llama, end_sym="")


def test_video_annotations_put_the_video_before_the_first_question(llama: PreTrainedTokenizerBase) -> None:
    turns = video_instruct_turns([{"q": "What?", "a": "A dog."}, {"q": "Where?", "a": "Here."}], "2 frames. ")
    sample = dialogue(turns, llama)
    head = plain("\n\n###Human: <Video>", llama)
    assert sample["input_ids"][: len(head) + 5] == [1, *head, *[1000] * 4]
    text = llama.decode(sample["input_ids"][len(head) + 5 :])
    first, second = "What?\n###Assistant: A dog.", "Where?\n###Assistant: Here."
    assert text == f"</Video> 2 frames. {first}\n###Human: {second}\n###"
    assert spoken(sample, llama) == "A dog.\n### Here.\n###"


def test_llava_annotations_put_the_image_where_their_mark_is(llama: PreTrainedTokenizerBase) -> None:
    turns = llava_instruct_turns(
        [
            {"from": "human", "value": "What is this?\n<image>"},
            {"from": "gpt", "value": "An <image> tag."},
            {"from": "human", "value": "Is <image> one?"},
            {"from": "gpt", "value": "Yes."},
        ]
    )
    sample = dialogue(turns, llama, "llama_v2")
    assert sample["input_ids"].count(1000) == 4
    text = llama.decode([token for token in sample["input_ids"] if token != 1000])
    assert "What is this?\n<Image> </Image> [/INST] An <image> tag. </s>" in text
    assert "Is <image> one? [/INST] Yes. </s>" in text
    assert spoken(sample, llama) == "An <image> tag. </s> Yes. </s>"


def test_a_greeting_before_the_first_llava_question_is_left_out() -> None:
    entries = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    greeted = [{"from": "gpt", "value": "Hello!"}, *entries]
    assert llava_instruct_turns(greeted) == llava_instruct_turns(entries)


@pytest.mark.parametrize(
    ("entries", "cause"),
    [
        ([], "no human text"),
        ([{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A."}], "no human text"),
        ([{"from": "human", "value": "<image>"}], "in turn"),
        ([{"from": "human", "value": "<image>"}, {"from": "human", "value": "a"}], "in turn"),
        ([{"from": "human", "value": "<image>"}, {"from": "gpt"}], "not text"),
    ],
)
def test_llava_annotations_of_another_form_are_dataset_errors(entries: list[dict[str, str]], cause: str) -> None:
    with pytest.raises(DatasetError, match=cause):
        llava_instruct_turns(entries)


@pytest.mark.parametrize("qa", [[], [{"q": "What?"}], [{"q": "What?", "a": None}]])
def test_video_annotations_of_another_form_are_dataset_errors(qa: list[dict[str, str]]) -> None:
    with pytest.raises(DatasetError, match=r"no questions|question 0"):
        video_instruct_turns(qa, "")


@pytest.mark.parametrize("model_type", ["vicuna", "llama_v2"])
def test_a_long_dialogue_is_cut_after_the_allowed_text_tokens(model_type: str, llama: PreTrainedTokenizerBase) -> None:
    turns = video_instruct_turns([{"q": "What?", "a": "A dog jumps over the fence. " * 20}], "2 frames. ")
    whole, cut = dialogue(turns, llama, model_type), dialogue(turns, llama, model_type, max_txt_len=70)
    assert len(cut["input_ids"]) == 1 + 4 + 70
    assert cut["input_ids"] == whole["input_ids"][:75]
    assert cut["labels"] == whole["labels"][:75]


def test_a_dialogue_cut_before_its_first_answer_is_a_dataset_error(llama: PreTrainedTokenizerBase) -> None:
    turns = video_instruct_turns([{"q": "What? " * 50, "a": "A dog."}], "")
    with pytest.raises(DatasetError, match="questions fill max_txt_len"):
        dialogue(turns, llama, max_txt_len=60)


def test_a_dialogue_whose_media_would_be_cut_off_is_a_dataset_error(llama: PreTrainedTokenizerBase) -> None:
    turns: list[Turn] = [("What?", "A dog."), *video_instruct_turns([{"q": "And?", "a": "A cat."}], "")]
    with pytest.raises(DatasetError, match="media position"):
        dialogue(turns, llama, max_txt_len=20)


def test_a_dialogue_in_the_language_models_own_chat_template_has_answers_too() -> None:
    tokenizer = build_chat_tokenizer()
    turns = video_instruct_turns([{"q": "What?", "a": "A <|im_end|> dog."}], "")
    sample = dialogue(turns, tokenizer, "tokenizer")
    assert spoken(sample, tokenizer) == "A <|im_end|> dog.<|im_end|>"
    assert sample["labels"].count(tokenizer.eos_token_id) == 1


def test_an_unknown_model_type_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'falcon'.*llama_v2.*vicuna"):
        dialogue_template("falcon")


def test_a_batch_is_padded_on_the_right_and_its_mask_hides_the_padding_only() -> None:
    samples = [
        {"input_ids": [5, 0, 7], "labels": [IGNORE_INDEX, 0, 7]},  # 0 is also a real <unk> here
        {"input_ids": [5], "labels": [5]},
    ]
    batch = collate_text(samples, pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 0, 7], [5, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 0, 7], [5, IGNORE_INDEX, IGNORE_INDEX]]
