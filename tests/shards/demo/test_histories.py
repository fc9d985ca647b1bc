"""The demo data: files, shares, determinism, and that order, text and images each carry signal.

The signal is measured without training: naive-Bayes oracles that know the attributes of the last item, with transition
counts taken from the training events (all but the last two of a history) and scored on the last item, the test target.
"""

from __future__ import annotations

import colorsys
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.features import PixelsFeature
from fmrl_dist.config.loading import DEMO_CONFIG, load_config
from shards.demo.catalogue import MOTIFS, NUM_HUES, NUM_LEAVES, NUM_TIERS, Attributes, make_attributes
from shards.demo.folder import FILES, write_demo
from shards.demo.histories import make_histories
from shards.demo.item_images import IMAGE_SIZE_PX
from shards.demo.words import BRANDS, LEAF_PATHS, MODEL_ENDS, MODEL_STARTS, MODEL_WORDS_PER_LEAF, TIER_WORDS
from tests.fixtures.processes import REPOSITORY

USERS, ITEMS, SEED = 3000, 2000, 0


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo_data")
    write_demo(root, USERS, ITEMS, SEED)
    return root / "demo"


@pytest.fixture(scope="module")
def attributes() -> Attributes:
    return make_attributes(ITEMS, SEED)


@pytest.fixture(scope="module")
def histories(demo: Path) -> list[NDArray[np.int64]]:
    """The histories as rows of the item table, read back from the files."""
    row = {item_id: row for row, item_id in enumerate(pq.read_table(demo / "items.parquet")["item_id"].to_pylist())}
    sequences = pq.read_table(demo / "sequences.parquet")["item_ids"].to_pylist()
    return [np.array([row[item_id] for item_id in sequence]) for sequence in sequences]


def test_config_fits_the_generator() -> None:
    data = load_config(DEMO_CONFIG).data
    image = data.features["image"]
    assert data.demo is not None and isinstance(image, PixelsFeature)
    assert (data.demo.users, data.demo.items, data.demo.seed) == (USERS, ITEMS, SEED)
    assert (data.sequences.path, data.items.path, image.path) == tuple(f"demo/{f}" for f in FILES)


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        write_demo(tmp_path / name, users=60, items=100, seed=seed)
    for file in FILES:
        one, two, other = ((tmp_path / name / "demo" / file).read_bytes() for name in ("one", "two", "other"))
        assert one == two, file
        assert one != other, file


def test_columns(demo: Path) -> None:
    columns = {file: {f.name: str(f.type) for f in pq.read_schema(demo / file)} for file in FILES}
    lists = "list<element: "
    assert columns["sequences.parquet"] == {
        "user_id": "string",
        "item_ids": f"{lists}string>",
        "timestamps": f"{lists}int64>",
    }
    assert columns["items.parquet"] == {
        "item_id": "string",
        "title": "string",
        "price": "double",
        "brand": "string",
        "categories": f"{lists}{lists}string>>",
    }
    assert columns["images.parquet"] == {"item_id": "string", "image": "binary"}


def test_histories_have_no_repeats_and_go_forward_in_time(demo: Path) -> None:
    table = pq.read_table(demo / "sequences.parquet")
    sequences, times = table["item_ids"].to_pylist(), table["timestamps"].to_pylist()
    lengths = np.array([len(sequence) for sequence in sequences])
    assert len(set(table["user_id"].to_pylist())) == USERS
    assert lengths.min() == 5
    assert lengths.max() <= 40
    assert 10 <= lengths.mean() <= 12
    assert all(len(set(sequence)) == len(sequence) for sequence in sequences)
    assert [len(time) for time in times] == lengths.tolist()
    assert all((np.diff(time) > 0).all() for time in times)


def test_items_are_mildly_long_tailed(histories: list[NDArray[np.int64]]) -> None:
    count = np.bincount(np.concatenate([history[:-2] for history in histories]), minlength=ITEMS)
    assert 0.3 < (count < 10).mean() < 0.6, "share of the items with fewer than ten training events"
    assert (count == 0).mean() < 0.03
    top_tenth = np.sort(count)[-ITEMS // 10 :].sum() / count.sum()
    assert 0.25 < top_tenth < 0.45


def test_text_tells_leaf_and_tier_but_neither_hue_nor_motif(demo: Path, attributes: Attributes) -> None:
    items = pq.read_table(demo / "items.parquet").to_pydict()
    assert len(set(items["item_id"])) == ITEMS
    assert None not in items["title"]
    assert abs(items["price"].count(None) / ITEMS - 0.05) < 0.02
    assert abs(items["brand"].count(None) / ITEMS - 0.15) < 0.03
    paths = [tuple(paths[0]) for paths in items["categories"]]
    assert paths == [(d, g, f"{leaf}s") for d, g, leaf in (LEAF_PATHS[row] for row in attributes.leaf)]
    assert 0.1 < np.mean([len(paths) == 2 for paths in items["categories"]]) < 0.3
    tier_of_brand = {brand: tier for tier, brands in enumerate(BRANDS) for brand in brands}
    tier_of_word = {word: tier for tier, words in enumerate(TIER_WORDS) for word in words}
    for row, (title, brand) in enumerate(zip(items["title"], items["brand"], strict=True)):
        assert brand is None or tier_of_brand[brand] == attributes.tier[row]
        assert all(tier_of_word.get(word, attributes.tier[row]) == attributes.tier[row] for word in title.split())
    assert len(MODEL_STARTS) * len(MODEL_ENDS) == NUM_LEAVES * MODEL_WORDS_PER_LEAF


def test_images_decode_and_show_the_hue(demo: Path, attributes: Attributes) -> None:
    images = pq.read_table(demo / "images.parquet").to_pydict()
    rows = [int(item_id.removeprefix("item-")) for item_id in images["item_id"]]
    assert len(set(rows)) == len(rows)
    assert abs(1 - len(rows) / ITEMS - 0.05) < 0.02
    wrong = 0
    for row, encoded in zip(rows[:400], images["image"][:400], strict=True):
        image = Image.open(io.BytesIO(encoded))
        assert (image.size, image.mode) == ((IMAGE_SIZE_PX, IMAGE_SIZE_PX), "RGB")
        pixels = np.asarray(image).reshape(-1, 3) / 255
        most_coloured = pixels[np.ptp(pixels, axis=1).argmax()]
        hue = int(colorsys.rgb_to_hsv(*most_coloured)[0] * NUM_HUES)
        wrong += hue != attributes.hue[row]
    assert wrong == 0


# --- signal ---------------------------------------------------------------------------------------------------------

Scores = Callable[[NDArray[np.int64]], NDArray[np.float64]]


@pytest.fixture(scope="module")
def log_popularity(histories: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    return np.log(1 + np.bincount(np.concatenate([history[:-2] for history in histories]), minlength=ITEMS))


@pytest.fixture(scope="module")
def log_lift(histories: list[NDArray[np.int64]], attributes: Attributes) -> dict[str, NDArray[np.float64]]:
    """For each attribute [V, V]: log of P(next item's value | last item's value) / P(value), from training events."""
    lifts = {}
    last = np.concatenate([history[:-3] for history in histories])
    following = np.concatenate([history[1:-2] for history in histories])
    for name, values in (("leaf", NUM_LEAVES), ("tier", NUM_TIERS), ("hue", NUM_HUES), ("motif", len(MOTIFS))):
        of_item = getattr(attributes, name)
        count = np.zeros((values, values))
        np.add.at(count, (of_item[last], of_item[following]), 1)
        prior = (1 + count.sum(axis=0)) / (1 + count.sum(axis=0)).sum()
        lift = (count + 5 * prior) / (count.sum(axis=1, keepdims=True) + 5) / prior
        lifts[name] = np.log(lift)[of_item][:, of_item]
    return lifts


def ndcg_at_10(histories: list[NDArray[np.int64]], scores: Scores) -> float:
    """Mean over the users of 1 / log2(1 + rank) of the last item, 0 beyond rank 10; ties count half."""
    total = 0.0
    for history in histories:
        score, target = scores(history[:-1]), history[-1]
        rank = 1 + (score > score[target]).sum() + 0.5 * ((score == score[target]).sum() - 1)
        total += 1 / np.log2(1 + rank) if rank <= 10 else 0.0
    return total / len(histories)


@pytest.fixture(scope="module")
def oracle(
    log_popularity: NDArray[np.float64], log_lift: dict[str, NDArray[np.float64]]
) -> Callable[[tuple[str, ...]], Scores]:
    """Scores from the popularity and from the given attributes of the last item."""
    return lambda names: lambda history: log_popularity + sum(log_lift[name][history[-1]] for name in names)


TEXT, IMAGE = ("leaf", "tier"), ("hue", "motif")


def test_attributes_of_the_last_item_beat_popularity(
    histories: list[NDArray[np.int64]], oracle: Callable[[tuple[str, ...]], Scores]
) -> None:
    popularity, both = ndcg_at_10(histories, oracle(())), ndcg_at_10(histories, oracle(TEXT + IMAGE))
    assert 0.005 < popularity < 0.025  # 0.0147
    assert both > 0.2  # 0.268


def test_text_and_image_both_carry_signal(
    histories: list[NDArray[np.int64]], oracle: Callable[[tuple[str, ...]], Scores]
) -> None:
    popularity, text, image, both = (ndcg_at_10(histories, oracle(names)) for names in ((), TEXT, IMAGE, TEXT + IMAGE))
    assert text > 5 * popularity  # 0.140
    assert image > 2.5 * popularity  # 0.051
    assert both > 1.5 * text
    assert both > 3 * image


def test_tastes_carry_signal(histories: list[NDArray[np.int64]], oracle: Callable[[tuple[str, ...]], Scores]) -> None:
    assert ndcg_at_10(histories, oracle(TEXT + IMAGE)) > 1.04 * ndcg_at_10(histories, oracle(("leaf", "hue")))


def test_order_matters(histories: list[NDArray[np.int64]], oracle: Callable[[tuple[str, ...]], Scores]) -> None:
    rng = np.random.default_rng(0)
    shuffled = [np.append(rng.permutation(history[:-1]), history[-1]) for history in histories]
    scores = oracle(TEXT + IMAGE)
    assert ndcg_at_10(shuffled, scores) < 0.3 * ndcg_at_10(histories, scores)  # 0.043


def test_attributes_beat_ids(
    histories: list[NDArray[np.int64]],
    log_popularity: NDArray[np.float64],
    oracle: Callable[[tuple[str, ...]], Scores],
) -> None:
    """The same oracle over ids (counts of item pairs, popularity where there are none) has too few events."""
    pairs = np.zeros((ITEMS, ITEMS), np.float32)
    for history in histories:
        np.add.at(pairs, (history[:-3], history[1:-2]), 1)
    ids = ndcg_at_10(histories, lambda history: 100 * pairs[history[-1]] + log_popularity)
    assert ndcg_at_10(histories, oracle(TEXT + IMAGE)) > 1.3 * ids  # 0.173


# --- the command ----------------------------------------------------------------------------------------------------


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shards.demo", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_command_writes_once_and_refuses_another_seed(tmp_path: Path) -> None:
    arguments = ("--out", str(tmp_path), "--users", "30", "--items", "40")
    assert run_demo(*arguments).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == sorted(FILES)
    before = (tmp_path / "demo" / FILES[0]).stat().st_mtime_ns
    assert run_demo(*arguments).returncode == 0
    other = run_demo(*arguments, "--seed", "1")
    assert other.returncode == 2
    assert other.stderr.count("\n") == 1
    assert "'seed': 0" in other.stderr
    assert (tmp_path / "demo" / FILES[0]).stat().st_mtime_ns == before


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "sequences.parquet").write_text("mine")
    with pytest.raises(UserError, match="no demo data of ours"):
        write_demo(tmp_path, users=30, items=40, seed=0)
    assert (tmp_path / "demo" / "sequences.parquet").read_text() == "mine"


def test_folder_with_a_missing_file_is_refused(tmp_path: Path) -> None:
    write_demo(tmp_path, users=30, items=40, seed=0)
    (tmp_path / "demo" / "images.parquet").unlink()
    with pytest.raises(UserError, match="images.parquet holds no demo data"):
        write_demo(tmp_path, users=30, items=40, seed=0)


@pytest.mark.parametrize(("users", "items", "seed"), [(0, 40, 0), (30, 9, 0), (30, 40, -1)])
def test_impossible_numbers(tmp_path: Path, users: int, items: int, seed: int) -> None:
    with pytest.raises(UserError, match="expected at least"):
        write_demo(tmp_path, users, items, seed)
    assert list(tmp_path.iterdir()) == []


def test_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_demo(tmp_path / "root", users=30, items=40, seed=0)


def test_small_catalogue() -> None:
    histories = make_histories(make_attributes(10, 0), users=50, seed=0).items
    assert {len(history) for history in histories} == {5}
    assert all(len(set(history.tolist())) == 5 for history in histories)
