"""The facts of a clip, an image or an audio file: the value of each attribute that questions ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from examples.tiny_world.world.scene import Scene
from examples.tiny_world.world.sounds import Sound
from examples.tiny_world.world.vocabulary import NO_SOUND_TRACK

__all__ = ["Facts", "facts_of"]


@dataclass(frozen=True)
class Facts:
    """The facts of one clip, image or audio file.

    Attributes:
        medium: "video", "picture" or "sound".
        values: value by attribute. An attribute that changes during a clip is not in it ("order" tells it).
        changes: the attribute that changes halfway, "colour", "shape" or None.
        first, then: its two values; "" if nothing changes.
    """

    medium: str
    values: Mapping[str, str]
    changes: str | None = None
    first: str = ""
    then: str = ""

    @property
    def is_plural(self) -> bool:
        """Return whether there are several objects."""
        return self.values.get("count", "one") != "one"

    @property
    def visual(self) -> list[str]:
        """Return the attributes of frames."""
        return [name for name in self.values if name not in ("sound", "pitch")]

    @property
    def audible(self) -> list[str]:
        """Return the attributes of audio."""
        return [name for name in self.values if name in ("sound", "pitch")]


def facts_of(scene: Scene | None, sound: Sound | None) -> Facts:
    """Return the facts of a clip (a moving scene, with or without an audio track), an image or an audio file."""
    values: dict[str, str] = {}
    changes, first, then = None, "", ""
    if scene is not None:
        values = {"shape": scene.look.shape, "colour": scene.look.colour, "size": scene.size, "count": scene.count}
        values["background"] = scene.background
        changes = scene.changes
        if scene.motion is None:
            values["position"] = scene.position
        else:
            values |= {"motion": scene.motion, "order": scene.order}
        if changes is not None:
            first = values.pop(changes)
            then = getattr(scene.looks[1], changes)
    if sound is not None:
        values["sound"] = sound.kind
        if sound.kind != "silence":
            values["pitch"] = {"rising tone": "rises", "falling tone": "falls"}.get(sound.kind, "stays the same")
    elif scene is not None and scene.motion is not None:
        values["sound"] = NO_SOUND_TRACK
    medium = "video"
    if scene is None:
        medium = "sound"
    elif scene.motion is None:
        medium = "picture"
    return Facts(medium, values, changes, first, then)
