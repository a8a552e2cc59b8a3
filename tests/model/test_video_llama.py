"""The composite model: splice, padding, masks, generation, saving, what trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM

from tests.helpers.tiny_model import frames, make_tiny_config, prompt_ids, sound
from video_llama.constants import IMAGE_MEAN, IMAGE_STD
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.processor.transforms import normalize_frames


def test_features_stand_exactly_where_the_placeholders_are(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    config = tiny_model.config
    ids = torch.tensor([prompt_ids(config, 1, "sound", 7, "video", 9)])
    video, audio = tiny_model.get_video_features(frames(1, 2)), tiny_model.get_audio_features(sound(1, 3))
    embeds = tiny_model.get_inputs_embeds(ids, video, audio)
    table = tiny_model.get_input_embeddings().weight
    torch.testing.assert_close(embeds[0, 1:4], audio[0])
    torch.testing.assert_close(embeds[0, 5:10], video[0])
    torch.testing.assert_close(embeds[0, [0, 4, 10]], table[[1, 7, 9]])


@pytest.mark.parametrize("parts", [(1, 5), (1, "video", "video", 5), (1, "sound", 5)])
def test_placeholders_that_do_not_fit_the_media_are_an_error(
    tiny_model: VideoLlamaForConditionalGeneration, parts: tuple[int | str, ...]
) -> None:
    ids = torch.tensor([prompt_ids(tiny_model.config, *parts)])
    with pytest.raises(ValueError, match="placeholder ids, but"):
        tiny_model(input_ids=ids, pixel_values=frames(1, 2))


def test_a_left_padded_batch_of_unequal_prompts_gives_what_each_prompt_gives_alone(
    tiny_model: VideoLlamaForConditionalGeneration,
) -> None:
    config = tiny_model.config
    long = prompt_ids(config, 1, 4, 5, "video", 6, 7, 8, "sound", 9)
    short = prompt_ids(config, 1, "video", 11)
    padding = len(long) - len(short)
    ids = torch.tensor([long, [0] * padding + short])
    mask = torch.tensor([[1] * len(long), [0] * padding + [1] * len(short)])
    clips = frames(2, 3)
    together = tiny_model.generate(
        input_ids=ids, attention_mask=mask, pixel_values=clips, audio_values=sound(1, 2), max_new_tokens=8,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    alone = [
        tiny_model.generate(
            input_ids=torch.tensor([long]), pixel_values=clips[:1], audio_values=sound(1, 2), max_new_tokens=8,
            eos_token_id=None,
        ),
        tiny_model.generate(
            input_ids=torch.tensor([short]), pixel_values=clips[1:], max_new_tokens=8, eos_token_id=None
        ),
    ]  # fmt: skip
    assert together.tolist() == torch.cat(alone).tolist()
    logits = tiny_model(input_ids=ids, attention_mask=mask, pixel_values=clips, audio_values=sound(1, 2)).logits
    lonely = tiny_model(input_ids=torch.tensor([short]), pixel_values=clips[1:]).logits
    torch.testing.assert_close(logits[1, -1], lonely[0, -1], rtol=1e-4, atol=1e-5)


def test_frames_as_bytes_are_normalised_as_the_processor_does_it(
    tiny_model: VideoLlamaForConditionalGeneration,
) -> None:
    pixels = torch.randint(256, (2, 28, 28, 3), dtype=torch.uint8)
    normalised, as_bytes = normalize_frames(pixels.numpy(), IMAGE_MEAN, IMAGE_STD), pixels.permute(0, 3, 1, 2)
    with torch.no_grad():
        features = [tiny_model.get_video_features(frames[None]) for frames in (as_bytes, normalised)]
    assert torch.equal(*features)


def test_padding_frames_and_segments_change_nothing(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    clip, padded = frames(1, 3), torch.cat([frames(1, 3), frames(1, 2, seed=5)], dim=1)
    mask = torch.tensor([[True, True, True, False, False]])
    torch.testing.assert_close(
        tiny_model.get_video_features(padded, mask), tiny_model.get_video_features(clip), rtol=1e-4, atol=1e-6
    )
    noise, longer = sound(1, 2), torch.cat([sound(1, 2), sound(1, 1, seed=5)], dim=1)
    torch.testing.assert_close(
        tiny_model.get_audio_features(longer, torch.tensor([[True, True, False]])),
        tiny_model.get_audio_features(noise),
        rtol=1e-4,
        atol=1e-6,
    )


def test_the_order_of_frames_matters(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    with torch.no_grad():  # random weights are too small to tell positions apart; trained ones are not
        for parameter in tiny_model.video_branch.video_qformer.encoder.parameters():
            parameter.mul_(10)
        tiny_model.video_branch.frame_position_embedding.weight.mul_(50)
    clip = frames(1, 4)
    ahead, backwards = tiny_model.get_video_features(clip), tiny_model.get_video_features(clip.flip(1))
    assert (ahead - backwards).abs().max() > 1e-4 * ahead.abs().max()
    tiny_model.video_branch.frame_position_embedding.weight.data.zero_()
    torch.testing.assert_close(
        tiny_model.get_video_features(clip), tiny_model.get_video_features(clip.flip(1)), rtol=1e-4, atol=1e-6
    )  # nothing else tells frames apart


def test_more_frames_and_segments_than_the_tables_have_are_read(
    tiny_model: VideoLlamaForConditionalGeneration,
) -> None:
    assert tiny_model.get_video_features(frames(1, 20)).shape == (1, 5, 32)
    assert tiny_model.get_audio_features(sound(1, 9)).shape == (1, 3, 32)


def test_beams_and_samples_encode_the_media_once(
    tiny_model: VideoLlamaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    encode = tiny_model.video_branch.encode_frames
    monkeypatch.setattr(tiny_model.video_branch, "encode_frames", lambda *args: calls.append(1) or encode(*args))
    ids = torch.tensor([prompt_ids(tiny_model.config, 1, "video", 5)])
    tiny_model.generate(input_ids=ids, pixel_values=frames(1, 2), num_beams=3, max_new_tokens=4)
    torch.manual_seed(0)
    drawn = tiny_model.generate(
        input_ids=ids, pixel_values=frames(1, 2), do_sample=True, num_return_sequences=4, max_new_tokens=6
    )
    assert len(calls) == 2
    assert len({tuple(row) for row in drawn.tolist()}) > 1


def test_generation_with_a_repetition_penalty_ignores_the_placeholder_ids(
    tiny_model: VideoLlamaForConditionalGeneration,
) -> None:
    ids = torch.tensor([prompt_ids(tiny_model.config, 1, "video", 5)])
    new = tiny_model.generate(
        input_ids=ids, pixel_values=frames(1, 2), repetition_penalty=1e9, max_new_tokens=12, eos_token_id=None
    )
    assert len(set(new[0].tolist())) == 12  # a penalty this large never lets a token come twice


def test_saving_in_shards_and_loading_gives_equal_bits(
    tiny_model: VideoLlamaForConditionalGeneration, tmp_path: Path
) -> None:
    tiny_model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path)
    saved = tiny_model.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    clip = frames(1, 2)
    assert torch.equal(loaded.eval().get_video_features(clip), tiny_model.get_video_features(clip))


def test_the_auto_classes_find_a_saved_folder(tiny_model: VideoLlamaForConditionalGeneration, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), VideoLlamaConfig)
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert isinstance(auto_class.from_pretrained(tmp_path), VideoLlamaForConditionalGeneration)


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": "auto"}])
def test_loading_options_of_transformers_work(
    tiny_model: VideoLlamaForConditionalGeneration, tmp_path: Path, options: dict[str, object]
) -> None:
    tiny_model.save_pretrained(tmp_path)
    loaded = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path, **options)
    ids = torch.tensor([prompt_ids(tiny_model.config, 1, "sound", "video", 5)])
    logits = loaded(input_ids=ids, pixel_values=frames(1, 2), audio_values=sound(1, 2)).logits
    expected = tiny_model(input_ids=ids, pixel_values=frames(1, 2), audio_values=sound(1, 2)).logits
    assert loaded.dtype == options.get("dtype", torch.float32)
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.05)


def test_attention_implementations_agree(tiny_model: VideoLlamaForConditionalGeneration, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    ids = torch.tensor([prompt_ids(tiny_model.config, 1, "video", 5)])
    logits = []
    for implementation in ("eager", "sdpa"):
        model = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation)
        assert model.language_model.config._attn_implementation == implementation
        assert model.video_branch.qformer.config._attn_implementation == implementation
        logits.append(model.eval()(input_ids=ids, pixel_values=frames(1, 2)).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_frozen_parts_stay_in_evaluation_mode(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    tiny_model.requires_grad_(False)
    tiny_model.video_branch.video_qformer.requires_grad_(True)
    tiny_model.train()
    assert tiny_model.training
    assert tiny_model.video_branch.video_qformer.encoder.layer[0].attention.output.dropout.training
    assert not tiny_model.video_branch.qformer.encoder.layer[0].attention.output.dropout.training
    assert not tiny_model.video_branch.vision_encoder.training
    assert not tiny_model.language_model.training


def test_frozen_encoders_build_no_graph_and_trained_ones_do(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    assert tiny_model.video_branch.encode_frames(frames(1, 2)).requires_grad
    tiny_model.requires_grad_(False)
    tiny_model.video_branch.projection.requires_grad_(True)
    assert not tiny_model.video_branch.encode_frames(frames(1, 2)).requires_grad
    assert tiny_model.get_video_features(frames(1, 2)).requires_grad


def test_a_model_without_audio_branch_holds_none_and_says_so() -> None:
    model = VideoLlamaForConditionalGeneration(make_tiny_config(use_audio=False))
    assert not any("audio_branch" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="without its audio branch"):
        model.get_audio_features(sound(1, 2))


def test_images_in_the_place_of_sound_need_the_vision_trunk() -> None:
    trunk = {
        "modality": "vision", "input_size": (28, 28), "patch_size": 14, "stride": 14, "hidden_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "output_size": 24,
    }  # fmt: skip
    model = VideoLlamaForConditionalGeneration(make_tiny_config(imagebind_vision_config=trunk))
    ids = torch.tensor([prompt_ids(model.config, 1, "sound", 5)])
    loss = model(input_ids=ids, labels=ids.clamp(max=90), audio_pixel_values=frames(1, 2)).loss
    assert loss.isfinite()
    with pytest.raises(ValueError, match="no ImageBind vision trunk"):
        VideoLlamaForConditionalGeneration(make_tiny_config()).get_audio_features_from_images(frames(1, 2))


def test_another_causal_language_model_takes_one_config_entry() -> None:
    text = {
        "model_type": "gpt2", "vocab_size": 80, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model = VideoLlamaForConditionalGeneration(make_tiny_config(text_config=text)).eval()
    assert model.config.image_token_id == 80
    ids = torch.tensor([prompt_ids(model.config, 1, "video", 5)])
    new = model.generate(input_ids=ids, pixel_values=frames(1, 2), max_new_tokens=5, eos_token_id=None, pad_token_id=0)
    assert new.shape == (1, 5)


def test_a_model_made_from_nothing_has_no_uninitialised_weight() -> None:
    torch.manual_seed(0)
    model = VideoLlamaForConditionalGeneration(make_tiny_config())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.isfinite().all(), name
        assert tensor.abs().max() < 1e3, name
    assert all(not block.attn.k_bias.any() for block in model.video_branch.vision_encoder.blocks)


def test_only_the_logits_that_are_asked_for_are_computed(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    ids = torch.arange(3, 12)[None]
    every = tiny_model(input_ids=ids).logits
    assert every.shape[1] == 9
    torch.testing.assert_close(tiny_model(input_ids=ids, logits_to_keep=2).logits, every[:, -2:])


def test_generation_asks_for_the_last_logits_if_the_language_model_can_leave_out_others(
    tiny_model: VideoLlamaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    forward = tiny_model.language_model.forward

    def remember(*args: object, logits_to_keep: int = 0, **kwargs: object) -> object:
        asked.append(logits_to_keep)
        return forward(*args, logits_to_keep=logits_to_keep, **kwargs)

    def without(*args: object, past_key_values: object = None, **kwargs: object) -> object:
        assert "logits_to_keep" not in kwargs
        return forward(*args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(tiny_model.language_model, "forward", remember)
    first = tiny_model.generate(input_ids=torch.arange(3, 12)[None], max_new_tokens=2, min_new_tokens=2)
    assert asked == [1, 1]
    monkeypatch.setattr(tiny_model.language_model, "forward", without)
    again = tiny_model.generate(input_ids=torch.arange(3, 12)[None], max_new_tokens=2, min_new_tokens=2)
    assert torch.equal(first, again)
