#!/usr/bin/env python
"""Check the datasets of a configuration: the same as `video-llama check-data`."""

from __future__ import annotations

import sys
from pathlib import Path

# Also where the package is not installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

from video_llama.cli.check_data import main

if __name__ == "__main__":
    sys.exit(main())
