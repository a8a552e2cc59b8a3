"""A KV cache of fixed size gives the answers that transformers' `generate` gives, whoever shares the batch."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import needs_compiler
from tests.helpers.checkpoints import load_checkpoint
from video_llama.errors import OutOfMemoryError
from video_llama.inference.cache import PrefixCache
from video_llama.inference.completion import generate_text, stream_texts
from video_llama.inference.engine import Prompt, VideoLlama
from video_llama.inference.generation import GenerationOptions
from video_llama.inference.static_decoder import Request, StaticDecoder
from video_llama.inference.static_step import why_not_static


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> VideoLlama:
    """Random weights that are sure of the next token, so that rounding changes none."""
    model = load_checkpoint(tiny_checkpoint)
    with torch.no_grad():
        model.model.language_model.lm_head.weight *= 8
    return model


@pytest.fixture(scope="module")
def prompts(model: VideoLlama) -> list[Prompt]:
    """32 of mixed length."""
    generator = torch.Generator().manual_seed(0)
    table = model.model.get_input_embeddings().weight.detach()
    lengths = torch.randint(5, 90, (32,), generator=generator).tolist()
    rows = [torch.randint(3, 500, (length,), generator=generator) for length in lengths]
    return [Prompt(ids.tolist(), table[ids][None], ["</s>"]) for ids in rows]


def options(static: bool, **kwargs: Any) -> GenerationOptions:
    return GenerationOptions(max_new_tokens=20, static_cache=static, **kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"repetition_penalty": 1.3}, {"min_new_tokens": 15}], ids=str)
@pytest.mark.slow
def test_answers_are_those_of_generate_in_one_batch_one_by_one_and_in_turns(
    model: VideoLlama, prompts: list[Prompt], kwargs: dict[str, Any]
) -> None:
    expected = [model.complete(prompt, options(False, **kwargs)) for prompt in prompts]
    static = options(True, **kwargs)
    assert [model.complete(prompt, static) for prompt in prompts] == expected
    assert generate_text(model, prompts, static) == expected
    in_turns = dict(stream_texts(model, enumerate(prompts), static, 5))
    assert [in_turns[number] for number in range(32)] == expected
    assert len(set(expected)) > 25, "the answers must differ for this to say anything"


@needs_compiler
@pytest.mark.slow
def test_a_compiled_step_gives_the_same_answers_and_is_compiled_once_for_all_layers(
    model: VideoLlama, prompts: list[Prompt]
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    short = [prompt for prompt in prompts if len(prompt.keys) < 40][:4]
    compiled = GenerationOptions(max_new_tokens=8, static_cache=True, compile=True)
    expected = [model.complete(prompt, GenerationOptions(max_new_tokens=8, static_cache=False)) for prompt in short]
    assert generate_text(model, short, compiled) == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_an_answer_that_ends_gives_its_row_to_the_next_prompt(model: VideoLlama, prompts: list[Prompt]) -> None:
    taken: list[int] = []

    def requests() -> Any:
        for number, prompt in enumerate(prompts[:6]):
            taken.append(number)
            wanted = 12 if number == 0 else 2
            yield Request(prompt.inputs_embeds, has_ended=lambda ids, wanted=wanted: len(ids) == wanted)

    decoder = StaticDecoder(model.model.language_model, 2, 128)
    out = decoder.run(requests(), options(True, min_new_tokens=20))
    assert taken == []
    ended = [len(request.ids) for request in out]
    assert ended == [2, 2, 2, 2, 2, 12], "five short answers pass the long one by"


def test_a_row_is_not_changed_by_who_was_there_before(model: VideoLlama, prompts: list[Prompt]) -> None:
    decoder = StaticDecoder(model.model.language_model, 3, 128)
    alone = [next(decoder.run([Request(p.inputs_embeds)], options(True))).ids for p in prompts[:3]]
    with torch.inference_mode():
        decoder._step.states.fill_(50.0)
    again = [request.ids for request in decoder.run([Request(p.inputs_embeds) for p in prompts[:3]], options(True))]
    assert sorted(again) == sorted(alone)


def test_the_common_beginning_of_prompts_is_computed_once(
    model: VideoLlama, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = model.model.get_input_embeddings().weight.detach()
    rows = [[*range(50, 70), *prompt.keys] for prompt in prompts[:4]]
    begun = [Prompt(keys, table[torch.tensor(keys)][None], ["</s>"]) for keys in rows]
    expected = [model.complete(prompt, options(False)) for prompt in begun]
    read: list[tuple[int, int]] = []
    decoder = model.model.language_model.model
    forward = decoder.forward
    monkeypatch.setattr(
        decoder, "forward", lambda **kwargs: (read.append(kwargs["inputs_embeds"].shape[:2]), forward(**kwargs))[1]
    )
    model.decoders.kept = []
    longest = max(map(len, rows)) - 20
    assert generate_text(model, begun, options(True)) == expected
    assert read == [(1, 20), (4, longest)]
    assert generate_text(model, begun, options(True)) == expected
    assert read[2:] == [(4, longest)]


@pytest.mark.parametrize(
    "kwargs", [{}, {"top_p": 1.0}, {"top_k": 3}, {"top_k": 0, "top_p": 1.0}, {"repetition_penalty": 1.5}], ids=str
)
def test_samples_are_those_of_generate_from_the_same_seed(
    model: VideoLlama, prompts: list[Prompt], kwargs: dict[str, Any]
) -> None:
    drawn = {}
    for static in (False, True):
        torch.manual_seed(0)
        drawn[static] = model.complete(prompts[0], options(static, temperature=3.0, **kwargs))
    assert drawn[True] == drawn[False] != model.complete(prompts[0], options(False))


def test_a_second_turn_reuses_the_states_of_the_first(
    model: VideoLlama, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, static, table = PrefixCache(), options(True), model.model.get_input_embeddings().weight.detach()
    ids = model._run(prompts[0], static, cache)
    assert len(cache.keys) == len(prompts[0].keys) + len(ids) - 1
    keys = [*prompts[0].keys, *ids, 9, 10, 11]
    embeds = table[torch.tensor(keys)][None].clone()
    second = Prompt(keys, embeds, ["</s>"])
    expected = model._run(second, options(False), None)
    poisoned = Prompt(keys, embeds.clone(), ["</s>"])
    poisoned.inputs_embeds[:, : len(cache.keys)] = float("nan")  # nothing that is known is computed again
    assert model._run(poisoned, static, cache) == expected


def test_a_stop_string_ends_its_own_row(model: VideoLlama, prompts: list[Prompt]) -> None:
    answers = [model.complete(prompt, options(False)) for prompt in prompts[:3]]
    stop = answers[0][3:6]
    stopped = [Prompt(prompt.keys, prompt.inputs_embeds, [stop]) for prompt in prompts[:3]]
    expected = [model.complete(prompt, options(False)) for prompt in stopped]
    assert expected[0] == answers[0][: answers[0].index(stop)].strip()
    assert generate_text(model, stopped, options(True)) == expected


def test_a_stream_gives_the_same_text_in_pieces_and_can_be_closed(model: VideoLlama, prompts: list[Prompt]) -> None:
    expected = list(model.stream(prompts[1], options(False)))
    assert list(model.stream(prompts[1], options(True))) == expected
    assert len(expected) > 2
    stream = model.stream(prompts[1], options(True))
    next(stream)
    stream.close()
    assert list(model.stream(prompts[1], options(True))) == expected


def test_a_longer_prompt_gets_more_room(model: VideoLlama, prompts: list[Prompt]) -> None:
    table = model.model.get_input_embeddings().weight.detach()
    ids = torch.arange(3, 403)
    mixed = [prompts[0], Prompt(ids.tolist(), table[ids][None], ["</s>"]), prompts[2]]
    expected = [model.complete(prompt, options(False)) for prompt in mixed]
    answers = dict(stream_texts(model, enumerate(mixed), options(True), 1))
    assert [answers[number] for number in range(3)] == expected


def test_a_decoder_is_made_anew_when_the_weights_have_moved(model: VideoLlama, prompts: list[Prompt]) -> None:
    model.complete(prompts[0], options(True))
    [kept] = model.decoders.kept
    model.complete(prompts[0], options(True))
    assert model.decoders.kept == [kept]
    head = model.model.language_model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.complete(prompts[0], options(True))
    assert model.decoders.kept != [kept]


def test_a_prompt_without_room_is_an_error(model: VideoLlama, prompts: list[Prompt]) -> None:
    decoder = StaticDecoder(model.model.language_model, 1, 20)
    long = torch.cat([prompts[0].inputs_embeds] * 4, dim=1)
    with pytest.raises(ValueError, match="do not fit into 64 slots"):
        list(decoder.run([Request(long)], options(True)))


def test_a_model_of_another_kind_says_why_it_cannot(model: VideoLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_static(model.model.language_model) == ""
    assert "is not a LLaMA model" in why_not_static(model.model)
    monkeypatch.setattr(model.model.language_model.model.rotary_emb, "rope_type", "dynamic")
    assert "length of the text" in why_not_static(model.model.language_model)
    assert not model.decoders.serves(options(True))


def test_training_mode_hooks_adapters_and_8_bit_are_reasons_against_it(
    tiny_checkpoint: Path,
) -> None:
    language_model = load_checkpoint(tiny_checkpoint).model.language_model
    language_model(torch.tensor([[1, 2]]), output_hidden_states=True)  # for which transformers leaves hooks behind
    assert why_not_static(language_model) == ""
    assert "training mode" in why_not_static(language_model.train())
    attention = language_model.eval().model.layers[1].self_attn
    handle = attention.register_forward_hook(lambda *given: None)
    assert "hooks" in why_not_static(language_model)
    handle.remove()
    plain = attention.q_proj
    attention.q_proj = type("Linear8bitLt", (torch.nn.Linear,), {})(64, 64)
    assert "8 bit" in why_not_static(language_model)
    attention.q_proj = type("Adapted", (torch.nn.Linear,), {"__module__": "peft.tuners.lora.layer"})(64, 64)
    assert "PEFT" in why_not_static(language_model)
    attention.q_proj = plain
    assert why_not_static(language_model) == ""


def test_numbers_that_overflowed_in_one_answer_do_not_reach_the_next(model: VideoLlama, prompts: list[Prompt]) -> None:
    decoder = StaticDecoder(model.model.language_model, 1, 128)
    [expected] = [request.ids for request in decoder.run([Request(prompts[0].inputs_embeds)], options(True))]
    for request in decoder.run(
        [Request(torch.full_like(prompts[0].inputs_embeds, torch.nan)), Request(prompts[0].inputs_embeds)],
        options(True),
    ):
        last = request.ids
    assert last == expected


def test_weights_that_changed_in_place_count_in_the_common_beginning(
    tiny_checkpoint: Path, prompts: list[Prompt]
) -> None:
    model = load_checkpoint(tiny_checkpoint)
    with torch.no_grad():
        model.model.language_model.lm_head.weight *= 8
    table = model.model.get_input_embeddings().weight.detach().clone()
    rows = [[*range(50, 90), *prompt.keys[:5]] for prompt in prompts[:3]]
    begun = [Prompt(keys, table[torch.tensor(keys)][None], ["</s>"]) for keys in rows]
    before = generate_text(model, begun, options(True))
    [kept] = model.decoders.kept
    with torch.no_grad():
        for layer in model.model.language_model.model.layers:
            layer.self_attn.v_proj.weight *= -20
    after = generate_text(model, begun, options(True))
    assert model.decoders.kept == [kept]
    assert after == generate_text(model, begun, options(False)) != before


def test_an_end_token_that_was_changed_ends_the_next_answer(model: VideoLlama, prompts: list[Prompt]) -> None:
    decoder = StaticDecoder(model.model.language_model, 1, 128)
    ids = next(decoder.run([Request(prompts[0].inputs_embeds)], options(True))).ids
    defaults = model.model.language_model.generation_config
    usual, defaults.eos_token_id = defaults.eos_token_id, [2, ids[3]]
    try:
        assert next(decoder.run([Request(prompts[0].inputs_embeds)], options(True))).ids == ids[: ids.index(ids[3]) + 1]
    finally:
        defaults.eos_token_id = usual


def test_who_keeps_an_error_keeps_no_decoder(model: VideoLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: StaticDecoder, *given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(StaticDecoder, "run", run)
    states = []

    def fail() -> None:
        with model.decoders.borrow(1, 10, options(True)) as decoder:
            states.append(weakref.ref(decoder._step.states))
            decoder.run([], options(True))

    with pytest.raises(OutOfMemoryError):
        fail()
    with pytest.raises(OutOfMemoryError) as kept:
        fail()
    assert kept.value.__traceback__ is not None
    assert [state() for state in states] == [None, None]


def test_a_decoder_is_given_back_only_whole(model: VideoLlama, prompts: list[Prompt]) -> None:
    model.decoders.kept = []
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"), model.decoders.borrow(1, 10, options(True)):
            raise RuntimeError("broken")
        assert model.decoders.kept == []
