"""Print what each precision of a configuration needs, counted from its parameters; nothing is loaded.

python scripts/estimate_memory.py 7b
python scripts/estimate_memory.py path/to/folder --num-frames 32
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.memory import estimate_memory

SIZES: dict[str, dict[str, Any]] = {
    "7b": {},
    "13b": {
        "model_type": "llama",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "max_position_embeddings": 4096,
    },
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"bytes_per_value": 4},
    "half (bfloat16, float16)": {},
    "half, language model 8 bit": {"language_model_bits": 8},
    "half, language model 4 bit": {"language_model_bits": 4},
}
GIB = 2**30


def read_config(source: str, use_audio: bool) -> VideoLlamaConfig:
    """A published size by name, or the configuration of a saved folder."""
    if source.lower() in SIZES:
        return VideoLlamaConfig(text_config=SIZES[source.lower()] or None, use_audio=use_audio)
    try:
        model_type = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError):
        model_type = None
    if model_type != VideoLlamaConfig.model_type:
        raise SystemExit(
            f"error: {source}: neither one of {', '.join(SIZES)} nor a folder with a Video-LLaMA's config.json"
        )
    config = VideoLlamaConfig.from_pretrained(source)
    config.use_audio = config.use_audio and use_audio
    return config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("config", help="7b, 13b, or a folder written by save_pretrained")
    parser.add_argument("--num-frames", type=int, default=8, help="frames of each video")
    parser.add_argument("--context-length", type=int, default=1024, help="tokens of prompt and answer together")
    parser.add_argument("--batch-size", type=int, default=1, help="prompts at a time")
    parser.add_argument("--no-audio", action="store_true", help="without the audio branch")
    arguments = parser.parse_args()
    config = read_config(arguments.config, use_audio=not arguments.no_audio)
    print("| precision | language model | vision | audio | KV cache | activations | together |")
    print("|---|---|---|---|---|---|---|")
    for name, precision in PRECISIONS.items():
        estimate = estimate_memory(
            config,
            num_frames=arguments.num_frames,
            context_length=arguments.context_length,
            batch_size=arguments.batch_size,
            **precision,
        )
        parts = (estimate.language_model, estimate.vision, estimate.audio, estimate.kv_cache, estimate.activations)
        cells = [f"{part / GIB:.2f}" for part in (*parts, estimate.total)]
        print(f"| {name} | {' | '.join(cells)} GiB |")


if __name__ == "__main__":
    main()
