"""The examples in the docstrings of public names run as they stand."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

import video_llama

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "name",
    ["Conversation", "VideoLlamaConfig", "VideoLlamaForConditionalGeneration", "VideoLlamaProcessor", "load_config"],
)
def test_the_example_of_a_public_name_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    public = getattr(video_llama, name)
    names = {each: getattr(video_llama, each) for each in video_llama.__all__}
    example = doctest.DocTestParser().get_doctest(public.__doc__, names, name, None, None)
    assert len(example.examples) >= 2
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example).failed == 0
