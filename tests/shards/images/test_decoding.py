"""Every kind of picture comes out as people see it, and one that does not says why."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.images.causes import CAUSES, UnreadableImageError
from shards.images.decoding import decode_image
from tests.fixtures.images import BAD, CAUSE_OF, GOOD, chunk, photo

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
COLOUR = (0x8001, 0x4002, 0x2003)
SCALE = 8  # pixels of an image for each of a hand-made one: smaller images are not taken


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def larger(pixels: Any) -> np.ndarray:
    """Each pixel uint8 [height, width] or [height, width, channels] as a square of ``SCALE``."""
    return np.repeat(np.repeat(np.asarray(pixels, np.uint8), SCALE, 0), SCALE, 1)


def seen(data: bytes) -> np.ndarray:
    """The middle of each of these squares, as it is decoded: uint8 [height, width, 3]."""
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE]


def raw_png(depth: int, colour_type: int, rows: list[bytes], width: int, *more: bytes) -> bytes:
    """A PNG from its unfiltered rows; each is repeated, so that the image is high enough."""
    header = struct.pack(">IIBBBBB", width, SCALE * len(rows), depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join((b"\0" + row) * SCALE for row in rows))
    parts = (chunk(b"IHDR", header), *more, chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def words(*values: int) -> bytes:
    """Channels of 16 bits, each pixel as wide as a square."""
    return struct.pack(f">{len(values)}H", *values)


FLIP, MIRROR, TURN = np.flipud, np.fliplr, partial(np.rot90, k=-1)  # a turn by 90 degrees clockwise


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [
        (1, []),
        (2, [MIRROR]),
        (3, [FLIP, MIRROR]),
        (4, [FLIP]),
        (5, [TURN, MIRROR]),
        (6, [TURN]),
        (7, [TURN, FLIP]),
        (8, [TURN, FLIP, MIRROR]),
    ],
)
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_an_image_is_upright(
    kind: str, options: dict[str, Any], orientation: int, undo: list[Callable[[np.ndarray], np.ndarray]]
) -> None:
    """As the EXIF standard words the eight orientations: where the stored first row and column belong."""
    stored = np.arange(9 * 8 * 3, dtype=np.uint8).reshape(8, 9, 3)
    upright = stored
    for step in undo:
        upright = step(upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(stored), kind, exif=exif, **options)
    assert np.array_equal(np.asarray(decode_image(data)), upright)


def test_damaged_exif_costs_no_image() -> None:
    upright = Image.new("RGB", (9, 8), "red")
    assert np.array_equal(
        np.asarray(decode_image(encoded(upright, exif=b"Exif\0\0no TIFF header"))), np.asarray(upright)
    )


@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 0, 255)])
def test_what_is_transparent_is_white(hidden: tuple[int, int, int]) -> None:
    """Whatever colour the file holds there; half transparency mixes."""
    pixels = larger([[(*hidden, 0), (10, 20, 30, 255), (0, 0, 0, 128), (*hidden, 0)]])
    assert seen(encoded(Image.fromarray(pixels)))[0].tolist() == [[255] * 3, [10, 20, 30], [127] * 3, [255] * 3]
    palette = Image.fromarray(larger([[0, 1]])).convert("P")
    palette.putpalette([*hidden, 9, 9, 9])
    assert seen(encoded(palette, transparency=0))[0].tolist() == [[255] * 3, [9] * 3]
    assert seen(encoded(palette, "GIF", transparency=0))[0].tolist() == [[255] * 3, [9] * 3]
    shades = encoded(palette, transparency=bytes([255, 128]))  # an alpha for each colour
    assert seen(shades)[0].tolist() == [list(hidden), [132] * 3]


def test_sixteen_bits() -> None:
    """The high byte of each channel, of every kind of PNG."""
    wide, grey = words(*[0x1234] * SCALE), [0x12] * 3
    assert seen(raw_png(16, 0, [wide], SCALE))[0].tolist() == [grey]
    assert seen(raw_png(16, 2, [words(*[0xFF12, 0x8034, 0x0156] * SCALE)], SCALE))[0].tolist() == [[0xFF, 0x80, 1]]
    with_alpha = words(*[0x1234, 0xFFFF] * SCALE) + words(*[0x1234, 0] * SCALE)
    assert seen(raw_png(16, 4, [with_alpha], 2 * SCALE))[0].tolist() == [grey, [255] * 3]
    with_alpha = words(*[0xFF00, 0, 0, 0xFFFF] * SCALE) + words(*[0xFF00, 0, 0, 0] * SCALE)
    assert seen(raw_png(16, 6, [with_alpha], 2 * SCALE))[0].tolist() == [list(RED), [255] * 3]


@pytest.mark.parametrize(
    ("depth", "colour_type", "row", "clear", "expected"),
    [
        (16, 0, words(*[0x8001] * SCALE, *[0x1234] * SCALE), words(0x8001), [0x12] * 3),
        (16, 2, words(*COLOUR * SCALE, *[0x1234] * 3 * SCALE), words(*COLOUR), [0x12] * 3),
        (8, 0, bytes([0x80] * SCALE + [0x12] * SCALE), words(0x80), [0x12] * 3),
        (4, 0, bytes([0xAA] * (SCALE // 2) + [0x33] * (SCALE // 2)), words(0xA), [0x33] * 3),
        (2, 0, bytes([0b01010101] * (SCALE // 4) + [0b10101010] * (SCALE // 4)), words(1), [0xAA] * 3),
        (1, 0, bytes([0b00000000, 0b11111111]), words(0), [255] * 3),
    ],
)  # fmt: skip
def test_one_colour_of_a_png_is_transparent(
    depth: int, colour_type: int, row: bytes, clear: bytes, expected: list[int]
) -> None:
    """In whatever depth the file names it."""
    data = raw_png(depth, colour_type, [row], 2 * SCALE, chunk(b"tRNS", clear))
    assert seen(data)[0].tolist() == [[255] * 3, expected]
    opaque = seen(raw_png(depth, colour_type, [row], 2 * SCALE))[0].tolist()
    assert opaque[0] != [255] * 3 and opaque[1] == expected


def test_four_inks() -> None:
    """JPEGs for print hold inverted inks, as Adobe's programs write them, or these as YCCK."""
    inks = larger([[(0, 255, 255, 0), (255, 0, 255, 0), (255, 255, 0, 0), (0, 0, 0, 0), (0, 0, 0, 255)]])
    image = Image.frombytes("CMYK", (inks.shape[1], inks.shape[0]), inks.tobytes())
    data = encoded(image, "JPEG", quality=95, subsampling=0)
    assert b"Adobe" in data
    expected = np.array([[RED, GREEN, BLUE, WHITE, (0, 0, 0)]])
    assert np.abs(seen(data).astype(int) - expected).max() < 12
    # The same inks, cyan, magenta and yellow as brightness and colour: transform 2 of Adobe's marker.
    ycc = np.asarray(Image.fromarray(inks[..., :3].copy()).convert("YCbCr"))
    components = np.concatenate([255 - ycc, inks[..., 3:]], axis=2)
    stored = Image.frombytes("CMYK", image.size, components.tobytes())
    raw = bytearray(encoded(stored, "JPEG", quality=95, subsampling=0))
    marker = raw.index(b"Adobe")
    raw[marker + 11] = 2
    assert np.abs(seen(bytes(raw)).astype(int) - expected).max() < 12


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=40, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames") == 3  # noqa: B009 - of some kinds only
    assert (seen(data) == RED).all()


def test_one_bit() -> None:
    data = encoded(Image.fromarray(larger([[0, 255, 0]])).convert("1"))
    assert seen(data)[0].tolist() == [[0] * 3, [255] * 3, [0] * 3]


@pytest.mark.parametrize("name", GOOD)
def test_good_images(name: str) -> None:
    assert decode_image(GOOD[name]).mode == "RGB"


@pytest.mark.parametrize("name", [name for name, data in BAD.items() if data])
def test_a_bad_image_says_why(name: str) -> None:
    data = BAD[name]
    assert data is not None and CAUSE_OF[name] in CAUSES
    with pytest.raises(UnreadableImageError) as problem:
        decode_image(data)
    assert problem.value.cause == CAUSE_OF[name]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_file_that_was_cut_off_is_truncated(kind: str, share: float) -> None:
    whole = photo(0, kind=kind)
    with pytest.raises(UnreadableImageError) as problem:
        decode_image(whole[: int(share * len(whole))])
    assert problem.value.cause == "truncated"
