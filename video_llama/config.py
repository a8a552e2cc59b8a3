"""Read and write YAML configurations: overrides from the command line, and errors that name every mistake at once.

A configuration is plain dataclasses (`video_llama.schema`), so editors and type checkers know every key.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from video_llama.errors import ConfigError
from video_llama.schema import (
    FREEZING_KEYS,
    BuildInfo,
    Config,
    DatasetConfig,
    FeaturesConfig,
    LoraConfig,
    ModelConfig,
    ProcessorConfig,
    ProcessorSplits,
    RunConfig,
)
from video_llama.utils.yaml_repair import count_values, first_alternative, repair_yaml

__all__ = [
    "BuildInfo",
    "Config",
    "DatasetConfig",
    "FeaturesConfig",
    "LoraConfig",
    "ModelConfig",
    "ProcessorConfig",
    "ProcessorSplits",
    "RunConfig",
    "find_out_of_range",
    "load_config",
    "save_config",
]

logger = logging.getLogger(__name__)

# Of one file; the largest of ours has some hundred.
_MAX_VALUES = 100_000

_COMPARISONS = {"at_least": operator.ge, "more_than": operator.gt, "at_most": operator.le, "less_than": operator.lt}


def load_config(path: str | os.PathLike[str], options: Sequence[str] = ()) -> Config:
    """Read a YAML configuration.

    Args:
        path: the file; paths inside it are relative to the current directory.
        options: overrides such as `run.batch_size_train=8`, stronger than the file.

    Raises:
        ConfigError: the file cannot be read, or keys are unknown or have the wrong type; all are named at once.

    Example:
        >>> config = load_config("eval_configs/tiny.yaml", ["model.dtype=float32"])
        >>> config.model.dtype
        'float32'
    """
    config = OmegaConf.structured(Config)
    # Options come second, so that they override the file.
    leaves = {**_read_yaml(Path(path)), **_parse_options(options)}
    # Set the keys one by one, to name every mistake and not only the first.
    mistakes = []
    for key, value in leaves.items():
        try:
            _set(config, key, value)
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError(f"{path}: " + "; ".join(mistakes))
    try:
        resolved = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        # An option that refers to nothing, or ???, which stands for no value.
        raise ConfigError(f"{path}: {_one_line(error)}") from error
    assert isinstance(resolved, Config)
    _agree_on_what_trains(path, leaves, resolved.model)
    _note_without_effect(path, leaves, resolved)
    return resolved


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write the resolved configuration, every default included, as YAML that `load_config` reads back."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def find_out_of_range(section: Any, prefix: str = "") -> Iterator[str]:
    """Yield a message for each number outside the range that `schema` gives its key.

    Args:
        section: a `Config` or one of its sections.
        prefix: the dotted key of the section, with a dot at its end.
    """
    for field in dataclasses.fields(section):
        key, value = prefix + field.name, getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from find_out_of_range(value, f"{key}.")
        elif isinstance(value, dict):
            for name, item in value.items():
                if dataclasses.is_dataclass(item):
                    yield from find_out_of_range(item, f"{key}.{name}.")
        bounds = field.metadata.get("bounds", {})
        # All comparisons are false for NaN.
        if value is not None and not all(_COMPARISONS[name](value, limit) for name, limit in bounds.items()):
            words = [f"{name.replace('_', ' ')} {limit}" for name, limit in bounds.items()]
            yield f"{key} must be {' and '.join(words)}, but is {value}"


def _read_yaml(path: Path) -> dict[str, Any]:
    """Return the values of a file by dotted key, with references to environment variables and other keys resolved."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: a folder; give a YAML file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    try:
        values = OmegaConf.to_container(_parse_yaml(path, text), resolve=True)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(error)}") from error
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from error
    except AssertionError as error:
        # A truth value or a number alone.
        raise ConfigError(f"{path}: must hold sections such as model: and run:, but is one value") from error
    if not values:
        raise ConfigError(f"{path}: the file has no settings")
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: must hold sections such as model: and run:, but is a {type(values).__name__}")
    return dict(_leaves(values))


def _parse_yaml(path: Path, text: str) -> Any:
    """Parse a configuration; one of the original's, which are not valid YAML, is repaired with warnings.

    Raises:
        yaml.YAMLError: there is more wrong with it.
    """
    try:
        # A few lines of references to each other can stand for more values than fit into memory.
        if count_values(text) > _MAX_VALUES:
            raise ConfigError(f"{path}: its references (*name) stand for more than {_MAX_VALUES:,} values")
        return OmegaConf.create(text)
    except yaml.YAMLError:
        repaired, messages = repair_yaml(text)
        if not messages:
            raise
        parsed = OmegaConf.create(repaired)
    for message in messages:
        logger.warning("%s, %s", path, message)
    return parsed


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Return the values of options by dotted key."""
    leaves: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or not key:
            raise ConfigError(f"option {option!r} must have the form section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"option {option!r}: the value is not valid YAML") from error
        # A mapping sets several keys at once. An empty one has no keys to yield, so it is kept for `_set` to check.
        if isinstance(value, Mapping) and value:
            leaves.update(_leaves(value, key))
        else:
            leaves[key] = value
    return leaves


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything in nested mappings."""
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from _leaves(value, name)
        else:
            yield name, value


def _set(config: Any, key: str, value: Any) -> None:
    """Put one value into the structured configuration.

    Raises:
        ConfigError: the key is unknown, or the value has the wrong type or is none of the choices.
    """
    expected, rules = _look_up(key)
    # A dataset comes into being with the first key that names it.
    section, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    if section == "datasets" and name and name not in config.datasets:
        config.datasets[name] = DatasetConfig()
    # A section without keys is null in YAML and keeps its defaults. Any other single value is a mistake.
    if dataclasses.is_dataclass(expected) or get_origin(expected) is dict:
        if value is not None:
            raise ConfigError(f"{key} must be a section with keys of its own, but is {value!r}")
        return
    choices = rules.get("choices")
    # One name may stand where a list of names is meant.
    if choices and isinstance(value, str) and list[str] in (expected, *get_args(expected)):
        value = [value]
    first = first_alternative(value)
    if choices and first in choices:
        # The original's files write `model_type: pretrain_vicuna or pretrain_llama_v2`, which is one text to YAML.
        logger.warning("%s offers several values (%s); the first counts: %s", key, value, first)
        value = first
    try:
        OmegaConf.update(config, key, value)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key} must be {_type_name(expected)}, but is {value!r}") from error
    for item in value if isinstance(value, list) else [value]:
        if choices and item is not None and item not in choices:
            raise ConfigError(f"{key} must be one of {', '.join(choices)}, but is {item!r}")


def _look_up(key: str) -> tuple[Any, Mapping[str, Any]]:
    """Return the type that the schema gives a dotted key, and the metadata of its field.

    Raises:
        ConfigError: the schema has no such key.
    """
    expected: Any = Config
    rules: Mapping[str, Any] = {}
    parts = key.split(".")
    # Follow the key through the schema. `depth` says how much of it was right, for the error message.
    for depth, part in enumerate(parts):
        # Any name is a key of `datasets`.
        if get_origin(expected) is dict:
            expected = get_args(expected)[1]
            continue
        if expected is Any:
            # The keys of a part are its own.
            continue
        if not dataclasses.is_dataclass(expected):
            raise ConfigError(f"{'.'.join(parts[:depth])} is a value, it has no key {part!r}")
        fields = {field.name: field for field in dataclasses.fields(expected)}
        if part not in fields:
            near = difflib.get_close_matches(part, fields, n=1)
            suggestion = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise ConfigError(f"unknown key {'.'.join(parts[: depth + 1])} ({suggestion})")
        rules = fields[part].metadata
        expected = get_type_hints(expected)[part]
    return expected, rules


def _type_name(expected: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if expected in names:
        return names[expected]
    if get_origin(expected) is list:
        return f"a list, each item {_type_name(get_args(expected)[0])}"
    return " or ".join(_type_name(argument) for argument in get_args(expected))


def _agree_on_what_trains(path: str | os.PathLike[str], leaves: Mapping[str, Any], model: ModelConfig) -> None:
    """Set the original's keys as `model.unfreeze` says, so that the configuration that a run writes is of one piece.

    Raises:
        ConfigError: one of these keys was set, and says otherwise.
    """
    if model.unfreeze is None:
        return
    mistakes = []
    # The one key of both audio parts speaks of the Q-Former here, so that the projection can train by itself.
    for part, key in FREEZING_KEYS.items():
        if key is None or part == "audio_projection":
            continue
        trains = part in model.unfreeze
        if leaves.get(f"model.{key}") is trains:
            verb = "names" if trains else "does not name"
            mistakes.append(f"model.{key} is {trains}, but model.unfreeze {verb} {part}")
        setattr(model, key, not trains)
    if mistakes:
        raise ConfigError(f"{path}: {'; '.join(mistakes)}. Leave out one of the two keys")


def _note_without_effect(path: str | os.PathLike[str], leaves: Mapping[str, Any], config: Config) -> None:
    """Warn of keys that do nothing, unless their value is what happens without them."""
    for key, value in leaves.items():
        name = key.split(".")[-1]
        if name.endswith("_splits") and value == getattr(RunConfig(), name):
            continue
        if name == "tokenizer_name" and value in (None, config.model.llama_model):
            continue
        _, rules = _look_up(key)
        if rules.get("instead"):
            logger.warning("%s: %s has no effect: %s", path, key, rules["instead"])
