"""PEFT adapters: put beside a model's weights, written as PEFT's own folders, read back, and merged into the weights.

A folder has adapter_config.json and adapter_model.safetensors, for the whole model: PEFT itself reads it with
`PeftModel.from_pretrained(model, folder)`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from video_llama.checkpoints.trained_run import adapter_beside, run_checkpoint
from video_llama.config import LoraConfig
from video_llama.errors import CheckpointError, ConfigError
from video_llama.model.parts import adapter_containers, adapter_layers, part_of_parameter
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.model.weight_names import to_model_name, to_saved_name
from video_llama.utils.extras import import_extra

__all__ = [
    "add_lora",
    "base_of_adapter",
    "check_adapters",
    "is_adapter_folder",
    "load_adapter",
    "resolve_adapter",
    "save_adapter",
    "without_wrapper",
]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""In front of the names in PEFT's files."""


def is_adapter_folder(path: Path) -> bool:
    """Return whether PEFT has written this folder."""
    return (path / _CONFIG).is_file()


def base_of_adapter(folder: Path) -> str | None:
    """Return the path or hub id of the model that an adapter was trained on, if its folder says so.

    Raises:
        CheckpointError: its configuration is damaged.
    """
    try:
        base = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / _CONFIG}: not the configuration of a PEFT adapter ({error})") from error
    return str(base) if base else None


def resolve_adapter(path: str) -> Path:
    """Return the folder of an adapter: itself, or that of a training run.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(path).expanduser()
    if is_adapter_folder(folder):
        return folder
    checkpoint = run_checkpoint(folder)
    if checkpoint is None or not is_adapter_folder(adapter_beside(checkpoint)):
        raise CheckpointError(
            f"model.adapter: {folder} is no folder of a PEFT adapter ({_CONFIG}) or of a run with one"
        )
    return adapter_beside(checkpoint)


def add_lora(model: VideoLlamaForConditionalGeneration, lora: LoraConfig, parts: Collection[str]) -> None:
    """Give linear layers of some parts adapters of low rank, in float32; they change no output yet.

    Args:
        model: changed in place; afterwards only the adapters require gradients.
        lora: rank, scale, dropout and the layers.
        parts: by the names of `model/parts.py`.

    Raises:
        ConfigError: PEFT is not installed, or a name of `lora.modules` is that of no layer.
    """
    peft = import_extra("peft", "lora")
    chosen = list(lora_layers(model, lora, parts))
    config = peft.LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=chosen)
    peft.get_peft_model(model, config)


def lora_layers(
    model: VideoLlamaForConditionalGeneration, lora: LoraConfig, parts: Collection[str]
) -> dict[str, nn.Linear]:
    """Return the layers that get adapters, by name: linear ones, quantized ones included, but not the output layer.

    Raises:
        ConfigError: a name of `lora.modules` is that of no layer.
    """
    layers = {}
    for name, module in model.named_modules():
        # Layers of bitsandbytes are linear layers of torch, too.
        is_linear = isinstance(module, nn.Linear) and module is not model.lm_head
        if is_linear and part_of_parameter(f"{name}.weight") in parts:
            layers[name] = module
    if lora.modules is None:
        return layers
    for wanted in lora.modules:
        if not any(_is_named(name, wanted) for name in layers):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ConfigError(
                f"lora.modules names {wanted!r}, which is no linear layer of {', '.join(sorted(parts))}; there are "
                f"{known}"
            )
    return {name: layer for name, layer in layers.items() if any(_is_named(name, wanted) for wanted in lora.modules)}


def _is_named(layer: str, wanted: str) -> bool:
    """Whether a name is that of a layer, in the model or in files, or the end of it: `q_proj`, `self_attn.q_proj`."""
    return any(f".{name}".endswith(f".{wanted}") for name in (layer, to_saved_name(layer)))


def without_wrapper(model: Any) -> VideoLlamaForConditionalGeneration:
    """Return the model that PEFT has wrapped, with the adapter in it; any other model as it is.

    Raises:
        ConfigError: what trains would be outside of the model, as with prompt tuning.
    """
    if not hasattr(model, "get_base_model"):
        plain: VideoLlamaForConditionalGeneration = model
        return plain
    base: VideoLlamaForConditionalGeneration = model.get_base_model()
    if not adapter_layers(base):
        raise ConfigError("the model has a PEFT method that adds no layers, such as prompt tuning: train adapters")
    return base


def check_adapters(model: VideoLlamaForConditionalGeneration) -> None:
    """Refuse a model whose adapters could not be saved.

    Raises:
        ConfigError: there are several.
    """
    names = _adapter_names(model)
    if len(names) > 1:
        raise ConfigError(f"the model has several adapters ({', '.join(names)}), of which one trains: delete others")
    owners = [prefix.removesuffix(".") or "the whole model" for prefix, _ in _owners(model)]
    if len(owners) > 1:
        raise ConfigError(
            f"PEFT was called for several parts of the model ({', '.join(owners)}): call it once, for the whole model"
        )


def save_adapter(model: VideoLlamaForConditionalGeneration, folder: Path, base: str | None = None) -> None:
    """Write the adapter of a model as PEFT does.

    Args:
        model: with one adapter, whether this package, PEFT on the whole model or PEFT on a part of it has put it there.
        folder: a new folder; it must not be read before this function returns.
        base: what the adapter was trained on, for its configuration.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    import_extra("peft", "adapters")
    [adapter], [(prefix, owner)] = _adapter_names(model), _owners(model)
    values: dict[str, Tensor] = {}
    for name, value in _adapter_weights(owner, adapter).items():
        plain = prefix + name.removeprefix(_PREFIX)
        values[_PREFIX + to_model_name(plain)] = value.detach().cpu().contiguous()
    config = copy.deepcopy(owner.peft_config[adapter])
    # By their full names, because those that the adapter was made with may mean more layers in the whole model.
    if isinstance(getattr(config, "target_modules", None), (list, set, str)):
        config.target_modules = _adapted_layers(model)
    config.base_model_name_or_path = base
    config.inference_mode = True
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    save_file(values, folder / _WEIGHTS, metadata={"format": "pt"})


def _owners(model: VideoLlamaForConditionalGeneration) -> list[tuple[str, Any]]:
    """Return the modules, each with the beginning of the names below it, that PEFT was called with.

    These are the whole model, the causal language model, which is no module of it, or any other parts.
    """
    candidates: list[tuple[str, Any]] = [("", model), ("language_model.", model.language_model)]
    candidates += [(f"{name}.", module) for name, module in model.named_modules() if name]
    return [candidate for candidate in candidates if "peft_config" in vars(candidate[1])]


def _adapter_names(model: nn.Module) -> list[str]:
    names: set[str] = set()
    for layer in adapter_layers(model).values():
        for held in adapter_containers(layer):
            if isinstance(held, (nn.ModuleDict, nn.ParameterDict)):
                names.update(held)
    return sorted(names)


def _adapter_weights(model: Any, adapter: str = "default") -> dict[str, Tensor]:
    # Embeddings that train are in the checkpoint beside it. Left to itself, PEFT asks the hub about the base model.
    peft = import_extra("peft", "adapters")
    weights: dict[str, Tensor] = peft.get_peft_model_state_dict(
        model, adapter_name=adapter, save_embedding_layers=False
    )
    return weights


def _adapted_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that an adapter stands beside, without those that it has in their place."""
    tuners = import_extra("peft.tuners.tuners_utils", "adapters")
    layers = adapter_layers(model)
    replaced = tuple(f"{name}." for name, layer in layers.items() if not isinstance(layer, tuners.BaseTunerLayer))
    return sorted(
        name
        for name, layer in layers.items()
        if isinstance(layer, tuners.BaseTunerLayer) and not name.startswith(replaced)
    )


def load_adapter(
    model: VideoLlamaForConditionalGeneration, folder: Path, *, is_trainable: bool = False, merge: bool = False
) -> None:
    """Put an adapter beside the weights of a model, in place.

    Args:
        folder: of PEFT.
        is_trainable: the adapter requires gradients, and nothing else does.
        merge: add it to the weights, so that the model is what it was but for their values.

    Raises:
        ConfigError: PEFT is not installed, or the weights are quantized and should take the adapter in.
        CheckpointError: the folder is damaged, or the adapter is of another model.
    """
    peft = import_extra("peft", "adapters")
    if merge and getattr(model, "quantization_method", None) is not None:
        raise ConfigError("an adapter is merged into whole weights: leave load_in_8bit and load_in_4bit out")
    try:
        with safe_open(folder / _WEIGHTS, "pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        config = peft.PeftConfig.from_pretrained(str(folder))
        adapted = peft.PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=is_trainable)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{folder}: not a PEFT adapter of this model ({reason})") from error
    # PEFT only warns of what it did not find.
    wanted = _adapter_weights(adapted)
    differing = sorted(wanted.keys() ^ stored.keys())
    if differing:
        raise CheckpointError(
            f"{folder}: the adapter is of another model: {len(differing)} of its weights differ, the first is "
            f"{differing[0]}"
        )
    if merge:
        adapted.merge_and_unload(safe_merge=True)
