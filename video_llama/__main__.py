"""`python -m video_llama` is the command `video-llama`."""

from __future__ import annotations

import sys

from video_llama.cli import main

if __name__ == "__main__":
    sys.exit(main())
