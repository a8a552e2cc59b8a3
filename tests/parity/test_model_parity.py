"""The whole model against the recorded original: encodings, losses, gradient norms, greedy generation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.parity.reference_model import load_inputs, load_reference_model
from video_llama.checkpoints.weight_mapping import to_our_name
from video_llama.data.tokenization import build_caption_sample, collate_text
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.model.weight_names import to_saved_name
from video_llama.processor.prompt import encode_parts
from video_llama.processor.tokenizer import load_tokenizer
from video_llama.prompt_parts import Placeholder, Text

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
# The recorded gradient of a key bias is rounding noise around a true zero (the reference README says so).
NOISE_FLOOR = 1e-4


@pytest.fixture(scope="module")
def model(reference: Path) -> VideoLlamaForConditionalGeneration:
    return load_reference_model(reference)


@pytest.fixture(scope="module")
def inputs(reference: Path) -> dict[str, Tensor]:
    return load_inputs(reference / "full/inputs.safetensors")


@pytest.fixture(scope="module")
def outputs(reference: Path) -> dict[str, Tensor]:
    return load_file(reference / "full/outputs.safetensors")


def frames_second(original: Tensor) -> Tensor:
    """The original's (batch, channels, frames, height, width), or a batch of images, as ours."""
    return original[:, None] if original.ndim == 4 else original.transpose(1, 2)


def by_name(inputs: dict[str, Tensor], expression: str) -> Tensor:
    """`video8` or `video8[:2]`, as the records write it."""
    name, _, rest = expression.partition("[:")
    return inputs[name][: int(rest.rstrip("]"))] if rest else inputs[name]


def recorded_under(prefix: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> list[str]:
    """Names of the inputs whose output is recorded under this prefix; they tell sizes, so they may differ."""
    names = [name for name in inputs if f"{prefix}{name}" in outputs]
    assert names, f"nothing is recorded as {prefix}…"
    return names


def test_frames_are_encoded_as_recorded(model: Any, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
    branch = model.video_branch
    with torch.no_grad():
        for name in recorded_under("vit_", inputs, outputs):
            image = frames_second(inputs[name])
            patches = branch.vision_encoder(image[:, 0])
            torch.testing.assert_close(patches, outputs[f"vit_{name}"], **TOLERANCE)
            torch.testing.assert_close(branch.vision_norm(patches), outputs[f"ln_vision_{name}"], **TOLERANCE)
            torch.testing.assert_close(branch.encode_frames(image)[:, 0], outputs[f"qformer_{name}"], **TOLERANCE)
        names = recorded_under("enc_visual_", inputs, outputs)
        assert {inputs[name].shape[2] > 1 for name in names} == {False, True}  # images and videos
        for name in names:
            features = model.get_video_features(frames_second(inputs[name]))
            torch.testing.assert_close(features, outputs[f"enc_visual_{name}"], **TOLERANCE)


def test_sound_is_encoded_as_recorded(model: Any, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
    encoder = model.audio_branch.audio_encoder
    with torch.no_grad():
        for name in [name for name in inputs if f"ib_{name}_feature" in outputs]:
            torch.testing.assert_close(encoder.encode(inputs[name]), outputs[f"ib_{name}_feature"], **TOLERANCE)
            torch.testing.assert_close(encoder(inputs[name]), outputs[f"ib_{name}_final"], **TOLERANCE)
        for name in recorded_under("enc_audio_", inputs, outputs):
            features = model.get_audio_features(inputs[name])
            torch.testing.assert_close(features, outputs[f"enc_audio_{name}"], **TOLERANCE)


def test_images_in_the_place_of_sound_are_encoded_as_recorded(
    model: Any, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> None:
    if "ibvis" not in inputs:
        pytest.skip("left out of the compact copy; the losses of the audio branch take the same way")
    with torch.no_grad():
        vectors = model.audio_branch.encode_images(inputs["ibvis"])
        torch.testing.assert_close(vectors, outputs["ib_vision_final"], **TOLERANCE)
        features = model.get_audio_features_from_images(inputs["ibvis"])
    torch.testing.assert_close(features, outputs["enc_audio_ibvis_VISION"], **TOLERANCE)


def test_frames_and_sound_together_are_encoded_as_recorded(
    model: Any, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> None:
    # The record does not name what it encoded: the first video, and the sound that fits its number of samples.
    video = next(n for n in recorded_under("enc_visual_", inputs, outputs) if inputs[n].shape[2] > 1)
    sounds = recorded_under("enc_audio_", inputs, outputs)
    audio = next(n for n in sounds if len(inputs[n]) == len(inputs[video]))
    with torch.no_grad():
        features = model.get_audio_video_features(frames_second(inputs[video]), inputs[audio])
    torch.testing.assert_close(features, outputs["enc_audiovideo"], **TOLERANCE)


def stage1_batch(case: dict[str, Any], model: Any, tokenizer: Any) -> dict[str, Tensor]:
    audio = case["train_flag"] == 1
    config = model.config
    placeholder = (
        (config.audio_token_id, config.num_audio_query_tokens)
        if audio
        else (config.image_token_id, config.num_video_query_tokens)
    )
    samples = [
        build_caption_sample(
            caption,
            tokenizer,
            placeholder=placeholder,
            prompt=case["prompt"],
            end_sym=case["end_sym"],
            max_txt_len=case["max_txt_len"],
        )
        for caption in case["text_input"]
    ]
    return collate_text(samples, pad_id=tokenizer.pad_token_id)


def stage2_batch(case: dict[str, Any], model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = inputs[case["input_ids"]]
    ours = model.config.audio_token_id if case["train_flag"] == 1 else model.config.image_token_id
    return {
        "input_ids": ids.masked_fill(ids == case["image_token_id"], ours),
        "labels": inputs[case["labels"]],
        "attention_mask": inputs[case["attention_mask"]],
    }


def test_losses_and_gradient_norms_of_both_stages_and_both_branches_are_as_recorded(
    reference: Path, reference_json: Callable[[str], Any], model: Any, inputs: dict[str, Tensor]
) -> None:
    tokenizer = load_tokenizer(reference / "tokenizer")
    cases = reference_json("full/cases.json")["losses"]
    assert {(case["kind"], case["train_flag"]) for case in cases} == {
        (kind, flag) for kind in ("stage1", "stage2") for flag in (0, 1)
    }
    for case in cases:
        model.zero_grad()
        norms = {to_our_name(name): norm for name, norm in case["grad_norms"].items()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(to_saved_name(name) in norms)
        stage1 = case["kind"] == "stage1"
        batch = stage1_batch(case, model, tokenizer) if stage1 else stage2_batch(case, model, inputs)
        medium = "audio_pixel_values" if case["train_flag"] == 1 else "pixel_values"
        loss = model(**batch, **{medium: frames_second(by_name(inputs, case["image"]))}).loss
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"], rel=1e-5), case["name"]
        for name, parameter in model.named_parameters():
            name = to_saved_name(name)
            if name in norms:
                assert parameter.grad is not None, (case["name"], name)
                assert parameter.grad.norm().item() == pytest.approx(norms[name], rel=1e-4, abs=NOISE_FLOOR), name


def recorded_prompt(case: dict[str, Any]) -> list[Text | Placeholder]:
    """The recorded prompt string as pieces; its placeholders are filled in the order of `images`."""
    kinds = [
        "audio" if "Audio" in source or "audio" in source.partition("(")[0] else "image" for source in case["images"]
    ]
    texts = case["prompt"].split("<ImageHere>")
    pieces: list[Text | Placeholder] = [Text(texts[0], trusted=True)]
    for kind, text in zip(kinds, texts[1:], strict=True):
        pieces += [Placeholder(kind), Text(text, trusted=True)]
    return pieces


def recorded_media(case: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    media = {}
    for source in case["images"]:
        call, _, argument = source.rstrip(")").partition("(")
        tensor = by_name(inputs, argument)
        audio = "audioQformer" in call
        media["audio_values" if audio else "pixel_values"] = tensor if audio else frames_second(tensor)
    return media


def test_greedy_generation_gives_the_recorded_ids(
    reference: Path,
    reference_json: Callable[[str], Any],
    model: Any,
    inputs: dict[str, Tensor],
    outputs: dict[str, Tensor],
) -> None:
    tokenizer, record = load_tokenizer(reference / "tokenizer"), reference_json("full/cases.json")
    config = model.config
    ids = {"image": config.image_token_id, "audio": config.audio_token_id}
    lengths = {"image": config.num_video_query_tokens, "audio": config.num_audio_query_tokens}
    settings = record["generation_settings"]
    new_tokens, stop_id = settings["max_new_tokens"], int(settings["stop"].removeprefix("token "))
    assert record["generation"]
    for case in record["generation"]:
        prompt = encode_parts(recorded_prompt(case), tokenizer, ids, lengths).input_ids
        batch = {"input_ids": torch.tensor([prompt]), **recorded_media(case, inputs)}
        with torch.no_grad():
            video = model.get_video_features(batch["pixel_values"]) if "pixel_values" in batch else None
            audio = model.get_audio_features(batch["audio_values"]) if "audio_values" in batch else None
            embeds = model.get_inputs_embeds(batch["input_ids"], video, audio)
            torch.testing.assert_close(embeds, outputs[f"gen_{case['name']}_context_emb"], **TOLERANCE)
            logits = model(**batch).logits[0, -1]
            torch.testing.assert_close(logits, outputs[f"gen_{case['name']}_logits_first"], rtol=1e-4, atol=1e-4)
        generated = model.generate(**batch, do_sample=False, max_new_tokens=new_tokens, eos_token_id=stop_id)
        # The original's list starts with a BOS that its library put in front of the new tokens.
        assert generated[0].tolist() == case["output_ids"][1:], case["name"]
