"""Broken inputs by kind and seed, each written to a folder of its own; the same seed writes the same bytes."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.damages import DAMAGES
from video_llama.checkpoints.hub import PACKAGED_MODELS

TINY = PACKAGED_MODELS / "video-llama-tiny"
KINDS = ("media", "checkpoint", "annotations", "config")
_SETTINGS = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
_BYTE_DAMAGES = ("cut_end", "flip_some", "flip_many", "zero_run", "swap_parts", "take_out", "put_in", "leave_little")
# Values of every type, and numbers that nobody means.
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 10**9, 2**63, 10**400, 0.0, -0.5, 1e308, float("nan"), float("inf")),
    *("", "abc", "\0", "\ud800", "../../etc/passwd", "x" * 10_000, [], [[]], [None], {}, {"": {}}, {"a": [1, {}]}),
)
_CONFIG = """
model: {arch: video_llama, llama_model: folder, vit_ckpt: a.pth, q_former_model: b.pth, max_txt_len: 64}
datasets:
  webvid:
    data_type: video
    build_info: {anno_dir: a, videos_dir: v}
    vis_processor: {train: {n_frms: 2, image_size: 224}}
    sample_ratio: 2
run: {init_lr: 1e-3, max_epoch: 2, iters_per_epoch: 4, batch_size_train: 2, output_dir: out, device: cpu}
"""


@dataclass(frozen=True)
class Case:
    """One broken input.

    Args:
        kind: of `KINDS`.
        base, damage: what was broken, and how: a row and a column of the table.
        path: the file or folder to read.
    """

    kind: str
    base: str
    damage: str
    path: str


def write_case(kind: str, seed: str, folder: Path, bases: Sequence[Path]) -> Case:
    """Write one broken input into a new folder."""
    rng = random.Random(f"{kind} {seed}")
    folder.mkdir(parents=True)
    writers: dict[str, Callable[[random.Random, Path], Case]] = {
        "media": lambda rng, folder: write_media(rng, folder, rng.choice(bases), rng.choice(list(DAMAGES))),
        "checkpoint": _write_checkpoint,
        "annotations": _write_annotations,
        "config": _write_config,
    }
    return writers[kind](rng, folder)


def write_media(rng: random.Random, folder: Path, base: Path, damage: str) -> Case:
    """Break a media file; now and then its name is that of another kind."""
    suffix = base.suffix
    if rng.random() < 0.1:
        suffix = rng.choice((".mp4", ".wav", ".png", ".txt", ""))
    path = folder / f"broken{suffix}"
    path.write_bytes(DAMAGES[damage](base.read_bytes(), rng))
    return Case("media", base.name, damage, str(path))


def mutate(value: Any, rng: random.Random) -> Any:
    """Return JSON content with one value, somewhere in it, gone, doubled or of another kind."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(_ODD)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        rest = {name: other for name, other in value.items() if name != key}
        if rng.random() < 0.1:
            return rest
        if rng.random() < 0.1:
            return {**rest, rng.choice(("", "x", key * 2)): value[key]}
        return {**value, key: mutate(value[key], rng)}
    place = rng.randrange(len(value))
    if rng.random() < 0.1:
        return value[:place] + value[place + 1 :]
    return [*value[:place], mutate(value[place], rng), *value[place + 1 :]]


def _dump(content: Any) -> bytes:
    return json.dumps(content).encode("utf-8", "surrogatepass")


def _write_checkpoint(rng: random.Random, folder: Path) -> Case:
    if rng.random() < 0.3:
        return _write_pickle(rng, folder)
    for name in _SETTINGS:
        shutil.copy(TINY / name, folder)
    weights = folder / "model.safetensors"
    name = rng.choice((*_SETTINGS, "model.safetensors", "model.safetensors.index.json"))
    damage = rng.choice((*_BYTE_DAMAGES, "mutate"))
    if name == "model.safetensors":
        damage = rng.choice(("header_bytes", "header_mutate", "cut"))
        weights.write_bytes(_damage_safetensors((TINY / name).read_bytes(), damage, rng))
        return Case("checkpoint", name, damage, str(folder))
    weights.symlink_to(TINY / "model.safetensors")
    if name == "model.safetensors.index.json":
        content = _dump({"metadata": {}, "weight_map": {"lm_head.weight": "model.safetensors", "x": "/dev/zero"}})
        # Without it the index would not be looked at.
        weights.rename(folder / "part.safetensors")
    else:
        content = (folder / name).read_bytes()
    damages = {**DAMAGES, "mutate": lambda content, rng: _dump(mutate(json.loads(content), rng))}
    (folder / name).write_bytes(damages[damage](content, rng))
    return Case("checkpoint", name, damage, str(folder))


def _damage_safetensors(content: bytes, damage: str, rng: random.Random) -> bytes:
    if damage == "cut":
        return content[: rng.randrange(len(content))]
    length = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + length], content[8 + length :]
    if damage == "header_bytes":
        return DAMAGES[rng.choice(_BYTE_DAMAGES)](content[: 8 + length], rng) + body
    header = _dump(mutate(json.loads(header), rng))
    return struct.pack("<Q", len(header)) + header + body


class _Evil:
    """What runs code when it is unpickled by those who let it."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.marker, "w")


def _write_pickle(rng: random.Random, folder: Path) -> Case:
    path, damage = folder / "weights.pth", rng.choice((*_BYTE_DAMAGES, "evil", "zip_bomb", "long_bytes", "not_tensors"))
    whole = folder / "whole.pth"
    torch.save({"model": {f"w{number}": torch.ones(9) for number in range(20)}}, whole)
    if rng.random() < 0.3:
        torch.save({"model": {"w": torch.ones(9)}}, whole, _use_new_zipfile_serialization=False)
    if damage == "evil":
        path.write_bytes(pickle.dumps({"model": _Evil(str(folder / "RAN"))}, protocol=2))
    elif damage == "zip_bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}q\0." + bytes(400_000_000))
            archive.writestr("archive/version", b"3\n")
    elif damage == "long_bytes":
        path.write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 2 ** rng.choice((31, 40, 62))) + b"x")
    elif damage == "not_tensors":
        torch.save(rng.choice(({"model": {"w": 3}}, [1], {"model": [torch.ones(1)]}, {1: torch.ones(1)})), path)
    else:
        path.write_bytes(DAMAGES[damage](whole.read_bytes(), rng))
    whole.unlink()
    return Case("checkpoint", "weights.pth", damage, str(path))


def _write_annotations(rng: random.Random, folder: Path) -> Case:
    messages = [
        {"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A clip."},
    ]
    rows = [{"messages": messages, "id": f"r{number}"} for number in range(3)]
    rows.append({"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\nWhat?"}]})
    form = rng.choice(("rows.json", "rows.jsonl", "rows.csv", "rows.tsv"))
    damage = rng.choice((*_BYTE_DAMAGES, "mutate", "mutate"))
    if damage == "mutate":
        rows = mutate(rows, rng)
    separator = {"rows.csv": ",", "rows.tsv": "\t"}.get(form)
    if separator is not None:
        lines = [separator.join(("video", "caption")), *(separator.join((f"{n}.mp4", f'"a {n}"')) for n in range(9))]
        content = "\n".join(lines).encode()
        if damage == "mutate":
            content = content.replace(rng.choice((b'"', b"\n", b"video", b",", b"\t")), rng.choice((b"", b'""', b"\0")))
    elif form == "rows.jsonl" and isinstance(rows, list):
        content = b"\n".join(map(_dump, rows))
    else:
        content = _dump(rows)
    if damage != "mutate":
        content = DAMAGES[damage](content, rng)
    path = folder / form
    path.write_bytes(content)
    return Case("annotations", form, damage, str(path))


def _write_config(rng: random.Random, folder: Path) -> Case:
    import yaml

    damage = rng.choice((*_BYTE_DAMAGES, "mutate", "mutate", "mutate", "anchors", "tags", "deep"))
    content = _CONFIG.encode()
    if damage == "mutate":
        changed = mutate(yaml.safe_load(_CONFIG), rng)
        # JSON is YAML.
        content = _dump(changed)
    elif damage == "anchors":
        # Each line holds nine times the one before it.
        lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
        content = "\n".join(lines).encode()
    elif damage == "tags":
        marker = folder / "RAN"
        content = f"model: !!python/object/apply:os.system ['touch {marker}']\nrun: !x {{}}\n".encode()
    elif damage == "deep":
        content = b"model: " + rng.choice((b"[", b"{a: ")) * 20_000
    else:
        content = DAMAGES[damage](content, rng)
    path = folder / "train.yaml"
    path.write_bytes(content)
    return Case("config", "train.yaml", damage, str(path))
