"""Train, be killed at random moments, go on, again and again: `python -m tests.training.kill_loop CONFIG KILLS SEED`.

Each attempt is a fork of this process, so that what takes long, the imports, is paid once.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

from video_llama.config import load_config
from video_llama.training.trainer import Trainer


def attempt(config_file: str) -> int:
    """Go on with the run in a child process; its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            Trainer(load_config(config_file, ["run.resume_ckpt_path=auto"])).train()
            code = 0
        finally:
            os._exit(code)
    return child


def main(config_file: str, num_kills: int, seed: int) -> None:
    rng = random.Random(seed)
    checkpoints = Path(load_config(config_file).run.output_dir) / "checkpoints"
    kills = 0
    while kills < num_kills:
        before = newest(checkpoints)
        child = attempt(config_file)
        # Some progress, so that the loop ends; then any moment: in a step, while a checkpoint is written, at its end.
        while newest(checkpoints) == before and not ended(child):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.12))
        if ended(child):
            sys.exit(f"the run ended after {kills} kills; it must be longer, or it failed")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    _, status = os.waitpid(attempt(config_file), 0)
    print(f"kills {kills}, killed within a write {len(list(checkpoints.glob('*.incomplete')))}")
    sys.exit(os.waitstatus_to_exitcode(status))


def newest(checkpoints: Path) -> str:
    names = [path.name for path in checkpoints.glob("step_*") if not path.name.endswith(".incomplete")]
    return max(names, default="")


def ended(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG) != (0, 0)
    except ChildProcessError:
        return True


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
