"""The demo data: a small invented shop, generated from a seed.

    python -m shards.demo --out data --users 3000 --items 2000 --seed 0

An item has a leaf of a category tree, a price tier, a hue and a motif. The text shows leaf and tier (title, price,
brand, categories), the image alone shows hue and motif, so neither is enough without the other. A history is a Markov
chain over the items, and the weight of the next item is a product of

* a category transition: the leaf that follows in its group (kettle, teapot, infuser, …), or one of two companion
  leaves from anywhere;
* a step on the wheel of hues: the previous item's hue, or more often the next one, which makes the order matter;
* the user's taste for a tier and for a motif, which drifts: from time to time it is drawn anew;
* the item's popularity, mildly long-tailed, so that most items have too few events to be learnt by their id alone.

No item comes twice in a history. Each factor adds to the logarithm of the weight, which is the form of a softmax over
dot products of a state with item embeddings: a small model can learn it. The 3,000 histories over 2,000 items take
about three seconds on one core. All names are invented.

Shapes: U users, V items, L leaves.
"""

from __future__ import annotations

import argparse
import colorsys
import io
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fmrl_dist.base.errors import UserError, run_command
from fmrl_dist.config.sections import DemoConfig
from shards.demo.words import (
    ADJECTIVES,
    BRANDS,
    LEAF_PATHS,
    MODEL_ENDS,
    MODEL_STARTS,
    MODEL_WORDS_PER_LEAF,
    TIER_WORDS,
)

NUM_LEAVES, LEAVES_PER_GROUP, LEAVES_PER_DEPARTMENT = len(LEAF_PATHS), 4, 16
NUM_TIERS = 3
TIER_PRICE_FACTOR, TIER_CENTS = (0.5, 1.0, 2.2), (0.99, 0.5, 0.0)  # as in shops: cheap things end in 99
SHARE_TIER_WORD, SHARE_SECOND_PATH = 0.7, 0.2
SHARE_NO_PRICE, SHARE_NO_BRAND, SHARE_NO_IMAGE = 0.05, 0.15, 0.05

NUM_HUES = 8
MOTIFS = ("disc", "square", "triangle", "ring", "bars")
IMAGE_SIZE_PX = 40

POPULARITY_SIGMA = 0.8  # of the log-normal weights
# Weights of the next item, relative to an unrelated leaf, hue, tier or motif (1).
DEPARTMENT_WEIGHT, SAME_LEAF_WEIGHT, COMPANION_WEIGHT, SUCCESSOR_WEIGHT = 2.0, 8.0, 40.0, 80.0
NUM_COMPANIONS = 2
SAME_HUE_WEIGHT, NEXT_HUE_WEIGHT = 10.0, 40.0
TIER_WEIGHT, MOTIF_WEIGHT = 6.0, 3.0
TASTE_DRIFT = 0.06  # probability per event that a taste is drawn anew

MIN_EVENTS, MAX_EVENTS, MEAN_EXTRA_EVENTS = 5, 40, 6.5
FIRST_TIME_S, START_SPAN_S, MEAN_GAP_S = 1_600_000_000, 365 * 86_400, 5 * 86_400
USERS_AT_ONCE = 512  # bounds the [users, V] weights in memory

ITEM_SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("price", pa.float64()),
        ("brand", pa.string()),
        ("categories", pa.list_(pa.list_(pa.string()))),
    ]
)
IMAGE_SCHEMA = pa.schema([("item_id", pa.string()), ("image", pa.binary())])
SEQUENCE_SCHEMA = pa.schema(
    [("user_id", pa.string()), ("item_ids", pa.list_(pa.string())), ("timestamps", pa.list_(pa.int64()))]
)
FILES = ("sequences.parquet", "items.parquet", "images.parquet")
ORIGIN_KEY = b"fmrl_dist_demo"  # Parquet metadata: the arguments that the tables were generated with


@dataclass(frozen=True)
class Attributes:
    """What the items are, beneath text and image. All arrays are [V]."""

    leaf: NDArray[np.int64]  # index into LEAF_PATHS
    tier: NDArray[np.int64]  # 0 cheap … 2 dear
    hue: NDArray[np.int64]  # place on the wheel of NUM_HUES
    motif: NDArray[np.int64]  # index into MOTIFS
    popularity: NDArray[np.float64]  # weight of the item, beside its attributes


@dataclass(frozen=True)
class DemoHistories:
    """Whole histories, oldest event first; one array a user."""

    items: list[NDArray[np.int64]]  # rows of the item table
    times: list[NDArray[np.int64]]  # Unix seconds, increasing


def make_attributes(items: int, seed: int) -> Attributes:
    """Draw the latent attributes of ``items`` items; leaves are of equal size, give or take one."""
    rng = np.random.default_rng([seed, 0])
    return Attributes(
        leaf=rng.permutation(np.arange(items) % NUM_LEAVES),
        tier=rng.integers(NUM_TIERS, size=items),
        hue=rng.integers(NUM_HUES, size=items),
        motif=rng.integers(len(MOTIFS), size=items),
        popularity=rng.lognormal(0.0, POPULARITY_SIGMA, size=items),
    )


def leaf_transitions(seed: int) -> NDArray[np.float64]:
    """Weights [L, L] of the leaf of the next item, given the leaf of the last one."""
    leaf = np.arange(NUM_LEAVES)
    place = leaf % LEAVES_PER_GROUP
    successor = leaf - place + (place + 1) % LEAVES_PER_GROUP
    rng = np.random.default_rng([seed, 1])
    companions = [rng.permutation(NUM_LEAVES) for _ in range(NUM_COMPANIONS)]
    department = leaf // LEAVES_PER_DEPARTMENT
    weights = np.where(department[:, None] == department, DEPARTMENT_WEIGHT, 1.0)
    weights[leaf, leaf] = SAME_LEAF_WEIGHT
    for companion in companions:
        weights[leaf, companion] = COMPANION_WEIGHT
    weights[leaf, successor] = SUCCESSOR_WEIGHT
    return weights


def hue_transitions() -> NDArray[np.float64]:
    """Weights [hues, hues] of the hue of the next item, given the hue of the last one."""
    identity = np.eye(NUM_HUES)
    return 1.0 + (SAME_HUE_WEIGHT - 1) * identity + (NEXT_HUE_WEIGHT - 1) * np.roll(identity, 1, axis=1)


def make_histories(attributes: Attributes, users: int, seed: int) -> DemoHistories:
    """Draw ``users`` histories of 5 to 40 items (mean about 11), never more than half of the catalogue."""
    rng = np.random.default_rng([seed, 2])
    longest = min(MAX_EVENTS, len(attributes.leaf) // 2)
    lengths = np.minimum(MIN_EVENTS + rng.exponential(MEAN_EXTRA_EVENTS, size=users).astype(np.int64), longest)
    transitions = leaf_transitions(seed)
    items: list[NDArray[np.int64]] = []
    for first in range(0, users, USERS_AT_ONCE):
        items += _draw_items(attributes, transitions, lengths[first : first + USERS_AT_ONCE], rng)
    gaps = [rng.exponential(MEAN_GAP_S, size=n).astype(np.int64) + 1 for n in lengths]
    starts = FIRST_TIME_S + rng.integers(START_SPAN_S, size=users)
    return DemoHistories(items, [start + np.cumsum(gap) for start, gap in zip(starts, gaps, strict=True)])


def _draw_items(
    attributes: Attributes, transitions: NDArray[np.float64], lengths: NDArray[np.int64], rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Draw all histories of one group of users side by side, one event at a time."""
    by_leaf = transitions[:, attributes.leaf].astype(np.float32)  # [L, V]: weights by the last item's leaf
    by_hue = hue_transitions()[:, attributes.hue].astype(np.float32)
    by_tier = np.where(np.arange(NUM_TIERS)[:, None] == attributes.tier, TIER_WEIGHT, 1.0).astype(np.float32)
    by_motif = np.where(np.arange(len(MOTIFS))[:, None] == attributes.motif, MOTIF_WEIGHT, 1.0).astype(np.float32)
    unseen = np.tile(attributes.popularity.astype(np.float32), (len(lengths), 1))  # [U, V], 0 where seen
    tier = rng.integers(NUM_TIERS, size=len(lengths))
    motif = rng.integers(len(MOTIFS), size=len(lengths))
    drawn = np.zeros((len(lengths), lengths.max()), np.int64)
    for event in range(lengths.max()):
        active = np.flatnonzero(lengths > event)
        weights = unseen[active] * by_tier[tier[active]] * by_motif[motif[active]]
        if event > 0:
            last = drawn[active, event - 1]
            weights *= by_leaf[attributes.leaf[last]]
            weights *= by_hue[attributes.hue[last]]
        # The largest of weight / Exp(1) is a draw in proportion to the weights (exponential race).
        arrivals = np.maximum(rng.standard_exponential(weights.shape, np.float32), 1e-12)  # float32 draws can be 0
        drawn[active, event] = (weights / arrivals).argmax(axis=1)
        unseen[active, drawn[active, event]] = 0
        tier = np.where(rng.random(len(tier)) < TASTE_DRIFT, rng.integers(NUM_TIERS, size=len(tier)), tier)
        motif = np.where(rng.random(len(motif)) < TASTE_DRIFT, rng.integers(len(MOTIFS), size=len(motif)), motif)
    return [row[:length] for row, length in zip(drawn, lengths, strict=True)]


def item_table(attributes: Attributes, ids: list[str], seed: int) -> pa.Table:
    """The text side: ``item_id, title, price, brand, categories``; some prices and brands are missing."""
    rng = np.random.default_rng([seed, 3])
    leaf_price = rng.lognormal(3.2, 0.7, size=NUM_LEAVES)
    columns: dict[str, list[object]] = {"item_id": [*ids], "title": [], "price": [], "brand": [], "categories": []}
    for leaf, tier in zip(attributes.leaf.tolist(), attributes.tier.tolist(), strict=True):
        department, group, noun = LEAF_PATHS[leaf]
        word = leaf * MODEL_WORDS_PER_LEAF + int(rng.integers(MODEL_WORDS_PER_LEAF))
        model = (MODEL_STARTS[word // len(MODEL_ENDS)] + MODEL_ENDS[word % len(MODEL_ENDS)]).capitalize()
        tier_word = [str(rng.choice(TIER_WORDS[tier]))] if rng.random() < SHARE_TIER_WORD else []
        columns["title"].append(" ".join([model, *tier_word, str(rng.choice(ADJECTIVES)), noun]))
        price = leaf_price[leaf] * TIER_PRICE_FACTOR[tier] * rng.lognormal(0.0, 0.15)
        columns["price"].append(None if rng.random() < SHARE_NO_PRICE else float(np.ceil(price)) + TIER_CENTS[tier])
        columns["brand"].append(None if rng.random() < SHARE_NO_BRAND else str(rng.choice(BRANDS[tier])))
        second = [["Gifts", f"{department} Gifts"]] if rng.random() < SHARE_SECOND_PATH else []
        columns["categories"].append([[department, group, f"{noun}s"], *second])
    return pa.table(columns, schema=ITEM_SCHEMA)


def image_table(attributes: Attributes, ids: list[str], seed: int) -> pa.Table:
    """The image side: ``item_id, image`` (PNG bytes); items without an image have no row."""
    rng = np.random.default_rng([seed, 4])
    rows = np.flatnonzero(rng.random(len(ids)) >= SHARE_NO_IMAGE).tolist()
    images = [draw_image(int(attributes.hue[row]), MOTIFS[attributes.motif[row]], rng) for row in rows]
    return pa.table({"item_id": [ids[row] for row in rows], "image": images}, schema=IMAGE_SCHEMA)


def draw_image(hue: int, motif: str, rng: np.random.Generator) -> bytes:
    """A PNG, ``IMAGE_SIZE_PX`` squared: the motif in a shade of the hue, near the middle of a grey ground."""
    scale = 2  # drawn larger, then averaged down: smooth edges
    angle = (hue + 0.5 + rng.uniform(-0.2, 0.2)) / NUM_HUES
    shade = colorsys.hsv_to_rgb(angle, rng.uniform(0.7, 1), rng.uniform(0.6, 1))
    colour = tuple(round(255 * channel) for channel in shade)
    ground = (int(rng.integers(190, 250)),) * 3
    x, y = IMAGE_SIZE_PX * scale * (0.5 + rng.uniform(-0.08, 0.08, size=2))
    radius = IMAGE_SIZE_PX * scale * rng.uniform(0.28, 0.4)
    box = (x - radius, y - radius, x + radius, y + radius)
    image = Image.new("RGB", (IMAGE_SIZE_PX * scale, IMAGE_SIZE_PX * scale), ground)
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


def sequence_table(histories: DemoHistories, ids: list[str]) -> pa.Table:
    """``user_id, item_ids, timestamps``, one row a user, oldest event first."""
    users = [f"user-{row:06d}" for row in range(len(histories.items))]
    item_ids = [[ids[row] for row in rows.tolist()] for rows in histories.items]
    times = [time.tolist() for time in histories.times]
    return pa.table({"user_id": users, "item_ids": item_ids, "timestamps": times}, schema=SEQUENCE_SCHEMA)


def write_demo(root: Path, users: int, items: int, seed: int) -> None:
    """Write ``root/demo/{sequences,items,images}.parquet``, all or nothing; the same arguments give the same bytes.

    A folder that already holds this very demo data is left as it is.

    Raises:
        UserError: a number is out of range, or ``root/demo`` exists and holds something else.
    """
    for name, value, least in (("users", users, 1), ("items", items, 2 * MIN_EVENTS), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"the demo's {name} is {value}; expected at least {least}")
    folder = root / "demo"
    origin = {"users": users, "items": items, "seed": seed}
    if folder.exists():
        _check_same(folder, FILES, origin)
        return
    attributes = make_attributes(items, seed)
    ids = [f"item-{row:06d}" for row in range(items)]
    tables = (
        sequence_table(make_histories(attributes, users, seed), ids),
        item_table(attributes, ids, seed),
        image_table(attributes, ids, seed),
    )
    _write_folder(folder, dict(zip(FILES, tables, strict=True)), origin)


def _write_folder(folder: Path, tables: dict[str, pa.Table], origin: dict[str, int]) -> None:
    """Write the tables beside ``folder``, then rename: it appears whole or not at all."""
    aside = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        for name, table in tables.items():
            pq.write_table(table.replace_schema_metadata({ORIGIN_KEY: json.dumps(origin)}), aside / name)
        aside.rename(folder)
    except OSError as error:
        raise UserError(f"the demo data cannot be written to {folder}: {error}; choose another data.root") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_same(folder: Path, files: Iterable[str], origin: dict[str, int]) -> None:
    """Refuse a folder whose files were not all generated with the arguments ``origin``."""
    for file in files:
        try:
            found = json.loads((pq.read_schema(folder / file).metadata or {})[ORIGIN_KEY])
        except (OSError, pa.ArrowInvalid, KeyError, ValueError):
            found = "no demo data of ours"
        if found != origin:
            raise UserError(
                f"{folder} exists, but its {file} holds {found}; expected {origin}: remove {folder}, "
                "or choose another data.root"
            )


def main(argv: list[str]) -> None:
    default = DemoConfig()
    parser = argparse.ArgumentParser(prog="python -m shards.demo", description="Generate the demo's raw tables.")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder in which demo/ is made (default: data)")
    parser.add_argument("--users", type=int, default=default.users)
    parser.add_argument("--items", type=int, default=default.items)
    parser.add_argument("--seed", type=int, default=default.seed)
    arguments = parser.parse_args(argv)
    write_demo(arguments.out, arguments.users, arguments.items, arguments.seed)
    print(f"{arguments.out / 'demo'}: {arguments.users} users, {arguments.items} items, seed {arguments.seed}")


if __name__ == "__main__":
    run_command(main)
