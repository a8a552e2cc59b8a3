"""Ask Video-LLaMA about a video, an image or an audio file: `python demo_video.py --help`."""

from __future__ import annotations

import sys

from video_llama.cli.demo_video import main

if __name__ == "__main__":
    sys.exit(main())
