"""Images, videos and audio in memory: orders of dimensions, types and ranges, each read rightly or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from video_llama.errors import MediaError
from video_llama.media.pixels import FramesInMemory, image_of_array
from video_llama.media.samples import samples_of
from video_llama.media.sampling import sample_uniform_indices
from video_llama.processor import load_processor, process_images

PROCESSOR = load_processor(image_size=32, n_frms=4)
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
PIXELS[0, 0], PIXELS[0, 1] = 0, 255
CHW = np.moveaxis(PIXELS, -1, 0)
UNIT = PIXELS.astype(np.float32) / 255

IMAGES: dict[str, Any] = {
    "uint8": PIXELS,
    "channels first": CHW,
    "batch of one": PIXELS[None],
    "alpha": np.concatenate([PIXELS, PIXELS[..., :1]], axis=-1),
    "int32": PIXELS.astype(np.int32),
    "int64": PIXELS.astype(np.int64),
    "uint16": PIXELS.astype(np.uint16) * 257,
    "0 to 1": UNIT,
    "0 to 1 in float64": UNIT.astype(np.float64),
    "-1 to 1": UNIT * 2 - 1,
    "0 to 255": PIXELS.astype(np.float32),
    "tensor": torch.tensor(PIXELS),
    "tensor of torchvision": torch.tensor(np.ascontiguousarray(np.moveaxis(UNIT, -1, 0))),
    "tensor with gradients": torch.tensor(UNIT, requires_grad=True),
    "not contiguous": PIXELS[:, ::-1][:, ::-1],
}


@pytest.mark.parametrize("form", IMAGES)
def test_images_of_each_form_are_the_same(form: str) -> None:
    np.testing.assert_array_equal(image_of_array(IMAGES[form]), PIXELS)
    expected = PROCESSOR.process_image(Image.fromarray(PIXELS)).frames
    np.testing.assert_array_equal(PROCESSOR.process_image(IMAGES[form]).frames, expected)


def test_half_precision_is_read_as_far_as_it_goes() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        read = image_of_array(torch.tensor(UNIT).to(dtype)).astype(int)
        assert abs(read - PIXELS).max() <= 1


def test_gray_and_black_and_white_are_images() -> None:
    gray = PIXELS[..., 0]
    for value in (gray, gray[..., None], gray[None], gray.astype(np.int32), gray.astype(np.uint16) * 257, gray / 255):
        np.testing.assert_array_equal(image_of_array(value), np.repeat(gray[..., None], 3, axis=-1))
    assert image_of_array(np.array([[True, False]])).tolist() == [[[255] * 3, [0] * 3]]
    in_32_bits = Image.fromarray(gray.astype(np.int32))
    np.testing.assert_array_equal(PROCESSOR.process_image(in_32_bits).frames, PROCESSOR.process_image(gray).frames)


REFUSED: dict[str, tuple[Any, str]] = {
    "NaN": (np.full((4, 4), np.nan, np.float32), "not finite numbers"),
    "one NaN": (np.where(np.arange(300).reshape(10, 10, 3) == 7, np.nan, 0.5), "not finite numbers"),
    "infinity": (np.full((4, 4, 3), np.inf), "not finite numbers"),
    "0x0": (np.zeros((0, 0, 3), np.uint8), "no image has shape"),
    "16 bits as dark as 8": (PIXELS.astype(np.uint16), "8 bits in a wide type"),
    "negative": (PIXELS.astype(np.int16) - 9, "where an image has 0 to 255 or 0 to 65535"),
    "too large": (PIXELS.astype(np.int64) * 10**6, "where an image has"),
    "hardly below 0": (UNIT - 0.1, "is the range 0 to 1, -1 to 1 or 0 to 255"),
    "hardly above 1": (UNIT * 1.5, "is the range 0 to 1"),
    "normalised": (UNIT * 4.3 - 1.8, "pass them to generate"),
    "floats of 16 bits": (UNIT * 65_535, "where an image has 0 to 1"),
    "first or last": (np.zeros((3, 9, 3), np.uint8), "channels first or last"),
    "two channels": (np.zeros((9, 9, 2), np.uint8), "no image has shape"),
    "one dimension": (np.zeros(9, np.uint8), "no image has shape"),
    "two images": (np.zeros((2, 9, 9, 3), np.uint8), "give them one by one"),
    "complex": (np.zeros((4, 4), np.complex64), "type complex64"),
    "text": (np.array([["a", "b"]]), "type <U1"),
    "objects": (np.array([[None, 1]]), "type object"),
    "without values": (torch.zeros(3, 9, 9, device="meta"), "cannot be read as an array"),
    "empty PIL": (Image.new("RGB", (0, 0)), "0x0 pixels"),
    "NaN in PIL": (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "not finite numbers"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_images_that_could_be_something_else_are_refused(form: str) -> None:
    value, reason = REFUSED[form]
    with pytest.raises(MediaError, match=reason):
        PROCESSOR.process_image(value)


VIDEO = np.random.default_rng(1).integers(0, 256, (7, 8, 10, 3), dtype=np.uint8)
VIDEOS: dict[str, Any] = {
    "uint8": VIDEO,
    "channels second": np.moveaxis(VIDEO, -1, 1),
    "channels first": np.moveaxis(VIDEO, -1, 0),
    "batch of one": VIDEO[None],
    "0 to 1": VIDEO / 255,
    "-1 to 1": VIDEO / 127.5 - 1,
    "tensor": torch.tensor(VIDEO),
    "list of arrays": list(VIDEO),
    "list of tensors": [torch.tensor(frame) for frame in VIDEO],
    "list of PIL images": [Image.fromarray(frame) for frame in VIDEO],
}


@pytest.mark.parametrize("form", VIDEOS)
def test_videos_of_each_form_are_the_same(form: str) -> None:
    indices = sample_uniform_indices(len(VIDEO), 4)
    expected = np.stack([PROCESSOR.process_image(VIDEO[index]).frames[0] for index in indices])
    frames, sound = PROCESSOR.process_video(VIDEOS[form])
    np.testing.assert_array_equal(frames.frames, expected)
    assert (frames.indices, frames.times_seconds, frames.message, sound) == (indices, [], "", None)


def test_a_range_is_that_of_the_whole_video_and_of_the_whole_batch() -> None:
    """A dark frame of 0 to 255 is not taken for a bright one of 0 to 1."""
    frames = np.stack([np.ones((8, 8, 3)), np.full((8, 8, 3), 200.0)])
    assert [frame.max() for frame in FramesInMemory(frames).take([0, 1])] == [1, 200]
    batch = process_images(frames, PROCESSOR)
    assert isinstance(batch, list)
    assert [int(image.frames.max()) for image in batch] == [1, 200]


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        (np.zeros((4, 8, 3), np.uint8), "no video has shape"),
        (np.zeros((0, 8, 8, 3), np.uint8), "no video has shape"),
        (np.zeros((2, 3, 8, 3), np.uint8), "channels second or last"),
        (np.zeros((2, 5, 8, 8, 3), np.uint8), "no video has shape"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], "several shapes"),
        (["a.png", "b.png"], r"a\.png: no such file"),
        ([np.zeros((4, 4, 3), np.uint8), "b.png"], "a list of ndarray, str"),
        ([], "a list of nothing"),
        (Image.new("RGB", (9, 9)), "no video can be read from that"),
        ((frame for frame in VIDEO), r"generator: no video can be read from that \(give a file"),
    ],
)
def test_videos_of_other_forms_are_refused(video: Any, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        PROCESSOR.process_video(video)


RATE = 16_000
LEFT = (np.sin(np.arange(RATE) / 9) / 2).astype(np.float32)
STEREO = np.stack([LEFT, LEFT / 2])
SOUNDS: dict[str, Any] = {
    "channels first": (STEREO, RATE),
    "channels last": (STEREO.T, RATE),
    "the rate first": (RATE, STEREO.T),
    "numbers of numpy": (np.int64(RATE), STEREO),
    "a rate with a point": (STEREO, 16_000.0),
    "tensor": (torch.tensor(STEREO), torch.tensor(RATE)),
    "tensor of a batch of one": (torch.tensor(STEREO)[None], RATE),
    "row of datasets": {"array": STEREO.T, "sampling_rate": RATE, "path": "gone.mp3"},
    "row of pipelines": {"raw": STEREO, "sampling_rate": RATE},
    "float64": (STEREO.astype(np.float64), RATE),
    "int16": (RATE, np.round(STEREO * 2**15).astype(np.int16).T),
    "int32": (np.round(STEREO * 2.0**31).astype(np.int32), RATE),
    "uint8": (np.round(STEREO * 128 + 128).astype(np.uint8), RATE),
    "list": ([list(map(float, channel)) for channel in STEREO], RATE),
}


@pytest.mark.parametrize("form", SOUNDS)
def test_audio_of_each_form_is_the_same(form: str) -> None:
    expected = PROCESSOR.process_audio((STEREO.mean(axis=0), RATE))
    heard = PROCESSOR.process_audio(SOUNDS[form])
    assert heard.duration_seconds == 1.0
    # A step of 8 bits is heard where the tone is not; that of 16 bits hardly.
    if form == "uint8":
        assert np.abs(samples_of(SOUNDS[form])[0] - STEREO).max() < 1 / 128
    else:
        assert (heard.values - expected.values).abs().mean() < 0.02


def silence(*shape: int, kind: Any = np.float32) -> NDArray[Any]:
    return np.zeros(shape, kind)


@pytest.mark.parametrize(
    ("sound", "reason"),
    [
        ((silence(9000), 0), "a rate of 0 samples per second"),
        ((silence(9000), -16_000), "a rate of -16000"),
        ((silence(9000), float("nan")), "a rate of nan"),
        ((silence(9000), float("inf")), "a rate of inf"),
        ((silence(9000), 16_000.5), r"a rate of 16000.5"),
        ((silence(9000), True), "a rate of 1 "),
        ((silence(9000), None), "a rate of type NoneType"),
        ((silence(9000), "16 kHz"), "a rate of type str"),
        ((silence(9000), silence(9000)), "a rate of type ndarray"),
        (silence(9000), "samples without their rate"),
        (torch.zeros(9000), "samples without their rate"),
        ({"array": silence(9)}, "a mapping with array"),
        ((np.full(9000, np.nan), RATE), "not finite numbers"),
        ((np.full(9000, 20_000.0), RATE), "as large as 2e.04 .*divided by 32768"),
        ((silence(9000, kind=np.int64), RATE), "samples of type int64"),
        ((silence(9000, kind=bool), RATE), "samples of type bool"),
        ((silence(900, 900), RATE), r"samples of shape \(900, 900\)"),
        ((silence(100, 900), RATE), r"samples of shape \(100, 900\)"),
        ((silence(2, 2, 900), RATE), r"samples of shape \(2, 2, 900\)"),
        ((silence(0), RATE), r"samples of shape \(0,\)"),
        ((silence(9), RATE, 3), "no audio can be read from tuple"),
    ],
)
def test_audio_that_could_be_something_else_is_refused(sound: Any, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        PROCESSOR.process_audio(sound)


def test_samples_stay_as_they_are() -> None:
    samples, rate = samples_of((STEREO.T, RATE))
    np.testing.assert_array_equal(samples, STEREO)
    assert rate == RATE
