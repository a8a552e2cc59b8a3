"""The command `video-llama train`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from video_llama.cli.command import CommandParser, report_error, run_command
from video_llama.config import load_config

__all__ = ["main"]

logger = logging.getLogger(__name__)

EXAMPLES = """
examples:
  video-llama train --cfg-path configs/train/visionbranch_stage1_pretrain.yaml
  torchrun --nproc_per_node=8 -m video_llama train --cfg-path configs/train/visionbranch_stage2_finetune.yaml \\
      --options model.llama_model=checkpoints/llama-2-7b-chat-hf run.batch_size_train=8
  video-llama train --cfg-path my.yaml --options run.resume_ckpt_path=auto     # go on after a stop
"""
_OUT_OF_MEMORY = (
    "the GPU's memory is full. Lower run.batch_size_train (and raise run.accum_grad_iters) or run.batch_size_eval, set "
    "model.use_grad_checkpoint: True, cache the encoders' features (features.dir), or load the language model in 8 or "
    "4 bit (model.load_in_8bit, model.load_in_4bit); `video-llama memory` says what a configuration needs"
)
_PROCESS_LOST = (
    "another process of this run ended or does not answer; what it printed last says why. --resume continues from the "
    "newest checkpoint"
)


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the options."""
    description = "Train the small parts of Video-LLaMA: stage 1 on captions, stage 2 on dialogues."
    parser = CommandParser(prog=prog, description=description, epilog=EXAMPLES)
    parser.add_argument("--cfg-path", "--config", required=True, metavar="FILE", help="a YAML of configs/train")
    parser.add_argument(
        "--options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override keys of the YAML"
    )
    parser.add_argument("--resume", action="store_true", help="short for --options run.resume_ckpt_path=auto")
    parser.add_argument(
        "--cache-features", action="store_true", help="only fill the cache of features.dir, for the training to come"
    )
    parser.add_argument("--verbose", action="store_true", help="log what is loaded, part by part")
    return parser


def run(options: argparse.Namespace) -> int:
    """Run a training; return 0 at its end or after a SIGTERM."""
    for name in ("training", "data"):
        logging.getLogger(f"video_llama.{name}").setLevel(logging.INFO)
    if options.resume:
        options.options.append("run.resume_ckpt_path=auto")
    try:
        config = load_config(options.cfg_path, options.options)
        # The trainer takes seconds to import: mistakes in the configuration are reported before.
        from video_llama.training.trainer import Trainer

        trainer = Trainer(config, for_features=options.cache_features)
        if options.cache_features:
            logger.info("features of %d items computed, %d samples cannot be used", *trainer.cache_features())
        elif config.run.evaluate:
            trainer.evaluate()
        else:
            trainer.train()
    except RuntimeError as error:
        return report_error(_explain(error))
    return 0


def _explain(error: RuntimeError) -> str:
    """Return in words what devices and other processes did; what else there is are errors of the program."""
    from video_llama.training.processes import is_of_other_process

    first_line = str(error).partition("\n")[0]
    # torch.OutOfMemoryError, or the driver's own words.
    if "out of memory" in str(error):
        return f"{_OUT_OF_MEMORY} ({first_line})"
    if is_of_other_process(error):
        return f"{_PROCESS_LOST} ({first_line})"
    raise error


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status."""
    interrupted = "interrupted; --resume continues from the newest checkpoint (a SIGTERM would have saved one)"
    return run_command(run, build_parser(prog).parse_args(argv), interrupted)
