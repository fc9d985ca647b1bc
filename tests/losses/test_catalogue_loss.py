"""The loss over a catalogue that is projected tile by tile: against its plain twin, however the work is divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fmrl_dist.data.item_table import ItemTable
from fmrl_dist.losses import log_sum_exp, tiled_log_sum_exp
from fmrl_dist.losses.item_tiles import back_projected
from fmrl_dist.losses.log_sum_exp import catalogue_log_sum_exp
from fmrl_dist.losses.nested_cross_entropy import catalogue_cross_entropy, nested_cross_entropy
from fmrl_dist.losses.settings import LossSettings
from fmrl_dist.losses.tiled_log_sum_exp import TILE_ITEMS, TILE_POSITIONS
from fmrl_dist.model.item_encoders.projection import ProjectionEncoder
from fmrl_dist.training.item_columns import TableColumns, catalogue_columns
from tests.fixtures.normalizers import DISTILLED, values_and_gradients
from tests.fixtures.numerics import TOLERANCE, assert_relatively_close

SIZES = (4, 9, 16, 35)
TEMPERATURES = (0.5, 1.0, 2.0, 1.3)
FEATURES = 23


def make_inputs(num_positions: int, num_items: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(num_positions * 7919 + num_items)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    return {
        "z": draw(num_positions, SIZES[-1]).requires_grad_(),
        "features": draw(num_items, FEATURES),
        "weight": (draw(SIZES[-1], FEATURES) / FEATURES**0.5).requires_grad_(),
        "table": draw(num_items, SIZES[-1]).requires_grad_(),
        "weights": draw(len(SIZES), num_positions),
    }


def results(inputs: dict[str, Tensor], id_width: int, **options: Any) -> list[Tensor]:
    """Log-sum-exp, and the gradients of a weighted sum of it; an id table of some first channels, 0 for none."""
    table = inputs["table"][:, :id_width] if id_width else None
    settings = LossSettings(SIZES, TEMPERATURES, **options)
    found = catalogue_log_sum_exp(inputs["z"], inputs["features"], inputs["weight"], table, settings)
    trained = [inputs["z"], inputs["weight"], *([inputs["table"]] if id_width else [])]
    return values_and_gradients(found, inputs["weights"], trained)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("distilled", DISTILLED)
@pytest.mark.parametrize("kept_bytes", [0, 40_000, 2**40], ids=["none kept", "some kept", "all kept"])
@pytest.mark.parametrize("id_width", [0, 9, 35])
@pytest.mark.parametrize("num_positions", [1, 9, 63, TILE_POSITIONS + 1])
@pytest.mark.parametrize("num_items", [1, 507, 2 * TILE_ITEMS + 1])
def test_tiled_equals_its_plain_twin(
    num_positions: int,
    num_items: int,
    id_width: int,
    kept_bytes: int,
    distilled: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiled_log_sum_exp, "KEPT_BYTES", kept_bytes)
    inputs = make_inputs(num_positions, num_items, dtype)
    found, expected = (results(inputs, id_width, impl=impl, **DISTILLED[distilled]) for impl in ("tiled", "plain"))
    for result, twin in zip(found, expected, strict=True):
        assert result.dtype == dtype
        assert_relatively_close(result, twin, TOLERANCE[dtype])


@pytest.mark.parametrize("back", [(a, b, c, d) for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)])
def test_any_choice_of_projections_gives_the_same(back: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_sum_exp, "back_projected", lambda *_: tuple(map(bool, back)))
    monkeypatch.setattr(tiled_log_sum_exp, "TILE_POSITIONS", 16)
    inputs = make_inputs(37, 507)
    found, expected = (results(inputs, 0, impl=impl, **DISTILLED["softer"]) for impl in ("tiled", "plain"))
    for result, twin in zip(found, expected, strict=True):
        assert_relatively_close(result, twin, TOLERANCE[torch.float64])


def test_projection_goes_back_for_few_positions_and_wide_chunks() -> None:
    sizes = (8, 16, 32, 64, 128, 256, 512, 1024)
    assert back_projected(sizes, 247, 2048) == (False,) * 6 + (True,) * 2
    assert not any(back_projected(sizes, 5000, 2048))
    assert all(back_projected(sizes, 1, 2048))
    assert all(back_projected((1024,), 10**6, 1024))  # features no wider than the chunk: always


@pytest.mark.parametrize("id_width", [0, 9, 35])
def test_bfloat16_errs_no_more_than_the_plain_twin_in_bfloat16(id_width: int) -> None:
    """Gradients and log-sum-exp against float64: the plain twin's error in bfloat16 is the budget, within a half."""
    for num_positions in (9, 63):  # the first projects chunks back
        inputs = make_inputs(num_positions, 1300, torch.float32)
        exact = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in inputs.items()}
        truths = results(exact, id_width, impl="plain")
        found, budgets = (results(inputs, id_width, impl=i, dtype=torch.bfloat16) for i in ("tiled", "plain"))
        for result, budget, truth in zip(found, budgets, truths, strict=True):
            assert 0 < (result - truth).norm() <= 1.5 * (budget - truth).norm()


def make_table(num_items: int) -> tuple[ProjectionEncoder, ItemTable]:
    generator = torch.Generator().manual_seed(num_items)
    encoder = ProjectionEncoder(SIZES[-1], {"text": 5, "image": 7})
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    encoder.feature_shift.uniform_(-1, 1, generator=generator)
    encoder.feature_scale.uniform_(0.5, 2, generator=generator)
    present = torch.rand(num_items, 2, generator=generator) < 0.7
    values = torch.randn(num_items, 12, generator=generator).half()
    values[~present.repeat_interleave(torch.tensor([5, 7]), 1)] = 0
    return encoder, ItemTable({"text": 5, "image": 7}, values, present)


def test_columns_times_projection_are_the_encoders_embeddings() -> None:
    encoder, table = make_table(311)
    columns = catalogue_columns(encoder, table, torch.float32)
    expected = encoder(encoder.normalize(table.values, table.present), table.present)
    assert isinstance(columns, Tensor)
    torch.testing.assert_close(columns @ encoder.projection().T, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_made_on_demand_equal_resident_ones(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, table = make_table(311)
    resident = catalogue_columns(encoder, table, dtype)
    monkeypatch.setattr("fmrl_dist.training.item_columns.RESIDENT_BYTES", resident[:].nbytes - 1)
    made = catalogue_columns(encoder, table, dtype)
    assert isinstance(made, TableColumns)
    assert made.shape == resident.shape
    assert torch.equal(made[:], resident[:])
    ids = torch.tensor([310, 3, 3, 77])
    assert torch.equal(made[ids], resident[ids])


def test_loss_over_columns_equals_the_loss_over_embeddings() -> None:
    encoder, table = make_table(TILE_ITEMS + 3)
    z, targets = torch.randn(29, SIZES[-1]), torch.arange(29)
    columns = catalogue_columns(encoder, table, torch.float32)
    items = columns[:] @ encoder.projection().T
    found = catalogue_cross_entropy(z, items[targets], columns, encoder.projection(), None, LossSettings(SIZES))
    torch.testing.assert_close(found, nested_cross_entropy(z, items, targets, LossSettings(SIZES)), rtol=1e-5, atol=0)
