"""The command line of `train.py`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from video_llama.config import load_config
from video_llama.errors import VideoLlamaError

__all__ = ["main"]

logger = logging.getLogger(__name__)

EXAMPLES = """
examples:
  python train.py --cfg-path configs/train/visionbranch_stage1_pretrain.yaml
  torchrun --nproc_per_node=8 train.py --cfg-path configs/train/visionbranch_stage2_finetune.yaml \\
      --options model.llama_model=checkpoints/llama-2-7b-chat-hf run.batch_size_train=8
  python train.py --cfg-path my.yaml --options run.resume_ckpt_path=auto     # go on after a stop
"""


_OUT_OF_MEMORY = (
    "the GPU's memory is full. Lower run.batch_size_train (and raise run.accum_grad_iters) or run.batch_size_eval, set "
    "model.use_grad_checkpoint: True, cache the encoders' features (features.dir), or load the language model in 8 or "
    "4 bit (model.load_in_8bit, model.load_in_4bit); scripts/estimate_memory.py says what a configuration needs"
)


def build_parser() -> argparse.ArgumentParser:
    """The options of `train.py`."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train the small parts of Video-LLaMA: stage 1 on captions, stage 2 on dialogues.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a training; 0 at its end or after a SIGTERM, 1 with one line on what is wrong, 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("video_llama.training").setLevel(logging.INFO)
    logging.getLogger("video_llama.data").setLevel(logging.INFO)
    try:
        overrides = [*options.options, *(["run.resume_ckpt_path=auto"] if options.resume else [])]
        config = load_config(options.cfg_path, overrides)

        from video_llama.training.trainer import (
            Trainer,
        )  # after the configuration is known to be right: it takes seconds

        trainer = Trainer(config, for_features=options.cache_features)
        if options.cache_features:
            logger.info("features of %d items computed, %d samples cannot be used", *trainer.cache_features())
        elif config.run.evaluate:
            trainer.evaluate()
        else:
            trainer.train()
    except (VideoLlamaError, OSError) as error:  # what the system refuses, such as room on the disk
        logger.debug("where it happened", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        return 1
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        logger.debug("where it happened", exc_info=True)
        reason = str(error).partition("\n")[0]
        sys.stderr.write(f"error: {_OUT_OF_MEMORY} ({reason})\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; --resume goes on from the newest checkpoint (a SIGTERM would have saved one)\n")
        return 130
    return 0


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch  # it is imported by then, if anything can have taken its memory

    return isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in str(error)
