"""Read and write YAML configurations: overrides from the command line, and errors that name every mistake at once.

A configuration is plain dataclasses (`video_llama.schema`), so editors and type checkers know every key.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from video_llama.errors import ConfigError
from video_llama.schema import (
    CHOICES,
    DATA_TYPES,
    WITHOUT_EFFECT,
    BuildInfo,
    Config,
    DatasetConfig,
    FeaturesConfig,
    ModelConfig,
    ProcessorConfig,
    ProcessorSplits,
    RunConfig,
)

__all__ = [
    "BuildInfo",
    "Config",
    "DatasetConfig",
    "FeaturesConfig",
    "ModelConfig",
    "ProcessorConfig",
    "ProcessorSplits",
    "RunConfig",
    "load_config",
    "save_config",
]

logger = logging.getLogger(__name__)


def load_config(path: str | os.PathLike[str], options: Sequence[str] = ()) -> Config:
    """Read a YAML configuration.

    Args:
        path: the file; paths inside it are relative to the current directory.
        options: overrides such as `run.batch_size_train=8`, stronger than the file.

    Raises:
        ConfigError: the file cannot be read, or keys are unknown or have the wrong type; all are named at once.
    """
    values = _read_yaml(Path(path))
    _check_is_mapping(values, f"{path}")
    config = OmegaConf.structured(Config)
    leaves = dict(_leaves(values))
    leaves.update(_parse_options(options))
    mistakes = [mistake for key, value in leaves.items() if (mistake := _set(config, key, value))]
    if mistakes:
        raise ConfigError(f"{path}: " + "; ".join(mistakes))
    try:
        resolved = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # an option that refers to nothing, or ???, which stands for no value
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    assert isinstance(resolved, Config)
    _note_without_effect(path, leaves, resolved)
    return resolved


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write the resolved configuration, every default included, as YAML that `load_config` reads back."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def _read_yaml(path: Path) -> Any:
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if not values:
        raise ConfigError(f"{path}: the file holds no settings")
    return values


def _note_without_effect(path: str | os.PathLike[str], leaves: Mapping[str, Any], config: Config) -> None:
    """Warn of keys that do nothing, unless what they say is what happens without them."""
    splits = {f"run.{name}": getattr(RunConfig(), name) for name in ("train_splits", "valid_splits", "test_splits")}
    for key, value in leaves.items():
        section, *_, name = key.split(".")
        pattern = f"datasets.*.{name}" if section == "datasets" else key
        means_nothing_else = key in splits and value == splits[key]
        if name == "tokenizer_name":
            means_nothing_else = value in (None, config.model.llama_model)
        if pattern in WITHOUT_EFFECT and not means_nothing_else:
            logger.warning("%s: %s has no effect here: %s", path, key, WITHOUT_EFFECT[pattern])


def _check_is_mapping(values: Any, where: str) -> None:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: must hold sections such as model: and run:, but is a {type(values).__name__}")


def _parse_options(options: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or not key:
            raise ConfigError(f"option {option!r} must have the form section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"option {option!r}: the value is not valid YAML") from error
        yield from _leaves(value, key) if isinstance(value, Mapping) and value else [(key, value)]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings."""
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from _leaves(value, name)
        else:
            yield name, value


def _set(config: Any, key: str, value: Any) -> str:
    """Put one value into the structured configuration; what is wrong with it, or ""."""
    unknown = _unknown_part(key)
    if unknown:
        return unknown
    section, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    if section == "datasets" and name and name not in config.datasets:
        config.datasets[name] = DatasetConfig()
    expected = _expected_type(key)
    if dataclasses.is_dataclass(expected) or get_origin(expected) is dict:  # a section; without keys it says nothing
        return "" if value is None else f"{key} must be a section with keys of its own, but is {value!r}"
    try:
        OmegaConf.update(config, key, value)
    except OmegaConfBaseException:
        return f"{key} must be {_type_name(expected)}, but is {value!r}"
    choices = CHOICES.get(key) or (DATA_TYPES if key.endswith(".data_type") else None)
    if choices and value is not None and value not in choices:
        return f"{key} must be one of {', '.join(choices)}, but is {value!r}"
    return ""


def _unknown_part(key: str) -> str:
    """What is wrong with a dotted key that the schema does not have, or ""."""
    schema: Any = Config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        schema = _section_of(schema)
        if schema is None:
            return f"{'.'.join(parts[:depth])} is a value, it has no key {part!r}"
        if get_origin(schema) is dict:
            schema = get_args(schema)[1]
            continue
        known = get_type_hints(schema)
        if part not in known:
            near = difflib.get_close_matches(part, known, n=1)
            suggestion = f" (did you mean {near[0]!r}?)" if near else f" (known: {', '.join(known)})"
            return f"unknown key {'.'.join(parts[: depth + 1])}{suggestion}"
        schema = known[part]
    return ""


def _section_of(schema: Any) -> Any:
    """The dataclass or dict type behind a field's annotation, None for a plain value."""
    for candidate in (schema, *get_args(schema)):
        if dataclasses.is_dataclass(candidate) or get_origin(candidate) is dict:
            return candidate
        if get_origin(schema) is dict:
            return schema
    return None


def _expected_type(key: str) -> Any:
    schema: Any = Config
    for part in key.split("."):
        section = _section_of(schema)
        schema = get_args(section)[1] if get_origin(section) is dict else get_type_hints(section)[part]
    return _section_of(schema) or schema


def _type_name(expected: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if expected in names:
        return names[expected]
    if get_origin(expected) is list:
        return f"a list, each item {_type_name(get_args(expected)[0])}"
    return " or ".join(_type_name(argument) for argument in get_args(expected)) or str(expected)
