"""The checkpoint scripts as commands: what they write, what they say, and one line for everything that is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from examples import random_checkpoint
from scripts import make_random_checkpoint
from tests.helpers.checkpoints import AL, VL, assert_equal_tensors, edit_tensors, load_checkpoint, read_tensors
from tests.helpers.tokenizers import build_chat_tokenizer
from video_llama.checkpoints import convert as converter
from video_llama.checkpoints.weight_files import open_weights
from video_llama.cli import convert as convert_checkpoint
from video_llama.cli import memory as estimate_memory
from video_llama.cli import memory_tables
from video_llama.inference.chat import Chat
from video_llama.inference.generation import GenerationOptions
from video_llama.model.precision import kept_dtype

SCRIPTS = Path(make_random_checkpoint.__file__).parent


def convert(*arguments: str | Path) -> int:
    return convert_checkpoint.main([str(argument) for argument in arguments])


def make(*arguments: str | Path) -> int:
    return make_random_checkpoint.main([str(argument) for argument in arguments])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on the error stream, progress bars left out."""
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


# All of them


HELP = {
    convert_checkpoint: [
        "Turn the published files into one folder", "source", "output", "--to {transformers,original}", "--dtype",
        "--max-shard-size", "--name", "--language-model-only",
        "--llama-model", "--vit-ckpt", "--q-former-model", "--imagebind-ckpt-path",
        "--no-audio", "--imagebind-vision", "--conv-template",
    ],
    make_random_checkpoint: [
        "Its answers mean nothing", "--size {tiny,small,7b}", "--layout {hf,original}", "--output", "--seed",
        "--tokenizer",
    ],
    estimate_memory: ["nothing is loaded", "--num-frames", "--context-length", "--batch-size", "--no-audio"],
}  # fmt: skip


@pytest.mark.parametrize("script", HELP, ids=lambda script: script.__name__)
def test_a_script_explains_itself(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        script.main()
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert [text for text in HELP[script] if text not in shown] == []


@pytest.mark.slow
def test_a_script_runs_from_anywhere_and_fails_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "convert_checkpoint.py"), "absent", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: absent: no such file or folder; it should be a folder with VL_*.pth")
    assert done.stderr.count("\n") == 1


# make_random_checkpoint.py


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_a_random_checkpoint_loads_and_answers(tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert make("--size", "tiny", "--layout", layout, "--output", tmp_path / "made") == 0
    assert capsys.readouterr().out == f"written to {tmp_path / 'made'}\n"
    chat = Chat(load_checkpoint(tmp_path / "made"), options=GenerationOptions(max_new_tokens=4))
    chat.ask("What is it?")
    assert chat.answer() is not None
    assert chat.model.has_audio
    assert chat.model.processor.conv_template == "llama_2"


def test_size_and_seed_decide_the_weights_and_the_layout_does_not(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    make("--output", tmp_path / "same")
    make("--output", tmp_path / "other", "--seed", "1")
    same, other = (read_tensors(tmp_path / name / "model.safetensors") for name in ("same", "other"))
    assert_equal_tensors(same, open_weights(checkpoints["hf"]))
    assert same.keys() == other.keys()
    name = "video_branch.video_query_tokens"
    assert not torch.equal(same[name], other[name])
    assert torch.equal(read_tensors(checkpoints["original"] / VL)["video_query_tokens"], same[name])


def test_random_weights_are_of_the_usual_size(checkpoints: dict[str, Path]) -> None:
    weights = open_weights(checkpoints["hf"])
    for name in weights:
        if name.endswith("log_logit_scale"):
            continue
        middle = 1.0 if name.endswith("weight") and weights[name].ndim == 1 else 0.0  # a norm scales by 1
        assert weights[name].mean().item() == pytest.approx(middle, abs=0.02), name
        assert weights[name].std().item() == pytest.approx(0.02, rel=0.5), name


@pytest.mark.parametrize(("size", "layers", "width"), [("small", 8, 1024), ("7b", 32, 4096)])
def test_larger_sizes_have_the_published_widths(tmp_path: Path, size: str, layers: int, width: int) -> None:
    config = random_checkpoint.write_language_model_files(tmp_path, size, None)
    weights = random_checkpoint.RandomWeights(config, torch.bfloat16, seed=0)
    assert config.text_config.num_hidden_layers == layers
    assert weights.header("language_model.lm_head.weight").shape == (32000, width)
    assert weights.header("video_branch.projection.weight").shape == (width, 768)
    assert weights.header("video_branch.vision_encoder.cls_token").shape == (1, 1, 1408)
    assert weights.read("video_branch.projection.bias").dtype == torch.bfloat16
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == width


def test_a_tokenizer_can_be_given(tmp_path: Path) -> None:
    tokenizer = build_chat_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert make("--output", tmp_path / "made", "--tokenizer", tmp_path / "tokenizer") == 0
    model = load_checkpoint(tmp_path / "made")
    assert model.processor.tokenizer("ÄÖ")["input_ids"] == tokenizer("ÄÖ")["input_ids"]
    assert model.model.config.text_config.vocab_size >= len(tokenizer)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert make("--output", tmp_path / "made", "--tokenizer", tmp_path / "empty") == 1
    assert f"{tmp_path / 'empty'}: no tokenizer in this folder" in one_line(capsys)


def test_a_random_checkpoint_overwrites_nothing(hf_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (hf_folder / "model.safetensors").read_bytes()
    assert make("--output", hf_folder, "--seed", "1") == 1
    assert one_line(capsys) == (
        f"error: {hf_folder}: exists already and is not empty; choose another folder or remove it"
    )
    assert (hf_folder / "model.safetensors").read_bytes() == before


# convert_checkpoint.py


@pytest.mark.parametrize("shards", [(), ("--max-shard-size", "300KB")])
def test_converting_there_and_back_keeps_every_bit(
    checkpoints: dict[str, Path], tmp_path: Path, shards: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoints["original"]
    assert convert(source, tmp_path / "hf", *shards) == 0
    assert convert("--to", "original", "--name", "random_tiny", tmp_path / "hf", tmp_path / "back", *shards) == 0
    assert capsys.readouterr().out == f"written to {tmp_path / 'hf'}\nwritten to {tmp_path / 'back'}\n"
    assert len(list((tmp_path / "hf").glob("model*.safetensors"))) == (1 if not shards else pytest.approx(10, abs=4))
    assert_equal_tensors(open_weights(tmp_path / "hf"), open_weights(checkpoints["hf"]))
    for path in source.glob("*.pth"):
        assert_equal_tensors(read_tensors(tmp_path / "back" / path.name), read_tensors(path))
    assert_equal_tensors(open_weights(tmp_path / "back/language_model"), open_weights(source / "language_model"))
    tokenizer = Path("language_model/tokenizer.model")
    assert (tmp_path / "back" / tokenizer).read_bytes() == (source / tokenizer).read_bytes()
    assert "# hf\n" in (tmp_path / "hf" / "README.md").read_text()


def test_the_trained_files_are_named_after_the_output_folder(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    assert convert("--to", "original", checkpoints["hf"], tmp_path / "mine") == 0
    assert {path.name for path in (tmp_path / "mine").glob("?L_*.pth")} == {"VL_mine.pth", "AL_mine.pth"}


def test_progress_counts_every_byte(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = []
    bar = convert_checkpoint.tqdm
    monkeypatch.setattr(convert_checkpoint, "tqdm", lambda **options: bars.append(bar(**options)) or bars[-1])
    convert("--dtype", "bfloat16", checkpoints["original"], tmp_path / "hf")
    convert("--to", "original", tmp_path / "hf", tmp_path / "back")
    weights = open_weights(checkpoints["hf"])
    assert [bar.n for bar in bars] == [bar.total for bar in bars]
    assert bars[0].n == sum(weights[name].numel() * kept_dtype(name, torch.bfloat16).itemsize for name in weights)


def test_options_of_the_conversion_count(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source, out = checkpoints["original"], tmp_path / "out"
    assert convert("--no-audio", "--conv-template", "v1", "--dtype", "float16", source, out) == 0
    weights = open_weights(out)
    assert not any(name.startswith("audio_branch") for name in weights)
    assert all(weights.header(name).dtype == kept_dtype(name, torch.float16) for name in weights)
    assert weights.header("video_branch.projection.weight").dtype == torch.float16
    assert json.loads((out / "processor_config.json").read_text())["conv_template"] == "v1"
    assert not load_checkpoint(out).has_audio


def test_files_that_lie_elsewhere_are_found(
    original_folder: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth", "imagebind_huge.pth", "language_model"):
        shutil.move(original_folder / name, elsewhere / name)
    code = convert(
        original_folder / VL, tmp_path / "out",
        "--llama-model", elsewhere / "language_model",
        "--vit-ckpt", elsewhere / "eva_vit_g.pth",
        "--q-former-model", elsewhere,
        "--imagebind-ckpt-path", elsewhere,
    )  # fmt: skip
    assert code == 0
    assert_equal_tensors(open_weights(tmp_path / "out"), open_weights(checkpoints["hf"]))


def test_the_output_folder_must_be_empty(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    for arguments in ((checkpoints["original"],), ("--to", "original", checkpoints["hf"])):
        assert convert(*arguments, tmp_path / "out") == 1
        assert "exists already and is not empty" in one_line(capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]


def test_what_cannot_be_converted_leaves_no_folder(
    original_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_tensors(original_folder / AL, lambda tensors: tensors.pop("audio_query_tokens"))
    assert convert(original_folder, tmp_path / "out") == 1
    assert "audio Q-Former and projection: 1 of 58 weights are missing (audio_query_tokens)" in one_line(capsys)
    assert convert("--to", "original", original_folder, tmp_path / "out") == 1
    assert "not a Video-LLaMA written by save_pretrained" in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_language_model_alone_is_one_of_transformers(
    checkpoints: dict[str, Path], tmp_path: Path, dtype: str | None
) -> None:
    options = [] if dtype is None else ["--dtype", dtype]
    assert convert("--language-model-only", *options, checkpoints["hf"], tmp_path / "alone") == 0
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "alone")
    assert alone.dtype == getattr(torch, dtype or "float32")
    whole = load_checkpoint(checkpoints["hf"])
    language_model = whole.model.language_model
    assert_equal_tensors(
        alone.state_dict(), {name: tensor.to(alone.dtype) for name, tensor in language_model.state_dict().items()}
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "alone")
    ids = tokenizer("What is in this video?", return_tensors="pt").input_ids
    assert ids.tolist() == [whole.processor.tokenizer("What is in this video?").input_ids]
    if dtype is None:
        assert torch.equal(alone(ids).logits, language_model(ids).logits)
    settings = json.loads((tmp_path / "alone" / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForCausalLM"]
    assert (tmp_path / "alone" / "SHA256SUMS").exists()


def test_the_language_model_alone_is_taken_of_a_folder_for_transformers(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert("--language-model-only", checkpoints["original"], tmp_path / "out") == 1
    assert "have their language model in a folder of its own already" in one_line(capsys)
    for option in ("--merge", "--no-audio", "--to=original", "--name=a", "--conv-template=v1"):
        assert convert("--language-model-only", option, checkpoints["hf"], tmp_path / "out") == 1
        assert "--language-model-only" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_vicunas_extra_token_is_told_before_the_tokenizer_complains(
    original_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (original_folder / "language_model" / "added_tokens.json").write_text('{"[PAD]": 512}')
    assert convert(original_folder, tmp_path / "out") == 1
    assert "Vicuna's first release has 32001 tokens" in one_line(capsys)


def test_a_full_disk_is_one_line(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(converter, "save_file", fail)
    assert convert(checkpoints["original"], tmp_path / "out") == 1
    assert "No space left on device" in one_line(capsys)
    assert list((tmp_path / "out").iterdir()) == []


# estimate_memory.py


def estimate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> dict[str, list[float]]:
    """The printed table: precision to figures in GiB, the last is the sum."""
    monkeypatch.setattr(sys, "argv", ["estimate_memory.py", *arguments])
    estimate_memory.main()
    table = {}
    for line in capsys.readouterr().out.splitlines()[2:]:
        *cells, unit = line.strip("| ").rsplit(" ", 1)  # the unit stands behind the last figure and is that of all
        name, *figures = cells[0].split(" | ")
        table[name.strip()] = [float(figure) * {"GiB": 1.0, "MiB": 2**-10}[unit] for figure in figures]
    return table


@pytest.mark.slow
def test_an_estimate_adds_up_and_follows_its_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = estimate(monkeypatch, capsys, "7b")
    assert list(table) == list(memory_tables.PRECISIONS)
    for *parts, total in table.values():
        assert sum(parts) == pytest.approx(total, abs=0.03)
    language_model, _vision, audio, cache, *_ = table["half (bfloat16, float16)"]
    assert language_model == pytest.approx(6_738_415_616 * 2 / 2**30, abs=0.01)
    assert table["float32"][0] == pytest.approx(2 * language_model, abs=0.01)
    arguments = ("7b", "--no-audio", "--context-length", "2048", "--batch-size", "2")
    changed = estimate(monkeypatch, capsys, *arguments)["half (bfloat16, float16)"]
    assert (audio > 0.1, changed[2]) == (True, 0)
    assert changed[3] == pytest.approx(4 * cache, abs=0.03)


def test_a_saved_folder_is_estimated_by_its_own_sizes(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = estimate(monkeypatch, capsys, str(checkpoints["hf"]))
    assert all(total < 0.1 for *_, total in table.values())


def test_what_is_neither_a_size_nor_a_folder_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate_memory.main(["70b"]) == 1
    assert one_line(capsys).startswith("error: 70b: neither one of 7b, 13b nor a folder")
