"""Sampling options, stop strings, streamed text and the reused KV cache."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache
from transformers.generation import StoppingCriteriaList

from tests.helpers.tiny_model import prompt_ids
from video_llama.errors import VideoLlamaError
from video_llama.inference.cache import PrefixCache
from video_llama.inference.generation import (
    GenerationOptions,
    TextStream,
    cut_at_stop,
    stop_test,
    stream_text,
)
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration


def test_greedy_options_carry_no_sampling_setting() -> None:
    kwargs = GenerationOptions().to_generate_kwargs()
    assert kwargs["do_sample"] is False
    assert not {"temperature", "top_p", "length_penalty"} & kwargs.keys()


def test_a_temperature_samples_and_beams_take_a_length_penalty() -> None:
    kwargs = GenerationOptions(temperature=0.5, top_p=0.7, num_beams=3, length_penalty=2.0).to_generate_kwargs()
    assert (kwargs["do_sample"], kwargs["temperature"], kwargs["top_p"]) == (True, 0.5, 0.7)
    assert (kwargs["num_beams"], kwargs["length_penalty"]) == (3, 2.0)


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": 0}, {"num_beams": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}],
)
def test_options_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        GenerationOptions(**wrong)


def test_do_sample_says_what_the_temperature_says(caplog: pytest.LogCaptureFixture) -> None:
    assert GenerationOptions(do_sample=True) == GenerationOptions(temperature=1.0)
    assert GenerationOptions(do_sample=True, temperature=0.2) == GenerationOptions(temperature=0.2)
    assert GenerationOptions(do_sample=False) == GenerationOptions()
    assert caplog.messages == []
    assert GenerationOptions(do_sample=False, temperature=0.2) == GenerationOptions()
    assert caplog.messages == ["temperature=0.2 has no effect with do_sample=False: nothing is sampled"]


def test_changed_options_say_anew_whether_to_sample() -> None:
    warm = GenerationOptions(do_sample=True, top_k=7)
    assert warm.changed({"temperature": 0}).to_generate_kwargs()["do_sample"] is False
    assert warm.changed({"do_sample": None, "top_k": None, "max_new_tokens": 5}) == replace(warm, max_new_tokens=5)
    assert warm.to_generate_kwargs()["top_k"] == 7
    assert "top_k" not in GenerationOptions(temperature=0.5).to_generate_kwargs()
    with pytest.raises(ValueError, match="do_sample=True needs a temperature above 0"):
        GenerationOptions().changed({"do_sample": True, "temperature": 0.0})
    with pytest.raises(TypeError, match=r"no option 'temprature'; did you mean 'temperature'\? \(options: max_new_tok"):
        GenerationOptions().changed({"temprature": 0.5})


def test_bounds_of_prompt_and_answer_together_bound_the_answer() -> None:
    options = GenerationOptions(max_new_tokens=50)
    assert options.within(100, 120, None).max_new_tokens == 20
    assert options.within(100, 900, None) == options.within(100, None, 90) == options
    assert options.within(100, None, 110).min_new_tokens == 10
    with pytest.raises(VideoLlamaError, match="takes 100 tokens, so max_length=100 leaves none for an answer"):
        options.within(100, 100, None)


@pytest.mark.parametrize(
    ("text", "stops", "answer"),
    [
        (" A cat.###Human: next", ["###"], "A cat."),
        ("A cat. ", ["###"], "A cat."),
        ("a</s>b###c", ["###", "</s>"], "a"),
        ("no stops ", [], "no stops"),
    ],
)
def test_an_answer_ends_at_the_first_stop_string(text: str, stops: list[str], answer: str) -> None:
    assert cut_at_stop(text, stops) == answer


class CharacterTokenizer:
    """Decodes ids as code points of a byte string, as byte-fallback tokenizers do."""

    eos_token = "</s>"

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def streamed(text: str, stops: list[str]) -> list[str]:
    """The pieces a reader gets when the bytes of `text` come one token at a time."""
    stream = TextStream(CharacterTokenizer(), stops)  # type: ignore[arg-type]

    def run(stopping: StoppingCriteriaList) -> None:
        for byte in text.encode():
            stream.put(torch.tensor([byte]))
        stream.end()

    return list(stream_text(stream, run))


@pytest.mark.parametrize(
    "text",
    [
        "A cat.###Human: x",
        " A # b ## c\n##",
        "çok güzel 🎬 film \n ###",
        "###",
        "",
        "tail of spaces   ",
        "a ### b ### c",
    ],
)
def test_streamed_pieces_join_to_exactly_the_answer(text: str) -> None:
    pieces = streamed(text, ["###"])
    assert "".join(pieces) == cut_at_stop(text, ["###"])
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_streamed_answer_comes_in_pieces_not_at_the_end() -> None:
    assert len(streamed("one two three", ["###"])) > 5


def test_an_error_while_streaming_reaches_the_reader() -> None:
    def run(stopping: StoppingCriteriaList) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream_text(TextStream(CharacterTokenizer(), []), run))  # type: ignore[arg-type]


def test_closing_a_stream_stops_the_generation() -> None:
    stream, steps, go_on = TextStream(CharacterTokenizer(), []), [], threading.Event()  # type: ignore[arg-type]

    def run(stopping: StoppingCriteriaList) -> None:
        for _ in range(1000):
            stream.put(torch.tensor([97]))
            steps.append(1)
            if stopping(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1)).all():
                return
            go_on.wait(timeout=10)

    pieces = stream_text(stream, run)
    assert next(pieces) == "a"
    go_on.set()
    pieces.close()
    assert len(steps) < 1000
    assert not any(thread.name == "video-llama-generate" for thread in threading.enumerate())


@pytest.fixture
def embed(tiny_model: VideoLlamaForConditionalGeneration) -> Callable[[list[int]], torch.Tensor]:
    clip = torch.randn(1, 2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    features = tiny_model.get_video_features(clip).detach()
    return lambda ids: tiny_model.get_inputs_embeds(torch.tensor([ids]), features)


def answer(
    model: VideoLlamaForConditionalGeneration, embeds: torch.Tensor, states: DynamicCache | None = None
) -> list[int]:
    new = model.generate(
        inputs_embeds=embeds, past_key_values=states, max_new_tokens=6, eos_token_id=None, pad_token_id=0
    )
    return list(new[0].tolist())


def test_a_second_turn_reuses_the_cache_and_gives_the_tokens_of_a_fresh_start(
    tiny_model: VideoLlamaForConditionalGeneration, embed: Callable[[list[int]], torch.Tensor]
) -> None:
    cache = PrefixCache()
    first = prompt_ids(tiny_model.config, 1, 5, "video", 6, 7)
    states = cache.take(first)
    said = answer(tiny_model, embed(first), states)
    cache.put([*first, *said], states)
    assert len(cache.keys) == len(first) + len(said) - 1  # the last token was drawn but never read

    second = [*first, *said, 9, 10, 11]
    embeds = embed(second)
    fresh = answer(tiny_model, embeds)
    states = cache.take(second)
    assert states.get_seq_length() == len(first) + len(said) - 1
    poisoned = embeds.clone()
    poisoned[:, : states.get_seq_length()] = float("nan")  # proves that nothing cached is computed again
    assert answer(tiny_model, poisoned, states) == fresh


@pytest.mark.parametrize("change", ["edited", "shorter", "other"])
def test_a_prompt_that_differs_reuses_only_what_is_common(
    tiny_model: VideoLlamaForConditionalGeneration, embed: Callable[[list[int]], torch.Tensor], change: str
) -> None:
    first = prompt_ids(tiny_model.config, 1, 5, "video", 6, 7, 8, 9)
    changed = {"edited": [*first[:-2], 20, 21, 22], "shorter": first[:-2], "other": [2, *first[1:]]}[change]
    common = {"edited": len(first) - 2, "shorter": len(first) - 3, "other": 0}[change]
    cache = PrefixCache()
    states = cache.take(first)
    cache.put([*first, *answer(tiny_model, embed(first), states)], states)
    states = cache.take(changed)
    assert states.get_seq_length() == common
    assert answer(tiny_model, embed(changed), states) == answer(tiny_model, embed(changed))


def test_a_failed_answer_leaves_an_empty_cache() -> None:
    cache = PrefixCache()
    cache.put([1, 2], DynamicCache())
    cache.take([1, 2, 3])
    assert cache.keys == []
    assert cache.states is None


@pytest.mark.parametrize("wrong", [{"static_cache": True}, {"compile": True}])
def test_beams_with_a_cache_of_fixed_size_are_refused(wrong: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="set num_beams to 1"):
        GenerationOptions(num_beams=2, **wrong)


@pytest.mark.parametrize(
    ("text", "stops", "has_stopped"),
    [("A cat.###", ["###"], True), ("A cat.##", ["###"], False), ("###", ["</s>"], False), ("</s>", ["</s>"], False)],
)
def test_a_completed_stop_string_is_seen_unless_it_is_the_end_token(
    text: str, stops: list[str], has_stopped: bool
) -> None:
    assert stop_test(stops, CharacterTokenizer())(list(text.encode())) == has_stopped  # type: ignore[arg-type]
