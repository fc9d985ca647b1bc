"""The item table: its features, their order, present rows and scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fmrl_dist.base.errors import UserError
from fmrl_dist.data.feature_scale import feature_affine, feature_sums, table_parts
from fmrl_dist.data.item_table import ItemTable, load_item_table
from fmrl_dist.data.store.reader import Store
from shards.store.builder import build_store
from tests.fixtures.stores import ITEMS, png, tiny_config, write_raw

PICTURED = {"a": (200, 10, 10), "d": (10, 200, 10), "e": (10, 10, 200)}
PIXELS_DIM = 464


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two precomputed features of all items, and images of some items."""
    root = tmp_path_factory.mktemp("raw")
    write_raw(root)
    np.save(root / "short.npy", np.arange(len(ITEMS) * 2, dtype=np.float32).reshape(-1, 2))
    images = {"item_id": list(PICTURED), "image": [png(colour) for colour in PICTURED.values()]}
    pq.write_table(pa.table(images), root / "images.parquet")
    return root


@pytest.fixture(scope="module")
def store(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    features: dict[str, Any] = {
        "vector": {"source": "npy", "path": "vectors.npy"},
        "picture": {"source": "pixels", "path": "images.parquet"},
        "short": {"source": "npy", "path": "short.npy"},
    }
    return build_store(tiny_config(raw, tmp_path_factory.mktemp("built") / "store", features=features))[0]


def precomputed(raw: Path, name: str) -> torch.Tensor:
    return torch.from_numpy(np.load(raw / f"{name}.npy", allow_pickle=False).astype(np.float16))


def test_all_features_in_the_order_of_the_store(store: Store, raw: Path) -> None:
    table = load_item_table(store, None)
    assert list(table.dims.items()) == [("vector", 4), ("picture", PIXELS_DIM), ("short", 2)]
    assert table.values.dtype == torch.float16 and table.present.dtype == torch.bool
    vector, picture, short = table.values.split(list(table.dims.values()), dim=1)
    torch.testing.assert_close(vector, precomputed(raw, "vectors"), rtol=0, atol=0)
    torch.testing.assert_close(short, precomputed(raw, "short"), rtol=0, atol=0)
    has_picture = torch.tensor([item in PICTURED for item in ITEMS])
    torch.testing.assert_close(
        table.present, torch.stack((has_picture.new_ones(6), has_picture, has_picture | True), 1)
    )
    assert picture[has_picture].any(1).all()
    assert not picture[~has_picture].any()


@pytest.mark.parametrize("names", [("short",), ("short", "vector"), ("picture", "short", "vector"), ("picture",)])
def test_a_subset_keeps_the_requested_order(store: Store, names: tuple[str, ...]) -> None:
    everything = load_item_table(store, None)
    columns = dict(zip(everything.dims, everything.values.split(list(everything.dims.values()), dim=1), strict=True))
    table = load_item_table(store, names)
    assert list(table.dims.items()) == [(name, everything.dims[name]) for name in names]
    torch.testing.assert_close(table.values, torch.cat([columns[name] for name in names], 1), rtol=0, atol=0)
    numbers = [list(everything.dims).index(name) for name in names]
    torch.testing.assert_close(table.present, everything.present[:, numbers])


def test_no_features_still_count_the_items(store: Store) -> None:
    table = load_item_table(store, ())
    assert table.dims == {}
    assert table.values.shape == table.present.shape == (len(ITEMS), 0)
    shift, scale = affine(table, "standardize")
    assert shift.shape == scale.shape == (0,)


def test_an_unknown_feature_is_named_with_the_known_ones(store: Store) -> None:
    with pytest.raises(UserError, match=r"'pictures'.*the store .* has: vector, picture, short$") as caught:
        load_item_table(store, ("vector", "pictures"))
    assert "\n" not in str(caught.value)


def test_a_store_without_features_says_so(raw: Path, tmp_path: Path) -> None:
    store = build_store(tiny_config(raw, tmp_path / "store", features={}))[0]
    assert load_item_table(store, None).values.shape == (len(ITEMS), 0)
    with pytest.raises(UserError, match="has: none$"):
        load_item_table(store, ("vector",))


def make_table() -> ItemTable:
    """Two features of four items; item 2 lacks the first, items 0 and 3 the second."""
    values = torch.tensor(
        [
            [1.0, 10.0, 0.0],
            [3.0, 10.0, 5.0],
            [0.0, 0.0, 9.0],
            [5.0, 40.0, 0.0],
        ],
        dtype=torch.float16,
    )
    present = torch.tensor([[True, False], [True, True], [False, True], [True, False]])
    return ItemTable({"wide": 2, "narrow": 1}, values, present)


def affine(table: ItemTable, scale: str | float) -> tuple[torch.Tensor, torch.Tensor]:
    return feature_affine(table.dims, feature_sums(table.dims, table_parts(table)), scale)


def test_scale_none_and_a_number() -> None:
    for scale, factor in (("none", 1.0), (10.0, 10.0)):
        shift, found = affine(make_table(), scale)
        assert shift.tolist() == [0.0, 0.0, 0.0]
        assert found.tolist() == [factor] * 3


def test_standardize_by_hand() -> None:
    """wide: means 3 and 20, variances 4 and 300, so 152 on average; narrow: mean 7, variance 8."""
    shift, scale = affine(make_table(), "standardize")
    assert shift.dtype == scale.dtype == torch.float32
    assert shift.tolist() == [3.0, 20.0, 7.0]
    torch.testing.assert_close(scale, torch.tensor([152**-0.5, 152**-0.5, 8**-0.5]))


def test_standardized_features_have_mean_0_and_mean_variance_1() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.01, 0.02, 3.0, 200.0, 1.0, 7.0])
    values = (torch.randn(500, 6, generator=generator) * spread + 5).half()
    present = torch.rand(500, 3, generator=generator) < 0.7
    dims = {"small": 2, "large": 3, "one": 1}
    values = values * present.repeat_interleave(torch.tensor(list(dims.values())), 1)
    shift, scale = affine(ItemTable(dims, values, present), "standardize")
    scaled = (values.float() - shift) * scale
    for column, part in enumerate(scaled.split(list(dims.values()), dim=1)):
        rows = part[present[:, column]]
        assert rows.mean(0).abs().max() < 1e-3
        assert rows.var(0).mean().item() == pytest.approx(1, abs=1e-3)


def test_standardize_leaves_a_feature_of_one_item_and_survives_a_constant_one() -> None:
    values = torch.tensor([[7.0, 0.5], [0.0, 0.5], [0.0, 0.5]], dtype=torch.float16)
    present = torch.tensor([[True, True], [False, True], [False, True]])
    shift, scale = affine(ItemTable({"single": 1, "constant": 1}, values, present), "standardize")
    assert (shift[0].item(), scale[0].item()) == (0.0, 1.0)
    assert ((values[:, 1].float() - shift[1]) * scale[1]).tolist() == [0.0, 0.0, 0.0]
