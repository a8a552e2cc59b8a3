"""What transformers' own common tests ask of every model, asked of this one with its media."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM, StaticCache

from tests.helpers.tiny_model import frames, make_tiny_config, prompt_ids, sound
from video_llama import VideoLlamaForConditionalGeneration, VideoLlamaModel, VideoLlamaProcessor
from video_llama.checkpoints.hub import PACKAGED_MODELS
from video_llama.model.precision import kept_dtype

LENGTH, LAYERS, HEADS, WIDTH, VOCABULARY = 13, 2, 4, 32, 96
GREEDY = {"max_new_tokens": 8, "eos_token_id": None}


def inputs_of(model: VideoLlamaForConditionalGeneration) -> dict[str, Tensor]:
    ids = torch.tensor([prompt_ids(model.config, 1, 5, "sound", 7, "video", 9, 8)])
    return {"input_ids": ids, "pixel_values": frames(1, 2), "audio_values": sound(1, 3)}


def build(**changes: Any) -> VideoLlamaForConditionalGeneration:
    torch.manual_seed(0)
    return VideoLlamaForConditionalGeneration(make_tiny_config(**changes)).eval()


# Outputs


def test_hidden_states_are_those_of_each_layer_and_the_last_gives_the_logits(
    tiny_model: VideoLlamaForConditionalGeneration,
) -> None:
    inputs = inputs_of(tiny_model)
    output = tiny_model(**inputs, output_hidden_states=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(1, LENGTH, WIDTH)] * (LAYERS + 1)
    embeds = tiny_model.get_inputs_embeds(
        inputs["input_ids"],
        tiny_model.get_video_features(inputs["pixel_values"]),
        tiny_model.get_audio_features(inputs["audio_values"]),
    )
    assert torch.equal(output.hidden_states[0], embeds)
    assert torch.equal(tiny_model.lm_head(output.hidden_states[-1]), output.logits)
    part = tiny_model.model(**inputs, output_hidden_states=True)
    assert all(torch.equal(*states) for states in zip(part.hidden_states, output.hidden_states, strict=True))
    assert torch.equal(tiny_model(inputs_embeds=embeds).logits, output.logits)


def test_attentions_are_causal_shares(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    tiny_model.set_attn_implementation("eager")
    attentions = tiny_model(**inputs_of(tiny_model), output_attentions=True).attentions
    assert [tuple(layer.shape) for layer in attentions] == [(1, HEADS, LENGTH, LENGTH)] * LAYERS
    for layer in attentions:
        torch.testing.assert_close(layer.sum(-1), torch.ones(1, HEADS, LENGTH))
        assert not layer.triu(1).any()


def test_a_tuple_holds_what_the_output_holds(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    inputs = inputs_of(tiny_model)
    for model in (tiny_model, tiny_model.model):
        values = model(**inputs, return_dict=False)
        assert isinstance(values, tuple)
        assert torch.equal(values[0], model(**inputs)[0])


def test_padding_on_the_right_changes_no_logit_before_it(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    inputs = inputs_of(tiny_model)
    expected = tiny_model(**inputs).logits
    padded = torch.cat([inputs["input_ids"], torch.zeros(1, 4, dtype=torch.long)], dim=1)
    mask = (torch.arange(padded.shape[1]) < LENGTH).long()[None]
    logits = tiny_model(**{**inputs, "input_ids": padded, "attention_mask": mask}).logits
    torch.testing.assert_close(logits[:, :LENGTH], expected)


# Training


def test_gradient_checkpointing_changes_neither_loss_nor_gradients() -> None:
    qformer = {
        "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    model = build(qformer_config=qformer, video_qformer_config=qformer, audio_qformer_config=qformer).train()
    inputs = inputs_of(model)
    results = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        results.append((loss, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}))
        model.zero_grad()
    (loss, gradients), (other_loss, other_gradients) = results
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other_gradients.keys()
    assert {"model.video_branch.projection.weight", "lm_head.weight"} < gradients.keys()
    assert all(torch.allclose(value, other_gradients[name], atol=1e-6) for name, value in gradients.items())


# Saving


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_is_saved_and_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "whole")
    model = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    loaded = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert loaded.config.dtype == loaded.dtype == dtype
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype == kept_dtype(name, dtype), name
        assert torch.equal(loaded.state_dict()[name], value), name


def test_what_keeps_its_digits_is_so_from_the_beginning_and_named_as_transformers_names_it() -> None:
    config = make_tiny_config()
    for model_class in (VideoLlamaModel, VideoLlamaForConditionalGeneration):
        model = model_class._from_config(config, dtype=torch.float16)
        names = [name for name, value in model.state_dict().items() if value.dtype == torch.float32]
        assert [name.rpartition(".")[2] for name in names] == ["log_logit_scale"]
        # Each part of the list is a whole part of a name.
        parts = {part for name in model.state_dict() for part in name.split(".")}
        assert {*model._keep_in_fp32_modules, *model._keep_in_fp32_modules_strict} <= parts


def test_the_output_layer_is_split_among_gpus_as_its_own_class_says() -> None:
    assert build().tp_plan["lm_head"] == LlamaForCausalLM._tp_plan["lm_head"]


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_vocabulary_that_grows_keeps_its_logits_and_its_ties(
    is_tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = make_tiny_config().text_config.to_dict() | {"tie_word_embeddings": is_tied}
    model = build(text_config=text)
    before = model(**inputs_of(model)).logits
    with caplog.at_level(logging.WARNING, "video_llama"):
        model.resize_token_embeddings(VOCABULARY + 8)
    assert "processor.image_token_id" in caplog.text
    # No token of text may be taken for media.
    assert (model.config.image_token_id, model.config.audio_token_id) == (VOCABULARY + 8, VOCABULARY + 9)
    inputs = inputs_of(model)
    after = model(**inputs).logits
    assert after.shape[-1] == VOCABULARY + 8
    assert torch.equal(after[..., :VOCABULARY], before)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == is_tied
    assert model(input_ids=torch.tensor([[1, VOCABULARY, VOCABULARY + 1]])).logits.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.image_token_id == VOCABULARY + 8
    assert torch.equal(loaded(**inputs).logits, after)


def test_a_vocabulary_that_shrinks_or_is_only_asked_for_leaves_the_placeholders(
    tiny_model: VideoLlamaForConditionalGeneration,
) -> None:
    for size in (None, VOCABULARY, VOCABULARY - 4):
        tiny_model.resize_token_embeddings(size)
        assert tiny_model.config.image_token_id == VOCABULARY
        assert tiny_model(**inputs_of(tiny_model)).logits.shape[-1] == (size or VOCABULARY)


def test_a_processor_with_a_new_token_serves_the_resized_model(tmp_path: Path) -> None:
    folder = PACKAGED_MODELS / "video-llama-tiny"
    model = VideoLlamaForConditionalGeneration.from_pretrained(folder)
    processor = VideoLlamaProcessor.from_pretrained(folder)
    processor.tokenizer.add_tokens(["<wow>"])
    model.resize_token_embeddings(len(processor.tokenizer))
    processor.image_token_id, processor.audio_token_id = model.config.image_token_id, model.config.audio_token_id
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    processor = VideoLlamaProcessor.from_pretrained(tmp_path)
    image = str(folder.parents[1] / "demo/samples/cross.jpg")
    items = [{"type": "image", "path": image}, {"type": "text", "text": "What is in the picture? <wow>"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": items}], tokenize=True)
    assert (inputs["input_ids"] == len(processor.tokenizer) - 1).sum() == 1
    assert VideoLlamaForConditionalGeneration.from_pretrained(tmp_path)(**inputs).logits.isfinite().all()


# Generation


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"past_key_values": DynamicCache},
        {"past_key_values": StaticCache},
        {"num_beams": 1, "do_sample": False, "return_dict_in_generate": True, "output_scores": True},
    ],
    ids=str,
)
def test_every_cache_and_kind_of_greedy_decoding_gives_the_same_tokens(
    tiny_model: VideoLlamaForConditionalGeneration, options: dict[str, Any]
) -> None:
    inputs = inputs_of(tiny_model)
    # The judge: each token is the most likely one after all before it, computed from the beginning.
    ids = inputs["input_ids"]
    for _ in range(GREEDY["max_new_tokens"]):
        logits = tiny_model(**{**inputs, "input_ids": ids}).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    options = dict(options)
    text = tiny_model.config.text_config
    if options.get("past_key_values") is DynamicCache:
        options["past_key_values"] = DynamicCache(config=text)
    elif options.get("past_key_values") is StaticCache:
        options["past_key_values"] = StaticCache(config=text, max_cache_len=64)
    output = tiny_model.generate(**inputs, **GREEDY, **options)
    assert torch.equal(getattr(output, "sequences", output), ids[:, LENGTH:])


def test_beams_find_the_best_of_all_answers(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    inputs = inputs_of(tiny_model)
    # As many beams as tokens: two steps leave nothing out.
    options = {"max_new_tokens": 2, "eos_token_id": None, "num_beams": VOCABULARY, "length_penalty": 0.0}
    output = tiny_model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
    first = tiny_model(**inputs).logits[0, -1].log_softmax(-1)
    pairs = torch.cat([inputs["input_ids"].expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], dim=1)
    media = {
        "pixel_values": inputs["pixel_values"].expand(VOCABULARY, -1, -1, -1, -1),
        "audio_values": inputs["audio_values"].expand(VOCABULARY, -1, -1, -1, -1),
    }
    second = tiny_model(input_ids=pairs, **media).logits[:, -1].log_softmax(-1)
    scores = first[:, None] + second
    best = scores.flatten().argmax().item()
    assert output.sequences[0].tolist() == [best // VOCABULARY, best % VOCABULARY]
    torch.testing.assert_close(output.sequences_scores[0], scores.max(), rtol=1e-4, atol=1e-4)


def test_the_same_seed_draws_the_same_sample(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(tiny_model.generate(**inputs_of(tiny_model), **GREEDY, do_sample=True).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_needs_a_prompt_of_ids_alone_is_refused(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    config = GenerationConfig(prompt_lookup_num_tokens=3)
    for options in (
        {"assistant_model": tiny_model},
        {"guidance_scale": 1.5},
        {"prompt_lookup_num_tokens": 3},
        {"generation_config": config},
    ):
        with pytest.raises(ValueError, match="media are spliced in"):
            tiny_model.generate(**inputs_of(tiny_model), **GREEDY, **options)
