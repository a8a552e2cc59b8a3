"""A file in saved folders that names our classes to programs which do not import this package themselves."""

from __future__ import annotations

from pathlib import Path

from video_llama.utils.files import write_whole

__all__ = ["auto_map", "write_remote_code"]

_MODULE = "modeling_video_llama"
_MODEL, _WHOLE = "VideoLlamaModel", "VideoLlamaForConditionalGeneration"
_CLASSES = {
    "AutoConfig": "VideoLlamaConfig",
    "AutoModel": _MODEL,
    "AutoModelForCausalLM": _WHOLE,
    "AutoModelForImageTextToText": _WHOLE,
    "AutoModelForMultimodalLM": _WHOLE,
    "AutoProcessor": "VideoLlamaProcessor",
    "AutoImageProcessor": "VideoLlamaImageProcessor",
    "AutoVideoProcessor": "VideoLlamaVideoProcessor",
    "AutoFeatureExtractor": "VideoLlamaFeatureExtractor",
}

# transformers imports it with `trust_remote_code=True`. What is imported outside of `try`, transformers checks itself,
# and would tell to install a package of this name from PyPI.
_SOURCE = '''"""Video-LLaMA's classes, from the installed package video_llama: this folder holds no code of its own."""

try:
    from video_llama.model import (
        {classes},
    )
except ModuleNotFoundError as error:
    if error.name != "video_llama":
        raise
    raise ImportError(
        "this model needs the package video_llama, which is not installed: "
        "run `pip install .` in a copy of its repository"
    ) from None
'''


def auto_map(*auto_classes: str) -> dict[str, str]:
    """Return what `auto_map` in a saved configuration says of these Auto classes, by default of all."""
    return {name: f"{_MODULE}.{_CLASSES[name]}" for name in auto_classes or _CLASSES}


def write_remote_code(folder: Path) -> None:
    """Write the module that `auto_map` names."""
    source = _SOURCE.format(classes=",\n        ".join(sorted(set(_CLASSES.values()))))
    write_whole(folder / f"{_MODULE}.py", lambda path: path.write_text(source, encoding="utf-8"))
