"""Requests that a server must refuse and survive."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = {"video_url": "video/mp4", "image_url": "image/jpeg", "audio_url": "audio/wav"}


@dataclass(frozen=True)
class Broken:
    """A request, what may come back, and a part of the message."""

    name: str
    body: Any
    statuses: tuple[int, ...] = (400,)
    words: str = ""
    path: str = "/v1/chat/completions"


def chat(content: Any, **options: Any) -> dict[str, Any]:
    return {"model": "video-llama-tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 8, **options}


def part(kind: str, address: str) -> list[dict[str, Any]]:
    return [{"type": kind, kind: {"url": address}}, {"type": "text", "text": "What is it?"}]


def data(kind: str, content: bytes) -> str:
    return f"data:{KINDS[kind]};base64,{base64.b64encode(content).decode()}"


def broken_requests(clip: Path, image: Path, audio: Path) -> list[Broken]:
    """Return some 200 requests, made of files that are whole."""
    return [*_media(clip, image, audio), *_addresses(clip), *_messages(clip), *_protocol(clip)]


def _media(clip: Path, image: Path, audio: Path) -> Iterator[Broken]:
    """Files that are no media, media of another kind, and damaged ones."""
    whole = {"video_url": clip.read_bytes(), "image_url": image.read_bytes(), "audio_url": audio.read_bytes()}
    nonsense = {
        "nothing": b"",
        "one byte": b"\0",
        "text": b"no media",
        "html": b"<!DOCTYPE html><html><body>404</body></html>",
        "zip": b"PK\3\4" + b"\0" * 100,
        "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        "script of ffmpeg": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "head of an mp4": whole["video_url"][:32],
        "head of a jpeg": whole["image_url"][:32],
        "zeros": bytes(4096),
        "noise": random.Random(1).randbytes(4096),
    }
    for kind in KINDS:
        for name, bad in nonsense.items():
            yield Broken(f"{kind}: {name}", chat(part(kind, data(kind, bad))), words=f"{kind} 1: ")
    yield Broken(
        "audio as image", chat(part("image_url", data("image_url", whole["audio_url"]))), words="image_url 1: "
    )
    yield Broken(
        "image as audio", chat(part("audio_url", data("audio_url", whole["image_url"]))), words="audio_url 1: "
    )
    yield Broken(
        "audio as video", chat(part("video_url", data("video_url", whole["audio_url"]))), words="video_url 1: "
    )
    # Whole files may still be read in part: then the answer is one, and no error of the server in any case.
    for number in range(60):
        rng = random.Random(number)
        kind = rng.choice([*KINDS])
        content = bytearray(whole[kind][: rng.randint(len(whole[kind]) // 8, len(whole[kind]))])
        for _ in range(rng.randint(0, 40)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        yield Broken(f"damaged {kind} {number}", chat(part(kind, data(kind, bytes(content)))), (200, 400))


def _addresses(clip: Path) -> Iterator[Broken]:
    """Files that may not be read, or are not there."""
    for kind in KINDS:
        addresses = {
            "/etc/passwd": "",
            "file:///etc/passwd": "subpath",
            f"file://{clip.parent}/../../../../../../etc/passwd": "subpath",
            (clip.parent / "absent.mp4").as_uri(): "absent.mp4",
            clip.parent.as_uri(): "",
            clip.as_uri() + "%00": "",
            "file://": "",
            "http://127.0.0.1:1/clip.mp4": "none is allowed",
            "HTTPS://localhost/clip.mp4": "none is allowed",
            "ftp://127.0.0.1/clip.mp4": "",
            "data:video/mp4;base64": "",
            "data:video/mp4,clip": "",
            "data:video/mp4;base64,####": "base64",
            "clip.mp4": "",
            " ": "",
            "": "",
            "A" * 5000: "",
        }
        for address, words in addresses.items():
            yield Broken(f"{kind} at {address[:60]!r}", chat(part(kind, address)), words=words)


def _messages(clip: Path) -> Iterator[Broken]:
    """Messages that make no prompt."""
    video = part("video_url", data("video_url", clip.read_bytes()))
    text = {"type": "text", "text": "What?"}
    dialogues: dict[str, list[Any]] = {
        "nothing": [],
        "a system message alone": [{"role": "system", "content": "Be short."}],
        "no user": [{"role": "system", "content": "Be short."}, {"role": "assistant", "content": "No."}],
        "an answer first": [{"role": "assistant", "content": "No."}, {"role": "user", "content": "Why?"}],
        "two answers": [*({"role": "user", "content": "a"}, *[{"role": "assistant", "content": "b"}] * 2)],
        "a late system message": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
        "a tool": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b", "tool_call_id": "1"}],
        "an unknown role": [{"role": "narrator", "content": "a"}],
        "no role": [{"content": "a"}],
        "a number": [{"role": "user", "content": 5}],
        "empty text": [{"role": "user", "content": ""}],
        "blank text": [{"role": "user", "content": "  \n "}],
        "no content": [{"role": "user", "content": None}],
        "no parts": [{"role": "user", "content": []}],
        "a string for a message": ["What?"],
        "media in an answer": [{"role": "user", "content": "a"}, {"role": "assistant", "content": video}],
        "media in the system message": [{"role": "system", "content": video}, {"role": "user", "content": "a"}],
        "three videos": [{"role": "user", "content": [*video, *video, *video]}],
        "too long": [{"role": "user", "content": "star " * 3000}],
        "tool calls": [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "user", "content": "b"},
        ],
    }
    for name, messages in dialogues.items():
        yield Broken(name, {"model": "video-llama-tiny", "messages": messages, "max_tokens": 8}, (400, 422))
    parts: dict[str, Any] = {
        "unknown": {"type": "smell", "smell": "smoke"},
        "ours, with a path": {"type": "video", "path": str(clip)},
        "ours, with an address": {"type": "video", "video": "/etc/passwd"},
        "no type": {"url": "data:,"},
        "no address": {"type": "video_url", "video_url": {}},
        "no mapping": {"type": "video_url"},
        "null": {"type": "image_url", "image_url": {"url": None}},
        "embeddings": {"type": "image_embeds", "image_embeds": "AAAA"},
        "embeddings of prompts": {"type": "prompt_embeds", "data": "AAAA"},
        "no data": {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        "bad data": {"type": "input_audio", "input_audio": {"data": "####", "format": "wav"}},
        "no audio": {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        "known by its number": {"type": "image_url", "image_url": None, "uuid": "1"},
    }
    for name, item in parts.items():
        yield Broken(f"part: {name}", chat([item, text]), (400, 422))


def _protocol(clip: Path) -> Iterator[Broken]:
    """Options out of range, and requests that are none."""
    video = part("video_url", data("video_url", clip.read_bytes()))
    options: dict[str, dict[str, Any]] = {
        "no tokens": {"max_tokens": -1},
        "too many tokens": {"max_tokens": 100_000},
        "temperature": {"temperature": -1},
        "top_p": {"top_p": 7},
        "logit bias": {"logit_bias": {"900000": 1}},
        "many samples": {"n": 0},
        "media cut off": {"truncate_prompt_tokens": 20},
        "tools": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        "a template": {"chat_template": "{{ messages }}"},
        "documents": {"documents": [{"title": "a", "text": "b"}]},
        "many frames": {"mm_processor_kwargs": {"num_frames": 10**9}},
        "no frames": {"mm_processor_kwargs": {"num_frames": 0}},
        "frames in words": {"mm_processor_kwargs": {"num_frames": "many"}},
        "addresses allowed": {"mm_processor_kwargs": {"allow_urls": True}},
        "an open answer without one": {"add_generation_prompt": False, "continue_final_message": True},
        "both": {"add_generation_prompt": True, "continue_final_message": True},
    }
    for name, option in options.items():
        yield Broken(f"option: {name}", chat(video, **option), (400, 422))
    yield Broken("another model", chat("a", model="gpt"), (404,))
    for name, body in {"no JSON": b"{", "bytes": b"\xff\xfe", "a list": b"[]", "nothing": b"", "null": b"null"}.items():
        yield Broken(f"body: {name}", body, (400, 422))
    completions = "/v1/completions"
    ids: dict[str, Any] = {"above the vocabulary": [1, 840], "the mark of videos": [842] * 12, "below 0": [-1]}
    for name, prompt in ids.items():
        yield Broken(f"ids: {name}", {"model": "video-llama-tiny", "prompt": prompt}, (400, 422), path=completions)
    yield Broken(
        "lone surrogate", b'{"model": "video-llama-tiny", "messages": [{"role": "user", "content": "\\ud800"}]}'
    )
