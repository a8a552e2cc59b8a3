"""Clips, images and audio files by number: content, conversations on it, and ground truth.

Each sample has a random stream of its own, so sample `index` of a split does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.random import Generator

from examples.tiny_world.world.chinese import ask_in_chinese
from examples.tiny_world.world.facts import Facts, facts_of
from examples.tiny_world.world.language import ask, caption, describe, describe_both
from examples.tiny_world.world.scene import Scene, random_scene
from examples.tiny_world.world.sounds import Sound, random_sound

__all__ = ["FIRST_IDS", "SPLITS", "STREAMS", "Sample", "Turn", "random_sample"]

SPLITS = ("train", "validation", "test")
STREAMS = ("clip", "image", "sound", "cc_sbu", "laion")
"""The kinds of samples in a split, each with random streams of its own; the last two are images in shards."""

FIRST_IDS = {"train": 10_000_000, "validation": 20_000_000, "test": 30_000_000}
"""Ids are numbers, as in the datasets with these layouts, and differ between splits."""

# Share of clips with an audio track.
_SOUND_TRACK_SHARE = 0.87
_FRAME_RATES = (8, 10, 12)
_CLIP_SECONDS = (2.0, 4.0)

Turn = tuple[str, str]
"""A question and its answer."""


@dataclass(frozen=True)
class Sample:
    """One clip, image or audio file.

    Attributes:
        id: number within the corpus, as text.
        kind: of file.
        scene: content of the frames; None for an audio file.
        sound: content of the audio; None for an image or a clip without audio track.
        fps, num_frames: of a clip.
        caption: of the frames, or of an audio file.
        visual_turns: one conversation on the frames.
        sound_turns: one conversation on the audio.
        chinese_turns: questions on the frames of a clip.
        mixed_turns: one conversation on frames and audio.
        questions: for evaluation; see `truth`.
    """

    id: str
    kind: Literal["clip", "image", "sound"]
    scene: Scene | None
    sound: Sound | None
    fps: int
    num_frames: int
    caption: str
    visual_turns: list[Turn] = field(default_factory=list)
    sound_turns: list[Turn] = field(default_factory=list)
    chinese_turns: list[Turn] = field(default_factory=list)
    mixed_turns: list[Turn] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Return the length of a clip or an audio file; 0 for an image."""
        if self.fps:
            return self.num_frames / self.fps
        return 0.0 if self.sound is None else self.sound.seconds

    def truth(self, file: str) -> dict[str, Any]:
        """Return the sample's line in `ground_truth.jsonl`; `file` is relative to the split's folder."""
        truth: dict[str, Any] = {"id": self.id, "file": file, "kind": self.kind, "caption": self.caption}
        if self.kind != "image":
            truth |= {"seconds": round(self.seconds, 3), "sound": self.sound.kind if self.sound else None}
            truth["has_sound_track"] = self.sound is not None
        if self.scene is not None:
            truth |= _visible_truth(self.scene)
        return truth | {"questions": self.questions}


def random_sample(seed: int, split: str, stream: str, index: int) -> Sample:
    """Return sample `index` of a stream in a split of the corpus with this seed.

    Raises:
        ValueError: an unknown split or stream, or a negative number.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), STREAMS.index(stream), index])
    id_ = str(FIRST_IDS[split] + index)
    if stream == "sound":
        return _random_sound_sample(id_, rng)
    moving = stream == "clip"
    scene = random_scene(rng, moving=moving, held_out=split != "train")
    if not moving:
        facts = facts_of(scene, None)
        return Sample(
            id=id_,
            kind="image",
            scene=scene,
            sound=None,
            fps=0,
            num_frames=1,
            caption=caption(facts, rng),
            visual_turns=_conversation(facts, facts.visual, rng),
            questions=_questions(facts, rng),
        )
    fps = int(rng.choice(_FRAME_RATES))
    num_frames = round(fps * rng.uniform(*_CLIP_SECONDS))
    sound = random_sound(rng, num_frames / fps) if rng.random() < _SOUND_TRACK_SHARE else None
    facts = facts_of(scene, sound)
    return Sample(
        id=id_,
        kind="clip",
        scene=scene,
        sound=sound,
        fps=fps,
        num_frames=num_frames,
        caption=caption(facts, rng),
        visual_turns=_conversation(facts, facts.visual, rng),
        sound_turns=[] if sound is None else _conversation(facts_of(None, sound), facts.audible, rng),
        chinese_turns=[ask_in_chinese(name, facts, rng) for name in _some(facts.visual, rng)],
        mixed_turns=_mixed_conversation(facts, rng),
        questions=_questions(facts, rng),
    )


def _random_sound_sample(id_: str, rng: Generator) -> Sample:
    sound = random_sound(rng, round(rng.uniform(*_CLIP_SECONDS), 2))
    facts = facts_of(None, sound)
    return Sample(
        id=id_,
        kind="sound",
        scene=None,
        sound=sound,
        fps=0,
        num_frames=0,
        caption=caption(facts, rng),
        sound_turns=_conversation(facts, facts.audible, rng),
        questions=_questions(facts, rng),
    )


def _some(attributes: Sequence[str], rng: Generator) -> list[str]:
    """Return three to six of the attributes, or as many as there are, in random order."""
    count = min(len(attributes), int(rng.integers(3, 7)))
    return [str(name) for name in rng.permutation(attributes)[:count]]


def _conversation(facts: Facts, attributes: Sequence[str], rng: Generator) -> list[Turn]:
    """Return some turns; every fourth conversation begins with a description."""
    turns = [describe(facts, rng)] if rng.random() < 0.25 else []
    for attribute in _some(attributes, rng):
        turns.append(ask(attribute, facts, rng, follow_up=bool(turns) and rng.random() < 0.6))
    return turns


def _mixed_conversation(facts: Facts, rng: Generator) -> list[Turn]:
    """Return turns on frames and audio, the latter at any place; some begin with a description of both."""
    turns = [describe_both(facts, rng)] if rng.random() < 0.25 else []
    attributes = _some(facts.visual, rng)
    for name in facts.audible:
        if name == "sound" or rng.random() < 0.5:
            attributes.insert(int(rng.integers(len(attributes) + 1)), name)
    for attribute in attributes:
        turns.append(ask(attribute, facts, rng, follow_up=bool(turns) and rng.random() < 0.6))
    return turns


def _questions(facts: Facts, rng: Generator) -> list[dict[str, Any]]:
    """Return questions for evaluation: each attribute alone, then conversations of two turns with equal "dialogue"."""
    dialogues = [[name] for name in facts.values]
    visual = [str(name) for name in rng.permutation(facts.visual)]
    if visual:
        dialogues += [visual[:2], visual[2:4]]
        dialogues += [[visual[4 % len(visual)], "sound"]] if "sound" in facts.values else []
    elif len(facts.audible) > 1:
        dialogues.append([str(name) for name in rng.permutation(facts.audible)])
    questions = []
    for number, attributes in enumerate(dialogues):
        for turn, name in enumerate(attributes, start=1):
            question, answer = ask(name, facts, rng, follow_up=turn > 1)
            entry = {"dialogue": number, "turn": turn, "attribute": name, "value": facts.values[name]}
            questions.append({**entry, "question": question, "answer": answer})
    return questions


def _visible_truth(scene: Scene) -> dict[str, Any]:
    """Return attributes, whether their combination is held out, and positions."""
    truth: dict[str, Any] = {
        "shape": scene.look.shape,
        "colour": scene.look.colour,
        "size": scene.size,
        "count": scene.count,
        "background": scene.background,
        "combination": "unseen" if scene.unseen_pairs else "seen",
        "unseen_pairs": [list(pair) for pair in scene.unseen_pairs],
        "radius": round(scene.radius, 4),
        "places": _rounded(scene, 0.0),
    }
    if scene.motion is None:
        return truth | {"position": scene.position}
    later = scene.looks[-1]
    truth |= {"motion": scene.motion, "order": scene.order, "changes": scene.changes}
    truth |= {"later_shape": later.shape, "later_colour": later.colour, "change_time": None}
    if scene.changes:
        truth["change_time"] = round(scene.change_time, 4)
    return truth | {"last_places": _rounded(scene, 1.0)}


def _rounded(scene: Scene, time: float) -> list[list[float]]:
    return [[round(x, 4), round(y, 4)] for x, y in scene.places_at(time)]
