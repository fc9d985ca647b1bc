"""Sampled negatives: the alias table's distribution, derived files, draws independent of the ranks, whole runs."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrl_dist import evaluate, export, train
from fmrl_dist.base.errors import UserError
from fmrl_dist.config.data_section import StoreConfig
from fmrl_dist.data import item_statistics
from fmrl_dist.data.alias import alias_table, draw
from fmrl_dist.data.batches import SampledBatch
from fmrl_dist.data.item_statistics import popularity_table, target_log_shares
from fmrl_dist.data.item_table import load_item_table
from fmrl_dist.data.negatives import NegativeSampler, make_sampler
from fmrl_dist.data.order import Order
from fmrl_dist.data.store import tables
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.train_stream import TrainStream
from fmrl_dist.data.windows import WindowRule
from fmrl_dist.losses import nested_cross_entropy as losses
from fmrl_dist.losses.settings import LossSettings
from fmrl_dist.model.embed_catalogue import embed_catalogue
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.training.module import TrainingModule
from tests.fixtures.negatives import NO_DROPOUT, loaded, make_module, sampled
from tests.fixtures.processes import run_processes
from tests.fixtures.training import NUM_ITEMS, evaluation, make_shop, records, refusal, run_here, train_here

KINDS = ("uniform", "popularity", "in_batch", "mixed", "stratified")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("negatives"))


@pytest.fixture(scope="module")
def store(shop: Path) -> Store:
    return Store.open(shop.parent / "store")


def implied_shares(table: np.ndarray) -> np.ndarray:
    """The distribution of draws from a table."""
    shares = table["threshold"].astype(np.float64)
    np.add.at(shares, table["alias"], 1.0 - table["threshold"].astype(np.float64))
    return shares / len(table)


@settings(max_examples=200)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60))
def test_alias_table_has_the_distribution_of_its_weights(weights: list[float]) -> None:
    table = alias_table(np.array(weights))
    shares = np.array(weights) / sum(weights)
    np.testing.assert_allclose(implied_shares(table), shares, rtol=0, atol=1e-7)
    np.testing.assert_allclose(table["log_share"], np.log(shares), rtol=1e-5, atol=1e-6)
    assert ((table["threshold"] >= 0) & (table["threshold"] <= 1)).all()


@pytest.mark.parametrize("weights", [np.ones(1), np.ones(1000), 1.0 / np.arange(1, 100_001) ** 1.1])
def test_alias_table_of_many_items(weights: np.ndarray) -> None:
    table = alias_table(weights)
    np.testing.assert_allclose(implied_shares(table), weights / weights.sum(), rtol=0, atol=1e-7 / len(weights) ** 0.5)


@pytest.mark.parametrize("num_items", [5, 49, 98, 103])
def test_equal_weights_that_are_all_rounded_below_their_mean(num_items: int) -> None:
    """1 / 49 · 49 < 1 in float64: compared with 1, all rows would be below the mean and none could fill the others."""
    for weight in (1.0, 209715.65476176923):
        table = alias_table(np.full(num_items, weight))
        np.testing.assert_allclose(implied_shares(table), 1 / num_items, rtol=1e-7)


def test_draws_follow_the_shares() -> None:
    weights = np.array([1.0, 5.0, 0.1, 3.9])
    items = draw(alias_table(weights), 200_000, np.random.default_rng(0))
    found = np.bincount(items, minlength=4) / 200_000
    np.testing.assert_allclose(found, weights / 10, atol=0.005)  # five standard deviations


def test_popularity_is_the_train_counts_plus_one_to_the_power(store: Store) -> None:
    counts = pq.read_table(store.path / "vocab.parquet")["train_count"].to_numpy()
    weights = (counts + 1.0) ** 0.5
    table = popularity_table(store, 0.5)
    assert isinstance(table, np.memmap)
    np.testing.assert_allclose(np.exp(table["log_share"]), weights / weights.sum(), rtol=1e-5)


@pytest.mark.parametrize("windows", ["last", "all"])
def test_target_shares_are_those_of_an_epoch(store: Store, windows: str) -> None:
    order = Order([block.count for block in store.manifest.splits["train"]], 16, 16, 0)
    stream = TrainStream(store, order, WindowRule(3, windows, True))
    counts = np.zeros(NUM_ITEMS)
    for step in range(order.steps_per_epoch):
        np.add.at(counts, stream.batch(0, step, range(16)).targets.numpy(), 1)
    found = np.exp(target_log_shares(store, WindowRule(3, windows, True)))
    np.testing.assert_allclose(found, counts / counts.sum(), rtol=1e-6)


def test_target_shares_follow_what_can_be_read(shop: Path, tmp_path: Path) -> None:
    """Counted while a block is damaged and left out, they are not those of the repaired store; nor the reverse."""
    folder, rule = shutil.copytree(shop.parent / "store", tmp_path / "store"), WindowRule(50, "last", True)
    skipping = Store.open(folder, StoreConfig(on_bad_shard="skip"))
    block = skipping.manifest.splits["train"][1]
    whole = target_log_shares(Store.open(shop.parent / "store"), rule)
    content = (folder / block.shard).read_bytes()
    middle = block.offset + block.num_bytes // 2
    np.testing.assert_array_equal(target_log_shares(skipping, rule), whole)
    (folder / block.shard).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    counts = np.zeros(NUM_ITEMS)
    for other in skipping.manifest.splits["train"]:
        if other != block:
            np.add.at(counts, skipping.read_block(other)["items"], 1)
    damaged = target_log_shares(skipping, rule)
    np.testing.assert_allclose(np.exp(damaged), counts / counts.sum(), rtol=1e-6)
    assert not np.array_equal(damaged, whole)
    (folder / block.shard).write_bytes(content)
    np.testing.assert_array_equal(target_log_shares(skipping, rule), whole)


def test_derived_files_are_made_once_and_checked(store: Store) -> None:
    table = popularity_table(store, 0.25)
    assert isinstance(table, np.memmap)
    path = Path(str(table.filename))
    assert path.parent == Path(f"{store.path}.derived")
    made = path.stat().st_mtime_ns
    popularity_table(store, 0.25)
    assert path.stat().st_mtime_ns == made
    assert not [other for other in path.parent.iterdir() if other.suffix != ".npy"], "no half-written file is left"
    path.unlink()


def damaged(content: bytes) -> dict[str, bytes]:
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    return {"empty": b"", "header only": content[:100], "without its end": content[:-1], "one bit": bytes(flipped)}


def test_a_damaged_derived_file_is_refused(store: Store) -> None:
    path = Path(str(popularity_table(store, 0.3).filename))  # type: ignore[attr-defined]
    for content in damaged(path.read_bytes()).values():
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path} cannot be read .*; delete it, it will be rebuilt$"):
            popularity_table(store, 0.3)
    item_statistics._write(path, np.zeros(3))
    with pytest.raises(UserError, match="holds float64 .* expected"):
        popularity_table(store, 0.3)
    path.unlink()


def test_powers_that_differ_in_the_seventh_digit_have_separate_tables(store: Store) -> None:
    near, exact = popularity_table(store, 0.7500001), popularity_table(store, 0.75)
    assert not np.array_equal(near["threshold"], exact["threshold"])


def test_a_vocabulary_of_other_items_is_refused(shop: Path, tmp_path: Path) -> None:
    shutil.copytree(shop.parent / "store", tmp_path / "store")
    vocab = tmp_path / "store" / "vocab.parquet"
    rows = pq.read_table(vocab)
    store = Store.open(tmp_path / "store")
    for change, complaint in (
        (lambda: pq.write_table(rows.slice(0, 10), vocab), "its rows are not those that were written; build"),
        (lambda: pq.write_table(rows.drop_columns("train_count"), vocab), "its rows are not those"),
        (lambda: vocab.write_bytes(b"PAR1"), "cannot be read"),
        (vocab.unlink, "has no vocab.parquet"),
    ):
        change()
        with pytest.raises(UserError, match=complaint) as error:
            popularity_table(store, 0.75)
        assert "\n" not in str(error.value)
    assert not Path(f"{store.path}.derived").exists()


def test_a_long_vocabulary_of_other_items_is_refused(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a store whose manifest does not know its files: one that takes long to check has a row for each item."""
    monkeypatch.setattr(tables, "MAX_CHECKED_ROWS", 5)
    shutil.copytree(shop.parent / "store", tmp_path / "store")
    vocab = tmp_path / "store" / "vocab.parquet"
    pq.write_table(pq.read_table(vocab).slice(0, 10), vocab)
    with pytest.raises(UserError, match="has 10 rows; expected the store's 40 items"):
        store = Store.open(tmp_path / "store")
        popularity_table(Store(store.files, replace(store.manifest, table_files={})), 0.75)


def test_an_unwritable_folder_is_refused(shop: Path, tmp_path: Path) -> None:
    shutil.copytree(shop.parent / "store", tmp_path / "store")
    (tmp_path / "store.derived").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot be written \(File exists\); make .*store.derived a writable folder"):
        popularity_table(Store.open(tmp_path / "store"), 0.75)


def expected_counts(kind: str, store: Store, num_drawn: int, targets: np.ndarray) -> np.ndarray:
    """Expected count of each item, straight from the definition."""
    counts = np.zeros(NUM_ITEMS)
    if kind in ("uniform", "mixed"):
        counts += num_drawn / NUM_ITEMS
    if kind == "popularity":
        counts += num_drawn * implied_shares(popularity_table(store, 0.75))
    if kind in ("in_batch", "mixed"):
        counts += (len(targets) - 1) * np.exp(target_log_shares(store, WindowRule(50, "last", True)).astype(np.float64))
    return counts


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_a_lanes_negatives_and_their_expected_counts(kind: str, shop: Path, store: Store) -> None:
    sampler = make_sampler(loaded(shop, *sampled(kind)), store)
    assert sampler is not None
    targets = np.array([3, 8, 8, 1])
    drawn = sampler.lane(5, 2)
    assert len(drawn) == (0 if kind == "in_batch" else 7)
    assert np.array_equal(drawn, sampler.lane(5, 2))
    ids, log_expected = sampler.negatives(drawn, targets)
    assert ids.tolist() == [*drawn.tolist(), *(targets.tolist() if kind in ("in_batch", "mixed") else [])]
    np.testing.assert_allclose(np.exp(log_expected), expected_counts(kind, store, 7, targets)[ids], rtol=1e-5)


@given(st.lists(st.integers(0, 19), min_size=1, max_size=30), st.lists(st.integers(0, 19), min_size=1, max_size=30))
def test_strata_are_the_targets_once_and_a_sample_of_all_others(drawn: list[int], targets: list[int]) -> None:
    sampler = NegativeSampler(20, len(drawn), seed=0, stratified=True)
    ids, log_expected = sampler.negatives(np.array(drawn), np.array(targets))
    certain = sorted(set(targets))
    others = [item for item in drawn if item not in set(targets)]
    assert ids.tolist() == certain + others and log_expected.dtype == np.float32
    np.testing.assert_array_equal(log_expected[: len(certain)], 0)
    np.testing.assert_allclose(np.exp(log_expected[len(certain) :]), len(others) / (20 - len(certain)), rtol=1e-6)


def test_steps_lanes_and_seeds_draw_differently() -> None:
    draws = {
        tuple(NegativeSampler(10**6, 5, seed).lane(step, lane)) for seed in (0, 1) for step in (0, 1) for lane in (0, 1)
    }
    assert len(draws) == 8


@pytest.mark.parametrize("scope", ["lane", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_do_not_depend_on_the_number_of_ranks(kind: str, scope: str, shop: Path, store: Store) -> None:
    config = loaded(shop, *sampled(kind, scope))
    order = Order([block.count for block in store.manifest.splits["train"]], 16, 16, 0)
    stream = TrainStream(store, order, WindowRule(50, "last", True), make_sampler(config, store), scope == "batch")
    module = make_module(shop, store)
    for step in (0, order.steps_per_epoch - 1):  # in the last step most lanes are empty
        sums = []
        for world_size in (1, 2, 3, 4, 16):
            batches = [stream.batch(1, step, range(rank, 16, world_size)) for rank in range(world_size)]
            sums.append(torch.stack([module(batch) for batch in batches]).sum(0))
        for found in sums:
            torch.testing.assert_close(found, sums[0], rtol=1e-5, atol=1e-5)


def item_embeddings(module: TrainingModule, store: Store) -> torch.Tensor:
    """Scoring embeddings of the whole catalogue."""
    table = load_item_table(store, None)
    return embed_catalogue(module.model.encoder.eval(), table.values, table.present)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_lanes_with_their_own_negatives(kind: str, shop: Path, store: Store) -> None:
    """The module's loss against the formula, group by group, in a batch of three lanes."""
    order = Order([block.count for block in store.manifest.splits["train"]], 16, 16, 0)
    sampler = make_sampler(loaded(shop, *sampled(kind)), store)
    stream = TrainStream(store, order, WindowRule(50, "last", True), sampler)
    batch = stream.batch(0, 1, [4, 5, 9])
    assert isinstance(batch, SampledBatch)
    module = make_module(shop, store)
    items = item_embeddings(module, store)
    model: FMRLRec = module.model
    with torch.no_grad():
        z = model(items[batch.items], batch.starts, batch.from_start)
        expected = torch.zeros(len(model.sizes))
        for group, lane in enumerate((4, 5, 9)):
            positions = range(*batch.position_starts[group : group + 2].tolist())
            own = stream.batch(0, 1, [lane])
            assert batch.targets[list(positions)].tolist() == own.targets.tolist()
            negatives = range(*batch.negative_starts[group : group + 2].tolist())
            for position in positions:
                target = int(batch.targets[position])
                for s, size in enumerate(model.sizes):
                    scores = items[:, :size] @ z[position, :size]
                    others = [
                        math.exp(scores[batch.negatives[k]] - batch.log_expected[k])
                        for k in negatives
                        if batch.negatives[k] != target
                    ]
                    expected[s] += math.log(math.exp(scores[target]) + sum(others)) - scores[target]
        torch.testing.assert_close(module(batch), expected, rtol=1e-4, atol=1e-4)


def test_only_the_rows_of_batch_and_negatives_are_read(shop: Path, store: Store) -> None:
    order = Order([block.count for block in store.manifest.splits["train"]], 16, 16, 0)
    stream = TrainStream(store, order, WindowRule(50, "last", True), NegativeSampler(NUM_ITEMS, 2, 0))
    batch = stream.batch(0, 0, [0])
    assert isinstance(batch, SampledBatch)
    module = make_module(shop, store)
    assert module.columns is not None
    columns = module.columns[:].clone()
    needed = torch.cat((batch.items, batch.targets, batch.negatives))
    others = torch.ones(NUM_ITEMS, dtype=torch.bool).index_fill(0, needed, False)
    assert others.any()
    expected = module(batch)
    columns[others] = torch.nan
    module.columns = columns
    assert torch.equal(module(batch), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_from_each_kind(kind: str, shop: Path, tmp_path: Path) -> None:
    run = train_here(shop, tmp_path / "run", *NO_DROPOUT, *sampled(kind, "batch", 4))
    lines = records(run)
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert evaluation(run)["sizes"]["8"]["recall@10"] > 10 / NUM_ITEMS


def train_on_each_rank(config: str, folder: str) -> None:
    for kind, scope in (("popularity", "lane"), ("mixed", "batch")):
        train_here(Path(config), Path(folder) / kind, *NO_DROPOUT, *sampled(kind, scope), "--train.epochs", 1)


@pytest.mark.multiproc
def test_two_processes_train_as_one(shop: Path, tmp_path: Path) -> None:
    run_processes(2, train_on_each_rank, str(shop), str(tmp_path / "two"), timeout_s=120)
    train_on_each_rank(str(shop), str(tmp_path / "one"))
    for kind in ("popularity", "mixed"):
        alone, together = records(tmp_path / "one" / kind), records(tmp_path / "two" / kind)
        assert len(alone) == 8
        for expected, found in zip(alone, together, strict=True):
            for key in ("loss", "loss@4", "loss@8", "grad_norm"):
                assert found[key] == pytest.approx(expected[key], rel=1e-5), (kind, found["step"], key)


def test_size_weights_and_temperatures_from_the_config(shop: Path, tmp_path: Path) -> None:
    words = ["--loss.size_weights", "[3, 1]", "--loss.temperatures", "[2, 0.5]", "--train.max_steps", "1"]
    run = train_here(shop, tmp_path / "run", *NO_DROPOUT, *words)
    (line,) = records(run)
    assert line["loss"] == pytest.approx((3 * line["loss@4"] + line["loss@8"]) / 4)
    (plain,) = records(train_here(shop, tmp_path / "plain", *NO_DROPOUT, "--train.max_steps", "1"))
    assert line["loss@4"] != plain["loss@4"]
    (silent,) = records(train_here(shop, tmp_path / "one", *NO_DROPOUT, "--loss.size_weights", "[1, 0]", *words[4:]))
    assert silent["loss"] == silent["loss@4"] == plain["loss@4"]
    assert silent["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-3), "the weights are in the gradient too"


def test_temperatures_divide_the_scores() -> None:
    z, items, targets = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
    found = losses.nested_cross_entropy(z, items, targets, LossSettings((4, 8), (2.0, 0.5)))
    expected = [
        torch.nn.functional.cross_entropy(z[:, :m] @ items[:, :m].T / t, targets, reduction="sum")
        for m, t in ((4, 2.0), (8, 0.5))
    ]
    torch.testing.assert_close(found, torch.stack(expected))


COSINE = ["--loss.normalize", "true", "--loss.temperatures", "[0.1, 0.2]"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--loss.temperatures", "[1, 0]"], "loss.temperatures[1] is 0.0; expected more than 0"),
        (["--loss.size_weights", "[0, 0]"], "loss.size_weights is [0.0, 0.0]; expected numbers of at least 0"),
        (["--loss.size_weights", "[1, 1, 1]"], "loss.size_weights has 3 numbers; expected one for each of model.sizes"),
        (["--loss.distillation", "1.5"], "loss.distillation is 1.5; expected float (0 <= value <= 1) or list of"),
        (["--loss.distillation", "[0.5, 0.5]"], "the largest size has no teacher: write 0 last"),
        (["--loss.distillation", "[0.5, 0.5, 0]"], "loss.distillation has 3 numbers; expected one for each of"),
        (["--loss.distillation", "0.5", *COSINE], "loss.normalize scores each size apart"),
        (["--loss.negatives", "hard"], "loss.negatives is 'hard'"),
        (["--loss.num_negatives", "0"], "loss.num_negatives is 0"),
        (["--loss.popularity_power", "-1"], "loss.popularity_power is -1.0; expected 0 <= value <= 2"),
        (["--loss.popularity_power", "500"], "loss.popularity_power is 500.0; expected 0 <= value <= 2"),
    ],
)
def test_refused_losses(words: list[str], complaint: str, shop: Path) -> None:
    assert complaint in refusal(train.main, "--config", shop, *words)


@pytest.mark.parametrize("softmax", [[], sampled("popularity")], ids=["full", "sampled"])
def test_distillation_changes_what_smaller_sizes_learn(softmax: list[str], shop: Path, tmp_path: Path) -> None:
    """The first losses are the same, since the value stays the cross-entropy; then those of the smaller size differ."""
    given = [*NO_DROPOUT, *softmax, "--train.max_steps", "2", "--train.log_every_steps", "1"]
    alone = records(train_here(shop, tmp_path / "alone", *given))
    taught = records(train_here(shop, tmp_path / "taught", *given, "--loss.distillation", "0.5"))
    assert [alone[0][f"loss@{m}"] for m in (4, 8)] == pytest.approx([taught[0][f"loss@{m}"] for m in (4, 8)], rel=1e-6)
    assert alone[1]["loss@4"] != pytest.approx(taught[1]["loss@4"], rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        ["--loss.num_negatives", "8"],
        ["--loss.distillation", "0.5"],
        ["--loss.scope", "batch"],
        ["--loss.softmax", "full"],
    ],
)
def test_another_loss_is_refused_on_resume(change: list[str], shop: Path, tmp_path: Path) -> None:
    given: list[Any] = [*sampled("uniform"), "--train.max_steps", "2"]
    run = train_here(shop, tmp_path / "run", *given)
    words = ["--config", shop, "--run.dir", run, *given, *change, "--resume", "auto"]
    assert change[0].removeprefix("--") in refusal(train.main, *words)


@pytest.mark.parametrize("softmax", [[], sampled("popularity")], ids=["full", "sampled"])
def test_cosines_learn_and_rank_alike_in_run_and_export(softmax: list[str], shop: Path, tmp_path: Path) -> None:
    run = train_here(shop, tmp_path / "run", *NO_DROPOUT, *COSINE, *softmax, "--eval.cut_vectors", "true")
    lines = records(run)
    assert lines[-1]["loss"] < lines[0]["loss"]
    run_here(export.main, ["--checkpoint", run, "--size", 8, "--output", tmp_path / "export"])
    run_here(evaluate.main, ["--checkpoint", tmp_path / "export", "--threads", 1])
    assert evaluation(tmp_path / "export") == evaluation(run)


def test_cosine_losses_are_those_of_the_formula(shop: Path, store: Store) -> None:
    module = make_module(shop, store)
    module.normalize, module.settings = True, replace(module.settings, temperatures=(0.1, 0.2))
    order = Order([block.count for block in store.manifest.splits["train"]], 16, 16, 0)
    batch = TrainStream(store, order, WindowRule(50, "last", True)).batch(0, 0, range(16))
    items = item_embeddings(module, store)
    z = module.model(items[batch.items], batch.starts, batch.from_start)
    expected = []
    for size, temperature in zip(module.model.sizes, (0.1, 0.2), strict=True):
        cosines = torch.cosine_similarity(z[:, None, :size], items[None, :, :size], dim=2)
        expected.append(torch.nn.functional.cross_entropy(cosines / temperature, batch.targets, reduction="sum"))
    torch.testing.assert_close(module(batch), torch.stack(expected), rtol=1e-5, atol=1e-4)


def test_cosines_need_temperatures(shop: Path) -> None:
    assert "loss.normalize needs loss.temperatures" in refusal(train.main, "--config", shop, *COSINE[:2])
