"""What a user would otherwise pick: transformers' InstructBLIP for videos, at our sizes and with random weights.

python -m benchmarks.benches.instructblip OURS_OR_PEER FOLDER DTYPE      loads, and says what that took
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from video_llama.model.configuration import VideoLlamaConfig

NUM_FRAMES = 8


def make_peer(config: VideoLlamaConfig, folder: Path, dtype: torch.dtype) -> Path:
    """Write InstructBLIP with the ViT, Q-Former and language model of our sizes; once."""
    from transformers import InstructBlipVideoConfig, InstructBlipVideoForConditionalGeneration

    if (folder / "config.json").exists():
        return folder
    vision, qformer, text = config.vision_config, config.qformer_config, config.text_config.to_dict()
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    peer = InstructBlipVideoConfig(
        vision_config={
            **{name: getattr(vision, name) for name in sizes},
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "initializer_range": 0.02,
        },
        qformer_config={name: getattr(qformer, name) for name in sizes},
        text_config={**text, "vocab_size": text["vocab_size"] + 1},  # its placeholder has an id of its own
        num_query_tokens=config.num_query_tokens,
        video_token_index=text["vocab_size"],
    )
    torch.manual_seed(0)
    InstructBlipVideoForConditionalGeneration(peer).to(dtype).save_pretrained(folder)
    return folder


def load_peer(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import InstructBlipVideoForConditionalGeneration

    return InstructBlipVideoForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()


def peer_inputs(peer: Any, pixels: Tensor, num_text_tokens: int) -> dict[str, Tensor]:
    """Frames, and a prompt of placeholders for them and of other tokens."""
    config = peer.config
    media = torch.full((1, config.num_query_tokens * pixels.shape[1]), config.video_token_index)
    text = torch.arange(3, 3 + num_text_tokens)[None] % config.text_config.vocab_size
    ids = torch.cat([media, text], dim=1)
    return {"pixel_values": pixels, "qformer_input_ids": text[:, :8], "input_ids": ids}


def main(arguments: list[str]) -> int:
    """Load one of the two in a process of its own."""
    from benchmarks.benches.growth_tasks import PeakMemory

    who, folder, dtype_name = arguments
    dtype = getattr(torch, dtype_name)
    if who == "ours":
        from video_llama.inference.load import load_pretrained_model as load
    else:
        from transformers import InstructBlipVideoForConditionalGeneration  # noqa: F401 - is not timed
    memory, start = PeakMemory(), time.perf_counter()
    if who == "ours":
        model: Any = load(folder, device="cpu", dtype=dtype, verbose=False).model
    else:
        model = load_peer(Path(folder), dtype)
    for weight in model.parameters():
        weight.sum()  # a mapped file is read when it is used
    seconds, added = time.perf_counter() - start, memory.added()
    size = sum(weight.nbytes for weight in model.parameters()) / 2**20
    print(json.dumps({"seconds": seconds, "mebibytes": added, "weights": size}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
