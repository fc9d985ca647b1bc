"""Models of every mixer, in float64: exact slices, no future, isolation, one event at a time, what each learns from."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmrl_dist.base.errors import UserError
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.mixers.mixing import MIXERS, POSITIONS
from fmrl_dist.model.objectives import masked_items, outputs_to_learn
from tests.fixtures.numerics import assert_relatively_close

WINDOW = 12
CAUSAL = ("lru", "attention", "filter")
NOT_EXACT = 1e-9  # of sums in another order, in float64


@dataclass(frozen=True)
class Case:
    """A model with random weights and a pack of histories."""

    model: FMRLRec
    rows: Tensor  # item embeddings [N, D]
    starts: Tensor
    from_start: Tensor

    def outputs(self, rows: Tensor | None = None) -> Tensor:
        return self.model(self.rows if rows is None else rows, self.starts, self.from_start)

    def positions(self) -> list[tuple[list[int], range]]:
        """Of each history: its start position's row (or none), and its items' rows."""
        found, position = [], 0
        for length, flagged in zip(self.starts.diff().tolist(), self.from_start.tolist(), strict=True):
            start = [position] if flagged else []
            position += len(start)
            found.append((start, range(position, position + length)))
            position += length
        return found


def make_case(
    mixer: str,
    sizes: tuple[int, ...] = (4, 9, 16),
    lengths: tuple[int, ...] = (3, 0, 1, 11, 7),
    flags: tuple[bool, ...] = (True, True, False, True, False),
    positions: str = "rotary",
    head_width: int = 4,
    depth: int = 2,
    norms: bool = True,
    seed: int = 0,
    scan: str = "auto",
) -> Case:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"mixer": mixer, "positions": positions, "head_width": head_width, "window": WINDOW}
    options |= {"input_norm": norms, "output_norm": norms, "scan": scan, "r_min": 0.3, "r_max": 0.9}
    model = FMRLRec(sizes, depth, {"text": 5}, **options).double()
    with torch.no_grad():
        for values in model.parameters():
            values.normal_(0, 0.5)  # masked entries too: the mask, not their value, must keep them out
    return Case(
        model=model,
        rows=torch.randn(sum(lengths), sizes[-1], dtype=torch.float64),
        starts=torch.tensor([0, *itertools.accumulate(lengths)]),
        from_start=torch.tensor(flags[: len(lengths)], dtype=torch.bool),
    )


@st.composite
def cases(draw: st.DrawFn, mixers: tuple[str, ...] = MIXERS) -> Case:
    lengths = draw(st.lists(st.integers(0, WINDOW - 1), min_size=1, max_size=4))
    return make_case(
        mixer=draw(st.sampled_from(mixers)),
        sizes=tuple(itertools.accumulate(draw(st.lists(st.integers(4, 12), min_size=1, max_size=4)))),
        lengths=tuple(lengths),
        flags=tuple(draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))),
        positions=draw(st.sampled_from(POSITIONS)),
        head_width=draw(st.integers(1, 9)),
        depth=draw(st.integers(1, 2)),
        norms=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=60)
@given(cases())
def test_a_truncated_model_is_the_prefix_of_the_large_one(case: Case) -> None:
    z = case.outputs()
    for size in case.model.sizes:
        small = case.model.truncate(size)
        found = small(case.rows[:, :size], case.starts, case.from_start)
        assert small.sizes[-1] == size and small.mixing.arguments == case.model.mixing.arguments
        assert_relatively_close(found, z[:, :size], NOT_EXACT)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_model_is_its_plain_twin(mixer: str, positions: str) -> None:
    """With every operator replaced by its specification: outputs, and the gradients of all parameters."""
    fast, plain = (make_case(mixer, positions=positions, scan=scan) for scan in ("auto", "plain"))
    plain.model.load_state_dict(fast.model.state_dict())
    found, expected = fast.outputs(), plain.outputs(fast.rows)
    assert_relatively_close(found, expected, NOT_EXACT)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    theirs = dict(plain.model.named_parameters())
    for name, parameter in fast.model.named_parameters():
        if (other := theirs[name].grad) is None:
            assert parameter.grad is None, name
        elif float(other.norm()) > 1e-8:  # of the keys' bias: softmax does not see it
            assert parameter.grad is not None
            assert_relatively_close(parameter.grad, other, 1e-7)


@settings(max_examples=60)
@given(cases(CAUSAL), st.data())
def test_no_output_has_seen_a_later_event(case: Case, data: st.DataObject) -> None:
    changed = case.rows.clone()
    before: list[int] = []
    after: list[int] = []
    for (low, high), (start, items) in zip(itertools.pairwise(case.starts.tolist()), case.positions(), strict=True):
        kept = data.draw(st.integers(0, high - low))
        changed[low + kept : high] = torch.randn(high - low - kept, case.model.width, dtype=torch.float64)
        before += [*start, *items[:kept]]
        after += items[kept:]
    z, other = case.outputs(), case.outputs(changed)
    assert_relatively_close(other[before], z[before], NOT_EXACT)
    assert (other[after] != z[after]).any(1).all()


@pytest.mark.parametrize("mixer", ["circular", "bsarec", "bidirectional"])
def test_the_others_do_see_later_events(mixer: str) -> None:
    """So that the test above can fail: the first event's output depends on the last one."""
    case = make_case(mixer, lengths=(5,), flags=(False,))
    changed = case.rows.clone()
    changed[-1] = torch.randn(16, dtype=torch.float64)  # not a shift, which the norms would remove
    assert float((case.outputs(changed)[0] - case.outputs()[0]).abs().max()) > 1e-3


@settings(max_examples=60)
@given(cases())
def test_a_history_is_what_it_is_alone_whatever_its_neighbours_are(case: Case) -> None:
    z = case.outputs()
    for number, ((low, high), (start, items)) in enumerate(
        zip(itertools.pairwise(case.starts.tolist()), case.positions(), strict=True)
    ):
        own = [*start, *items]
        alone = case.model(case.rows[low:high], torch.tensor([0, high - low]), case.from_start[number : number + 1])
        assert_relatively_close(alone, z[own], NOT_EXACT)
        broken = case.rows.clone()
        broken[:low], broken[high:] = torch.nan, torch.nan
        assert_relatively_close(case.outputs(broken)[own], z[own], NOT_EXACT)


@settings(max_examples=60)
@given(cases(CAUSAL))
def test_one_event_at_a_time_gives_the_same(case: Case) -> None:
    z = case.outputs()
    with torch.no_grad():
        for (low, high), (_, items) in zip(itertools.pairwise(case.starts.tolist()), case.positions(), strict=True):
            state, outputs = case.model.initial_state(1), []
            for row in range(low, high):
                state, output = case.model.step(state, case.rows[row : row + 1])
                outputs.append(output)
            if outputs:
                assert_relatively_close(torch.cat(outputs), z[list(items)], NOT_EXACT)


@pytest.mark.parametrize("mixer", ["attention", "filter"])
def test_a_step_remembers_no_more_than_its_window(mixer: str) -> None:
    case = make_case(mixer, depth=1)
    torch.manual_seed(1)
    events = torch.randn(3 * WINDOW, 2, 16, dtype=torch.float64)

    def after(rows: Tensor) -> tuple[Tensor, Tensor]:
        state, output = case.model.initial_state(2), rows[0]
        for row in rows:
            state, output = case.model.step(state, row)
        return state, output

    state, output = after(events)
    assert state.shape[2] == WINDOW
    assert_relatively_close(after(events[-WINDOW:])[1], output, NOT_EXACT)


@pytest.mark.parametrize("mixer", ["circular", "bsarec", "bidirectional"])
def test_a_mixer_without_a_step_says_so(mixer: str) -> None:
    with pytest.raises(UserError, match=f"mixer {mixer} reads a history as a whole"):
        make_case(mixer).model.initial_state(1)


LIMITED = tuple(mixer for mixer in MIXERS if mixer not in ("lru", "filter"))


@pytest.mark.parametrize("mixer", LIMITED)
def test_a_history_longer_than_the_window_is_refused(mixer: str) -> None:
    case = make_case(mixer)
    rows = torch.randn(WINDOW + 1, 16, dtype=torch.float64)
    with pytest.raises(UserError, match=f"a history has {WINDOW + 1} events, and a model with mixer {mixer} reads at"):
        case.model.mixed(rows, torch.tensor([0, len(rows)]))


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_full_history_makes_room_for_the_mask(positions: str) -> None:
    """As training has it: the mask stands at the window's last place, and the oldest item is not read."""
    case = make_case("bidirectional", positions=positions)
    rows = torch.randn(WINDOW, 16, dtype=torch.float64)
    one = torch.tensor([False])
    z = case.model(rows, torch.tensor([0, WINDOW]), one)
    shorter = case.model(rows[1:], torch.tensor([0, WINDOW - 1]), one)
    assert len(z) == WINDOW
    assert_relatively_close(z[-1], shorter[-1], NOT_EXACT)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_has_a_gradient(mixer: str) -> None:
    """What an engine of several processes needs, and every position that is read learns."""
    case = make_case(mixer, lengths=(WINDOW - 1, 2), flags=(True, False), positions="learned")
    targets = torch.randn(len(case.outputs()), 16, dtype=torch.float64)
    torch.manual_seed(0)
    learned = outputs_to_learn(case.model, case.rows, targets, case.starts, case.from_start, 0.5)
    learned.z.square().sum().backward()
    unused = {"encoder.weight", "encoder.stand_ins"}  # the rows were given
    for name, parameter in case.model.named_parameters():
        assert name in unused or parameter.grad is not None, name
    if case.model.positions is not None:
        assert case.model.positions.grad is not None
        trained = case.model.positions.grad.abs().sum(1) > 0
        assert trained[: WINDOW - 1].all() and (mixer != "bidirectional" or trained.all())


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_pack_of_nothing_gives_nothing(mixer: str) -> None:
    model = make_case(mixer).model
    nothing = torch.zeros(0, 16, dtype=torch.float64)
    assert model(nothing, torch.tensor([0]), torch.zeros(0, dtype=torch.bool)).shape == (0, 16)
    assert model(nothing, torch.tensor([0, 0, 0]), torch.tensor([False, False])).shape == (0, 16)
    assert model(nothing, torch.tensor([0, 0, 0]), torch.tensor([True, False])).shape == (1, 16)


# What each learns from


@pytest.mark.parametrize("mixer", ["circular", "bsarec"])
def test_the_published_filter_learns_from_prefixes_alone(mixer: str) -> None:
    """Each target's output is the last one of its prefix by itself, so no target is seen."""
    case = make_case(mixer)
    learned = outputs_to_learn(case.model, case.rows, case.rows[:0], case.starts, case.from_start, 0.2)
    assert learned.positions is None and len(learned.z) == len(case.outputs())
    for (low, _), (_, items) in zip(itertools.pairwise(case.starts.tolist()), case.positions(), strict=True):
        for count, position in enumerate(items, 1):
            alone = case.model(case.rows[low : low + count], torch.tensor([0, count]), torch.tensor([False]))
            assert_relatively_close(learned.z[position], alone[-1], NOT_EXACT)


def test_a_masked_item_is_predicted_from_all_others_but_itself() -> None:
    case = make_case("bidirectional")
    is_masked = torch.zeros(len(case.rows), dtype=torch.bool)
    is_masked[[1, 5, 8]] = True
    z = case.model.of_masked(case.rows, case.starts, is_masked)
    assert z.shape == (3, 16)
    hidden, other = case.rows.clone(), case.rows.clone()
    hidden[is_masked] += 1
    torch.testing.assert_close(case.model.of_masked(hidden, case.starts, is_masked), z, rtol=0, atol=0)
    other[9] += 1  # after 5 and 8, in their history
    moved = (case.model.of_masked(other, case.starts, is_masked) != z).any(1)
    assert moved.tolist() == [False, True, True]


def test_the_next_item_is_the_mask_after_the_last() -> None:
    case = make_case("bidirectional")
    z = case.outputs()
    assert case.model.mask is not None
    mask = case.model.mask.detach()[None]
    for (low, high), (start, items) in zip(itertools.pairwise(case.starts.tolist()), case.positions(), strict=True):
        rows = torch.cat((case.rows[low:high], mask))
        mixed = case.model.mixed(rows, torch.tensor([0, len(rows)]))
        if high > low:
            assert_relatively_close(z[items[-1]], mixed[-1], NOT_EXACT)
        for row in start:
            assert_relatively_close(z[row], case.model.mixed(mask, torch.tensor([0, 1]))[0], NOT_EXACT)


def test_masks_are_drawn_at_their_rate_and_every_window_has_one() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([0, 1, 3, 50, 0, 20] * 200)
    drawn = masked_items(lengths, 0.3)
    of_windows = drawn.split(lengths.tolist())
    assert all(bool(window.any()) for window in of_windows if len(window))
    long = torch.stack([window for window in of_windows if len(window) == 50])
    last_alone = (long.sum(1) == 1) & long[:, -1]
    assert 0.05 < last_alone.float().mean() < 0.14
    assert 0.28 < long[~last_alone].float().mean() < 0.32
