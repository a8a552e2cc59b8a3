"""Conversations of visitors: what they hold, that they never mix, and how they are freed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from video_llama.demo.session import Session
from video_llama.demo.sessions import Sessions
from video_llama.errors import MediaError, VideoLlamaError
from video_llama.inference.generation import StopSignal
from video_llama.processor.media_processor import MediaProcessor


def say(session: Session, question: str = "What is it?") -> str:
    return list(session.ask(question, max_new_tokens=6))[-1]


def test_a_file_is_copied_decoded_once_and_asked_about_twice(
    session: Session, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = session.add(image, "cat.png", num_frames=None, listen=True)
    image.unlink()
    assert (item.name, item.kind, item.path.parent) == ("cat.png", "image", session.folder)
    monkeypatch.delattr(MediaProcessor, "process_image")
    assert say(session) == session.turns[0].answer
    say(session, "Why?")
    assert [turn.question for turn in session.turns] == ["What is it?", "Why?"]
    assert session.media == [item]


def test_a_visitor_is_told_what_is_being_done_with_a_file(
    session: Session, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    media_processor, model = session.chat.media_processor, session.chat.model
    decode, encode = media_processor.process_image, model.encode
    monkeypatch.setattr(MediaProcessor, "process_image", lambda self, path: (done.append("decoded"), decode(path))[1])
    monkeypatch.setattr(model, "encode", lambda media: (done.append("encoded"), encode(media))[1])
    steps = session.adding(image, "cat.png", num_frames=None, listen=True)
    assert (next(steps), done, session.busy) == ("decoding", [], True)
    assert (next(steps), done, session.media) == ("encoding", ["decoded"], [])
    assert ([*steps], done) == (session.media, ["decoded", "encoded"])
    assert len(session.media) == 1


def test_a_file_whose_visitor_left_midway_is_removed(session: Session, image: Path) -> None:
    steps = session.adding(image, "cat.png", num_frames=None, listen=True)
    assert [next(steps), next(steps)] == ["decoding", "encoding"]
    assert len(list(session.folder.iterdir())) == 1
    steps.close()
    assert (session.media, list(session.folder.iterdir()), session.busy) == ([], [], False)


def test_frames_and_listening_are_the_visitors_choice(session: Session, make_video: Callable[..., Path]) -> None:
    clip = make_video("clip.mp4", audio=True)
    heard = session.add(clip, "a.mp4", num_frames=3, listen=True)
    deaf = session.add(clip, "b.mp4", num_frames=None, listen=False)
    assert (len(heard.frame_shares), len(heard.segment_shares)) == (3, 8)
    assert (len(deaf.frame_shares), deaf.segment_shares, deaf.upload.sound) == (8, [], "not listened to")
    with pytest.raises(VideoLlamaError, match="limit reached: 2 files"):
        session.add(clip, "c.mp4", num_frames=None, listen=False)


def test_errors_name_a_file_as_its_owner_does_and_leave_the_session_usable(
    session: Session, tmp_path: Path, image: Path
) -> None:
    broken = tmp_path / "0123abcd"
    broken.write_bytes(bytes(range(256)) * 40)
    with pytest.raises(MediaError, match=r"^holiday.mp4: not a media file") as refused:
        session.add(broken, "holiday.mp4", num_frames=None, listen=True)
    assert str(tmp_path) not in str(refused.value)
    assert (session.media, list(session.folder.iterdir())) == ([], [])
    session.add(image, "cat.png", num_frames=None, listen=True)
    assert isinstance(say(session), str)


def test_an_answer_can_be_stopped_and_the_next_question_asked(session: Session) -> None:
    pieces = session.ask("Go on for ever", max_new_tokens=400, temperature=1.5)
    first = next(pieces)
    session.stop()
    assert [*pieces] == []
    assert session.turns[0].answer is not None
    assert session.turns[0].answer.startswith(first)
    assert not session.busy
    say(session, "And now?")


def test_an_answer_of_beam_search_is_stopped_before_it_is_whole(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[bool] = []
    judge = StopSignal.__call__

    def stop_at_the_third(self: StopSignal, *arguments: Any, **settings: Any) -> Any:
        if len(steps) == 2:
            session.stop()
        verdict = judge(self, *arguments, **settings)
        steps.append(bool(verdict.all()))
        return verdict

    monkeypatch.setattr(StopSignal, "__call__", stop_at_the_third)
    list(session.ask("Go on for ever", num_beams=3, max_new_tokens=100, min_new_tokens=100))
    assert steps == [False, False, True]
    assert session.turns[0].answer is not None
    say(session, "And now?")


def test_an_error_of_the_model_is_told_and_does_not_stand_in_the_way(
    session: Session, image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **settings: Any) -> Any:
        raise RuntimeError("out of memory\nand much more")

    with monkeypatch.context() as broken:
        broken.setattr(session.chat.model, "stream", fail)
        with pytest.raises(VideoLlamaError, match=r"could not be answered: RuntimeError: out of memory \(the server"):
            list(session.ask("What is it?"))
        broken.setattr(session.chat.model, "encode", fail)
        with pytest.raises(VideoLlamaError, match=r"cat.png could not be loaded: RuntimeError"):
            session.add(image, "cat.png", num_frames=None, listen=True)
    assert caplog.text.count("Traceback") == 2
    assert (session.busy, list(session.folder.iterdir())) == (False, [])
    say(session, "Which?")
    assert [turn.question for turn in session.turns] == ["Which?"]


def test_a_question_before_the_last_file_is_not_given_again_and_the_reason_is_told(
    session: Session, image: Path
) -> None:
    say(session)
    session.add(image, "cat.png", num_frames=None, listen=True)
    with pytest.raises(VideoLlamaError, match="a file was added after the last question"):
        list(session.retry())


def test_a_second_request_during_an_answer_is_refused_and_harms_nothing(session: Session) -> None:
    pieces = session.ask("What?", max_new_tokens=6)
    next(pieces)
    for refused in (session.undo, lambda: say(session)):
        with pytest.raises(VideoLlamaError, match="not finished yet"):
            refused()
    pieces.close()
    assert [turn.question for turn in session.turns] == ["What?"]


def test_an_answer_can_be_given_again_and_to_other_words(session: Session) -> None:
    with pytest.raises(VideoLlamaError, match="nothing to answer again"):
        list(session.retry())
    first = say(session)
    assert list(session.retry(max_new_tokens=6))[-1] == first
    list(session.retry("Who is it?", max_new_tokens=6))
    assert [turn.question for turn in session.turns] == ["Who is it?"]


def test_undo_gives_the_question_back_and_then_the_file(session: Session, image: Path) -> None:
    item = session.add(image, "cat.png", num_frames=None, listen=True)
    say(session)
    assert session.undo() == "What is it?"
    assert (session.media, item.path.exists()) == ([item], True)
    assert session.undo() == ""
    assert (session.media, session.turns, item.path.exists()) == ([], [], False)
    assert session.undo() == ""


def test_one_file_is_removed_and_the_rest_of_the_conversation_stays(session: Session, image: Path) -> None:
    first = session.add(image, "first.png", num_frames=None, listen=True)
    list(session.ask("What is it?", max_new_tokens=2))
    answer = session.turns[0].answer
    second = session.add(image, "second.png", num_frames=None, listen=True)
    session.remove(second.key)
    assert ([file.name for file in session.media], len(session.turns)) == (["first.png"], 1)
    assert not second.path.exists()
    with pytest.raises(VideoLlamaError, match="not in the conversation"):
        session.remove(second.key)
    session.remove(first.key)
    assert (session.media, session.turns[0].question, session.turns[0].answer) == ([], "What is it?", answer)
    held = weakref.ref(first.upload)
    del first, second
    gc.collect()
    assert held() is None
    list(session.ask("And now?", max_new_tokens=2))
    assert len(session.turns) == 2


def test_a_question_that_does_not_fit_is_refused_and_the_next_one_answered(session: Session) -> None:
    with pytest.raises(VideoLlamaError, match="tokens"):
        list(session.ask("What? " * 300, max_new_tokens=session.chat.model.max_length - 20))
    assert isinstance(say(session), str)
    assert [turn.question for turn in session.turns] == ["What is it?"]


def test_visitors_share_nothing(sessions: Sessions, image: Path) -> None:
    first, second = sessions.get("first"), sessions.get("second")
    first.add(image, "cat.png", num_frames=None, listen=True)
    say(first)
    assert (second.turns, second.media) == ([], [])
    assert first.folder != second.folder
    assert sessions.get("first") is first


def test_the_end_of_a_session_frees_its_files_features_and_cache(sessions: Sessions, image: Path) -> None:
    session = sessions.get("visitor")
    session.add(image, "cat.png", num_frames=None, listen=True)
    say(session)
    held = [weakref.ref(session.chat), weakref.ref(session.media[0].upload.encoded[0])]
    folder = session.folder
    sessions.end("visitor")
    with pytest.raises(VideoLlamaError, match="has ended"):
        say(session)
    del session
    gc.collect()
    assert [reference() for reference in held] == [None, None]
    assert (folder.exists(), len(sessions)) == (False, 0)


def test_a_session_that_ends_during_an_answer_is_freed_with_it(sessions: Sessions) -> None:
    session = sessions.get("visitor")
    pieces = session.ask("Go on", max_new_tokens=400, temperature=1.5)
    next(pieces)
    sessions.end("visitor")
    list(pieces)
    assert (session.turns, session.folder.exists()) == ([], False)


def test_room_is_made_by_idle_and_empty_sessions_only(sessions: Sessions) -> None:
    say(sessions.get("talks"))
    sessions.get("empty")
    sessions.get("third")
    assert sessions.find("empty") is None
    say(sessions.get("third"))
    with pytest.raises(VideoLlamaError, match="the demo is full"):
        sessions.get("fourth")
    sessions.limits = replace(sessions.limits, idle_seconds=-1)
    assert sessions.get("fourth").turns == []
    assert len(sessions) == 1


def test_a_request_without_a_session_is_refused(sessions: Sessions) -> None:
    with pytest.raises(VideoLlamaError, match="names no session"):
        sessions.get(None)
