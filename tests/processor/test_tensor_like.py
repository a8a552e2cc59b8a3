"""Frames and sound where scripts expect tensors, and tensors where the model expects frames and sound."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from tests.conftest import MakeVideo
from video_llama.errors import MediaError
from video_llama.processor.media_processor import AudioSegments, MediaProcessor, VideoFrames
from video_llama.processor.tensor_like import as_frames, as_segments

PROCESSOR = MediaProcessor(image_size=20, num_frames=4, num_audio_segments=3)
FRAMES, SEGMENTS = torch.rand(4, 3, 6, 6), torch.rand(4, 1, 5, 7)

Item = VideoFrames | AudioSegments


@pytest.fixture(params=["frames", "sound"])
def item(request: pytest.FixtureRequest, make_video: MakeVideo) -> Item:
    frames, sound = PROCESSOR.process_video(make_video(num_frames=40, audio=True))
    assert sound is not None
    return frames if request.param == "frames" else sound


def test_an_item_tells_of_its_tensor_what_a_tensor_tells(item: Item) -> None:
    values = item.tensor
    assert (len(item), item.shape, item.ndim, item.dtype, item.device) == (
        len(values),
        values.shape,
        4,
        torch.float32,
        torch.device("cpu"),
    )
    assert (item.size(), item.size(0)) == (values.shape, len(values))
    assert item.numel() == values.numel()
    assert torch.equal(torch.stack(list(item)), values)
    assert torch.equal(item[0], values[0])
    assert torch.equal(item[-1, 0], values[-1, 0])
    assert torch.equal(item[None], values[None])
    assert torch.equal(item.unsqueeze(0), values[None])


def test_moved_and_converted_items_know_what_they_knew(item: Item) -> None:
    for changed, dtype in (
        (item.to(torch.float16), torch.float16),
        (item.half(), torch.float16),
        (item.half().float(), torch.float32),
        (item.cpu(), torch.float32),
        (item.to("cpu", torch.bfloat16), torch.bfloat16),
        (item.to(device="cpu", dtype=torch.float16), torch.float16),
    ):
        assert type(changed) is type(item)
        assert changed.dtype == dtype
        assert {**vars(changed), "values": 0, "pixel_values": 0} == {**vars(item), "values": 0, "pixel_values": 0}
    assert item.to("meta").device.type == "meta"


def test_an_item_goes_to_a_gpu(item: Item) -> None:
    if torch.cuda.is_available():
        assert item.cuda().device.type == item.cuda(0).device.type == "cuda"
    else:
        with pytest.raises((RuntimeError, AssertionError)):
            item.cuda()


def test_torch_and_numpy_take_an_item_for_its_tensor(item: Item) -> None:
    values = item.tensor
    for taken in (torch.as_tensor(item), torch.tensor(item), torch.stack([item, item])[1], torch.cat([item])):
        assert torch.equal(taken, values)
    assert torch.equal(torch.mean(item, dim=0), values.mean(dim=0))
    array = np.asarray(item)
    assert (array.dtype, array.shape) == (np.float32, tuple(values.shape))
    np.testing.assert_array_equal(array, values.numpy())
    np.testing.assert_array_equal(np.asarray(item.to(torch.bfloat16)), values.bfloat16().float().numpy())
    assert np.array(item, dtype=np.float64).dtype == np.float64
    np.array(item)[:] = 0  # a copy
    assert values.any()


@pytest.mark.parametrize(
    ("index", "places"),
    [
        (slice(1, None), [1, 2]),
        (slice(None, None, -1), [2, 1, 0]),
        ([0, 2], [0, 2]),
        (torch.tensor([2, 1]), [2, 1]),
        (np.array([True, False, True]), [0, 2]),
    ],
)
def test_some_of_the_frames_or_segments_keep_their_times(item: Item, index: object, places: list[int]) -> None:
    item = item[:3]
    taken = item[index]
    assert type(taken) is type(item)
    assert torch.equal(taken.tensor, item.tensor[places])
    known = ("times_seconds", "indices") if isinstance(item, VideoFrames) else ("start_seconds",)
    for name in known:
        assert getattr(taken, name) == [getattr(item, name)[place] for place in places]
    if isinstance(taken, VideoFrames):
        np.testing.assert_array_equal(taken.frames, item.frames[places])
        assert f"contains {len(places)} frames" in taken.message


def test_some_of_the_frames_of_an_image_have_no_times() -> None:
    still = PROCESSOR.process_image(np.zeros((9, 9, 3), dtype=np.uint8))
    assert (still[:1].times_seconds, still[:1].message) == ([], "")


def test_an_item_is_shown_in_one_short_line(make_video: MakeVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(num_frames=40, audio=True)
    monkeypatch.chdir(path.parent)
    frames, sound = PROCESSOR.process_video("clip.mp4")
    still = PROCESSOR.process_image(frames.frames[0])
    assert repr(frames) == "VideoFrames(video 'clip.mp4': 4 of 20x20 from 0.0 to 3.0 s, torch.float32 on cpu)"
    assert repr(still) == "VideoFrames(image 'image': 1 of 20x20, torch.float32 on cpu)"
    assert repr(sound) == "AudioSegments('clip.mp4': 3 of 128x204 log-mel over 4.0 s, torch.float32 on cpu)"


def test_items_survive_copies_and_process_boundaries(item: Item) -> None:
    for again in (pickle.loads(pickle.dumps(item)), copy.deepcopy(item)):
        assert repr(again) == repr(item)
        assert torch.equal(again.tensor, item.tensor)


@pytest.mark.parametrize("given", [FRAMES, FRAMES[None], FRAMES.half()])
def test_tensors_of_one_video_become_frames(given: torch.Tensor) -> None:
    assert as_frames(given).shape == FRAMES.shape
    assert as_frames(FRAMES[0]).shape == (1, 3, 6, 6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (FRAMES.transpose(0, 1), r"shape \(3, 4, 6, 6\) is no \(frames, 3, .* tensor.transpose\(0, 1\)"),
        (FRAMES.transpose(0, 1)[None], r"tensor\[0\].transpose\(0, 1\)"),
        (FRAMES.permute(0, 2, 3, 1), r"tensor.permute\(0, 3, 1, 2\)"),
        (FRAMES[0].permute(1, 2, 0), r"tensor.permute\(2, 0, 1\)"),
        (torch.stack([FRAMES, FRAMES]), r"several videos are given as a list"),
        (FRAMES[:0], "there is nothing to see"),
        (FRAMES[0, 0], "give the frames of one video in this order"),
        ((FRAMES * 255).to(torch.uint8), "torch.uint8 .*normalised floating point"),
    ],
)
def test_frames_in_another_order_are_refused_and_told_how_to_change(given: torch.Tensor, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        as_frames(given)


def test_reordered_as_told_the_frames_are_the_same() -> None:
    for told in (
        FRAMES.transpose(0, 1).transpose(0, 1),
        FRAMES.transpose(0, 1)[None][0].transpose(0, 1),
        FRAMES.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
        FRAMES[0].permute(1, 2, 0).permute(2, 0, 1)[None].expand_as(FRAMES),
    ):
        assert as_frames(told).shape == FRAMES.shape
        assert torch.equal(as_frames(told)[0], FRAMES[0])


def test_tensors_of_one_sound_become_segments() -> None:
    assert as_segments(SEGMENTS) is SEGMENTS
    assert torch.equal(as_segments(SEGMENTS[None]), SEGMENTS)
    assert torch.equal(as_segments(SEGMENTS[0]), SEGMENTS[:1])
    for wrong in (SEGMENTS[0, 0], FRAMES, SEGMENTS[:0], torch.stack([SEGMENTS, SEGMENTS])):
        with pytest.raises(MediaError, match=r"give normalised log-mel \(segments, 1, mel_bins, mel_frames\)"):
            as_segments(wrong)
