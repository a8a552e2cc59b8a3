"""A saved folder whose settings are damaged, absurd or a stranger's: one error of ours that names the file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from video_llama.checkpoints.hub import PACKAGED_MODELS
from video_llama.checkpoints.weight_files import open_weights
from video_llama.errors import CheckpointError, VideoLlamaError
from video_llama.inference.load import load_pretrained_model

TINY = PACKAGED_MODELS / "video-llama-tiny"
FILES = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")

Damage = Callable[[Path], Any]
DAMAGES: dict[str, Damage] = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "bytes": lambda file: file.write_bytes(b"\xff\xfe\x00" * 90),
    "null": lambda file: file.write_text("null"),
    "list": lambda file: file.write_text("[1, 2]"),
    "deep": lambda file: file.write_text("[" * 100_000),
    "folder": lambda file: (file.unlink(), file.mkdir()),
    "loop": lambda file: (file.unlink(), file.symlink_to(file)),
    "pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The small model, with settings that can be damaged."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in TINY.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, copy)
    (copy / "model.safetensors").symlink_to(TINY / "model.safetensors")
    return copy


def edit(file: Path, *keys: str, value: Any) -> None:
    content = json.loads(file.read_text())
    section = content
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    file.write_text(json.dumps(content))


def refusal(folder: Path, kind: type[VideoLlamaError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        load_pretrained_model(folder, device="cpu", verbose=False)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_settings_is_named(folder: Path, name: str, damage: str) -> None:
    DAMAGES[damage](folder / name)
    assert str(folder / name) in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    message = refusal(folder)
    assert str(folder) in message
    assert name in message


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("config.json", ("vision_config",), [1]),
        ("config.json", ("vision_config", "num_hidden_layers"), 10**9),
        ("config.json", ("audio_config", "num_hidden_layers"), 10**9),
        ("config.json", ("text_config", "num_hidden_layers"), 10**9),
        ("config.json", ("qformer_config", "hidden_size"), 10**12),
        ("config.json", ("vision_config", "hidden_size"), -1),
        ("config.json", ("vision_config", "num_attention_heads"), 0),
        ("config.json", ("text_config", "hidden_size"), "wide"),
        ("config.json", ("num_video_query_tokens",), 10**9),
        ("tokenizer.json", ("model",), None),
        ("tokenizer.json", ("added_tokens",), 7),
        # The tokenizers library panics here, with an error that is no `Exception`.
        ("tokenizer.json", ("model", "continuing_subword_prefix"), "abc"),
        ("processor_config.json", ("image_processor",), [3]),
        ("processor_config.json", ("image_processor", "image_size"), "large"),
        ("processor_config.json", ("image_processor", "image_size"), 10**9),
        ("processor_config.json", ("image_processor", "size_of_images"), 3),
        ("processor_config.json", ("video_processor", "image_size"), 3),
        ("processor_config.json", ("video_processor", "num_frames"), 10**9),
        ("processor_config.json", ("feature_extractor", "log_mel", "num_mel_bins"), 10**9),
        ("processor_config.json", ("feature_extractor", "log_mel", "num_mel_bins"), "abc"),
        ("processor_config.json", ("num_video_query_tokens",), 10**9),
        ("processor_config.json", ("num_video_query_tokens",), 10**2000),
        ("config.json", ("vision_config", "hidden_size"), 10**2000),
        ("processor_config.json", ("conv_template",), "unknown"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else str(value)[:20],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_built(
    folder: Path, name: str, keys: tuple[str, ...], value: Any
) -> None:
    edit(folder / name, *keys, value=value)
    assert str(folder) in refusal(folder, VideoLlamaError)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    outside.symlink_to(TINY / "model.safetensors")
    inside = tmp_path / "folder"
    inside.mkdir()
    name = next(iter(open_weights(outside)))
    for place in ("../outside.safetensors", str(outside), "/dev/zero", 7):
        (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: place}}))
        with pytest.raises(CheckpointError, match="files beside it"):
            open_weights(inside)


def test_pipes_and_devices_are_no_weights(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    for path in (tmp_path, tmp_path / "zero.safetensors"):
        with pytest.raises(CheckpointError, match="not a file of weights"):
            open_weights(path)


@pytest.mark.parametrize("seed", range(6))
def test_flipped_bits_in_an_archive_of_torch_are_our_error_or_no_error(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": {f"w{number}": torch.ones(9) for number in range(40)}}, path)
    content = bytearray(path.read_bytes())
    places = torch.randint(len(content), (200,), generator=torch.Generator().manual_seed(seed))
    for place in places.tolist():
        content[place] ^= 1 << (place % 8)
    path.write_bytes(content)
    # A flip in the names or the directory cannot be read; one in a number cannot be seen.
    with contextlib.suppress(CheckpointError):
        open_weights(path)


def test_an_archive_that_would_unpack_to_more_than_it_has_is_refused(tmp_path: Path) -> None:
    stored, packed = tmp_path / "stored.pth", tmp_path / "packed.pth"
    torch.save({"w": torch.zeros(5_000_000)}, stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert packed.stat().st_size < stored.stat().st_size / 100
    with pytest.raises(CheckpointError, match="compressed"):
        open_weights(packed)
