"""Checkpoints with random weights, in either layout: to try things out before the real one is there, and for tests.

The same size and seed give the same weights in both layouts. Files are written piece by piece: even `7b` never needs
more memory than its largest file.
"""

from __future__ import annotations

import io
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from video_llama.checkpoints.convert import (
    prepare_output_folder,
    write_original_folder,
    write_transformers_folder,
)
from video_llama.checkpoints.load import build_processor
from video_llama.checkpoints.weight_files import Weights
from video_llama.errors import CheckpointError
from video_llama.model.configuration import ImageBindTrunkConfig, VideoLlamaConfig
from video_llama.model.imagebind import AUDIO_LOGIT_SCALE
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.model.weight_names import to_saved_name
from video_llama.processor.tokenizer import load_tokenizer

STD = 0.02

_SMALL_QFORMER = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vision_config": {
            "image_size": 56,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
        },
        "qformer_config": {**_SMALL_QFORMER, "num_hidden_layers": 2},
        "video_qformer_config": _SMALL_QFORMER,
        "audio_qformer_config": _SMALL_QFORMER,
        "audio_config": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "output_size": 64,
        },
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 4096,
        },
    },
    # Published widths, fewer layers: 0.5 billion parameters.
    "small": {
        "vision_config": {"num_hidden_layers": 4},
        "text_config": {
            "vocab_size": 32000,
            "hidden_size": 1024,
            "intermediate_size": 2752,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "max_position_embeddings": 4096,
        },
    },
    "7b": {"text_config": {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}},
}
# It serves to train the audio branch on images; the large sizes have the published one.
TINY_IMAGEBIND_VISION = {
    **SIZES["tiny"]["audio_config"],
    "modality": "vision",
    "input_size": (56, 56),
    "patch_size": 14,
    "stride": 14,
}
DTYPES = {"tiny": torch.float32, "small": torch.bfloat16, "7b": torch.bfloat16}

TOKENIZER_TEXT = """\
[INST] <<SYS>> You are able to understand the visual content that the user provides. <</SYS>> [/INST]
###Human: What is in this video? ###Assistant: The video shows a person who is talking in front of a camera.
USER: Please describe this image in detail. ASSISTANT: There is a ball that moves from left to right.
The video contains 8 frames sampled at 0.0, 1.1, 2.3, 3.4, 4.6, 5.7, 6.9, 8.0 seconds.
Give the following image: ImageContent. You will be able to see the image once I provide it to you.
Close your eyes, open your ears and you imagine only based on the sound that: what do you hear?
The sound of a dog, a car, a bird, music and people who speak can be heard in the background of the scene.
A man and a woman walk along the street with two children; the sky is blue and the sun shines on the trees.
How many people are there? Who is the person in the picture? Where are they going, and why? When does it end?
"""
TOKENIZER_SIZE = 512


class RandomWeights(Weights):
    """The weights of a model, drawn when they are read; every name has its own seed.

    Args:
        config: of the model; only its shapes are built.
        dtype: of all numbers.
        seed: of the whole.
    """

    def __init__(self, config: VideoLlamaConfig, dtype: torch.dtype, seed: int) -> None:
        with torch.device("meta"):
            model = VideoLlamaForConditionalGeneration(config).to(dtype)
        super().__init__(Path("random"), {to_saved_name(name): value for name, value in model.state_dict().items()})
        self._seed = seed

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        header = self.header(name)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        values = torch.empty(header.shape).normal_(std=STD, generator=generator)
        if header.ndim == 0:  # ImageBind's logit scale is fixed
            values = torch.tensor(AUDIO_LOGIT_SCALE).log()
        elif header.ndim == 1 and name.endswith("weight"):  # a norm's
            values += 1
        return values.to(dtype or header.dtype)


def train_tokenizer(folder: Path) -> None:
    """Write a small LLaMA-like `tokenizer.model`: SentencePiece BPE in which bytes stand for unknown characters."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TOKENIZER_TEXT.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=TOKENIZER_SIZE,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def write_language_model_files(folder: Path, size: str, tokenizer: Path | None) -> VideoLlamaConfig:
    """Configuration and tokenizer of the language model; returns the configuration of the whole."""
    if tokenizer is None:
        train_tokenizer(folder)
    else:
        _copy_tokenizer(tokenizer, folder)
    loaded = load_tokenizer(folder)
    ids = {name: getattr(loaded, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text_config = {"model_type": "llama", "vocab_size": len(loaded), **SIZES[size]["text_config"], **ids}
    text_config["vocab_size"] = max(text_config["vocab_size"], len(loaded))
    config = VideoLlamaConfig(**{**SIZES[size], "text_config": text_config})
    config.text_config.dtype = DTYPES[size]
    config.text_config.architectures = ["LlamaForCausalLM"]
    config.text_config.save_pretrained(folder)
    GenerationConfig.from_model_config(config.text_config).save_pretrained(folder)
    return config


def _copy_tokenizer(source: Path, folder: Path) -> None:
    if source.is_file():
        shutil.copyfile(source, folder / source.name)
        return
    files = [
        file for pattern in ("*token*", "vocab.*", "merges.txt") for file in source.glob(pattern) if file.is_file()
    ]
    if not files:
        raise CheckpointError(
            f"{source}: no tokenizer in this folder; it should hold tokenizer.model or tokenizer.json"
        )
    for file in files:
        shutil.copyfile(file, folder / file.name)


def make_checkpoint(
    size: str,
    layout: str,
    output: Path,
    seed: int = 0,
    tokenizer: Path | None = None,
    imagebind_vision: bool = False,
) -> None:
    """Write a checkpoint.

    Args:
        size: one of `SIZES`.
        layout: "hf", or "original" for the files of the original project.
        output: a new or empty folder.
        seed: of the weights.
        tokenizer: folder or file of the tokenizer; a small one is trained by default.
        imagebind_vision: with ImageBind's vision trunk.

    Raises:
        CheckpointError: the output folder is not empty, or the tokenizer cannot be used.
    """
    folder = prepare_output_folder(output)
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch)
        config = write_language_model_files(files, size, tokenizer)
        if imagebind_vision:
            vision = ImageBindTrunkConfig(**TINY_IMAGEBIND_VISION)
            config.imagebind_vision_config = vision if size == "tiny" else ImageBindTrunkConfig.vision_huge()
        weights = RandomWeights(config, DTYPES[size], seed)
        num_bytes = sum(weights.header(name).nbytes for name in weights)
        with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="writing", disable=size == "tiny") as bar:
            common: dict[str, Any] = {"language_model_files": files, "max_shard_size": "2GB", "advance": bar.update}
            if layout == "hf":
                processor = build_processor(config, files, conv_template="llama_2")
                write_transformers_folder(weights, config, processor, folder, **common)
            else:
                write_original_folder(weights, config, folder, name=f"random_{size}", **common)
