"""What a model looked at, for scripts and notebooks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from video_llama.demo.page import SAMPLES
from video_llama.demo.shared_model import SharedModel
from video_llama.errors import VideoLlamaError
from video_llama.inference.chat import Chat
from video_llama.inference.load import load_pretrained_model


def test_the_shares_of_a_file_are_those_that_the_page_shows(tmp_path: Path) -> None:
    model = load_pretrained_model("video-llama-tiny", device="cpu")
    chat = Chat(model)
    with pytest.raises(VideoLlamaError, match="no file to explain"):
        chat.explain()
    upload = chat.upload_video(SAMPLES / "stars.mp4")
    chat.upload_img(SAMPLES / "cross.jpg")
    shown = chat.explain(upload)
    shared = SharedModel(model)
    assert upload.frames is not None
    assert upload.audio is not None
    for media, shares in ((upload.frames, shown.frame_shares), (upload.audio, shown.segment_shares)):
        np.testing.assert_allclose(shares, shared.shares(shared.encode(media)), atol=1e-6)
        assert shares.sum() == pytest.approx(1, abs=1e-5)
    assert shown.frame_seconds.tolist() == upload.frames.times_seconds
    image = chat.explain()
    assert (image.frame_shares.tolist(), len(image.segment_shares)) == ([pytest.approx(1)], 0)
    pytest.importorskip("matplotlib")
    shown.plot().savefig(tmp_path / "shares.png")
    assert len(shown.plot().axes) == 2
    assert Image.open(io.BytesIO(shown._repr_png_() or b"")).format == "PNG"
