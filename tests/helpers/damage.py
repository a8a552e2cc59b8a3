"""Ways to damage media files."""

from __future__ import annotations

from pathlib import Path

import av


def damage_sound(path: Path) -> None:
    """Overwrite every sound packet, and nothing else."""
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(audio=0) if packet.size]
    content = bytearray(path.read_bytes())
    for position, size in packets:
        content[position : position + size] = b"\xff" * size
    path.write_bytes(content)


def replace_bytes(path: Path, old: bytes, new: bytes) -> Path:
    """Change bytes of a file in place; nothing moves."""
    content = path.read_bytes()
    assert old in content
    assert len(old) == len(new)
    path.write_bytes(content.replace(old, new))
    return path
