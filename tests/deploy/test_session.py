"""Sessions answer as the full pass does, and their states go to no other model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from fmrl_dist.base.errors import UserError
from fmrl_dist.deploy.item_vocabulary import ItemVocabulary, Recommendation
from fmrl_dist.deploy.recommender import Recommender
from fmrl_dist.deploy.session import HEADER, HEADER_LENGTH, Session
from fmrl_dist.model.mixers.mixing import MIXERS
from tests.fixtures.exports import ids_of, random_export, random_model, random_recommender, vocabulary_bytes

HISTORY = ["i3", "i14", "i3", "i29", "i0"]
OTHER_MIXERS = tuple(mixer for mixer in MIXERS if mixer != "lru")


@pytest.fixture(scope="module")
def recommender() -> Recommender:
    return random_recommender()


def assert_close(found: list[Recommendation], expected: list[Recommendation]) -> None:
    assert [item.item_id for item in found] == [item.item_id for item in expected]
    assert [item.score for item in found] == pytest.approx([item.score for item in expected], rel=1e-5, abs=1e-5)


def test_event_by_event_as_the_whole_history(recommender: Recommender) -> None:
    session = recommender.session()
    for num_events in range(len(HISTORY) + 1):
        (expected,) = recommender.recommend([HISTORY[:num_events]], k=30)
        assert_close(session.recommend(30), expected)
        assert session.num_events == num_events
        if num_events < len(HISTORY):
            session.observe(HISTORY[num_events])
    assert_close(recommender.session(HISTORY).recommend(30), session.recommend(30))
    assert not {"i3", "i14", "i29", "i0"} & {item.item_id for item in session.recommend(30)}
    assert len(session.recommend(30)) == 26 and len(session.recommend(30, exclude_seen=False)) == 30
    assert {item.item_id for item in session.recommend(3, allow=["i1", "i3"], deny=["i2"])} == {"i1"}


@torch.no_grad()
def test_a_session_forgets_nothing(recommender: Recommender) -> None:
    """Beyond max_length it is the recurrence over all events; a history is read as an evaluation reads it."""
    long = [f"i{item}" for item in np.random.default_rng(0).integers(0, 30, 20)]
    session = recommender.session(long)
    rows = torch.from_numpy(recommender.rows_of(long))
    z = recommender.model.model(recommender.model.embeddings[rows], torch.tensor([0, 20]), torch.tensor([False]))[-1]
    np.testing.assert_allclose(session.output()[0], z.numpy(), rtol=1e-5, atol=1e-5)
    last = recommender.session(long[-6:])
    assert recommender.max_length == 6
    np.testing.assert_allclose(recommender.encode([rows.numpy()]), last.output(), rtol=1e-5, atol=1e-5)
    assert np.abs(last.output() - session.output()).max() > 1e-3
    (whole,) = recommender.recommend([long], k=30)
    assert {item.item_id for item in whole} == {item.item_id for item in session.recommend(30)}  # all of it was seen


def test_states_go_back_and_forth(recommender: Recommender) -> None:
    session = recommender.session(HISTORY)
    state = session.state()
    assert state.dtype == np.float32 and state.shape == (HEADER_LENGTH + 2 * 2 * 16 + 16 + 2 * 4,)
    other = recommender.session(["i7"])
    other.restore(state)
    np.testing.assert_array_equal(other.state().view(np.uint32), state.view(np.uint32))
    assert other.recommend(30) == session.recommend(30) and other.num_events == 5
    for each in (session, other):
        each.observe("i8")
    np.testing.assert_array_equal(other.state(), session.state())
    other.restore([float(number) for number in state])  # as JSON has it
    np.testing.assert_array_equal(other.state(), state)
    empty = recommender.session().state()
    other.restore(empty)
    assert other.recommend(5) == recommender.session().recommend(5) and other.num_events == 0


def test_a_state_survives_new_items_and_a_larger_export() -> None:
    """Of the same network: sliced from a whole export or exported at its size, with items appended."""
    exported = random_export()
    small = replace(exported, model=exported.model.truncate(8), items=exported.items[:, :8], rotation=None)
    state = random_recommender(exported, size=8).session(HISTORY).state()
    session = random_recommender(small).session()
    session.restore(state)
    np.testing.assert_array_equal(session.state(), state)
    appended = replace(small, items=torch.cat((small.items, torch.randn(4, 8))))
    later = random_recommender(appended).session()
    later.restore(state)
    assert later.num_events == 5 and len(later.recommend(100)) == 30


def refused(session: Session, state: object) -> str:
    before = session.state()
    with pytest.raises(UserError) as error:
        session.restore(state)  # type: ignore[arg-type]
    np.testing.assert_array_equal(session.state(), before)
    return str(error.value)


def test_states_of_others_are_refused(recommender: Recommender) -> None:
    exported = random_export()
    state = random_recommender(exported).session(HISTORY).state()
    of_size_8 = random_recommender(exported, size=8).session(["i1"])
    assert refused(of_size_8, state) == "the state is of another model: size 16; this one has 8"
    deep = random_recommender(random_export(random_model(depth=3))).session(["i1"])
    assert refused(deep, state) == "the state is of another model: depth 2; this one has 3"
    other = random_recommender(random_export(random_model(seed=1))).session(["i1"])
    assert "the state is of another model: model, hash " in refused(other, state)
    fewer = random_recommender(replace(exported, items=exported.items[:20])).session(["i1"])
    assert refused(fewer, state) == "the state is of another catalogue of 30 items, not of the first of these 20"
    renamed = Recommender(exported, ItemVocabulary(vocabulary_bytes(ids_of(31)[1:]), "vocab.parquet")).session(["i1"])
    assert "of another catalogue of 30 items" in refused(renamed, state)


def with_number(place: int, number: float) -> Callable[[np.ndarray], object]:
    def change(state: np.ndarray) -> object:
        changed = state.copy()
        changed[place] = number
        return changed

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state[:-1], "the state has 105 numbers; expected 106: it is cut or damaged"),
        (lambda state: state[:5], "ndarray is no state of a session"),
        (lambda state: "state", "str is no state of a session"),
        (lambda state: [[1.0], [1.0, 2.0]], "list is no state of a session"),
        (lambda state: state.astype(np.int64), "ndarray is no state of a session"),
        (with_number(0, 1), "the array is no state of a session"),
        (with_number(1, 3), "the state has version 3; this version reads 1 and 2"),
        (with_number(1, 2), "the state is of another model: layout of states 2; this one has 1"),
        (with_number(2, 0.5), "the array is no state of a session"),
        (with_number(3, np.nan), "the array is no state of a session"),
        (with_number(HEADER_LENGTH - 2, 5), "the state has 106 numbers; expected 108"),
        (with_number(HEADER_LENGTH - 4, 3), "the state is damaged"),  # fewer events than items
        (with_number(HEADER_LENGTH + 1, np.inf), "the state is damaged"),
        (with_number(-1, 1), "the state is damaged"),  # row 65536 + …
        (with_number(-2, 14), "the state is damaged"),  # seen twice
        (with_number(-2, 0.5), "the state is damaged"),
    ],
)
def test_damaged_states_are_refused(
    recommender: Recommender, change: Callable[[np.ndarray], object], complaint: str
) -> None:
    state = recommender.session(HISTORY).state()
    assert refused(recommender.session(["i1"]), change(state)).startswith(complaint)


def test_the_header_is_as_documented() -> None:
    assert list(HEADER.items()) == [
        *(("magic", 1), ("version", 1), ("size", 1), ("depth", 1), ("model", 4)),
        *(("num_items", 2), ("items", 4), ("events", 2), ("seen", 2)),
    ]


def test_sessions_together(recommender: Recommender) -> None:
    together = recommender.sessions(3)
    histories: list[list[str]] = [[], [], []]
    for events in (["i3", None, "i7"], [None, None, None], ["i14", None, "i7"]):
        together.observe(events)
        for history, event in zip(histories, events, strict=True):
            history += [event] if event else []
    alone = [recommender.session(history) for history in histories]
    for found, expected in zip(together.recommend(30), alone, strict=True):
        assert_close(found, expected.recommend(30))
    for found_state, expected in zip(together.state(), alone, strict=True):
        np.testing.assert_allclose(found_state, expected.state(), rtol=1e-5, atol=1e-5)
    together[1].observe("i9")  # one of them alone
    assert_close(together.recommend(30)[1], recommender.session(["i9"]).recommend(30))
    copies = recommender.sessions(3)
    copies.restore(together.state())
    assert copies.recommend(30) == together.recommend(30)
    filtered = together.recommend(5, allow=[["i1"], None, ["i7", "i2"]], deny=["i1"])
    assert [len(found) for found in filtered] == [0, 5, 1]


def test_unknown_items_are_refused_or_skipped(recommender: Recommender) -> None:
    session, together = recommender.session(HISTORY), recommender.sessions(2)
    before = session.state()
    with pytest.raises(UserError, match="1 of 1 ids are of no item, such as 'gone'; ids are like 'i0'"):
        session.observe("gone")
    session.observe("gone", unknown="skip")
    np.testing.assert_array_equal(session.state(), before)
    with pytest.raises(UserError, match="1 of 2 ids are of no item"):
        together.observe(["i1", "gone"])
    assert [each.num_events for each in together] == [0, 0]
    together.observe(["i1", "gone"], unknown="skip")
    assert [each.num_events for each in together] == [1, 0]
    with pytest.raises(UserError, match="1 ids; expected one"):
        together.observe(["i1"])
    with pytest.raises(UserError, match="1 states; expected one"):
        together.restore([before])


def test_without_a_start_position_popularity_answers() -> None:
    recommender = random_recommender(random_export(predict_first=False))
    assert recommender.answers_empty == "popularity"
    popular = ["i0", "i1", "i2"]  # the fixture's training counts descend
    assert [item.item_id for item in recommender.session().recommend(3)] == popular
    together = recommender.sessions(2)
    together.observe(["i4", None])
    first, second = together.recommend(3, deny=[["i1"], ["i1"]])
    assert_close(first, recommender.session(["i4"]).recommend(3, deny=["i1"]))
    assert [item.item_id for item in second] == ["i0", "i2", "i3"]
    with pytest.raises(UserError, match=r"trained without loss\.predict_first"):
        recommender.session().output()
    with pytest.raises(UserError, match=r"trained without loss\.predict_first"):
        recommender.encode([np.empty(0, np.int64)])


def recommender_of(mixer: str) -> Recommender:
    return random_recommender(random_export(random_model(mixer=mixer, window=6, head_width=4, low_pass=1)))


@pytest.mark.parametrize("mixer", OTHER_MIXERS)
def test_with_other_mixers_a_session_always_says_what_its_history_does(mixer: str) -> None:
    """Beyond max_length, too; kept states and sessions together say the same."""
    recommender = recommender_of(mixer)
    events = [f"i{item}" for item in np.random.default_rng(0).integers(0, 30, 20)]
    session, together, kept = recommender.session(), recommender.sessions(2), recommender.session()
    for num_events in range(len(events) + 1):
        (expected,) = recommender.recommend([events[:num_events]], k=30)
        assert_close(session.recommend(30), expected)
        assert_close(together.recommend(30)[1], expected)
        assert session.num_events == num_events == together[1].num_events
        kept.restore(session.state())
        assert kept.recommend(30) == session.recommend(30)
        np.testing.assert_array_equal(kept.state(), session.state())
        if num_events < len(events):
            session.observe(events[num_events])
            together.observe([None, events[num_events]])
    assert recommender.max_length == 6 < len(events)
    assert session.state().shape == (HEADER_LENGTH + 2 * 6 + 2 * len(set(events)),)
    assert_close(together.recommend(30)[0], recommender.session().recommend(30))
    assert session.num_bytes == 6 * 8 + 16 * 4  # rows, and the output


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state[:-1], f"the state has {HEADER_LENGTH + 17} numbers; expected {HEADER_LENGTH + 18}: it is"),
        (with_number(1, 1), "the state is of another model: layout of states 1; this one has 2"),
        (with_number(HEADER_LENGTH - 4, 4), f"the state has {HEADER_LENGTH + 18} numbers; expected"),
        (with_number(HEADER_LENGTH, 7), "the state is damaged"),  # an event of an item that was not seen
        (with_number(HEADER_LENGTH, 0.5), "the state is damaged"),
        (with_number(HEADER_LENGTH + 1, np.nan), "the state is damaged"),
        (with_number(HEADER_LENGTH + 4, 0), "the state is damaged"),  # i3 again is i0 now: seen in another order
        (with_number(-2, 14), "the state is damaged"),  # seen twice
    ],
)
def test_damaged_events_are_refused(change: Callable[[np.ndarray], object], complaint: str) -> None:
    recommender = recommender_of("attention")
    state = recommender.session(HISTORY).state()
    assert refused(recommender.session(["i1"]), change(state)).startswith(complaint)


def test_a_state_cannot_have_seen_more_than_it_has_observed() -> None:
    """Of eight events the last six are kept, of five items: two more can have been seen before, and not three."""
    recommender = recommender_of("attention")
    state = recommender.session(["i8", "i9", "i1", "i1", "i2", "i3", "i4", "i5"]).state()
    session = recommender.session()
    session.restore(state)
    assert session.num_events == 8 and session.num_seen == 7
    more = np.concatenate((state, np.array([10, 0], np.float32)))
    more[HEADER_LENGTH - 2] += 1
    assert refused(session, more).startswith("the state is damaged")


def test_without_a_start_position_popularity_answers_other_mixers_too() -> None:
    recommender = random_recommender(random_export(random_model(mixer="attention", window=6), predict_first=False))
    together = recommender.sessions(2)
    assert [item.item_id for item in together.recommend(3)[0]] == ["i0", "i1", "i2"]
    together.observe(["i4", None])
    assert_close(together.recommend(3)[0], recommender.recommend([["i4"]], 3)[0])
    with pytest.raises(UserError, match=r"trained without loss\.predict_first"):
        recommender.session().output()
