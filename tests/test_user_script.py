"""Scripts that were written for the original run with nothing but their two path lines changed, and answer rightly."""

from __future__ import annotations

import logging
import re
import runpy
from pathlib import Path
from typing import Any

import av
import pytest

from video_llama.inference.chat import Chat
from video_llama.inference.engine import VideoLlama

ROOT = Path(__file__).parents[1]
OWN = Path(__file__).with_name("script_for_the_original.py")
USERS = ROOT.parent / "shared" / "user_script.py"
SAMPLE = ROOT / "video_llama/demo/samples/stars.mp4"
KINDS = ("video with sound", "silent video", "still image")

script = pytest.mark.parametrize(
    "script", [OWN, pytest.param(USERS, marks=pytest.mark.skipif(not USERS.exists(), reason="it is not here"))]
)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sample clip, the same without its sound, and its first frame."""
    folder = tmp_path_factory.mktemp("media")
    silent, still = folder / "silent.mp4", folder / "still.jpg"
    with av.open(str(SAMPLE)) as source, av.open(str(silent), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    with av.open(str(SAMPLE)) as source:
        next(source.decode(video=0)).to_image().save(still)
    return dict(zip(KINDS, (SAMPLE, silent, still), strict=True))


def run(script: Path, model_path: str | Path, path: Path, folder: Path, temperature: str | None = None) -> Any:
    """The variables of the script after it ran with these paths."""
    code = script.read_text(encoding="utf-8")
    for name, value in (("model_path", model_path), ("video_path", path)):
        code, changed = re.subn(rf"(?m)^{name} = .*$", lambda _, line=f"{name} = {str(value)!r}": line, code)
        assert changed == 1
    if temperature is not None:
        code = re.sub(r"temperature=[^)]*\)", f"temperature={temperature})", code)
    copy = folder / "script.py"
    copy.write_text(code, encoding="utf-8")
    return runpy.run_path(str(copy))


@script
@pytest.mark.parametrize("model", ["published layout", "small model"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_script_for_the_original_runs_as_it_is(
    script: Path,
    model: str,
    kind: str,
    checkpoints: dict[str, Path],
    media: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model_path = checkpoints["original"] if model == "published layout" else "video-llama-tiny"
    with caplog.at_level(logging.WARNING):
        names = run(script, model_path, media[kind], tmp_path)
    assert isinstance(names["output"], str)
    assert capsys.readouterr().out.strip().endswith(names["output"])
    assert names["conv"].messages == [["Human", names["prompt"]], ["Assistant", names["output"]]]
    if kind == "still image":
        assert len(names["image"]) == 1
    else:
        assert (len(names["imgs"]), names["audio"] is not None) == (8, kind == "video with sound")
    own = "llama_2" if model == "published layout" else "video_llama_2"
    [warning] = [message for message in caplog.messages if "template" in message]
    assert f"these weights were trained with ('{own}')" in warning


@pytest.mark.parametrize("kind", KINDS)
def test_its_answers_are_those_of_a_chat(kind: str, media: dict[str, Path], tmp_path: Path) -> None:
    names = run(OWN, "video-llama-tiny", media[kind], tmp_path, temperature="0")
    model = names["model"]
    assert isinstance(model, VideoLlama)
    chat = Chat(model)
    upload = chat.upload_img if kind == "still image" else chat.upload_video
    upload(media[kind])
    chat.ask(names["prompt"])
    assert names["output"] == chat.answer()
    assert "two large yellow stars" in names["output"].lower()
