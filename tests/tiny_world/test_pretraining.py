"""The pretraining of the small model's parts: what they learn from, and a loop that can be stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import Generator
from torch import Tensor, nn

from examples.tiny_world.pretraining.all_parts import prepare, write_parts
from examples.tiny_world.pretraining.frames import FRAME_ATTRIBUTES, FramePool, _draw, _unnamed_colours
from examples.tiny_world.pretraining.language import slots_of_facts, text_writer, word_lists
from examples.tiny_world.pretraining.steps import StepSchedule, build_optimizers, run_steps
from examples.tiny_world.pretraining.vision import AttributeHeads, _patches_on_objects, _patches_with_centres
from examples.tiny_world.world.facts import Facts, facts_of
from examples.tiny_world.world.samples import random_sample
from examples.tiny_world.world.scene import random_scene
from examples.tiny_world.world.vocabulary import COLOURS, HELD_OUT_COLOURS, is_held_out
from video_llama.checkpoints.original_layout import find_config
from video_llama.data.tokenization import IGNORE_INDEX
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.processor.processing_video_llama import VideoLlamaProcessor

pytestmark = pytest.mark.slow

Prepared = tuple[VideoLlamaForConditionalGeneration, VideoLlamaProcessor, Path]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The untrained model and its processor, with the folder of its tokenizer."""
    folder = tmp_path_factory.mktemp("parts")
    return *prepare(folder), folder


@pytest.fixture(scope="module")
def pool() -> FramePool:
    """Some drawn frames."""
    return FramePool(*(np.stack(column) for column in zip(*_draw(1, 64, 80), strict=True)))


def test_the_untrained_model_is_the_same_whenever_it_is_prepared(prepared: Prepared) -> None:
    model, _, folder = prepared
    again, _ = prepare(folder)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_the_model_fits_into_the_package(prepared: Prepared) -> None:
    assert sum(parameter.numel() for parameter in prepared[0].parameters()) * 4 < 25e6


def test_drawn_frames_show_no_held_out_combination(pool: FramePool) -> None:
    named = pool.named()
    values = [named.facts(index).values for index in range(len(named))]
    assert not any(is_held_out(value["shape"], value["colour"]) for value in values)
    assert len({tuple(value.values()) for value in values}) > 30


def test_half_of_the_drawn_frames_have_colours_without_a_name(pool: FramePool) -> None:
    named = (pool.labels != IGNORE_INDEX).all(axis=1)
    assert named.sum() == len(pool.named()) == len(pool) // 2
    unnamed = pool.labels[~named]
    ignored = [FRAME_ATTRIBUTES[column] for column in np.nonzero((unnamed == IGNORE_INDEX).all(axis=0))[0]]
    assert ignored == ["colour", "background"]
    assert (np.delete(unnamed, [1, 4], axis=1) >= 0).all()


def test_colours_without_a_name_are_unlike_the_one_that_is_held_out() -> None:
    for seed in range(300):
        rng = np.random.default_rng(seed)
        scene = random_scene(rng, moving=True, held_out=False)
        looks = dataclasses.replace(scene, **_unnamed_colours(scene, rng)).looks
        for look in looks:
            for shape, colour in HELD_OUT_COLOURS:
                if shape == look.shape:
                    assert np.abs(np.array(look.rgb) - COLOURS[colour]).max() >= 70


def test_patches_with_centres_are_as_many_as_the_objects(pool: FramePool) -> None:
    chosen = np.arange(len(pool))
    has_centre = _patches_with_centres(pool, chosen, 64)
    assert torch.equal(has_centre.sum(dim=1).long(), pool.attribute("count", chosen) + 1)
    on_object = _patches_on_objects(pool, chosen, 64)
    assert (on_object | (has_centre == 0)).float().mean() > 0.99  # a patch's middle may just miss a small object


def test_each_attribute_is_read_from_a_state_of_its_own(pool: FramePool) -> None:
    heads, chosen = AttributeHeads(8), np.arange(12)
    states = torch.randn(12, len(FRAME_ATTRIBUTES) + 2, 8, requires_grad=True)
    for number, name in enumerate(FRAME_ATTRIBUTES):
        (gradient,) = torch.autograd.grad(heads.losses(states, pool, chosen)[name], states)
        assert gradient.abs().sum(dim=(0, 2)).nonzero().flatten().tolist() == [number]
    alone = heads.losses(states[:, :1], pool, chosen)
    assert alone["shape"] == heads.losses(states, pool, chosen)["shape"]
    assert alone["count"] != heads.losses(states, pool, chosen)["count"]


def test_patches_on_objects_are_those_that_are_unlike_the_background(pool: FramePool) -> None:
    chosen = np.arange(len(pool))
    on_object = _patches_on_objects(pool, chosen, 64).numpy()  # (frames, patches)
    patches = pool.pixels.reshape(-1, 8, 8, 8, 8, 3).mean(axis=(2, 4)).reshape(-1, 64, 3)
    for index in chosen:
        unlike = np.abs(patches[index] - np.median(patches[index], axis=0)).mean(axis=-1)
        assert unlike[on_object[index]].mean() > 3 * unlike[~on_object[index]].mean()


def test_a_frames_position_is_the_ninth_that_holds_the_common_centre(pool: FramePool) -> None:
    for index in range(len(pool)):
        column, row = np.minimum(2, (3 * pool.centre[index]).astype(int))
        assert pool.labels[index, FRAME_ATTRIBUTES.index("position")] == 3 * row + column


def test_held_back_frames_are_not_trained_on(pool: FramePool) -> None:
    train, held_back = pool.split(10)
    assert (len(train), len(held_back)) == (70, 10)
    assert np.array_equal(np.concatenate([train.centre, held_back.centre]), pool.centre)


def test_texts_teach_answers_and_stand_on_facts_alone(prepared: Prepared) -> None:
    _, processor, _ = prepared
    writer, rng = text_writer(processor, 1), np.random.default_rng(0)
    kinds = set()
    for _ in range(60):
        sample = writer(rng)
        kinds.add((sample.visible is not None, sample.audible is not None))
        ids = np.array(sample.input_ids)
        for kind, facts in (("image", sample.visible), ("audio", sample.audible)):
            count = (ids == processor.placeholder_ids[kind]).sum()
            assert count == (0 if facts is None else processor.placeholder_lengths[kind])
        learnt = [token for token, label in zip(sample.input_ids, sample.labels, strict=True) if label != IGNORE_INDEX]
        assert learnt[-1] == processor.tokenizer.eos_token_id
    assert kinds == {(True, False), (False, True), (True, True)}


def test_every_fact_is_in_a_slot_and_noise_changes_little(prepared: Prepared) -> None:
    model, processor, _ = prepared
    clip = random_sample(1, "train", "clip", 0)
    facts = facts_of(clip.scene, None)
    embeddings = nn.Embedding.from_pretrained(torch.eye(len(processor.tokenizer)))  # a slot counts its tokens
    ids = {
        word: processor.tokenizer(word, add_special_tokens=False)["input_ids"]
        for phrase in word_lists(facts)
        for word in phrase.split(" ")
    }

    class NoNoise:
        def __init__(self) -> None:
            self._rng = np.random.default_rng(0)

        def __getattr__(self, name: str) -> object:
            return getattr(self._rng, name)

        def random(self) -> float:
            return 0.0

    slots = slots_of_facts([facts], 12, embeddings, ids, NoNoise())  # type: ignore[arg-type]
    assert slots.shape == (1, 12, len(processor.tokenizer))
    for phrase in word_lists(facts):
        wanted = torch.zeros(len(processor.tokenizer))
        for word in phrase.split(" "):
            for token in ids[word]:
                wanted[token] += 1
        assert any(torch.equal(slot, wanted) for slot in slots[0]), phrase
    del model


def test_what_changes_is_told_in_its_order() -> None:
    facts = Facts("video", {"shape": "star", "order": "red, then blue"}, "colour", "red", "blue")
    assert word_lists(facts) == ["video", "shape star", "first colour red", "then colour blue"]
    still = Facts("video", {"shape": "star", "order": "nothing"})
    assert word_lists(still) == ["video", "shape star", "nothing changes"]


def run_part(folder: Path, num_steps: int, stop_after: int | None = None) -> nn.Linear:
    """Learn to turn vectors round; the run may be cut off."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)

    def step(rng: Generator) -> Mapping[str, Tensor]:
        x = torch.from_numpy(rng.normal(size=(32, 64)).astype(np.float32))
        step.count += 1  # type: ignore[attr-defined]
        if stop_after is not None and step.count > stop_after:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return {"square": (layer(x) - x.flip(1)).square().mean()}

    step.count = 0  # type: ignore[attr-defined]
    folder.mkdir(exist_ok=True)
    run_steps(
        "part", nn.ModuleDict({"layer": layer}), step, StepSchedule(num_steps, 0.02, 0.02, 10, 0.0), folder, seed=1
    )
    return layer


def test_a_stopped_part_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = run_part(tmp_path / "whole", 400)
    with pytest.raises(KeyboardInterrupt):
        run_part(tmp_path / "cut", 400, stop_after=300)
    resumed = run_part(tmp_path / "cut", 400)
    assert torch.equal(whole.weight, resumed.weight)
    assert whole.weight.detach().numpy() == pytest.approx(np.eye(64)[::-1], abs=0.05)


def test_a_finished_part_is_read_and_not_trained_again(tmp_path: Path) -> None:
    first = run_part(tmp_path / "line", 50)
    again = run_part(tmp_path / "line", 50, stop_after=0)
    assert torch.equal(first.weight, again.weight)


def test_parts_are_written_in_the_originals_layout_without_what_the_stages_train(
    prepared: Prepared, tmp_path: Path
) -> None:
    model, _, folder = prepared
    video, audio = model.video_branch, model.audio_branch
    assert audio is not None
    states = {
        "sound": {"encoder": audio.audio_encoder},
        "vision": {"encoder": video.vision_encoder, "norm": video.vision_norm},
        "language": {"model": model.language_model},
        "qformer": {"qformer": video.qformer},
    }
    for name, modules in states.items():
        state = {f"{key}.{k}": v for key, module in modules.items() for k, v in module.state_dict().items()}
        state |= {"queries.parameter": video.query_tokens.data + 1} if name == "qformer" else {}
        torch.save({"modules": state}, folder / f"{name}.pt")
    write_parts(folder, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    files = {"eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth", "imagebind_huge.pth", "language_model"}
    files |= {"config.json", "modeling_video_llama.py"}
    assert names == files
    assert find_config([tmp_path / "out"]) is not None
    queries = torch.load(tmp_path / "out/blip2_pretrained_flant5xxl.pth", weights_only=True)["model"]["query_tokens"]
    assert torch.equal(queries, video.query_tokens.data + 1)


def test_muon_has_the_matrices_and_adamw_all_else_that_trains(prepared: Prepared) -> None:
    model = prepared[0].language_model
    model.model.norm.requires_grad_(False)
    muon, adamw = build_optimizers(model, StepSchedule(10))
    names = {parameter: name for name, parameter in model.named_parameters()}
    matrices = {names[p] for group in muon.param_groups for p in group["params"]}
    others = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.3.mlp.down_proj.weight"} <= matrices
    assert {"model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"} <= others
    assert matrices | others == set(names.values()) - {"model.norm.weight"}
    assert not matrices & others


def test_the_schedule_warms_up_and_falls() -> None:
    schedule = StepSchedule(100, warmup_steps=10)
    rates = [schedule.share(step) for step in range(100)]
    assert rates[9] == max(rates) == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.02, abs=0.01)
    assert dataclasses.replace(schedule, warmup_steps=0).share(0) == 1.0
