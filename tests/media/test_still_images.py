"""Still images and animations by their content; what a display matrix and an orientation tag say of the pixels."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, features

from tests.conftest import MakeVideo
from video_llama.errors import MediaError, NoAudioTrackError
from video_llama.media.containers import limit_frames, media_kind, open_container
from video_llama.media.decode import ClipDecoder, decode_video
from video_llama.media.image import load_image
from video_llama.media.sampling import SegmentSettings
from video_llama.utils.extras import is_installed

RED, GREEN, BLUE, YELLOW = (220, 30, 30), (30, 200, 30), (40, 40, 220), (220, 220, 40)
ORIENTATION_TAG = 0x0112
SIZE = (48, 64)
SEGMENTS = SegmentSettings(num_segments=4, spacing="main")

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")


def corners(height: int = SIZE[0], width: int = SIZE[1]) -> NDArray[np.uint8]:
    """(height, width, 3): red, green above; blue, yellow below."""
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    top, left = slice(0, height // 2), slice(0, width // 2)
    bottom, right = slice(height // 2, None), slice(width // 2, None)
    pixels[top, left], pixels[top, right], pixels[bottom, left], pixels[bottom, right] = RED, GREEN, BLUE, YELLOW
    return pixels


def colours(pixels: NDArray[np.uint8]) -> list[str]:
    """Which colour each corner has: top left, top right, bottom left, bottom right."""
    names = {"red": RED, "green": GREEN, "blue": BLUE, "yellow": YELLOW}
    height, width = pixels.shape[:2]
    found = []
    for row in (height // 6, -height // 6):
        for column in (width // 6, -width // 6):
            distances = {name: np.abs(pixels[row, column].astype(int) - value).sum() for name, value in names.items()}
            name = min(distances, key=distances.__getitem__)
            assert distances[name] < 60, pixels[row, column]
            found.append(name)
    return found


def oriented(orientation: int) -> NDArray[np.uint8]:
    """What a viewer must show of `corners()` for a value of the EXIF tag (where row 0 and column 0 are)."""
    rows_first = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}
    vertical, horizontal = rows_first[orientation]
    pixels = corners()
    if orientation > 4:
        pixels = pixels.transpose(1, 0, 2)
    return pixels[::vertical, ::horizontal]


def frames(count: int) -> list[Image.Image]:
    """Frames whose red channel is 40 times their number."""
    return [Image.new("RGB", (64, 48), (40 * number, 0, 200)) for number in range(count)]


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content) + 8) + kind + content


@pytest.mark.parametrize(
    "name", ["png", "jpg", "bmp", "tiff", "webp", "gif", "tga", "ico", "jp2", "ppm", "pcx", "dds", "sgi", "dib", "icns"]
)
def test_every_format_that_pillow_reads_is_an_image(tmp_path: Path, name: str) -> None:
    saved, path = tmp_path / f"still.{name}", tmp_path / "clip.mp4"
    side = {"ico": 64, "icns": 128}.get(name, 0)
    Image.fromarray(corners(side or SIZE[0], side or SIZE[1])).save(saved)
    saved.rename(path)
    assert media_kind(path) == "image"
    assert colours(np.asarray(load_image(path))) == ["red", "green", "blue", "yellow"]
    with pytest.raises(MediaError, match="a still image"), open_container(path):
        pass
    _, (clip,) = ClipDecoder(32, 4, "pyav", SEGMENTS, audio=True)(path)
    assert not isinstance(clip, Exception)
    assert (clip.kind, clip.times_seconds, clip.audio) == ("image", [], None)
    assert colours(clip.frames[0]) == ["red", "green", "blue", "yellow"]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_are_obeyed_in_all_formats(tmp_path: Path, suffix: str, orientation: int) -> None:
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    path, exif = tmp_path / f"turned.{suffix}", Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    Image.fromarray(corners()).save(path, exif=exif)
    shown, expected = np.asarray(load_image(path)), oriented(orientation)
    assert (shown.shape, colours(shown)) == (expected.shape, colours(expected))


def grid_avif(folder: Path, brand: bytes, mirrored: bool = False) -> Path:
    """Write an image of 2 x 2 tiles as phones do (ISO/IEC 23008-12, 6.6.2.3): red, green, blue and yellow."""
    tiles, codec = [], b""
    for colour in (RED, GREEN, BLUE, YELLOW):
        tile = folder / "tile.avif"
        Image.new("RGB", (64, 64), colour).save(tile, quality=95)
        content = tile.read_bytes()
        start = content.index(b"mdat")
        tiles.append(content[start + 4 : start - 4 + int.from_bytes(content[start - 4 : start], "big")])
        start = content.index(b"av1C")
        codec = content[start - 4 : start - 4 + int.from_bytes(content[start - 4 : start], "big")]
    items = [*tiles, bytes([0, 0, 1, 1]) + struct.pack(">HH", 128, 128)]

    def full(kind: bytes, version: int, content: bytes, flags: int = 0) -> bytes:
        return box(kind, struct.pack(">I", version << 24 | flags) + content)

    def meta(start: int) -> bytes:
        """The description of the items, which begin at this byte."""
        locations, infos, uses = b"", b"", b""
        for number, item in enumerate(items, 1):
            locations += struct.pack(">HHHII", number, 0, 1, start, len(item))
            start += len(item)
            kind, properties = (b"grid", bytes([3, 4])) if number == 5 else (b"av01", bytes([0x81, 2, 4]))
            if number == 5 and mirrored:
                properties += bytes([0x85])
            infos += full(b"infe", 2, struct.pack(">HH", number, 0) + kind + b"\0", flags=int(number < 5))
            uses += struct.pack(">HB", number, len(properties)) + properties
        sizes = [full(b"ispe", 0, struct.pack(">II", side, side)) for side in (64, 128)]
        depths = full(b"pixi", 0, bytes([3, 8, 8, 8]))
        # Mirrored about a vertical axis.
        properties = box(b"ipco", codec + sizes[0] + sizes[1] + depths + box(b"imir", b"\x01"))
        parts = [
            full(b"hdlr", 0, struct.pack(">I4s12xx", 0, b"pict")),
            full(b"pitm", 0, struct.pack(">H", 5)),
            full(b"iloc", 0, b"\x44\x00" + struct.pack(">H", 5) + locations),
            full(b"iinf", 0, struct.pack(">H", 5) + infos),
            full(b"iref", 0, box(b"dimg", struct.pack(">HHHHHH", 5, 4, 1, 2, 3, 4))),
            box(b"iprp", properties + full(b"ipma", 0, struct.pack(">I", 5) + uses)),
        ]
        return full(b"meta", 0, b"".join(parts))

    head = box(b"ftyp", brand + struct.pack(">I", 0) + b"avifmif1miafMA1B")
    path = folder / "grid.mp4"
    path.write_bytes(head + meta(len(head) + len(meta(0)) + 8) + box(b"mdat", b"".join(items)))
    return path


@needs_avif
@pytest.mark.parametrize("brand", [b"avif", b"mif1"])
def test_an_image_in_tiles_is_shown_whole_and_upright(tmp_path: Path, brand: bytes) -> None:
    path = grid_avif(tmp_path, brand)
    assert media_kind(path) == "image"
    assert load_image(path).size == (128, 128)
    assert colours(np.asarray(load_image(path))) == ["red", "green", "blue", "yellow"]
    path = grid_avif(tmp_path, brand, mirrored=True)
    assert colours(np.asarray(load_image(path))) == ["green", "red", "yellow", "blue"]


@needs_avif
def test_an_image_in_tiles_that_claims_to_be_a_film_is_refused_and_not_shown_in_part(tmp_path: Path) -> None:
    path = grid_avif(tmp_path, b"mp42")
    with pytest.raises(MediaError, match="a still image in parts, not a video"):
        decode_video(path, 4, 32, 32)


@pytest.mark.skipif(is_installed("pillow_heif"), reason="pillow-heif is installed")
@pytest.mark.parametrize(
    ("brands", "name"),
    [(b"heic\0\0\0\0mif1heic", "HEIC"), (b"mif1\0\0\0\0mif1heix", "HEIC"), (b"msf1\0\0\0\0mif1", "HEIF")],
)
def test_a_heic_image_is_never_read_in_part_and_the_error_says_what_to_install(
    tmp_path: Path, brands: bytes, name: str
) -> None:
    path = tmp_path / "photo.mp4"
    path.write_bytes(box(b"ftyp", brands) + box(b"meta", bytes(40)) + box(b"mdat", bytes(40)))
    assert media_kind(path) == "image"
    with pytest.raises(MediaError) as caught:
        load_image(path)
    expected = f'a still image ({name}), which needs pillow-heif (pip install "video_llama[heif]", or convert it'
    assert str(caught.value).startswith(f"{path}: {expected}")
    _, (error,) = ClipDecoder(32, 4, "pyav", SEGMENTS, audio=True)(path)
    assert "pillow-heif" in str(error)
    with pytest.raises(MediaError, match=rf"a still image \({name}\), not a video.* \(open it as an image\)"):
        decode_video(path, 4, 32, 32)


def test_a_heic_image_is_read_whole_and_upright(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    for orientation in range(1, 9):
        path, exif = tmp_path / f"{orientation}.heic", Image.Exif()
        exif[ORIENTATION_TAG] = orientation
        pillow_heif.from_pillow(Image.fromarray(corners())).save(path, exif=exif.tobytes())
        assert media_kind(path) == "image"
        shown = np.asarray(load_image(path))
        assert (shown.shape, colours(shown)) == (oriented(orientation).shape, colours(oriented(orientation)))


@needs_avif
def test_a_sequence_in_a_film_container_is_a_video(tmp_path: Path) -> None:
    path = tmp_path / "moving.avif"
    first, *rest = frames(6)
    first.save(path, save_all=True, append_images=rest, duration=100)
    assert media_kind(path) == "video"
    decoded = decode_video(path, 6, 48, 64)
    assert np.abs(decoded.frames[:, 20, 20, 0].astype(int) - 40 * np.arange(6)).max() <= 4


def test_an_image_that_pillow_has_no_decoder_for_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "still.jxl"
    path.write_bytes(b"\x00\x00\x00\x0cJXL \x0d\x0a\x87\x0a" + bytes(100))
    assert media_kind(path) == "image"
    with pytest.raises(MediaError, match=r"a still image \(JPEG XL\) that Pillow cannot read \(convert it to PNG"):
        load_image(path)


def test_of_several_pages_the_first_is_taken_and_a_warning_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "pages.tiff"
    Image.fromarray(corners()).save(path, save_all=True, append_images=frames(2))
    assert media_kind(path) == "image"
    assert colours(np.asarray(load_image(path))) == ["red", "green", "blue", "yellow"]
    assert "the first of its 3 images is taken" in caplog.text


DURATIONS_MS = [100, 300, 50, 200, 1000, 40]
STARTS = [0.0, 0.1, 0.4, 0.45, 0.65, 1.65]


@pytest.fixture(params=["webp", "png"])
def animation(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Six frames that are shown for `DURATIONS_MS`."""
    path = tmp_path / f"moving.{request.param}"
    first, *rest = frames(6)
    first.save(path, save_all=True, append_images=rest, duration=DURATIONS_MS, lossless=True)
    return path


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_an_animation_is_a_video_with_the_durations_it_states(animation: Path, reader: str) -> None:
    if reader == "decord" and not is_installed("decord"):
        pytest.skip("decord is not installed")
    assert media_kind(animation) == "video"
    decoded = decode_video(animation, 6, 24, 32, reader=reader)
    assert (decoded.indices, decoded.num_source_frames) == (list(range(6)), 6)
    assert decoded.times_seconds == pytest.approx(STARTS)
    assert decoded.fps == pytest.approx(6 / 1.69)
    assert decoded.frames.shape == (6, 24, 32, 3)
    for number, frame in enumerate(decoded.frames):
        np.testing.assert_array_equal(frame, np.broadcast_to((40 * number, 0, 200), frame.shape))
    again = decode_video(animation, 2, 24, 32, reader=reader, start_seconds=0.42, end_seconds=0.65)
    assert (again.indices, again.times_seconds) == ([2, 3], pytest.approx([0.4, 0.45]))


def test_an_animation_is_cut_into_windows_on_its_own_clock_and_has_no_audio(animation: Path) -> None:
    decoder = ClipDecoder(16, 8, "pyav", SEGMENTS, audio=True, window_seconds=0.845)
    total, clips = decoder(animation)
    assert total == 2
    for clip, indices, times in zip(clips, ([0, 1, 2, 3, 4], [4, 5]), (STARTS[:5], [0.0, 1.65 - 0.845]), strict=True):
        assert not isinstance(clip, Exception)
        assert (clip.kind, clip.indices, clip.times_seconds) == ("video", indices, pytest.approx(times))
        assert isinstance(clip.audio, NoAudioTrackError)


def test_frames_of_an_animation_are_put_together_and_turned(tmp_path: Path) -> None:
    path, exif = tmp_path / "partial.png", Image.Exif()
    exif[ORIENTATION_TAG] = 6
    second = corners()
    second[:24, :32] = YELLOW
    # Pillow stores only what changes, the top left corner.
    Image.fromarray(corners()).save(path, save_all=True, append_images=[Image.fromarray(second)], exif=exif)
    decoded = decode_video(path, 2, 64, 48)
    assert colours(decoded.frames[0]) == ["blue", "red", "yellow", "green"]
    assert colours(decoded.frames[1]) == ["blue", "yellow", "yellow", "green"]
    assert decoded.times_seconds == [0.0, 0.1]


def test_the_image_for_old_viewers_is_no_frame_of_an_animation(tmp_path: Path) -> None:
    path = tmp_path / "moving.png"
    still = Image.fromarray(corners())
    still.save(path, save_all=True, append_images=frames(3), duration=[100, 200, 300], default_image=True)
    decoded = decode_video(path, 8, 48, 64)
    assert decoded.frames[:, 0, 0, 0].tolist() == [0, 40, 80]
    assert decoded.times_seconds == pytest.approx([0.0, 0.1, 0.3])
    assert colours(np.asarray(load_image(path))) == ["red", "green", "blue", "yellow"]


def test_a_damaged_or_too_large_animation_is_an_error_in_one_line(animation: Path, tmp_path: Path) -> None:
    with limit_frames(1000), pytest.raises(MediaError, match="frames of 64x48 are too large"):
        decode_video(animation, 4, 32, 32)
    cut = tmp_path / f"cut{animation.suffix}"
    cut.write_bytes(animation.read_bytes()[:-60])
    _, (error,) = ClipDecoder(16, 8, "pyav", SEGMENTS, audio=True)(cut)
    assert isinstance(error, MediaError)
    assert "truncated" in error.reason


MATRICES = {
    (1, 0, 0, 1): lambda pixels: pixels,
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (-1, 0, 0, -1): lambda pixels: np.rot90(pixels, 2),
    (0, 1, -1, 0): lambda pixels: np.rot90(pixels, -1),
    (0, -1, 1, 0): np.rot90,
    (0, 1, 1, 0): lambda pixels: pixels.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
}
"""a, b, c, d of a track: a point (x, y) is shown at (a x + c y, b x + d y), y downwards (ISO/IEC 14496-12, 6.2.2)."""


def set_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Write the matrix of an MP4 file's first track."""
    content = bytearray(path.read_bytes())
    values = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", content, content.index(b"tkhd") + 44, *values)
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize("matrix", list(MATRICES))
def test_a_video_is_turned_and_mirrored_as_its_matrix_says(
    make_clip: Callable[..., Path], suffix: str, matrix: tuple[int, int, int, int]
) -> None:
    path = make_clip(f"turned.{suffix}")
    set_matrix(path, *matrix)
    expected = MATRICES[matrix](corners(48, 64))
    decoded = decode_video(path, 3, *expected.shape[:2])
    for frame in decoded.frames:
        assert colours(frame) == colours(expected)


@pytest.fixture
def make_clip(tmp_path: Path) -> Callable[[str], Path]:
    """Write a video whose every frame is `corners()`."""
    import av

    from tests.conftest import add_video_stream, encode_video

    def make(name: str) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = add_video_stream(container, (64, 48), 10, "libx264", {"crf": "5"})
            encode_video(container, stream, [corners(48, 64)] * 6)
        return path

    return make


def test_the_reader_that_cannot_mirror_says_so(make_clip: Callable[..., Path]) -> None:
    pytest.importorskip("decord")
    for number, matrix in enumerate(MATRICES):
        path = make_clip(f"{number}.mp4")
        set_matrix(path, *matrix)
        if np.linalg.det(np.reshape(matrix, (2, 2))) > 0:
            assert len(decode_video(path, 2, 64, 64, reader="decord").frames) == 2
        else:
            with pytest.raises(MediaError, match="decord does not mirror its frames"):
                decode_video(path, 2, 64, 64, reader="decord")


def test_a_mirrored_video_has_the_pixels_of_the_plain_one(make_video: MakeVideo) -> None:
    path = make_video("clip.mp4", num_frames=4)
    plain = decode_video(path, 2, 32, 32).frames
    set_matrix(path, -1, 0, 0, 1)
    mirrored = decode_video(path, 2, 32, 32).frames
    assert np.abs(mirrored[:, :, ::-1].astype(int) - plain).max() <= 2


@pytest.mark.parametrize(("scale", "highest"), [(1, 255), (257, 65535), (70_000, None)])
def test_integers_of_32_bits_are_scaled_by_their_values(scale: int, highest: int | None, tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.int32).reshape(16, 16)
    path = tmp_path / "wide.tif"
    Image.fromarray(ramp * scale).save(path)
    with Image.open(path) as image:
        assert (image.mode, image.tag_v2[258]) == ("I", (32,))
    if highest is None:
        with pytest.raises(MediaError, match="0 to 17850000, where an image has 0 to 255 or 0 to 65535"):
            load_image(path)
        return
    assert int(ramp.max() * scale) == highest
    assert np.array_equal(np.asarray(load_image(path)), np.repeat(ramp[..., None], 3, axis=-1))
