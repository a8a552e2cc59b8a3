"""Prompts, token ids, labels and captions against the recorded original."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from video_llama.constants import IGNORE_INDEX, IMAGE_PLACEHOLDER
from video_llama.conversation import Conversation, conv_templates
from video_llama.data.tokenization import (
    build_dialogue_sample,
    collate_text,
    dialogue_template,
    llava_instruct_turns,
    video_instruct_turns,
)
from video_llama.errors import DatasetError
from video_llama.processor.captions import BlipCaptionProcessor
from video_llama.processor.prompt import encode_parts
from video_llama.processor.tokenizer import load_tokenizer
from video_llama.prompt_parts import (
    Placeholder,
    Text,
    parse_placeholders,
    render_parts,
    video_prefix,
    video_with_audio_prefix,
)

ReadJson = Callable[[str], Any]

TEMPLATES = {
    "default_conversation": "v1",
    "conv_llava_llama_2": "llama_2",
    "CONV_VISION": "vision",
    "video_instruct.video_conversation": "video_vicuna",
    "video_instruct.llama_v2_video_conversation": "video_llama_2",
}
GENERATION_TEMPLATES = {"llama_2": "llama_2", "vicuna": "v1"}
ORIGINAL_MAX_TOKENS = 512
"""The original cuts every dialogue here, BOS and media tokens included; ours counts text alone."""


@pytest.fixture(scope="module")
def tokenizer(reference: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(reference / "tokenizer")


def as_items(text: str) -> list[str | Placeholder]:
    """A recorded message as content: its `<ImageHere>` marks a media position."""
    return [piece.text if isinstance(piece, Text) else piece for piece in parse_placeholders(text)]


def as_recorded(prompt: str) -> str:
    """The original writes one placeholder for frames and for sound."""
    return prompt.replace(Placeholder("audio").token, IMAGE_PLACEHOLDER)


def start(case: dict[str, Any], template: str) -> Conversation:
    conversation = conv_templates[template].copy()
    conversation.system = case.get("system", "")
    return conversation


# Conversations


def test_the_templates_have_the_recorded_constants(reference_json: ReadJson) -> None:
    constants = reference_json("text_prompts.json")["constants"]
    assert constants.keys() == TEMPLATES.keys()
    for name, recorded in constants.items():
        ours = conv_templates[TEMPLATES[name]]
        fields = {key: getattr(ours, key) for key in ("system", "sep", "sep2", "offset")}
        assert {**fields, "roles": list(ours.roles), "sep_style": ours.sep_style.name} == recorded


def test_prompts_are_the_recorded_ones(reference_json: ReadJson) -> None:
    for case in reference_json("text_prompts.json")["prompts"]:
        conversation = start(case, TEMPLATES[case["style"]])
        conversation.messages = [list(message) for message in case["messages"]]
        prompt = conversation.get_prompt()
        if "error" not in case:
            assert prompt == case["prompt"]
        else:  # the original cannot say nothing in a first LLaMA-2 question; ours leaves it empty
            (_, question), (_, answer) = case["messages"]
            assert question == ""
            assert prompt.endswith(f"\n<</SYS>>\n\n [/INST]{f' {answer} </s>' if answer else ''}")


def test_asking_joins_a_media_message_as_recorded(reference_json: ReadJson) -> None:
    for case in reference_json("text_prompts.json")["chat_ask"]:
        conversation = start(case, TEMPLATES[case["style"]])
        if case["first"] is not None:
            conversation.introduce(as_items(case["first"]))
        for text, recorded in zip(case["texts"], case["messages_after_each"], strict=True):
            conversation.ask(text)
            messages = [[role, as_text(content)] for role, content in conversation.messages]
            assert messages == recorded
        assert conversation.up_to_answer().get_prompt() == case["prompt"]


def as_text(content: Any) -> str:
    items = [content] if isinstance(content, str) else content
    return "".join(item if isinstance(item, str) else item.token for item in items)


def generation_prompt(case: dict[str, Any]) -> Conversation:
    conversation = start(case, GENERATION_TEMPLATES[case["style"]])
    introduction = video_with_audio_prefix() if "audio" in case["kind"] else video_prefix(case["msg"])
    conversation.introduce([*introduction, " "])
    conversation.ask(case["question"])
    return conversation.up_to_answer()


def test_introduced_media_give_the_recorded_generation_prompts(reference_json: ReadJson) -> None:
    cases = [case for case in reference_json("full/cases.json")["generation"] if "question" in case]
    assert {case["kind"] for case in cases} >= {"video", "video+audio"}
    for case in cases:
        assert as_recorded(generation_prompt(case).get_prompt()) == case["prompt"], case["name"]


def test_generation_prompts_have_the_recorded_ids(
    reference: Path, reference_json: ReadJson, tokenizer: PreTrainedTokenizerBase
) -> None:
    # The ids themselves are not recorded, but the embeddings they were turned into are.
    table = load_file(reference / "full/model.safetensors")["llama_model.model.embed_tokens.weight"]
    outputs = load_file(reference / "full/outputs.safetensors")
    queries = reference_json("full/model.json")["config"]["q"]
    lengths = {"image": queries["num_video_query_token"], "audio": queries["num_audio_query_token"]}
    ids = {"image": len(table), "audio": len(table) + 1}
    for case in reference_json("full/cases.json")["generation"]:
        asked = "question" in case
        pieces = generation_prompt(case).get_parts() if asked else parse_placeholders(case["prompt"])
        input_ids = torch.tensor(encode_parts(pieces, tokenizer, ids, lengths).input_ids)
        recorded = outputs[f"gen_{case['name']}_context_emb"][0]
        assert len(input_ids) == len(recorded), case["name"]
        is_text = input_ids < len(table)
        assert torch.equal(table[input_ids[is_text]], recorded[is_text]), case["name"]


# Token ids


def assert_recorded_ids(reference_json: ReadJson, tokenizer: PreTrainedTokenizerBase) -> None:
    image_id = reference_json("text_preprocess.json")["image_token_id"]
    rows = reference_json("text_tokenizer.json")["table"]
    special = [*tokenizer.all_special_tokens, IMAGE_PLACEHOLDER]
    assert rows
    for row in rows:
        pieces = parse_placeholders(row["text"])
        ids, lengths = {"image": image_id}, {"image": 1}
        no_bos = encode_parts(pieces, tokenizer, ids, lengths, add_bos=False).input_ids
        assert no_bos == row["ids_no_special"], row["text"]
        if row["text"] != tokenizer.bos_token:  # a template that brings its own BOS gets no second one
            assert encode_parts(pieces, tokenizer, ids, lengths).input_ids == row["ids"], row["text"]
        if not any(token in row["text"] for token in special):
            assert tokenizer(row["text"]).input_ids == row["ids"], row["text"]
            assert tokenizer.decode(row["ids_no_special"]) == row["decode_no_special"]


def test_texts_have_the_recorded_ids(reference_json: ReadJson, tokenizer: PreTrainedTokenizerBase) -> None:
    assert_recorded_ids(reference_json, tokenizer)


def test_the_recorded_ids_survive_saving_and_loading(
    reference_json: ReadJson, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert_recorded_ids(reference_json, AutoTokenizer.from_pretrained(tmp_path))
    assert_recorded_ids(reference_json, load_tokenizer(tmp_path))


# Captions


def test_captions_are_cleaned_as_recorded(reference_json: ReadJson) -> None:
    for case in reference_json("text_captions.json")["cases"]:
        clean = BlipCaptionProcessor(prompt=case["prompt"], max_words=case["max_words"])
        assert clean(case["caption"]) == case["out"]


# Dialogues with labels


def dialogues(reference_json: ReadJson, **wanted: str) -> list[dict[str, Any]]:
    cases = reference_json("text_preprocess.json")["cases"]
    chosen = [case for case in cases if all(case[key] == value for key, value in wanted.items())]
    assert chosen
    return chosen


def turns_of(case: dict[str, Any]) -> list[Any]:
    if "QA" in case:
        return video_instruct_turns(case["QA"], case["msg"])
    return llava_instruct_turns(case["conversations"])


def answers_of(case: dict[str, Any]) -> list[str]:
    if "QA" in case:
        return [pair["a"] for pair in case["QA"]]
    return [entry["value"] for entry in case["conversations"] if entry["from"] == "gpt"]


def texts_of(case: dict[str, Any]) -> str:
    entries = case["QA"] if "QA" in case else case["conversations"]
    return " ".join(value for entry in entries for value in entry.values())


def holds_special_text(case: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether somebody typed what the original mistakes for a special token or a media position."""
    return any(token in texts_of(case) for token in (*tokenizer.all_special_tokens, IMAGE_PLACEHOLDER))


def build(
    reference_json: ReadJson,
    case: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int = ORIGINAL_MAX_TOKENS,
) -> dict[str, list[int]]:
    length = case["num_video_query_token"]
    return build_dialogue_sample(
        turns_of(case),
        tokenizer,
        template=dialogue_template(case["model_type"]),
        placeholder=(reference_json("text_preprocess.json")["image_token_id"], length),
        max_txt_len=num_tokens - 1 - length,
    )


def labelled_spans(sample: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Every uninterrupted stretch of labels as text."""
    runs = groupby(sample["labels"], key=lambda label: label != IGNORE_INDEX)
    return [str(tokenizer.decode(list(run))) for is_answer, run in runs if is_answer]


def has_no_answer_within_the_cut(
    reference_json: ReadJson, case: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Whether the question alone is so long that the cut comes before any answer."""
    if case["n"] < ORIGINAL_MAX_TOKENS:
        return False
    labels = build(reference_json, case, tokenizer, num_tokens=100 * ORIGINAL_MAX_TOKENS)["labels"]
    return all(label == IGNORE_INDEX for label in labels[:ORIGINAL_MAX_TOKENS])


def test_dialogues_have_the_recorded_ids(reference_json: ReadJson, tokenizer: PreTrainedTokenizerBase) -> None:
    compared = 0
    for case in dialogues(reference_json):
        if holds_special_text(case, tokenizer) or has_no_answer_within_the_cut(reference_json, case, tokenizer):
            continue
        assert build(reference_json, case, tokenizer)["input_ids"] == case["input_ids"], case["case"]
        compared += 1
    assert compared


def test_typed_special_tokens_and_placeholders_stay_text_in_dialogues(
    reference_json: ReadJson, tokenizer: PreTrainedTokenizerBase
) -> None:
    # The original reads them as special tokens and as further images.
    cases = [case for case in dialogues(reference_json) if holds_special_text(case, tokenizer)]
    assert cases
    image_id = reference_json("text_preprocess.json")["image_token_id"]
    for case in cases:
        ids = build(reference_json, case, tokenizer)["input_ids"]
        num_turns = len(answers_of(case))
        num_eos, num_bos = (num_turns, num_turns) if case["model_type"] == "llama_v2" else (0, 1)
        assert ids.count(image_id) == case["num_video_query_token"]
        assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (num_bos, num_eos)
        assert all(answer in tokenizer.decode(ids) for answer in answers_of(case))


def test_vicuna_labels_cover_the_answers_and_what_ends_them(
    reference_json: ReadJson, tokenizer: PreTrainedTokenizerBase
) -> None:
    for case in dialogues(reference_json, model_type="vicuna"):
        if case["n"] == ORIGINAL_MAX_TOKENS:
            continue
        spans = labelled_spans(build(reference_json, case, tokenizer), tokenizer)
        assert spans == [f"{answer}\n###" for answer in answers_of(case)], case["case"]


def test_the_original_mask_of_vicuna_dialogues_drifts_and_ours_does_not(
    reference_json: ReadJson, tokenizer: PreTrainedTokenizerBase
) -> None:
    for case in dialogues(reference_json, model_type="vicuna"):
        if holds_special_text(case, tokenizer) or case["n"] == ORIGINAL_MAX_TOKENS:
            continue
        sample = build(reference_json, case, tokenizer)
        table = side_by_side(sample["labels"], case["labels"], case["input_ids"], tokenizer)
        first_answer = next(index for index, (_, ours, _) in enumerate(table) if ours)
        # The original's begins with the user's name and moves on from turn to turn, away from the answers.
        assert any(theirs for _, _, theirs in table[:first_answer]), table


def side_by_side(
    ours: list[int], theirs: list[int], ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool, bool]]:
    """(token, supervised by us, supervised by the original), for people to read when a test fails."""
    return [
        (str(tokenizer.convert_ids_to_tokens(token) or "(media)"), a != IGNORE_INDEX, b != IGNORE_INDEX)
        for token, a, b in zip(ids, ours, theirs, strict=True)
    ]


def test_llama_2_labels_are_the_recorded_ones_where_those_are_right(
    reference_json: ReadJson, tokenizer: PreTrainedTokenizerBase
) -> None:
    compared = 0
    for case in dialogues(reference_json, model_type="llama_v2"):
        if case["n_supervised"] and not holds_special_text(case, tokenizer):
            assert build(reference_json, case, tokenizer)["labels"] == case["labels"], case["case"]
            compared += 1
    assert compared


def test_llama_2_labels_cover_the_answers_where_the_original_gives_up(
    reference_json: ReadJson, tokenizer: PreTrainedTokenizerBase
) -> None:
    # It searches the text for its own template and supervises nothing when the text quotes it.
    cases = [case for case in dialogues(reference_json, model_type="llama_v2") if not case["n_supervised"]]
    cases = [case for case in cases if not has_no_answer_within_the_cut(reference_json, case, tokenizer)]
    assert cases
    for case in cases:
        spans = labelled_spans(build(reference_json, case, tokenizer), tokenizer)
        assert spans == [f"{answer} </s>" for answer in answers_of(case)], case["case"]


def test_a_dialogue_whose_question_fills_the_length_is_refused(
    reference_json: ReadJson, tokenizer: PreTrainedTokenizerBase
) -> None:
    cases = [
        case for case in dialogues(reference_json) if has_no_answer_within_the_cut(reference_json, case, tokenizer)
    ]
    for case in cases:
        with pytest.raises(DatasetError, match="max_txt_len"):
            build(reference_json, case, tokenizer)


def test_the_recorded_training_batches_are_built_from_their_annotations(
    reference: Path, reference_json: ReadJson, tokenizer: PreTrainedTokenizerBase
) -> None:
    recorded = load_file(reference / "full/inputs.safetensors")
    cases = [case for case in reference_json("full/cases.json")["losses"] if case["kind"] == "stage2"]
    assert cases
    for case in cases:
        samples = [
            build_dialogue_sample(
                video_instruct_turns(qa, case["msg"]),
                tokenizer,
                template=dialogue_template(case["model_type"]),
                placeholder=(case["image_token_id"], case["num_patch_tokens"]),
                max_txt_len=ORIGINAL_MAX_TOKENS,
            )
            for qa in case["QA"]
        ]
        batch = collate_text(samples, pad_id=tokenizer.pad_token_id)
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(batch[name], recorded[case[name]]), case["name"]
        same_labels = torch.equal(batch["labels"], recorded[case["labels"]])
        assert same_labels == (case["model_type"] == "llama_v2")  # the Vicuna mask drifts


def test_batches_are_collated_as_recorded(reference_json: ReadJson, tokenizer: PreTrainedTokenizerBase) -> None:
    collater = reference_json("text_preprocess.json")["collater"]
    samples, masks = [], []
    columns = (collater[name] for name in ("input_ids", "labels", "attention_mask"))
    for ids, labels, mask in zip(*columns, strict=True):
        # The original masks every id that equals the pad id, real <unk> tokens too; ours masks padding.
        length = len(mask) - mask[::-1].index(True)
        samples.append({"input_ids": ids[:length], "labels": labels[:length]})
        masks.append([1] * length + [0] * (len(mask) - length))
    batch = collate_text(samples, pad_id=tokenizer.pad_token_id)
    assert batch["input_ids"].tolist() == collater["input_ids"]
    assert batch["labels"].tolist() == collater["labels"]
    assert batch["attention_mask"].tolist() == masks


def test_pieces_render_the_prompt_they_belong_to(reference_json: ReadJson) -> None:
    for case in reference_json("text_prompts.json")["prompts"]:
        conversation = start(case, TEMPLATES[case["style"]])
        conversation.messages = [list(message) for message in case["messages"]]
        typed = {content for _, content in case["messages"] if content}
        pieces = conversation.get_parts()
        assert render_parts(pieces) == conversation.get_prompt()
        trusted = {piece.text for piece in pieces if isinstance(piece, Text) and piece.trusted}
        assert not typed & trusted
        assert typed <= {piece.text for piece in pieces if isinstance(piece, Text) and not piece.trusted}
