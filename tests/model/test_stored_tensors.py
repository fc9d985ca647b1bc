"""Matrices in float16 and int8: to half a step of what they were, slices like the whole, and nothing else rounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.stored_tensors import DTYPES, SCALE, dequantize, is_matrix, quantize, restored, rounded, stored

SIZES = (4, 8, 16)


def make_model() -> FMRLRec:
    torch.manual_seed(0)
    return FMRLRec(SIZES, 2, {"text": 5, "price": 1}, 30, input_norm=True, output_norm=True).eval()


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = [draw(st.integers(0, 5)), draw(st.integers(1, 9))]
    rows = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-30, 30, (shape[0], 1), generator=generator)
    return rows * (torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0])))


@settings(max_examples=60)
@given(matrix=matrices())
def test_int8_is_off_by_half_a_step_at_most(matrix: Tensor) -> None:
    whole, scales = quantize(matrix)
    assert whole.dtype == torch.int8 and scales.shape == matrix.shape[:-1]
    again = dequantize(whole, scales)
    largest = matrix.abs().amax(1)
    assert bool(((again - matrix).abs() <= (largest[:, None] / 127 / 2) * 1.001).all())
    assert bool((again[matrix == 0] == 0).all())
    assert torch.equal(whole.abs().amax(1) == 127, largest > 0)
    twice, same_scales = quantize(again)
    assert torch.equal(twice, whole)
    torch.testing.assert_close(same_scales, scales)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_matrices_are_rounded(dtype: str) -> None:
    tensors = make_model().state_dict()
    found = rounded(tensors, dtype)
    assert list(found) == list(tensors)
    changed = {name for name in tensors if not torch.equal(found[name], tensors[name])}
    names = {name.rpartition(".")[2] for name in changed}
    assert names == (set() if dtype == "float32" else {"weight", "B", "C", "id_table"})
    assert changed == (set() if dtype == "float32" else {name for name in tensors if is_matrix(name, tensors[name])})
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    step = {"float32": 0.0, "float16": 2**-11, "int8": 0.5 / 127}[dtype]
    for name, tensor in tensors.items():
        assert (found[name] - tensor).abs().amax() <= step * 1.01 * tensor.abs().amax(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slice_of_a_stored_model_is_the_stored_models_slice(dtype: str) -> None:
    """Cut the integers, keep the scales: the same numbers as cutting what was read."""
    model = make_model()
    cut = model.truncate(8).state_dict()
    whole = stored(model.state_dict(), dtype)
    sliced = {}
    for name, tensor in whole.items():
        shape = cut[name.removesuffix(SCALE)].shape
        if dtype == "int8" and name.endswith(SCALE):
            shape = shape[:-1]
        sliced[name] = tensor[tuple(map(slice, shape))]
    model.load_state_dict(restored(whole, dtype))
    expected = model.truncate(8).state_dict()
    found = restored(sliced, dtype)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight holds numbers of more than 65,504, the largest of float16"):
        stored({"weight": torch.full((2, 2), 7e4)}, "float16")
    for dtype in ("float16", "int8"):
        with pytest.raises(ValueError, match="weight holds numbers that are not finite"):
            stored({"weight": torch.tensor([[1.0, torch.nan]])}, dtype)
