"""Tables from the names in configurations to Python objects.

A table names the modules that register into it and imports them at the first look-up, so that `import video_llama`
stays light. Packages of others add entries to the tables of parts: see `Registry.get`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from video_llama.errors import ConfigError

__all__ = [
    "AUDIO_ENCODERS",
    "CONNECTORS",
    "DATASETS",
    "FRAME_ENCODERS",
    "MODELS",
    "PROCESSORS",
    "SCHEDULES",
    "VIDEO_READERS",
    "Registry",
    "import_plugins",
]

PLUGIN_GROUP = "video_llama.plugins"
"""The group of entry points by which installed packages name their modules that register parts."""
PLUGIN_VARIABLE = "VIDEO_LLAMA_PLUGINS"
"""The environment variable that names such modules, separated by commas, for commands without a configuration."""

T = TypeVar("T", bound=Callable[..., Any])


class Registry(Generic[T]):
    """Named factories of one kind.

    Args:
        kind: what the table holds, in the words of an error message ("dataset", "processor").
        modules: import paths of the modules that register into this table.
        takes_plugins: modules of other packages may register, too: those of the entry points `PLUGIN_GROUP`, and
            those that `PLUGIN_VARIABLE` names.
    """

    def __init__(self, kind: str, modules: Sequence[str] = (), takes_plugins: bool = False) -> None:
        self.kind = kind
        self._modules = tuple(modules)
        self._takes_plugins = takes_plugins
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

    def get(self, name: str, module: str | None = None) -> T:
        """Return the factory registered under `name`.

        Args:
            name: of the entry.
            module: the module that registered it where it was saved. It is only named in the error: a folder of
                weights must not say what is imported.

        Raises:
            ConfigError: unknown name; the message lists those that are known, or says which module is missing.
        """
        self._import_modules()
        if name not in self._entries and self._takes_plugins:
            _import_installed_plugins()
        if name not in self._entries and module is not None:
            raise ConfigError(
                f"the {self.kind} {name!r} was registered by the Python module {module}, which is not imported: import "
                f"it first, name it in model.plugins or in the environment variable {PLUGIN_VARIABLE}, or install its "
                "package"
            )
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


def import_plugins(modules: Sequence[str], where: str) -> None:
    """Import modules that register parts.

    Args:
        modules: their import paths.
        where: they are named, for the error message.

    Raises:
        ConfigError: one cannot be imported, and why.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"{where}: {module!r} cannot be imported ({error}); is it installed?") from error


def _import_installed_plugins() -> None:
    named = [name.strip() for name in os.environ.get(PLUGIN_VARIABLE, "").split(",")]
    import_plugins([name for name in named if name], PLUGIN_VARIABLE)
    for point in importlib.metadata.entry_points(group=PLUGIN_GROUP):
        import_plugins([point.module], f"the entry point {point.name!r} of {PLUGIN_GROUP}")


AUDIO_ENCODERS: Registry[Any] = Registry("audio encoder", ["video_llama.model.audio_encoders"], takes_plugins=True)
CONNECTORS: Registry[Any] = Registry(
    "connector",
    [
        "video_llama.model.video_branch",
        "video_llama.model.connectors.mlp",
        "video_llama.model.connectors.perceiver",
        "video_llama.model.connectors.video_qformer",
    ],
    takes_plugins=True,
)
DATASETS: Registry[Any] = Registry("dataset", ["video_llama.data.datasets"])
FRAME_ENCODERS: Registry[Any] = Registry("frame encoder", ["video_llama.model.frame_encoders"], takes_plugins=True)
MODELS: Registry[Any] = Registry("model", ["video_llama.inference.load"])
PROCESSORS: Registry[Any] = Registry("processor", ["video_llama.processor.builders"])
SCHEDULES: Registry[Any] = Registry("learning-rate schedule", ["video_llama.training.optim"])
VIDEO_READERS: Registry[Any] = Registry(
    "video reader", ["video_llama.media.pyav_reader", "video_llama.media.decord_reader"]
)
