"""Train Video-LLaMA: torchrun --nproc_per_node=8 train.py --cfg-path configs/train/visionbranch_stage1_pretrain.yaml"""

from __future__ import annotations

import os
import sys

# A waiting OpenMP thread that spins slows its neighbours down; this must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from video_llama.training.command import main

if __name__ == "__main__":
    sys.exit(main())
