"""The prepared step is the model's, event by event, and the full pass over a history."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrl_dist.deploy.one_event import OneEvent
from fmrl_dist.model.fmrlrec import FMRLRec
from tests.fixtures.exports import random_model


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    sizes = np.cumsum(draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))).tolist()
    return {"sizes": sizes, "depth": draw(st.integers(1, 3)), "seed": draw(st.integers(0, 1000))}


@settings(max_examples=30)
@given(shape=shapes(), num_events=st.integers(1, 12))
@torch.no_grad()
def test_the_step_is_the_models(shape: dict[str, Any], num_events: int) -> None:
    """In float64, so that nothing hides behind rounding."""
    model = random_model(**shape).double()
    step, embeddings = OneEvent(model), torch.randn(num_events, 3, model.width, dtype=torch.float64)
    states, state, alone = model.initial_state(3), OneEvent(model).initial_state(3), OneEvent(model).initial_state()
    for event in embeddings:
        states, z = model.step(states, event)
        np.testing.assert_allclose(step(state, event.numpy()), z.numpy(), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(step(alone, event[0].numpy()), z[0].numpy(), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(state, states.numpy(), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(alone, states[0].numpy(), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_without_norms_at_the_ends_and_beyond_what_an_exponential_holds() -> None:
    model = random_model(input_norm=False, output_norm=False)
    for name, values in model.named_parameters():
        if name.endswith("ffn.gate.bias"):
            values.data.fill_(-500.0)
    step, x = OneEvent(model), torch.randn(1, model.width)
    found, expected = step(step.initial_state(1), x.numpy()), model.step(model.initial_state(1), x)[1].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def full_pass(model: FMRLRec, embeddings: torch.Tensor) -> np.ndarray:
    outputs: np.ndarray = model(embeddings, torch.tensor([0, len(embeddings)]), torch.tensor([False])).numpy()
    return outputs


@pytest.mark.parametrize("size", [4, 8, 16])
def test_a_full_pass(size: int) -> None:
    """To 1e-6 beyond the full pass' own rounding, which small chunks of a layer-norm magnify."""
    model = random_model().truncate(size)
    embeddings = torch.randn(50, size)
    step, state = OneEvent(model), OneEvent(model).initial_state()
    found = np.stack([step(state, event) for event in embeddings.numpy()])
    assert found.dtype == np.float32
    expected, exact = full_pass(model, embeddings), full_pass(copy.deepcopy(model).double(), embeddings.double())
    assert (np.abs(found - expected) <= 1e-6 * (1 + np.abs(exact)) + 2 * np.abs(expected - exact).max()).all()
    assert np.abs(expected - exact).max() < 1e-4
    with torch.no_grad():
        start = model(embeddings[:0], torch.tensor([0, 0]), torch.tensor([True]))[0].numpy()
    np.testing.assert_allclose(step(step.initial_state(), step.start_row), start, rtol=1e-6, atol=1e-6)
