"""Many clients at once, each with a clip of its own."""

from __future__ import annotations

import gc
import time
import weakref
from types import SimpleNamespace

import pytest

from benchmarks.bench_demo import talk_at_once
from examples.tiny_world.known_clips import Clip

pytestmark = pytest.mark.slow


def test_sixteen_clients_get_their_own_right_answers_and_leave_nothing_behind(
    world: SimpleNamespace, clips: list[Clip]
) -> None:
    held: list[weakref.ref[object]] = []
    encode = world.model.encode

    def remember(media: object) -> object:
        encoded = encode(media)
        held.append(weakref.ref(encoded))
        return encoded

    world.model.encode = remember
    try:
        talks = talk_at_once(world.address, clips)
    finally:
        del world.model.encode
    assert len({(clip.colour, clip.sound) for clip in clips}) == len(talks) == 16
    assert [one for one in talks if not one.is_right] == []
    assert len(held) == 32  # a video and its sound, once for each client
    for _ in range(600):  # until the server has noticed that the clients left
        if not len(world.sessions):
            break
        time.sleep(0.1)
    gc.collect()
    assert (len(world.sessions), list(world.sessions.folder.iterdir())) == (0, [])
    assert [one for one in held if one() is not None] == []
