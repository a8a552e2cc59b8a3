"""Time training steps of both stages, with the frozen encoders run each time and with their outputs cached.

python benchmarks/bench_train.py                         # mid-size, 2 threads; a few minutes
python benchmarks/bench_train.py --size tiny --repeats 3 --threads 1

The mid-size model has the published widths: ViT of depth 4, both Q-Formers whole, a language model of width 1024
and depth 8. A batch is 4 samples of 8 frames, with 53 tokens in stage 1, the last 20 of them the caption, and 200 in
stage 2, of which 80 are answers: recorded dialogues of that length have 28 to 49 % (reference data, text_preprocess).
What is compared is timed in turns, so that a busy machine slows all alike; figures are medians, of the time on the
clock and of the time that the processors worked for it, which neighbours on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BATCH_SIZE, NUM_FRAMES = 4, 8
TEXT_LENGTHS = {"stage 1": 53, "stage 2": 200}
ANSWER_TOKENS = {"stage 1": 20, "stage 2": 80}
# Seconds of the original's step on a quiet machine of two AVX-512 cores, float32; None where nobody measured.
ORIGINAL_SECONDS = {"small": {"stage 1": 14.1, "stage 2": 17.7}}


def make_config(size: str, folder: Path) -> Any:
    """A configuration that trains the vision branch of a random model of that size on the CPU."""
    from examples.random_checkpoint import make_checkpoint
    from video_llama.config import Config

    checkpoint = folder / f"random_{size}"
    if not checkpoint.exists():
        make_checkpoint(size, "original", checkpoint)
    config = Config()
    config.model.llama_model = str(checkpoint / "language_model")
    config.model.vit_ckpt = str(checkpoint / "eva_vit_g.pth")
    config.model.q_former_model = str(checkpoint / "blip2_pretrained_flant5xxl.pth")
    config.model.equip_audio_branch = False
    config.model.frozen_video_Qformer = config.model.frozen_llama_proj = False
    config.run.device, config.run.amp = "cpu", False  # the frozen parts have the precision, what trains is float32
    return config


def build_trainer(size: str, folder: Path, dtype: str) -> Any:
    """A trainer without data."""
    from video_llama.training.trainer import Trainer

    config = make_config(size, folder)
    config.model.dtype = dtype
    config.run.output_dir = str(folder / f"run_{size}_{dtype}")
    return Trainer(config, datasets=[])


def make_batch(trainer: Any, stage: str, is_cached: bool) -> Any:
    """Random frames, or what the encoders make of them, and random text of the stage's length."""
    import torch

    from video_llama.data.batches import Batch
    from video_llama.data.sample_processor import MediaInput

    config = trainer.model.config
    num_media = config.num_video_query_tokens
    generator = torch.Generator().manual_seed(0)
    side = config.vision_config.image_size
    width = config.qformer_config.hidden_size
    shape = (NUM_FRAMES, config.num_query_tokens, width) if is_cached else (NUM_FRAMES, 3, side, side)
    media = [
        MediaInput("pixel_values", torch.randn(shape, generator=generator), is_encoded=is_cached)
        for _ in range(BATCH_SIZE)
    ]
    ids = torch.randint(3, config.text_config.vocab_size, (BATCH_SIZE, TEXT_LENGTHS[stage]), generator=generator)
    ids[:, 1 : 1 + num_media] = config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -ANSWER_TOKENS[stage] :] = ids[:, -ANSWER_TOKENS[stage] :]
    text = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    return Batch(0, text, media, [str(number) for number in range(BATCH_SIZE)])


def time_steps(
    size: str, dtypes: Sequence[str], repeats: int, folder: Path
) -> dict[str, dict[str, tuple[float, float]]]:
    """Median seconds of a step by precision and kind: on the clock, and of all processors."""
    steps: dict[tuple[str, str], Callable[[], object]] = {}
    for dtype in dtypes:
        trainer = build_trainer(size, folder, dtype)
        for stage in TEXT_LENGTHS:
            for is_cached in (False, True):
                batch = make_batch(trainer, stage, is_cached)
                name = f"{stage}, {'cached' if is_cached else 'encoded'}"
                steps[dtype, name] = lambda trainer=trainer, batch=batch: trainer.step([batch])
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in steps}
    for step in steps.values():
        step()  # the first one allocates
    for _ in range(repeats):
        for key, step in steps.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            step()
            seconds[key].append((time.perf_counter() - start, time.process_time() - start_cpu))
    result: dict[str, dict[str, tuple[float, float]]] = {dtype: {} for dtype in dtypes}
    for (dtype, name), values in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        result[dtype][name] = (wall, cpu)
    return result


def add_clips(config: Any, folder: Path) -> None:
    """Let a configuration train on generated clips with their captions; they are made if they are not there."""
    from examples.tiny_world.world.corpus import WorldSettings, make_corpus
    from video_llama.config import BuildInfo, DatasetConfig, ProcessorConfig, ProcessorSplits

    corpus = folder / "corpus"
    if not (corpus / "corpus.json").exists():
        make_corpus(corpus, WorldSettings(40, 1, 224, (100, 0, 0)))
    webvid = corpus / "train" / "webvid"
    config.datasets["webvid"] = DatasetConfig(
        build_info=BuildInfo(str(webvid / "annotations"), str(webvid / "videos")),
        vis_processor=ProcessorSplits(train=ProcessorConfig(n_frms=NUM_FRAMES)),
    )


def measure_encodings(folder: Path) -> dict[str, dict[str, float]]:
    """What the encodings of the cache do to features and loss of the small trained model that comes with the package.

    The error of features is the root of their mean square error, relative to that of the features; the change of the
    loss is relative to the loss with features in float32. Bytes are of the published model's clips.
    """
    import torch

    from video_llama.config import Config
    from video_llama.data.features import decode_features, encode_features
    from video_llama.inference.load import load_pretrained_model
    from video_llama.training.trainer import Trainer

    config = Config()
    config.model.equip_audio_branch = config.run.amp = False
    config.model.frozen_video_Qformer = config.model.frozen_llama_proj = False
    config.model.max_txt_len, config.model.end_sym = 64, "</s>"
    config.run.device, config.run.output_dir = "cpu", str(folder / "encodings")
    config.run.max_epoch, config.run.iters_per_epoch, config.run.batch_size_train = 1, 1, 40
    add_clips(config, folder)
    trainer = Trainer(config, model=load_pretrained_model("video-llama-tiny", device="cpu", half=False, audio=False))
    model, batch = trainer.model.eval(), trainer.batches()[0]
    result: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        features = [model.video_branch.encode_frames(item.values[None])[0] for item in batch.media]
        for encoding in ("float32", "bfloat16", "int8"):
            for item, values in zip(batch.media, features, strict=True):
                item.values, item.is_encoded = decode_features(encode_features(values, encoding)), True
            loss = float(model(**batch.model_inputs("cpu"), answers_only=True).loss)
            pairs = zip(batch.media, features, strict=True)
            errors = [((item.values - values).norm() / values.norm()).item() for item, values in pairs]
            published = encode_features(torch.ones(NUM_FRAMES, 32, 768), encoding)
            result[encoding] = {
                "bytes_per_clip": sum(tensor.nbytes for tensor in published.values()),
                "relative_error": statistics.mean(errors),
                "loss": loss,
                "relative_change_of_loss": loss / result["float32"]["loss"] - 1 if result else 0.0,
            }
    return result


def time_loading(size: str, folder: Path, num_workers: int) -> dict[str, float]:
    """Seconds to read a batch of clips from disk, alone and while the trainer trains."""
    from video_llama.training.trainer import Trainer

    with tempfile.TemporaryDirectory(dir=folder) as output:
        config = make_config(size, folder)
        add_clips(config, folder)
        run = config.run
        run.output_dir, run.num_workers = output, num_workers
        run.batch_size_train, run.max_epoch, run.iters_per_epoch, run.log_freq = BATCH_SIZE, 1, 6, 6
        trainer = Trainer(config)
        batches = trainer.batches()
        alone = []
        for number in range(len(batches)):
            start = time.perf_counter()
            batches[number]
            alone.append(time.perf_counter() - start)
        trainer.train()
        lines = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
        log = next(line for line in lines if line["event"] == "train")
    return {
        "seconds_per_batch_alone": statistics.median(alone),
        "seconds_waited_per_batch": log["data_seconds"] / run.iters_per_epoch,
        "seconds_per_step": log["seconds"] / run.iters_per_epoch,
    }


def print_steps(result: dict[str, dict[str, tuple[float, float]]], size: str) -> None:
    head = f"{'precision':10} {'step':20} {'s/step':>8} {'samples/s':>10} {'speed-up':>9} {'original':>9}"
    print(f"\n{head} {'cpu s':>8} {'speed-up':>9}")
    for dtype, rows in result.items():
        for name, (wall, cpu) in rows.items():
            stage, kind = name.split(", ")
            encoded = rows[f"{stage}, encoded"]
            gains = [f"{a / b:.1f}x" if kind == "cached" else "" for a, b in zip(encoded, (wall, cpu), strict=True)]
            theirs = ORIGINAL_SECONDS.get(size, {}).get(stage) if kind == "encoded" else None
            versus = f"{theirs:.1f} s" if theirs else ""
            speeds = f"{wall:8.3f} {BATCH_SIZE / wall:10.2f} {gains[0]:>9} {versus:>9} {cpu:8.3f} {gains[1]:>9}"
            print(f"{dtype:10} {name:20} {speeds}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "small"], default="small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "auto"], choices=["float32", "bfloat16", "auto"])
    parser.add_argument("--workers", type=int, default=1, help="data loader processes (1)")
    parser.add_argument(
        "--work", type=Path, default=Path("output/bench"), help="random weights and clips are kept here"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.path.insert(0, str(Path(__file__).parents[1]))

    import torch

    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    steps = time_steps(arguments.size, arguments.dtypes, arguments.repeats, arguments.work)
    print_steps(steps, arguments.size)
    encodings = measure_encodings(arguments.work)
    for encoding, row in encodings.items():
        print(
            f"features in {encoding}: {row['bytes_per_clip']:.0f} bytes per clip, relative error "
            f"{row['relative_error']:.2%}, change of the loss {row['relative_change_of_loss']:+.3%}"
        )
    loading = time_loading(arguments.size, arguments.work, arguments.workers)
    share = loading["seconds_waited_per_batch"] / loading["seconds_per_step"]
    print(
        f"\nreading a batch of {BATCH_SIZE} clips alone {loading['seconds_per_batch_alone']:.3f} s; "
        f"in training with {arguments.workers} worker(s) the step waits {loading['seconds_waited_per_batch']:.3f} s "
        f"of its {loading['seconds_per_step']:.3f} s ({share:.0%})"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of this process {peak:.2f} GiB; {arguments.threads} thread(s), torch {torch.__version__}")
    if arguments.json:
        content = {"steps": steps, "encodings": encodings, "loading": loading, "peak_gib": peak}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
