"""The command `video-llama info`: what is installed, which devices there are, and where weights were found."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import video_llama
from video_llama.cli.command import CommandParser, run_command

__all__ = ["main"]

DESCRIPTION = "Print versions, devices, FFmpeg's libraries, extras and weights: what a report of a problem needs."
_PACKAGES = (
    "torch",
    "torchvision",
    "torchaudio",
    "transformers",
    "timm",
    "av",
    "numpy",
    "accelerate",
    "huggingface_hub",
)
_GIB = 2**30


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the options."""
    return CommandParser(prog=prog, description=DESCRIPTION)


def run(arguments: argparse.Namespace) -> int:
    """Print one section after the other, since the later ones take seconds."""
    sections = {
        "versions": versions,
        "FFmpeg": ffmpeg_libraries,
        "devices": devices,
        "extras": extras,
        "weights": weights,
    }
    for title, lines in sections.items():
        print(f"{title}:", flush=True)
        for name, value in lines():
            print(f"  {name:<18} {value}", flush=True)
    return 0


def versions() -> Iterator[tuple[str, str]]:
    """Yield the versions of the package, of Python and of what answers depend on."""
    yield "video_llama", f"{video_llama.__version__} ({Path(video_llama.__file__).parent})"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in _PACKAGES:
        yield package, _version(package)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def ffmpeg_libraries() -> Iterator[tuple[str, str]]:
    """Yield FFmpeg's libraries in PyAV, which decode all files."""
    import av

    for name, numbers in sorted(av.library_versions.items()):
        yield name, ".".join(map(str, numbers))


def devices() -> Iterator[tuple[str, str]]:
    """Yield where a model can run, the default first."""
    import psutil
    import torch

    from video_llama.utils.devices import resolve_device

    yield "default", str(resolve_device(None))
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        yield f"cuda:{number}", f"{properties.name}, {properties.total_memory / _GIB:.0f} GiB"
    if torch.backends.mps.is_available():
        yield "mps", "Apple GPU"
    memory = psutil.virtual_memory()
    free = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"
    yield "cpu", f"{torch.get_num_threads()} threads, {free}"


def extras() -> Iterator[tuple[str, str]]:
    """Yield the packages of extras: their versions, or how to install them."""
    from video_llama.utils.extras import EXTRAS, how_to_install, is_installed

    for package in sorted(EXTRAS):
        if is_installed(package):
            yield package, "installed"
        else:
            yield package, f"not installed: {how_to_install(package)}"


def weights() -> Iterator[tuple[str, str]]:
    """Yield the models of the package, of the hub's cache and of ./checkpoints."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    from video_llama.checkpoints.hub import PACKAGED_MODELS

    for folder in sorted(PACKAGED_MODELS.iterdir()):
        if (folder / "config.json").exists():
            yield folder.name, str(folder)
    for folder in sorted(Path("checkpoints").glob("*")):
        if folder.is_dir():
            yield folder.name, str(folder.resolve())
    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound as error:
        yield "hub cache", f"none at {error.cache_dir}"
        return
    for repository in sorted(repositories, key=lambda each: each.repo_id):
        yield "hub cache", f"{repository.repo_id}, {repository.size_on_disk / _GIB:.1f} GiB"


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(run, build_parser(prog).parse_args(argv))
