"""`registry` as the original's scripts use it: models, processors and the runner by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from video_llama.compat.runs import RunnerBase
from video_llama.processor.media_processor import MediaProcessor
from video_llama.registry import MODELS, PROCESSORS
from video_llama.schema import ModelConfig, ProcessorConfig

__all__ = ["registry"]

T = TypeVar("T")


class _Model:
    """What `registry.get_model_class` returns: the factory of a model."""

    def __init__(self, name: str) -> None:
        self._build = MODELS.get(name)

    def from_config(self, cfg: DictConfig) -> Any:
        """Return the model that a model section describes, loaded and on a GPU if there is one."""
        return self._build(_known(cfg, ModelConfig))


class _Processor:
    """What `registry.get_processor_class` returns: the factory of a processor."""

    def __init__(self, name: str) -> None:
        self._build = PROCESSORS.get(name)

    def from_config(self, cfg: DictConfig | None = None) -> MediaProcessor | Any:
        """Return the processor with the settings of a section."""
        given: dict[str, Any] = {}
        if cfg is not None:
            given = {key: value for key, value in vars(_known(cfg, ProcessorConfig)).items() if value is not None}
        given.pop("name", None)
        return self._build(**given)


class _Registry:
    """The look-ups of the original's scripts."""

    def get_model_class(self, name: str) -> _Model:
        """Return an object whose `from_config` loads the model; `ConfigError` for an unknown name."""
        return _Model(name)

    def get_processor_class(self, name: str) -> _Processor:
        """Return an object whose `from_config` builds the processor; `ConfigError` for an unknown name."""
        return _Processor(name)

    def get_runner_class(self, name: str) -> type[RunnerBase]:
        """Return the class of the training loop, whatever its name: there is one."""
        return RunnerBase


registry = _Registry()


def _known(section: DictConfig, kind: type[T]) -> T:
    """Return a section as the dataclass of our schema; keys that a script has added, such as `device_8bit`, go."""
    values = OmegaConf.to_container(section, resolve=True)
    assert isinstance(values, dict)
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{str(key): value for key, value in values.items() if key in names})
