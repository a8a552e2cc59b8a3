"""Tables from the names in configurations to Python objects.

A table names the modules that register into it and imports them at the first look-up, so that `import video_llama`
stays light.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from video_llama.errors import ConfigError

__all__ = ["DATASETS", "MODELS", "PROCESSORS", "SCHEDULES", "VIDEO_READERS", "Registry"]

T = TypeVar("T", bound=Callable[..., Any])


class Registry(Generic[T]):
    """Named factories of one kind.

    Args:
        kind: what the table holds, in the words of an error message ("dataset", "processor").
        modules: import paths of the modules that register into this table.
    """

    def __init__(self, kind: str, modules: Sequence[str] = ()) -> None:
        self.kind = kind
        self._modules = tuple(modules)
        self._imported = False
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a factory to register it under `name`; a second, different one is an error."""

        def decorate(entry: T) -> T:
            known = self._entries.get(name)
            # A reloaded module registers its names again, with new objects. Only a different definition is an error.
            if known is not None and (known.__module__, known.__qualname__) != (entry.__module__, entry.__qualname__):
                raise ValueError(f"{self.kind} {name!r} is registered twice: {known} and {entry}")
            self._entries[name] = entry
            return entry

        return decorate

    def names(self) -> list[str]:
        """Return all names, sorted."""
        self._import_modules()
        return sorted(self._entries)

    def get(self, name: str) -> T:
        """Return the factory registered under `name`.

        Raises:
            ConfigError: unknown name; the message lists those that are known.
        """
        self._import_modules()
        if name not in self._entries:
            near = difflib.get_close_matches(str(name), self._entries, n=1)
            suggestion = f"; did you mean {near[0]!r}?" if near else "."
            raise ConfigError(f"unknown {self.kind} {name!r}{suggestion} Known: {', '.join(self.names()) or 'none'}")
        return self._entries[name]

    def build(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the factory registered under `name`."""
        return self.get(name)(*args, **kwargs)

    def _import_modules(self) -> None:
        if self._imported:
            return
        for module in self._modules:
            importlib.import_module(module)
        # Set at the end, so that the next look-up tries again after an import that failed.
        self._imported = True


DATASETS: Registry[Any] = Registry("dataset", ["video_llama.data.datasets"])
MODELS: Registry[Any] = Registry("model", ["video_llama.inference.load"])
PROCESSORS: Registry[Any] = Registry("processor", ["video_llama.processor.builders"])
SCHEDULES: Registry[Any] = Registry("learning-rate schedule", ["video_llama.training.optim"])
VIDEO_READERS: Registry[Any] = Registry(
    "video reader", ["video_llama.media.pyav_reader", "video_llama.media.decord_reader"]
)
