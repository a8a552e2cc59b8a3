"""Every way a checkpoint is wrong, seen from outside: one error that names the file, the part and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.checkpoints import AL, VL, Edit, RunsCode, edit_tensors, read_tensors
from video_llama.errors import CheckpointError
from video_llama.inference.load import load_pretrained_model

Change = Callable[[Path], Any]

LLAMA = "language_model/model.safetensors"
EVA, BLIP2, IMAGEBIND = "eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth", "imagebind_huge.pth"
FILES = [VL, AL, EVA, BLIP2, IMAGEBIND, LLAMA]
SAVED = "model.safetensors"
DEEPER = "video_Qformer.bert.encoder.layer.2.output_query.dense.bias"

# One weight of each part: file, original name in it, our name.
NAMES = [
    (EVA, "blocks.1.mlp.fc1.weight", "video_branch.vision_encoder.blocks.1.mlp.fc1.weight"),
    (BLIP2, "ln_vision.weight", "video_branch.vision_norm.weight"),
    (VL, "video_query_tokens", "video_branch.video_query_tokens"),
    (VL, "llama_proj.bias", "video_branch.projection.bias"),
    (AL, "audio_query_tokens", "audio_branch.audio_query_tokens"),
    (IMAGEBIND, "modality_heads.audio.2.weight", "audio_branch.audio_encoder.head.weight"),
    (LLAMA, "model.norm.weight", "language_model.model.norm.weight"),
]
# How messages call that part, and where they say its weights belong.
PARTS = [
    ("frame encoder (EVA ViT-g)", "eva_vit_g.pth (vit_ckpt)"),
    ("BLIP-2 Q-Former", "blip2_pretrained_flant5xxl.pth (q_former_model)"),
    ("video Q-Former", "VL_*.pth (ckpt)"),
    ("video projection", "VL_*.pth (ckpt) or the MiniGPT-4 file (llama_proj_model)"),
    ("audio Q-Former and projection", "AL_*.pth (ckpt_2)"),
    ("ImageBind audio encoder", "imagebind_huge.pth (imagebind_ckpt_path)"),
    ("language model", "the language model's folder (llama_model)"),
]
ROWS = [pytest.param(*names, *part, id=names[1]) for names, part in zip(NAMES, PARTS, strict=True)]


def load_error(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_pretrained_model(path, device="cpu", half=False, verbose=False, **options)
    return str(caught.value)


def edit(name: str, change: Edit) -> Change:
    return lambda folder: edit_tensors(folder / name, change)


def set_config(folder: Path, **settings: Any) -> None:
    path = folder / "language_model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def widen_the_language_model(folder: Path) -> None:
    """A language model of width 96 in the place of the one of width 64 that the branches were trained for."""
    set_config(folder, hidden_size=96, num_attention_heads=4, head_dim=24)
    tensors = read_tensors(folder / LLAMA)
    save_file({name: wider(tensor) for name, tensor in tensors.items()}, folder / LLAMA)


def wider(tensor: Tensor) -> Tensor:
    return torch.ones([96 if side == 64 else side for side in tensor.shape])


def make_delta(tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.mul_(1e-3)


def grow_the_vocabulary(tensors: dict[str, Tensor]) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.ones(513, 64)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            widen_the_language_model,
            "VL_random_tiny.pth was trained for a language model of width 64, but the one given here has width 96; "
            "take the file and the language model of the same size",
        ),
        (
            edit(LLAMA, grow_the_vocabulary),
            "has a vocabulary of 513 tokens, its config.json says 512; take weights, config.json and tokenizer of the "
            "same release",
        ),
        (
            lambda folder: (folder / "language_model" / "added_tokens.json").write_text('{"[PAD]": 512}'),
            "the tokenizer adds [PAD], but the weights have only 512 tokens. Vicuna's first release has 32001 tokens",
        ),
        (edit(LLAMA, make_delta), "delta weights, not a language model"),
        (
            lambda folder: (folder / VL).write_bytes((folder / AL).read_bytes()),
            "video Q-Former: 56 of 56 weights are missing",
        ),
        (
            edit(VL, lambda tensors: tensors.update({DEEPER: torch.ones(64)})),
            f"has 1 weights that the model does not have ({DEEPER})",
        ),
        (
            lambda folder: (folder / "language_model/config.json").write_text("{"),
            "language_model/config.json: damaged or cut off",
        ),
        (lambda folder: (folder / "language_model" / "tokenizer.model").write_bytes(b"x"), "damaged or cut off"),
        (lambda folder: (folder / "language_model" / "tokenizer.model").unlink(), "no tokenizer can be loaded"),
    ],
)
def test_a_classic_mistake_has_its_own_sentence(original_folder: Path, change: Change, sentence: str) -> None:
    change(original_folder)
    assert sentence in load_error(original_folder)


@pytest.mark.parametrize(("file", "name", "ours", "part", "home"), ROWS)
def test_a_missing_weight_is_named_with_its_part_and_its_file(
    original_folder: Path, hf_folder: Path, file: str, name: str, ours: str, part: str, home: str
) -> None:
    edit_tensors(original_folder / file, lambda tensors: tensors.pop(name))
    message = load_error(original_folder)
    assert f"{part}: 1 of " in message
    assert message.endswith(f" weights are missing ({name}); they belong in {home}")
    edit_tensors(hf_folder / SAVED, lambda tensors: tensors.pop(ours))
    message = load_error(hf_folder)
    assert f"{part}: 1 of " in message
    assert message.endswith(f" weights are missing ({ours}); they belong in {hf_folder}")


@pytest.mark.parametrize(("file", "name", "ours", "part", "home"), ROWS)
def test_a_weight_of_another_shape_is_named_with_its_part_and_its_file(
    original_folder: Path, hf_folder: Path, file: str, name: str, ours: str, part: str, home: str
) -> None:
    for path, stored in ((original_folder / file, name), (hf_folder / SAVED, ours)):
        edit_tensors(path, lambda tensors, stored=stored: tensors.update({stored: torch.ones(3, 3)}))
    for folder, path in ((original_folder, original_folder / file), (hf_folder, hf_folder / SAVED)):
        message = load_error(folder)
        assert str(path) in message
        assert part in message or "was trained for a language model of width 3" in message


@pytest.mark.parametrize("file", [*FILES, SAVED])
def test_a_truncated_download_is_named(original_folder: Path, hf_folder: Path, file: str) -> None:
    folder = hf_folder if file == SAVED else original_folder
    path = folder / file
    path.write_bytes(path.read_bytes()[:-2000])
    assert f"{path}: cut off after {path.stat().st_size:,} bytes" in load_error(folder)


@pytest.mark.parametrize("file", [*FILES, SAVED])
def test_a_git_lfs_pointer_is_named(original_folder: Path, hf_folder: Path, file: str) -> None:
    folder = hf_folder if file == SAVED else original_folder
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 278978745\n")
    assert f"{folder / file}: a git-LFS pointer, not the file it stands for" in load_error(folder)


@pytest.mark.parametrize("file", FILES[:-1])
def test_a_pickle_that_wants_to_run_code_is_refused(
    original_folder: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(original_folder)
    torch.save({"model": read_tensors(original_folder / file), "extra": RunsCode()}, original_folder / file)
    assert f"{file}: refused, because opening it would run code (" in load_error(original_folder)
    assert not Path("was_here").exists()


def test_an_absent_path_says_what_should_be_there(tmp_path: Path) -> None:
    message = load_error(tmp_path / "absent")
    assert message.startswith(f"{tmp_path / 'absent'}: no such file or folder; it should be a folder with VL_*.pth")


def test_a_missing_shard_of_a_saved_folder_is_named(hf_folder: Path) -> None:
    tensors = read_tensors(hf_folder / SAVED)
    index = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    (hf_folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    present = {name: tensors[name] for name, file in index.items() if file == "model-0.safetensors"}
    save_file(present, hf_folder / "model-0.safetensors")
    sentence = "1 of the 2 files that model.safetensors.index.json lists are missing: model-1.safetensors"
    assert sentence in load_error(hf_folder)
