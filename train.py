"""Train Video-LLaMA: the same as `video-llama train`."""

from __future__ import annotations

import sys

from video_llama.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
