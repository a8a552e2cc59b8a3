"""Ask Video-LLaMA about a video, an image or a sound: `python demo_video.py --help`."""

from __future__ import annotations

import os
import sys

# A waiting OpenMP thread that spins makes token-by-token decoding several times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from video_llama.demo.terminal import main

if __name__ == "__main__":
    sys.exit(main())
