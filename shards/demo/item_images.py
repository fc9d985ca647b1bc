"""The demo's image table: pictures that show an item's hue and motif."""

from __future__ import annotations

import colorsys
import io

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from shards.demo.catalogue import MOTIFS, NUM_HUES, Attributes

IMAGE_SIZE_PX = 40
SHARE_NO_IMAGE = 0.05
IMAGE_SCHEMA = pa.schema([("item_id", pa.string()), ("image", pa.binary())])


def image_table(attributes: Attributes, ids: list[str], seed: int) -> pa.Table:
    """``item_id, image`` (PNG bytes); items without an image have no row."""
    rng = np.random.default_rng([seed, 4])
    rows = np.flatnonzero(rng.random(len(ids)) >= SHARE_NO_IMAGE).tolist()
    images = [draw_image(int(attributes.hue[row]), MOTIFS[attributes.motif[row]], rng) for row in rows]
    return pa.table({"item_id": [ids[row] for row in rows], "image": images}, schema=IMAGE_SCHEMA)


def draw_image(hue: int, motif: str, rng: np.random.Generator) -> bytes:
    """A PNG, ``IMAGE_SIZE_PX`` squared: the motif in a shade of the hue, near the middle of a grey background."""
    scale = 2  # drawn larger, then averaged down, for smooth edges
    angle = (hue + 0.5 + rng.uniform(-0.2, 0.2)) / NUM_HUES
    shade = colorsys.hsv_to_rgb(angle, rng.uniform(0.7, 1), rng.uniform(0.6, 1))
    colour = tuple(round(255 * channel) for channel in shade)
    background = (int(rng.integers(190, 250)),) * 3
    x, y = IMAGE_SIZE_PX * scale * (0.5 + rng.uniform(-0.08, 0.08, size=2))
    radius = IMAGE_SIZE_PX * scale * rng.uniform(0.28, 0.4)
    box = (x - radius, y - radius, x + radius, y + radius)
    image = Image.new("RGB", (IMAGE_SIZE_PX * scale, IMAGE_SIZE_PX * scale), background)
    draw = ImageDraw.Draw(image)
    if motif == "disc":
        draw.ellipse(box, fill=colour)
    elif motif == "square":
        draw.rectangle(box, fill=colour)
    elif motif == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    elif motif == "ring":
        draw.ellipse(box, outline=colour, width=round(radius * 0.45))
    else:
        for left in np.linspace(x - radius, x + radius, 7)[:-1:2]:
            draw.rectangle((left, y - radius, left + radius / 3, y + radius), fill=colour)
    encoded = io.BytesIO()
    image.reduce(scale).save(encoded, format="PNG")
    return encoded.getvalue()
