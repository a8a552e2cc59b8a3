"""Dialogues as messages, answered and scored in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from video_llama import Chat, load_pretrained_model
from video_llama.errors import MediaError, VideoLlamaError
from video_llama.inference.engine import VideoLlama
from video_llama.inference.generation import GenerationOptions
from video_llama.inference.messages import answer_messages, score_answers

SAMPLES = Path(__file__).parents[2] / "video_llama" / "demo" / "samples"
STARS, CROSS, TONE = (str(SAMPLES / name) for name in ("stars.mp4", "cross.jpg", "tone.m4a"))
OPTIONS = GenerationOptions(max_new_tokens=40)


@pytest.fixture(scope="module")
def model() -> VideoLlama:
    return load_pretrained_model("video-llama-tiny", device="cpu", half=False, verbose=False)


def question(text: str, kind: str = "", path: str = "") -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = [{"type": kind, "path": path}] if kind else []
    return [{"role": "user", "content": [*items, {"type": "text", "text": text}]}]


def asked_by_chat(model: VideoLlama, kind: str, path: str, *questions: str) -> list[str]:
    chat = Chat(model, options=OPTIONS)
    getattr(chat, {"video": "upload_video", "image": "upload_img", "audio": "upload_audio"}[kind])(path)
    answers = []
    for text in questions:
        chat.ask(text)
        answers.append(chat.answer())
    return answers


def test_messages_are_answered_in_batches_as_a_chat_answers_each(model: VideoLlama) -> None:
    kinds = [("video", STARS), ("image", CROSS), ("audio", TONE)]
    asked = [("What happens in the video?",), ("What is in the image?",), ("What do you hear?",)]
    alone = [asked_by_chat(model, *kind, *texts) for kind, texts in zip(kinds, asked, strict=True)]
    dialogues = [question(texts[0], *kind) for kind, texts in zip(kinds, asked, strict=True)]
    for batch_size in (1, 2, 8):
        assert answer_messages(model, dialogues, OPTIONS, batch_size=batch_size) == [texts[0] for texts in alone]
    # A later turn, with the answers so far.
    first, second = asked_by_chat(model, "video", STARS, "What happens in the video?", "How many shapes are there?")
    later = [
        *question("What happens in the video?", "video", STARS),
        {"role": "assistant", "content": first},
        *question("How many shapes are there?"),
    ]
    assert answer_messages(model, [later], OPTIONS) == [second]


def test_without_audio_a_video_is_its_frames(model: VideoLlama) -> None:
    chat = Chat(model, options=OPTIONS)
    chat.upload_video_without_audio(STARS)
    chat.ask("What happens in the video?")
    dialogue = question("What happens in the video?", "video", STARS)
    silent = chat.answer()
    assert answer_messages(model, [dialogue], OPTIONS, audio=False) == [silent]
    assert answer_messages(model, [dialogue], OPTIONS) != [silent]


def test_what_cannot_be_answered_is_reported_and_the_rest_goes_on(model: VideoLlama, tmp_path: Path) -> None:
    absent = question("What happens?", "video", str(tmp_path / "absent.mp4"))
    endless = question("word " * 2000)
    good = question("What is in the image?", "image", CROSS)
    errors: dict[int, VideoLlamaError] = {}
    answers = answer_messages(model, [absent, good, endless], OPTIONS, on_error=errors.__setitem__)
    assert [bool(answer) for answer in answers] == [False, True, False]
    assert "no such file" in str(errors[0])
    assert "tokens, but" in str(errors[2])
    with pytest.raises(MediaError, match="no such file"):
        answer_messages(model, [absent], OPTIONS)
    scores = score_answers(model, [good, absent], ["a", "a"], on_error=errors.__setitem__)
    assert scores[0][0] > float("-inf")
    assert scores[1] == (float("-inf"), False)


def test_the_models_own_answer_is_the_likeliest_and_scores_are_of_the_answers_tokens(model: VideoLlama) -> None:
    dialogues = [question("What happens in the video?", "video", STARS), question("What do you hear?", "audio", TONE)]
    own = answer_messages(model, dialogues, OPTIONS)
    others = ["On a white background, one small red circle moves up.", "No."]
    scores = score_answers(model, [*dialogues, *dialogues], [*own, *others], batch_size=3)
    assert [greedy for _, greedy in scores] == [True, True, False, False]
    assert scores[0][0] > scores[2][0]
    assert scores[1][0] > scores[3][0]
    # The judge: what `generate` of transformers says of the tokens it chose, up to the one that ends the answer.
    inputs = model.processor.apply_chat_template(
        dialogues[:1], tokenize=True, add_generation_prompt=True, load_audio_from_video=True
    )
    chosen = model.model.generate(
        **inputs, max_new_tokens=40, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    likelihoods = model.model.compute_transition_scores(chosen.sequences, chosen.scores, normalize_logits=True)[0]
    texts = [model.processor.tokenizer.decode(token, skip_special_tokens=True).strip() for token in chosen.sequences[0]]
    length = max(number for number, text in enumerate(texts) if text) + 1
    assert scores[0][0] == pytest.approx(float(likelihoods[:length].sum()), abs=1e-4)
