"""The cache of encoder outputs: nothing stale, nothing damaged, any number of writers."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import MakeAudio, MakeVideo
from tests.data_pipeline.conftest import MakeEncoder, captioned, write_picture
from video_llama.data.examples import Example, MediaSource
from video_llama.data.features import Features, FeatureStore, decode_features, encode_features, fingerprint
from video_llama.data.sample_processor import ProcessedSample
from video_llama.errors import ConfigError, MediaError
from video_llama.processor.media_processor import MediaProcessor

FINGERPRINTS = {"pixel_values": "eyes", "audio_values": "ears", "audio_pixel_values": "inner eye"}
MEDIA = MediaProcessor()
VALUES = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))


def make_store(folder: Path, **settings: Any) -> FeatureStore:
    return FeatureStore(**{"folder": folder, "encoding": "float32", "fingerprints": FINGERPRINTS, **settings})


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "features").rglob("*") if path.is_file())


def key(store: FeatureStore, path: Path, kind: str = "image", name: str = "pixel_values", media: Any = MEDIA) -> str:
    return store.key(MediaSource(str(path)), kind, name, media)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert store.load("ab12") is None
    store.save("ab12", Features(VALUES, "2 frames, 0.0 und 1.5 Sekunden ü"))
    loaded = store.load("ab12")
    assert loaded is not None
    assert torch.equal(loaded.values, VALUES)
    assert loaded.message == "2 frames, 0.0 und 1.5 Sekunden ü"


def test_an_entry_is_replaced_and_leaves_nothing_behind(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for factor in (1, 2):
        store.save("ab12", Features(VALUES * factor, ""))
    loaded = store.load("ab12")
    assert loaded is not None
    assert torch.equal(loaded.values, VALUES * 2)
    assert len(entries(tmp_path)) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the place of the folder")
    store = make_store(tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"features\.dir: .*cache cannot be written"):
        store.save("ab12", Features(VALUES, ""))


def test_a_key_depends_on_all_that_features_depend_on(tmp_path: Path, picture: Path) -> None:
    store = make_store(tmp_path)
    other = write_picture(tmp_path / "other.jpg", (0, 0, 0))
    more_frames = dataclasses.replace(MEDIA, num_frames=4)
    keys = [
        key(store, picture),
        key(store, other),
        key(store, picture, kind="video"),
        key(store, picture, name="audio_pixel_values"),
        key(store, picture, media=more_frames),
        store.key(MediaSource(str(picture), start_seconds=1.0), "image", "pixel_values", MEDIA),
        store.key(MediaSource(str(picture), end_seconds=1.0), "image", "pixel_values", MEDIA),
        key(make_store(tmp_path, encoding="int8"), picture),
        key(make_store(tmp_path, fingerprints={**FINGERPRINTS, "pixel_values": "new eyes"}), picture),
    ]
    assert len(set(keys)) == len(keys)
    assert key(make_store(tmp_path / "elsewhere"), picture) == keys[0]
    assert key(make_store(tmp_path, fingerprints={**FINGERPRINTS, "audio_values": "new ears"}), picture) == keys[0]


def test_equal_files_share_a_key_wherever_they_lie(tmp_path: Path, picture: Path) -> None:
    store, content = make_store(tmp_path), picture.read_bytes()
    copy, shard = tmp_path / "copy.jpg", tmp_path / "0.tar"
    copy.write_bytes(content)
    shard.write_bytes(b"..." + content)
    inside = MediaSource(str(shard), "1.jpg", 3, len(content))
    assert key(store, copy) == key(store, picture) == store.key(inside, "image", "pixel_values", MEDIA)
    before = MediaSource(str(shard), "0.jpg", 0, 3)
    assert store.key(before, "image", "pixel_values", MEDIA) != key(store, picture)


def test_a_changed_file_has_another_key(tmp_path: Path, picture: Path) -> None:
    store = make_store(tmp_path)
    before, stat = key(store, picture), picture.stat()
    write_picture(picture, (0, 0, 0))
    changed = key(store, picture)
    assert changed != before
    content = bytearray(picture.read_bytes())
    content[-5] ^= 1  # of the same size
    picture.write_bytes(content)
    os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert key(store, picture) not in (before, changed)


def test_a_file_is_read_once_for_its_key(tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path)
    first = key(store, picture)
    monkeypatch.setattr("video_llama.data.features.read_media", lambda source: pytest.fail("read again"))
    assert key(make_store(tmp_path), picture) == first


def memos(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "digests").rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["zeros", "zeros of its length", "random bytes", "cut", "flipped", "empty", "text"])
def test_a_damaged_memo_of_a_files_content_is_not_used(
    damage: str, tmp_path: Path, picture: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, other = make_store(tmp_path / "cache"), write_picture(tmp_path / "other.jpg", (0, 0, 0))
    expected = [key(store, picture), key(store, other)]
    for path in memos(tmp_path / "cache"):
        content = path.read_bytes()
        damaged = {
            "zeros": bytes(32),
            "zeros of its length": bytes(len(content)),
            "random bytes": bytes(range(128, 256)),
            "cut": content[:32],
            "flipped": bytes([content[0] ^ 1]) + content[1:],
            "empty": b"",
            "text": b"hello" * 13,
        }
        path.write_bytes(damaged[damage])
    assert [key(store, picture), key(store, other)] == expected
    assert caplog.text.count("damaged, will be computed again") == 2
    caplog.clear()
    assert [key(store, picture), key(store, other)] == expected
    assert caplog.text == ""


def test_the_memo_of_another_file_is_not_used(tmp_path: Path, picture: Path) -> None:
    store, other = make_store(tmp_path / "cache"), write_picture(tmp_path / "other.jpg", (0, 0, 0))
    expected = key(store, picture)
    [own] = memos(tmp_path / "cache")
    key(store, other)
    [foreign] = set(memos(tmp_path / "cache")) - {own}
    own.write_bytes(foreign.read_bytes())
    assert key(store, picture) == expected


@pytest.mark.parametrize("replaced", [False, True])
def test_a_changed_file_of_the_same_size_and_time_has_another_key(
    replaced: bool, tmp_path: Path, picture: Path
) -> None:
    store = make_store(tmp_path / "cache")
    before, stat = key(store, picture), picture.stat()
    content = bytearray(picture.read_bytes())
    content[-5] ^= 1
    changed = tmp_path / "changed.jpg" if replaced else picture
    changed.write_bytes(content)
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    while changed.stat().st_ctime_ns == stat.st_ctime_ns:  # the clock of a file system has ticks
        os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed.replace(picture)
    assert (picture.stat().st_size, picture.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert key(store, picture) != before


def test_an_absent_file_is_a_bad_sample_with_a_cache_too(tmp_path: Path, make_encoder: MakeEncoder) -> None:
    with pytest.raises(MediaError, match="no such file"):
        make_encoder(features=make_store(tmp_path))(captioned(tmp_path / "absent.jpg"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_entry_is_not_used(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = make_store(tmp_path)
    store.save("ab12", Features(VALUES, ""))
    [path] = entries(tmp_path)
    content = path.read_bytes()
    flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    path.write_bytes({"cut": content[:-1], "flipped": flipped, "empty": b"", "text": b"hello" * 20}[damage])
    assert store.load("ab12") is None
    assert "damaged, will be computed again" in caplog.text
    store.save("ab12", Features(VALUES, ""))
    assert store.load("ab12") is not None


def test_an_interrupted_write_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    store = make_store(tmp_path)
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        store.save("ab12", Features(VALUES, ""))
    assert entries(tmp_path) == []
    assert store.load("ab12") is None


@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "int8"])
def test_each_encoding_keeps_its_promise(encoding: Any) -> None:
    values = VALUES * torch.tensor([1e-3, 1.0, 50.0, 0.0])[:, None]  # tokens of very unequal size
    stored = encode_features(values, encoding)
    error = (decode_features(stored) - values).abs()
    largest = values.abs().amax(dim=-1, keepdim=True)
    bound = {"float32": 0 * largest, "bfloat16": values.abs() / 256, "int8": largest / 254}[encoding]
    assert bool((error <= bound * (1 + 1e-5)).all())
    assert stored["values"].dtype == getattr(torch, encoding)
    assert decode_features(stored).dtype == (torch.bfloat16 if encoding == "bfloat16" else torch.float32)


def test_cheaper_encodings_take_fewer_bytes(tmp_path: Path) -> None:
    sizes = []
    for encoding in ("float32", "bfloat16", "int8"):
        make_store(tmp_path / encoding, encoding=encoding).save("ab12", Features(torch.ones(8, 32, 256), ""))
        sizes.append(entries(tmp_path / encoding)[0].stat().st_size)
    assert sizes[1] < sizes[0] * 0.51
    assert sizes[2] < sizes[0] * 0.26


def test_a_fingerprint_is_of_every_value_shape_and_type() -> None:
    weights = [torch.arange(6.0), torch.ones(2, 2)]
    changed = weights[0].clone()
    changed[3] += 1e-6
    variants = [
        weights,
        [changed, weights[1]],
        [weights[0].view(2, 3), weights[1]],
        weights[::-1],
        weights[:1],
        [weights[0].to(torch.bfloat16), weights[1]],
    ]
    assert len({fingerprint(variant) for variant in variants}) == len(variants)
    assert fingerprint(tensor.clone() for tensor in weights) == fingerprint(weights)
    assert fingerprint([torch.ones(4, 6).T]) == fingerprint([torch.ones(6, 4)])


def fill(folder: Path, number: int) -> None:
    """Write what a fixed seed says under ten keys, again and again: one of several processes that do so."""
    store = make_store(folder)
    for place in range(30):
        generator = torch.Generator().manual_seed(place % 10)
        store.save(f"ab{place % 10}", Features(torch.randn(2, 8, generator=generator), f"entry {place % 10}"))


def test_two_processes_may_fill_one_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=fill, args=(tmp_path, number)) for number in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(entries(tmp_path)) == 10
    for number in range(10):
        found = make_store(tmp_path).load(f"ab{number}")
        assert found is not None
        assert found.message == f"entry {number}"


def test_an_encoder_takes_what_the_cache_holds_and_decodes_the_rest(
    make_video: MakeVideo, make_audio: MakeAudio, make_encoder: MakeEncoder, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "cache")
    encoder = make_encoder(features=store)
    qa = {"QA": [{"q": "What?", "a": "A dog."}]}
    video = Example("1", "video", MediaSource(str(make_video())), qa)
    missed: ProcessedSample = encoder(video)
    [item] = missed.media
    assert item.key is not None
    assert not item.is_encoded
    store.save(item.key, Features(VALUES, item.message))
    found = encoder(video)
    assert found.media[0].is_encoded
    assert torch.equal(found.media[0].values, VALUES)
    assert found.input_ids == missed.input_ids  # the sentence on the frames comes from the cache, too
    sound = encoder(captioned(make_audio(), kind="audio")).media[0]
    assert (sound.name, sound.is_encoded) == ("audio_values", False)


def test_a_file_in_a_shard_that_is_cached_is_not_copied_out(
    picture: Path, make_encoder: MakeEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, shard = picture.read_bytes(), tmp_path / "0.tar"
    shard.write_bytes(content)
    store = make_store(tmp_path / "cache")
    encoder = make_encoder(features=store)
    example = Example("1", "image", MediaSource(str(shard), "1.jpg", 0, len(content)), {"caption": "a dog"})
    [item] = encoder(example).media
    assert item.key is not None
    store.save(item.key, Features(VALUES, ""))
    monkeypatch.setattr("video_llama.data.sample_processor.open_media", lambda source: pytest.fail("copied out"))
    assert encoder(example).media[0].is_encoded
    assert len(list((store.folder / "digests").rglob("*/*"))) == 1


@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_no_numbers_are_a_bad_sample(
    encoding: Any, value: float, tmp_path: Path, picture: Path, make_encoder: MakeEncoder
) -> None:
    store = make_store(tmp_path / "cache", encoding=encoding)
    processor = make_encoder(features=store)
    values = VALUES.clone()
    values[0, 1, 2] = value
    store.save(key(store, picture, media=processor.media), Features(values, ""))
    with pytest.raises(MediaError, match="hold NaN or infinity"):
        processor.read("image", MediaSource(str(picture)))
