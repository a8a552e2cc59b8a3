#!/usr/bin/env python
"""Count memory: the same as `video-llama memory`."""

from __future__ import annotations

import sys
from pathlib import Path

# Also where the package is not installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

from video_llama.cli.memory import main

if __name__ == "__main__":
    sys.exit(main())
