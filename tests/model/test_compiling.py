"""Compiled encoders: the same features and names, one compilation for any number of frames."""

from __future__ import annotations

import torch
from torch._dynamo.utils import counters

from tests.model.test_video_llama import frames, sound
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration


def test_compiled_encoders_give_the_same_features_and_are_not_compiled_anew_for_every_batch(
    tiny_model: VideoLlamaForConditionalGeneration,
) -> None:
    def features(number: int) -> list[torch.Tensor]:
        assert tiny_model.audio_branch is not None
        video, audio = tiny_model.video_branch, tiny_model.audio_branch
        return [video.encode_frames(frames(1, number)), audio.encode_segments(sound(1, number))]

    names = list(tiny_model.state_dict())
    sizes = (11, 3)  # unlike the numbers of tokens and queries: torch takes equal sizes for the same at first
    with torch.no_grad():
        expected = {number: features(number) for number in (*sizes, 1)}
        tiny_model.compile_encoders(backend="aot_eager")
        torch._dynamo.reset()
        counters.clear()
        for number in sizes:
            torch.testing.assert_close(features(number), expected[number], rtol=1e-5, atol=1e-5)
            kinds = 4  # blocks of the ViT and of ImageBind, layers of the Q-Former with cross-attention and without
            assert counters["stats"]["unique_graphs"] == kinds
        torch.testing.assert_close(features(1), expected[1], rtol=1e-5, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == 2 * kinds
    assert list(tiny_model.state_dict()) == names
