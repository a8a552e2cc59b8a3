"""A model for several conversations: whose turn it is, and where it looked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from video_llama.checkpoints.memory import DeviceMemory
from video_llama.demo.session import Session
from video_llama.demo.sessions import Sessions
from video_llama.demo.shared_model import SharedModel
from video_llama.errors import DeviceError, VideoLlamaError
from video_llama.inference.explain import attention_shares


def test_shares_are_means_over_layers_heads_and_queries_summed_over_the_tokens_of_a_part() -> None:
    first = torch.tensor([[[[0.1, 0.2, 0.3, 0.4]], [[0.3, 0.2, 0.1, 0.4]]]])  # (1, heads, queries, tokens)
    second = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]], [[1.0, 0.0, 0.0, 0.0]]]])
    assert attention_shares([first, second], 2) == pytest.approx([0.7, 0.3])


def test_features_are_the_same_whether_or_not_the_attention_is_recorded(
    shared_model: SharedModel, make_video: Callable[..., Path]
) -> None:
    frames, sound = shared_model.processor.media_processor.process_video(make_video("clip.mp4", audio=True))
    for item, values in ((frames, frames.pixel_values), (sound, sound.values)):
        encoded = shared_model.encode(item)
        assert torch.equal(encoded.features, shared_model.encode(values).features)
        assert len(shared_model.shares(encoded)) == len(values)
        assert sum(shared_model.shares(encoded)) == pytest.approx(1, abs=1e-5)


def test_the_shares_are_those_of_the_attention_that_was_computed(
    shared_model: SharedModel, make_video: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    qformer = shared_model.model.video_branch.video_qformer
    seen = []
    for name, module in qformer.named_modules():
        if name.endswith("crossattention.attention"):
            module.register_forward_hook(lambda layer, args, output: seen.append(output[1]))
    frames, _ = shared_model.processor.media_processor.process_video(make_video(), audio=False)
    monkeypatch.setattr(qformer.config, "_attn_implementation", "eager")  # it returns its weights
    encoded = shared_model.encode(frames)
    for module in qformer.modules():
        module._forward_hooks.clear()
    assert seen
    assert shared_model.shares(encoded) == pytest.approx(attention_shares(seen, len(frames.pixel_values)), abs=1e-6)


def test_answers_of_several_threads_are_those_of_one(
    shared_model: SharedModel, sessions: object, make_video: Callable[..., Path]
) -> None:
    clips = [make_video(f"{number}.mp4", num_frames=4 * number + 4) for number in range(2)]
    answers: dict[tuple[str, int], str] = {}

    def converse(session: Session, number: int, label: str) -> None:
        session.add(clips[number], "clip.mp4", num_frames=None, listen=False)
        answers[label, number] = list(session.ask("What is it?", max_new_tokens=8))[-1]

    threads = [threading.Thread(target=converse, args=(sessions.get(f"visitor {n}"), n, "together")) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        sessions.end(f"visitor {number}")
        converse(sessions.get(f"alone {number}"), number, "alone")
        sessions.end(f"alone {number}")
        assert answers["together", number] == answers["alone", number]


@pytest.fixture
def open_sessions(shared_model: SharedModel, tmp_path: Path) -> Iterator[Callable[[int | None], Sessions]]:
    """Conversations with the same model, which keeps so many bytes of what they have computed."""
    opened: list[Sessions] = []

    def open_sessions(kept_bytes: int | None) -> Sessions:
        model: Future[SharedModel] = Future()
        model.set_result(SharedModel(shared_model, kept_bytes))
        opened.append(Sessions(model, tmp_path / str(len(opened))))
        return opened[-1]

    yield open_sessions
    for sessions in opened:
        sessions.end_all()


def say(session: Session, question: str) -> str:
    return list(session.ask(question, max_new_tokens=6))[-1]


def kept(session: Session) -> int:
    return session.chat._cache.num_bytes


def converse(sessions: Sessions) -> list[str]:
    visitors = [sessions.get(str(number)) for number in range(3)]
    return [say(visitor, f"{question} {number}") for question in "ab" for number, visitor in enumerate(visitors)]


def test_conversations_keep_what_they_computed_within_a_budget_and_say_the_same_beyond_it(
    open_sessions: Callable[[int | None], Sessions],
) -> None:
    unlimited = open_sessions(None)
    expected = converse(unlimited)
    sizes = [kept(unlimited.get(str(number))) for number in range(3)]
    assert min(sizes) > 0
    limited = open_sessions(5 * max(sizes) // 2)
    assert converse(limited) == expected
    assert [kept(limited.get(str(number))) for number in range(3)] == [0, *sizes[1:]]
    say(limited.get("0"), "c")
    assert kept(limited.get("1")) == 0
    assert kept(limited.get("2")) == sizes[2], "the one that was used longest ago is forgotten"
    none = open_sessions(0)
    assert converse(none) == expected
    assert [kept(none.get(str(number))) for number in range(3)] == [0, 0, 0]


def test_the_budget_is_half_of_what_is_free_unless_it_is_told(
    shared_model: SharedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("video_llama.demo.shared_model.read_device_memory", lambda device: DeviceMemory(900, 1000))
    assert [SharedModel(shared_model, size).kept_bytes for size in (None, 0, 7)] == [450, 0, 7]


def test_where_memory_runs_out_conversations_are_forgotten_and_the_next_question_is_answered(
    open_sessions: Callable[[int | None], Sessions], monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = open_sessions(None)
    first, second = sessions.get("first"), sessions.get("second")
    say(first, "What is it?")
    assert kept(first) > 0

    def fail(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(type(first.chat.model.model), "generate", fail)
        with pytest.raises(VideoLlamaError, match="the server has too little memory for it; try again with fewer fra"):
            say(second, "What is it?")
    assert kept(first) == 0
    assert say(second, "What is it?") == first.turns[0].answer


def test_a_device_that_failed_for_good_is_known_to_the_server(
    open_sessions: Callable[[int | None], Sessions], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_sessions(None).get("visitor")
    model = session.chat.model
    assert isinstance(model, SharedModel)

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(type(model.model), "generate", fail)
    assert not model.failure.done()
    for _ in range(2):  # there may be others before the end
        with pytest.raises(VideoLlamaError, match="device-side assert"):
            say(session, "What is it?")
    assert isinstance(model.failure.exception(timeout=0), DeviceError)
