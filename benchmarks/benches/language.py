"""The language model's side: a later turn of a conversation, and many captions, against doing it anew each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.benches.decode import make_clip
from benchmarks.benches.timing import Row, alternate
from examples.random_checkpoint import make_checkpoint
from video_llama.inference.cache import PrefixCache
from video_llama.inference.chat import Chat
from video_llama.inference.engine import VideoLlama
from video_llama.inference.generation import GenerationOptions
from video_llama.inference.load import load_pretrained_model

EARLIER_TURNS = 8
ANSWER = "The video shows a person who is talking in front of a camera and a ball that moves from left to right. " * 2
CAPTION_TOKENS = 32
PROMPT = "Please describe this in detail."
CHECKPOINTS = {"tiny": "tiny", "full": "small"}


def load(size: str, folder: Path, dtype: str) -> VideoLlama:
    """A model with random weights; `full` has the published widths and less depth."""
    checkpoint = folder / f"random_{CHECKPOINTS[size]}_hf"
    if not checkpoint.exists():
        make_checkpoint(CHECKPOINTS[size], "hf", checkpoint)
    return load_pretrained_model(checkpoint, device="cpu", dtype=dtype, verbose=False)


def run_second_turn(size: str, repeats: int, folder: Path) -> list[Row]:
    """Time to the first token of a turn after eight others, with what they computed and without."""
    model = load(size, folder, "float32")
    chat = Chat(model)
    chat.upload_video(make_clip(folder, 160, 96, 4, 0))
    for turn in range(EARLIER_TURNS):
        chat.ask(f"What is happening in part {turn}?")
        chat._open_turn().answer = ANSWER
    media = [item for turn in chat.turns for upload in turn.uploads for item in upload.encoded]
    chat.ask("Nobody asks this.")
    other = model.prepare(chat.conversation(), media)
    chat.turns[-1].question = "And who is there?"
    now = model.prepare(chat.conversation(), media)
    kept = next(n for n, (mine, its) in enumerate(zip(now.keys, other.keys, strict=False)) if mine != its)
    first_token = GenerationOptions(max_new_tokens=1)
    cache, texts = PrefixCache(), {}
    model.complete(other, first_token, cache)
    states = cache.states
    assert states is not None

    def with_cache() -> None:
        states.crop(kept - states.get_seq_length())  # as the earlier turns left it
        cache.put(now.keys[:kept], states)
        texts["ours"] = model.complete(now, first_token, cache)

    def from_scratch() -> None:
        texts["peer"] = model.complete(now, first_token)

    medians = alternate({"ours": with_cache, "peer": from_scratch}, repeats)
    what = f"first token after {EARLIER_TURNS} turns, {len(now.keys)} tokens of which {kept} were there before"
    agrees = texts["ours"] == texts["peer"]
    return [Row("second-turn", what, medians["ours"], medians["peer"], "s", "recomputed", 8.0, agrees)]


def run_captioning(
    size: str, repeats: int, folder: Path, num_clips: int, num_workers: int, batch_size: int
) -> list[Row]:
    """Many clips in one pass, in the precision of the machine and in float32, against one at a time in float32."""
    clips = [make_clip(folder, 320 + 16 * (number % 4), 180, 2 + number % 3, 3) for number in range(min(num_clips, 12))]
    paths = [clips[number % len(clips)] for number in range(num_clips)]
    single = load(size, folder, "float32")
    shipped = load(size, folder, "auto")
    single.media_cache.max_items = 0  # the same clips come again and again, and nothing is to be reused
    texts: dict[str, list[str]] = {}

    def one_at_a_time() -> None:
        texts["peer"] = [caption_alone(single, path) for path in paths]

    def together(model: VideoLlama, name: str) -> None:
        options: dict[str, Any] = {
            "batch_size": batch_size,
            "num_workers": num_workers,
            "max_new_tokens": CAPTION_TOKENS,
        }
        texts[name] = model.caption(paths, PROMPT, **options)

    tasks = {
        "shipped": lambda: together(shipped, "shipped"),
        "float32": lambda: together(single, "float32"),
        "peer": one_at_a_time,
    }
    medians = alternate(tasks, repeats)
    rows = []
    for name, target in (("shipped", 3.0), ("float32", None)):
        dtype = str((shipped if name == "shipped" else single).model.dtype).removeprefix("torch.")
        same = sum(ours == theirs for ours, theirs in zip(texts[name], texts["peer"], strict=True))
        agrees = same == num_clips if dtype == "float32" else None
        note = f"{num_clips / medians[name]:.2f} against {num_clips / medians['peer']:.2f} clips/s, {same} same texts"
        how = f"{dtype}, batches of {batch_size}, {num_workers} worker(s)"
        what = f"{num_clips} clips, {CAPTION_TOKENS} tokens each, {how}"
        rows.append(Row("captioning", what, medians[name], medians["peer"], "s", "one at a time", target, agrees, note))
    return rows


def caption_alone(model: VideoLlama, path: Path) -> str:
    """The plain way: read, encode, generate; nothing is kept or shared."""
    frames, sound = model.processor.media_processor.process_video(path)
    conversation = model.new_conversation()
    conversation.ask(PROMPT)
    return model.generate(frames, sound, conversation, max_new_tokens=CAPTION_TOKENS)
