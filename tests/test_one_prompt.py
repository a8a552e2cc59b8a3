"""One form of messages is one prompt: training, the processor, `Chat`, the page and evaluation give the same ids.

200 random conversations, drawn from a seed, are put to each of them. None of the five is the judge: they must agree.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import add_audio_stream, add_video_stream, draw_frame, draw_tone, encode_audio, encode_video
from tests.helpers.language_models import build_family_tokenizer
from video_llama.config import BuildInfo, Config, DatasetConfig
from video_llama.data.build import EncodedDataset, build_datasets
from video_llama.data.tokenization import dialogue_template
from video_llama.demo.limits import Limits
from video_llama.demo.session import Session
from video_llama.demo.shared_model import SharedModel
from video_llama.evaluation import asking
from video_llama.inference.chat import Chat
from video_llama.inference.engine import Prompt, VideoLlama
from video_llama.inference.load import load_pretrained_model
from video_llama.processor.processing_video_llama import VideoLlamaProcessor

NUM_CONVERSATIONS = 200
TEMPLATES = ["llama_2", "video_llama_2", "v1", "instruct_vicuna", "tokenizer"]
# What a user may type: template text, special tokens, placeholders, spaces, other scripts.
WORDS = [
    "What",
    "is",
    "it?",
    "</s>",
    "<s>",
    "[INST]",
    "###Human:",
    "<ImageHere>",
    "<|im_end|>",
    " ",
    "\n",
    "Ne?",
    "猫",
    "é",
]
# Each: the items of a message, the upload of a chat, whether the page can be given it, the modality in evaluation.
FORMS = {
    "video": (("video",), "upload_video_without_audio", True, None),
    "video and its audio": (("video", "audio"), "upload_video", True, "video"),
    "audio of a video": (("audio",), "upload_audio", False, None),
    "silent video": (("video",), "upload_video", True, "video"),
    "image": (("image",), "upload_img", True, "image"),
    "audio": (("audio",), "upload_audio", True, "audio"),
}

Conversation = list[dict[str, Any]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small file for each form."""
    import av

    folder = tmp_path_factory.mktemp("files")
    heard, silent, tone, still = (folder / name for name in ("heard.mp4", "silent.mp4", "tone.wav", "still.png"))
    for path, has_audio in ((heard, True), (silent, False)):
        with av.open(str(path), "w") as container:
            stream = add_video_stream(container, (64, 48), 10, "libx264")
            track = add_audio_stream(container, 1, 16_000, "aac") if has_audio else None
            encode_video(container, stream, [draw_frame(index, 64, 48) for index in range(21 if has_audio else 12)])
            if track is not None:
                encode_audio(container, track, draw_tone(2.1, 16_000, 1))
    with av.open(str(tone), "w") as container:
        encode_audio(container, add_audio_stream(container, 1, 16_000, "pcm_s16le"), draw_tone(1.0, 16_000, 1))
    Image.new("RGB", (40, 30), (200, 40, 90)).save(still)
    places = {"silent video": silent, "image": still, "audio": tone}
    return {form: places.get(form, heard) for form in FORMS}


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Path) -> dict[str, SharedModel]:
    """By template: the same tiny weights with another processor."""
    loaded = load_pretrained_model(tiny_checkpoint, device="cpu", half=False, verbose=False)
    own = loaded.processor
    built = {}
    for template in TEMPLATES:
        processor = VideoLlamaProcessor(
            build_family_tokenizer("qwen2") if template == "tokenizer" else own.tokenizer,
            own.image_token_id,
            own.audio_token_id,
            # Few frames and one segment: what is in them changes no id.
            dataclasses.replace(own.media_processor, num_frames=3, num_audio_segments=1),
            own.num_video_query_tokens,
            own.num_audio_query_tokens,
            conv_template=template,
        )
        built[template] = SharedModel(VideoLlama(loaded.model, processor))
    return built


def draw_text(rng: random.Random) -> str:
    return " ".join(["So", *rng.choices(WORDS, k=rng.randint(1, 6))])


def draw_conversation(number: int) -> tuple[str | None, list[tuple[list[str], str, str]]]:
    """A system text or None, and turns of forms of media, a question and an answer."""
    rng = random.Random(number)
    texts = [(draw_text(rng), draw_text(rng).strip()) for _ in range(rng.randint(1, 3))]
    # A quarter is of the form that evaluation can ask: one file, before the first question.
    if rng.random() < 0.25:
        forms = [rng.choice([form for form in FORMS if FORMS[form][3]])]
        return None, [(forms if turn == 0 else [], *text) for turn, text in enumerate(texts)]
    system = rng.choice([None, None, "Be brief. </s>"])
    return system, [(rng.choices(list(FORMS), k=rng.choice([0, 1, 1, 2, 3])), *text) for text in texts]


def as_messages(number: int, files: dict[str, Path]) -> Conversation:
    system, turns = draw_conversation(number)
    messages: Conversation = [] if system is None else [{"role": "system", "content": system}]
    for forms, question, answer in turns:
        items = [{"type": kind, "path": str(files[form])} for form in forms for kind in FORMS[form][0]]
        messages.append({"role": "user", "content": [*items, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
    return messages


def is_told_apart(number: int) -> bool:
    """Whether uploads can say the same: a video and then its audio are one item in messages, and two uploads."""
    _, turns = draw_conversation(number)
    pairs = [pair for forms, _, _ in turns for pair in itertools.pairwise(forms)]
    return ("video", "audio of a video") not in pairs


NUMBERS = [number for number in range(2 * NUM_CONVERSATIONS) if is_told_apart(number)][:NUM_CONVERSATIONS]


def template_of(number: int) -> str:
    return TEMPLATES[number % len(TEMPLATES)]


@pytest.fixture(scope="module")
def learnt(
    models: dict[str, SharedModel], files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, EncodedDataset]:
    """By template: the conversations as the training pipeline reads them, without its random frames and crops."""
    folder = tmp_path_factory.mktemp("data")
    datasets = {}
    for template, model in models.items():
        lines = [
            json.dumps({"id": str(number), "messages": as_messages(number, files)})
            for number in NUMBERS
            if template_of(number) == template
        ]
        path = folder / f"{template}.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
        config = Config(datasets={"messages": DatasetConfig(valid_build_info=BuildInfo(anno_dir=str(path)))})
        config.model.model_type, config.model.max_txt_len = template, 10_000
        [datasets[template]] = build_datasets(config, model.processor, training=False)
        assert dialogue_template(template) == model.new_conversation()
    return datasets


def ids_of(prompt: Prompt, model: VideoLlama) -> list[int]:
    """The ids of a prompt whose media are already features."""
    ids = model.processor.placeholder_ids
    return [key if isinstance(key, int) else ids[key[0].kind] for key in prompt.keys]  # type: ignore[index]


def fill_chat(chat: Chat, number: int, upload: Callable[[str], object]) -> list[int]:
    """Upload, ask and answer as the conversation says; the ids of the last question."""
    system, turns = draw_conversation(number)
    if system is not None:
        chat.template.system = system
    for forms, question, answer in turns:
        for form in forms:
            upload(form)
        chat.ask(question)
        chat.turns[-1].answer = answer
    chat.turns[-1].answer = None
    media = [item for turn in chat.turns for upload in turn.uploads for item in upload.encoded]
    return ids_of(chat.model.prepare(chat.conversation(), media), chat.model)


def upload_to(chat: Chat, files: dict[str, Path], form: str) -> None:
    getattr(chat, FORMS[form][1])(files[form])


def evaluated_ids(number: int, model: SharedModel, files: dict[str, Path], patch: pytest.MonkeyPatch) -> list[int]:
    """The ids of the last question where the annotated answers are the model's."""
    _, turns = draw_conversation(number)
    [form] = turns[0][0]
    asked: list[Prompt] = []

    def answer(model: VideoLlama, prompts: list[Prompt], options: object) -> list[str]:
        asked.extend(prompts)
        return [turns[len(asked) - 1][2]]

    patch.setattr(asking, "generate_text", answer)
    questions = [asking.Question(0, turn, "", "", text) for turn, (_, text, _) in enumerate(turns, start=1)]
    file = asking.AskedFile(files[form], FORMS[form][3], True, [questions])  # type: ignore[arg-type]
    asking.answer_dialogues(model, [file], [asking.read_media(model, file.path, file.modality)])
    return ids_of(asked[-1], model)


def can_be_evaluated(number: int) -> bool:
    """Whether evaluation asks such a thing: about one file, before the first question, without a system text."""
    system, turns = draw_conversation(number)
    forms = [form for forms, _, _ in turns for form in forms]
    return system is None and len(turns[0][0]) == len(forms) == 1 and FORMS[forms[0]][3] is not None


def page_ids(number: int, model: SharedModel, files: dict[str, Path], folder: Path) -> list[int]:
    """The ids of the last question on the page."""
    folder.mkdir()
    session = Session(Chat(model), folder, Limits(media=20))

    def upload(form: str) -> None:
        session.add(files[form], files[form].name, num_frames=None, listen=form != "video")

    ids = fill_chat(session.chat, number, upload)
    session.close()
    return ids


def paths_of(messages: Conversation) -> dict[str, list[str]]:
    """The files of messages by the argument of the processor's call."""
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    items = [item for content in contents for item in content if item["type"] != "text"]
    return {
        f"{kind}s": [item["path"] for item in items if item["type"] == kind] for kind in ("video", "image", "audio")
    }


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_same_messages_are_the_same_ids_everywhere(
    template: str,
    models: dict[str, SharedModel],
    learnt: dict[str, EncodedDataset],
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, dataset = models[template], learnt[template]
    write, num_pages, num_evaluated = model.processor.apply_chat_template, 0, 0
    numbers = [number for number in NUMBERS if template_of(number) == template]
    assert len(numbers) == len(dataset.examples)
    for place, number in enumerate(numbers):
        *asked, _ = as_messages(number, files)
        ids = write(asked, add_generation_prompt=True, tokenize=True, return_dict=False)[0].tolist()
        # What is learnt begins with what is asked, and the last answer follows.
        sample = dataset.encoder(dataset.examples[place])
        assert sample.input_ids[: len(ids)] == ids, number
        assert sample.labels[len(ids)] >= 0
        prompt = write(asked, add_generation_prompt=True)
        assert model.processor(text=prompt, **paths_of(asked))["input_ids"][0].tolist() == ids, number
        chat = Chat(model)
        assert fill_chat(chat, number, partial(upload_to, chat, files)) == ids, number
        forms = [form for turn in draw_conversation(number)[1] for form in turn[0]]
        if all(FORMS[form][2] for form in forms):
            assert page_ids(number, model, files, tmp_path / str(number)) == ids, number
            num_pages += 1
        if can_be_evaluated(number):
            assert evaluated_ids(number, model, files, monkeypatch) == ids, number
            num_evaluated += 1
    # The page and evaluation cannot be given everything, but are not left out.
    assert min(num_pages, num_evaluated) >= 4


def test_there_are_two_hundred_of_all_forms() -> None:
    drawn = [form for number in NUMBERS for turn in draw_conversation(number)[1] for form in turn[0]]
    assert (len(NUMBERS), set(drawn)) == (NUM_CONVERSATIONS, set(FORMS))
