"""Many clips in one pass: the same text as one at a time, whatever shares the batch, and a bad file costs one clip."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.checkpoints import load_checkpoint
from video_llama.errors import MediaError, OutOfMemoryError, VideoLlamaError
from video_llama.inference import captioning, static_decoder
from video_llama.inference.cache import SharedPrefix
from video_llama.inference.captioning import BatchCaptioner, caption_clips
from video_llama.inference.completion import generate_text
from video_llama.inference.engine import Prompt, VideoLlama
from video_llama.inference.generation import GenerationOptions
from video_llama.media import decode as decoding
from video_llama.processor.clips import ClipReader
from video_llama.processor.media_processor import AudioSegments, VideoFrames
from video_llama.processor.transforms import normalize_pixels
from video_llama.utils.devices import computing_on

pytestmark = pytest.mark.slow

PROMPT = "What is happening?"
OPTIONS = GenerationOptions(max_new_tokens=12)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> VideoLlama:
    """Random weights whose answers depend on what is seen and heard."""
    model = load_checkpoint(tiny_checkpoint)
    with torch.no_grad():
        for branch in (model.model.video_branch, model.model.audio_branch):
            branch.projection.weight *= 40
    return model


@pytest.fixture
def clips(make_video: Callable[..., Path], make_audio: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """Videos of unequal length with and without sound, an image and a sound: no two prompts need be equally long."""
    Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)).save(tmp_path / "still.png")
    return [
        make_video("long.mp4", num_frames=30, audio=True),
        make_video("short.mp4", num_frames=3),
        make_video("one.mp4", num_frames=1),
        tmp_path / "still.png",
        make_audio("tone.wav", seconds=5.0),
        make_video("middle.mp4", num_frames=14, fps=3, audio=True),
    ]


def caption_alone(model: VideoLlama, path: Path, prompt: str = PROMPT) -> str:
    """The answer by the way that has no batches."""
    media, sound = model.processor.media_processor, None
    if path.suffix == ".wav":
        frames, sound = None, media.process_audio(path)
    elif path.suffix == ".png":
        frames = media.process_image(path)
    else:
        frames, sound = media.process_video(path)
    conversation = model.new_conversation()
    conversation.ask(prompt)
    return model.generate(frames, sound, conversation, max_new_tokens=12)


def prompts_of(model: VideoLlama, paths: list[Path]) -> list[Prompt]:
    prompts = []
    for path in paths:
        frames, _ = model.processor.media_processor.process_video(path, audio=False)
        conversation = model.new_conversation()
        conversation.introduce(["<Video>", *frames.message.split("\0")])
        conversation.ask(PROMPT)
        prompts.append(model.prepare(conversation.up_to_answer(), []))
    return prompts


# The same as one at a time


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (4, 0), (8, 2)])
def test_captions_are_those_of_one_clip_at_a_time_in_the_order_of_the_clips(
    model: VideoLlama, clips: list[Path], batch_size: int, num_workers: int
) -> None:
    alone = [caption_alone(model, path) for path in clips]
    together = model.caption(clips, PROMPT, batch_size=batch_size, num_workers=num_workers, max_new_tokens=12)
    assert together == alone
    assert len(set(alone)) >= 5, "the clips must differ for this to say anything"


def test_media_are_encoded_together_as_they_are_alone(model: VideoLlama, clips: list[Path]) -> None:
    media = model.processor.media_processor
    seen = [media.process_video(clips[number], audio=False)[0] for number in (0, 1, 2)]
    heard = [media.process_audio(clips[4]), torch.randn(3, *media.process_audio(clips[4]).values.shape[1:])]
    items: list[VideoFrames | AudioSegments | torch.Tensor] = [seen[0], heard[0], seen[1], heard[1], seen[2]]
    for max_frames in (1, 9, 1000):
        for item, encoded in zip(items, model.encode_batch(items, max_frames), strict=True):
            expected = model.encode(item)
            assert encoded.kind == expected.kind
            torch.testing.assert_close(encoded.features, expected.features, rtol=1e-4, atol=1e-5)


def test_no_more_frames_are_encoded_at_once_than_allowed(
    model: VideoLlama, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [model.processor.media_processor.process_video(clips[n], audio=False)[0] for n in (1, 1, 0, 2, 2)]
    sizes: list[int] = []
    encode = model.model.get_video_features
    monkeypatch.setattr(
        model.model, "get_video_features", lambda v, m=None: (sizes.append(v.shape[0]), encode(v, m))[1]
    )
    model.encode_batch(frames, max_frames=6)
    assert sizes == [2, 1, 2]


def test_every_row_ends_at_its_own_stop_string(model: VideoLlama, clips: list[Path]) -> None:
    prompts = prompts_of(model, clips[:2])
    answers = [model.complete(prompt, OPTIONS) for prompt in prompts]
    stop = answers[0][3:5]
    assert stop
    stopped = [Prompt(prompt.keys, prompt.inputs_embeds, [stop]) for prompt in prompts]
    expected = [model.complete(prompt, OPTIONS) for prompt in stopped]
    assert expected[0] == answers[0][: answers[0].index(stop)].strip()
    assert generate_text(model, stopped, OPTIONS) == expected


def test_a_row_that_ended_is_not_continued_by_what_pads_it(
    model: VideoLlama, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(model, clips[:2])
    end, word = model.model.generation_config.eos_token_id, model.processor.tokenizer("ball").input_ids[-1]
    ids = torch.tensor([[word, end, word], [word, word, word]])
    monkeypatch.setattr(type(model.model), "generate", lambda *args, **kwargs: ids)
    one, three = (model.processor.tokenizer.decode([word] * count) for count in (1, 3))
    assert generate_text(model, prompts, OPTIONS) == [one.strip(), three.strip()]


def test_the_common_beginning_is_computed_once_and_changes_nothing(
    model: VideoLlama, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, prefix = prompts_of(model, clips[:2]), SharedPrefix()
    widths: list[tuple[int, int]] = []
    language_model = model.model.language_model
    forward = language_model.forward
    monkeypatch.setattr(
        language_model,
        "forward",
        lambda *args, **kwargs: (widths.append(_shape(kwargs)), forward(*args, **kwargs))[1],
    )
    for batch, expected_prefills in ((prompts, 2), (prompts[::-1], 1)):
        expected = [generate_text(model, [prompt], OPTIONS)[0] for prompt in batch]
        widths.clear()
        assert generate_text(model, batch, OPTIONS, prefix) == expected
        prefills = [(rows, length) for rows, length in widths if length > 1]
        longest, shared = max(len(prompt.keys) for prompt in batch), len(prefix.keys)
        assert prefills == [(1, shared), (2, longest - shared)][-expected_prefills:]
        assert shared > 20


def _shape(kwargs: dict[str, torch.Tensor]) -> tuple[int, int]:
    given = kwargs.get("inputs_embeds")
    given = kwargs["input_ids"] if given is None else given
    return given.shape[0], given.shape[1]


def test_prompts_are_answered_with_others_of_their_length(
    model: VideoLlama, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[list[int]] = []
    complete = captioning.generate_text

    def remember(model: VideoLlama, prompts: list[Prompt], *args: object) -> list[str]:
        lengths.append([len(prompt.keys) for prompt in prompts])
        return complete(model, prompts, *args)

    monkeypatch.setattr(captioning, "generate_text", remember)
    model.caption(clips, batch_size=2, max_new_tokens=2)
    equal, *others = lengths
    assert equal[0] == equal[1]  # answered as soon as there were enough of them
    assert [len(batch) for batch in others] == [2, 2]
    sorted_ones = [length for batch in others for length in batch]
    assert sorted_ones == sorted(set(sorted_ones))


# What may be captioned


def test_arrays_images_tensors_and_pairs_are_clips_too(model: VideoLlama, clips: list[Path]) -> None:
    media = model.processor.media_processor
    frames, sound = media.process_video(clips[0])
    image = Image.open(clips[3])
    given = [(frames, sound), frames, frames.pixel_values, sound, image, np.asarray(image)]
    captions = model.caption(given, PROMPT, max_new_tokens=12)
    assert captions[0] == caption_alone(model, clips[0])
    assert captions[4] == captions[5] == caption_alone(model, clips[3])
    conversation = model.new_conversation()
    conversation.ask(PROMPT)
    for number, (seen, heard) in {1: (frames, None), 2: (frames.pixel_values, None), 3: (None, sound)}.items():
        assert captions[number] == model.generate(seen, heard, conversation, max_new_tokens=12)


def test_an_array_is_sampled_as_a_video_of_its_frames(model: VideoLlama) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (19, 30, 40, 3), dtype=np.uint8)
    [window] = ClipReader(model.processor.media_processor, num_frames=4)(pixels)[1]
    assert not isinstance(window, VideoLlamaError)
    assert isinstance(window.frames, VideoFrames)
    assert (window.frames.indices, window.frames.kind, window.frames.message) == ([0, 4, 9, 14], "video", "")
    still = model.processor.media_processor.process_image(pixels[9])
    assert torch.equal(normalize_pixels(window.frames.pixel_values)[2], still.pixel_values[0])


@pytest.mark.parametrize(
    ("array", "reason"),
    [(np.zeros((2, 8, 8, 5), np.uint8), "shape"), (np.full((2, 8, 8, 3), np.nan), "not finite numbers")],
    ids=["five channels", "NaN"],
)
def test_an_array_of_another_form_is_an_error(model: VideoLlama, array: np.ndarray, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        model.caption([array])


def test_sound_is_left_out_on_request(model: VideoLlama, clips: list[Path]) -> None:
    frames, _ = model.processor.media_processor.process_video(clips[0], audio=False)
    conversation = model.new_conversation()
    conversation.ask(PROMPT)
    expected = model.generate(frames, None, conversation, max_new_tokens=12)
    assert model.caption(clips[:1], PROMPT, audio=False, max_new_tokens=12) == [expected]
    with pytest.raises(MediaError, match="sound only"):
        model.caption([clips[4]], audio=False)


def test_a_single_path_in_the_place_of_a_list_is_refused(model: VideoLlama, clips: list[Path]) -> None:
    for path in (clips[0], str(clips[0])):
        with pytest.raises(TypeError, match="give a list"):
            model.caption(path)  # type: ignore[arg-type]


def test_no_clips_give_no_captions(model: VideoLlama) -> None:
    assert model.caption([]) == []


def test_batches_of_no_clips_are_an_error(model: VideoLlama) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        model.caption([], batch_size=0)


# Too little memory


def limit(name: str, largest: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make a function work as on a device with room for so many items (its second argument) at a time.

    Returns:
        how many items it is given, call by call.
    """
    sizes: list[int] = []
    home: object = VideoLlama if name == "encode_batch" else captioning
    function = getattr(home, name)

    def run(model: VideoLlama, items: list[object], *rest: object) -> object:
        sizes.append(len(items))
        if len(items) <= largest:
            return function(model, items, *rest)
        with computing_on(model.device):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity …")

    monkeypatch.setattr(home, name, run)
    return sizes


@pytest.mark.parametrize("name", ["encode_batch", "generate_text"])
@pytest.mark.parametrize("largest", [1, 2])
def test_where_memory_runs_out_fewer_clips_at_a_time_go_on(
    model: VideoLlama,
    clips: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    largest: int,
) -> None:
    expected = model.caption(clips, PROMPT, audio=True, max_new_tokens=12)
    room = largest + 1 if name == "encode_batch" else largest  # of a video, its sound is an item of its own
    sizes = limit(name, room, monkeypatch)
    assert model.caption([*clips, *clips], PROMPT, batch_size=5, max_new_tokens=12) == [*expected, *expected]
    assert max(sizes) > room
    assert "out of memory (2.00 GiB asked for)" in caplog.text
    if name == "generate_text":
        assert all(size <= room for size in sizes[-4:]), "what was too much once is not tried again"


@pytest.mark.parametrize("name", ["encode_batch", "generate_text"])
def test_a_clip_too_large_by_itself_is_an_error_of_its_own(
    model: VideoLlama, clips: list[Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    limit(name, 0, monkeypatch)
    errors: dict[int, VideoLlamaError] = {}
    captions = model.caption(clips[:3], PROMPT, max_new_tokens=2, on_error=lambda n, e: errors.update({n: e}))
    assert captions == ["", "", ""]
    assert {type(error) for error in errors.values()} == {OutOfMemoryError}
    with pytest.raises(OutOfMemoryError, match=r"^cuda:0 is out of memory \(2.00 GiB asked for\): take fewer clips"):
        model.caption(clips[:3], PROMPT, max_new_tokens=2)


@pytest.mark.parametrize("largest", [0, 1, 2])
def test_no_clip_is_lost_where_memory_runs_out_again_and_again_at_a_cache_of_fixed_size(
    model: VideoLlama, clips: list[Path], monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    expected = model.caption(clips, PROMPT, max_new_tokens=8)
    make, sizes = static_decoder.StaticDecoder, list[int]()

    def limited_decoder(language_model: torch.nn.Module, num_rows: int, *rest: object) -> object:
        sizes.append(num_rows)
        if num_rows > largest:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return make(language_model, num_rows, *rest)

    monkeypatch.setattr(static_decoder, "StaticDecoder", limited_decoder)
    errors: list[int] = []
    captions = model.caption(
        clips,
        PROMPT,
        batch_size=6,
        max_new_tokens=8,
        static_cache=True,
        on_error=lambda number, error: errors.append(number),
    )
    assert captions == (expected if largest else [""] * len(clips))
    assert sorted(errors) == ([] if largest else [*range(len(clips))])
    assert sizes[:2] == [6, 3]


def test_a_common_beginning_that_could_not_be_computed_is_not_taken_for_another(
    model: VideoLlama, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, prefix = prompts_of(model, clips[:2]), SharedPrefix()
    expected = generate_text(model, prompts, OPTIONS, prefix)
    others = [Prompt([0, *prompt.keys[1:]], prompt.inputs_embeds, prompt.stop_strings) for prompt in prompts]

    def fail(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(type(model.model), "forward", fail)
        with pytest.raises(torch.OutOfMemoryError):
            prefix.take(model.model, [prompt.keys for prompt in others], others[0].inputs_embeds)
    assert generate_text(model, prompts, OPTIONS, prefix) == expected


# Bad files


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_file_is_an_error_record_and_stops_nothing(
    model: VideoLlama, clips: list[Path], tmp_path: Path, num_workers: int
) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"nothing of a video" * 99)
    given = [clips[0], tmp_path / "bad.mp4", tmp_path / "absent.mp4", clips[1]]
    errors: dict[int, str] = {}
    captions = model.caption(
        given, PROMPT, num_workers=num_workers, max_new_tokens=12, on_error=lambda n, e: errors.update({n: str(e)})
    )
    assert captions == [caption_alone(model, clips[0]), "", "", caption_alone(model, clips[1])]
    assert errors.keys() == {1, 2}
    assert errors[1].startswith(f"{given[1]}: ")
    assert errors[2] == f"{given[2]}: no such file"
    with pytest.raises(MediaError, match=r"(bad|absent)\.mp4"):
        model.caption(given, num_workers=num_workers, max_new_tokens=1)


def test_damaged_sound_leaves_the_frames(model: VideoLlama, clips: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str, *arguments: object) -> None:
        raise MediaError(path, "the sound track is damaged")

    monkeypatch.setattr(decoding, "read_segments", fail)
    captioner = BatchCaptioner(model, PROMPT, OPTIONS)
    [result] = caption_clips(captioner, [clips[0]], ClipReader(model.processor.media_processor))
    assert (result.error, result.sound) == (None, "sound track cannot be decoded: the sound track is damaged")
    frames, _ = model.processor.media_processor.process_video(clips[0], audio=False)
    conversation = model.new_conversation()
    conversation.ask(PROMPT)
    assert result.text == model.generate(frames, None, conversation, max_new_tokens=12)


class Deadly:
    """A clip whose decoder takes its process with it."""

    def __str__(self) -> str:
        return "deadly.mp4"

    def open(self) -> None:
        os._exit(3)


def test_a_clip_that_crashes_its_process_costs_only_itself(model: VideoLlama, clips: list[Path]) -> None:
    given = [clips[0], clips[1], Deadly(), clips[2], clips[5]]
    errors: dict[int, str] = {}
    captions = model.caption(
        given, PROMPT, num_workers=2, max_new_tokens=12, on_error=lambda n, e: errors.update({n: str(e)})
    )
    assert errors == {2: "deadly.mp4: the process that decodes it crashes"}
    assert captions == ["" if number == 2 else caption_alone(model, clip) for number, clip in enumerate(given)]


def test_a_cache_of_fixed_size_changes_no_caption(model: VideoLlama, clips: list[Path]) -> None:
    usual = model.caption(clips[:3], PROMPT, batch_size=2, max_new_tokens=8)
    assert model.caption(clips[:3], PROMPT, batch_size=2, max_new_tokens=8, static_cache=True) == usual


def test_captioning_uses_nothing_that_transformers_is_about_to_remove(model: VideoLlama, clips: list[Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model.caption(clips[:2], PROMPT, batch_size=2, max_new_tokens=4)
