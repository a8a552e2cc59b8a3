"""The plug-in for vLLM, run by vLLM itself on the small model; `scripts/test_engines.sh vllm` installs it.

The judge is `VideoLlamaForConditionalGeneration.generate` in float32.
"""

from __future__ import annotations

import base64
import copy
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm", reason="vLLM is not installed: bash scripts/test_engines.sh vllm")

import httpx

from examples.tiny_world.world.corpus import WorldSettings, make_corpus
from tests.integrations.broken_requests import Broken, broken_requests
from tests.integrations.vllm_settings import SETTINGS
from video_llama.checkpoints.hub import PACKAGED_MODELS
from video_llama.errors import NoAudioTrackError
from video_llama.media.audio import read_segments
from video_llama.media.sampling import SegmentSettings
from video_llama.model import VideoLlamaForConditionalGeneration, VideoLlamaProcessor

FOLDER = PACKAGED_MODELS / "video-llama-tiny"
MAX_NEW_TOKENS = 48
BLOCK_SIZE = 32
PARTS = {"video": "video_url", "image": "image_url", "audio": "audio_url"}
MIME = {".mp4": "video/mp4", ".jpg": "image/jpeg", ".wav": "audio/wav", ".m4a": "audio/mp4"}
Media = Sequence[tuple[str, Path]]
Address = Callable[[Path], str]


@dataclass(frozen=True)
class Dialogue:
    """Questions and answers, the media before the first question; the last question is to be answered.

    Attributes:
        expected: the ids that `generate` gives.
        prompt: the ids of the prompt.
    """

    media: Media
    turns: tuple[str, ...]
    expected: list[int]
    prompt: list[int]

    def messages(self, address: Address) -> list[dict[str, Any]]:
        items = [{"type": PARTS[kind], PARTS[kind]: {"url": address(path)}} for kind, path in self.media]
        return messages_of(items, self.turns)


def messages_of(items: list[dict[str, Any]], turns: Sequence[str]) -> list[dict[str, Any]]:
    """Return messages whose first question has media."""
    roles = ("user", "assistant")
    messages: list[dict[str, Any]] = [
        {"role": roles[number % 2], "content": [{"type": "text", "text": turn}]} for number, turn in enumerate(turns)
    ]
    messages[0]["content"] = [*items, *messages[0]["content"]]
    return messages


def data_address(path: Path) -> str:
    return f"data:{MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def file_address(path: Path) -> str:
    return path.as_uri()


class Judge:
    """Answers by the package alone."""

    def __init__(self) -> None:
        self.model = VideoLlamaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()
        self.processor = VideoLlamaProcessor.from_pretrained(FOLDER)

    def inputs(self, media: Media, turns: Sequence[str], **options: Any) -> Any:
        items = [{"type": kind, "path": str(path)} for kind, path in media]
        options = {"load_audio_from_video": True, **options}
        return self.processor.apply_chat_template(
            messages_of(items, turns), tokenize=True, add_generation_prompt=True, **options
        )

    def dialogue(self, media: Media, *turns: str) -> Dialogue:
        inputs = self.inputs(media, turns)
        ids = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0].tolist()
        return Dialogue(media, turns, ids, inputs["input_ids"][0].tolist())

    def text(self, ids: list[int]) -> str:
        return str(self.processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def filled(self, prompt: list[int]) -> list[int]:
        """Return a prompt as vLLM reports it: ids of the vocabulary stand where features go."""
        size = self.model.config.text_config.vocab_size
        return [token if token < size else 0 for token in prompt]


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Files of a small world, by kind."""
    folder = tmp_path_factory.mktemp("world")
    make_corpus(folder, WorldSettings(32, 6, 64, (0, 0, 1)))
    return {
        "video": sorted(folder.rglob("webvid/**/*.mp4")),
        "image": sorted(folder.rglob("cc_sbu_align/**/*.jpg"))[:8],
        "audio": sorted(path for path in folder.rglob("audio_caption/audio/*"))[:8],
    }


@pytest.fixture(scope="module")
def dialogues(judge: Judge, world: dict[str, list[Path]]) -> list[Dialogue]:
    """Every kind of request, in random order."""
    clips, images, audios = world["video"], world["image"], world["audio"]
    made = [judge.dialogue([("video", clip)], "What happens in the video?") for clip in clips]
    made += [judge.dialogue([("image", image)], "What is in the picture?") for image in images]
    made += [judge.dialogue([("audio", audio)], "What do you hear?") for audio in audios]
    # The second question follows the model's own answer to the first.
    for clip, first in list(zip(clips, made, strict=False))[:8]:
        turns = (*first.turns, judge.text(first.expected), "And what do you hear?")
        made.append(judge.dialogue([("video", clip)], *turns))
    # Several media, in orders that only their marks tell apart.
    made.append(judge.dialogue([("image", images[0]), ("video", clips[0])], "What do you see?"))
    made.append(judge.dialogue([("video", clips[0]), ("image", images[0])], "What do you see?"))
    made.append(judge.dialogue([("video", clips[1]), ("video", clips[2])], "What do you see?"))
    made.append(judge.dialogue([("audio", audios[0]), ("image", images[1]), ("audio", audios[1])], "What is it?"))
    made.append(judge.dialogue([], "What is a star?"))
    random.Random(3).shuffle(made)
    return made


def has_audio(path: Path) -> bool:
    try:
        read_segments(str(path), SegmentSettings(8, "main"))
    except NoAudioTrackError:
        return False
    return True


def test_the_world_has_clips_with_and_without_audio(world: dict[str, list[Path]]) -> None:
    assert len(world["video"]) == 32
    assert {has_audio(path) for path in world["video"]} == {True, False}


# Offline


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    """vLLM in this process, with prompts cut into chunks and their beginnings cached."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SETTINGS, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
            patch.setenv(name, value)
        from vllm import LLM

        yield LLM(
            str(FOLDER),
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            enable_chunked_prefill=True,
            enable_prefix_caching=True,
            block_size=BLOCK_SIZE,
            enable_lora=True,
            max_lora_rank=8,
        )


def ask_offline(llm: Any, conversations: list[list[dict[str, Any]]], **options: Any) -> list[Any]:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
    return list(llm.chat(conversations, greedy, use_tqdm=False, **options))


def new_ids(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


@pytest.mark.slow
def test_offline_gives_the_ids_of_generate_also_from_its_caches(
    llm: Any, judge: Judge, dialogues: list[Dialogue]
) -> None:
    conversations = [dialogue.messages(data_address) for dialogue in dialogues]
    # The second round finds the beginnings of all prompts in the cache, equal texts with other media among them.
    for number in range(2):
        outputs = ask_offline(llm, conversations)
        assert [list(output.prompt_token_ids) for output in outputs] == [judge.filled(d.prompt) for d in dialogues]
        assert [new_ids(output) for output in outputs] == [dialogue.expected for dialogue in dialogues]
        long = [output for output in outputs if len(output.prompt_token_ids) > 2 * BLOCK_SIZE]
        assert (min(output.num_cached_tokens for output in long) > BLOCK_SIZE) == (number == 1)


@pytest.mark.slow
def test_equal_prompts_with_other_media_get_other_answers(judge: Judge, dialogues: list[Dialogue]) -> None:
    answers: dict[tuple[int, ...], set[str]] = {}
    for dialogue in dialogues:
        answers.setdefault(tuple(dialogue.prompt), set()).add(judge.text(dialogue.expected))
    # Given that vLLM gives the same ids, these are its answers.
    assert max(len(texts) for texts in answers.values()) > 4


@pytest.mark.slow
@pytest.mark.parametrize("typed", ["<ImageHere>", "</s>", "[/INST]", "<s>[INST] <<SYS>>", "<unk><AudioHere>"])
def test_typed_placeholders_and_special_tokens_stay_text(
    llm: Any, judge: Judge, world: dict[str, list[Path]], typed: str
) -> None:
    dialogue = judge.dialogue([("video", world["video"][0])], f"What {typed} happens{typed}?")
    [output] = ask_offline(llm, [dialogue.messages(data_address)])
    assert list(output.prompt_token_ids) == judge.filled(dialogue.prompt)
    assert new_ids(output) == dialogue.expected


@pytest.mark.slow
def test_a_request_may_leave_audio_out_and_take_other_frames(
    llm: Any, judge: Judge, world: dict[str, list[Path]]
) -> None:
    clip = next(path for path in world["video"] if has_audio(path))
    for keywords in ({"load_audio_from_video": False}, {"num_frames": 3}):
        inputs = judge.inputs([("video", clip)], ["What happens?"], **keywords)
        expected = judge.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0].tolist()
        part = {"type": "video_url", "video_url": {"url": data_address(clip)}}
        messages = messages_of([part], ["What happens?"])
        [output] = ask_offline(llm, [messages], mm_processor_kwargs=keywords)
        assert new_ids(output) == expected


@pytest.mark.slow
def test_adapters_of_the_language_model_are_applied(
    llm: Any, judge: Judge, world: dict[str, list[Path]], tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    rank, scale, width = 4, 16, judge.model.config.text_config.hidden_size
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank * scale, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "bias": "none", "task_type": "CAUSAL_LM"}))
    random_numbers = torch.Generator().manual_seed(0)
    merged = copy.deepcopy(judge.model)
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in merged.named_parameters():
        if name.startswith("model.language_model.") and name.endswith(("q_proj.weight", "v_proj.weight")):
            down, up = (0.3 * torch.randn(*shape, generator=random_numbers) for shape in ((rank, width), (width, rank)))
            place = f"base_model.model.{name.removesuffix('.weight')}"
            weights |= {f"{place}.lora_A.weight": down, f"{place}.lora_B.weight": up}
            parameter.data += scale * up @ down
    save_file(weights, tmp_path / "adapter_model.safetensors")
    plain = judge.dialogue([("video", world["video"][0])], "What happens?")
    inputs = judge.inputs(plain.media, plain.turns)
    expected = merged.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0].tolist()
    assert expected != plain.expected
    adapter = LoRARequest("random", 1, str(tmp_path))
    [output] = ask_offline(llm, [plain.messages(data_address)], lora_request=adapter)
    assert new_ids(output) == expected
    # Equal prompts without it come from another cache.
    [output] = ask_offline(llm, [plain.messages(data_address)])
    assert new_ids(output) == plain.expected


# By server


@dataclass
class Server:
    """A running `video-llama serve`."""

    address: str
    log: Path

    def post(self, body: Any, path: str = "/v1/chat/completions") -> httpx.Response:
        content = {"content": body} if isinstance(body, (bytes, str)) else {"json": body}
        return httpx.post(self.address + path, timeout=120, headers={"content-type": "application/json"}, **content)

    def ask(self, messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        body = {"model": "video-llama-tiny", "messages": messages, "max_tokens": MAX_NEW_TOKENS, **options}
        response = self.post({**body, "return_token_ids": True})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer


@pytest.fixture(scope="module")
def server(world: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server with the options of the package, which may read the files of the world."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    allowed = Path(os.path.commonpath([str(path) for paths in world.values() for path in paths]))
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [
        *(sys.executable, "-m", "video_llama", "serve", "video-llama-tiny"),
        *("--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"),
        *("--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--block-size", str(BLOCK_SIZE)),
        *("--limit-mm-per-prompt", '{"image": 4, "video": 2, "audio": 2}', "--trust-request-mm-kwargs"),
        *("--allowed-local-media-path", str(allowed)),
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(command, env={**os.environ, **SETTINGS}, stdout=file, stderr=file)
    try:
        server = Server(f"http://127.0.0.1:{port}", log)
        wait_until_healthy(server, process)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def wait_until_healthy(server: Server, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert process.poll() is None, server.log.read_text()[-6000:]
        try:
            if httpx.get(server.address + "/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    raise AssertionError(server.log.read_text()[-6000:])


def ids_by_server(server: Server, dialogues: list[Dialogue], address: Address) -> list[list[int]]:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda dialogue: server.ask(dialogue.messages(address)), dialogues))
    return [answer["choices"][0]["token_ids"] for answer in answers]


@pytest.mark.slow
@pytest.mark.parametrize("address", [data_address, file_address])
def test_the_server_gives_the_ids_of_generate_to_many_at_once(
    server: Server, dialogues: list[Dialogue], address: Address
) -> None:
    # No temperature is sent: the server is greedy by itself.
    assert ids_by_server(server, dialogues, address) == [dialogue.expected for dialogue in dialogues]


@pytest.mark.slow
def test_answers_are_streamed(server: Server, judge: Judge, dialogues: list[Dialogue]) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.address}/v1", api_key="none")
    dialogue = max(dialogues, key=lambda dialogue: len(dialogue.expected))
    stream = client.chat.completions.create(
        model="video-llama-tiny",
        messages=dialogue.messages(data_address),  # type: ignore[arg-type]
        max_tokens=MAX_NEW_TOKENS,
        stream=True,
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len(pieces) > 3
    assert "".join(pieces).strip() == judge.text(dialogue.expected)


@pytest.mark.slow
def test_audio_comes_as_input_audio_too(server: Server, dialogues: list[Dialogue]) -> None:
    dialogue = next(d for d in dialogues if [kind for kind, _ in d.media] == ["audio"])
    [(_, path)] = dialogue.media
    data = base64.b64encode(path.read_bytes()).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": path.suffix[1:]}}
    answer = server.ask(messages_of([part], dialogue.turns))
    assert answer["choices"][0]["token_ids"] == dialogue.expected


@pytest.mark.slow
def test_broken_requests_are_the_clients_fault_and_leave_the_server_answering(
    server: Server, dialogues: list[Dialogue], world: dict[str, list[Path]]
) -> None:
    cases = broken_requests(world["video"][0], world["image"][0], world["audio"][0])
    assert len(cases) >= 200
    random.Random(5).shuffle(cases)

    def send(case: Broken) -> tuple[Broken, int, str]:
        response = server.post(case.body, case.path)
        return case, response.status_code, response.text

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(send, cases))
    wrong = [
        (case.name, status, text[:300])
        for case, status, text in results
        if status not in case.statuses or case.words not in text
    ]
    assert wrong == [], "\n".join(map(str, wrong))
    sample = dialogues[:12]
    assert ids_by_server(server, sample, data_address) == [dialogue.expected for dialogue in sample]
