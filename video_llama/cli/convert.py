"""The command `video-llama convert`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from video_llama.cli.command import CommandParser, run_command
from video_llama.cli.models import show_model
from video_llama.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from video_llama.checkpoints.weight_files import Weights

__all__ = ["main"]

DESCRIPTION = """\
Turn the published files into one folder for transformers, or such a folder back into the original's files.

    video-llama convert CHECKPOINTS OUTPUT
    video-llama convert --to original MODEL OUTPUT
    video-llama convert --merge RUN OUTPUT
    video-llama convert --language-model-only MODEL OUTPUT

CHECKPOINTS is the folder (or hub id) with VL_*.pth, AL_*.pth, imagebind_huge.pth and the language model. The
result loads faster, needs no other file and no network, and runs no pickle. Memory stays near one shard.

With --merge, RUN is the output folder of a training run with adapters (lora), or an adapter's folder with --model-base;
the adapter is added to the weights, for which the whole model is in memory in float32; --dtype sets what is written.

With --language-model-only, MODEL is a folder for transformers; its language model is written alone, for programs that
know only that (vLLM, transformers).
"""
DTYPES = ("keep", "float32", "bfloat16", "float16")


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = CommandParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("source", help="folder, hub id, or path of a VL_*.pth")
    parser.add_argument("output", type=Path, help="a new or empty folder")
    parser.add_argument("--to", choices=["transformers", "original"], default="transformers", help="layout to write")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="convert the weights (default: keep)")
    largest = "largest file, and memory (default: 5GB)"
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help=largest)
    name = "with --to original: VL_NAME.pth, AL_NAME.pth (default: the output folder's name)"
    parser.add_argument("--name", help=name)
    parser.add_argument("--merge", action="store_true", help="add a trained adapter to the weights")
    alone = "write the language model of a folder for transformers, without the branches"
    parser.add_argument("--language-model-only", action="store_true", help=alone)
    parser.add_argument("--model-base", metavar="MODEL", help="with --merge: what the adapter was trained on")
    files = parser.add_argument_group("files in other folders")
    files.add_argument("--llama-model", metavar="FOLDER", help="language model: folder or hub id")
    files.add_argument("--vit-ckpt", metavar="FILE", help="eva_vit_g.pth: path or address")
    files.add_argument("--q-former-model", metavar="FILE", help="blip2_pretrained_flant5xxl.pth: path or address")
    files.add_argument("--imagebind-ckpt-path", metavar="FILE", help="imagebind_huge.pth, or its folder")
    parts = parser.add_argument_group("what to convert")
    parts.add_argument("--no-audio", action="store_true", help="leave the audio branch out")
    parts.add_argument(
        "--imagebind-vision",
        action="store_true",
        help="ImageBind's vision trunk too (to train the audio branch on images)",
    )
    parts.add_argument("--conv-template", metavar="NAME", help="conversation template (default: the model's own)")
    return parser


def to_transformers(arguments: argparse.Namespace) -> None:
    """Convert published files to a folder for transformers."""
    from video_llama.checkpoints.convert import open_original, prepare_output_folder, write_transformers_folder
    from video_llama.checkpoints.hub import local_path
    from video_llama.checkpoints.load import build_processor, original_config
    from video_llama.checkpoints.model_card import write_model_card
    from video_llama.checkpoints.original_layout import find_original_files, is_transformers_folder
    from video_llama.model.configuration import ImageBindTrunkConfig

    if is_transformers_folder(local_path(arguments.source)):
        raise CheckpointError(f"{arguments.source}: a folder for transformers already; --to original turns it back")
    files = find_original_files(
        arguments.source,
        audio=False if arguments.no_audio else None,
        language_model=arguments.llama_model,
        vision_encoder=arguments.vit_ckpt,
        qformer=arguments.q_former_model,
        imagebind=arguments.imagebind_ckpt_path,
    )
    config = original_config(files)
    if arguments.imagebind_vision and config.imagebind_vision_config is None:
        config = original_config(files, imagebind_vision_config=ImageBindTrunkConfig.vision_huge())
    weights = open_original(files, config)
    processor = build_processor(config, files.language_model, arguments.conv_template)
    folder, dtype = prepare_output_folder(arguments.output), _torch_dtype(arguments.dtype)
    with _progress(weights, dtype) as bar:
        write_transformers_folder(
            weights,
            config,
            processor,
            folder,
            language_model_files=files.language_model,
            dtype=dtype,
            max_shard_size=arguments.max_shard_size,
            advance=bar.update,
        )
    write_model_card(folder, config, arguments.source, folder.resolve().name)


def to_original(arguments: argparse.Namespace) -> None:
    """Convert a folder for transformers to the original's files."""
    from video_llama.checkpoints.convert import (
        language_model_files,
        open_transformers_folder,
        prepare_output_folder,
        write_original_folder,
    )
    from video_llama.checkpoints.original_layout import is_transformers_folder, resolve_checkpoint
    from video_llama.checkpoints.saved_folder import read_saved_config

    source = resolve_checkpoint(arguments.source)
    if not is_transformers_folder(source):
        raise CheckpointError(f"{source}: not a Video-LLaMA written by save_pretrained or by this script")
    config, weights = read_saved_config(source), open_transformers_folder(source)
    folder, dtype = prepare_output_folder(arguments.output), _torch_dtype(arguments.dtype)
    with _progress(weights, dtype) as bar, tempfile.TemporaryDirectory() as scratch:
        write_original_folder(
            weights,
            config,
            folder,
            language_model_files=language_model_files(source, config, Path(scratch)),
            name=arguments.name or folder.resolve().name,
            dtype=dtype,
            max_shard_size=arguments.max_shard_size,
            advance=bar.update,
        )


def to_language_model(arguments: argparse.Namespace) -> None:
    """Write the language model of a folder for transformers alone."""
    from video_llama.checkpoints.convert import open_transformers_folder, prepare_output_folder, write_language_model
    from video_llama.checkpoints.original_layout import is_transformers_folder, resolve_checkpoint
    from video_llama.checkpoints.saved_folder import read_saved_config
    from video_llama.processor.tokenizer import load_tokenizer

    source = resolve_checkpoint(arguments.source)
    if not is_transformers_folder(source):
        hint = "files of the original layout have their language model in a folder of its own already"
        raise CheckpointError(f"{source}: not a Video-LLaMA written by save_pretrained or by this script; {hint}")
    config, weights = read_saved_config(source), open_transformers_folder(source)
    tokenizer = load_tokenizer(source)
    folder, dtype = prepare_output_folder(arguments.output), _torch_dtype(arguments.dtype)
    with _progress(weights, dtype, "language_model.") as bar:
        write_language_model(
            weights,
            config,
            tokenizer,
            folder,
            dtype=dtype,
            max_shard_size=arguments.max_shard_size,
            advance=bar.update,
        )


def to_merged(arguments: argparse.Namespace) -> None:
    """Write a model with its adapter added to the weights as a folder for transformers."""
    import torch

    from video_llama.checkpoints.convert import prepare_output_folder
    from video_llama.inference.load import load_pretrained_model

    # Sums are taken in float32, and rounded once if another precision is asked for.
    model = load_pretrained_model(
        arguments.source,
        arguments.model_base,
        arguments.conv_template,
        device="cpu",
        dtype="float32",
        audio=False if arguments.no_audio else None,
        merge_adapter=True,
    )
    show_model(model)
    folder, dtype = prepare_output_folder(arguments.output), _torch_dtype(arguments.dtype)
    model.model.to(dtype or torch.float32)
    model.save_pretrained(folder, max_shard_size=arguments.max_shard_size)


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse options that would have no effect with what is converted.

    Raises:
        CheckpointError: there is one.
    """
    if arguments.model_base and not arguments.merge:
        raise CheckpointError("--model-base belongs to --merge; --llama-model names the language model")
    if arguments.merge and arguments.language_model_only:
        raise CheckpointError("--merge writes the whole model first; then take --language-model-only of its folder")
    if not arguments.merge and not arguments.language_model_only:
        return
    mode = "--merge" if arguments.merge else "--language-model-only"
    if arguments.to == "original":
        raise CheckpointError(f"{mode} writes a folder for transformers; --to original turns that into files")
    # The run's configuration, --model-base or the folder says where everything is.
    names = ["llama_model", "vit_ckpt", "q_former_model", "imagebind_ckpt_path", "imagebind_vision", "name"]
    if arguments.language_model_only:
        names += ["no_audio", "conv_template"]
    for name in names:
        if getattr(arguments, name):
            raise CheckpointError(f"--{name.replace('_', '-')} has no effect with {mode}")


def _torch_dtype(name: str) -> torch.dtype | None:
    """Return the precision of a name; None for `keep`."""
    import torch

    if name == "keep":
        return None
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _progress(weights: Weights, dtype: torch.dtype | None, prefix: str = "") -> Any:
    """Print size and precision of weights whose names begin with `prefix`, and return a bar over their bytes."""
    from video_llama.checkpoints.weight_files import converted_dtype
    from video_llama.inference.summary import in_words

    headers = {name: weights.header(name) for name in weights if name.startswith(prefix)}
    size, number, dtypes = 0, 0, set()
    for name, header in headers.items():
        written = converted_dtype(name, header, dtype)
        size += header.numel() * written.itemsize
        number += header.numel()
        dtypes.add(str(written).removeprefix("torch."))
    precisions = " and ".join(sorted(dtypes))
    sys.stderr.write(f"model: {in_words(number)} parameters, {precisions}, {size / 1e9:.2f} GB\n")
    return tqdm(total=size, unit="B", unit_scale=True, desc="writing")


def run(arguments: argparse.Namespace) -> int:
    """Convert as the options say."""
    convert: Callable[[argparse.Namespace], None] = to_transformers
    if arguments.merge:
        convert = to_merged
    elif arguments.language_model_only:
        convert = to_language_model
    elif arguments.to == "original":
        convert = to_original
    check_options(arguments)
    convert(arguments)
    # Late: it imports torch.
    from video_llama.checkpoints.integrity import write_checksums

    write_checksums(Path(arguments.output).expanduser())
    sys.stdout.write(f"written to {arguments.output}\n")
    return 0


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(run, build_parser(prog).parse_args(argv))
