"""A model for several conversations: whose turn it is, and where it looked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from video_llama.demo.session import Session
from video_llama.demo.shared_model import SharedModel, attention_shares


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
