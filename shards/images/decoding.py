"""From the bytes of an untrusted image file to RGB pixels, as people see them.

Only raster formats are opened, and the size is checked before any pixel is decoded. Colours are those that the file's
numbers stand for in sRGB: colour profiles are not applied.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from shards.images.causes import UnreadableImageError

DECODING = 3  # raise it when decode_image gives other pixels: finished blocks of an encoding are then not reused
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64_000_000
MIN_SIDE = 8  # pixels; what is smaller shows nothing, like the 1 x 1 images that count visits
MAX_ASPECT = 100  # long side to short side: resized to a short side of hundreds, a line would fill the memory
PNG_DEPTH = 24  # byte of a PNG that says how many bits a channel has


def decode_image(data: bytes, side: int | None = None) -> Image.Image:
    """An RGB image from encoded bytes, upright, on white.

    Its EXIF orientation is applied, so that it is as people see it. What is transparent shows a white page, as in a
    shop; the colour that a file happens to hold under full transparency does not count. Of an animation it is the
    first frame. 16 bits are scaled to 8.

    Args:
        data: a file's content.
        side: a JPEG may be decoded at a fraction of its size if both sides remain at least this long; None: never.

    Raises:
        UnreadableImageError: with its cause: not an image, truncated, bomb, too small, aspect or damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MAX_PIXELS is below Pillow's own limit; damaged metadata are no news
        try:
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError:
            raise UnreadableImageError("bomb") from None
        except Exception:  # noqa: BLE001 - a malformed file can make Pillow's parsers raise anything
            raise UnreadableImageError(_cause(data)) from None
        _check_size(*image.size)
        try:
            if side is not None:
                image.draft("RGB", (side, side))
            return _on_white(_eight_bit(_upright(image), data)).convert("RGB")
        except Exception:  # noqa: BLE001 - and its decoders likewise
            raise UnreadableImageError(_cause(data)) from None


def _check_size(width: int, height: int) -> None:
    short, long = sorted((width, height))
    if width * height > MAX_PIXELS:
        raise UnreadableImageError("bomb")
    if short < MIN_SIDE:
        raise UnreadableImageError("too small")
    if long > MAX_ASPECT * short:
        raise UnreadableImageError("aspect")


def _cause(data: bytes) -> str:
    """What is wrong with a file that cannot be decoded: told from its first and last bytes."""
    is_cut = _is_cut_short(data)
    if is_cut is None:
        return "not an image" if data else "truncated"
    return "truncated" if is_cut else "damaged"


def _is_cut_short(data: bytes) -> bool | None:
    """Whether a file lacks its end; None where it does not begin like one of :data:`FORMATS`."""
    end = data[-64:].rstrip(b"\0\r\n ")  # some writers pad
    if data.startswith(b"\xff\xd8\xff"):
        return not end.endswith(b"\xff\xd9")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" not in end
    if data.startswith((b"GIF87a", b"GIF89a")):
        return not end.endswith(b";")
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data.startswith(b"BM") and data[6:10] == bytes(4):
        return int.from_bytes(data[2:6], "little") > len(data)
    return None


def _upright(image: Image.Image) -> Image.Image:
    """As its EXIF orientation says; as it is where its EXIF data are damaged."""
    image.load()  # a file whose pixels cannot be decoded raises here
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - malformed EXIF data can make Pillow's parser raise anything
        return image


def _eight_bit(image: Image.Image, data: bytes) -> Image.Image:
    """An image whose pixels, and the colour that it names as transparent, have 8 bits per channel.

    ``convert`` would clip 16-bit grey instead of scaling it, and Pillow keeps the transparent colour of a PNG in the
    depth of the file.
    """
    clear = image.info.get("transparency")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        grey = (pixels >> 8).astype(np.uint8)
        if isinstance(clear, int):
            grey[pixels == clear] = 255
        return Image.fromarray(grey)
    if data.startswith(b"\x89PNG") and data[PNG_DEPTH] != 8 and image.mode in ("L", "RGB") and clear is not None:
        depth = data[PNG_DEPTH]
        values = clear if isinstance(clear, tuple) else (clear,)
        scaled = tuple(value >> 8 if depth == 16 else value * 255 // (2**depth - 1) for value in values)
        image.info["transparency"] = scaled if isinstance(clear, tuple) else scaled[0]
    return image


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image.convert("RGBA"))
    return page
