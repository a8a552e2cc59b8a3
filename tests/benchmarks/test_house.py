"""The limits that keep the package readable, and the measures themselves on source that is made for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import house

SOURCE = '''"""A module."""

# Why it is so.
def typed(number: int) -> int:
    return 1 if number else 2  # a comment behind a statement is no comment line


def untyped(number):
    return number
'''


def test_source_is_counted_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(SOURCE)
    source = house.measure_source(tmp_path)
    assert (source.lines, source.comments, source.conditionals) == (9, 1, 1)
    assert (source.signatures, source.typed) == (2, 1)
    assert source.longest_file == (9, "module.py")
    assert source.longest_function == (2, "module.py:untyped")


def test_only_calls_of_the_package_are_counted() -> None:
    from video_llama.media.sampling import frame_window

    with house.counted_calls() as calls:
        frame_window([0.0, 0.2], 0.4, None, None)
        "".join(["other", "code"])
    assert calls.total == len(calls.functions) == len(calls.files) == 1


@pytest.mark.slow
def test_the_house_keeps_its_limits() -> None:
    figures = house.measure()
    assert figures.keys() == house.LIMITS.keys()
    assert [name for name, (value, _) in figures.items() if not house.is_kept(name, value)] == []
