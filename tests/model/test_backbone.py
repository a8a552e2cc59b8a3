"""The model in two parts, as transformers' conventions want it, under the names that files always had."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel

from tests.helpers.checkpoints import saved_weights
from tests.helpers.tiny_model import frames, make_tiny_config, prompt_ids, sound
from video_llama import VideoLlamaForConditionalGeneration, VideoLlamaModel
from video_llama.checkpoints.hub import PACKAGED_MODELS
from video_llama.constants import IGNORE_INDEX
from video_llama.model.weight_names import to_model_name, to_model_places, to_saved_name

SMALL_MODEL = PACKAGED_MODELS / "video-llama-tiny"
GPT2 = {"model_type": "gpt2", "vocab_size": 80, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
NEOX = {
    "model_type": "gpt_neox", "vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "tie_word_embeddings": False,
}  # fmt: skip


def stored_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def inputs_of(model: VideoLlamaForConditionalGeneration) -> dict[str, Tensor]:
    ids = torch.tensor([prompt_ids(model.config, 1, 5, "sound", 7, "video", 9, 8)])
    return {"input_ids": ids, "pixel_values": frames(1, 2), "audio_values": sound(1, 3)}


def test_the_output_layer_on_the_last_hidden_state_gives_the_logits(
    tiny_model: VideoLlamaForConditionalGeneration,
) -> None:
    inputs = inputs_of(tiny_model)
    assert tiny_model.base_model is tiny_model.model
    states = tiny_model.base_model(**inputs).last_hidden_state
    assert torch.equal(tiny_model.lm_head(states), tiny_model(**inputs).logits)


def test_a_saved_folder_has_the_names_that_folders_always_had(tmp_path: Path) -> None:
    model = VideoLlamaForConditionalGeneration.from_pretrained(SMALL_MODEL)
    assert "model.video_branch.query_tokens" in model.state_dict()
    model.save_pretrained(tmp_path / "loaded")
    built = VideoLlamaForConditionalGeneration(model.config)
    built.save_pretrained(tmp_path / "built")
    assert stored_names(tmp_path / "loaded") == stored_names(tmp_path / "built") == stored_names(SMALL_MODEL)
    assert set(saved_weights(model)) == stored_names(SMALL_MODEL)


def test_a_state_dict_of_either_names_is_taken(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    other = VideoLlamaForConditionalGeneration(tiny_model.config)
    for names in (saved_weights(tiny_model), tiny_model.state_dict()):
        assert not torch.equal(other.lm_head.weight, tiny_model.lm_head.weight)
        other.load_state_dict(names)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in tiny_model.state_dict().items())
        nn.init.zeros_(other.lm_head.weight)


def test_each_part_loads_what_the_other_saved(tmp_path: Path) -> None:
    whole = VideoLlamaForConditionalGeneration.from_pretrained(SMALL_MODEL)
    part, info = AutoModel.from_pretrained(SMALL_MODEL, output_loading_info=True)
    assert isinstance(part, VideoLlamaModel)
    assert not any(info.values())
    part.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(part.state_dict()[name], value), name
        assert torch.equal(again.state_dict()[name], value), name
    back, info = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert all(torch.equal(back.model.state_dict()[name], value) for name, value in whole.model.state_dict().items())


@pytest.mark.parametrize("text", [GPT2, NEOX, {"tie_word_embeddings": True}], ids=["gpt2", "gpt_neox", "tied llama"])
def test_other_language_models_come_back_as_they_were_saved(text: dict[str, object], tmp_path: Path) -> None:
    config = make_tiny_config()
    sizes = {**config.text_config.to_dict(), **text}
    if "model_type" in text:
        sizes = {**text, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = VideoLlamaForConditionalGeneration(make_tiny_config(text_config=sizes)).eval()
    model.save_pretrained(tmp_path)
    loaded, info = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded(**inputs_of(model)).logits, model(**inputs_of(model)).logits)
    is_tied = sizes.get("tie_word_embeddings", True)
    for each in (model, loaded):
        assert (each.lm_head.weight is each.get_input_embeddings().weight) == is_tied


def test_labels_may_hold_the_ids_of_placeholders(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    inputs = inputs_of(tiny_model)
    ids = inputs["input_ids"]
    ignored = ids.masked_fill(ids >= tiny_model.config.image_token_id, IGNORE_INDEX)
    assert (ignored == IGNORE_INDEX).sum() == 8
    for answers_only in (False, True):
        loss = tiny_model(**inputs, labels=ids, answers_only=answers_only).loss
        assert torch.equal(loss, tiny_model(**inputs, labels=ignored, answers_only=answers_only).loss)
        assert loss.isfinite()


def test_features_and_masks_are_given_by_the_usual_names(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    images = frames(2, 1)
    expected = tiny_model.get_video_features(images)
    assert torch.equal(tiny_model.get_image_features(images[:, 0]), expected)
    assert torch.equal(tiny_model.model.get_image_features(images), expected)
    ids = inputs_of(tiny_model)["input_ids"]
    is_image, is_audio = tiny_model.get_placeholder_mask(ids)
    assert is_audio[0].nonzero()[:, 0].tolist() == [2, 3, 4]
    assert is_image[0].nonzero()[:, 0].tolist() == [6, 7, 8, 9, 10]
    embeds = tiny_model.get_inputs_embeds(**inputs_of(tiny_model))
    wide_image, wide_audio = tiny_model.model.get_placeholder_mask(ids, embeds, image_features=expected[:1])
    assert wide_image.shape == wide_audio.shape == embeds.shape
    assert torch.equal(wide_image.all(-1), is_image)
    # What `masked_scatter` puts there is what the model puts there.
    scattered = torch.zeros_like(embeds).masked_scatter(
        wide_image, tiny_model.get_video_features(inputs_of(tiny_model)["pixel_values"])
    )
    assert torch.equal(scattered[is_image], embeds[is_image])
    with pytest.raises(ValueError, match="5 image placeholder ids, but 2 image item"):
        tiny_model.get_placeholder_mask(ids, image_features=expected)
    assert tiny_model.config.video_token_id == tiny_model.config.image_token_id


def test_features_come_with_what_the_encoders_gave_on_request(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    clip, noise = frames(1, 3), sound(1, 3)
    video = tiny_model.get_video_features(clip, return_dict=True)
    image = tiny_model.get_image_features(clip[:, 0], return_dict=True)
    audio = tiny_model.get_audio_features(noise, return_dict=True)
    assert torch.equal(video.pooler_output, tiny_model.get_video_features(clip))
    assert torch.equal(image.pooler_output, tiny_model.get_image_features(clip[:, 0]))
    assert torch.equal(audio.pooler_output, tiny_model.get_audio_features(noise))
    assert torch.equal(tiny_model.video_branch(frame_tokens=video.last_hidden_state), video.pooler_output)
    assert torch.equal(tiny_model.audio_branch(segment_vectors=audio.last_hidden_state), audio.pooler_output)


def test_encoders_are_found_by_modality(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    for model in (tiny_model, tiny_model.model):
        assert model.get_encoder() is model
        assert model.get_encoder("image") is model.get_encoder("video") is tiny_model.video_branch.vision_encoder
        assert model.get_encoder("audio") is tiny_model.audio_branch.audio_encoder


def test_what_embeddings_hold_already_is_refused_beside_them(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    inputs = inputs_of(tiny_model)
    ids, media = inputs.pop("input_ids"), inputs
    embeds = tiny_model.get_inputs_embeds(ids, **media)
    expected = tiny_model(inputs_embeds=embeds).logits
    for model in (tiny_model, tiny_model.model):
        for name, value in {"input_ids": ids, **media}.items():
            with pytest.raises(ValueError, match=f"already: leave out {name}"):
                model(inputs_embeds=embeds, **{name: value})
        with pytest.raises(ValueError, match="give input_ids or inputs_embeds"):
            model(**media)
    with pytest.raises(ValueError, match="already: leave out pixel_values"):
        tiny_model.generate(inputs_embeds=embeds, pixel_values=media["pixel_values"])
    assert torch.equal(tiny_model(input_ids=ids, **media).logits, expected)
    options = {"max_new_tokens": 4, "eos_token_id": None}
    tokens = tiny_model.generate(inputs=ids, **media, **options)
    assert torch.equal(tokens, tiny_model.generate(inputs_embeds=embeds, **options))


def test_the_causal_language_model_follows_when_a_part_is_exchanged(
    tiny_model: VideoLlamaForConditionalGeneration,
) -> None:
    inputs = inputs_of(tiny_model)
    for model in (tiny_model, copy.deepcopy(tiny_model)):
        model.lm_head = nn.Linear(32, 96, bias=False)
        nn.init.zeros_(model.lm_head.weight)
        assert not model(**inputs).logits.any()
        assert model.language_model.get_output_embeddings() is model.lm_head
        model.model.language_model = copy.deepcopy(model.model.language_model)
        assert model.language_model.base_model is model.model.language_model


def test_names_and_places_are_translated_in_both_directions() -> None:
    for saved, name in {
        "video_branch.query_tokens": "model.video_branch.query_tokens",
        "audio_branch.projection.bias": "model.audio_branch.projection.bias",
        "language_model.model.norm.weight": "model.language_model.norm.weight",
        "language_model.lm_head.weight": "lm_head.weight",
    }.items():
        assert (to_model_name(saved), to_saved_name(name)) == (name, saved)
        assert (to_model_name(name), to_saved_name(saved)) == (name, saved)
    assert to_model_places("auto") == "auto"
    assert to_model_places({"": 0, "video_branch": 1, "language_model": 2, "language_model.model.layers.0": 3}) == {
        "": 0, "model.video_branch": 1, "model.language_model": 2, "lm_head": 2, "model.language_model.layers.0": 3,
    }  # fmt: skip
