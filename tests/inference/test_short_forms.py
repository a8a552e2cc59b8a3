"""What a notebook shows of a model and of an upload, and a question in one call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from video_llama.inference.chat import Chat
from video_llama.inference.load import load_pretrained_model


def test_one_call_answers_as_a_chat_does_and_everything_prints_as_one_line(
    tiny_checkpoint: Path, make_video: Callable[..., Path]
) -> None:
    model = load_pretrained_model(tiny_checkpoint, device="cpu", half=False, verbose=False)
    clip = make_video("clip.mp4", audio=True)
    chat = Chat(model)
    upload = chat.upload_video(clip)
    chat.ask("What happens?")
    assert model(clip, "What happens?", max_new_tokens=6) == chat.answer(max_new_tokens=6)
    assert repr(upload) == f"Upload({str(clip)!r}: 8 frames, one every 0.1 s; audio: all of its 1.2 s)"
    assert upload._repr_html_().count("<img ") == 8
    assert repr(model).startswith(f"VideoLlama({tiny_checkpoint.name}, ")
    assert repr(model).endswith(" M parameters, float32, frames and audio, on cpu)")
