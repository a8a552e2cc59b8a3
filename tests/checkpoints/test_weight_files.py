"""Reading files of weights: every form the published ones have, and every way a download goes wrong."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from video_llama.checkpoints import weight_files
from video_llama.checkpoints.weight_files import open_weights
from video_llama.errors import CheckpointError


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3).half(), "b": torch.tensor(2.5)}


def assert_holds(path: Path, tensors: dict[str, Tensor]) -> None:
    weights = open_weights(path)
    assert set(weights) == set(tensors)
    for name, tensor in tensors.items():
        assert weights.header(name).is_meta
        assert (weights.header(name).shape, weights.header(name).dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(weights[name], tensor)


def test_a_bare_pth_file_is_read(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, tmp_path / "x.pth")
    assert_holds(tmp_path / "x.pth", tensors)


def test_of_a_training_checkpoint_only_the_model_is_read(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
    config = {"run": {"lr": 1e-4, "device": "cuda"}}
    scaler = {"scale": 65536.0, "growth_interval": 2000}
    whole = {"model": tensors, "optimizer": optimizer, "config": config, "scaler": scaler, "epoch": 3}
    torch.save(whole, tmp_path / "x.pth")
    assert_holds(tmp_path / "x.pth", tensors)


def test_an_omegaconf_configuration_beside_the_weights_does_no_harm(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    config = OmegaConf.create({"model": {"arch": "x", "sizes": [1, 2.5, None]}, "run": {"o": "${model.arch}"}})
    torch.save({"model": tensors, "config": config}, tmp_path / "x.pth")
    assert_holds(tmp_path / "x.pth", tensors)


def test_a_file_of_torch_before_1_6_is_read(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save({"model": tensors}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert_holds(tmp_path / "x.pth", tensors)


def test_a_safetensors_file_is_read(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    assert_holds(tmp_path / "x.safetensors", tensors)


def write_shards(folder: Path, tensors: dict[str, Tensor], suffix: str, save: Callable[..., None]) -> None:
    index, stem = {}, "model" if suffix == "safetensors" else "pytorch_model"
    for number, (name, tensor) in enumerate(tensors.items()):
        index[name] = f"{stem}-{number}.{suffix}"
        save({name: tensor}, folder / index[name])
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize(("suffix", "save"), [("safetensors", save_file), ("bin", torch.save)])
def test_a_folder_of_shards_is_read(
    tmp_path: Path, tensors: dict[str, Tensor], suffix: str, save: Callable[..., None]
) -> None:
    write_shards(tmp_path, tensors, suffix, save)
    assert_holds(tmp_path, tensors)
    assert open_weights(tmp_path).file_of("a.bias").name.endswith(f"-1.{suffix}")


def test_missing_shards_are_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_shards(tmp_path, tensors, "bin", torch.save)
    (tmp_path / "pytorch_model-1.bin").unlink()
    with pytest.raises(CheckpointError, match=r"1 of the 3 files .* are missing: pytorch_model-1\.bin"):
        open_weights(tmp_path)


def test_a_shard_that_lacks_what_the_index_promises_is_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_shards(tmp_path, tensors, "bin", torch.save)
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model-0.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model-0\.bin: a\.weight is not in it"):
        open_weights(tmp_path)["a.weight"]


def test_a_folder_without_weights_says_what_should_be_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin\.index\.json"):
        open_weights(tmp_path)


def test_a_tensor_is_a_copy_that_outlives_the_file(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    for path, save in ((tmp_path / "x.pth", torch.save), (tmp_path / "x.safetensors", save_file)):
        save(tensors, path)
        weights = open_weights(path)
        read = weights["a.weight"]
        path.write_bytes(bytes(path.stat().st_size))
        assert torch.equal(read, tensors["a.weight"])


def test_a_tensor_is_converted_while_it_is_read(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    read = open_weights(tmp_path / "x.safetensors").read("a.weight", torch.bfloat16)
    assert torch.equal(read, tensors["a.weight"].bfloat16())


@pytest.mark.parametrize(("suffix", "save"), [("safetensors", save_file), ("pth", torch.save)])
def test_pages_of_a_large_file_are_given_back_while_it_is_read(
    tmp_path: Path,
    tensors: dict[str, Tensor],
    suffix: str,
    save: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save(tensors, tmp_path / f"x.{suffix}")
    opened = []
    original = weight_files._map
    monkeypatch.setattr(weight_files, "_map", lambda path: opened.append(path) or original(path))
    monkeypatch.setattr(weight_files, "RELEASE_AFTER_BYTES", 40)
    weights = open_weights(tmp_path / f"x.{suffix}")
    assert all(torch.equal(weights[name], tensors[name]) for name in ("a.weight", "a.bias", "b"))
    assert len(opened) == 2  # once to see the header; 48 bytes for a.weight used that mapping up


class RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch was_here",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": tensors, "extra": RunsCode()}, "x.pth", _use_new_zipfile_serialization=zipped)
    sentence = r"x\.pth: refused, because opening it would run code \((posix|nt)\.system\)"
    with pytest.raises(CheckpointError, match=sentence):
        open_weights("x.pth")
    assert not Path("was_here").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_that_torch_did_not_write_is_refused_too(
    tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.pth").write_bytes(pickle.dumps(RunsCode(), protocol=protocol))
    with pytest.raises(CheckpointError, match="refused, because opening it would run code"):
        open_weights("x.pth")
    assert not Path("was_here").exists()


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_truncated_download_is_recognised(tmp_path: Path, form: str, keep: float) -> None:
    tensors = {f"w{number}": torch.randn(40, 40) for number in range(8)}
    path = tmp_path / ("x.safetensors" if form == "safetensors" else "x.pth")
    if form == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    sentence = "cut off after|not a file of weights, or a damaged one" if form == "legacy" else "cut off after"
    with pytest.raises(CheckpointError, match=rf"x\.\w+: ({sentence}).* download"):
        open_weights(path)


@pytest.mark.parametrize("name", ["x.pth", "x.bin", "x.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 278978745\n", "a git-LFS pointer"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "a web page, not weights"),
    ],
)
def test_what_is_no_file_of_weights_is_called_by_its_name(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: {sentence}"):
        open_weights(tmp_path / name)


def test_random_bytes_and_foreign_contents_are_refused(tmp_path: Path) -> None:
    (tmp_path / "noise.pth").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "noise.safetensors").write_bytes(bytes(range(256)) * 4)
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_bytes(b"root:x:0:0:root:/root:/bin/bash\n")
    for name in ("noise.pth", "text.pth", "noise.safetensors", "list.pth", "nothing.pth", "absent.pth"):
        with pytest.raises(CheckpointError, match=name):
            open_weights(tmp_path / name)
