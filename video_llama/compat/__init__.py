"""Make the module names of the original research code importable: a bridge for scripts that were written for it.

After `import video_llama.compat`, once and before the other imports, `from video_llama.common.config import Config` and
the like find the counterparts of this package. `docs/migrate.md` lists the names and says what differs.

Each entry of `_MODULES` is a module of the original with the names that scripts take from it, and where each is here.
They are looked up when they are first used, so the bridge itself loads neither torch nor any model.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

__all__: list[str] = []

_CHAT = "video_llama.compat.chat"
_RUNS = "video_llama.compat.runs"

_MODULES: dict[str, dict[str, str]] = {
    "common": {},
    "common.config": {"Config": "video_llama.compat.settings"},
    "common.registry": {"registry": "video_llama.compat.registry"},
    "common.dist_utils": dict.fromkeys(
        ("get_rank", "get_world_size", "init_distributed_mode", "is_dist_avail_and_initialized", "is_main_process"),
        _RUNS,
    ),
    "common.logger": {"setup_logger": _RUNS},
    # The original's scripts import the schedules only to register them; configurations name them.
    "common.optims": {"LinearWarmupCosineLRScheduler": _RUNS, "LinearWarmupStepLRScheduler": _RUNS},
    "common.utils": {"now": _RUNS},
    "conversation.conversation_video": dict.fromkeys(
        (
            "Chat",
            "Conversation",
            "SeparatorStyle",
            "conv_llava_llama_2",
            "conv_templates",
            "default_conversation",
        ),
        _CHAT,
    ),
    # Imported with `*`, for what they register.
    "datasets": {},
    "datasets.builders": {},
    "models": {},
    "processors": {},
    "runners": {"RunnerBase": _RUNS},
    "runners.runner_base": {"RunnerBase": _RUNS},
    "tasks": {"setup_task": _RUNS},
}


def _install() -> None:
    for name, homes in _MODULES.items():
        full_name = f"video_llama.{name}"
        if full_name in sys.modules:
            continue
        module = ModuleType(full_name, f"`{full_name}` of the original research code, as `video_llama.compat` has it.")
        names: dict[str, Any] = {"__all__": list(homes), "__getattr__": functools.partial(_look_up, full_name, homes)}
        module.__dict__.update(names)
        parent, _, child = full_name.rpartition(".")
        sys.modules[full_name] = module
        setattr(importlib.import_module(parent), child, module)


def _look_up(module: str, homes: Mapping[str, str], name: str) -> Any:
    if name not in homes:
        raise AttributeError(f"{module} has no {name!r} in video_llama.compat; docs/migrate.md lists what there is")
    return getattr(importlib.import_module(homes[name]), name)


_install()
