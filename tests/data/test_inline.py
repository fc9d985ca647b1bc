"""Inline stores: features are stored with the histories, negatives come from the item shards, nothing holds all items.

Training and evaluation must give the same results as with a table of all items, for the same negatives.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrl_dist import evaluate, export, train
from fmrl_dist.base.errors import UserError
from fmrl_dist.checkpoint.folder import load_checkpoint
from fmrl_dist.config.loading import load_config
from fmrl_dist.config.sections import Config
from fmrl_dist.data.batches import Packed, evaluation_blocks
from fmrl_dist.data.feed import BatchFeed
from fmrl_dist.data.item_rows import ItemRows, merge, pick
from fmrl_dist.data.item_table import load_item_table
from fmrl_dist.data.negatives import NegativeSampler, make_sampler
from fmrl_dist.data.order import Order
from fmrl_dist.data.store.block_arrays import user_problems
from fmrl_dist.data.store.manifest import VOCAB_FILE, Block
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.streamed_negatives import StreamedNegatives
from fmrl_dist.data.train_stream import TrainStream
from fmrl_dist.data.windows import WindowRule
from fmrl_dist.distributed.processes import start_runtime
from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.evaluation.catalogue import EmbeddedCatalogue, StreamedCatalogue
from fmrl_dist.evaluation.ranker import ranker_of_checkpoint
from fmrl_dist.losses.settings import LossSettings
from fmrl_dist.training.build_model import build_inline_model, build_model
from fmrl_dist.training.checks import check_inline
from fmrl_dist.training.item_columns import catalogue_columns
from fmrl_dist.training.module import TrainingModule
from shards.inspect import describe
from shards.store.builder import build_store
from shards.store.problems import store_problems
from tests.fixtures.item_encoders import projection_of
from tests.fixtures.processes import run_processes
from tests.fixtures.ranking import histograms
from tests.fixtures.training import (
    FEATURE_DIMS,
    NUM_ITEMS,
    STEPS_PER_EPOCH,
    evaluation,
    figures,
    records,
    refusal,
    run_here,
    shop_values,
    train_here,
    write_shop,
)

KINDS = ["uniform", "in_batch", "mixed", "stratified"]
DIMS = FEATURE_DIMS | {"words": 3}
NUM_DRAWN = 5
CPU = torch.device("cpu")
NO_DROPOUT = ["--model.dropout", "0", "--model.lru_dropout", "0"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config whose store is inline; every third item has no title and so lacks the feature ``words``."""
    root = tmp_path_factory.mktemp("inline")
    write_shop(root / "raw")
    items = pq.read_table(root / "raw" / "items.parquet")
    titles = [None if row % 3 == 0 else title for row, title in enumerate(items["title"].to_pylist())]
    column = items.schema.get_field_index("title")
    pq.write_table(items.set_column(column, "title", pa.array(titles)), root / "raw" / "items.parquet")
    values = shop_values(root)
    values["data"]["features"]["words"] = {"source": "tfidf", "dim": DIMS["words"], "text": ["{title}"]}
    values["store"]["feature_mode"] = "inline"
    values["train"]["shuffle_blocks"] = 3
    values["loss"] = {"softmax": "sampled", "negatives": "mixed", "num_negatives": NUM_DRAWN}
    config = root / "inline.yaml"
    config.write_text(yaml.safe_dump(values, sort_keys=False))
    build_store(load_config(config))
    return config


@pytest.fixture(scope="module")
def store(shop: Path) -> Store:
    return Store.open(load_config(shop).store.path)


def test_a_block_carries_the_features_of_its_items(store: Store) -> None:
    table = load_item_table(store, None)
    counts = pq.read_table(store.path / VOCAB_FILE)["train_count"].to_numpy()
    assert not table.present[:, 2].all()
    for split in ("train", "valid", "test"):
        for block in store.manifest.splits[split]:
            arrays = store.read_block(block)
            ids = arrays["block_items"]
            assert ids.tolist() == sorted({*arrays["items"].tolist()})
            assert np.array_equal(arrays["block_counts"], counts[ids])
            values = np.concatenate([arrays[name] for name in DIMS], 1)
            assert np.array_equal(values, table.values[ids].numpy())
            assert np.array_equal(arrays["words.mask"], table.present[ids, 2].numpy())
    assert list(store_problems(store)) == []
    assert "inline" in describe(store)


def test_item_shards_are_those_of_a_table_store(shop: Path, store: Store, tmp_path: Path) -> None:
    other, _ = build_store(
        load_config(shop, ["--store.feature_mode", "table", "--store.path", str(tmp_path / "table")])
    )
    assert [block.sha256 for block in other.manifest.items] == [block.sha256 for block in store.manifest.items]
    assert other.manifest.sha256 != store.manifest.sha256
    assert set(other.read_block(other.manifest.splits["train"][0])) == {"users", "starts", "items"}


def forge(arrays: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    forged = {name: array.copy() for name, array in arrays.items()}
    match kind:
        case "unsorted":
            forged["block_items"] = forged["block_items"][::-1].copy()
        case "another item":
            forged["block_items"][-1] += 1
        case "one more":
            for name in set(forged) - {"users", "starts", "items"}:
                forged[name] = np.concatenate((forged[name], forged[name][-1:]))
        case "matrix":
            forged["block_items"] = forged["block_items"][None]
        case "no features":
            del forged["vector"]
        case "wide":
            forged["vector"] = np.concatenate([forged["vector"]] * 2, 1)
        case "few rows":
            forged["vector"] = forged["vector"][:-1]
        case "float32":
            forged["vector"] = forged["vector"].astype(np.float32)
        case "nan":
            forged["vector"][3, 1] = np.nan
        case "not absent":
            forged["words"][~forged["words.mask"]] = 1
        case "negative count":
            forged["block_counts"][0] = -1
        case "plain":
            forged = {name: forged[name] for name in ("users", "starts", "items")}
    return forged


FORGED = ["unsorted", "another item", "one more", "matrix", "no features", "wide", "few rows", "float32", "nan"]


@pytest.mark.parametrize("kind", [*FORGED, "not absent", "negative count", "plain"])
def test_a_forged_block_is_refused(kind: str, store: Store) -> None:
    block = store.manifest.splits["train"][0]
    arrays = store.read_block(block)
    assert list(user_problems(arrays, block, store.manifest)) == []
    assert list(user_problems(forge(arrays, kind), block, store.manifest)) != []


@st.composite
def sources(draw: st.DrawFn) -> list[ItemRows]:
    ids = draw(st.lists(st.sets(st.integers(0, 30)), min_size=1, max_size=5))
    return [rows_of(np.array(sorted(part), np.int64)) for part in ids]


def rows_of(ids: np.ndarray) -> ItemRows:
    """Rows that are a function of the ids."""
    return ItemRows(ids, np.stack((ids, ids + 100), 1).astype(np.float16), (ids % 2 == 0)[:, None])


def assert_rows(found: ItemRows, ids: Sequence[int]) -> None:
    expected = rows_of(np.array(ids, np.int64))
    for name, array in vars(expected).items():
        assert np.array_equal(getattr(found, name), array) and getattr(found, name).dtype == array.dtype


@given(parts=sources(), data=st.data())
def test_merging_and_picking(parts: list[ItemRows], data: st.DataObject) -> None:
    known = sorted({int(item) for part in parts for item in part.ids})
    assert_rows(merge(parts, {"a": 2}), known)
    wanted = sorted(data.draw(st.sets(st.sampled_from(known)))) if known else []
    assert_rows(pick(np.array(wanted, np.int64), parts, {"a": 2}), wanted)


@settings(max_examples=25, deadline=None)
@given(num_drawn=st.integers(1, 90), seed=st.integers(0, 9), lane=st.integers(0, 15), begin=st.integers(0, 30))
def test_each_pass_of_a_walk_takes_every_item_once(
    store: Store, num_drawn: int, seed: int, lane: int, begin: int
) -> None:
    walk = StreamedNegatives(store, DIMS, num_drawn, seed)
    first, last = begin * num_drawn, (begin + 12) * num_drawn
    drawn = np.concatenate([walk.read(step, [lane])[0].ravel() for step in range(begin, begin + 12)])
    assert len(drawn) == last - first
    for low in range(-(-first // NUM_ITEMS) * NUM_ITEMS, last - NUM_ITEMS + 1, NUM_ITEMS):
        assert sorted(drawn[low - first : low - first + NUM_ITEMS]) == list(range(NUM_ITEMS))


def test_lanes_seeds_and_passes_walk_differently(store: Store) -> None:
    passes = [
        StreamedNegatives(store, DIMS, NUM_ITEMS, seed).read(number, [lane])[0].ravel().tolist()
        for seed, number, lane in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 5, 5)]
    ]
    assert len({*map(tuple, passes)}) > 1
    walk = StreamedNegatives(store, DIMS, NUM_ITEMS, 0)
    assert walk.read(0, [0, 1])[0].tolist() == passes[:2]


def test_a_walk_has_the_features_of_its_items_and_holds_few_blocks(store: Store) -> None:
    table, walk = load_item_table(store, None), StreamedNegatives(store, DIMS, NUM_DRAWN, 3)
    for step in range(20):
        drawn, brought = walk.read(step, [2, 7])
        found = pick(np.unique(drawn), brought, DIMS)
        assert np.array_equal(found.values, table.values[found.ids].numpy())
        assert np.array_equal(found.present, table.present[found.ids].numpy())
        assert len(brought) <= 4


def test_a_walk_reads_a_block_once_while_it_needs_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Block] = []
    read_block = Store.read_block

    def note(self: Store, block: Block) -> dict[str, np.ndarray]:
        read.append(block)
        return read_block(self, block)

    monkeypatch.setattr(Store, "read_block", note)
    walk = StreamedNegatives(store, DIMS, 4, 0)
    for step in range(NUM_ITEMS // 4):
        walk.read(step, [6])
    assert sorted(read, key=lambda block: block.offset) == sorted(store.manifest.items, key=lambda block: block.offset)


class WalkingSampler(NegativeSampler):
    """A sampler for a run with a table that draws what an inline run's walk draws."""

    walk: StreamedNegatives

    def lane(self, step: int, lane: int) -> np.ndarray:
        return self.walk.read(step, [lane])[0][0]


def loaded(shop: Path, kind: str, scope: str, *words: str) -> Config:
    return load_config(shop, ["--loss.negatives", kind, "--loss.scope", scope, *words])


def streams(config: Config, store: Store, predict_first: bool = True) -> tuple[TrainStream, TrainStream]:
    """The inline stream, and one with a table, with the same negatives."""
    order = Order([block.count for block in store.manifest.splits["train"]], 16, 16, 0, pool_blocks=3)
    sampler = make_sampler(config, store)
    assert sampler is not None
    walk = StreamedNegatives(store, DIMS, sampler.num_drawn, 0)
    walking = WalkingSampler(NUM_ITEMS, sampler.num_drawn, 0, None, sampler._target_log_shares, sampler._stratified)
    walking.walk = walk
    settings = (store, order, WindowRule(4, "all", predict_first))
    shared = config.loss.scope == "batch"
    return TrainStream(*settings, sampler, shared, (), walk), TrainStream(*settings, walking, shared)


@pytest.mark.parametrize("scope", ["lane", "batch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bf16"])
def test_losses_and_gradients_are_those_of_a_table(
    dtype: torch.dtype | None, kind: str, scope: str, shop: Path, store: Store
) -> None:
    config = loaded(shop, kind, scope, *NO_DROPOUT)
    inline, tabled = streams(config, store)
    table = load_item_table(store, None)
    torch.manual_seed(0)
    model = build_model(config.model, table, dtype)
    columns = catalogue_columns(model.encoder, table, dtype or torch.float32)
    settings = LossSettings(model.sizes, dtype=dtype)
    modules = [TrainingModule(model, c, settings) for c in (None, columns)]
    for step in (0, 3, STEPS_PER_EPOCH - 1):
        for lanes in (range(16), range(1, 16, 3), [7]):
            results = []
            for module, stream in zip(modules, (inline, tabled), strict=True):
                batch = stream.batch(1, step, lanes)
                model.zero_grad()
                losses = module(batch)
                losses.sum().backward()
                gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
                results.append((losses.detach(), gradients))
            (found, found_gradients), (expected, expected_gradients) = results
            assert torch.equal(found, expected)
            assert set(found_gradients) == set(expected_gradients)
            assert all(torch.equal(found_gradients[name], expected_gradients[name]) for name in found_gradients)


def as_lists(batch: Packed) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in batch.tensors.items()}


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("scope", ["lane", "batch"])
@pytest.mark.parametrize("lanes", [range(16), [3, 9, 15], [7]], ids=["all", "some", "one"])
def test_batches_are_the_same_for_any_workers(
    workers: int, scope: str, lanes: Sequence[int], shop: Path, store: Store
) -> None:
    stream, _ = streams(loaded(shop, "mixed", scope), store)
    steps = [*range(STEPS_PER_EPOCH - 2, STEPS_PER_EPOCH + 3)]
    expected = [as_lists(stream.batch(step // STEPS_PER_EPOCH, step % STEPS_PER_EPOCH, lanes)) for step in steps]
    with BatchFeed(stream, lanes, steps[-1] + 1, workers, timeout_s=60) as feed:
        assert [as_lists(feed.batches(step)[0][0]) for step in steps] == expected


def test_a_batch_contains_only_the_items_that_it_needs(shop: Path, store: Store) -> None:
    stream, _ = streams(loaded(shop, "mixed", "batch"), store, predict_first=False)
    batch = stream.batch(0, 2, [4, 5])
    tensors = batch.tensors
    needed = torch.cat([tensors[name] for name in ("items", "targets", "negatives")]).unique()
    assert torch.equal(tensors["feature_ids"], needed)
    assert 0 < len(needed) < NUM_ITEMS


def test_statistics_are_those_of_a_table(shop: Path, store: Store) -> None:
    config = load_config(shop)
    table = load_item_table(store, None)
    from_table = build_model(config.model, table)
    streamed = build_inline_model(config.model, store, start_runtime(1, lanes=None))
    found, expected = projection_of(streamed), projection_of(from_table)
    torch.testing.assert_close(found.feature_shift, expected.feature_shift, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.feature_scale, expected.feature_scale, rtol=1e-6, atol=0)
    assert found.feature_scale.std() > 0


@pytest.mark.parametrize("mask_seen", [False, True])
@pytest.mark.parametrize("users_at_once", [1, 20, 10_000])
def test_ranking_a_stream_is_ranking_a_table(mask_seen: bool, users_at_once: int, shop: Path, store: Store) -> None:
    config, table = load_config(shop), load_item_table(store, None)
    torch.manual_seed(1)
    model = build_model(config.model, table).eval()
    with torch.no_grad():
        features = model.encoder.normalize(table.values, table.present)
        embedded = EmbeddedCatalogue(model.encoder(features, table.present))
    streamed = StreamedCatalogue(model.encoder, store, DIMS, users_at_once)
    numbers = range(len(store.manifest.splits["test"]))
    expected = histograms(model, embedded, evaluation_blocks(store, "test", 4, numbers), mask_seen)
    blocks = evaluation_blocks(store, "test", 4, numbers, inline_dims=DIMS)
    assert torch.equal(histograms(model, streamed, blocks, mask_seen), expected)
    assert expected.sum() == len(model.sizes) * sum(block.count for block in store.manifest.splits["test"])


def test_a_signal_ends_a_pass_over_the_items(shop: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass may take long: it serves up to 65,536 users."""
    model = build_model(load_config(shop).model, load_item_table(store, None)).eval()
    users = list(evaluation_blocks(store, "test", 4, [0, 1], inline_dims=DIMS))
    read, reads = Store.read_block, []

    def read_block(self: Store, block: Block) -> dict[str, np.ndarray]:
        reads.append(block)
        if len(reads) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, block)

    monkeypatch.setattr(Store, "read_block", read_block)
    with StopRequest() as stop:
        histograms(model, StreamedCatalogue(model.encoder, store, DIMS), users, False, stop=stop)
    assert stop.cut_short and len(reads) == 2 < len(store.manifest.items)


def refuse_tables(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a table of all items was requested")

    patch.setattr("fmrl_dist.training.learner.load_item_table", refuse)
    patch.setattr("fmrl_dist.checkpoint.restore.load_item_table", refuse)


@pytest.fixture(scope="module")
def run(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained inline, with dropout, without any table."""
    with pytest.MonkeyPatch.context() as patch:
        refuse_tables(patch)
        return train_here(shop, tmp_path_factory.mktemp("run") / "run", "--train.workers", 2)


def test_a_run_is_that_of_a_table(run: Path, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole run, with dropout: every loss, every validation, the evaluation at the end."""
    store = Store.open(load_config(shop).store.path)
    walk = StreamedNegatives(store, DIMS, NUM_DRAWN, 0)
    monkeypatch.setattr(NegativeSampler, "lane", lambda self, step, lane: walk.read(step, [lane])[0][0])
    tabled = train_here(shop, tmp_path / "run", "--store.feature_mode", "table")
    found, expected = figures(run), figures(tabled)
    assert len(found) == len(expected) == 3 * (STEPS_PER_EPOCH + 1)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6) for key in mine if key != "split")
    assert evaluation(run)["sizes"] == evaluation(tabled)["sizes"]


def test_resuming_inline_is_bit_equal(run: Path, shop: Path, tmp_path: Path) -> None:
    stopped = train_here(shop, tmp_path / "run", "--train.max_steps", STEPS_PER_EPOCH + 3)
    train_here(shop, stopped, "--resume", "auto")
    mine = {line["step"]: line["loss"] for line in records(stopped)}
    assert mine == {line["step"]: line["loss"] for line in records(run)}
    assert evaluation(stopped) == evaluation(run)


def test_evaluate_and_export(run: Path, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluation streams; an export embeds all items, and ranks like the run."""
    before = (run / "evaluation.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        refuse_tables(patch)
        run_here(evaluate.main, ["--checkpoint", run, "--threads", 1])
    assert (run / "evaluation.json").read_bytes() == before
    run_here(export.main, ["--checkpoint", run, "--size", 8, "--output", tmp_path / "export"])
    run_here(evaluate.main, ["--checkpoint", tmp_path / "export", "--threads", 1])
    assert evaluation(tmp_path / "export")["sizes"] == evaluation(run)["sizes"]
    capsys.readouterr()


def test_a_store_without_features_in_it_is_evaluated_by_a_table(run: Path, shop: Path, tmp_path: Path) -> None:
    other, _ = build_store(
        load_config(shop, ["--store.feature_mode", "table", "--store.path", str(tmp_path / "table")])
    )
    checkpoint, config = load_checkpoint(run), load_config(shop)
    assert isinstance(
        ranker_of_checkpoint(checkpoint, config, other, start_runtime(1, lanes=None)).catalogue, EmbeddedCatalogue
    )
    with pytest.raises(UserError, match=r"does not carry features .* --store.feature_mode inline"):
        check_inline(config, other)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--loss.softmax", "full"], "the softmax is full"),
        (["--loss.negatives", "popularity"], "the softmax is popularity"),
        (["--model.id_table", "true"], "model.id_table is on"),
    ],
)
def test_what_needs_a_table_is_refused(words: list[str], complaint: str, shop: Path, tmp_path: Path) -> None:
    line = refusal(train.main, "--config", shop, "--run.dir", tmp_path / "run", *words)
    assert complaint in line and "--store.feature_mode table" in line
    assert not (tmp_path / "run").exists()


def test_resuming_with_another_feature_mode_is_refused(run: Path, shop: Path) -> None:
    words = ["--config", shop, "--run.dir", run, "--resume", "auto", "--store.feature_mode", "table"]
    assert "store.feature_mode 'inline', this run 'table'" in refusal(train.main, *words)


def test_a_damaged_item_shard_stops_training(shop: Path, tmp_path: Path) -> None:
    config = load_config(shop, ["--store.path", str(tmp_path / "store")])
    store, _ = build_store(config)
    for block in store.manifest.items:
        with (store.path / block.shard).open("r+b") as file:
            file.seek(block.offset + block.num_bytes // 2)
            file.write(b"\xff" * 64)
    words = ["--store.path", store.path, "--model.feature_scale", "none", "--store.on_bad_shard", "skip"]
    line = refusal(train.main, "--config", shop, "--run.dir", tmp_path / "run", *words)
    assert "items-00000" in line and "sha256" in line


def train_on_each_rank(config: str, folder: str) -> None:
    train_here(Path(config), Path(folder), *NO_DROPOUT, "--loss.scope", "batch", "--train.epochs", 1)


@pytest.mark.multiproc
def test_two_processes_train_as_one(shop: Path, tmp_path: Path) -> None:
    run_processes(2, train_on_each_rank, str(shop), str(tmp_path / "two"), timeout_s=120)
    train_on_each_rank(str(shop), str(tmp_path / "one"))
    alone, together = records(tmp_path / "one"), records(tmp_path / "two")
    assert [line["loss"] for line in together] == pytest.approx([line["loss"] for line in alone], rel=1e-5)
    assert evaluation(tmp_path / "two")["users"] == evaluation(tmp_path / "one")["users"]
