"""What pyproject.toml, which holds all else, cannot say: the code in C."""

from __future__ import annotations

import hashlib
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent


def extensions() -> list[Extension]:
    """C that is called through ctypes and makes one thing faster; without a compiler for it all else is installed."""
    if sys.platform != "linux" or platform.machine() not in {"x86_64", "AMD64"}:
        return []
    sources = sorted((ROOT / "video_llama" / "model" / "native").glob("[!.]*.[ch]"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    instructions = ["avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16", "amx-tile", "amx-bf16"]
    extension = Extension(
        "video_llama.model._eva_block",
        ["video_llama/model/native/eva_block.c"],
        depends=[str(path.relative_to(ROOT)) for path in sources],
        define_macros=[("EVA_BLOCK_SOURCE", f'"{digest}"')],
        # The code runs only where the CPU has these instructions, whatever the compiling one has.
        extra_compile_args=["-O3", "-std=gnu11", "-pthread", *(f"-m{name}" for name in instructions)],
        extra_link_args=["-pthread"],
        libraries=["m"],
        optional=True,
    )
    return [extension]


setup(ext_modules=extensions())
