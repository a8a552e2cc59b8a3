"""The published size on one machine: peak memory from the start of a process to its answer."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from benchmarks.benches.timing import Row, output_of
from examples.random_checkpoint import make_checkpoint
from video_llama.checkpoints.memory import estimate_memory
from video_llama.model.configuration import VideoLlamaConfig

CHECKPOINTS = {"tiny": "tiny", "full": "7b"}
NUM_TOKENS = 8
GIB_IN_MIB = 1024.0
LIMIT_OF_4_BIT = 8 * GIB_IN_MIB

ANSWER = """
import json, sys, time
from itertools import chain
import numpy as np, torch
from video_llama.prompt_parts import media_prefix
from video_llama.inference.load import load_pretrained_model
from video_llama.processor.media_processor import VideoFrames
path, bits, num_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(int(sys.argv[4]))
start = time.perf_counter()
model = load_pretrained_model(path, device="cpu", load_in_4bit=bits == "4", verbose=False)
loaded = time.perf_counter()
media, size = model.processor.media_processor, model.model.config.vision_config.image_size
random = np.random.default_rng(0)
frames = [media.process_image(random.integers(0, 255, (size, size, 3), dtype=np.uint8)).pixel_values for _ in range(8)]
sound = media.process_audio((random.normal(0, 0.1, 16 * 16_000).astype(np.float32), 16_000))
conversation = model.new_conversation()
conversation.ask("What is this?")
video = VideoFrames(torch.cat(frames), "video", [float(n) for n in range(8)], list(range(8)), "frames", None)
conversation = conversation.up_to_answer()
conversation.introduce(media_prefix([video], sound))
prompt = model.prepare(conversation, [model.encode(sound), model.encode(video)])
ids = model.model.generate(
    inputs_embeds=prompt.inputs_embeds, min_new_tokens=num_tokens, max_new_tokens=num_tokens, do_sample=False
)
weights = sum(tensor.nbytes for tensor in chain(model.model.parameters(), model.model.buffers()))
print(json.dumps({
    "weights": weights / 2**20, "tokens": ids.shape[-1], "prompt": len(prompt.keys),
    "load": loaded - start, "answer": time.perf_counter() - loaded,
}))
"""


def run(size: str, folder: Path, threads: int, checkpoint: Path | None = None) -> list[Row]:
    """Load random weights in half precision, and with the language model in 4 bit; answer a question about a clip.

    Args:
        size: "full" is the published 7B.
        folder: where the checkpoint is kept (16 GB).
        threads: of torch.
        checkpoint: one that is there already.
    """
    checkpoint = checkpoint or folder / f"random_{CHECKPOINTS[size]}_hf"
    if not checkpoint.exists():
        make_checkpoint(CHECKPOINTS[size], "hf", checkpoint)
    config = VideoLlamaConfig.from_pretrained(checkpoint)
    rows = []
    for name, bits in (("half precision", 16), ("language model in 4 bit", 4)):
        if bits == 4 and importlib.util.find_spec("bitsandbytes") is None:
            continue
        said, resident, peak = output_of(ANSWER, checkpoint, bits, NUM_TOKENS, threads)
        report: dict[str, Any] = json.loads(said)
        weights = report["weights"]
        estimate = estimate_memory(config, language_model_bits=4 if bits == 4 else None)
        limit = LIMIT_OF_4_BIT if bits == 4 else 1.15 * weights + GIB_IN_MIB
        limit_name = "8 GiB" if bits == 4 else "1.15 x weights + 1 GiB"
        note = (
            f"weights {weights:.0f} MiB; resident {resident:.0f} MiB; loaded in {report['load']:.0f} s, {NUM_TOKENS} "
            f"tokens after a prompt of {report['prompt']} in {report['answer']:.0f} s; estimated for a GPU: "
            f"{estimate.total / 2**30:.2f} GiB"
        )
        what = f"peak memory of loading and answering, {name}"
        agrees = report["tokens"] == NUM_TOKENS
        rows.append(Row("real-size", what, peak, limit, "MiB", limit_name, 1.0, agrees, note))
    return rows
